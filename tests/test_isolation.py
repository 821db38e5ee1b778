"""A stream that fails ends alone, with a reason; all others are as if nothing had happened."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine import messages as m
from engine.heart.rhythm import Rhythm
from engine.wing import ScoresWing
from tests import plain, tiny
from tests.drive import Driven, chunks

HOP = tiny.HOP
NAMES = ("a", "b", "culprit", "d")
Signal = NDArray[np.float32]


def signals(seed: int = 3, hops: int = 8) -> dict[str, Signal]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(hops * HOP).astype(np.float32) for name in NAMES}


def play(driven: Driven, heard: dict[str, Signal], parts: int = 4) -> None:
    """Send all streams in turn, a part of each at a time, so that they are batched."""
    sent = dict.fromkeys(heard, 0)
    for part in range(parts):
        for name, signal in heard.items():
            piece = np.split(signal, parts)[part]
            if name in driven.engine._streams:
                driven.say(name, *chunks(name, piece, seq=part, index=sent[name]))
            sent[name] += len(piece)
        driven.run()


def told(driven: Driven, name: str, kind: type[Any] = m.Scores) -> list[Any]:
    return [each for each in driven.heard(name) if isinstance(each, kind)]


def assert_ended(driven: Driven, name: str, code: str, reason: str) -> None:
    (error,), (closed,) = told(driven, name, m.Error), told(driven, name, m.Closed)
    assert (error.code, error.stream, closed.reason) == (code, name, code)
    assert reason in error.reason
    assert name not in driven.engine._streams
    failed = [
        (sample.labels["code"], sample.value)
        for family in driven.metrics.collect()
        for sample in family.samples
        if sample.name == "murmur_failed_total"
    ]
    assert failed == [(code, 1)]


@pytest.mark.parametrize("wrong", [tiny.BREAKS, tiny.NAN, tiny.NAN_STATE])
def test_a_stream_that_the_model_fails_on_ends_alone(tmp_path: Path, wrong: float) -> None:
    path = tiny.write_fragile(tmp_path)
    driven = Driven(path)
    heard = signals()
    for name in NAMES:
        driven.open(name, name, "fragile")
    heard["culprit"][3 * HOP + 3] = wrong
    play(driven, heard)
    assert_ended(driven, "culprit", "model_error", "fragile: ")
    spared = told(driven, "culprit")
    assert len(spared) == 2 * 2  # of the steps before
    for name in set(NAMES) - {"culprit"}:
        expected = plain.loop(path, plain.cut(heard[name], HOP, HOP))
        scores = [each for each in told(driven, name) if each.output == "beat"]
        assert len(scores) == len(expected)
        for one, result in zip(scores, expected, strict=True):
            np.testing.assert_array_equal(np.frombuffer(one.data, "<f4"), result["beat"])
        assert told(driven, name, m.Ack)[-1].index == len(heard[name])


def test_the_row_of_a_stream_that_failed_is_like_new_to_the_next(tmp_path: Path) -> None:
    path = tiny.write_fragile(tmp_path)
    driven = Driven(path, max_streams=1)
    heard = signals()
    heard["a"][HOP] = tiny.NAN_STATE
    driven.open("a", "a", "fragile")
    play(driven, {"a": heard["a"]})
    assert_ended(driven, "a", "model_error", "finite")
    driven.open("b", "b", "fragile")
    play(driven, {"b": heard["b"]})
    expected = plain.loop(path, plain.cut(heard["b"], HOP, HOP))
    found = [each for each in told(driven, "b") if each.output == "beat"]
    assert [one.data for one in found] == [result["beat"].tobytes() for result in expected]


def undisturbed(path: Path, model: str) -> dict[str, list[m.Message]]:
    """Return what each stream is told where nothing fails."""
    driven = Driven(path)
    for name in NAMES:
        driven.open(name, name, model)
    play(driven, loud())
    return {name: driven.heard(name) for name in NAMES}


def loud() -> dict[str, Signal]:
    """Return signals in which the heart model of the tests finds beats."""
    return {name: 30 * signal for name, signal in signals(hops=40).items()}


def test_a_stream_that_the_wing_fails_on_ends_alone(
    heart_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = undisturbed(heart_path, "tinyheart")
    beats = [each for each in expected["culprit"] if isinstance(each, m.Beat)]
    assert len(beats) > 4
    beat = Rhythm.beat
    count = iter(range(1000))
    driven = Driven(heart_path)
    for name in NAMES:
        driven.open(name, name, "tinyheart")
    lane = driven.engine._lanes["tinyheart"]
    culprit = lane.wing._rhythm[driven.engine._streams["culprit"].slot]

    def failing(self: Rhythm, *arguments: Any) -> Any:
        if self is culprit and next(count) == 3:
            raise ZeroDivisionError("a beat that divides by zero")
        return beat(self, *arguments)

    monkeypatch.setattr(Rhythm, "beat", failing)
    play(driven, loud())
    assert_ended(driven, "culprit", "model_error", "a beat that divides by zero")
    assert len(told(driven, "culprit", m.Beat)) <= 3
    for name in set(NAMES) - {"culprit"}:
        assert driven.heard(name) == expected[name]


def test_a_wing_that_fails_as_a_whole_ends_its_step_and_no_other(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driven = Driven(tiny_path)
    heard = signals()
    for name in NAMES:
        driven.open(name, name)
    push = ScoresWing.push
    struck = {driven.engine._streams[name].slot for name in ("a", "culprit")}

    def failing(self: ScoresWing, rows: Any, outputs: Any) -> Any:
        if struck & set(rows.slots.tolist()):
            raise RuntimeError("no reason")
        return push(self, rows, outputs)

    monkeypatch.setattr(ScoresWing, "push", failing)
    for names in (("a", "culprit"), ("b", "d")):
        for name in names:
            driven.say(name, *chunks(name, heard[name]))
        driven.run()
    for name in ("a", "culprit"):
        assert [each.code for each in told(driven, name, m.Error)] == ["model_error"]
    for name in ("b", "d"):
        assert not told(driven, name, m.Error)
        assert len(told(driven, name)) == 2 * 8


def test_a_stream_whose_result_cannot_be_told_ends_alone(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driven = Driven(tiny_path)
    for name in NAMES:
        driven.open(name, name)
    publish = driven.engine._publish

    def failing(message: m.Message, name: str, encoded: bytes) -> None:
        if name == "culprit":
            raise OverflowError("too much")
        publish(message, name, encoded)

    monkeypatch.setattr(driven.engine, "_publish", failing)
    play(driven, signals())
    assert_ended(driven, "culprit", "server_error", "too much")
    for name in set(NAMES) - {"culprit"}:
        assert len(told(driven, name)) == 2 * 8


@pytest.mark.parametrize("kind", [m.Chunk, m.Ping])
def test_a_message_that_the_server_fails_on_is_answered(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[m.Message]
) -> None:
    driven = Driven(tiny_path)
    for name in ("a", "culprit"):
        driven.open(name, name)
    handle = driven.engine._handle

    def failing(peer_id: bytes, peer: Any, request: m.Message, now: float) -> None:
        if peer_id == b"culprit" and isinstance(request, kind):
            raise MemoryError("none is left")
        handle(peer_id, peer, request, now)

    monkeypatch.setattr(driven.engine, "_handle", failing)
    driven.say("culprit", m.Ping(4), *chunks("culprit", signals()["a"]))
    driven.say("a", m.Ping(5), *chunks("a", signals()["a"]))
    driven.run()
    (error,) = told(driven, "culprit", m.Error)
    assert (error.code, "none is left" in error.reason) == ("server_error", True)
    ended = kind is m.Chunk
    assert [each.reason for each in told(driven, "culprit", m.Closed)] == ["server_error"] * ended
    assert bool(told(driven, "culprit")) is not ended
    assert len(told(driven, "a")) == 2 * 8
