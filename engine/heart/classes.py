"""The class of each beat, by a model that steps once a beat, and the rhythm that it hears.

The model that finds beats looks a little ahead and no further; what a beat is shows in its P wave,
in its shape beside this patient's usual one, and in the interval before it. A second model is
given all of that, one beat a step, and carries its state from beat to beat. Beats of many streams
are named in one call.
"""

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from engine.heart.beats import Beat
from engine.model_file import Beats, ModelSpec

Array = NDArray[np.float32]
_NONE = -1  # no beat before, to which an interval could be given


class Stepper(Protocol):
    """What is needed of a runtime; see :class:`engine.runtime.Runtime`."""

    max_rows: int
    runs: Counter[tuple[int, int]]
    failed: dict[int, str]

    def reset(self, slot: int) -> None: ...
    def step(self, slots: NDArray[np.intp], windows: Array) -> Mapping[str, Array]: ...
    def take(self, slot: int) -> Array: ...
    def put(self, slot: int, row: Array) -> None: ...


class Carried(NamedTuple):
    """All that a stream carries here."""

    state: Array
    kept: Array
    fresh: bool
    last: int
    waiting: tuple[Beat, ...]


class BeatClassifier:
    """Windows around beats, and the memory of each stream: one row each.

    Parameters
    ----------
    spec : ModelSpec
        Of the model that steps once a beat.
    cut : Beats
        How a beat's window is cut.
    runtime : Stepper
    num_slots : int
    lag : int
        Samples after a beat by which it is found at the latest.

    Attributes
    ----------
    after : int
        Samples after a beat that its class needs.
    """

    def __init__(
        self, spec: ModelSpec, cut: Beats, runtime: Stepper, num_slots: int, lag: int
    ) -> None:
        self._runtime, self._cut = runtime, cut
        by_meaning = {output.meaning: output for output in spec.outputs}
        self._class = by_meaning["beat_class"].name
        self._labels = by_meaning["beat_class"].labels
        rhythm = by_meaning.get("rhythm")
        self._rhythm = rhythm.name if rhythm else ""
        self._rhythms = [f"rhythm_{label}" for label in rhythm.labels] if rhythm else []
        self._rate_hz = spec.input.rate_hz * cut.factor
        self._before = cut.before * cut.factor
        self.after = (cut.points - cut.before) * cut.factor
        self._keep = self._before + max(lag, self.after)
        self.kept = np.zeros((num_slots, self._keep, cut.leads), np.float32)
        self.fresh = np.ones(num_slots, bool)  # nothing came before the next sample
        self.last = np.full(num_slots, _NONE, np.int64)  # position of the beat before
        self._waiting: dict[int, deque[Beat]] = {}

    def reset(self, slot: int) -> None:
        """Forget the patient."""
        self._runtime.reset(slot)
        self.gap(slot)

    def gap(self, slot: int) -> None:
        """Forget the signal and the last beat: no interval reaches over lost samples."""
        self._waiting[slot] = deque()
        self.fresh[slot] = True
        self.last[slot] = _NONE

    def take(self, slot: int) -> Carried:
        """Return a copy of all that a stream carries, to be put back here or elsewhere."""
        return Carried(
            self._runtime.take(slot),
            self.kept[slot].copy(),
            bool(self.fresh[slot]),
            int(self.last[slot]),
            tuple(self._waiting[slot]),
        )

    def put(self, slot: int, carried: Sequence[Any]) -> None:
        """Go on from what was taken, also after a way through MessagePack."""
        carried = Carried(*carried)
        self._runtime.put(slot, carried.state)
        self.kept[slot], self.fresh[slot] = carried.kept, carried.fresh
        self.last[slot] = carried.last
        self._waiting[slot] = deque(Beat(*beat) for beat in carried.waiting)

    def rhythm(self, beat: Beat) -> dict[str, float]:
        """Return the measures of the rhythm that a beat was heard in, its probabilities."""
        return dict(zip(self._rhythms, beat.rhythm, strict=True))

    def push(
        self,
        slots: NDArray[np.intp],
        start: NDArray[np.int64],
        samples: Array,
        found: Sequence[tuple[int, Beat]],
    ) -> list[tuple[int, Beat]]:
        """Take a step's samples and the beats that it found; return the beats that have a class.

        Parameters
        ----------
        slots : (rows,) intp
        start : (rows,) int64
            Position of the step's first sample.
        samples : (rows, samples, leads) float32
            As they came, before the filters.
        found : sequence of (row, Beat)
            Those of a row oldest first.

        Returns
        -------
        list of (row, Beat), those of a row oldest first
        """
        fresh = self.fresh[slots]
        if fresh.any():
            self.kept[slots[fresh]] = samples[fresh, :1]
            self.fresh[slots] = False
        for row, beat in found:
            self._waiting[int(slots[row])].append(beat)
        signal = np.concatenate([self.kept[slots], samples], axis=1)
        named: list[tuple[int, Beat]] = []
        until = start + samples.shape[1]
        while due := self._due(slots, until):
            for first in range(0, len(due), self._runtime.max_rows):
                some = due[first : first + self._runtime.max_rows]
                named += self._name(some, slots, start, signal)
        self.kept[slots] = signal[:, -self._keep :]
        return named

    def _due(self, slots: NDArray[np.intp], until: NDArray[np.int64]) -> list[tuple[int, Beat]]:
        """Take the first beat of each row whose window is complete."""
        due = []
        for row, (slot, end) in enumerate(zip(slots.tolist(), until.tolist(), strict=True)):
            waiting = self._waiting[slot]
            if waiting and waiting[0].position + self.after <= end:
                due.append((row, waiting.popleft()))
        return due

    def _name(
        self,
        due: list[tuple[int, Beat]],
        slots: NDArray[np.intp],
        start: NDArray[np.int64],
        signal: Array,
    ) -> list[tuple[int, Beat]]:
        rows = np.array([row for row, _ in due])
        positions = np.array([beat.position for _, beat in due])
        places = positions - start[rows] + self._keep - self._before
        windows = cut_windows(signal, rows, places, self._cut)
        last = self.last[slots[rows]]
        seconds = np.where(last == _NONE, 0.0, (positions - last) / self._rate_hz)
        self.last[slots[rows]] = positions
        x = np.concatenate([windows, seconds[:, None].astype(np.float32)], axis=1)
        outputs = self._runtime.step(slots[rows], x[:, :, None])
        best = outputs[self._class].reshape(len(due), -1).argmax(axis=1)
        heard: list[list[float]] = [[]] * len(due)
        if self._rhythm:
            heard = outputs[self._rhythm].reshape(len(due), -1).tolist()
        return [
            (
                row,
                beat._replace(
                    label=self._labels[label],
                    decided_at=max(beat.decided_at, beat.position + self.after),
                    rhythm=tuple(rhythm),
                ),
            )
            for (row, beat), label, rhythm in zip(due, best.tolist(), heard, strict=True)
        ]


def cut_windows(
    signal: Array, rows: NDArray[np.intp], places: NDArray[np.intp], cut: Beats
) -> Array:
    """Return the signal around beats, each point the mean of ``factor`` samples.

    Parameters
    ----------
    signal : (rows, samples, leads) float32
    rows, places : (beats,)
        Row of each beat, and the sample at which its window begins.
    cut : Beats

    Returns
    -------
    (beats, leads * points) float32, lead by lead
    """
    # Out of such a view a window is one copy; an index for each sample takes much longer.
    stretches = sliding_window_view(signal, cut.points * cut.factor, axis=1)
    windows = stretches.transpose(0, 1, 3, 2)[rows, places]
    apart = windows.reshape(len(rows), cut.points, cut.factor, cut.leads)
    points = apart[:, :, 0].copy()
    for offset in range(1, cut.factor):  # an axis as short as this is summed slowly by `mean`
        points += apart[:, :, offset]
    points /= cut.factor
    found: Array = points.transpose(0, 2, 1).reshape(len(rows), cut.leads * cut.points)
    return found
