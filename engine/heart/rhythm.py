"""From the beats of one stream to its heart rate and to what the alert rules look at."""

from collections import deque
from statistics import median

_FREQUENT = 6  # ventricular beats in less than a minute are already known to be so many
_INTERVALS = 8  # the heart rate is of their median: one early beat does not move it
_LONGEST_INTERVAL_S = 3.0  # a longer one is a pause or a loss of signal, not a heart rate


class Rhythm:
    """What the beats so far say.

    Parameters
    ----------
    rate_hz : float
        Of the positions that :meth:`push` is given.
    """

    def __init__(self, rate_hz: float) -> None:
        self._rate_hz = rate_hz
        self._last: int | None = None
        self._first: int | None = None  # position of the first beat since lost samples
        self._intervals: deque[int] = deque(maxlen=_INTERVALS)
        self._ventricular: deque[int] = deque()
        self._run = 0

    def push(self, position: int, label: str) -> dict[str, float]:
        """Take the next beat, return the measures that the rules look at."""
        if self._last is not None:
            interval = position - self._last
            if interval > _LONGEST_INTERVAL_S * self._rate_hz:
                self._intervals.clear()
            else:
                self._intervals.append(interval)
        self._last = position
        if self._first is None:
            self._first = position
        self._run = self._run + 1 if label == "V" else 0
        if label == "V":
            self._ventricular.append(position)
        while self._ventricular and position - self._ventricular[0] > 60 * self._rate_hz:
            self._ventricular.popleft()
        measures: dict[str, float] = {"ventricular_in_a_row": self._run}
        # A count over part of a minute says "at least": enough to raise, not to resolve.
        count = len(self._ventricular)
        if position - self._first >= 60 * self._rate_hz or count >= _FREQUENT:
            measures["ventricular_per_minute"] = count
        return measures

    def gap(self) -> None:
        """Forget what must not be joined over lost samples: an interval, a run, a count."""
        self._last = self._first = None
        self._ventricular.clear()
        self._intervals.clear()
        self._run = 0

    @property
    def heart_rate_bpm(self) -> float | None:
        """Of the median of the last eight intervals; None until two are known."""
        if len(self._intervals) < 2:
            return None
        return 60.0 * self._rate_hz / median(self._intervals)
