"""Prefix beam search over a CTC model's log-probabilities (Graves 2012; Hannun et al. 2014).

A prefix is a text that the frames so far may have said. Its probability is the sum over all
alignments, multiplied by what a language model and the stream's hotwords make of it; the most
probable prefixes are kept. Probabilities are kept as they are, with a common factor taken out,
so that a frame costs products and sums and no logarithm.

Each row is searched by itself, in Python: per frame, time goes by the kept prefixes times the
labels that are probable there. A frame in which only the blank is probable costs nothing.
"""

import math
from collections.abc import Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.messages import Speech
from engine.speech.ctc import BLANK, SEPARATOR, Emitted, Hypothesis, Transcript
from engine.speech.hotwords import Hotwords
from engine.speech.language import Both, Indifferent, Language, make_room

_TINY = 1e-100  # below which the best prefix's probability is brought to 1 again
_MAX_OPEN = 96  # labels of a prefix; beyond, what all prefixes have in common becomes final
_KEPT_OPEN = 48  # labels that stay open where prefixes have no word in common
_MAX_STATES = 8192  # of a language model, whose factors are kept; some 0.3 KB each

Trace = tuple[tuple[int, int, float], ...]  # of each label: first and last frame, peak; see Emitted


class _Heard(NamedTuple):
    """A label that is probable in a frame."""

    label: int
    p: float
    log_p: float


class _Prefix:
    """A text that a row may have said, and how probable it is. One character a label.

    ``blank`` and ``token`` are the probabilities of all alignments that end in the blank and in
    the last label, ``best_blank`` and ``best_token`` those of the best alignment, whose
    frames are the trace; ``total``, ``best`` and ``trace`` are of both.
    """

    __slots__ = (
        *("text", "last", "state", "factors", "blank", "token", "best_blank", "best_token"),
        *("trace_blank", "trace_token", "total", "best", "trace"),
    )

    def __init__(self, text: str, last: int, state: Any, factors: dict[int, float]) -> None:
        self.text, self.last = text, last
        self.state, self.factors = state, factors
        self.blank = self.best_blank = 0.0
        self.token = self.best_token = 0.0
        self.trace_blank: Trace = ()
        self.trace_token: Trace = ()
        self.total = self.best = 0.0
        self.trace: Trace = ()

    def rest(self) -> None:
        """Pass a frame in which only the blank is probable."""
        self.blank, self.token = self.total, 0.0
        self.best_blank, self.best_token = self.best, 0.0
        self.trace_blank = self.trace

    def stay(self, frame: int, blank: float, heard: _Heard | None, separates: bool) -> None:
        """Pass a frame without growing: by the blank, or by saying the last label again.

        A separator after a separator, even after a blank, adds nothing.
        """
        if heard is None:
            self.token = self.best_token = 0.0
        elif separates:
            self.token, self.best_token = self.total * heard.p, self.best * heard.p
            self.trace_token = self.trace
        else:
            self.token *= heard.p
            self.best_token *= heard.p
            if self.trace_token:
                *before, (first, _, peak) = self.trace_token
                peak = max(peak, heard.log_p)
                self.trace_token = (*before, (first, frame + 1, peak))
        self.blank, self.best_blank = self.total * blank, self.best * blank
        self.trace_blank = self.trace

    def enter(self, p: float, best: float, trace: Trace) -> None:
        """Add what comes from the prefix that is shorter by one label."""
        self.token += p
        if best > self.best_token:
            self.best_token, self.trace_token = best, trace

    def sum_up(self) -> None:
        self.total = self.blank + self.token
        if self.best_blank >= self.best_token:
            self.best, self.trace = self.best_blank, self.trace_blank
        else:
            self.best, self.trace = self.best_token, self.trace_token

    def scale(self, factor: float) -> None:
        self.blank *= factor
        self.token *= factor
        self.best_blank *= factor
        self.best_token *= factor
        self.sum_up()

    def shorten(self, count: int) -> None:
        """Let go of labels at the beginning."""
        self.text, self.trace = self.text[count:], self.trace[count:]
        self.trace_blank, self.trace_token = self.trace_blank[count:], self.trace_token[count:]


# A prefix that becomes longer: its probability, the best alignment's and that one's trace so far,
# then the prefix and the label.
_Move = tuple[float, float, Trace, _Prefix, _Heard]


class _Settings(NamedTuple):
    """What is the same for all rows; see :class:`BeamDecoder`."""

    labels: tuple[str, ...]
    separator: int  # BLANK if labels are whole words
    beam: int
    worst: float  # how probable a prefix must be, as a part of the best one


class _Weighed(NamedTuple):
    """A language model, and what it said of the states met last.

    For each state and label the factor, exp of its score; filled as labels are heard.
    """

    language: Language[Any]
    factors: dict[Any, dict[int, float]]


class _Search:
    """The search of one row, from one reset to the next."""

    def __init__(self, settings: _Settings, language: _Weighed) -> None:
        self._settings, self._language, self._factors = settings, *language
        self.frames = 0
        self._log_scale = 0.0  # natural log of the common factor
        self._settled = Transcript(settings.labels)  # what is no longer in the prefixes
        state = self._language.begin()
        empty = _Prefix("", settings.separator, state, self._factors_after(state))
        empty.blank = empty.best_blank = 1.0
        empty.sum_up()
        self._beam = [empty]  # the best first
        self._resting = True  # whether the last frame said nothing

    def rest(self, log_blank: float) -> None:
        """Pass a frame in which no label is probable."""
        if not self._resting:
            for prefix in self._beam:
                prefix.rest()
            self._resting = True
        self._log_scale += log_blank
        self.frames += 1

    def step(self, log_blank: float, heard: list[_Heard]) -> None:
        """Pass a frame in which some labels are probable."""
        blank = math.exp(log_blank)
        likely = max(blank, *(one.p for one in heard))
        grown, entering = self._grow(heard, self._beam[0].total * likely * self._settings.worst)
        by_label = {one.label: one for one in heard}
        separator = self._settings.separator
        for prefix in self._beam:
            last = prefix.last
            prefix.stay(self.frames, blank, by_label.get(last), last == separator)
        for prefix, (p, best, trace, _, one) in entering:
            prefix.enter(p, best, self._longer(trace, one))
        for prefix in self._beam:
            prefix.sum_up()
        self._keep(grown)
        self._resting = False
        self.frames += 1

    def _grow(
        self, heard: list[_Heard], floor: float
    ) -> tuple[list[_Move], list[tuple[_Prefix, _Move]]]:
        """Return the moves to new prefixes, and those to prefixes that there are already."""
        separator = self._settings.separator
        present = {prefix.text: prefix for prefix in self._beam}
        grown: list[_Move] = []
        entering: list[tuple[_Prefix, _Move]] = []
        for prefix in self._beam:
            total, last, factors, text = prefix.total, prefix.last, prefix.factors, prefix.text
            for one in heard:
                label, factor, _ = one
                weight = factors.get(label)
                if weight is None:
                    weight = math.exp(self._language.score(prefix.state, label))
                    factors[label] = weight
                factor *= weight
                if label != last:
                    p, best, trace = total * factor, prefix.best * factor, prefix.trace
                elif label != separator:  # said anew only after a blank
                    p, best = prefix.blank * factor, prefix.best_blank * factor
                    trace = prefix.trace_blank
                else:
                    continue
                if p > floor:
                    target = present.get(text + chr(label))
                    if target is None:
                        grown.append((p, best, trace, prefix, one))
                    else:
                        entering.append((target, (p, best, trace, prefix, one)))
        return grown, entering

    def _keep(self, grown: list[_Move]) -> None:
        """Make the most probable of old and new prefixes the beam."""
        pool: list[tuple[float, _Prefix | _Move]] = [(old.total, old) for old in self._beam]
        pool += [(move[0], move) for move in grown]
        pool.sort(key=itemgetter(0), reverse=True)
        best = pool[0][0]
        cut = best * self._settings.worst
        self._beam = [
            item if isinstance(item, _Prefix) else self._child(item)
            for p, item in pool[: self._settings.beam]
            if p >= cut
        ]
        if 0.0 < best < _TINY:
            for prefix in self._beam:
                prefix.scale(1.0 / best)
            self._log_scale += math.log(best)
        if len(self._beam[0].text) > _MAX_OPEN:
            self._settle()

    def _child(self, move: _Move) -> _Prefix:
        p, best, trace, parent, heard = move
        state = self._language.advance(parent.state, heard.label)
        text = parent.text + chr(heard.label)
        child = _Prefix(text, heard.label, state, self._factors_after(state))
        child.enter(p, best, self._longer(trace, heard))
        child.sum_up()
        return child

    def _factors_after(self, state: Any) -> dict[int, float]:
        factors = self._factors.get(state)
        if factors is None:
            make_room(self._factors, _MAX_STATES)
            factors = self._factors[state] = {}
        return factors

    def _longer(self, trace: Trace, heard: _Heard) -> Trace:
        return (*trace, (self.frames, self.frames + 1, heard.log_p))

    def _settle(self) -> None:
        """Let go of words that all prefixes share, or else of those that disagree with the best."""
        count = self._complete(self._agreed())
        if not count:
            best = self._beam[0].text[:-_KEPT_OPEN]
            count = self._complete(best) or len(best)
            self._beam = [old for old in self._beam if old.text.startswith(best[:count])]
        _add(self._settled, self._beam[0], count)
        for prefix in self._beam:
            prefix.shorten(count)

    def _agreed(self) -> str:
        """Return what all prefixes begin with."""
        texts = [prefix.text for prefix in self._beam]
        first, last = min(texts), max(texts)  # all others lie between them
        for place, (one, other) in enumerate(zip(first, last, strict=False)):
            if one != other:
                return first[:place]
        return first

    def _complete(self, text: str) -> int:
        """Return how many labels at the beginning cannot change by what is said next."""
        if self._settings.separator == BLANK:
            return max(0, len(text) - 1)  # the last word's frames may go on
        return text.rfind(chr(self._settings.separator)) + 1

    def alternatives(self, count: int, ended: bool) -> list[Hypothesis]:
        """Return the best hypotheses of distinct texts."""
        separator = chr(self._settings.separator)
        sums: dict[str, float] = {}
        likeliest: dict[str, _Prefix] = {}
        for prefix in self._beam:
            p = prefix.total
            if ended:
                inside = prefix.last != self._settings.separator
                p *= math.exp(self._language.end(prefix.state, inside))
            text = prefix.text.removesuffix(separator)
            sums[text] = sums.get(text, 0.0) + p
            likeliest.setdefault(text, prefix)
        chosen = sorted(sums, key=sums.__getitem__, reverse=True)[:count]
        return [self._hypothesis(likeliest[text], sums[text]) for text in chosen]

    def _hypothesis(self, prefix: _Prefix, p: float) -> Hypothesis:
        transcript = self._settled.copy()
        _add(transcript, prefix, len(prefix.text))
        score = self._log_scale + (math.log(p) if p > 0.0 else -math.inf)
        return Hypothesis(transcript.spoken(), score)

    def stable_words(self) -> int:
        transcript = self._settled.copy()
        _add(transcript, self._beam[0], len(self._agreed()))
        return transcript.num_complete

    def take(self) -> tuple[Any, ...]:
        prefixes = [[getattr(prefix, name) for name in _CARRIED] for prefix in self._beam]
        settled = self._settled.words[:], self._settled.open[:]
        return self.frames, self._log_scale, self._resting, *settled, prefixes

    def put(self, carried: Sequence[Any]) -> None:
        self.frames, self._log_scale, self._resting = carried[:3]
        words, last_word, prefixes = carried[3:]
        self._settled = Transcript(self._settings.labels, words, last_word)
        self._beam = []
        for fields in prefixes:
            named = dict(zip(_CARRIED, map(_frozen, fields), strict=True))
            state = named["state"]
            prefix = _Prefix(named["text"], named["last"], state, self._factors_after(state))
            for name, value in named.items():
                setattr(prefix, name, value)
            prefix.sum_up()
            self._beam.append(prefix)


_CARRIED = (
    *("text", "last", "state", "blank", "token", "best_blank", "best_token"),
    *("trace_blank", "trace_token"),
)


def _add(transcript: Transcript, prefix: _Prefix, count: int) -> None:
    """Add a prefix's first labels."""
    for symbol, frames in zip(prefix.text[:count], prefix.trace, strict=False):
        transcript.add(Emitted(ord(symbol), *frames))


def _frozen(value: Any) -> Any:
    """Return lists as tuples: a way through bytes makes the one of the other."""
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


class BeamDecoder:
    """The most probable texts of each row.

    Parameters
    ----------
    labels : tuple of str
        The first is the blank.
    num_slots : int
    language : Language, optional
        Over the same labels; by default all texts are alike.
    beam : int
        How many prefixes are kept.
    margin : float
        Natural log by which a prefix may be less probable than the best.
    floor : float
        Natural log; labels less probable than this take no part in a frame.
    """

    def __init__(
        self,
        labels: tuple[str, ...],
        num_slots: int,
        language: Language[Any] | None = None,
        beam: int = 16,
        margin: float = 12.0,
        floor: float = -7.0,
    ) -> None:
        separator = labels.index(SEPARATOR) if SEPARATOR in labels else BLANK
        self._settings = _Settings(labels, separator, beam, math.exp(-margin))
        self._floor = floor
        self._language = _Weighed(language or Indifferent(), {})
        self._languages = [self._language] * num_slots
        self._options = [Speech()] * num_slots
        self._rows = [_Search(self._settings, self._language) for _ in range(num_slots)]

    def open(self, slot: int, speech: Speech) -> None:
        """Begin anew with a stream's hotwords.

        Raises
        ------
        Refused
            If one cannot be spelt with the labels; the row is as it was.
        """
        language = self._language
        if speech.hotwords:
            hotwords = Hotwords(self._settings.labels, speech.hotwords)
            language = _Weighed(Both(self._language.language, hotwords), {})
        self._languages[slot], self._options[slot] = language, speech
        self.reset(slot)

    def reset(self, slot: int) -> None:
        """Forget the utterance and count frames from 0; hotwords stay."""
        self._rows[slot] = _Search(self._settings, self._languages[slot])

    def push(self, slots: NDArray[np.intp], log_probs: NDArray[np.float32]) -> None:
        """Take the next frames of some rows.

        Parameters
        ----------
        slots : (rows,) intp
            Distinct.
        log_probs : (rows, frames, labels) float32
            Natural logarithms.
        """
        heard = log_probs > self._floor
        heard[:, :, BLANK] = False
        blanks = log_probs[:, :, BLANK].tolist()
        places = [axis.tolist() for axis in np.nonzero(heard)]
        said: list[list[list[_Heard]]] = [[[] for _ in row] for row in blanks]
        for row, frame, label, log_p in zip(*places, log_probs[heard].tolist(), strict=True):
            said[row][frame].append(_Heard(label, math.exp(log_p), log_p))
        for slot, row_blanks, row_said in zip(slots.tolist(), blanks, said, strict=True):
            search = self._rows[slot]
            for log_blank, frame_said in zip(row_blanks, row_said, strict=True):
                if frame_said:
                    search.step(log_blank, frame_said)
                else:
                    search.rest(log_blank)

    def best(self, slot: int, ended: bool = False) -> Hypothesis:
        """Return the most probable text; once the utterance has ended, its last word is whole."""
        return self._rows[slot].alternatives(1, ended)[0]

    def alternatives(self, slot: int, count: int, ended: bool = True) -> list[Hypothesis]:
        """Return some of the most probable texts, the best first, no two alike."""
        return self._rows[slot].alternatives(count, ended)

    def frames(self, slot: int) -> int:
        """Return the frames since the last reset."""
        return self._rows[slot].frames

    def stable_words(self, slot: int) -> int:
        """Return how many words at the beginning are complete and the same in all prefixes."""
        return self._rows[slot].stable_words()

    def take(self, slot: int) -> tuple[Any, ...]:
        """Return everything that the row carries, in numbers, texts, bytes and tuples."""
        return msgspec.to_builtins(self._options[slot]), self._rows[slot].take()

    def put(self, slot: int, carried: Sequence[Any]) -> None:
        """Go on from what was taken, also after a way through MessagePack."""
        options, search = carried
        self.open(slot, msgspec.convert(options, Speech))
        self._rows[slot].put(search)
