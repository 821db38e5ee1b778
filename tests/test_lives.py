"""Streams that outlast their connection and their server: exactly what an unbroken run tells."""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from engine import checkpoint, model_file, rules
from engine import messages as m
from engine.alerts import Alerts
from engine.audit import Audit
from engine.audit import lines as audit_lines
from engine.checkpoint import Store
from engine.client import Client
from engine.lives import Life
from tests.conftest import Server
from tests.drive import Driven, chunks

Starter = Callable[..., Server]
LIFE = 77
SIGNAL = np.random.default_rng(3).standard_normal(1500).astype(np.float32)
DEADLINE_S = 40.0
HEART = model_file.find("heart")
RULES = """
[[rule]]
name = "loud"
kind = "physiological"
raise = "scores.voice >= 0.5"
clear = "scores.voice < 0.2"
for_s = 0.3
priority = "high"
"""


def ecg(seconds: float = 40.0, rate_hz: float = 360.0) -> np.ndarray:
    """Two leads with narrow complexes at 75 a minute, and some that are wide and early, in mV."""
    t = np.arange(round(seconds * rate_hz)) / rate_hz
    values = np.random.default_rng(1).normal(0, 0.01, len(t))
    for number, beat in enumerate(np.arange(0.5, seconds - 0.5, 0.8)):
        early = number % 7 == 6
        width, place = (0.035, beat - 0.25) if early else (0.012, beat)
        values += 1.2 * np.exp(-(((t - place) / width) ** 2))
    return np.stack([values, 0.7 * values], axis=1).astype(np.float32)


ECG = ecg()


def results(messages: Iterable[m.Message]) -> list[m.Message]:
    """Return what is told exactly once, by its type and number."""
    told = [one for one in messages if isinstance(one, m.Numbered)]
    return sorted(told, key=lambda one: (type(one).__name__, one.number))


def sent(name: str, values: np.ndarray, size: int) -> list[m.Chunk]:
    """Cut a signal into chunks, without the one that is lost and with two that change places."""
    flat = values.reshape(len(values), -1)
    made = [
        m.Chunk(name, seq, start, flat[start : start + size].tobytes())
        for seq, start in enumerate(range(0, len(flat), size))
    ]
    made[4], made[5] = made[5], made[4]
    del made[8]
    return made


def hand_over(driven: Driven, *paths: Path) -> Driven:
    """Let another engine, with nothing in common but the model files, go on with all streams."""
    other = Driven(*paths, bridge_s=0.05, reorder_chunks=2)
    for group in driven.engine.take_all():
        other.say("old", m.Adopt(group.name, group.state))
    assert other.told("old", m.Error) == []
    return other


def unbroken(paths: tuple[Path, ...], request: m.Open, told: list[m.Chunk]) -> list[m.Message]:
    driven = Driven(*paths, bridge_s=0.05, reorder_chunks=2)
    driven.say("a", request)
    for chunk in told:
        driven.say("a", chunk)
        driven.run()
    driven.say("a", m.Flush("s", 1), m.Close("s"))
    driven.run()
    return driven.heard("a")


CASES = {
    "scores": ("tiny", m.Open("s", "tiny", 100.0, "mV", life=LIFE), SIGNAL, 33),
    "resampled": ("tiny", m.Open("s", "tiny", 250.0, "mV", life=LIFE), SIGNAL, 57),
    "heart": ("heart", m.Open("s", "heart", 360.0, "mV", 2, life=LIFE), ECG, 501),
    "heart at another rate": ("heart", m.Open("s", "heart", 250.0, "mV", 2, life=LIFE), ECG, 333),
    "clock": ("heart", m.Open("s", "heart", 360.0, "mV", 2, clock="device", life=LIFE), ECG, 411),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("place", [5, 9, 14])
def test_another_engine_goes_on_as_if_nothing_had_happened(
    case: str, place: int, tiny_path: Path
) -> None:
    model, request, values, size = CASES[case]
    path = tiny_path if model == "tiny" else HEART
    told = sent("s", values, size)
    if request.clock:
        told = [
            msgspec.structs.replace(chunk, t_device=chunk.index / 360.02 + 5.0) for chunk in told
        ]
    first = Driven(path, bridge_s=0.05, reorder_chunks=2)
    first.say("a", request)
    for chunk in told[: place - 1]:
        first.say("a", chunk)
        first.run()
    first.say("a", told[place - 1])  # what came last has not been stepped, nor held chunks taken
    second = hand_over(first, path)
    second.say("b", msgspec.structs.replace(request, resume=True))
    (opened,) = second.told("b", m.Opened)
    assert opened.resumed
    for chunk in told:
        second.say("b", chunk)  # those that it has are known by their number
        second.run()
    second.say("b", m.Flush("s", 1), m.Close("s"))
    second.run()
    both = {
        (type(one), one.number): one for one in results([*first.heard("a"), *second.heard("b")])
    }
    whole = unbroken((path,), request, told)
    assert results(both.values()) == results(whole)
    assert len(both) > 20
    assert acks([*first.heard("a"), *second.heard("b")]) == acks(whole)


def acks(messages: Iterable[m.Message]) -> set[tuple[int, int]]:
    """Return what was acknowledged, without what is told of a stream that nothing is through of."""
    return {(one.seq, one.index) for one in messages if isinstance(one, m.Ack) and one.seq >= 0}


def test_the_numbers_do_not_hang_on_how_many_hops_are_taken_at_once() -> None:
    """A stream tells of its own clock between the results of the hops around it."""
    _, request, values, _ = CASES["clock"]
    size = 100
    told = [
        msgspec.structs.replace(chunk, t_device=chunk.index / 360.02 + 5.0)
        for chunk in sent("s", values[:6000], size)
    ]
    numbered = []
    for at_once in (1, len(told)):
        driven = Driven(HEART, bridge_s=0.05, reorder_chunks=2, credit_s=60.0)
        driven.say("a", request)
        for start in range(0, len(told), at_once):
            driven.say("a", *told[start : start + at_once])
            driven.run()
        numbered.append(results(driven.heard("a")))
    assert numbered[0] == numbered[1]


def test_results_are_kept_until_an_ack_of_what_came_after_must_have_come() -> None:
    life = Life(LIFE)
    for count in range(100, 1100, 100):
        score = m.Scores("s", "beat", count, (1,), b"")
        life.number(score)
        life.keep(score, m.encode(score), count, 350)
    kept = [m.decode_reply(one) for one in life.missed({})]
    # Who has sent 1000 samples has an ack of 650 or later, which came behind all told before.
    assert [one.index for one in kept] == [700, 800, 900, 1000]


def test_a_flush_whose_answer_was_lost_is_answered_again_and_not_done_twice(
    tiny_path: Path,
) -> None:
    driven = Driven(tiny_path)
    driven.open("a", "s", life=LIFE)
    driven.say("a", *chunks("s", SIGNAL[:90]), m.Flush("s", 1))
    driven.run()
    told = len(results(driven.heard("a")))
    driven.engine.drop(b"a", "gone")
    driven.open("b", "s", life=LIFE, resume=True, seen={"scores": told})
    driven.say("b", m.Flush("s", 1))
    driven.run()
    assert driven.told("b", m.Flushed) == [m.Flushed("s", 1, 90)]
    assert results(driven.heard("b")) == []


def test_results_that_were_lost_with_the_connection_are_told_again(tiny_path: Path) -> None:
    driven = Driven(tiny_path)
    driven.open("a", "s", life=LIFE)
    driven.say("a", *chunks("s", SIGNAL[:200], [100]))
    driven.run()
    before = results(driven.heard("a"))
    driven.engine.drop(b"a", "gone")
    request = m.Open("s", "tiny", 100.0, "mV", life=LIFE, resume=True, seen={"scores": 14})
    driven.say("b", request)
    assert results(driven.heard("b")) == [one for one in before if one.number > 14]
    assert len(before) == 20


@pytest.mark.parametrize("life", [0, LIFE + 1])
def test_who_does_not_know_the_life_cannot_resume(tiny_path: Path, life: int) -> None:
    driven = Driven(tiny_path)
    driven.open("a", "s", life=LIFE)
    driven.open("b", "s", life=life, resume=True)
    (error,) = driven.told("b", m.Error)
    assert error.code == "unknown_life"


def test_a_stream_without_a_life_ends_with_its_connection(tiny_path: Path) -> None:
    driven = Driven(tiny_path)
    driven.open("a", "s")
    driven.engine.drop(b"a", "gone")
    driven.open("b", "s")
    assert not driven.told("b", m.Opened)[0].resumed


def test_a_subscriber_asks_for_what_it_missed(tiny_path: Path) -> None:
    driven = Driven(tiny_path)
    driven.open("a", "s", life=LIFE)
    driven.say("a", *chunks("s", SIGNAL[:100]))
    driven.run()
    driven.say("c", m.Again("s", LIFE, {"scores": 7}, 3))
    told = driven.heard("c")
    assert [one.number for one in results(told)] == [8, 9, 10]
    assert told[-1] == m.Recalled("s", LIFE, {"scores": 10}, 3)


def test_a_damaged_checkpoint_is_not_adopted(tiny_path: Path) -> None:
    driven = Driven(tiny_path)
    driven.open("a", "s", life=LIFE)
    (group,) = driven.engine.take_all()
    other = Driven(tiny_path)
    other.say("old", m.Adopt("s", group.state[:-1]))
    assert [one.code for one in other.told("old", m.Error)] == ["bad_state"]


def test_a_stream_of_another_model_does_not_go_on(
    tiny_path: Path, models: Callable[..., Path]
) -> None:
    driven = Driven(tiny_path)
    driven.open("a", "s", life=LIFE)
    (group,) = driven.engine.take_all()
    other = Driven(models("tiny2", cell="GRU"))
    other.say("old", m.Adopt("s", group.state))
    assert [one.code for one in other.told("old", m.Error)] == ["unknown_model"]


def test_a_whole_checkpoint_of_another_make_is_refused_and_takes_no_place(tiny_path: Path) -> None:
    driven = Driven(tiny_path)
    driven.open("a", "s", life=LIFE)
    (group,) = driven.engine.take_all()
    state = checkpoint.decode(group.state)
    del state["streams"]["s"]["row"]["session"]["anchors"]
    other = Driven(tiny_path, max_streams=1)
    other.say("old", m.Adopt("s", checkpoint.encode(state)))
    assert [one.code for one in other.told("old", m.Error)] == ["bad_state"]
    other.open("b", "another")
    assert len(other.told("b", m.Opened)) == 1


def test_what_was_not_heard_while_streams_could_not_be_given_away_is_asked_for(
    tiny_path: Path,
) -> None:
    driven = Driven(tiny_path)
    driven.open("a", "s", life=LIFE)
    first, second = chunks("s", SIGNAL[:200], [100])
    driven.say("a", first)
    driven.say("desk", m.Drain("tcp://127.0.0.1:1", "tcp://127.0.0.1:2"))
    driven.say("a", second)
    driven.run()
    driven.engine.keep("nobody is there")
    assert [one.code for one in driven.told("desk", m.Error)] == ["not_moved"]
    driven.say("a", m.Ping())  # on a connection that was dropped: as a client finds out
    driven.open("a", "s", life=LIFE, resume=True)
    assert driven.told("a", m.Opened)[-1].seq == second.seq
    driven.say("a", second)
    driven.run()
    assert not driven.told("a", m.Gap)
    assert driven.told("a", m.Ack)[-1].index == 200


class Kept:
    """An engine of the detector that writes its streams down, when it is told to."""

    def __init__(self, detector: Path, folder: Path) -> None:
        self._committed = threading.Event()
        self.store = Store(folder / "streams.db", 100.0, self._committed.set)
        self.log = Audit(folder / "audit.db")
        self.driven = Driven(
            detector, store=self.store, alerts=Alerts(rules.parse(RULES)), audit=self.log
        )

    def settle(self) -> None:
        """Wait until all that was handed over is on the disk."""
        while self.store.behind:
            assert self._committed.wait(DEADLINE_S)
            self._committed.clear()

    def commit(self) -> None:
        """Let the engine see that as well."""
        self.settle()
        self.driven.run()

    def told(self) -> list[str]:
        """Return the types of what the client was told so far."""
        return [type(one).__name__ for one in self.driven.heard("a")]

    def close(self) -> None:
        self.store.close()
        self.log.close()


@pytest.fixture
def kept(detector: Path, tmp_path: Path) -> Iterator[Kept]:
    one = Kept(detector, tmp_path)
    yield one
    one.close()


def loud(kept: Kept) -> None:
    kept.driven.open("a", "s", "detector", unit="1", life=LIFE)
    kept.driven.say("a", *chunks("s", np.repeat(np.float32([0, 1]), 100), [100]))
    kept.driven.run()


def test_nothing_is_acknowledged_and_no_alert_told_before_it_is_on_the_disk(kept: Kept) -> None:
    loud(kept)
    assert {"Ack", "Alert"}.isdisjoint(kept.told())
    kept.store.start()
    kept.commit()
    assert [one.state for one in kept.driven.told("a", m.Alert)] == ["pending", "active"]
    kept.driven.now += 5.0  # acks alone come every four seconds
    kept.driven.run()
    kept.commit()
    assert kept.driven.told("a", m.Ack)[-1].index == 200


def test_scores_wait_for_no_disk(kept: Kept) -> None:
    loud(kept)
    assert kept.told().count("Scores") == 20


def test_a_disk_that_takes_nothing_is_told_and_holds_nobody_up(kept: Kept) -> None:
    loud(kept)
    kept.store.fault = "disk full"  # as the store's thread says it, which does not run
    kept.driven.run()
    assert {"Ack", "Alert"}.isdisjoint(kept.told())
    kept.driven.now += 6.0
    kept.driven.engine.turn(kept.driven.now)
    (error,) = kept.driven.told("a", m.Error)
    assert (error.code, error.stream) == ("not_durable", "s")
    assert len(kept.driven.told("a", m.Alert)) == 2


def test_the_audit_log_has_each_transition_once_however_often_a_server_starts(
    detector: Path, tmp_path: Path
) -> None:
    for number in range(3):
        kept = Kept(detector, tmp_path)
        kept.driven.engine.restore(kept.driven.now)
        if not number:
            loud(kept)
            kept.commit()
        kept.close()
    lines = list(audit_lines(tmp_path / "audit.db"))
    assert [(line["from_state"], line["to_state"]) for line in lines] == [
        ("inactive", "pending"),
        ("pending", "active"),
    ]
    assert [line["number"] for line in lines] == [1, 2]


def test_a_transition_that_the_audit_log_did_not_get_is_written_at_the_next_start(
    detector: Path, tmp_path: Path
) -> None:
    kept = Kept(detector, tmp_path)
    loud(kept)
    kept.store.start()
    kept.settle()  # it is on the disk, and the server ends before it sees that
    kept.close()
    assert not list(audit_lines(tmp_path / "audit.db"))
    kept = Kept(detector, tmp_path)
    kept.driven.engine.restore(kept.driven.now)
    kept.close()
    assert [line["number"] for line in audit_lines(tmp_path / "audit.db")] == [1, 2]


def arguments(folder: Path) -> tuple[str, ...]:
    return ("--checkpoints", str(folder / "streams.db"))


def collect(client: Client, count: int, told: list[m.Message]) -> None:
    while sum(isinstance(one, m.Scores) for one in told) < count:
        found = list(client.events(DEADLINE_S))
        assert found, "results did not come"
        told += found


def test_a_killed_server_goes_on_with_what_it_had_written(
    serving: Starter, tmp_path: Path, tiny_path: Path
) -> None:
    told: list[m.Message] = []
    server = serving(*arguments(tmp_path))
    with Client(server.address, timeout_s=DEADLINE_S) as client:
        stream = client.open("s", "tiny", rate_hz=100.0, unit="mV")
        for start in range(0, 1500, 250):
            stream.send(SIGNAL[start : start + 250])
            told += client.events()
            if start in (500, 1000):
                server.stop(signal.SIGKILL)
                server = serving(*arguments(tmp_path), bind=server.address)
        assert stream.flush() == 1500
        told += client.events()
        life = stream.request.life
    request = m.Open("s", "tiny", 100.0, "mV", life=life)
    whole = unbroken((tiny_path,), request, chunks("s", SIGNAL, range(50, 1500, 50)))
    assert results(told) == results(whole)
    assert not [one for one in told if isinstance(one, m.Error | m.Gap)]


def test_drain_moves_streams_to_another_server(
    serving: Starter, tmp_path: Path, tiny_path: Path
) -> None:
    told: list[m.Message] = []
    first, second = serving(), serving()
    with Client(first.address, timeout_s=DEADLINE_S) as client:
        stream = client.open("s", "tiny", rate_hz=100.0, unit="mV")
        stream.send(SIGNAL[:500])
        with Client(first.address, timeout_s=DEADLINE_S) as other:
            other.drain(second.address, second.endpoints["publish"])
        stream.send(SIGNAL[500:])
        assert stream.flush() == 1500
        told += client.events()
        life = stream.request.life
    first.process.wait(DEADLINE_S)
    assert first.stop() == 0
    request = m.Open("s", "tiny", 100.0, "mV", life=life)
    whole = unbroken((tiny_path,), request, chunks("s", SIGNAL, range(50, 1500, 50)))
    assert results(told) == results(whole)
