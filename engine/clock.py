"""How a stream's clock runs: a line of time against the sample index, in bounded memory.

Sensors count samples by their own quartz, and what they state as their rate is not quite what
they do. A :class:`Clock` is given the time of some samples and says by how much the rate differs
from the stated one. Pure: times are arguments, and whose clock they are is the caller's business.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

_BLOCK_S = 1.0  # of signal; of each block the earliest point is kept
_RECENT = 16  # blocks: how soon a rate that is off shows
_LONG = 32  # blocks of the whole time; when they are full, each two become one
_LEAST = 8  # blocks from which a line is told
# Between neighbouring points: a leap of the clock, and not a rate that is off by some percent.
_JUMP_S = 0.5
_JUMP_SHARE = 0.05
_LEAST_STRETCH = 1e-3  # of a second of signal: where times hardly go on, a thousand times the rate


class Line(NamedTuple):
    """How a clock runs."""

    drift_ppm: float  # over the whole time; above 0, samples take longer than stated
    rate_error_share: float  # of the last seconds: the true rate over the stated one, less 1


class Clock:
    """The robust line of one stream.

    What delays a message only ever makes its time late, so of each second of signal the point
    that lies lowest is kept. The slope is the median of the slopes between all pairs of kept
    points (Theil 1950, Sen 1968), which a quarter of wild points cannot move. The points of the
    whole time are thinned to 16 to 32, those of the last 16 seconds are kept beside them.

    Parameters
    ----------
    rate_hz : float
        As stated.
    leaps : bool
        Whether a leap of the times begins the line anew: True for stated times. A time of arrival
        leaps whenever the network stalls, and comes back.
    """

    def __init__(self, rate_hz: float, leaps: bool) -> None:
        self._rate_hz, self._leaps = rate_hz, leaps
        self._origin: tuple[int, float] | None = None
        self._restart()

    def _restart(self) -> None:
        # Points are (seconds of signal, how much later than the stated rate would have it).
        self._recent: deque[tuple[float, float]] = deque(maxlen=_RECENT)
        self._long: list[tuple[float, float]] = []
        self._per_long = 1  # blocks in each point of the long list
        self._blocks = 0  # of the next such point, whose lowest so far this is:
        self._next = (0.0, 0.0)
        self._block = -1
        self._lowest = self._last = (0.0, 0.0)

    def add(self, index: int, seconds: float) -> float:
        """Take the time of a sample, those of a stream in the order of their indices.

        Returns
        -------
        float
            Seconds by which the clock has leapt since the point before; 0.0: it has not.
        """
        if self._origin is None:
            self._origin = (index, seconds)
        index_0, seconds_0 = self._origin
        signal_s = (index - index_0) / self._rate_hz
        point = (signal_s, seconds - seconds_0 - signal_s)
        leap = 0.0
        if self._leaps and self._block >= 0:
            leap = point[1] - self._last[1]
            if abs(leap) <= _JUMP_S + _JUMP_SHARE * (signal_s - self._last[0]):
                leap = 0.0
            else:
                self._restart()
        self._last = point
        block = int(signal_s / _BLOCK_S)
        if block != self._block:
            if self._block >= 0:
                self._keep(self._lowest)
            self._block, self._lowest = block, point
        elif point[1] < self._lowest[1]:
            self._lowest = point
        return leap

    def take(self) -> list[Any]:
        """Return all that is carried, to be put back here or elsewhere."""
        long, next_ = list(self._long), self._next
        pace = self._per_long, self._blocks, self._block
        last = self._lowest, self._last
        return [self._origin, list(self._recent), long, next_, *pace, *last]

    def put(self, carried: Sequence[Any]) -> None:
        origin, recent, long, next_, *pace, lowest, last = carried
        self._origin = None if origin is None else (origin[0], origin[1])
        self._recent.extend(_points(recent))
        self._long = _points(long)
        self._per_long, self._blocks, self._block = pace
        self._next, self._lowest, self._last = _points([next_, lowest, last])

    def line(self) -> Line | None:
        """Return how the clock runs, or None while too little is known."""
        if len(self._recent) < _LEAST:
            return None
        stretch = max(_LEAST_STRETCH, 1 + _slope(list(self._recent)))
        return Line(1e6 * _slope(self._long), 1 / stretch - 1)

    def _keep(self, point: tuple[float, float]) -> None:
        self._recent.append(point)
        if not self._blocks or point[1] < self._next[1]:
            self._next = point
        self._blocks += 1
        if self._blocks == self._per_long:
            self._long.append(self._next)
            self._blocks = 0
        if len(self._long) == _LONG:
            self._long = [
                min(pair, key=lambda each: each[1])
                for pair in zip(self._long[::2], self._long[1::2], strict=True)
            ]
            self._per_long *= 2


def _points(pairs: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in pairs]


def _slope(points: list[tuple[float, float]]) -> float:
    """Return the median of the slopes between all pairs."""
    x, y = np.array(points).T
    first, second = np.triu_indices(len(points), 1)
    return float(np.median((y[second] - y[first]) / (x[second] - x[first])))
