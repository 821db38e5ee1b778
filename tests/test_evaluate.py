"""Figures of speech are those of what was said, shown and when, as told over the sockets."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from engine import evaluate
from engine import messages as m
from engine.client import Client
from engine.corpus import Clip
from engine.dictation import Plan, Take, dictate
from tests.tones import ToneServer, say, tone_server, write_model

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tones() -> Iterator[ToneServer]:
    with tone_server() as server:
        yield server


def heard(tones: ToneServer, folder: Path, words: str, plan: Plan) -> Take:
    path = folder / f"{len(list(folder.iterdir()))}.wav"
    soundfile.write(path, say(*words.split()), 16_000)
    with Client(tones.address) as client:
        (take,) = dictate(client, [path], plan)
    assert isinstance(take, Take)
    return take


def clip(text: str, name: str = "a", speaker: str = "ann") -> Clip:
    return Clip(name, Path(name), speaker, text)


def test_a_recording_s_errors_are_those_of_all_its_finals(
    tones: ToneServer, tmp_path: Path
) -> None:
    take = heard(tones, tmp_path, "one two - three four", Plan())
    assert len(take.finals) == 2
    found = evaluate.score(clip("ONE TOO THREE -- 4 zero"), take)
    assert found.hypothesis == "One two. Three four."
    assert found.streaming == "one two three four"
    assert (found.words.substitutions, found.words.deletions, found.words.insertions) == (1, 1, 0)
    assert found.words == found.streaming_words
    # "one too three four zero" to "one two three four": w for o, and " zero" is missing.
    assert (found.letters.substitutions, found.letters.deletions) == (1, 5)
    assert (found.changes.shown, found.changes.changed) == (4, 0)
    assert found.audio_s == pytest.approx(3.0)


def test_all_recordings_together_and_each_speaker(tones: ToneServer, tmp_path: Path) -> None:
    take = heard(tones, tmp_path, "one two", Plan())
    clips = [
        clip("one two", "a", "ann"),
        clip("one two three four", "b", "ann"),
        clip("four", "c", "bob"),
        clip("", "noise", "-"),
    ]
    report = evaluate.accuracy([evaluate.score(one, take) for one in clips])
    # ann: 2 deletions of 6; bob: 1 substitution and 1 insertion of 1.
    assert report["figure"] == report["wer"] == pytest.approx(100 * 4 / 7)
    assert (report["words"], report["recordings"]) == (7, 3)
    assert (report["substitutions"], report["deletions"], report["insertions"]) == (1, 2, 1)
    assert [(one["speaker"], one["errors"]) for one in report["speakers"]] == [
        ("bob", 2),
        ("ann", 2),
    ]
    assert report["lone_words"] == {"clips": 1, "wrong": 1, "error": 100.0}
    assert report["noise"]["false_words"] == 2
    assert report["noise"]["per_hour"] == pytest.approx(2 / (1.0 / 3600))
    only_noise = evaluate.accuracy([evaluate.score(clips[3], take)])
    assert only_noise["figure"] == only_noise["noise"]["per_hour"]


def test_a_recording_that_is_not_heard_is_missing(tmp_path: Path) -> None:
    found = evaluate.unheard(clip("one two three"))
    assert (found.words.deletions, found.words.reference) == (3, 3)
    assert found.streaming_words == found.words


def test_lags_count_from_the_end_of_each_word(tones: ToneServer, tmp_path: Path) -> None:
    """Tones end at 0.4, 0.9 and 2.4 s; a frame more shows each, and a chunk of 0.1 s brings it."""
    plan = Plan(pace=1.0, chunk_s=0.1, silence_s=1.0)
    take = heard(tones, tmp_path, "one two - three", plan)
    found = evaluate.lags([(clip("one two nine"), take)])
    slack_s = 0.08
    assert len(found.shown) == len(found.final) == 2  # "three" is not right
    for lag in found.shown:
        assert 0.1 <= lag <= 0.1 + slack_s
    # The final of both comes after 0.8 s of silence.
    assert found.final == pytest.approx([0.5 + 0.8, 0.8], abs=slack_s)
    assert found.in_partial == found.shown
    assert len(found.endpoint) == 2
    assert all(0 <= lag < slack_s for lag in found.endpoint)
    assert found.flush == []
    # First shown at 0.5, 1.0 and 2.5 s; the ideal has a word each 2.5 s / 3.
    ideal = [0.0, 2.5 / 3, 5.0 / 3]
    expected = np.mean(np.array([0.5, 1.0, 2.5]) - ideal)
    assert found.average == pytest.approx([expected], abs=slack_s)


def test_a_tail_that_was_asked_for_is_counted_from_the_asking(
    tones: ToneServer, tmp_path: Path
) -> None:
    take = heard(tones, tmp_path, "one", Plan(pace=1.0, chunk_s=0.1))
    found = evaluate.lags([(clip("one"), take)])
    assert found.endpoint == []
    (lag,) = found.flush
    assert 0 <= lag < 0.1


class Told:
    """A take that says what the test says."""

    begin, seconds, closed_at, flushed_at = 100.0, 2.0, 103.0, 102.0

    def __init__(self, *told: tuple[float, m.Message]) -> None:
        self.told = list(told)
        self.sent = [(8000 * (k + 1), 100.5 + k / 2) for k in range(4)]


def partial(text: str, utterance: int = 0) -> m.Partial:
    return m.Partial("s", utterance, text, 0, 0)


def final(text: str, *ends_s: float, utterance: int = 0, endpoint: int = 32_000) -> m.Final:
    words = tuple(
        m.Word(word, end_s - 0.1, end_s, 1.0)
        for word, end_s in zip(text.split(), ends_s, strict=True)
    )
    return m.Final("s", utterance, text, 0, 0, endpoint, "silence", words)


def test_words_that_only_the_final_has_are_first_shown_there() -> None:
    take = Told(
        (100.6, partial("one")),
        (101.0, partial("one to")),
        (101.9, final("One two, 21st.", 0.4, 0.9, 1.5, endpoint=24_000)),
    )
    found = evaluate.lags([(clip("one two twenty first"), take)])  # type: ignore[list-item]
    assert found.shown == pytest.approx([0.2, 1.0, 0.4, 0.4])
    assert found.final == pytest.approx([1.5, 1.0, 0.4, 0.4])
    assert found.in_partial == pytest.approx([0.2])
    assert found.endpoint == pytest.approx([101.9 - 101.5])


def test_an_utterance_that_came_to_nothing_was_shown_and_taken_back() -> None:
    take = Told(
        (100.5, partial("one")),
        (101.0, partial("four", 1)),
        (101.5, final("One.", 0.4)),
    )
    found = evaluate.score(clip("one"), take)  # type: ignore[arg-type]
    assert found.hypothesis == "One."
    assert found.streaming == "one four"
    assert (found.changes.shown, found.changes.changed) == (2, 1)
    assert found.streaming_words.insertions == 1


def test_hypotheses_are_a_line_each() -> None:
    take = Told((100.5, partial("on")), (101.5, final("One,\ttwo.", 0.4, 0.8)))
    scores = [evaluate.score(clip("", name), take) for name in ("x/1", "x/2")]  # type: ignore[arg-type]
    assert evaluate.hypotheses(scores) == "x/1\tOne, two.\nx/2\tOne, two.\n"
    assert evaluate.hypotheses(scores, streaming=True) == "x/1\ton\nx/2\ton\n"


def test_a_report_can_be_read_and_stored(tones: ToneServer, tmp_path: Path) -> None:
    plan = Plan(pace=1.0, chunk_s=0.1)
    takes = [heard(tones, tmp_path, words, plan) for words in ("one", "one two", "two")]
    clips = [clip("one", speaker="ann"), clip("one three", speaker="bob"), clip("", speaker="-")]
    scores = [evaluate.score(*pair) for pair in zip(clips, takes, strict=True)]
    report = evaluate.accuracy(scores) | evaluate.cost(scores, plan, 4.0, 0.5) | {"faults": ["x"]}
    report["latency"] = evaluate.latency(evaluate.lags(zip(clips, takes, strict=True)))
    assert json.loads(json.dumps(report)) == report
    text = "\n".join(evaluate.lines(report))
    for part in (
        "word error rate        33.33 % (95 %: 0.00 to 50.00); 3 words in 2 recordings: 1 subst",
        "lone words             0.00 %; 0 of 1",
        "1 in 0.00 h without text",
        "real-time factor       2.000; 2 s of sound in 4.0 s, 1 streams at once, in real time",
        "word's end to shown",
        "average lagging",
        "bob                        50.00       1       2           1",
        "FAULT x",
    ):
        assert part in text


# --- the command, through a server of its own ------------------------------------------------


@pytest.fixture(scope="module")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of five recordings, and the model that understands them."""
    folder = tmp_path_factory.mktemp("corpus")
    write_model(folder)
    rows = [
        ("a.wav", "ann", "valid", "one two", "One, two!"),
        ("b.flac", "ann", "valid", "three - four", "3 four"),
        ("c.wav", "bob", "valid", "two", "one"),  # wrong, on purpose
        ("d.wav", "bob", "train", "two", "two"),
        ("e.wav", "-", "valid", "zero", ""),
    ]
    lines = ["path\tspeaker\tsplit\tseconds\ttext"]
    for name, speaker, split, said, text in rows:
        soundfile.write(folder / name, say(*said.split()), 16_000)
        lines.append(f"{name}\t{speaker}\t{split}\t1.0\t{text}")
    (folder / "manifest.tsv").write_text("\n".join(lines) + "\n")
    return folder


def murmur(folder: Path, *options: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "engine", "evaluate", "speech", str(folder)]
    command += ["--model", str(folder / "tones2.onnx"), *map(str, options)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )


def test_the_command_evaluates_a_split_and_writes_what_was_heard(
    corpus_folder: Path, tmp_path: Path
) -> None:
    hyp, streaming = tmp_path / "hyp.tsv", tmp_path / "streaming.tsv"
    files = ["--hyp", hyp, "--streaming-hyp", streaming]
    done = murmur(corpus_folder, "--json", "--split", "valid", "--streams", "3", *files)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["figure"] == report["streaming_wer"] == pytest.approx(100 / 5)
    assert (report["words"], report["recordings"], report["substitutions"]) == (5, 3, 1)
    assert [one["speaker"] for one in report["speakers"]] == ["bob", "ann"]
    assert report["noise"]["false_words"] == 1
    assert report["lone_words"] == {"clips": 1, "wrong": 1, "error": 100.0}
    assert report["changed"] == 0.0
    assert report["server_cpu_s"] > 0
    assert hyp.read_text() == streaming.read_text()
    assert hyp.read_text() == "a.wav\tone two\nb.flac\tthree four\nc.wav\ttwo\ne.wav\tzero\n"


def test_the_command_tells_latency_in_real_time(corpus_folder: Path) -> None:
    done = murmur(corpus_folder, "--json", "--split", "train", "--paced")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["figure"] == 0.0
    latency = report["latency"]
    # The word lasts from 0.1 to 0.4 s; it is shown when its beginning has been looked at, a step
    # of 0.1 s late: before its end. 0.8 s of silence make it a final.
    assert -0.2 <= latency["word_end_to_first_shown"]["p50_s"] < 0.7
    assert 0.8 <= latency["word_end_to_final"]["p50_s"] < 1.8
    assert latency["endpoint_sent_to_final"]["times"] == 1
    assert latency["flush_to_final"] is None
    assert report["wall_s"] >= 0.5 + 1.5


def test_a_recording_that_is_missing_is_a_fault_and_counts(corpus_folder: Path) -> None:
    broken = corpus_folder / "broken"
    broken.mkdir()
    rows = [
        ("path", "speaker", "split", "seconds", "text"),
        ("../a.wav", "ann", "v", "1", "one two"),
    ]
    rows.append(("gone.wav", "ann", "v", "1", "one"))
    (broken / "manifest.tsv").write_text("\n".join(map("\t".join, rows)))
    done = murmur(broken, "--model", corpus_folder / "tones2.onnx")
    assert done.returncode == 1
    assert "33.33 %" in done.stdout
    assert f"FAULT {broken / 'gone.wav'}: there is no such file" in done.stdout
