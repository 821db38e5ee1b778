"""Streams that outlast their connection and their server: exactly what an unbroken run tells."""

import signal
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import messages as m
from engine import model_file
from engine.client import Client
from tests.conftest import Server
from tests.drive import Driven, chunks

Starter = Callable[..., Server]
LIFE = 77
SIGNAL = np.random.default_rng(3).standard_normal(1500).astype(np.float32)
DEADLINE_S = 40.0
HEART = model_file.find("heart")


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
@settings(max_examples=3)
@given(place=st.integers(1, 25))
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
    for chunk in told[:place]:
        first.say("a", chunk)
        first.run()
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
    expected = results(unbroken((path,), request, told))
    assert results(both.values()) == expected
    assert len(expected) > 20


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
