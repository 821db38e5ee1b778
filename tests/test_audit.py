"""The audit log: every transition a line, none ever changed, and the loop never waits for it."""

import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine import audit
from engine.audit import Audit
from engine.errors import ConfigError
from engine.messages import Alert

WALL = 1_750_000_000.25
ALERT = Alert(
    "bed-7", "lead_off", "active", "medium", 1.0, 0.5, 360, 1.0, 450,
    subject="p-17", from_state="pending", kind="technical", onset=300, actor="", reason="",
    cannot_monitor=("asystole",), model="heart", sha256="0" * 64, quality=0.0,
)  # fmt: skip
LINE = {
    "line": 1,
    "wall": "2025-06-15T15:06:40.250000+00:00",
    "seconds": 1.0,
    "sample": 360,
    "decided_at": 450,
    "subject": "p-17",
    "stream": "bed-7",
    "rule": "lead_off",
    "from_state": "pending",
    "to_state": "active",
    "value": 1.0,
    "limit_value": 0.5,
    "priority": "medium",
    "kind": "technical",
    "onset": 300,
    "transitions": 1,
    "actor": "",
    "reason": "",
    "cannot_monitor": ["asystole"],
    "quality": 0.0,
    "model": "heart",
    "sha256": "0" * 64,
    "life": 0,
    "number": 0,
}


def other(**changes: Any) -> Alert:
    return msgspec.structs.replace(ALERT, **changes)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.db"


@pytest.fixture
def log(path: Path) -> Audit:
    """An audit log in which one transition was written, and which is closed."""
    made = Audit(path, wall=lambda: WALL)
    made.add([ALERT], {"now_s": 1.0})
    made.close()
    return made


def test_a_transition_is_a_line_with_all_that_was_asked_for(path: Path, log: Audit) -> None:
    assert list(audit.lines(path)) == [LINE]
    assert list(audit.lines(path, "p-18")) == []


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE lines SET actor = 'nobody'",
        "DELETE FROM lines",
        "INSERT OR REPLACE INTO lines SELECT * FROM lines",
    ],
)
def test_no_line_is_changed_or_taken_away(path: Path, log: Audit, statement: str) -> None:
    database = sqlite3.connect(path)
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        database.execute(statement)
    database.close()
    assert list(audit.lines(path)) == [LINE]


def test_a_log_goes_on_where_it_ended_and_keeps_the_latest_state(path: Path, log: Audit) -> None:
    again = Audit(path, wall=lambda: WALL)
    assert list(again.states()) == [("p-17", {"now_s": 1.0})]
    again.add([other(state="acknowledged", actor="nurse-3")], {"now_s": 2.0})
    again.add([other(subject="p-18"), other(subject="p-18", rule="gap")], {"now_s": 9.0})
    again.add([other(subject="p-18", state="inactive")], None)
    again.close()
    found = list(audit.lines(path))
    assert [line["line"] for line in found] == [1, 2, 3, 4, 5]
    assert [line["actor"] for line in found] == ["", "nurse-3", "", "", ""]
    assert list(again.states()) == [("p-17", {"now_s": 2.0})]


def test_adding_never_waits_and_nothing_is_lost_while_the_file_is_locked(path: Path) -> None:
    log = Audit(path, wall=lambda: WALL)
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("BEGIN IMMEDIATE")
    for number in range(1000):
        log.add([other(index=number)], {})
    database.execute("ROLLBACK")
    database.close()
    log.close()
    assert [line["sample"] for line in audit.lines(path)] == list(range(1000))
    assert log.lost == 0


def test_what_waits_for_a_disk_that_takes_nothing_is_bounded_and_counted(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "_MAX_WAITING", 3)
    held, writing = threading.Event(), threading.Event()
    insert: Callable[..., None] = audit._insert

    def slow(*arguments: Any) -> None:
        writing.set()
        assert held.wait(10)
        insert(*arguments)

    monkeypatch.setattr(audit, "_insert", slow)
    log = Audit(path, wall=lambda: WALL)
    log.add([ALERT], {})
    assert writing.wait(10)
    for number in range(5):
        log.add([other(index=number)], {})
    assert log.lost == 2
    held.set()
    log.close()
    assert [line["sample"] for line in audit.lines(path)] == [360, 0, 1, 2]


def test_a_write_that_fails_is_tried_again(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(audit, "_RETRY_S", 0.01)
    insert, failures = audit._insert, iter([True, True, False])

    def failing(*arguments: Any) -> None:
        insert(*arguments)
        if next(failures, False):
            raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(audit, "_insert", failing)
    log = Audit(path, wall=lambda: WALL)
    log.add([ALERT], {})
    while not list(log.states()):
        threading.Event().wait(0.01)
    log.close()
    assert list(audit.lines(path)) == [LINE]
    assert caplog.text.count("disk is full") == 1


def test_a_file_that_is_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not a database at all, but long enough to be looked at " * 40)
    before = text.read_bytes()
    with pytest.raises(ConfigError, match=r"notes\.txt"):
        Audit(text)
    assert text.read_bytes() == before
    foreign = tmp_path / "other.db"
    database = sqlite3.connect(foreign)
    database.execute("CREATE TABLE t (x)")
    database.close()
    with pytest.raises(ConfigError, match=r"other\.db: expected an audit log of version 2"):
        Audit(foreign)
    with pytest.raises(ConfigError, match=r"nowhere"):
        Audit(tmp_path / "nowhere" / "audit.db")
    with pytest.raises(ConfigError, match=r"missing\.db"):
        list(audit.lines(tmp_path / "missing.db"))
