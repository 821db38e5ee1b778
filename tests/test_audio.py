"""Sound of any rate and format is read block by block, and what is no sound is refused."""

import re
import sys
import tracemalloc
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from engine.audio import Sound
from engine.errors import MurmurError


def tone(seconds: float, rate_hz: int, hz: float = 440.0) -> NDArray[np.float32]:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate_hz)) / rate_hz)).astype(
        np.float32
    )


def whole(path: Path, seconds: float = 0.3) -> NDArray[np.float32]:
    with Sound(path) as sound:
        return np.concatenate(list(sound.blocks(seconds)))


@pytest.mark.parametrize("seconds", [0.001, 0.3, 7.0])
@pytest.mark.parametrize(
    ("name", "subtype", "atol"),
    [
        ("a.wav", "PCM_16", 2**-15),
        ("a.wav", "PCM_24", 2**-22),
        ("a.wav", "FLOAT", 0.0),
        ("a.wav", "ULAW", 0.02),
        ("a.flac", "PCM_16", 2**-15),
        ("a.ogg", "VORBIS", 0.05),
    ],
)
def test_any_block_length_reads_the_samples_that_were_written(
    tmp_path: Path, name: str, subtype: str, atol: float, seconds: float
) -> None:
    samples = tone(1.234, 8000)
    soundfile.write(tmp_path / name, samples, 8000, subtype=subtype)
    read = whole(tmp_path / name, seconds)
    assert read.dtype == np.float32
    np.testing.assert_allclose(read, samples, atol=atol)


@pytest.mark.parametrize(
    ("name", "rate_hz", "subtype"),
    [("a.mp3", 44100, "MPEG_LAYER_III"), ("a.opus", 48000, "OPUS"), ("a.opus", 16000, "OPUS")],
)
def test_a_lossy_file_holds_the_tone_that_was_written(
    tmp_path: Path, name: str, rate_hz: int, subtype: str
) -> None:
    kind = "OGG" if name.endswith("opus") else "MP3"
    soundfile.write(tmp_path / name, tone(2.0, rate_hz), rate_hz, format=kind, subtype=subtype)
    with Sound(tmp_path / name) as sound:
        assert (sound.rate_hz, sound.channels) == (rate_hz, 1)
        assert sound.seconds == pytest.approx(2.0, abs=0.1)
        read = np.concatenate(list(sound.blocks(0.25)))
    middle = read[rate_hz // 2 : rate_hz // 2 + rate_hz]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    assert np.argmax(spectrum) == 440  # bins of 1 Hz
    assert np.std(middle) == pytest.approx(0.5 / np.sqrt(2), rel=0.2)


def test_channels_are_mixed_to_their_mean(tmp_path: Path) -> None:
    left, right = tone(0.5, 16000), tone(0.5, 16000, 300.0)
    soundfile.write(tmp_path / "s.wav", np.stack([left, right], 1), 16000, subtype="FLOAT")
    with Sound(tmp_path / "s.wav") as sound:
        assert sound.channels == 2
        np.testing.assert_allclose(sound.read(8000), (left + right) / 2, atol=1e-7)


def test_clipped_samples_are_counted(tmp_path: Path) -> None:
    samples = tone(1.0, 16000)
    samples[100:130], samples[200:207] = 1.0, -1.0
    soundfile.write(tmp_path / "c.wav", samples, 16000, subtype="PCM_16")
    with Sound(tmp_path / "c.wav") as sound:
        list(sound.blocks(0.1))
        assert (sound.samples, sound.clipped) == (16000, 37)


def test_three_hours_take_the_memory_of_a_block(tmp_path: Path) -> None:
    path = tmp_path / "long.flac"
    minute = (1e-3 * np.random.default_rng(0).standard_normal(60 * 8000)).astype(np.float32)
    with soundfile.SoundFile(path, "w", 8000, 1, "PCM_16") as file:
        for _ in range(180):
            file.write(minute)
    tracemalloc.start()
    with Sound(path) as sound:
        assert sound.seconds == 3 * 3600
        count = sum(len(block) for block in sound.blocks(0.5))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 3 * 3600 * 8000
    assert peak < 2**22  # the whole would take 345 MB


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.wav", b"", "the file is empty (0 bytes)"),
        ("text.wav", b"this is no sound at all\n" * 20, "expected WAV, FLAC, Ogg"),
        ("bare.raw", b"\0" * 320, "expected WAV, FLAC, Ogg"),
        ("gone.wav", None, "there is no such file"),
    ],
)
def test_what_is_no_sound_is_refused_by_name(
    tmp_path: Path, name: str, content: bytes | None, said: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MurmurError, match=re.escape(str(path)) + ".*" + re.escape(said)):
        Sound(path)


def test_a_file_without_a_sample_is_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "none.wav", tone(0, 16000), 16000)
    with pytest.raises(MurmurError, match=r"no sound in it \(0 samples\)"):
        Sound(tmp_path / "none.wav")


@pytest.mark.parametrize("name", ["cut.wav", "cut.flac"])
def test_a_file_that_was_cut_off_gives_what_is_there(tmp_path: Path, name: str) -> None:
    """Of a WAV that is its end; a FLAC says that it is damaged."""
    path = tmp_path / name
    noise = np.random.default_rng(1).uniform(-0.5, 0.5, 160_000)
    soundfile.write(path, noise, 16000)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    blocks: list[NDArray[np.float32]] = []
    with Sound(path) as sound, ExitStack() as stack:
        if name == "cut.flac":
            stack.enter_context(pytest.raises(MurmurError, match=r"cut.flac: after \d"))
        while len(block := sound.read(1600)):
            blocks.append(block)
    read = np.concatenate(blocks)
    assert 0.4 < len(read) / 160_000 < 0.6
    np.testing.assert_allclose(read, noise[: len(read)], atol=2**-14)


def test_the_package_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(MurmurError, match=r"pip install 'murmur-engine\[speech\]'"):
        Sound(tmp_path / "a.wav")
