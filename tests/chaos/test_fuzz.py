"""The fuzzers in short: committed inputs, mad ones, and some seconds of atheris if it is there."""

import importlib.util
import random
from pathlib import Path

import msgpack
import pytest

from tests.chaos import fuzz


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_no_committed_input_does_any_harm(target: str, tmp_path: Path) -> None:
    made = fuzz.TARGETS[target](tmp_path)
    for data in fuzz.seeds(target):
        made.throw(data)
    made.settle()
    assert made.tried >= len(fuzz.seeds(target)) > 10


@pytest.mark.parametrize(("target", "inputs"), [("wire", 1500), ("files", 300)])
def test_nothing_mad_does_any_harm(target: str, inputs: int, tmp_path: Path) -> None:
    if target == "files":
        pytest.importorskip("tomli_w", reason="needs the extra 'fuzz'")
    made, rng = fuzz.TARGETS[target](tmp_path), random.Random(7)
    pool = fuzz.seeds(target)
    for _ in range(inputs):
        data = made.mutate(rng.choice(pool), rng)
        if len(data) < 8192:
            made.throw(data)
            pool += [data] * (rng.random() < 0.1)
    made.settle()


def test_a_neighbour_who_hears_something_else_is_noticed(tmp_path: Path) -> None:
    wire = fuzz.Wire(tmp_path)
    stolen = msgpack.packb([{"type": "flush", "stream": "good", "id": 9}])
    wire.throw(stolen)
    wire.settle()  # it is another's stream
    wire._driven.engine.receive(b"good", stolen, wire._driven.now)
    with pytest.raises(fuzz.Found, match="neighbour: message 2: expected Scores"):
        wire.settle()


@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="needs atheris: the extra 'fuzz'"
)
@pytest.mark.parametrize(("target", "messages"), [("wire", 4000), ("files", 400)])
def test_some_seconds_of_coverage_guided_inputs_find_nothing(target: str, messages: int) -> None:
    report = fuzz.fuzz(target, messages, seed=1, most_s=90.0)
    assert report["figure"] == 0, report
    assert report["tried"] >= messages
