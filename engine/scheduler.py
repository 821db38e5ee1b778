"""Which rows form the next batch, and when. Pure: the clock is an argument.

A row is ready when its stream has a whole hop of samples, and has a deadline: the arrival of
that hop plus the stream's latency budget. A batch goes when it is full, when waiting longer
would miss its earliest deadline given the measured time of a step, or when no other stream is
expected to become ready before that moment. A lone stream is therefore stepped at once, and a
thousand fill batches. There are no fixed sleeps: :meth:`Scheduler.next` says when to ask again.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Seconds. A stream this late is no longer waited for; the jitter of a paced sender in a busy
# process on a desktop kernel is 1-3 ms.
_LATE = 0.003
# Seconds kept between the planned end of a step and the deadline, for routing and sending.
_MARGIN = 0.005
_SMOOTHING = 0.2  # weight of the newest value in the running means


class Terms(NamedTuple):
    """What the scheduler must know of a model."""

    num_slots: int
    max_rows: int
    priority: int  # lower goes first once deadlines are being missed
    step_seconds: Callable[[int], float]  # of a step of so many rows, as measured


class Batch(NamedTuple):
    """Rows to step now."""

    lane: str
    slots: NDArray[np.intp]


class Wait(NamedTuple):
    """Nothing to do before this time, unless something arrives; None: until it does."""

    until: float | None


class _Lane:
    """The ready rows of one model, and when the others are expected."""

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self.ready: dict[int, None] = {}  # in order of becoming ready
        self.deadline = np.zeros(terms.num_slots)
        self.hops = np.zeros(terms.num_slots, np.int64)
        self.is_ready = np.zeros(terms.num_slots, bool)
        self.arrival = np.full(terms.num_slots, -np.inf)
        self.period = np.full(terms.num_slots, np.inf)
        self.slowness = 1.0  # real step time over measured step time, running mean
        self._expected = np.full(terms.num_slots, -np.inf)

    def arrived(self, slot: int, hops: int, deadline: float, now: float) -> None:
        since = now - self.arrival[slot]
        if since > 0:
            known = np.isfinite(self.period[slot])
            weight = _SMOOTHING if known else 1.0
            before = self.period[slot] if known else 0.0
            if np.isfinite(since):
                self.period[slot] = before + weight * (since - before)
            self.arrival[slot] = now
            self._expected[slot] = now + self.period[slot]
        self.hops[slot] = hops
        if not self.is_ready[slot]:
            self.ready[slot] = None
            self.is_ready[slot] = True
            self.deadline[slot] = deadline

    def remove(self, slot: int) -> None:
        self.ready.pop(slot, None)
        self.is_ready[slot] = False

    def forget(self, slot: int) -> None:
        self.remove(slot)
        self.arrival[slot] = -np.inf
        self.period[slot] = np.inf
        self._expected[slot] = -np.inf

    def urgent(self) -> NDArray[np.intp]:
        """Return at most a batch of ready rows, those with the earliest deadlines."""
        slots = np.fromiter(self.ready, np.intp, len(self.ready))
        if len(slots) <= self.terms.max_rows:
            return slots
        order = np.argsort(self.deadline[slots], kind="stable")
        return slots[order[: self.terms.max_rows]]

    def latest_start(self, slots: NDArray[np.intp]) -> float:
        """Return the time after which starting these rows would miss a deadline."""
        step = self.slowness * self.terms.step_seconds(len(slots))
        return float((self.deadline[slots] - self.hops[slots] * step).min()) - _MARGIN

    def expected_before(self, limit: float, now: float) -> float | None:
        """Return when the last row that should arrive before the limit is due, if any."""
        due = self._expected + np.minimum(_LATE, self.period / 4)
        due = due[(due > now) & (due <= limit) & ~self.is_ready]
        return float(due.max()) if len(due) else None


class Scheduler:
    """All lanes' ready rows.

    Parameters
    ----------
    terms : mapping of lane name to Terms
    """

    def __init__(self, terms: Mapping[str, Terms]) -> None:
        self._lanes = {name: _Lane(each) for name, each in terms.items()}

    def arrived(self, lane: str, slot: int, hops: int, deadline: float, now: float) -> None:
        """Note that a row has whole hops to step.

        Parameters
        ----------
        lane : str
        slot : int
        hops : int
            How many steps the row's samples suffice for, at least 1.
        deadline, now : float
            Seconds of one monotonic clock. A row that is ready already keeps its earlier one.
        """
        self._lanes[lane].arrived(slot, hops, deadline, now)

    def stepped(self, batch: Batch, hops: NDArray[np.int64], seconds: float) -> None:
        """Note the hops that each row of a finished batch still has, and what the step took."""
        lane = self._lanes[batch.lane]
        lane.hops[batch.slots] = hops
        for slot in batch.slots[hops == 0].tolist():
            lane.remove(slot)
        ratio = seconds / lane.terms.step_seconds(len(batch.slots))
        lane.slowness += _SMOOTHING * (min(max(ratio, 1.0), 4.0) - lane.slowness)

    def removed(self, lane: str, slot: int) -> None:
        """Forget a row whose stream is over."""
        self._lanes[lane].forget(slot)

    def deadlines(self, batch: Batch) -> NDArray[np.float64]:
        """Return the deadline of each row of a batch."""
        return self._lanes[batch.lane].deadline[batch.slots]

    def next(self, now: float) -> Batch | Wait:
        """Return the batch to run now, or the time at which to ask again."""
        going: list[tuple[bool, int, float, Batch]] = []
        wake: list[float] = []
        for name, lane in self._lanes.items():
            if not lane.ready:
                continue
            slots = lane.urgent()
            limit = lane.latest_start(slots)
            due = None
            if len(slots) < lane.terms.max_rows and now < limit:
                due = lane.expected_before(limit, now)
            if due is None:
                late = now > limit + _MARGIN
                priority = lane.terms.priority if late else 0
                going.append((not late, priority, limit, Batch(name, slots)))
            else:
                wake.append(due)
        if going:
            return min(going, key=lambda entry: entry[:3])[3]
        return Wait(min(wake) if wake else None)
