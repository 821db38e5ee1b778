"""Sound that is not as it should be has a clear outcome, through the real engine.

Its model hears tones as words, so that what should be told is known to the sample.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import soundfile
import zmq
from numpy.typing import NDArray
from rich.console import Console
from scipy import signal

from engine import audio, corpus
from engine import messages as m
from engine.child import ServerProcess
from engine.client import Client, Stream
from engine.dictation import Plan
from engine.errors import Refused
from engine.scoring import errors
from engine.transcribe import Printing, Transcript, run
from tests import tones
from tests.tones import RATE_HZ, say

Sound = NDArray[np.float32]
COMMANDS = Path(__file__).parent.parent.parent / "shared" / "data" / "speech" / "commands"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("models")
    models = [str(tones.write_model(folder, frames)) for frames in (2, 20)]
    started = ServerProcess(models, {"max_load": 1e9})
    yield started
    assert started.stop() == 0


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.address, timeout_s=30.0) as made:
        yield made


def opened(client: Client, name: str = "s", rate_hz: float = RATE_HZ) -> Stream:
    return client.open(name, "tones2", rate_hz, "1")


def finals(client: Client, name: str = "s") -> list[m.Final]:
    events = list(client.events())
    return [one for one in events if isinstance(one, m.Final) and one.stream == name]


def text(told: list[m.Final]) -> list[str]:
    return [word.text for final in told for word in final.words]


def heard(client: Client, sound: Sound, rate_hz: float = RATE_HZ) -> list[m.Final]:
    """Return what is made of a whole stream."""
    stream = opened(client, rate_hz=rate_hz)
    stream.send(sound)
    stream.flush()
    told = finals(client)
    stream.close()
    return told


def test_sound_as_it_should_be_is_heard_to_the_sample(client: Client) -> None:
    told = heard(client, say("one", "two", "-", "three"))
    assert [final.text for final in told] == ["one two", "three"]
    assert [final.reason for final in told] == ["silence", "flush"]
    ends = [word.end_s for final in told for word in final.words]
    assert ends == pytest.approx([0.4, 0.9, 2.4])


@pytest.mark.parametrize("declared_hz", [8000.0, 32_000.0, 48_000.0, 11_025.0])
def test_a_wrong_rate_spoils_the_text_of_its_stream_only(
    client: Client, declared_hz: float
) -> None:
    sound = say("one", "two", "-", "three")
    wrong, right = opened(client, "wrong", declared_hz), opened(client, "right")
    for start in range(0, len(sound), 3000):
        wrong.send(sound[start : start + 3000])
        right.send(sound[start : start + 3000])
    for stream in (wrong, right):
        stream.flush()
    told = [one for one in client.events() if isinstance(one, m.Final)]
    assert text([one for one in told if one.stream == "right"]) == ["one", "two", "three"]
    spoilt = [one for one in told if one.stream == "wrong"]
    assert text(spoilt) != ["one", "two", "three"]
    # Its times are those of the rate that it declared.
    length_s = len(sound) / declared_hz
    assert all(word.end_s <= length_s + 0.1 for final in spoilt for word in final.words)
    assert (wrong.close().reason, right.close().reason) == ("closed", "closed")


@pytest.mark.parametrize("rate_hz", [1.0, 1e-3])
def test_a_rate_that_no_sound_has_is_refused(client: Client, rate_hz: float) -> None:
    with pytest.raises(Refused, match=r"rate: expected 16 to 1\.6e\+07 Hz") as caught:
        opened(client, rate_hz=rate_hz)
    assert caught.value.code == "bad_rate"


def test_clipped_sound_is_heard(client: Client) -> None:
    loud = np.clip(30 * say("one", "two", "-", "three"), -1, 1)
    assert text(heard(client, loud)) == ["one", "two", "three"]


def test_sound_beyond_full_scale_is_heard(client: Client) -> None:
    assert text(heard(client, 1000 * say("one", "two"))) == ["one", "two"]


def test_a_telephone_is_heard(client: Client) -> None:
    """Of 8 kHz, with nothing below 300 and above 3400 Hz, in steps of the mu-law."""
    band = signal.butter(4, [300, 3400], "bandpass", fs=8000, output="sos")
    sound = signal.sosfilt(band, say("one", "two", "three", rate_hz=8000))
    coded = np.sign(sound) * np.log1p(255 * np.abs(sound)) / np.log(256)
    steps = np.round(coded * 127) / 127
    decoded = np.sign(steps) * (256 ** np.abs(steps) - 1) / 255
    told = heard(client, decoded.astype(np.float32), 8000)
    assert text(told) == ["one", "two", "three"]
    ends = [word.end_s for final in told for word in final.words]
    assert ends == pytest.approx([0.4, 0.9, 1.4], abs=0.06)


@pytest.mark.parametrize("cut_s", [0.15, 0.3, 0.7])
def test_a_stream_that_is_flushed_in_mid_word_tells_the_word(client: Client, cut_s: float) -> None:
    told = heard(client, say("one", "two")[: round(cut_s * RATE_HZ)])
    assert text(told) == ["one", "two"][: 1 if cut_s < 0.5 else 2]
    assert [final.reason for final in told] == ["flush"]


def test_a_stream_that_is_closed_in_mid_word_ends_and_another_has_its_name(client: Client) -> None:
    stream = opened(client)
    stream.send(say("one", "two")[: round(0.7 * RATE_HZ)])
    assert stream.close().reason == "closed"
    assert text(heard(client, say("three"))) == ["three"]


def test_a_client_that_vanishes_in_mid_word_takes_no_other_along(
    client: Client, server: ServerProcess
) -> None:
    beside = opened(client)
    sound = say("one", "two", "three")
    beside.send(sound[:5000])
    with zmq.Context() as context, context.socket(zmq.DEALER) as gone:
        gone.connect(server.address)
        requests = [
            m.Hello(m.VERSION),
            m.Open("gone", "tones2", float(RATE_HZ), "1"),
            m.Chunk("gone", 0, 0, say("four")[: round(0.3 * RATE_HZ)].tobytes()),
        ]
        gone.send(m.body([m.encode(request) for request in requests]))
        assert gone.poll(10_000)
        gone.close(linger=0)
    beside.send(sound[5000:])
    beside.flush()
    assert text(finals(client)) == ["one", "two", "three"]
    beside.close()


def test_samples_that_are_lost_in_mid_word_end_the_utterance(client: Client) -> None:
    """The second word begins at 0.6 s; the last step of 0.1 s is not looked at any more."""
    sound = say("one", "two", "-", "three")
    stream = opened(client)
    stream.send(sound[: round(0.8 * RATE_HZ)])
    stream.skip(round(1.3 * RATE_HZ))  # up to 2.1 s, where the third word begins
    stream.send(sound[round(2.1 * RATE_HZ) :])
    stream.flush()
    told = finals(client)
    assert [final.reason for final in told] == ["gap", "flush"]
    assert text(told) == ["one", "two", "three"]
    assert told[1].words[0].end_s == pytest.approx(2.4, abs=0.06)
    stream.close()


def test_an_hour_of_silence_says_nothing_and_takes_no_memory(
    client: Client, server: ServerProcess
) -> None:
    stream = client.open("s", "tones20", RATE_HZ, "1", dtype="i2", gain=2**-15)
    minute = np.zeros(60 * RATE_HZ, np.int16)
    stream.send(minute)
    before = server.counts().resident_bytes
    for _ in range(59):
        stream.send(minute)
    assert list(client.events()) == []
    stream.send(np.round(say("two") * 2**15).astype(np.int16))
    stream.flush()
    (final,) = finals(client)
    assert (final.text, final.words[0].end_s) == ("two", pytest.approx(3600.4))
    assert server.counts().resident_bytes - before < 4 * 2**20
    stream.close()


def test_speech_without_a_pause_is_cut_at_the_longest_utterance(client: Client) -> None:
    rng = np.random.default_rng(0)
    said = rng.choice(list(tones.PITCH), 200).tolist()  # 100 s
    told = heard(client, say(*said))
    assert len(told) >= 5
    assert {final.reason for final in told[:-1]} <= {"length", "silence"}
    assert text(told) == said  # and no word at a seam is lost or doubled


def test_silence_and_noise_of_no_pitch_say_nothing(client: Client) -> None:
    noise = np.random.default_rng(1).normal(0, 0.05, 20 * RATE_HZ).astype(np.float32)
    assert heard(client, noise) == []


# --- as files --------------------------------------------------------------------------------


def transcripts(server: ServerProcess, *paths: Path, model: str = "tones2") -> list[Transcript]:
    plan = Plan(model, streams=2)
    console = Console(quiet=True)
    quiet = Printing(text=False)
    return run(paths, plan, quiet, console, lambda _: None, server.address).transcripts


def test_each_bad_file_has_its_fault_and_the_good_one_its_text(
    server: ServerProcess, tmp_path: Path
) -> None:
    paths = [tmp_path / name for name in ("good.wav", "empty.wav", "text.wav", "nan.wav")]
    soundfile.write(paths[0], say("one"), RATE_HZ)
    paths[1].touch()
    paths[2].write_text("no sound")
    sound = say("one", "two")
    sound[12_000] = np.nan
    soundfile.write(paths[3], sound, RATE_HZ, subtype="FLOAT")
    good, empty, words, not_finite = transcripts(server, *paths)
    assert (good.text, good.faults) == ("one", ())
    assert "the file is empty" in empty.faults[0]
    assert "expected WAV" in words.faults[0]
    assert "not_finite" in not_finite.faults[0]


def test_a_file_of_any_rate_has_the_same_text_and_times(
    server: ServerProcess, tmp_path: Path
) -> None:
    rates = (8000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000)
    paths = [tmp_path / f"{rate_hz}.wav" for rate_hz in rates]
    for path, rate_hz in zip(paths, rates, strict=True):
        soundfile.write(path, say("one", "four", "-", "two", rate_hz=rate_hz), rate_hz)
    for one in transcripts(server, *paths):
        assert one.text == "one four two"
        ends = [word.end_s for part in one.utterances for word in part.words]
        assert ends == pytest.approx([0.4, 0.9, 2.4], abs=0.06)


def test_twenty_minutes_take_the_memory_of_one(server: ServerProcess, tmp_path: Path) -> None:
    path = tmp_path / "long.flac"
    said = ["one", "two", *"-" * 8, "three"]
    part = say(*said)
    with soundfile.SoundFile(path, "w", RATE_HZ, 1, "PCM_16") as file:
        for _ in range(round(1200 / (len(part) / RATE_HZ))):
            file.write(part)
    begin = time.monotonic()
    before = server.counts().resident_bytes
    (one,) = transcripts(server, path, model="tones20")
    assert server.counts().resident_bytes - before < 8 * 2**20
    repeats = round(one.seconds / (len(part) / RATE_HZ))
    assert one.text.split() == ["one", "two", "three"] * repeats
    assert time.monotonic() - begin < one.seconds / 10


# --- real words, by the model that comes with the package ------------------------------------


@pytest.fixture(scope="module")
def listener() -> Iterator[Client]:
    """A connection to a server of the bundled model of single words."""
    words = ServerProcess("words", {"max_load": 1e9})
    with Client(words.address, timeout_s=30.0) as made:
        yield made
    assert words.stop() == 0


class Said(NamedTuple):
    """Commands one after the other, with pauses between them."""

    sound: Sound
    words: list[str]


@pytest.fixture(scope="module")
def said() -> Said:
    """Sixty words of people whom the model was not trained on."""
    if not COMMANDS.is_dir():
        pytest.skip("needs ../shared/data/speech/commands")
    clips = corpus.read(COMMANDS, "valid", 60)
    parts: list[Sound] = []
    for clip in clips:
        with audio.Sound(clip.path) as file:
            parts += [*file.blocks(1.0), np.zeros(6000, np.float32)]
    sound = np.concatenate(parts)
    hiss = np.random.default_rng(0).normal(0, 1e-4, len(sound))
    return Said(((sound + hiss) / np.abs(sound).max()).astype(np.float32), [c.text for c in clips])


def error_rate(client: Client, said: Said, sound: Sound, rate_hz: float = RATE_HZ) -> float:
    with_words = client.open("s", "words", rate_hz, "1")
    with_words.send(sound)
    with_words.flush()
    told = text(finals(client))
    assert with_words.close().reason == "closed"
    return errors(said.words, told).rate


def test_real_words_are_heard_clipped_and_over_a_telephone(listener: Client, said: Said) -> None:
    """With a few errors more, and no fault."""
    clean = error_rate(listener, said, said.sound)
    assert clean < 0.15
    assert error_rate(listener, said, np.clip(8 * said.sound, -1, 1)) < clean + 0.15
    band = signal.butter(4, [300, 3400], "bandpass", fs=RATE_HZ, output="sos")
    telephone = signal.resample_poly(signal.sosfilt(band, said.sound), 1, 2)
    assert error_rate(listener, said, telephone, 8000) < clean + 0.15
    upwards = signal.resample_poly(said.sound, 441, 160)
    assert error_rate(listener, said, upwards, 44_100) < clean + 0.05


def test_music_is_no_fault_and_hardly_a_word(listener: Client) -> None:
    """A minute of major chords, two a second, each dying away."""
    rng = np.random.default_rng(3)
    time_s = np.arange(RATE_HZ // 2) / RATE_HZ
    chords = []
    for root in 220 * 2 ** (rng.integers(0, 13, 120) / 12):
        tones_hz = [h * root * 2 ** (step / 12) for step in (0, 4, 7) for h in (1, 2, 3)]
        chords.append(np.exp(-3 * time_s) * sum(np.sin(2 * np.pi * f * time_s) for f in tones_hz))
    music = 0.03 * np.concatenate(chords).astype(np.float32)
    stream = listener.open("s", "words", RATE_HZ, "1")
    stream.send(music)
    stream.flush()
    assert len(text(finals(listener))) <= 2
    assert stream.close().reason == "closed"
