"""What waits of each peer: done in turns, counted in bytes, bounded, and in order all the same."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from engine import messages as m
from engine.peer import LONGEST_BODY, Peer
from engine.rights import ANYONE
from tests.drive import Driven, chunks


def body(*requests: m.Message) -> bytes:
    return m.body([m.encode(request) for request in requests])


def pongs(driven: Driven, peer: str) -> list[int]:
    return [each.id for each in driven.told(peer, m.Pong)]


@pytest.fixture
def slow(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driven:
    """An engine to which every look at the clock takes a millisecond: a turn is two messages."""
    driven = Driven(tiny_path, max_queued_bytes=4000)
    for peer in ("greedy", "modest"):
        driven.say(peer, m.Ping(0))
    ticks = itertools.count(1)
    monkeypatch.setattr(driven.engine, "_clock", lambda: next(ticks) / 1000)
    return driven


def test_who_asks_for_much_waits_and_no_one_else(slow: Driven) -> None:
    slow.throw("greedy", body(*map(m.Ping, range(1, 101))))
    slow.throw("modest", body(m.Ping(1), m.Ping(2)))
    assert len(pongs(slow, "greedy")) < 6
    assert pongs(slow, "modest") == [0, 1, 2]
    assert not slow.engine.catch_up(0.010)
    assert len(pongs(slow, "greedy")) < 20
    while not slow.engine.catch_up(0.010):
        assert not slow.engine.turn(slow.now).deaf
    assert pongs(slow, "greedy") == list(range(101))


def test_peers_with_much_to_do_take_turns(slow: Driven) -> None:
    for peer in ("greedy", "modest"):
        slow.throw(peer, body(*map(m.Ping, range(1, 51))))
    while not slow.engine.catch_up(0.010):
        done = [len(pongs(slow, peer)) for peer in ("greedy", "modest")]
        assert abs(done[0] - done[1]) < 6


def test_what_is_done_in_several_turns_is_what_is_done_at_once(
    slow: Driven, tiny_path: Path, rng: np.random.Generator
) -> None:
    signal = rng.standard_normal(160).astype(np.float32)
    requests = [m.Open("s", "tiny", 100.0, "mV"), *chunks("s", signal, range(7, 160, 7))]
    at_once = Driven(tiny_path)
    at_once.say("greedy", *requests, m.Flush("s"), m.Close("s"))
    at_once.run()
    for part in (requests[:5], requests[5:6], requests[6:], [m.Flush("s"), m.Close("s")]):
        slow.throw("greedy", body(*part))
    while not slow.engine.catch_up(0.005):
        slow.turn()
    slow.run()
    results = (m.Scores, m.Closed)
    assert [each for each in slow.heard("greedy") if isinstance(each, results)] == [
        each for each in at_once.heard("greedy") if isinstance(each, results)
    ]


def test_more_waiting_bytes_than_may_be_end_a_connection_with_a_reason(slow: Driven) -> None:
    one = body(*map(m.Ping, range(100)))
    sent = 0
    while slow.engine.receive(b"greedy", one, slow.now):
        sent += 1
    assert 4000 / len(one) - 2 < sent < 4000 / len(one) + 2
    ((peer, told),) = slow.engine.turned_away
    (error,) = m.decode_replies(told)
    assert peer == b"greedy"
    assert (error.code, "limits.max_queued_bytes is 4000" in error.reason) == ("over_queue", True)
    assert slow.refused()["over_queue"] == 1
    assert [*slow.engine.peers] == [b"modest"]
    assert slow.engine.catch_up(1.0)


def test_of_all_that_waits_too_much_that_of_the_greediest_is_given_up(tiny_path: Path) -> None:
    driven = Driven(tiny_path, max_queued_mb=1)
    for number in range(3):
        driven.say(f"peer{number}", m.Ping(0))
        for _ in range(1000 * (number + 1)):  # some 200 bytes each
            driven.throw(f"peer{number}", body(m.Hello(m.VERSION)))
    driven.engine.tick(driven.now)
    assert [*driven.engine.peers] == [b"peer0", b"peer1"]
    assert driven.metrics.queued_bytes <= 2**20
    ((_, told),) = driven.engine.turned_away
    assert "limits.max_queued_mb is 1" in m.decode_replies(told)[0].reason


def test_bodies_are_cut_by_bytes_and_one_that_was_not_taken_comes_first() -> None:
    peer = Peer(0.0, ANYONE)
    sizes = [10, LONGEST_BODY - 5000, 9000, 3 * LONGEST_BODY, 20, 30]
    expected = [m.Scores("s", "o", k, (1,), bytes(size)) for k, size in enumerate(sizes)]
    for message in expected:
        peer.tell(m.encode(message))
    found, longest = [], 0
    while peer.unsent:
        taken = peer.take()
        before = peer.unsent
        peer.put_back(taken)
        assert peer.unsent == before + len(taken)
        assert peer.take() == taken
        messages = m.decode_replies(taken)
        longest = max(longest, len(taken) if len(messages) > 1 else 0)
        found += messages
    assert found == expected
    assert longest <= LONGEST_BODY + 100
    assert peer.outbox == []
