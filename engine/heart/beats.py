"""From a heart model's frame scores to beats, one decision each.

The model gives, for every frame, the probability that a beat lies ``look_ahead`` samples before
it, and the beat's class. A beat is a local maximum of that probability; two maxima closer than
the refractory time are one beat: the higher, or the first if the probability fell under half of
the threshold between them. All streams are searched at once; Python is entered only for rows in
which something was found.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.model_file import ModelSpec

THRESHOLD = 0.5  # probability; chosen on the validation records (training/LOG.md)
REFRACTORY_S = 0.2  # no ventricle beats twice in this time; as in Pan & Tompkins 1985


class Beat(NamedTuple):
    """One beat, at a sample of the model's rate counted from the stream's last reset."""

    position: int
    label: str
    probability: float
    decided_at: int  # the samples before this position sufficed to decide


class BeatFinder:
    """The search's memory: one row a stream.

    A maximum is held back until the probability has stayed below it for the refractory time,
    or has fallen under half of the threshold: then nothing later can change the decision.
    """

    def __init__(self, spec: ModelSpec, num_slots: int) -> None:
        by_meaning = {output.meaning: output for output in spec.outputs}
        self._beat = by_meaning["beat"].name
        self._class = by_meaning["beat_class"].name
        self._labels = by_meaning["beat_class"].labels
        self._look_ahead = spec.look_ahead_samples
        self._hop = spec.hop_samples
        self._refractory = round(REFRACTORY_S * spec.input.rate_hz)
        # The best candidate that is not yet decided; a probability of 0 says that there is none.
        self.height = np.zeros(num_slots, np.float32)
        self.place = np.zeros(num_slots, np.int64)
        self.label = np.zeros(num_slots, np.int64)
        self.last = np.full(num_slots, -(2**62), np.int64)  # the last beat's position

    def reset(self, slot: int) -> None:
        self.height[slot] = 0.0
        self.last[slot] = -(2**62)

    def push(
        self,
        slots: NDArray[np.intp],
        outputs: Mapping[str, NDArray[np.float32]],
        start: NDArray[np.int64],
        hops: int = 1,
    ) -> list[tuple[int, Beat]]:
        """Search one step's frames.

        Parameters
        ----------
        slots : (rows,) intp
        outputs : the model's outputs; "beat" (rows, frames), "beat_class" (rows, frames, labels)
        start : (rows,) int64
            Position of the step's first new sample.
        hops : int
            That the step took.

        Returns
        -------
        list of (row, Beat), rows in order, beats of a row oldest first
        """
        probability, classes = outputs[self._beat], outputs[self._class]
        stride = hops * self._hop // probability.shape[1]
        busy = (probability.max(axis=1) >= THRESHOLD) | (self.height[slots] > 0)
        found: list[tuple[int, Beat]] = []
        for row in np.flatnonzero(busy).tolist():
            beats = self._search(
                int(slots[row]), probability[row], classes[row], int(start[row]), stride
            )
            found += [(row, beat) for beat in beats]
        return found

    def _search(
        self,
        slot: int,
        probability: NDArray[np.float32],
        classes: NDArray[np.float32],
        start: int,
        stride: int,
    ) -> list[Beat]:
        height, place = float(self.height[slot]), int(self.place[slot])
        label, last = int(self.label[slot]), int(self.last[slot])
        best = -1  # the candidate's frame, if it is of this step
        beats = []
        position = start - self._look_ahead
        for frame, p in enumerate(probability.tolist()):
            if height > 0 and (p < THRESHOLD / 2 or position - place >= self._refractory):
                if best >= 0:
                    label, best = int(classes[best].argmax()), -1
                end = position + self._look_ahead + stride
                beats.append(Beat(place, self._labels[label], height, end))
                height, last = 0.0, place
            if p >= THRESHOLD and p > height and position - last >= self._refractory:
                height, place, best = p, position, frame
            position += stride
        self.height[slot], self.place[slot], self.last[slot] = height, place, last
        self.label[slot] = int(classes[best].argmax()) if best >= 0 else label
        return beats
