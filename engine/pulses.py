"""Pacing pulses: found and taken out of a stream at its own rate, before anything smears them.

A pulse rises faster than any heart: by 0.8 mV or more within a sample of 360 Hz (290 mV/s; the
steepest complex of 11 h of MIT-BIH rises by 0.64 mV, where its recorders reach their limit), and
has lost half of its height again within 8 ms. It is then replaced, on all leads, by a line from
the sample before it to the one behind it. A step that stays is none. Pulses without capture so
leave the flat line that they stand on, and a pulse before a beat leaves the beat.

Below 360 Hz a pulse is a sample or two of what a heart may do in that time: nothing is looked for.
Nor is a pulse of less than 0.8 mV, which no beat is made of. What remains is the slow tail of a
pulse's recharge, if the electrodes show one.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEAST_HZ = 360.0
_EDGE_MV = 0.8
_EDGE_S = 1 / 360
_RETURN_S = 0.008
_MINUTE_S = 60.0
_REMEMBERED = 256  # stretches that hung on later samples: minutes of pulses, more than is in flight

Array = NDArray[np.float32]


class PulseFilter:
    """One stream's pulses; any split into chunks gives the same samples, bit for bit.

    Samples behind an edge are held back until it is known what it is; others only where an edge is
    looked for over several samples, at 720 Hz or more.

    Parameters
    ----------
    rate_hz : float
        At least :data:`LEAST_HZ`.
    channels : int

    Attributes
    ----------
    reach : int
        Samples after one that it may hang on.
    """

    def __init__(self, rate_hz: float, channels: int) -> None:
        self._span = max(1, int(_EDGE_S * rate_hz))  # samples of an edge
        self._window = max(3, round(_RETURN_S * rate_hz))  # after the sample before the edge
        self.reach = self._window + self._span
        self._rate_hz = rate_hz
        # The last samples that were let go, and what is held back.
        self._kept = np.zeros((0, channels), np.float32)
        self._index = 0  # of the first of those held back
        self._seen = 0  # index from which on edges are still to be looked for
        # What hung on more than the samples up to it: index of the first, and needed until.
        self._waited: deque[tuple[int, int]] = deque(maxlen=_REMEMBERED)
        self._pulses: list[tuple[int, int]] = []  # of the last minute: index, and known at
        self._told_at, self._told = 0, 0

    def push(self, chunk: Array, index: int) -> Array:
        """Take (samples, channels) in mV that begin at an index, return what is decided.

        They follow those before, or :meth:`flush` was called in between.
        """
        if not len(self._kept):
            self._kept = np.repeat(chunk[:1], self._span, axis=0)
            self._index = self._seen = index
        x = np.concatenate([self._kept, chunk])
        steps = x[self._span :] - x[: -self._span]
        end = len(x) - self._span + 1
        highest = np.maximum.reduce(steps, axis=None)
        if highest >= _EDGE_MV or np.minimum.reduce(steps, axis=None) <= -_EDGE_MV:
            end = self._take_out(x)
        else:
            self._seen = index + len(chunk)
        end = max(end, self._span)
        out = x[self._span : end]
        self._kept = x[end - self._span :]
        self._index += len(out)
        return out

    def flush(self) -> Array:
        """Return what is held back, as it is: no more follows."""
        rest = self._kept[self._span :]
        self._kept = self._kept[:0]
        return rest

    def needed_until(self, index: int) -> int:
        """Return the index before which lies all that the samples before one hang on."""
        until = index + self._span - 1
        for first, needed in reversed(self._waited):
            if first < index - self._window:
                break
            if first < index:
                until = max(until, needed)
        return until

    def per_minute(self, end: int, begin: int) -> Iterator[tuple[int, int]]:
        """Yield (index, pulses in the minute before it) of each second up to an end.

        Seconds count from `begin`. Nothing is yielded before the first pulse, and where there are
        none any more, that once.
        """
        if not self._pulses:
            return
        second, minute = round(self._rate_hz), round(_MINUTE_S * self._rate_hz)
        first = max(self._told_at, self._pulses[0][1])
        last = min(end, self._pulses[-1][1] + minute + second)
        for at in range(begin + -(-(first - begin) // second) * second, last + 1, second):
            # What was known at a second, not what came with the same chunk.
            count = sum(at - minute < known <= at for _, known in self._pulses)
            if count or self._told:
                yield at, count
            self._told_at, self._told = at + 1, count
        self._pulses = [one for one in self._pulses if one[1] > end - minute - second]

    def take(self) -> dict[str, Any]:
        """Return all that is carried, to be put back elsewhere."""
        return {
            "kept": self._kept,
            "places": (self._index, self._seen),
            "waited": list(self._waited),
            "pulses": list(self._pulses),
            "told": (self._told_at, self._told),
        }

    def put(self, carried: dict[str, Any]) -> None:
        self._kept = carried["kept"]
        self._index, self._seen = carried["places"]
        self._waited.extend((first, needed) for first, needed in carried["waited"])
        self._pulses = [(index, known) for index, known in carried["pulses"]]
        self._told_at, self._told = carried["told"]

    def _take_out(self, x: Array) -> int:
        """Put lines in place of pulses; return the place up to which all is decided."""
        span, origin = self._span, self._index - self._span  # index of x[0]
        place = self._seen - origin
        while True:
            steps = np.abs(x[place:] - x[place - span : len(x) - span])
            edges = steps.max(axis=1) >= _EDGE_MV
            if not edges.any():
                self._seen = origin + len(x)
                return len(x) - span + 1
            place += int(edges.argmax())
            before = place - span  # the last sample that is surely not of the edge
            behind = self._returns(x, before, place)
            if behind is None:
                self._seen = origin + place
                return before + 1
            first = origin + before + 1
            if behind:
                share = np.arange(1, behind - before, dtype=np.float32)[:, None]
                share /= np.float32(behind - before)
                x[before + 1 : behind] = x[before] + share * (x[behind] - x[before])
                self._pulses.append((first, first + self.reach))
            last = behind or before + self._window
            self._waited.append((first, origin + last + 1))
            place = behind or place + 1

    def _returns(self, x: Array, before: int, place: int) -> int | None:
        """Return the sample behind a pulse; 0: it is none; None: that is not known yet."""
        lead = int(np.abs(x[place] - x[before]).argmax())
        heights = np.abs(x[before + 1 : before + self._window + 1, lead] - x[before, lead])
        highest = np.maximum.accumulate(heights)
        low = heights <= highest / 2
        low[: place - before] = False
        if low.any():
            behind = before + 1 + int(low.argmax()) + self._span
            return behind if behind < len(x) else None
        return 0 if len(heights) == self._window else None
