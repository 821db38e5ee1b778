"""Which rows go when: a pure function of arrivals, deadlines and a clock that the test sets."""

import heapq
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.scheduler import Batch, Scheduler, Terms, Wait

STEP_S = 0.002  # of a full batch; of a single row, half
MAX_ROWS = 4
HOP_S = 0.04
BUDGET_S = 0.1


def step_seconds(rows: int) -> float:
    return STEP_S * (0.5 + 0.5 * rows / MAX_ROWS)


def terms(priority: int = 5, max_rows: int = MAX_ROWS) -> Terms:
    return Terms(64, max_rows, HOP_S, priority, step_seconds)


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler({"a": terms()})


def arrive(
    scheduler: Scheduler, slot: int, now: float, budget: float = BUDGET_S, hops: int = 1
) -> None:
    scheduler.arrived("a", slot, hops, now + budget, now)


def go(scheduler: Scheduler, now: float, left: int = 0) -> list[int]:
    """Expect a batch now, and report it stepped with so many hops left in each row."""
    batch = scheduler.next(now)
    assert isinstance(batch, Batch)
    hops = np.full(len(batch.slots), left)
    scheduler.stepped(batch, 1, hops, step_seconds(len(batch.slots)))
    return batch.slots.tolist()


def wait(scheduler: Scheduler, now: float) -> float:
    """Expect to be told to wait, and until when."""
    told = scheduler.next(now)
    assert isinstance(told, Wait)
    assert told.until is not None
    assert told.until > now
    return told.until


def live(scheduler: Scheduler, slots: list[int], spacing: float = 0.01) -> float:
    """Let some streams send a hop each, in turn; return when the first is due again."""
    for place, slot in enumerate(slots):
        arrive(scheduler, slot, place * spacing)
        scheduler.stepped(Batch("a", np.array([slot])), 1, np.array([0]), STEP_S)
    return HOP_S


def test_nothing_ready_waits_for_an_arrival(scheduler: Scheduler) -> None:
    assert scheduler.next(5.0) == Wait(None)


def test_a_lone_stream_goes_at_once(scheduler: Scheduler) -> None:
    for now in (0.0, 0.04, 0.08):
        arrive(scheduler, 3, now)
        assert go(scheduler, now) == [3]


def test_a_full_batch_goes_at_once(scheduler: Scheduler) -> None:
    now = live(scheduler, [0, 1, 2, 3, 4])
    for slot in range(MAX_ROWS):
        arrive(scheduler, slot, now)
    assert sorted(go(scheduler, now)) == [0, 1, 2, 3]


def test_a_row_waits_for_the_stream_that_is_expected_and_leaves_with_it(
    scheduler: Scheduler,
) -> None:
    now = live(scheduler, [0, 1])
    arrive(scheduler, 0, now)
    assert now + 0.01 <= wait(scheduler, now) <= now + 0.01 + 0.004
    arrive(scheduler, 1, now + 0.01)
    assert sorted(go(scheduler, now + 0.01)) == [0, 1]


def test_a_late_stream_is_not_waited_for(scheduler: Scheduler) -> None:
    now = live(scheduler, [0, 1])
    arrive(scheduler, 0, now)
    until = wait(scheduler, now)
    assert go(scheduler, until) == [0]
    arrive(scheduler, 0, now + HOP_S)  # and the silent one is expected no more
    assert go(scheduler, now + HOP_S) == [0]


def test_a_stream_that_ended_is_not_waited_for(scheduler: Scheduler) -> None:
    now = live(scheduler, [0, 1])
    arrive(scheduler, 0, now)
    wait(scheduler, now)
    scheduler.removed("a", 1)
    assert go(scheduler, now) == [0]


def test_a_row_does_not_wait_past_its_deadline_less_a_step(scheduler: Scheduler) -> None:
    now = live(scheduler, [0, 1])
    arrive(scheduler, 0, now, budget=0.01)  # the other is due in 10 ms
    assert go(scheduler, now) == [0]


def test_a_tighter_row_ends_the_wait_of_others(scheduler: Scheduler) -> None:
    now = live(scheduler, [0, 1])
    arrive(scheduler, 0, now)
    wait(scheduler, now)
    arrive(scheduler, 2, now, budget=0.008)
    assert sorted(go(scheduler, now)) == [0, 2]


@pytest.mark.parametrize("ready", [False, True], ids=["a new row", "a row that waits"])
def test_a_row_with_many_hops_ends_a_wait_that_leaves_no_time_for_them(
    scheduler: Scheduler, ready: bool
) -> None:
    now = live(scheduler, [0, 1])
    arrive(scheduler, 0, now)
    wait(scheduler, now)
    arrive(scheduler, 0 if ready else 2, now, hops=int(BUDGET_S / STEP_S))
    assert 0 in go(scheduler, now)


def test_the_earliest_deadlines_go_first(scheduler: Scheduler) -> None:
    for slot, budget in enumerate([0.5, 0.1, 0.4, 0.2, 0.3, 0.6]):
        arrive(scheduler, slot, 0.0, budget)
    assert go(scheduler, 0.0) == [1, 3, 4, 2]
    assert go(scheduler, 0.1) == [0, 5]


def test_a_row_with_hops_left_goes_again(scheduler: Scheduler) -> None:
    arrive(scheduler, 0, 0.0, hops=2)
    assert go(scheduler, 0.0, left=1) == [0]
    assert go(scheduler, 0.0, left=0) == [0]
    assert scheduler.next(0.0) == Wait(None)


def test_a_hop_keeps_the_deadline_of_its_own_arrival(scheduler: Scheduler) -> None:
    arrive(scheduler, 0, 0.0, hops=2)
    arrive(scheduler, 0, 0.03, hops=3)
    seen = []
    for left in (2, 1, 0):
        batch = scheduler.next(1.0)
        assert isinstance(batch, Batch)
        seen += scheduler.deadlines(batch).tolist()
        scheduler.stepped(batch, 1, np.array([left]), STEP_S)
    assert seen == pytest.approx([BUDGET_S, BUDGET_S, 0.03 + BUDGET_S])


def test_streams_that_never_run_empty_do_not_starve_another(scheduler: Scheduler) -> None:
    now = 0.0
    for slot in range(MAX_ROWS):
        arrive(scheduler, slot, now, hops=5)
    arrive(scheduler, 9, now + 0.001)
    for _ in range(100):
        now += STEP_S
        if 9 in go(scheduler, now, left=5):
            return
        for slot in range(MAX_ROWS):
            arrive(scheduler, slot, now, hops=6)
    pytest.fail("a hop waited for 100 steps")


def test_lanes_go_by_deadline_while_all_is_well_and_by_priority_once_it_is_not() -> None:
    def two() -> Scheduler:
        scheduler = Scheduler({"text": terms(priority=7), "alerts": terms(priority=1)})
        scheduler.arrived("text", 0, 1, 0.1, 0.0)
        scheduler.arrived("alerts", 0, 1, 0.2, 0.0)
        return scheduler

    def lane(decision: Batch | Wait) -> str:
        assert isinstance(decision, Batch)
        return decision.lane

    assert lane(two().next(0.0)) == "text"
    assert lane(two().next(0.15)) == "text"  # late, where the other is not
    assert lane(two().next(0.3)) == "alerts"


def test_a_lane_that_is_never_through_keeps_no_other_from_its_turn() -> None:
    scheduler = Scheduler({"flood": terms(priority=0), "text": terms(priority=9)})
    scheduler.arrived("text", 0, 1, 0.1, 0.0)
    now, turns = 0.0, 0
    while True:
        for slot in range(MAX_ROWS):
            scheduler.arrived("flood", slot, 1, now, now)
        batch = scheduler.next(now)
        assert isinstance(batch, Batch)
        if batch.lane == "text":
            break
        now += STEP_S
        scheduler.stepped(batch, 1, np.zeros(len(batch.slots), int), STEP_S)
        turns += 1
    assert turns * STEP_S < 1.2


class Hop(NamedTuple):
    slot: int
    deadline: float


@given(
    streams=st.lists(
        st.tuples(st.integers(0, 39), st.integers(15, 60), st.integers(60, 200)),
        min_size=1,
        max_size=12,
    ),
    seed=st.integers(0, 2**16),
)
def test_with_capacity_every_hop_is_stepped_before_its_deadline(
    streams: list[tuple[int, int, int]], seed: int
) -> None:
    """Streams of (phase, period, budget) in ms, with jitter, on a device of known speed."""
    rng = np.random.default_rng(seed)
    arrivals = [
        (phase / 1e3 + beat * period / 1e3 + rng.uniform(0, 0.002), slot, budget / 1e3)
        for slot, (phase, period, budget) in enumerate(streams)
        for beat in range(15)
    ]
    heapq.heapify(arrivals)
    scheduler = Scheduler({"a": terms()})
    waiting: dict[int, list[float]] = {slot: [] for slot in range(len(streams))}
    now = 0.0
    while arrivals or any(waiting.values()):
        while arrivals and arrivals[0][0] <= now:
            at, slot, budget_s = heapq.heappop(arrivals)
            waiting[slot].append(at + budget_s)
            scheduler.arrived("a", slot, len(waiting[slot]), at + budget_s, now)
        decision = scheduler.next(now)
        if isinstance(decision, Batch):
            rows = decision.slots.tolist()
            assert len(set(rows)) == len(rows) <= MAX_ROWS
            now += step_seconds(len(rows))
            for slot in rows:
                assert waiting[slot].pop(0) >= now
            left = np.array([len(waiting[slot]) for slot in rows])
            scheduler.stepped(decision, 1, left, step_seconds(len(rows)))
        elif decision.until is None:
            assert not any(waiting.values()), "ready rows, and nothing will ever wake them"
            now = arrivals[0][0] if arrivals else now
        else:
            assert decision.until > now
            now = min([decision.until, *(at for at, *_ in arrivals[:1])])
