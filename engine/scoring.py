"""How right text is, how stable and how soon: error rates, changes after showing, lag.

Works on lists of words that were made alike (:mod:`engine.spoken`) and on times in seconds. No
sockets, no sound.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from rapidfuzz.distance import Levenshtein

Words = Sequence[str]

_DRAWS = 1000

AVERAGE_LAGGING = (
    "Ma et al. 2019 in its form for speech (Ma, Pino, Koehn 2020; SimulEval), computation aware: "
    "mean of (when a word was first shown - when an ideal writer, whose words are spread evenly "
    "over the sound, would have shown it), up to the first word shown after the end of the sound"
)


class Errors(NamedTuple):
    """Edits that turn a hypothesis into its reference, and what they are counted against."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    reference: int = 0  # length of the reference

    @property
    def edits(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Edits over the reference's length; not a number if that is empty."""
        return self.edits / self.reference if self.reference else float("nan")

    def plus(self, other: "Errors") -> "Errors":
        return Errors(*(one + more for one, more in zip(self, other, strict=True)))


class Changes(NamedTuple):
    """Of the words that were shown in partials, how many did not stay.

    Each partial is laid against the one before by the fewest edits. A word that is added or put in
    another's place is one showing, however many partials repeat it. It is changed when a later
    partial of the utterance, or the final, lacks it or has another word instead. A word that only
    moves, because one before it came or went, stays; but counted by place, which is stricter, a
    word stays only if its number in the utterance is the same.
    """

    shown: int = 0
    changed: int = 0

    @property
    def rate(self) -> float:
        return self.changed / self.shown if self.shown else float("nan")

    def plus(self, other: "Changes") -> "Changes":
        return Changes(self.shown + other.shown, self.changed + other.changed)


class Quantiles(NamedTuple):
    """Of times in seconds."""

    p50_s: float
    p90_s: float
    p99_s: float
    times: int


def errors(reference: Words, hypothesis: Words) -> Errors:
    """Count the fewest edits between two texts; of characters, if they are strings."""
    edits = Levenshtein.editops(reference, hypothesis)
    kinds = [edit.tag for edit in edits]
    return Errors(
        kinds.count("replace"), kinds.count("delete"), kinds.count("insert"), len(reference)
    )


def interval(each: Sequence[Errors]) -> tuple[float, float]:
    """Return where 95 % of error rates lie if recordings are drawn anew (Bisani and Ney 2004)."""
    counts = np.array([(one.edits, one.reference) for one in each])
    drawn = np.random.default_rng(0).integers(0, len(counts), (_DRAWS, len(counts)))
    edits, lengths = counts[drawn].sum(axis=1).T
    low, high = np.percentile(edits / lengths, [2.5, 97.5]).tolist()
    return low, high


def matches(reference: Words, hypothesis: Words) -> list[tuple[int, int]]:
    """Return the places of words that are right, as (in the reference, in the hypothesis)."""
    return [
        (block.a + step, block.b + step)
        for block in Levenshtein.editops(reference, hypothesis).as_matching_blocks()
        for step in range(block.size)
    ]


def changes(partials: Sequence[Words], final: Words, by_place: bool = False) -> Changes:
    """Count what was shown of an utterance and did not stay."""
    shown = changed = 0
    texts = [*partials, final]
    for before, text in zip(([], *partials), texts, strict=True):
        if by_place:
            stay = sum(one == other for one, other in zip(before, text, strict=False))
        else:
            stay = len(matches(before, text))
        changed += len(before) - stay
        if text is not final:
            shown += len(text) - stay
    return Changes(shown, changed)


def first_shown(partials: Sequence[tuple[float, Words]], final: Words) -> list[float | None]:
    """Return when each word of a final first appeared in a partial at its place.

    A partial is laid against that beginning of the final which it resembles most (fewest edits,
    then most equal words, then shortest); a word that is equal there appears. So a word that is
    missing or added before it does not hide it.

    Parameters
    ----------
    partials : sequence of (float, words)
        Time and text, in the order of time.
    final : words

    Returns
    -------
    list of float or None
        None: only the final had it.
    """
    first: list[float | None] = [None] * len(final)
    for at, words in partials:
        for place in _places(words, final):
            if first[place] is None:
                first[place] = at
    return first


def _places(words: Words, final: Words) -> list[int]:
    """Return the places of a final's words that a partial shows."""
    beginnings = (final[:k] for k in range(len(final) + 1))
    alike = [(errors(words, text).edits, matches(words, text)) for text in beginnings]
    _, equal = min(alike, key=lambda one: (one[0], -len(one[1])))  # the first of several: shortest
    return [place for _, place in equal]


def average_lagging(delays_s: Sequence[float], sound_s: float, reference_words: int) -> float:
    """Return a recording's average lagging; see :data:`AVERAGE_LAGGING`.

    Parameters
    ----------
    delays_s : sequence of float
        When each word was first shown, from the beginning of the sound, in the words' order.
    sound_s : float
    reference_words : int
        In the reference: the ideal writer shows one each ``sound_s / reference_words``.

    Returns
    -------
    float
        Not a number if there is no word.
    """
    if not delays_s or not reference_words:
        return float("nan")
    if delays_s[0] > sound_s:
        return delays_s[0]
    behind: list[float] = []
    for number, delay_s in enumerate(delays_s):
        behind.append(delay_s - number * sound_s / reference_words)
        if delay_s >= sound_s:
            break
    return sum(behind) / len(behind)


def quantiles(times_s: Sequence[float]) -> Quantiles | None:
    """Return the middle and the tail of some times; None of none."""
    if not times_s:
        return None
    p50, p90, p99 = np.percentile(times_s, [50, 90, 99]).tolist()
    return Quantiles(p50, p90, p99, len(times_s))
