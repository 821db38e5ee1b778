"""The second pass: a whole utterance to cased and punctuated text.

Moonshine's encoder sees all of the utterance's samples at once, and its decoder gives the most
probable token again and again (greedy). Tokens that are guessed beforehand cost less: the decoder
looks at several in one call, those that are right are taken, and the result is what it would have
been without them (Leviathan et al. 2023, arXiv 2211.17192). Samples in, text out: nothing is
remembered, so that several threads may run several utterances.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from engine.messages import Hotword
from engine.model_file import open_session
from engine.speech import moonshine
from engine.speech.tensors import CONV1_HOP, LAYERS, WIDTH
from engine.speech.vocabulary import BEGIN, END, Vocabulary, Word

RATE_HZ = 16000
LONGEST_S = 32.0  # the graphs' tables of positions end there
MOST_TOKENS = 256  # and the decoder's there
_SHORTEST = RATE_HZ // 5  # samples; what is shorter is filled up with silence
# Moonshine's own bound against loops: nobody speaks so many tokens a second for long.
_TOKENS_PER_S, _SPARE_TOKENS = 6.5, 8
# Guesses of one call: a wrong one costs a sixth of a call, a right one saves a call. After a wrong
# one few are made, after right ones more. Always an odd number: ONNX Runtime's product rounds the
# last of an odd number of rows differently (1.32.0, MatMulNBits), and then a draft could change a
# token.
_FEWEST, _MOST = 1, 15
# How far behind a wrong guess the right token is looked for, and one further for each that is not
# found: it may be one that the draft lacks, a comma most often.
_REACH = 4
# Of a hotword's boost, for the first of its tokens, with which other words begin too.
_FIRST_PART = 0.25

Memory = dict[str, NDArray[np.float32]]


class Transcript(NamedTuple):
    """What was said."""

    text: str
    words: tuple[Word, ...]
    tokens: tuple[int, ...]  # a draft for the next pass over the same beginning


class _Found(NamedTuple):
    """Tokens, and the natural logarithm of each one's probability."""

    tokens: list[int]
    log_probs: list[float]


class SecondPass:
    """The recogniser of whole utterances.

    Parameters
    ----------
    folder : Path
        ``second_pass`` of a model that ``murmur models build speech`` has built.

    Raises
    ------
    ModelFileError
        If a graph cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        self._encoder, self._decoder = (
            open_session((folder / f"{name}.onnx").read_bytes(), folder=folder)
            for name in ("encoder", "decoder")
        )
        self.vocabulary = Vocabulary(moonshine.pieces((folder / "tokenizer.bin").read_bytes()))
        (self._filler,) = self.vocabulary.encode("the")  # a guess, where there is no other
        self._memory = [output.name for output in self._encoder.get_outputs()]

    def transcribe(
        self,
        samples: NDArray[np.float32],
        draft: Sequence[int] = (),
        hotwords: Iterable[Hotword] = (),
    ) -> Transcript:
        """Return what is said in an utterance.

        Parameters
        ----------
        samples : (samples,) float32
            At 16 kHz, in [-1, 1], at most :data:`LONGEST_S`.
        draft : sequence of int
            Tokens that it may begin with or hold. They change the time that it takes, and
            nothing else.
        hotwords : iterable of Hotword

        Raises
        ------
        ValueError
            If there are more samples.
        """
        if samples.ndim != 1 or len(samples) > LONGEST_S * RATE_HZ:
            raise ValueError(
                f"samples: expected one axis of at most {LONGEST_S:g} s, found {samples.shape}"
            )
        memory = dict(
            zip(
                self._memory,
                self._encoder.run(self._memory, {"audio": _hops(samples)}),
                strict=True,
            )
        )
        most = int(len(samples) / RATE_HZ * _TOKENS_PER_S) + _SPARE_TOKENS
        phrases = _Phrases(self.vocabulary, hotwords)
        found = _Decoding(self._decoder, memory, phrases, most, self._filler).run(draft)
        words = self.vocabulary.words(*found)
        return Transcript(" ".join(word.text for word in words), tuple(words), tuple(found.tokens))


def _hops(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the samples that make whole frames, (1, samples), as the encoder's graph wants them.

    A frame of 24 ms is 6 hops, and the last one sees 8 more but for the very last sample. What is
    left over makes no frame.
    """
    samples = np.pad(samples, (0, max(1, _SHORTEST - len(samples))))
    frames = (len(samples) // CONV1_HOP - 8) // 6
    return samples[None, : (6 * frames + 8) * CONV1_HOP].astype(np.float32, copy=False)


class _Decoding:
    """The decoding of one utterance."""

    def __init__(
        self,
        session: ort.InferenceSession,
        memory: Memory,
        phrases: "_Phrases",
        most: int,
        filler: int,
    ) -> None:
        self._session, self._memory, self._phrases, self._most = session, memory, phrases, most
        self._filler = filler
        names = [f"{kind}.{layer}" for layer in range(LAYERS) for kind in ("keys", "values")]
        room = most + 2 + _MOST
        self._past = {name: np.empty((1, room, WIDTH), np.float32) for name in names}
        self._known = 0  # tokens whose keys and values are kept
        self._outputs = ["best", "probability", *(f"{name}.new" for name in names)]
        if phrases:
            self._outputs.append("logits")

    def run(self, draft: Sequence[int]) -> _Found:
        """Return the tokens up to the end, or to the bound."""
        found = _Found([], [])
        rest, width, last, missed = list(draft), _MOST, BEGIN, 0
        while True:
            guesses = rest[:width]
            if len(guesses) % 2 == 0:
                guesses.append(self._filler)
            new = self._advance([last, *guesses])
            right = len(new.tokens) - 1
            width = min(2 * width + 1, _MOST) if right == len(guesses) else _FEWEST
            for token, log_prob in zip(*new, strict=True):
                if token == END:
                    return found
                found.tokens.append(token)
                found.log_probs.append(log_prob)
                if len(found.tokens) == self._most:
                    return _without_loop(found)
            last = found.tokens[-1]
            rest = rest[right:]
            near = rest[: _REACH + missed]
            if last in near:
                rest, missed = rest[near.index(last) + 1 :], 0
            else:
                missed += 1

    def _advance(self, tokens: list[int]) -> _Found:
        """Run some tokens, of which all but the first are guesses.

        Returns
        -------
        The guesses that are right, and the token behind them.
        """
        count, known = len(tokens), self._known
        ahead = np.arange(known + count) > np.arange(count)[:, None] + known
        feed = self._memory | {name: past[:, :known] for name, past in self._past.items()}
        feed |= {
            "tokens": np.array([tokens]),
            "position": np.array([known]),
            "mask": np.where(ahead, np.float32(-1e4), np.float32(0))[None, None],
        }
        best, probability, *new = self._session.run(self._outputs, feed)
        logits = new.pop()[0] if self._phrases else None
        for past, rows in zip(self._past.values(), new, strict=True):
            past[:, known : known + count] = rows
        found = _Found([], [])
        for place in range(count):
            token, log_prob = int(best[0, place]), math.log(probability[0, place] + 1e-9)
            if logits is not None:
                token, log_prob = self._phrases.choose(token, log_prob, logits[place])
            found.tokens.append(token)
            found.log_probs.append(log_prob)
            if place + 1 < count and tokens[place + 1] != token:
                break
        self._known += len(found.tokens)
        return found


def _without_loop(found: _Found) -> _Found:
    """Return tokens that came to no end without their repetitions at the end."""
    tokens = found.tokens
    for period in range(1, len(tokens) // 2 + 1):
        copies, unit = 1, tokens[-period:]
        while tokens[-(copies + 1) * period : -copies * period] == unit:
            copies += 1
        if copies >= (2 if period >= 4 else 3):
            kept = len(tokens) - (copies - 1) * period
            return _Found(tokens[:kept], found.log_probs[:kept])
    return found


class _Phrases:
    """Hotwords, followed token by token; they raise what begins and continues them.

    Parameters
    ----------
    vocabulary : Vocabulary
    hotwords : iterable of Hotword
        Each as it is written, and with its first letter the other way.
    """

    def __init__(self, vocabulary: Vocabulary, hotwords: Iterable[Hotword]) -> None:
        self._spelt: dict[tuple[int, ...], float] = {}
        for hotword in hotwords:
            first, others = hotword.phrase[:1], hotword.phrase[1:]
            for written in (first + others, first.swapcase() + others):
                self._spelt[tuple(vocabulary.encode(written))] = hotword.boost
        self._begun: list[tuple[tuple[int, ...], int]] = []  # phrase, tokens of it that are there

    def __bool__(self) -> bool:
        return bool(self._spelt)

    def choose(self, token: int, log_prob: float, logits: NDArray[np.float32]) -> tuple[int, float]:
        """Return the best token and the logarithm of its probability, given those before."""
        total = float(logits[token]) - log_prob
        candidates = [*self._begun, *((phrase, 0) for phrase in self._spelt)]
        raised = logits.copy()
        for number, boost in self._boosts(candidates).items():
            raised[number] += boost
        best = int(raised.argmax())
        self._begun = [
            (phrase, place + 1)
            for phrase, place in candidates
            if phrase[place] == best and place + 1 < len(phrase)
        ]
        return best, float(logits[best]) - total

    def _boosts(self, candidates: list[tuple[tuple[int, ...], int]]) -> dict[int, float]:
        """Return by how much each token is raised; if several phrases name it, by the most."""
        boosts: dict[int, float] = {}
        for phrase, place in candidates:
            part = _FIRST_PART if place == 0 and len(phrase) > 1 else 1.0
            boost = part * self._spelt[phrase]
            boosts[phrase[place]] = max(boost, boosts.get(phrase[place], boost))
        return boosts
