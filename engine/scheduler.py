"""Which rows form the next batch, and when. Pure: the clock is an argument.

A row is ready when its stream has a whole hop of samples, and has a deadline: the arrival of
that hop plus the stream's latency budget. A batch goes when it is full, when waiting longer
would miss its earliest deadline given the measured time of a step, or when no other stream is
expected to become ready before that moment. A lone stream is therefore stepped at once, and a
thousand fill batches. There are no fixed sleeps: :meth:`Scheduler.next` says when to ask again.
"""

from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Seconds. A stream this late is no longer waited for; the jitter of a paced sender in a busy
# process on a desktop kernel is 1-3 ms.
_LATE = 0.003
# Seconds kept between the planned end of a step and the deadline, for routing and sending.
_MARGIN = 0.010
# Seconds that a level of priority is worth once deadlines are being missed. A model that is never
# through, such as one that is fed faster than real time, keeps another waiting no longer.
_HANDICAP = 0.1
_SMOOTHING = 0.2  # weight of the newest value in the running mean of the slowness
_SLOWEST = 4.0  # one stall of the machine must not stop all batching


class Terms(NamedTuple):
    """What the scheduler must know of a model."""

    num_slots: int
    max_rows: int  # that one step takes
    hop_s: float  # seconds of signal in a hop
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
        self.deadline = np.zeros(terms.num_slots)  # of the row's next hop
        self.hops = np.zeros(terms.num_slots, np.int64)
        # Hops that share this deadline. What arrived on top of them has a later one, or a row
        # that never runs empty would for ever go first: (hops, deadline) of each such arrival.
        self.urgent_hops = np.zeros(terms.num_slots, np.int64)
        self.later: dict[int, deque[tuple[int, float]]] = {}
        self.newest = np.zeros(terms.num_slots)  # deadline of the last arrival
        self.is_ready = np.zeros(terms.num_slots, bool)
        self.used = 0  # slots from here on have never been ready
        self.arrival: dict[int, float] = {}
        # The last three intervals between arrivals: their median is the period, so that one
        # pause does not change it. Until they are known, a live stream's chunk says it best.
        self.intervals: dict[int, tuple[float, ...]] = {}
        self.due = np.full(terms.num_slots, -np.inf)  # when the next arrival is overdue
        self.slowness = 1.0  # real step time over measured step time, running mean
        self.reserve = _MARGIN  # seconds that the last step would have needed before a deadline
        # Not always the fullest: only that one is spread over all cores.
        self.longest_step = max(map(terms.step_seconds, range(1, terms.max_rows + 1)))
        # The plan: wait until then, or until that row is ready. A time in the past is none.
        self.until = -np.inf
        self.awaited = -1
        self.step = 0.0  # seconds that the plan reckons for a step
        self.limit = np.inf  # when the rows that the plan knows must start at the latest

    def arrived(self, slot: int, hops: int, deadline: float, now: float) -> None:
        arrival = self.arrival.get(slot)
        if arrival is None:
            intervals: tuple[float, ...] = (hops * self.terms.hop_s,) * 3
        else:
            intervals = (*self.intervals[slot][1:], now - arrival)
        period = sorted(intervals)[1]
        self.intervals[slot] = intervals
        self.arrival[slot] = now
        self.due[slot] = now + period + min(_LATE, period / 4)
        self.newest[slot] = deadline
        self.used = max(self.used, slot + 1)
        if not self.is_ready[slot]:
            self.ready[slot] = None
            self.is_ready[slot] = True
            self.deadline[slot] = deadline
            self.urgent_hops[slot] = hops
            if len(self.ready) >= self.terms.max_rows or slot == self.awaited:
                self.until = -np.inf
        elif hops > self.hops[slot]:
            more = hops - int(self.hops[slot])
            self.later.setdefault(slot, deque()).append((more, deadline))
        self.hops[slot] = hops
        if self.deadline[slot] - hops * self.step - _MARGIN < self.limit:
            self.until = -np.inf

    def stepped(self, slots: NDArray[np.intp], taken: int, hops: NDArray[np.int64]) -> None:
        self.until = -np.inf
        self.hops[slots] = hops
        self.urgent_hops[slots] -= taken
        for slot in slots[hops == 0].tolist():
            self.remove(slot)
        for slot in slots[(hops > 0) & (self.urgent_hops[slots] <= 0)].tolist():
            later = self.later.get(slot, ())
            while self.urgent_hops[slot] <= 0:
                more, self.deadline[slot] = (
                    later.popleft() if later else (self.hops[slot], self.newest[slot])
                )
                self.urgent_hops[slot] += more

    def remove(self, slot: int) -> None:
        self.ready.pop(slot, None)
        self.later.pop(slot, None)
        self.is_ready[slot] = False

    def forget(self, slot: int) -> None:
        self.remove(slot)
        self.arrival.pop(slot, None)
        self.due[slot] = -np.inf
        self.until = -np.inf

    def urgent(self) -> NDArray[np.intp]:
        """Return at most a batch of ready rows, those with the earliest deadlines."""
        slots = np.fromiter(self.ready, np.intp, len(self.ready))
        if len(slots) <= self.terms.max_rows:
            return slots
        order = np.argsort(self.deadline[slots], kind="stable")
        return slots[order[: self.terms.max_rows]]

    def plan(self, now: float) -> bool:
        """Decide whether the ready rows should go now; if not, set until when they wait."""
        slots = self.urgent()
        if len(slots) == self.terms.max_rows:
            return True
        # What the step will take if the batch fills up while it waits.
        self.step = self.slowness * self.longest_step
        self.limit = float((self.deadline[slots] - self.hops[slots] * self.step).min()) - _MARGIN
        due = self.due[: self.used]
        expected = np.where(self.is_ready[: self.used] | (due > self.limit), -np.inf, due)
        self.awaited = int(expected.argmax())
        self.until = float(expected[self.awaited])
        return self.until <= now


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
            Seconds of one monotonic clock. The hops that a row had before keep their own.
        """
        self._lanes[lane].arrived(slot, hops, deadline, now)

    def stepped(self, batch: Batch, taken: int, hops: NDArray[np.int64], seconds: float) -> None:
        """Note a finished batch.

        Parameters
        ----------
        batch : Batch
        taken : int
            Hops that each row was advanced.
        hops : (rows,) int64
            Hops that each row still has.
        seconds : float
            What the step took.
        """
        lane = self._lanes[batch.lane]
        lane.stepped(batch.slots, taken, hops)
        ratio = seconds / (taken * lane.terms.step_seconds(len(batch.slots)))
        lane.slowness += _SMOOTHING * (min(max(ratio, 1.0), _SLOWEST) - lane.slowness)
        lane.reserve = taken * lane.slowness * lane.longest_step + _MARGIN

    def removed(self, lane: str, slot: int) -> None:
        """Forget a row whose stream is over."""
        self._lanes[lane].forget(slot)

    def deadlines(self, batch: Batch) -> NDArray[np.float64]:
        """Return the deadline of each row of a batch."""
        return self._lanes[batch.lane].deadline[batch.slots]

    def arrivals(self, now: float, budget_s: float) -> tuple[int, float]:
        """Return how many rows should become ready before it would be time to step them, and when.

        Parameters
        ----------
        now : float
        budget_s : float
            From an arrival to its deadline, at the least.

        Returns
        -------
        int
        float
            The time at which a batch should be full, or at which one with the deadline ``now +
            budget_s`` must go.
        """
        count, until = 0, now + budget_s
        for lane in self._lanes.values():
            last = now + budget_s - lane.reserve
            due = lane.due[: lane.used]
            expected = due[(due > now) & (due <= last) & ~lane.is_ready[: lane.used]]
            count += len(expected)
            missing = max(1, lane.terms.max_rows - len(lane.ready))
            if len(expected) >= missing:
                last = float(np.partition(expected, missing - 1)[missing - 1])
            until = min(until, last)
        return count, max(until, now)

    def next(self, now: float) -> Batch | Wait:
        """Return the batch to run now, or the time at which to ask again."""
        going: list[tuple[str, _Lane]] = []
        wake: list[float] = []
        for name, lane in self._lanes.items():
            if not lane.ready:
                continue
            if lane.until > now or not lane.plan(now):
                wake.append(lane.until)
            else:
                going.append((name, lane))
        if going:
            name, lane = going[0]
            if len(going) > 1:
                name, lane = min(going, key=lambda each: _urgency(each[1], now))
            return Batch(name, lane.urgent())
        return Wait(min(wake) if wake else None)


def _urgency(lane: _Lane, now: float) -> tuple[bool, float]:
    """Order lanes: the earliest deadline first; among those that miss them, priority counts too."""
    earliest = min(float(lane.deadline[slot]) for slot in lane.ready)
    late = now > earliest
    return not late, earliest + (lane.terms.priority * _HANDICAP if late else 0.0)
