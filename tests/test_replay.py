"""A recording goes to a server whole or with gaps, and what is published can be watched."""

import base64
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from engine import client as client_module
from engine import messages as m
from engine import replay
from engine import watch as watching_module
from engine.client import Client
from engine.messages import Message
from engine.recordings import Recording
from tests import plain, tiny
from tests.conftest import Clock, Server
from tests.tones import say, tone_server

ROOT = Path(__file__).parent.parent
HOP = tiny.HOP
Serving = Callable[..., Server]


def murmur(*arguments: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "engine", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def noise(count: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 3, count).astype(np.float32)


def write_csv(folder: Path, samples: NDArray[np.float32]) -> str:
    path = folder / "bed.csv"
    path.write_text("\n".join("" if np.isnan(x) else repr(float(x)) for x in samples) + "\n")
    return str(path)


def replay_csv(server: Server, path: str, *options: str) -> list[dict[str, Any]]:
    """Replay a CSV file of 100 Hz in mV and return the JSON lines."""
    signal_options = ["--rate", "100", "--unit", "mV", "--model", "tiny", "--speed", "0"]
    done = murmur("replay", path, "--address", server.address, "--json", *signal_options, *options)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def scores(told: list[dict[str, Any]], output: str = "beat") -> list[dict[str, Any]]:
    return [one for one in told if one["type"] == "scores" and one["output"] == output]


@pytest.mark.parametrize("chunk_ms", ["500", "70"])
def test_a_replay_gives_the_events_of_the_whole_recording(
    serving: Serving, tmp_path: Path, chunk_ms: str
) -> None:
    samples, server = noise(1234), serving()
    told = replay_csv(server, write_csv(tmp_path, samples), "--chunk-ms", chunk_ms)
    with Client(server.address) as client:
        stream = client.open("bed", "tiny", rate_hz=100, unit="mV")
        for part in np.array_split(samples, 9):
            stream.send(part)
        stream.flush()
        stream.close()
        expected = [as_json(message) for message in client.events()]
    *results, closed, summary = told
    lives = {result.pop("life") for result in results}
    assert len(lives) == 1
    assert lives.isdisjoint({message.pop("life") for message in expected[:-1]})
    assert results == expected[:-1]
    assert (closed["type"], closed["samples"]) == ("closed", 1234)
    assert summary["results"] == {"scores": 2 * -(-1234 // HOP)} == {"scores": len(results)}


def as_json(message: Message) -> Any:
    return json.loads(msgspec.json.encode(message))


def test_the_summary_says_what_became_of_the_chunks(serving: Serving, tmp_path: Path) -> None:
    told = replay_csv(serving(), write_csv(tmp_path, noise(1000)), "--seconds", "4.2")
    summary = told[-1]
    assert summary["type"] == "summary"
    assert (summary["chunks"], summary["acknowledged"]) == (9, 9)
    assert (summary["samples"], summary["missing_samples"]) == (420, 0)
    assert (summary["errors"], summary["closed"]) == ([], "closed")
    assert summary["results"] == {"scores": 2 * 420 // HOP}
    assert summary["latency"]["results"] == 2 * 420 // HOP
    assert 0 < summary["latency"]["p50_ms"] <= summary["latency"]["p99_ms"] < 10_000


def test_missing_samples_are_a_gap_that_is_told(
    serving: Serving, tiny_path: Path, tmp_path: Path
) -> None:
    """Also at the very beginning, and longer than all credit."""
    samples = noise(6000)
    for start, end in ((0, 7), (333, 5000), (5500, 5501)):
        samples[start:end] = np.nan
    told = replay_csv(serving("--limit", "bridge_s=0"), write_csv(tmp_path, samples))
    # Samples before a gap that fill no hop are lost with it.
    gaps = [(one["start"], one["end"]) for one in told if one["type"] == "gap"]
    assert gaps == [(0, 7), (327, 5000), (5500, 5501)]
    assert told[-1]["missing_samples"] == 7 + (5000 - 333) + 1
    wanted, indices = [], []
    for start, end in ((7, 327), (5000, 5500), (5501, 6000)):
        part = plain.tail_padded(samples[start:end], HOP)
        wanted += [one["beat"] for one in plain.loop(tiny_path, plain.cut(part, HOP, HOP))]
        indices += [min(end, index) for index in range(start + HOP, start + len(part) + 1, HOP)]
    found = scores(told)
    assert [one["index"] for one in found] == indices
    values = [np.frombuffer(base64.b64decode(one["data"]), "<f4") for one in found]
    np.testing.assert_array_equal(values, wanted)


def test_several_leads_go_to_a_model_of_several(serving: Serving, tmp_path: Path) -> None:
    """Both, and one of them to a model that takes as few."""
    path = tiny.write_two_leads(tmp_path)
    samples = np.stack([noise(1000), noise(1000, 1)], axis=1)
    table = tmp_path / "both.csv"
    rows = [",".join(map(repr, map(float, row))) for row in samples]
    table.write_text("II,V5\n" + "\n".join(rows) + "\n")
    server = serving(model=path)
    for given in (["--channel", "II", "--channel", "V5"], ["--column", "II"]):
        options = ["--model", "two", "--subject", "k3v9x7q2", "--device", "Holter 3", *given]
        told = replay_csv(server, str(table), *options)
        alone = samples if len(given) == 4 else np.stack([samples[:, 0], np.zeros(1000)], axis=1)
        hops = np.float32(alone).reshape(-1, HOP, 2)
        expected = plain.loop(path, hops)
        values = [np.frombuffer(base64.b64decode(one["data"]), "<f4") for one in scores(told)]
        np.testing.assert_array_equal(values, [one["beat"] for one in expected])


def test_a_replay_keeps_to_its_speed(serving: Serving) -> None:
    recording = Recording("r", "c", noise(400), 100.0, "mV")
    with Client(serving().address) as client:
        stream = client.open("r", "tiny", rate_hz=100, unit="mV")
        summary = replay.play(client, stream, recording, lambda _: None, speed=8.0)
    assert 4.0 / 8.0 <= summary.wall_s < 3.0


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("--model", "huge", r"expected one of ['tiny'], found 'huge'"),
        ("--unit", "kPa", "expected mV or a multiple of it, found 'kPa'"),
        ("--stream", "bed 7", "stream 'bed 7'"),
        ("--channel", "II", "expected one of ['0'] or 0 to 0, found 'II'"),
    ],
)
def test_what_the_server_does_not_take_ends_with_its_reason(
    serving: Serving, tmp_path: Path, option: str, value: str, reason: str
) -> None:
    options = {"--rate": "100", "--unit": "mV", "--model": "tiny"} | {option: value}
    path = write_csv(tmp_path, noise(10))
    flat = [part for pair in options.items() for part in pair]
    done = murmur("replay", path, "--address", serving().address, *flat)
    assert done.returncode == 1
    assert reason in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [["replay", "PATH", "--rate", "9", "--unit", "V"], ["watch"]])
def test_no_server_is_a_clear_error(tmp_path: Path, command: list[str]) -> None:
    path = write_csv(tmp_path, noise(10))
    command = [path if part == "PATH" else part for part in command]
    done = murmur(*command, "--address", "tcp://127.0.0.1:9", "--timeout", "0.2")
    assert done.returncode == 1
    assert "tcp://127.0.0.1:9" in done.stderr
    assert "Traceback" not in done.stderr


class Stub:
    """A client and its stream: each chunk's beat comes 7 ms after the chunk was handed over."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.index = self.acked_index = 0
        self.waiting: list[Message] = []

    def skip(self, samples: int) -> None:
        self.index += samples

    def send(self, samples: NDArray[np.float32]) -> None:
        # Decided by the chunk's first, its middle and its last sample.
        places = {1, len(samples) // 2, len(samples)}
        self.waiting += [beat(self.index + place) for place in sorted(places)]
        self.index += len(samples)
        self.clock.now += 0.007

    def flush(self) -> None:
        self.waiting.append(beat(self.index + 40))  # in the tail: no chunk decided it

    def close(self) -> m.Closed:
        return m.Closed("s", "closed", 0, 0, 0, 0, 0)

    def events(self, timeout_s: float = 0.0) -> Iterator[Message]:
        self.clock.now += timeout_s
        while self.waiting:
            yield self.waiting.pop(0)


def beat(decided_at: int) -> m.Beat:
    return m.Beat("s", 0, 0.0, "N", 1.0, decided_at, None)


def test_latency_counts_from_the_chunk_that_holds_the_deciding_sample(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    monkeypatch.setattr(replay.time, "monotonic", clock)
    samples = noise(1000)
    samples[230:480] = np.nan
    stub = Stub(clock)
    recording = Recording("r", "c", samples, 100.0, "mV")
    summary = replay.play(stub, stub, recording, lambda _: None)  # type: ignore[arg-type]
    assert summary.latency is not None
    assert summary.latency.results == 3 * summary.chunks == 3 * (5 + 11)
    assert summary.latency.p50_ms == pytest.approx(7.0)
    assert summary.latency.max_ms == pytest.approx(7.0)
    assert (summary.acknowledged, summary.results) == (0, {"beat": 3 * 16 + 1})


class Ear:
    """A client that keeps what its stream says."""

    def __init__(self) -> None:
        self.told: list[Message] = []
        self.last_error = ""
        self.max_chunk_bytes = 1000

    def tell(self, message: Message) -> None:
        self.told.append(message)

    def wait(self, condition: Callable[[], bool]) -> None:
        assert condition(), "a real client would wait"


def test_what_is_skipped_survives_a_resume_and_takes_no_credit() -> None:
    ear = Ear()
    stream = client_module.Stream(ear, m.Open("s", "tiny", 100.0, "mV", index=10))  # type: ignore[arg-type]
    stream.opened(m.Opened("s", "tiny", "", 80, 0.0, 0.2))
    stream.send(np.zeros(20))
    stream.acked(m.Ack("s", 0, 30))
    stream.skip(1000)
    for _ in range(4):
        stream.send(np.zeros(20))  # all the credit, which the skipped samples left alone
    ear.told.clear()
    stream.resume()
    again = stream.begin_anew()
    assert isinstance(again[0], m.Open)
    assert again[0].index == 30  # so that the gap is told once more
    chunks = [(one.seq, one.index, len(one.data)) for one in again if isinstance(one, m.Chunk)]
    assert chunks == [(seq, 1030 + 20 * seq, 80) for seq in range(4)]
    stream.opened(m.Opened("s", "tiny", "", 80, 0.0, 0.2))
    stream.acked(m.Ack("s", 1, 1070))
    stream.skip(5)
    stream.send(np.zeros(20))
    stream.send(np.zeros(20))
    with pytest.raises(AssertionError, match="would wait"):
        stream.send(np.zeros(1))
    assert [(one.seq, one.index) for one in ear.told if isinstance(one, m.Chunk)] == [
        (4, 1115),
        (5, 1135),
    ]
    assert stream.acked_index == 1070
    with pytest.raises(ValueError, match="expected 0 or more, found -1"):
        stream.skip(-1)


class Watching:
    """``murmur watch`` in a process of its own."""

    def __init__(self, server: Server, *options: str) -> None:
        command = [sys.executable, "-m", "engine", "watch", *options]
        command += ["--address", server.endpoints["publish"]]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stderr is not None
        assert "watching" in self.process.stderr.readline()

    def lines(self) -> list[str]:
        out, error = self.process.communicate(timeout=30)
        assert (self.process.returncode, error) == (0, "")
        return out.splitlines()


def test_watch_prints_what_is_published_of_a_stream(serving: Serving) -> None:
    server = serving()
    watching = Watching(server, "--json", "--stream", "bed-1", "--count", "20")
    with Client(server.address) as client:
        streams = [client.open(name, "tiny", 100.0, "mV") for name in ("bed-10", "bed-1")]
        for seed, stream in enumerate(streams):
            stream.send(noise(10 * HOP, seed))
            stream.flush()
        told = [as_json(one) for one in client.events() if one.stream == "bed-1"]  # type: ignore[attr-defined]
    assert len(told) == 20
    assert [json.loads(line) for line in watching.lines()] == told


def test_watch_ends_at_its_time_and_at_ctrl_c(serving: Serving) -> None:
    server = serving()
    assert Watching(server, "--seconds", "0.2").lines() == []
    interrupted = Watching(server)
    interrupted.process.send_signal(signal.SIGINT)
    assert interrupted.lines() == []


def test_sound_is_replayed_to_a_model_of_speech(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(tmp_path / "said.wav", say("one", "two", "-", "three"), 16_000)
    with tone_server() as tones:
        path = str(tmp_path / "said.wav")
        done = murmur("replay", path, "--address", tones.address, "--speed", "8", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    *results, _, summary = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["text"] for one in results if one["type"] == "final"] == ["One two.", "Three."]
    assert tones.opened[0].model == "english"
    assert summary["results"] == {"partial": 3, "final": 2}
    assert summary["latency"]["results"] == 4  # the last final was the flush's


WORDS = (m.Word("Hello,", 1.5, 1.9, 0.9), m.Word("world.", 2.0, 2.4, 0.8))


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (m.Partial("mic", 3, "hello wor", 999, 1), "            mic  partial hello wor"),
        (
            m.Final("mic", 3, "Hello, world.", 9, 99, 999, "silence", WORDS),
            "     1.50 s mic  final   Hello, world.",
        ),
        (m.Final("mic", 3, "", 9, 99, 999, "silence", ()), "            mic  final   "),
    ],
)
def test_what_is_said_is_a_line(message: Message, line: str) -> None:
    assert watching_module.line(message) == line
