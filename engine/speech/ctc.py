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
        self._spoken: tuple[Spoken, ...] | None = None

    def copy(self) -> "Transcript":
        """Return one that may go on otherwise."""
        other = Transcript(self._labels)
        other.words, other.open = self.words[:], self.open[:]
        return other

    def add(self, emitted: Emitted) -> None:
        self._spoken = None
        if self._separator is None or emitted.label == self._separator:
            self.words += self._last_word()
            self.open = []
        if emitted.label != self._separator:
            self.open.append(emitted)

    def extend(self, emitted: Emitted) -> None:
        """Add frames in which the last label goes on."""
        self._spoken = None
        if emitted.label != self._separator:
            before = self.open[-1]
            peak = max(before.peak, emitted.peak)
            self.open[-1] = before._replace(last=emitted.last, peak=peak)

    def spoken(self) -> tuple[Spoken, ...]:
        """Return the words; the same object as before if nothing was added."""
        if self._spoken is None:
            self._spoken = (*self.words, *self._last_word())
        return self._spoken

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

    The labels of all rows are found at once. Nothing of an utterance is kept but its words.

    Parameters
    ----------
    labels : tuple of str
        The first is the blank.
    num_slots : int
    """

    def __init__(self, labels: tuple[str, ...], num_slots: int) -> None:
        self._labels = labels
        self._frames = [0] * num_slots
        self._last = [BLANK] * num_slots  # what the last frame said
        self._scores = [0.0] * num_slots
        self._transcripts = [Transcript(labels) for _ in range(num_slots)]

    def open(self, slot: int, speech: Speech) -> None:
        """Begin anew; no option is of use here."""
        self.reset(slot)

    def reset(self, slot: int) -> None:
        """Forget the utterance and count frames from 0."""
        self._frames[slot], self._last[slot], self._scores[slot] = 0, BLANK, 0.0
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
        # A step has a few frames of a row: over these a loop costs no more than arrays would, and
        # far less where a row comes alone.
        labels, heights = log_probs.argmax(axis=2).tolist(), log_probs.max(axis=2).tolist()
        for slot, *row in zip(slots.tolist(), labels, heights, strict=True):
            self._read(slot, *row)

    def _read(self, slot: int, labels: list[int], heights: list[float]) -> None:
        """Take one row's frames: what each says, and the logarithm of its probability."""
        frame, last, score = self._frames[slot], self._last[slot], self._scores[slot]
        transcript = self._transcripts[slot]
        for label, height in zip(labels, heights, strict=True):
            if label != BLANK:
                emitted = Emitted(label, frame, frame + 1, height)
                if label == last:
                    transcript.extend(emitted)
                else:
                    transcript.add(emitted)
            frame, last, score = frame + 1, label, score + height
        self._frames[slot], self._last[slot], self._scores[slot] = frame, last, score

    def best(self, slot: int, ended: bool = False) -> Hypothesis:
        """Return what the row has said since its last reset."""
        return Hypothesis(self._transcripts[slot].spoken(), self._scores[slot])

    def alternatives(self, slot: int, count: int) -> list[Hypothesis]:
        """Return the only hypothesis there is."""
        return [self.best(slot)]

    def frames(self, slot: int) -> int:
        """Return the frames since the last reset."""
        return self._frames[slot]

    def stable_words(self, slot: int) -> int:
        """Return how many words are complete."""
        return self._transcripts[slot].num_complete

    def take(self, slot: int) -> tuple[Any, ...]:
        """Return everything that the row carries, in numbers and lists."""
        transcript = self._transcripts[slot]
        said = transcript.words[:], transcript.open[:]
        return self._frames[slot], self._last[slot], self._scores[slot], *said

    def put(self, slot: int, carried: Sequence[Any]) -> None:
        """Go on from what was taken, also after a way through bytes."""
        self._frames[slot], self._last[slot], self._scores[slot], words, open_word = carried
        self._transcripts[slot] = Transcript(self._labels, words, open_word)
