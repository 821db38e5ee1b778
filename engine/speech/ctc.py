"""From a CTC model's log-probabilities to words, greedily and for many streams at once.

Connectionist temporal classification (Graves et al. 2006): each frame says a label or the blank;
a label that is said in several frames running is one. If the separator is among the labels they
are letters, and it stands between words; otherwise each label is a whole word.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.messages import Speech

BLANK = 0
SEPARATOR = " "


class Spoken(NamedTuple):
    """One word of a hypothesis. Frames count from the row's last reset.

    The confidence is acoustic: of each letter the highest probability in the frames that say it,
    and of these the geometric mean. No language model has a part in it.
    """

    text: str
    first: int  # frame in which its first label was emitted
    last: int  # frame after those that say its last label
    confidence: float  # 0 to 1


class Hypothesis(NamedTuple):
    """What a row may have said."""

    words: tuple[Spoken, ...]
    score: float  # natural log

    @property
    def text(self) -> str:
        return " ".join(word.text for word in self.words)


class Emitted(NamedTuple):
    """One label, and the frames that say it."""

    label: int
    first: int
    last: int  # exclusive
    peak: float  # natural log of its highest probability in them


class Transcript:
    """Labels put together to words, one after the other.

    Parameters
    ----------
    labels : sequence of str
    words, last_word : iterable
        What there is already: the fields of each word, and of the labels of the last.
    """

    def __init__(
        self,
        labels: Sequence[str],
        words: Iterable[Sequence[Any]] = (),
        last_word: Iterable[Sequence[Any]] = (),
    ) -> None:
        self._labels = labels
        self._separator = labels.index(SEPARATOR) if SEPARATOR in labels else None
        self.words = [Spoken(*word) for word in words]  # complete
        self.open = [Emitted(*label) for label in last_word]  # of a word that may go on

    def copy(self) -> "Transcript":
        """Return one that may go on otherwise."""
        other = Transcript(self._labels)
        other.words, other.open = self.words[:], self.open[:]
        return other

    def add(self, emitted: Emitted) -> None:
        if self._separator is None or emitted.label == self._separator:
            self.words += self._last_word()
            self.open = []
        if emitted.label != self._separator:
            self.open.append(emitted)

    def extend(self, emitted: Emitted) -> None:
        """Add frames in which the last label goes on."""
        if emitted.label != self._separator:
            before = self.open[-1]
            peak = max(before.peak, emitted.peak)
            self.open[-1] = before._replace(last=emitted.last, peak=peak)

    def spoken(self) -> tuple[Spoken, ...]:
        return (*self.words, *self._last_word())

    @property
    def num_complete(self) -> int:
        """How many words can get no further letter."""
        return len(self.words) + (self._separator is None and bool(self.open))

    def _last_word(self) -> list[Spoken]:
        if not self.open:
            return []
        text = "".join(self._labels[emitted.label] for emitted in self.open)
        peak = sum(emitted.peak for emitted in self.open) / len(self.open)
        return [Spoken(text, self.open[0].first, self.open[-1].last, min(1.0, math.exp(peak)))]


class GreedyDecoder:
    """The most probable label of every frame, whatever stands beside it.

    All rows are searched at once; Python is entered only where a row says a label. Nothing of
    an utterance is kept but its words.

    Parameters
    ----------
    labels : tuple of str
        The first is the blank.
    num_slots : int
    """

    def __init__(self, labels: tuple[str, ...], num_slots: int) -> None:
        self._labels = labels
        self._frames = np.zeros(num_slots, np.int64)
        self._last = np.zeros(num_slots, np.intp)  # what the last frame said
        self._scores = np.zeros(num_slots)
        self._transcripts = [Transcript(labels) for _ in range(num_slots)]

    def open(self, slot: int, speech: Speech) -> None:
        """Begin anew; no option is of use here."""
        self.reset(slot)

    def reset(self, slot: int) -> None:
        """Forget the utterance and count frames from 0."""
        self._frames[slot] = self._last[slot] = 0
        self._scores[slot] = 0.0
        self._transcripts[slot] = Transcript(self._labels)

    def push(self, slots: NDArray[np.intp], log_probs: NDArray[np.float32]) -> None:
        """Take the next frames of some rows.

        Parameters
        ----------
        slots : (rows,) intp
            Distinct.
        log_probs : (rows, frames, labels) float32
            Natural logarithms.
        """
        rows, frames, _ = log_probs.shape
        if not rows or not frames:
            return
        labels, heights = log_probs.argmax(axis=2), log_probs.max(axis=2)
        begins = np.empty(labels.shape, bool)
        begins[:, 0] = True
        np.not_equal(labels[:, 1:], labels[:, :-1], out=begins[:, 1:])
        places = np.flatnonzero(begins)  # where runs of one label begin, row after row
        runs = _Runs(
            row=places // frames,
            label=labels.ravel()[places],
            first=places % frames,
            last=(np.append(places[1:], rows * frames) - 1) % frames + 1,
            peak=np.maximum.reduceat(heights.ravel(), places),
        )
        self._emit(slots, runs)
        # One after the other, so that any cutting adds the same numbers in the same order.
        sums = np.concatenate([self._scores[slots, None], heights], axis=1, dtype=np.float64)
        self._scores[slots] = np.add.accumulate(sums, axis=1)[:, -1]
        self._last[slots] = labels[:, -1]
        self._frames[slots] += frames

    def _emit(self, slots: NDArray[np.intp], runs: "_Runs") -> None:
        """Give what was said to the rows that said it."""
        said = np.flatnonzero(runs.label != BLANK)
        row, label, first, last, peak = (field[said] for field in runs)
        slot = slots[row]
        goes_on = (first == 0) & (label == self._last[slot])
        first, last = first + self._frames[slot], last + self._frames[slot]
        lists = (field.tolist() for field in (slot, goes_on, label, first, last, peak))
        for number, extends, *emitted in zip(*lists, strict=True):
            transcript = self._transcripts[number]
            if extends:
                transcript.extend(Emitted(*emitted))
            else:
                transcript.add(Emitted(*emitted))

    def best(self, slot: int, ended: bool = False) -> Hypothesis:
        """Return what the row has said since its last reset."""
        return Hypothesis(self._transcripts[slot].spoken(), float(self._scores[slot]))

    def alternatives(self, slot: int, count: int) -> list[Hypothesis]:
        """Return the only hypothesis there is."""
        return [self.best(slot)]

    def frames(self, slot: int) -> int:
        """Return the frames since the last reset."""
        return int(self._frames[slot])

    def stable_words(self, slot: int) -> int:
        """Return how many words are complete."""
        return self._transcripts[slot].num_complete

    def take(self, slot: int) -> tuple[Any, ...]:
        """Return everything that the row carries, in numbers and lists."""
        frames, last = int(self._frames[slot]), int(self._last[slot])
        transcript = self._transcripts[slot]
        return frames, last, float(self._scores[slot]), transcript.words[:], transcript.open[:]

    def put(self, slot: int, carried: Sequence[Any]) -> None:
        """Go on from what was taken, also after a way through bytes."""
        self._frames[slot], self._last[slot], self._scores[slot], words, open_word = carried
        self._transcripts[slot] = Transcript(self._labels, words, open_word)


class _Runs(NamedTuple):
    """Stretches in which a row says the same label; one array a field."""

    row: NDArray[np.intp]
    label: NDArray[np.intp]
    first: NDArray[np.intp]  # frame of this push
    last: NDArray[np.intp]  # exclusive
    peak: NDArray[np.float32]
