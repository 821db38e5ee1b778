"""Language models as a beam hears them: what each next label adds to a hypothesis's score.

Scores are natural logs and already weighted: ``alpha`` times a log-probability, and ``beta`` for
each letter or word, without which a language model prefers short texts. There are n-grams of
labels (letters, or whole words), n-grams of words that are spelt in letters, and sums of two.
Between words stands the label :data:`~engine.speech.ctc.SEPARATOR`, if there is one.
"""

from collections.abc import Hashable, Sequence
from itertools import islice
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from engine.errors import ModelFileError
from engine.speech.ctc import SEPARATOR
from engine.speech.ngram import SPACE, UNKNOWN, Ngrams, State

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

    def scores(self, state: S) -> NDArray[np.float64]:
        """Return what each next label adds, (labels,)."""

    def end(self, state: S, inside: bool) -> float:
        """Return what the end of the text adds; ``inside`` says whether a word is open."""


class Indifferent:
    """A language model to which all texts are alike."""

    def __init__(self, num_labels: int) -> None:
        self._scores = np.zeros(num_labels)

    def begin(self) -> None:
        return None

    def advance(self, state: None, label: int) -> None:
        return None

    def scores(self, state: None) -> NDArray[np.float64]:
        return self._scores

    def end(self, state: None, inside: bool) -> float:
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

    def begin(self) -> State:
        if self._separator is None:
            return self._ngrams.begin()
        return self._ngrams.advance((), self._words[self._separator])

    def advance(self, state: State, label: int) -> State:
        return self._ngrams.advance(state, self._words[label])

    def scores(self, state: State) -> NDArray[np.float64]:
        scores = self._ngrams.all_log_probs(state)[self._words] * self._alpha + self._beta
        scores[0] = 0.0
        return scores

    def end(self, state: State, inside: bool) -> float:
        if self._separator is None or not inside:
            return 0.0
        log_prob = self._ngrams.log_prob(state, self._words[self._separator])
        return self._alpha * log_prob + self._beta


class _Spelt(NamedTuple):
    """The beginning of a word, and what may become of it."""

    begin: int  # of the words that begin so, among all words sorted by spelling
    end: int
    word: int  # of the model, if it is a whole one; -1 if not
    promise: float  # natural log of what it is worth before it is complete
    letters: State  # of the model of letters
    letters_log_prob: float
    scores: NDArray[np.float64]  # (labels,) what each next letter adds


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
        The first is the blank; at most 255.
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
        self._num_labels, self._separator = len(labels), labels.index(SEPARATOR)
        self._unknown_word = ngrams.ids.get(UNKNOWN, -1)
        self._unknown = unknown
        self._letters = None if letters is None else LabelModel(letters, labels, 1.0, 0.0)
        self._words, self._spelling, self._unigrams = self._spell_all(labels)
        self._spelt: dict[bytes, _Spelt] = {}

    def begin(self) -> tuple[State, bytes]:
        return self._ngrams.begin(), b""

    def advance(self, state: tuple[State, bytes], label: int) -> tuple[State, bytes]:
        history, spelt = state
        if label != self._separator:
            return history, spelt + bytes([label])
        word = self._look(spelt).word
        if word < 0:
            word = self._unknown_word
        return (self._ngrams.advance(history, word) if word >= 0 else ()), b""

    def scores(self, state: tuple[State, bytes]) -> NDArray[np.float64]:
        history, spelt = state
        scores = self._look(spelt).scores.copy()
        scores[self._separator] = self._word_end(history, self._look(spelt))
        return scores

    def end(self, state: tuple[State, bytes], inside: bool) -> float:
        history, spelt = state
        return self._word_end(history, self._look(spelt)) if inside else 0.0

    def _word_end(self, history: State, spelt: _Spelt) -> float:
        if spelt.word >= 0:
            log_prob = self._ngrams.log_prob(history, spelt.word)
        else:
            log_prob = self._unknown + spelt.letters_log_prob
            log_prob += self._next_letter(spelt.letters)[self._separator]
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
            return self._make(0, len(self._words), 0, self._begin_letters, 0.0)
        before, letter = self._look(text[:-1]), text[-1]
        begin = end = before.begin
        if before.begin < before.end:
            column = self._spelling[len(text) - 1, before.begin : before.end]
            begin += int(np.searchsorted(column, letter))
            end += int(np.searchsorted(column, letter, "right"))
        letters = before.letters
        if self._letters is not None:
            letters = self._letters.advance(letters, letter)
        log_prob = before.letters_log_prob + float(self._next_letter(before.letters)[letter])
        return self._make(begin, end, len(text), letters, log_prob)

    def _make(
        self, begin: int, end: int, depth: int, letters: State, letters_log_prob: float
    ) -> _Spelt:
        unknown = self._unknown + letters_log_prob
        if self._unknown_word >= 0:
            unknown += float(self._ngrams.log_probs[self._unknown_word])
        promises, word, promise = unknown + self._next_letter(letters), -1, unknown
        if begin < end:
            unigrams, next_letters = self._unigrams[begin:end], self._spelling[depth, begin:end]
            begins = np.flatnonzero(np.diff(next_letters, prepend=-1))
            promises[next_letters[begins]] = np.maximum.reduceat(unigrams, begins)
            promise = float(unigrams.max()) if depth else 0.0
            word = int(self._words[begin]) if next_letters[0] == 0 else -1
        scores = self._alpha * (promises - promise)
        scores[0] = 0.0
        return _Spelt(begin, end, word, promise, letters, letters_log_prob, scores)

    @property
    def _begin_letters(self) -> State:
        return () if self._letters is None else self._letters.begin()

    def _next_letter(self, letters: State) -> NDArray[np.float64]:
        if self._letters is None:
            return np.full(self._num_labels, -np.log(self._num_labels - 1))
        return self._letters.scores(letters)

    def _spell_all(
        self, labels: Sequence[str]
    ) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.float64]]:
        """Return the words sorted by spelling: number, letters (depth, words), unigram.

        Below a word's last letter stands the blank. Of words that are spelt alike, the most
        probable is kept.
        """
        numbers = {label: number for number, label in enumerate(labels) if number}
        best: dict[bytes, tuple[float, int]] = {}
        for word, text in enumerate(self._ngrams.vocabulary):
            if not all(letter in numbers for letter in text):
                text = text.lower()
            if all(letter in numbers for letter in text):
                spelt = bytes(numbers[letter] for letter in text)
                found = float(self._ngrams.log_probs[word]), word
                best[spelt] = max(best.get(spelt, found), found)
        if not best:
            raise ModelFileError("language model: expected words spelt with the labels, found none")
        words = sorted(best)
        spelling = np.zeros((max(map(len, words)) + 1, len(words)), np.uint8)
        for column, spelt in enumerate(words):
            spelling[: len(spelt), column] = list(spelt)
        log_probs, ids = zip(*(best[spelt] for spelt in words), strict=True)
        return np.array(ids), spelling, np.array(log_probs)


class Both(Generic[S, T]):
    """The sum of two language models over the same labels."""

    def __init__(self, first: Language[S], second: Language[T]) -> None:
        self._first, self._second = first, second

    def begin(self) -> tuple[S, T]:
        return self._first.begin(), self._second.begin()

    def advance(self, state: tuple[S, T], label: int) -> tuple[S, T]:
        return self._first.advance(state[0], label), self._second.advance(state[1], label)

    def scores(self, state: tuple[S, T]) -> NDArray[np.float64]:
        return self._first.scores(state[0]) + self._second.scores(state[1])

    def end(self, state: tuple[S, T], inside: bool) -> float:
        return self._first.end(state[0], inside) + self._second.end(state[1], inside)


class Cached(Generic[S]):
    """A language model that remembers what it said of the states met last.

    Parameters
    ----------
    language : Language
    max_states : int
        A state takes about 1 KB.
    """

    def __init__(self, language: Language[S], max_states: int = 8192) -> None:
        self.begin, self.advance, self.end = language.begin, language.advance, language.end
        self._language, self._max_states = language, max_states
        self._known: dict[S, tuple[NDArray[np.float64], list[float]]] = {}

    def scores(self, state: S) -> NDArray[np.float64]:
        return self._look(state)[0]

    def factors(self, state: S) -> list[float]:
        """Return what each next label multiplies a probability by: exp of its score."""
        return self._look(state)[1]

    def _look(self, state: S) -> tuple[NDArray[np.float64], list[float]]:
        known = self._known.get(state)
        if known is None:
            make_room(self._known, self._max_states)
            scores = self._language.scores(state)
            known = self._known[state] = scores, np.exp(scores).tolist()
        return known


def make_room(cache: dict[K, V], max_size: int) -> None:
    """Forget the older half of a full cache."""
    if len(cache) >= max_size:
        for key in list(islice(cache, max_size // 2)):
            del cache[key]
