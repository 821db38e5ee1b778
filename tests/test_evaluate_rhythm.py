"""The rhythm of a record is what was told last, and is scored as in the challenge of 2017."""

import subprocess
import sys
from pathlib import Path

import pytest

from engine import evaluate_rhythm
from engine import messages as m
from engine.errors import MurmurError
from engine.evaluate_rhythm import Entry

ROOT = Path(__file__).parent.parent


def measures(**values: float) -> m.Measures:
    return m.Measures("s", 0, 0.0, 0, values)


def test_the_rhythm_that_was_told_last_decides() -> None:
    first = measures(rhythm_n=0.7, rhythm_a=0.1, rhythm_o=0.1, rhythm_noise=0.1)
    then = measures(rhythm_n=0.2, rhythm_a=0.5, rhythm_o=0.2, rhythm_noise=0.1)
    later = measures(heart_rate_bpm=61.0)
    assert evaluate_rhythm.answer([first, then, later]) == "A"
    assert evaluate_rhythm.answer([then, first]) == "N"
    assert evaluate_rhythm.answer([measures(rhythm_noise=0.9)]) == "~"
    assert evaluate_rhythm.answer([later, m.Beat("s", 0, 0.0, "N", 0.9, 9, None)]) is None


def test_f1_is_that_of_the_challenge() -> None:
    labels = ["N", "N", "N", "A", "A", "O", "~"]
    told = ["N", "N", "O", "A", None, "O", "N"]
    report = evaluate_rhythm.score(labels, told)
    # 2 x right / (labelled + called).
    assert report["f1_n"] == pytest.approx(100 * 4 / (3 + 3))
    assert report["f1_a"] == pytest.approx(100 * 2 / (2 + 1))
    assert report["f1_o"] == pytest.approx(100 * 2 / (1 + 2))
    assert report["f1_noise"] == 0
    assert report["figure"] == pytest.approx(100 * 2 / 3)
    assert report["silent"] == 1
    assert report["table"][1] == [0, 1, 0, 0, 1]
    assert any("66.67 %" in line for line in evaluate_rhythm.lines({
        **report, "signal_s": 1.0, "wall_s": 1.0, "faults": []}))  # fmt: skip


def test_without_a_record_of_a_class_there_is_no_mean() -> None:
    report = evaluate_rhythm.score(["N", "A"], ["N", "A"])
    assert (report["f1_n"], report["f1_o"], report["figure"]) == (100, None, None)


def test_the_table_is_read_by_its_columns(tmp_path: Path) -> None:
    file = tmp_path / "labels.csv"
    file.write_text("record,label,split\na,N,train\nb,~,valid\nc,O,valid\n")
    assert evaluate_rhythm.read(tmp_path, "valid") == [Entry("b", "~"), Entry("c", "O")]
    assert len(evaluate_rhythm.read(tmp_path)) == 3
    assert evaluate_rhythm.read(tmp_path, limit=1) == [Entry("a", "N")]
    with pytest.raises(MurmurError, match="no lines of the split 'test'"):
        evaluate_rhythm.read(tmp_path, "test")
    file.write_text("record,label\na,N\nb,X\n")
    with pytest.raises(MurmurError, match=r"found \['X'\]"):
        evaluate_rhythm.read(tmp_path)
    with pytest.raises(MurmurError, match="columns label, record, split"):
        evaluate_rhythm.read(tmp_path, "valid")
    file.unlink()
    with pytest.raises(MurmurError, match="expected a table"):
        evaluate_rhythm.read(tmp_path)


def test_the_command_says_what_is_missing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "engine", "evaluate", "rhythm", str(tmp_path), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "expected a table labels.csv" in done.stderr
