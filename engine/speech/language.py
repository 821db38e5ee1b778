"""Language models as a beam hears them: what each next label adds to a hypothesis's score.

Scores are natural logs and already weighted: ``alpha`` times a log-probability, and ``beta`` for
each letter or word, without which a language model prefers short texts. There are n-grams of
labels (letters, or whole words), n-grams of words that are spelt in letters, and sums of two.
Between words stands the label :data:`~engine.speech.ctc.SEPARATOR`, if there is one.
"""

import math
from bisect import bisect_left
from collections.abc import Hashable, Sequence
from itertools import islice
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from engine.errors import ModelFileError
from engine.speech.ctc import SEPARATOR
from engine.speech.ngram import NOTHING, SPACE, UNKNOWN, Ngrams

_MAX_TOLD_APART = 64  # labels
_MAX_SPELT = 8192  # beginnings of words; about 1 KB each

K = TypeVar("K")
V = TypeVar("V")
S = TypeVar("S", bound=Hashable)
T = TypeVar("T", bound=Hashable)


class Language(Protocol[S]):
    """A language model over labels. A state is whatever of the text still matters."""

    def begin(self) -> S:
        """Return the state before the first label."""

    def advance(self, state: S, label: int) -> S:
        """Return the state after one more label, which is not the blank."""

    def score(self, state: S, label: int) -> float:
        """Return what a next label adds, which is not the blank."""

    def end(self, state: S, inside: bool) -> float:
        """Return what the end of the text adds; ``inside`` says whether a word is open."""


class Indifferent:
    """A language model to which all texts are alike; it tells them apart for long, though."""

    def begin(self) -> str:
        return ""

    def advance(self, state: str, label: int) -> str:
        return (state + chr(label))[-_MAX_TOLD_APART:]

    def score(self, state: str, label: int) -> float:
        return 0.0

    def end(self, state: str, inside: bool) -> float:
        return 0.0


class LabelModel:
    """N-grams whose words are the labels; :data:`~engine.speech.ngram.SPACE` is the separator.

    Parameters
    ----------
    ngrams : Ngrams
    labels : sequence of str
        The first is the blank.
    alpha : float
        Weight of the log-probabilities.
    beta : float
        Added for each label.

    Raises
    ------
    ModelFileError
        If a label is missing in the model.
    """

    def __init__(self, ngrams: Ngrams, labels: Sequence[str], alpha: float, beta: float) -> None:
        words = [SPACE if label == SEPARATOR else label for label in labels[1:]]
        missing = [word for word in words if word not in ngrams.ids]
        if missing:
            raise ModelFileError(f"language model: expected all labels, found no {missing}")
        self._ngrams, self._alpha, self._beta = ngrams, alpha, beta
        self._words = [-1, *(ngrams.ids[word] for word in words)]
        self._separator = labels.index(SEPARATOR) if SEPARATOR in labels else None

    def begin(self) -> int:
        if self._separator is None:
            return self._ngrams.begin()
        return self._ngrams.advance(NOTHING, self._words[self._separator])

    def advance(self, state: int, label: int) -> int:
        return self._ngrams.advance(state, self._words[label])

    def score(self, state: int, label: int) -> float:
        return self._alpha * self._ngrams.log_prob(state, self._words[label]) + self._beta

    def end(self, state: int, inside: bool) -> float:
        if self._separator is None or not inside:
            return 0.0
        return self.score(state, self._separator)


class _Spelt(NamedTuple):
    """The beginning of a word, and what may become of it."""

    begin: int  # of the words that begin so, among all, sorted by spelling
    end: int
    word: int  # of the model, if it is a whole one; -1 if not
    promise: float  # natural log of what it is worth before it is complete
    letters: int  # state of the model of letters
    letters_log_prob: float


class WordModel:
    """N-grams of words, spelt in letters.

    A word counts when the separator ends it. While it is being spelt, the best unigram of all
    words that begin so stands for it (look-ahead), so that a beam can compare hypotheses
    in the middle of words; the difference is made good at the word's end. A word that the model
    does not know has the probability of ``<unk>``, if there is one, times that of its letters.

    Parameters
    ----------
    ngrams : Ngrams
        Words that cannot be spelt with the labels, as they are or in lower case, are left out.
    labels : sequence of str
        The first is the blank; fewer than 255.
    alpha : float
        Weight of the log-probabilities.
    beta : float
        Added for each word.
    unknown : float
        Natural log, added to the log-probability of a word that the model does not know.
    letters : Ngrams, optional
        N-grams of letters, for unknown words; without it, all letters are equally probable.

    Raises
    ------
    ModelFileError
        If the labels spell none of the model's words.
    """

    def __init__(
        self,
        ngrams: Ngrams,
        labels: Sequence[str],
        alpha: float,
        beta: float,
        unknown: float = -5.0,
        letters: Ngrams | None = None,
    ) -> None:
        self._ngrams, self._alpha, self._beta = ngrams, alpha, beta
        self._separator = labels.index(SEPARATOR)
        self._unknown, self._unknown_word = unknown, ngrams.ids.get(UNKNOWN, -1)
        self._any_letter = -math.log(len(labels) - 1)
        self._letters = None if letters is None else LabelModel(letters, labels, 1.0, 0.0)
        self._words, self._ids, self._unigrams = _spell(ngrams, labels)
        self._spelt: dict[bytes, _Spelt] = {}

    def begin(self) -> tuple[int, bytes]:
        return self._ngrams.begin(), b""

    def advance(self, state: tuple[int, bytes], label: int) -> tuple[int, bytes]:
        history, spelt = state
        if label != self._separator:
            return history, spelt + bytes([label])
        word = self._look(spelt).word
        if word < 0:
            word = self._unknown_word
        return (self._ngrams.advance(history, word) if word >= 0 else NOTHING), b""

    def score(self, state: tuple[int, bytes], label: int) -> float:
        history, spelt = state
        if label == self._separator:
            return self._word_end(history, self._look(spelt))
        after = self._look(spelt + bytes([label]))
        return self._alpha * (after.promise - self._look(spelt).promise)

    def end(self, state: tuple[int, bytes], inside: bool) -> float:
        history, spelt = state
        return self._word_end(history, self._look(spelt)) if inside else 0.0

    def _word_end(self, history: int, spelt: _Spelt) -> float:
        if spelt.word >= 0:
            log_prob = self._ngrams.log_prob(history, spelt.word)
        else:
            log_prob = self._unknown + spelt.letters_log_prob
            log_prob += self._next_letter(spelt.letters, self._separator)
            if self._unknown_word >= 0:
                log_prob += self._ngrams.log_prob(history, self._unknown_word)
        return self._alpha * (log_prob - spelt.promise) + self._beta

    def _look(self, text: bytes) -> _Spelt:
        found = self._spelt.get(text)
        if found is None:
            make_room(self._spelt, _MAX_SPELT)
            found = self._spelt[text] = self._look_up(text)
        return found

    def _look_up(self, text: bytes) -> _Spelt:
        if not text:
            letters = NOTHING if self._letters is None else self._letters.begin()
            return _Spelt(0, len(self._words), -1, 0.0, letters, 0.0)
        before, letter = self._look(text[:-1]), text[-1]
        log_prob = before.letters_log_prob + self._next_letter(before.letters, letter)
        letters = before.letters
        if self._letters is not None:
            letters = self._letters.advance(letters, letter)
        begin = bisect_left(self._words, text, before.begin, before.end)
        end = bisect_left(self._words, text + b"\xff", begin, before.end)
        if begin == end:
            promise = self._unknown + log_prob
            if self._unknown_word >= 0:
                promise += self._ngrams.log_prob(NOTHING, self._unknown_word)
            return _Spelt(begin, end, -1, promise, letters, log_prob)
        word = self._ids[begin] if self._words[begin] == text else -1
        promise = float(self._unigrams[begin:end].max())
        return _Spelt(begin, end, word, promise, letters, log_prob)

    def _next_letter(self, letters: int, letter: int) -> float:
        return self._any_letter if self._letters is None else self._letters.score(letters, letter)


def _spell(
    ngrams: Ngrams, labels: Sequence[str]
) -> tuple[list[bytes], list[int], NDArray[np.float64]]:
    """Return the words that labels spell, in their order: the labels, the number, the unigram.

    Of words that are spelt alike, the most probable is kept.
    """
    numbers = {label: number for number, label in enumerate(labels) if number}
    best: dict[bytes, tuple[float, int]] = {}
    for word, text in enumerate(ngrams.vocabulary):
        if not all(letter in numbers for letter in text):
            text = text.lower()
        if all(letter in numbers for letter in text):
            spelt = bytes(numbers[letter] for letter in text)
            found = ngrams.log_prob(NOTHING, word), word
            best[spelt] = max(best.get(spelt, found), found)
    if not best:
        raise ModelFileError("language model: expected words spelt with the labels, found none")
    words = sorted(best)
    log_probs, ids = zip(*(best[spelt] for spelt in words), strict=True)
    return words, list(ids), np.array(log_probs)


class Both(Generic[S, T]):
    """The sum of two language models over the same labels."""

    def __init__(self, first: Language[S], second: Language[T]) -> None:
        self._first, self._second = first, second

    def begin(self) -> tuple[S, T]:
        return self._first.begin(), self._second.begin()

    def advance(self, state: tuple[S, T], label: int) -> tuple[S, T]:
        return self._first.advance(state[0], label), self._second.advance(state[1], label)

    def score(self, state: tuple[S, T], label: int) -> float:
        return self._first.score(state[0], label) + self._second.score(state[1], label)

    def end(self, state: tuple[S, T], inside: bool) -> float:
        return self._first.end(state[0], inside) + self._second.end(state[1], inside)


def make_room(cache: dict[K, V], max_size: int) -> None:
    """Forget the older half of a full cache."""
    if len(cache) >= max_size:
        for key in list(islice(cache, max_size // 2)):
            del cache[key]
