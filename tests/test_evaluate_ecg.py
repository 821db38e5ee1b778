"""Records of any kind go through a real server, and the figures are those of what it told."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from rich.console import Console

wfdb = pytest.importorskip("wfdb", reason="needs the extra 'ecg'")

from engine import annotated, evaluate_ecg, ward  # noqa: E402
from engine import messages as m  # noqa: E402
from engine.client import Client  # noqa: E402
from engine.ec57 import CLASS_OF, LABELS  # noqa: E402
from engine.errors import MurmurError  # noqa: E402
from engine.evaluate_ecg import Evaluation  # noqa: E402
from engine.ward import Plan, Signal  # noqa: E402
from tests.conftest import Server, arguments  # noqa: E402

ROOT = Path(__file__).parent.parent
MITDB = ROOT / "../shared/data/ecg/mitdb"
SECONDS = 40
# wfdb 4.3 with pandas 3.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

needs_records = pytest.mark.skipif(not MITDB.is_dir(), reason=f"no MIT-BIH records at {MITDB}")


@pytest.fixture(scope="module")
def heart() -> Iterator[str]:
    """A server of the bundled heart model, for records that come as fast as they can."""
    server = Server([*arguments("heart"), "--limit", "max_load=1e9"])
    yield server.address
    assert server.stop() == 0


def write(
    folder: Path,
    name: str,
    rate_hz: int = 360,
    unit: str = "mV",
    period_s: float = 0.8,
    annotations: bool = True,
    leads: tuple[str, ...] = ("V1", "MLII"),
) -> list[int]:
    """Write spikes of 1 mV on MLII and noise on the other lead; return where the spikes are."""
    t = np.arange(SECONDS * rate_hz) / rate_hz
    spikes = np.exp(-(((t % period_s) - 0.3) ** 2) / 2 / 0.02**2)
    noise = np.random.default_rng(0).normal(0, 0.01, len(t))
    scale = {"mV": 1.0, "uV": 1000.0}[unit]
    signal = scale * np.stack([spikes if lead == "MLII" else noise for lead in leads], axis=1)
    wfdb.wrsamp(
        name,
        fs=rate_hz,
        units=[unit] * len(leads),
        sig_name=list(leads),
        p_signal=signal,
        fmt=["16"] * len(leads),
        adc_gain=[1000.0 / scale] * len(leads),
        baseline=[0] * len(leads),
        write_dir=str(folder),
    )
    beats = np.arange(0.3, SECONDS, period_s) * rate_hz
    samples = np.round(beats[beats < len(t)]).astype(int)
    if annotations:
        wfdb.wrann(name, "atr", samples, symbol=["N"] * len(samples), write_dir=str(folder))
    return samples.tolist()


def evaluate(folder: Path, address: str, plan: Plan | None = None) -> Evaluation:
    return evaluate_ecg.evaluate(folder, plan or Plan(), Console(stderr=True), address=address)


# Reading


def test_a_record_is_its_leads_with_mlii_first_and_its_annotations(tmp_path: Path) -> None:
    write(tmp_path, "one", rate_hz=250)
    symbols = ["+", "N", "L", "[", "!", "]", "V", "+", "/", "~", "A"]
    samples = np.arange(10, 10 + 100 * len(symbols), 100)
    notes = ["(AFIB", *[""] * 6, "(N", *[""] * 3]
    wfdb.wrann("one", "atr", samples, symbol=symbols, aux_note=notes, write_dir=str(tmp_path))
    record = annotated.read(tmp_path, "one", leads=2)
    assert record.leads == ("MLII", "V1")
    assert (record.rate_hz, record.unit) == (250.0, "mV")
    assert record.samples[:, 0].max() == pytest.approx(1.0, abs=1e-3)
    assert record.reference is not None
    found = record.reference.beats
    assert found.samples.tolist() == [110, 210, 610, 810, 1010]
    assert [LABELS[label] for label in found.labels] == ["N", "N", "V", "Q", "S"]
    assert record.reference.flutter == [(310, 510)]
    assert record.reference.rhythms == [("(AFIB", 10, 710), ("(N", 710, 250 * SECONDS)]
    assert annotated.read(tmp_path, "one", leads=1).leads == ("MLII",)


def test_the_records_of_a_folder_are_those_that_it_lists_or_all(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write(tmp_path, name, annotations=False)
    assert annotated.names(tmp_path) == ["a", "b"]
    (tmp_path / "RECORDS").write_text("b\nc\n")
    assert annotated.names(tmp_path) == ["b"]
    assert annotated.names(tmp_path, ["a"]) == ["a"]
    assert annotated.length_s(tmp_path, "a") == SECONDS
    with pytest.raises(MurmurError, match="no record c"):
        annotated.names(tmp_path, ["a", "c"])
    with pytest.raises(MurmurError, match="expected a folder"):
        annotated.names(tmp_path / "nowhere")


# Sending


def signal(samples: int = 36_000, name: str = "one") -> Signal:
    return Signal(name, np.zeros((samples, 1), np.float32), 360.0, "mV")


def test_chunks_cover_all_that_is_there_in_order() -> None:
    one = signal()
    one.samples[1000:1010] = np.nan
    for plan in (Plan(), Plan(seed=3)):
        chunks = list(ward.cuts(one, 180, plan))
        covered = [sample for start, end in chunks for sample in range(start, end)]
        assert covered == [*range(1000), *range(1010, 36_000)]
        assert max(end - start for start, end in chunks) <= 180
    assert len({end - start for start, end in ward.cuts(one, 180, Plan(seed=3))}) > 50


@pytest.mark.parametrize("burst_s", [0.0, 2.0])
def test_the_share_that_is_asked_for_is_lost_and_the_same_one_again(burst_s: float) -> None:
    one, plan = signal(3_000_000), Plan(lose=0.05, burst_s=burst_s, seed=1)
    chunks = list(ward.cuts(one, 180, plan))
    assert sum(end - start for start, end in chunks) / 3_000_000 == pytest.approx(0.95, abs=0.01)
    assert chunks == list(ward.cuts(one, 180, plan))
    assert chunks != list(ward.cuts(one._replace(name="two"), 180, plan))
    if burst_s:
        edges = np.array([(0, 0), *chunks])
        lost = edges[1:, 0] - edges[:-1, 1]
        assert lost[lost > 0][1:].min() >= 720


def test_losses_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(MurmurError, match="expected a share"):
        Plan(lose=1.0).check()
    with pytest.raises(MurmurError, match="burst"):
        Plan(burst_s=2.0).check()


def test_a_record_that_the_server_refuses_is_its_own_fault(heart: str) -> None:
    wrong = signal()._replace(samples=np.zeros((360, 3), np.float32), name="wide")
    with Client(heart) as client:
        told = {one.name: one for one in ward.watch(client, [wrong, signal(3600)], Plan())}
    assert "found 3" in told["wide"].fault
    assert told["one"].fault == ""
    assert told["one"].missing == []


# Evaluating


def test_records_of_any_rate_and_unit_are_scored_and_their_beats_written(
    heart: str, tmp_path: Path
) -> None:
    spikes = {
        "a": write(tmp_path, "a"),
        "b": write(tmp_path, "b", rate_hz=250, unit="uV", period_s=1.0),
        "c": write(tmp_path, "c", annotations=False),
    }
    made = evaluate(tmp_path, heart)
    report = made.report
    assert report["faults"] == []
    assert report["records"] == 2
    assert report["figure"] == report["qrs_f1_full"] > 95
    assert report["qrs_f1_bxb"] is None  # no record lasts for five minutes
    assert report["loss"] is None
    annotations = len(spikes["a"]) + len(spikes["b"])
    assert report["qrs"]["full"]["150ms"]["annotated"] == annotations
    assert np.sum(report["classes"]["full"]["all"]["table"]) >= annotations
    assert abs(report["timing_ms"]["median"]) < 20
    assert 0 < report["decision_ms"]["median"] < 400
    assert [row["record"] for row in report["per_record"]] == ["a", "b"]
    for name, rate_hz in (("a", 360), ("b", 250), ("c", 360)):
        rows = [row for row in made.beats if row["record"] == name]
        assert len(rows) == pytest.approx(len(spikes[name]), abs=2)
        assert {*rows[0]} == {"record", "sample", "class", "decided_at_sample"}
        inside = [row["sample"] for row in rows[2:-2]]
        nearest = [min(abs(sample - spike) for spike in spikes[name]) for sample in inside]
        assert max(nearest) <= 0.02 * rate_hz
        assert all(row["decided_at_sample"] > row["sample"] for row in rows)


def test_any_cut_of_a_record_gives_the_same_beats_and_alerts(heart: str, tmp_path: Path) -> None:
    write(tmp_path, "a")
    whole = evaluate(tmp_path, heart)
    for plan in (Plan(seed=7), Plan(chunk_s=0.02, seed=8), Plan(chunk_s=100)):
        made = evaluate(tmp_path, heart, plan)
        assert (made.beats, made.alerts) == (whole.beats, whole.alerts)


def test_what_was_lost_is_told_and_only_the_heard_part_is_scored_apart(
    heart: str, tmp_path: Path
) -> None:
    write(tmp_path, "a")
    plan = Plan(lose=0.15, burst_s=2.0, seed=5)
    made = evaluate(tmp_path, heart, plan)
    loss = made.report["loss"]
    record = annotated.read(tmp_path, "a", 1)
    assert record.reference is not None
    one = Signal("a", record.samples, record.rate_hz, record.unit)
    sent = np.zeros(len(one.samples), bool)
    for start, end in ward.cuts(one, 180, plan):
        sent[start:end] = True
    assert not sent.all()
    assert loss["share"] == pytest.approx(1 - sent.mean())
    around = [
        sent[max(0, beat - 360) : beat + 361].all() for beat in record.reference.beats.samples
    ]
    assert loss["heard_beats"] == sum(around)
    assert loss["heard_f1_full"] > made.report["qrs_f1_full"]
    assert not any(not sent[row["sample"]] for row in made.beats)


def test_alerts_are_rows_and_their_episodes_are_scored(tmp_path: Path) -> None:
    write(tmp_path, "a", period_s=10.0)
    record = annotated.read(tmp_path, "a", 1)
    assert record.reference is not None

    def alert(state: str, index: int, decided_at: int) -> m.Alert:
        # Through MessagePack, as it comes: a field more or less is none of this test's business.
        raw = {"stream": "s", "rule": "asystole", "state": state, "priority": "high", "value": 4.0,
               "limit": 4.0, "index": index, "seconds": 0.0, "decided_at": decided_at}  # fmt: skip
        return msgspec.convert(raw, m.Alert)

    patient = ward.Patient(signal(SECONDS * 360, "a"), None, Plan())
    patient.told = [
        m.Beat("s", 110, 0.3, "N", 0.9, 190, 61.0),
        m.Beat("s", 10**6, 0.3, "N", 0.9, 10**6, None),  # in the padding behind the end
        alert("active", 1548, 1600),
        alert("resolved", 3708, 3790),
    ]
    found = evaluate_ecg.told(patient)
    assert found.beats.samples.tolist() == [110]
    assert evaluate_ecg.alert_rows("a", found)[0] == {
        "record": "a",
        "rule": "asystole",
        "state": "active",
        "priority": "high",
        "sample": 1548,
        "decided_at_sample": 1600,
        "value": 4.0,
    }
    score = evaluate_ecg.score("a", record.reference, found)
    report = evaluate_ecg.summary([score], Plan())
    asystole = report["alerts"]["asystole"]
    assert (asystole["episodes"], asystole["found"], asystole["false"]) == (4, 1, 0)
    assert asystole["latency_s"]["max"] == pytest.approx((1600 - 108) / 360)
    assert asystole["delay_s"]["max"] == pytest.approx((1600 - 108) / 360 - 4)
    assert report["false_per_hour"] == 0
    assert report["alerts"]["rate_rules"]["episodes"] == 4


def test_a_folder_without_annotations_has_beats_and_no_scores(heart: str, tmp_path: Path) -> None:
    write(tmp_path, "a", annotations=False)
    made = evaluate(tmp_path, heart)
    assert made.report["figure"] is None
    assert made.report["beats_told"] == len(made.beats) > 40
    assert any("no record has annotations" in line for line in evaluate_ecg.lines(made.report))


def test_the_command_prints_a_table_or_one_object_and_writes_lines(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path, name)
    command = [sys.executable, "-m", "engine", "evaluate", "ecg", str(tmp_path)]
    beats, alerts = tmp_path / "beats.jsonl", tmp_path / "alerts.jsonl"
    options = ["--records", "b", "--beats", str(beats), "--alerts", str(alerts), "--json"]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    keys = {"qrs_f1_full", "qrs_f1_bxb", "veb_f1", "sveb_f1", "false_per_hour", "figure"}
    assert keys <= report.keys()
    rows = [json.loads(line) for line in beats.read_text().splitlines()]
    assert {row["record"] for row in rows} == {"b"}
    assert len(rows) == report["beats_told"]
    assert len(alerts.read_text().splitlines()) == report["alerts_told"]
    done = subprocess.run([*command, "--records", "c"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "there is no record c" in done.stderr
    table = "\n".join(evaluate_ecg.lines(report))
    assert "full 150ms" in table
    assert "annotated x found" in table


@needs_records
def test_two_minutes_of_real_records_are_matched_as_wfdb_matches_them(
    heart: str, tmp_path: Path
) -> None:
    processing = pytest.importorskip("wfdb.processing")
    annotations = {}
    for name in ("119", "208"):
        record = wfdb.rdrecord(str(MITDB / name), sampto=120 * 360, physical=False)
        record.wrsamp(write_dir=str(tmp_path))
        marks = wfdb.rdann(str(MITDB / name), "atr", sampto=120 * 360)
        wfdb.wrann(name, "atr", marks.sample, symbol=marks.symbol, write_dir=str(tmp_path))
        is_beat = np.isin(marks.symbol, list(CLASS_OF))
        annotations[name] = marks.sample[is_beat]
    made = evaluate(tmp_path, heart)
    assert made.report["figure"] > 99
    for row in made.report["per_record"]:
        name = row["record"]
        found = np.array([one["sample"] for one in made.beats if one["record"] == name])
        wanted = processing.compare_annotations(annotations[name], found, 54 + 1)
        assert (row["missed"], row["false"]) == (wanted.fn, wanted.fp)
        assert row["sensitivity"] == pytest.approx(100 * wanted.sensitivity)
        assert row["predictivity"] == pytest.approx(100 * wanted.positive_predictivity)
