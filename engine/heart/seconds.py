"""The samples of all streams cut into seconds, whatever hops they came in.

What is judged once a second (signal quality, fibrillation) reads the raw samples here, before the
model's filters. Seconds are counted at the model's rate from where a stream began, or went on
after lost samples, so that their bounds hang on no batch and no hop.

Streams begin when they like, so a step ends the second of a few of its rows only: what is done
here and with these few is counted in calls of numpy, not in samples.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

LATEST = 4  # seconds that are looked at together: as many as ventricular fibrillation takes
_SLOW_HZ = 120.0  # enough for QRS complexes and f waves, a third of the work of 360 Hz

Array = NDArray[np.float32]
Carried = tuple[int, int, Array, Array]


class Ended(NamedTuple):
    """The seconds that came to an end in a piece of a step, of some of its rows."""

    rows: list[int]  # of the step
    slots: list[int]
    ends: list[int]  # position after the second's last sample
    whole: list[bool]  # whether there are as many seconds as are looked at together
    second: Array  # (ended, channels, samples) at the model's rate, in mV
    latest: Array  # (ended, channels, LATEST * samples) at the slow rate, the oldest first


class Seconds:
    """What is kept of each stream: its unfinished second, and the latest ones more slowly.

    Parameters
    ----------
    rate_hz : float
        A second is so many samples, rounded.
    channels : int
    num_slots : int
    """

    def __init__(self, rate_hz: float, channels: int, num_slots: int) -> None:
        self.samples = round(rate_hz)
        self._factor = max(1, round(rate_hz / _SLOW_HZ))
        self.slow_hz = rate_hz / self._factor
        self._slow = self.samples // self._factor
        # Room for a second and a piece of a step that ends it.
        self.unfinished = np.zeros((num_slots, channels, 2 * self.samples), np.float32)
        self.fill = np.zeros(num_slots, np.int64)
        self.latest = np.zeros((num_slots, channels, LATEST * self._slow), np.float32)
        self.known = np.zeros(num_slots, np.int64)  # of the latest seconds
        self._stretches: dict[int, Array] = {}  # views of `unfinished`, by their length

    def reset(self, slot: int) -> None:
        """Begin a second with the next sample, and forget those before."""
        self.fill[slot] = self.known[slot] = 0

    def take(self, slot: int) -> Carried:
        """Return a copy of all that a row carries, to be put back here or elsewhere."""
        fill, known = int(self.fill[slot]), int(self.known[slot])
        return fill, known, self.unfinished[slot, :, :fill].copy(), self.latest[slot].copy()

    def put(self, slot: int, carried: Carried) -> None:
        fill, self.known[slot], unfinished, self.latest[slot] = carried
        self.fill[slot], self.unfinished[slot, :, :fill] = fill, unfinished

    def push(
        self, slots: NDArray[np.intp], start: NDArray[np.int64], samples: Array
    ) -> Iterator[Ended]:
        """Take a step's samples and yield the seconds that they end, those of a row in order.

        Parameters
        ----------
        slots : (rows,) intp
        start : (rows,) int64
            Position of each row's first sample.
        samples : (rows, samples, channels) float32
        """
        turned = samples.transpose(0, 2, 1)
        # A piece of at most a second ends one second of a row at most.
        for begin in range(0, turned.shape[2], self.samples):
            piece = turned[:, :, begin : begin + self.samples]
            rows = self._add(slots, piece)
            if len(rows):
                yield self._end(rows, slots[rows], start[rows] + begin + piece.shape[2])

    def _add(self, slots: NDArray[np.intp], piece: Array) -> NDArray[np.intp]:
        """Put a piece behind what each row has, return the rows whose second it ends."""
        count = piece.shape[2]
        if count not in self._stretches:
            # Into such a view a piece is one copy; an index for each sample takes much longer.
            self._stretches[count] = sliding_window_view(
                self.unfinished, count, axis=2, writeable=True
            )
        fill = self.fill[slots]
        self._stretches[count][slots, :, fill] = piece
        fill += count
        self.fill[slots] = fill
        rows: NDArray[np.intp] = np.flatnonzero(fill >= self.samples)
        return rows

    def _end(
        self, rows: NDArray[np.intp], slots: NDArray[np.intp], until: NDArray[np.int64]
    ) -> Ended:
        """Return the seconds of some rows, which have as many samples and maybe more."""
        second = self.unfinished[slots, :, : self.samples]
        over = self.fill[slots] - self.samples
        self.fill[slots] = over
        if over.any():
            self.unfinished[slots, :, : self.samples] = self.unfinished[slots, :, self.samples :]
        known = self.known[slots] + 1
        self.known[slots] = np.minimum(known, LATEST)
        latest = np.empty((len(slots), *self.latest.shape[1:]), np.float32)
        latest[:, :, : -self._slow] = self.latest[slots, :, self._slow :]
        self._slow_down(second, latest[:, :, -self._slow :])
        self.latest[slots] = latest
        return Ended(
            rows.tolist(),
            slots.tolist(),
            (until - over).tolist(),
            (known >= LATEST).tolist(),
            second,
            latest,
        )

    def _slow_down(self, second: Array, out: Array) -> None:
        """Take so many samples together to their mean."""
        whole = self._slow * self._factor
        out[:] = second[:, :, : whole : self._factor]
        # Sample by sample: an axis as short as this is summed slowly.
        for offset in range(1, self._factor):
            out += second[:, :, offset : whole : self._factor]
        out /= self._factor


def restless(latest: Array) -> Array:
    """Return the mean over the greatest slope of each signal, (ended, channels) float32.

    0.05 for a good ECG, 0.1 to 0.3 where the ventricles flutter, 0.23 for white noise, 1 for a
    triangular wave, 0 for a constant.
    """
    slope = np.abs(latest[:, :, 1:] - latest[:, :, :-1])
    greatest = np.maximum.reduce(slope, axis=2)
    share: Array = np.add.reduce(slope, axis=2) / (slope.shape[2] * np.maximum(greatest, 1e-9))
    return share
