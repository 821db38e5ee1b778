"""Models that others made, through a TOML file: the engine gives what their own loops give.

The loops are written as their authors publish them, one stream, one window after the other, with
ONNX Runtime and NumPy alone.
"""

import csv
import importlib.util
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import soundfile
from numpy.typing import NDArray
from typer.testing import CliRunner

from engine import messages, model_file
from engine.cli import app
from engine.client import Client
from tests.conftest import Server
from tests.drive import Driven, chunks

ROOT = Path(__file__).parents[1]
SHARED = ROOT / "../shared/data"
SPEECH = SHARED / "speech/librispeech"
DTLN = SHARED / "models/dtln"
RATE_HZ = 16_000
SECONDS = 4

Signal = NDArray[np.float32]

needs_silero = pytest.mark.skipif(
    importlib.util.find_spec("silero_vad") is None,
    reason="needs the wheel: pip install --no-deps silero-vad",
)
needs_dtln = pytest.mark.skipif(not DTLN.is_dir(), reason=f"no models at {DTLN}")


def read_aloud() -> list[Signal]:
    """Return the beginnings of some recordings, each of another reader."""
    with (SPEECH / "manifest.tsv").open() as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if float(row["seconds"]) > 5]
    heard = [soundfile.read(SPEECH / row["path"], dtype="float32")[0] for row in rows[:5]]
    return [one[: SECONDS * RATE_HZ] for one in heard]


def made_up() -> list[Signal]:
    """Return syllables of a gliding voice with overtones, pauses between, over faint noise."""
    voices = []
    time = np.arange(SECONDS * RATE_HZ) / RATE_HZ
    for number in range(5):
        rng = np.random.default_rng(number)
        pitch = 100 + 25 * number + 15 * np.sin(2 * np.pi * 0.7 * time)
        phase = 2 * np.pi * np.cumsum(pitch) / RATE_HZ
        voice = sum(np.sin(k * phase) / k for k in range(1, 20))
        syllables = np.clip(np.sin(2 * np.pi * (2 + 0.3 * number) * time), 0, 1)
        words = np.sin(2 * np.pi * 0.4 * time + number) > -0.3
        noise = rng.normal(0, 0.003, len(time))
        voices.append((0.1 * voice * syllables * words + noise).astype(np.float32))
    return voices


@pytest.fixture(scope="module")
def voices() -> list[Signal]:
    """Five streams of speech at 16 kHz, none of whole windows, none as long as another."""
    found = read_aloud() if SPEECH.is_dir() else made_up()
    return [one[: len(one) - 777 * number] for number, one in enumerate(found, start=1)]


def through_the_engine(
    file: Path | str, voices: list[Signal]
) -> tuple[Driven, list[list[messages.Message]]]:
    """Stream all voices side by side in chunks of random length; what each stream was told."""
    path = model_file.find(file)
    name = model_file.load(path).spec.name
    driven = Driven(path)
    rng = np.random.default_rng(5)
    cuts = [np.sort(rng.integers(0, len(v), len(v) // 2000)).tolist() for v in voices]
    waiting = []
    for number, (voice, cut) in enumerate(zip(voices, cuts, strict=True)):
        driven.open("peer", f"s{number}", name, rate_hz=RATE_HZ, unit="1")
        waiting.append(chunks(f"s{number}", voice, cut))
    while any(waiting):
        for queue in waiting:
            if queue:
                driven.say("peer", queue.pop(0))
        driven.run()
    for number in range(len(voices)):
        driven.say("peer", messages.Flush(f"s{number}", 1))
    driven.run()
    assert not driven.told("peer", messages.Error)
    told = driven.heard("peer")
    streams = [f"s{number}" for number in range(len(voices))]
    return driven, [[m for m in told if getattr(m, "stream", "") == s] for s in streams]


# Silero VAD


def speech_by_silero(voice: Signal) -> Signal:
    """Return the chance of speech in each whole window, as OnnxWrapper of the wheel does."""
    found = importlib.util.find_spec("silero_vad")
    assert found is not None
    assert found.submodule_search_locations is not None
    path = Path(found.submodule_search_locations[0]) / "data/silero_vad.onnx"
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    state = np.zeros((2, 1, 128), np.float32)
    context = np.zeros((1, 64), np.float32)
    said = []
    for start in range(0, len(voice) - 511, 512):
        x = np.concatenate([context, voice[None, start : start + 512]], axis=1)
        feed = {"input": x, "state": state, "sr": np.array(RATE_HZ, np.int64)}
        out, state = session.run(None, feed)
        context = x[:, -64:]
        said.append(out[0, 0])
    return np.array(said)


def scores(told: list[messages.Message], windows: int) -> Signal:
    """Return the values of the whole windows; one more, of the tail, came at the flush."""
    found = [m for m in told if isinstance(m, messages.Scores)]
    assert len(found) == windows + 1
    assert [m.index for m in found[:-1]] == [512 * (k + 1) for k in range(windows)]
    return np.concatenate([np.frombuffer(m.data, np.float32) for m in found[:-1]])


@needs_silero
def test_silero_in_batches_is_silero_by_its_own_loop_bit_for_bit(voices: list[Signal]) -> None:
    driven, told = through_the_engine("silero-vad", voices)
    for voice, heard in zip(voices, told, strict=True):
        expected = speech_by_silero(voice)
        np.testing.assert_array_equal(scores(heard, len(expected)), expected)
    (runs,) = driven.metrics.runs.values()
    assert max(rows for rows, _ in runs) == len(voices)


@needs_silero
def test_silero_hears_speech_and_pauses(voices: list[Signal]) -> None:
    """A wrong rate or a lost context would still be equal to a loop with the same fault."""
    if not SPEECH.is_dir():
        pytest.skip(f"no speech at {SPEECH}")
    said = speech_by_silero(voices[0])
    assert said.max() > 0.95
    assert said.min() < 0.1


@needs_silero
def test_silero_behind_a_real_server_is_silero_by_its_own_loop(
    serving: Callable[..., Server], voices: list[Signal]
) -> None:
    server = serving(model="silero-vad")
    values = defaultdict(list)
    with Client(server.address) as client:
        streams = [client.open(f"s{n}", "silero-vad", RATE_HZ, "1") for n in range(2)]
        length = min(len(voices[0]), len(voices[1])) // 512 * 512
        for start in range(0, length, 3000):
            for stream, voice in zip(streams, voices, strict=False):
                stream.send(voice[start : min(start + 3000, length)])
        for stream in streams:
            stream.flush()
        for event in client.events():
            assert isinstance(event, messages.Scores), event
            values[event.stream].append(np.frombuffer(event.data, np.float32))
    for number in range(2):
        expected = speech_by_silero(voices[number][:length])
        np.testing.assert_array_equal(np.concatenate(values[f"s{number}"]), expected)
    assert server.stop() == 0


@needs_silero
def test_the_check_of_silero_passes_in_batches() -> None:
    result = CliRunner().invoke(app, ["models", "check", "silero-vad"])
    assert result.exit_code == 0, result.output
    assert "in batches of 64" in result.output


# DTLN


@pytest.fixture
def dtln(tmp_path: Path) -> Path:
    """The statement of this repository beside the authors' files."""
    for number in (1, 2):
        (tmp_path / f"model_{number}.onnx").symlink_to((DTLN / f"model_{number}.onnx").resolve())
    return Path(shutil.copy(ROOT / "deploy/models/dtln.toml", tmp_path))


def denoised_by_dtln(voice: Signal) -> Signal:
    """Return what real_time_processing_onnx.py of breizhn/DTLN writes, 384 samples late."""
    first, second = (
        ort.InferenceSession(DTLN / f"model_{number}.onnx", providers=["CPUExecutionProvider"])
        for number in (1, 2)
    )
    names = [[node.name for node in session.get_inputs()] for session in (first, second)]
    feeds = [
        {node.name: np.zeros(node.shape, np.float32) for node in session.get_inputs()}
        for session in (first, second)
    ]
    in_buffer, out_buffer = np.zeros(512, np.float32), np.zeros(512, np.float32)
    out = np.zeros(len(voice) // 128 * 128, np.float32)
    for start in range(0, len(out), 128):
        in_buffer[:-128] = in_buffer[128:]
        in_buffer[-128:] = voice[start : start + 128]
        spectrum = np.fft.rfft(in_buffer)
        phase = np.angle(spectrum)
        magnitude = np.reshape(np.abs(spectrum), (1, 1, -1)).astype("float32")
        feeds[0][names[0][0]] = magnitude
        mask, feeds[0][names[0][1]] = first.run(None, feeds[0])
        block = np.fft.irfft(magnitude * mask * np.exp(1j * phase))
        feeds[1][names[1][0]] = np.reshape(block, (1, 1, -1)).astype("float32")
        cleaned, feeds[1][names[1][1]] = second.run(None, feeds[1])
        out_buffer[:-128] = out_buffer[128:]
        out_buffer[-128:] = np.zeros(128)
        out_buffer += np.squeeze(cleaned)
        out[start : start + 128] = out_buffer[:128]
    return out


@needs_dtln
def test_dtln_is_dtln_by_its_own_loop_bit_for_bit(dtln: Path, voices: list[Signal]) -> None:
    voices = [voice[: 2 * RATE_HZ - 50 * number] for number, voice in enumerate(voices[:3])]
    driven, told = through_the_engine(dtln, voices)
    for voice, heard in zip(voices, told, strict=True):
        parts = [m for m in heard if isinstance(m, messages.Samples)]
        found = np.concatenate([np.frombuffer(m.data, np.float32) for m in parts])
        assert parts[0].index == 0
        assert len(found) == len(voice)  # the last of them by the flush
        expected = denoised_by_dtln(voice)[384:]
        np.testing.assert_array_equal(found[: len(expected)], expected)
        assert np.abs(expected).max() > 0.01
    (runs,) = driven.metrics.runs.values()
    assert set(runs) == {(1, 1)}


@needs_dtln
def test_the_check_of_dtln_passes_and_says_that_it_is_stepped_row_by_row(dtln: Path) -> None:
    result = CliRunner().invoke(app, ["models", "check", str(dtln)])
    assert result.exit_code == 0, result.output
    assert "stepped row by row" in result.output
