"""From a heart model's frame scores to beats, one decision each.

The model gives, for every frame, the probability that a beat lies ``look_ahead`` samples before
it, and the beat's class. A beat is a local maximum of that probability; two maxima closer than
the refractory time are one beat: the higher, or the first if the probability fell under half of
the threshold between them. All streams are searched at once; Python is entered only for the
frames of a row that can change something.
"""

from collections.abc import Iterator, Mapping
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
    rhythm: tuple[float, ...] = ()  # probability of each rhythm so far, where a model tells it


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

    def take(self, slot: int) -> tuple[float, int, int, int]:
        """Return all that a row carries, to be put back here or elsewhere."""
        height, place = float(self.height[slot]), int(self.place[slot])
        return height, place, int(self.label[slot]), int(self.last[slot])

    def put(self, slot: int, carried: tuple[float, int, int, int]) -> None:
        self.height[slot], self.place[slot], self.label[slot], self.last[slot] = carried

    def lag(self, outputs: Mapping[str, NDArray[np.float32]], hops: int = 1) -> int:
        """Return how many samples after a position suffice to know of each beat up to there."""
        stride = hops * self._hop // int(outputs[self._beat].shape[1])
        return self._look_ahead + (-(-self._refractory // stride) + 1) * stride

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
        first = (start - self._look_ahead).tolist()  # position of each row's first frame
        height, place = self.height[slots].tolist(), self.place[slots].tolist()
        label, last = self.label[slots].tolist(), self.last[slots].tolist()
        best: dict[int, int] = {}  # frames of the rows' candidates that are of this step

        def best_label(row: int) -> int:
            return int(classes[row, best[row]].argmax()) if row in best else label[row]

        found: list[tuple[int, Beat]] = []
        for row, frame, p in _visits(probability, self.height[slots] > 0):
            if height[row] > 0:
                decided = -(-(place[row] + self._refractory - first[row]) // stride)
                if p < THRESHOLD / 2:
                    decided = min(decided, frame)
                if decided <= frame:
                    end = first[row] + (decided + 1) * stride + self._look_ahead
                    name = self._labels[best_label(row)]
                    found.append((row, Beat(place[row], name, height[row], end)))
                    height[row], last[row] = 0.0, place[row]
                    best.pop(row, None)
            position = first[row] + frame * stride
            if p >= THRESHOLD and p > height[row] and position - last[row] >= self._refractory:
                height[row], place[row], best[row] = p, position, frame
        for row in best:
            label[row] = best_label(row)
        self.height[slots], self.place[slots] = height, place
        self.label[slots], self.last[slots] = label, last
        return found


def _visits(
    probability: NDArray[np.float32], open_before: NDArray[np.bool_]
) -> Iterator[tuple[int, int, float]]:
    """Yield (row, frame, probability) in order, of the frames that can change something.

    These are the high ones, those where a low stretch begins, and the last, by which all is
    decided that the refractory time decides; rows without a candidate or a high one are left out.
    """
    high = probability >= THRESHOLD
    low = probability < THRESHOLD / 2
    visited = high | low
    visited[:, 1:] &= high[:, 1:] | ~low[:, :-1]
    visited[:, -1] = True
    visited &= (open_before | high.any(axis=1))[:, None]
    rows, frames = np.nonzero(visited)
    return zip(rows.tolist(), frames.tolist(), probability[rows, frames].tolist(), strict=True)
