"""Recordings become text and subtitles that players can read, as a newcomer runs the command."""

import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from engine import demo, spoken, transcribe
from engine.errors import MurmurError
from engine.messages import Word
from engine.scoring import errors
from engine.transcribe import Transcript, Utterance
from tests.tones import ToneServer, say, tone_server, write_model

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tones() -> Iterator[ToneServer]:
    with tone_server() as server:
        yield server


def murmur(tones: ToneServer, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "engine", "transcribe", "--connect", tones.address]
    return subprocess.run(
        [*command, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def write(folder: Path, name: str, *words: str, rate_hz: int = 16_000) -> Path:
    path = folder / name
    soundfile.write(path, say(*words, rate_hz=rate_hz), rate_hz)
    return path


# --- the command -----------------------------------------------------------------------------


def test_the_text_is_on_standard_output_and_nothing_else(tones: ToneServer, tmp_path: Path) -> None:
    path = write(tmp_path, "a.flac", "one", "two", "-", "three")
    done = murmur(tones, path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "One two.\nThree.\n", "")


def test_several_files_are_told_in_their_order_and_a_bad_one_by_its_name(
    tones: ToneServer, tmp_path: Path
) -> None:
    long = write(tmp_path, "long.wav", *["four"] * 40)
    short = write(tmp_path, "short.ogg", "zero", rate_hz=8000)
    empty = tmp_path / "empty.wav"
    empty.touch()
    done = murmur(tones, long, empty, short)
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        f"==> {long} <==",
        "Four" + " four" * 39 + ".",
        f"==> {empty} <==",
        "",
        f"==> {short} <==",
        "Zero.",
    ]
    assert f"{empty}: the file is empty (0 bytes)" in done.stderr
    assert f"{short}: 8000 Hz, so nothing above 4000 Hz is in it" in done.stderr


def test_json_tells_words_with_their_times_and_the_real_time_factor(
    tones: ToneServer, tmp_path: Path
) -> None:
    path = write(tmp_path, "a.wav", "one", "two", "-", "three", rate_hz=44_100)
    done = murmur(tones, path, "--json", "--hotword", "zero=3.5", "--hotword", "a=b c=1")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["figure"] == pytest.approx(report["wall_s"] / report["audio_s"])
    assert report["audio_s"] == pytest.approx(2.5)
    (file,) = report["files"]
    assert (file["text"], file["rate_hz"], file["channels"]) == ("One two. Three.", 44_100, 1)
    words = [word for one in file["utterances"] for word in one["words"]]
    assert [word["text"] for word in words] == ["one", "two", "three"]
    assert [word["end_s"] for word in words] == pytest.approx([0.4, 0.9, 2.4])
    assert [one["reason"] for one in file["utterances"]] == ["silence", "flush"]
    asked = tones.opened[-1].speech
    assert [(one.phrase, one.boost) for one in asked.hotwords] == [("zero", 3.5), ("a=b c", 1.0)]


def test_subtitles_of_several_files_go_to_a_folder(tones: ToneServer, tmp_path: Path) -> None:
    paths = [write(tmp_path, "a.wav", "one", "-", "two"), write(tmp_path, "b.wav", "three")]
    assert "--out FOLDER" in murmur(tones, "--srt", *paths).stderr
    done = murmur(tones, "--srt", "--out", tmp_path / "texts", *paths)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "texts" / "a.srt").read_text() == (
        "1\n00:00:00,100 --> 00:00:00,400\none\n\n2\n00:00:01,600 --> 00:00:01,900\ntwo\n"
    )
    assert (tmp_path / "texts" / "b.srt").read_text().endswith("\nthree\n")


def test_one_file_goes_to_the_file_that_is_named(tones: ToneServer, tmp_path: Path) -> None:
    path = write(tmp_path, "a.wav", "one")
    done = murmur(tones, path, "--vtt", "--out", tmp_path / "x.vtt", "--json")
    assert json.loads(done.stdout)["files"][0]["text"] == "One."
    assert (tmp_path / "x.vtt").read_text() == ("WEBVTT\n\n00:00:00.100 --> 00:00:00.400\none\n")


def test_without_a_server_one_is_started(tmp_path: Path) -> None:
    path = write(tmp_path, "a.wav", "one", "two", "-", "three")
    command = [sys.executable, "-m", "engine", "transcribe", str(path)]
    command += ["--model", str(write_model(tmp_path))]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "one two\nthree\n", "")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--srt", "--vtt"], "expected one of them"),
        (["--hotword", "x=much"], "--hotword 'x=much'"),
        (["--hotword", "x=99"], "--hotword 'x=99'"),
    ],
)
def test_options_that_make_no_sense_are_told(
    tones: ToneServer, tmp_path: Path, options: list[str], said: str
) -> None:
    done = murmur(tones, write(tmp_path, "a.wav", "one"), *options)
    assert done.returncode == 2
    assert said in re.sub(r"[\s\u2502]+", " ", done.stderr)


def test_what_is_worth_knowing_of_a_recording_is_said(tones: ToneServer, tmp_path: Path) -> None:
    sound = np.clip(3 * say("one", "two"), -1, 1)
    soundfile.write(tmp_path / "loud.wav", np.stack([sound, sound], 1), 16_000)
    soundfile.write(tmp_path / "still.wav", np.zeros(16_000), 16_000)
    done = murmur(tones, tmp_path / "loud.wav", tmp_path / "still.wav")
    assert done.returncode == 0
    assert "loud.wav: 2 channels, mixed down to one" in done.stderr
    assert re.search(r"loud.wav: \d+\.\d% of the samples are clipped", done.stderr)
    assert "still.wav: no speech was found in it" in done.stderr


def test_no_server_is_a_clear_error(tmp_path: Path) -> None:
    path = write(tmp_path, "a.wav", "one")
    command = [sys.executable, "-m", "engine", "transcribe", str(path), "--timeout", "0.2"]
    done = subprocess.run(
        [*command, "--connect", "tcp://127.0.0.1:9"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert re.fullmatch(r"murmur: no answer from tcp://127\.0\.0\.1:9 for [01] s\n", done.stderr)


def test_on_a_terminal_there_is_a_bar_and_it_goes_away(tones: ToneServer, tmp_path: Path) -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=80)
    told: list[str] = []
    path = write(tmp_path, "a.wav", *["one"] * 30)
    outcome = transcribe.run(
        [path, path],
        transcribe.Plan(),
        transcribe.Printing(),
        console,
        told.append,
        tones.address,
    )
    assert "x real time" in text.getvalue()
    assert "listening" in text.getvalue()
    assert told == ["One" + " one" * 29 + ".\n"]
    assert len(outcome.transcripts) == 1  # the same file twice is one


TWO_CITIES = """It was the best of times, it was the worst of times, it was the age of wisdom, it
was the age of foolishness, it was the epoch of belief, it was the epoch of incredulity, it was
the season of Light, it was the season of Darkness, it was the spring of hope, it was the winter
of despair, we had everything before us, we had nothing before us, we were all going direct to
Heaven, we were all going direct the other way - in short, the period was so far like the present
period, that some of its noisiest authorities insisted on its being received, for good or for
evil, in the superlative degree of comparison only."""


def test_a_human_voice_is_understood_and_timed() -> None:
    try:
        path = demo.find_voice()
    except MurmurError as error:
        pytest.skip(f"needs a voice and the model english: {error}")
    command = [sys.executable, "-m", "engine", "transcribe", str(path), "--json"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    (file,) = report["files"]
    assert errors(spoken.words(TWO_CITIES), spoken.words(file["text"])).rate < 0.05
    words = [word for one in file["utterances"] for word in one["words"]]
    assert [word["text"] for word in words] == file["text"].split()
    times = [time for word in words for time in (word["start_s"], word["end_s"])]
    assert times == sorted(times)
    assert times[0] > 0
    assert times[-1] < file["seconds"]
    assert all(0 < word["confidence"] <= 1 for word in words)


# --- subtitles -------------------------------------------------------------------------------


def utterance(*words: Word) -> Utterance:
    text = " ".join(word.text for word in words)
    return Utterance(text, words[0].start_s, words[-1].end_s, "silence", words, ())


def transcript(*utterances: Utterance) -> Transcript:
    return Transcript("a.wav", 100.0, 16_000.0, 1, "", utterances)


@st.composite
def speech(draw: st.DrawFn) -> list[Word]:
    words, now = [], 0.0
    for _ in range(draw(st.integers(1, 60))):
        start = now + draw(st.sampled_from([0.0, 0.05, 0.4, 1.5]))
        now = start + draw(st.floats(0.05, 1.0))
        text = draw(st.sampled_from(["a", "word.", "another", "incomprehensibilities?", "<&>"]))
        words.append(Word(text, start, now, 1.0))
    return words


@given(speech())
def test_subtitles_hold_every_word_once_and_fit_the_screen(words: list[Word]) -> None:
    cues = transcribe.cues([utterance(*words)])
    assert " ".join(cue.text for cue in cues) == " ".join(word.text for word in words)
    for cue in cues:
        assert cue.start_s < cue.end_s
        assert cue.end_s - cue.start_s <= 6.0 or " " not in cue.text
        assert len(cue.text) <= 84
    assert all(one.end_s <= other.start_s for one, other in pairwise(cues))


def test_lines_are_wrapped_and_signs_of_markup_escaped() -> None:
    words = [Word(text, k * 0.3, k * 0.3 + 0.2, 1.0) for k, text in enumerate(["a<b", "&", "c>d"])]
    words += [Word("abcdefghi", 1.0 + k * 0.3, 1.2 + k * 0.3, 1.0) for k in range(5)]
    made = transcript(utterance(*words))
    assert "a&lt;b &amp; c&gt;d abcdefghi" in transcribe.as_vtt(made)
    srt = transcribe.as_srt(made)
    assert "a<b & c>d abcdefghi" in srt
    assert max(map(len, srt.splitlines())) <= 42


def test_times_are_hours_minutes_seconds_milliseconds() -> None:
    made = transcript(utterance(Word("late", 3725.9996, 3726.5, 1.0)))
    assert "01:02:06,000 --> 01:02:06,500" in transcribe.as_srt(made)
    assert "01:02:06.000 --> 01:02:06.500" in transcribe.as_vtt(made)


def test_an_utterance_without_words_is_a_subtitle_as_a_whole() -> None:
    made = transcript(Utterance("hello", 1.0, 2.0, "silence", (), ()))
    assert transcribe.as_srt(made) == "1\n00:00:01,000 --> 00:00:02,000\nhello\n"
    assert transcribe.as_srt(transcript()) == ""


def test_two_texts_are_not_written_to_one_file(tmp_path: Path) -> None:
    with pytest.raises(MurmurError, match="the same name but for a suffix"):
        transcribe.targets([Path("a.wav"), Path("b/a.mp3")], tmp_path, "srt")
    (tmp_path / "file").touch()
    with pytest.raises(MurmurError, match="expected a folder for 2 files, found a file"):
        transcribe.targets([Path("a.wav"), Path("b.wav")], tmp_path / "file", "srt")
