"""The audit log of alerts: one line for each transition, in SQLite, and nothing ever changed.

A thread of its own writes what the loop hands over, as many lines in one transaction as have come
meanwhile; the loop never waits for the disk. Beside the lines, which triggers keep as they are,
lies the latest state of each subject's alerts, from which a restarted server goes on. The schema
is that of :data:`COLUMNS`; ``murmur alerts export`` writes it as JSON lines.
"""

import contextlib
import json
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from engine.errors import ConfigError
from engine.messages import Alert

log = logging.getLogger(__name__)

SCHEMA = 2
COLUMNS = (
    "line",
    "wall",  # UTC, when the engine told it
    "seconds",  # event time: of the stream
    "sample",
    "decided_at",
    "subject",
    "stream",
    "rule",
    "from_state",
    "to_state",
    "value",
    "limit_value",
    "priority",
    "kind",
    "onset",
    "transitions",
    "actor",
    "reason",
    "cannot_monitor",
    "quality",
    "model",
    "sha256",
    "life",  # of the stream; with the number it names a transition, however often it comes
    "number",
)
_REALS = ("seconds", "value", "limit_value", "quality")
_INTEGERS = ("sample", "decided_at", "onset", "transitions", "life", "number")
_MAX_WAITING = 100_000  # entries, of some 1 kB; more are lost, counted and told
_RETRY_S = 1.0


class _Entry(NamedTuple):
    """What one subject's transitions at one moment leave."""

    lines: list[tuple[Any, ...]]
    subject: str
    state: str | None  # JSON; None: nothing is carried of the subject any more


class Audit:
    """An audit log that is open for writing.

    Parameters
    ----------
    path : Path
        Made if it is not there; its folder must be.
    wall : callable
        Seconds since 1970.

    Raises
    ------
    ConfigError
        If there is something else, or it cannot be written.

    Attributes
    ----------
    lost : int
        Transitions that were not written, since too many waited for a disk that took none.
    """

    def __init__(self, path: Path, wall: Callable[[], float] = time.time) -> None:
        self._path, self._wall = path, wall
        self._waiting: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self._ending = threading.Event()
        self.lost = 0
        try:
            with contextlib.closing(_writable(path)) as database:
                _prepare(database)
        except (sqlite3.Error, ConfigError) as error:
            raise ConfigError(f"audit {path}: {error}") from None
        self._thread = threading.Thread(target=self._write_all, name="audit", daemon=True)
        self._thread.start()

    def states(self) -> Iterator[tuple[str, Any]]:
        """Yield each subject and what was carried of it when its last transition was written."""
        for subject, state in _read(self._path, "SELECT subject, state FROM states"):
            yield subject, json.loads(state)

    def add(self, alerts: list[Alert], state: Any | None) -> None:
        """Take the transitions of one subject and what is carried of it then; never waits."""
        if self._waiting.qsize() >= _MAX_WAITING:
            self.lost += len(alerts)
            return
        now = datetime.fromtimestamp(self._wall(), UTC).isoformat(timespec="microseconds")
        encoded = None if state is None else msgspec.json.encode(state).decode()
        lines = [_line(alert, now) for alert in alerts]
        self._waiting.put(_Entry(lines, alerts[0].subject, encoded))

    def close(self) -> None:
        """Write what waits, then end."""
        self._ending.set()
        self._waiting.put(None)
        self._thread.join()

    def _write_all(self) -> None:
        with contextlib.closing(_writable(self._path)) as database:
            going = True
            while going:
                entries = [self._waiting.get()]
                with contextlib.suppress(queue.Empty):
                    while True:
                        entries.append(self._waiting.get_nowait())
                going = None not in entries
                self._write(database, [entry for entry in entries if entry is not None])

    def _write(self, database: sqlite3.Connection, batch: list[_Entry]) -> None:
        """Write entries in one transaction; a disk that takes nothing is tried again."""
        warned = False
        while True:
            try:
                with database:
                    _insert(database, batch)
                return
            except sqlite3.Error as error:
                if not warned:
                    log.error("audit %s: %s; trying again", self._path, error)
                warned = True
                if self._ending.wait(_RETRY_S):
                    self.lost += sum(len(entry.lines) for entry in batch)
                    log.error("audit %s: given up, %d lines lost", self._path, self.lost)
                    return


def lines(path: Path, subject: str = "") -> Iterator[dict[str, Any]]:
    """Yield the lines of an audit log, the oldest first; of one subject, if one is named.

    Raises
    ------
    ConfigError
        If that file is no audit log.
    """
    wanted = " WHERE subject = ?" if subject else ""
    query = f"SELECT {', '.join(COLUMNS)} FROM lines{wanted} ORDER BY line"
    for values in _read(path, query, (subject,) if subject else ()):
        line = dict(zip(COLUMNS, values, strict=True))
        line["cannot_monitor"] = json.loads(line["cannot_monitor"])
        yield line


def _read(path: Path, query: str, parameters: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    try:
        database = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        with contextlib.closing(database):
            _check(database)
            yield from database.execute(query, parameters)
    except (sqlite3.Error, ConfigError) as error:
        raise ConfigError(f"audit {path}: {error}") from None


def _writable(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")  # a line that is committed survives a power cut
    return database


def _prepare(database: sqlite3.Connection) -> None:
    """Lay out an empty file, or check that it is an audit log."""
    if database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        _check(database)
        return
    columns = ", ".join(f"{name} {_type(name)}" for name in COLUMNS)
    refuse = "BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END"
    database.executescript(
        f"""
        BEGIN;
        CREATE TABLE lines ({columns}) STRICT;
        CREATE INDEX lines_by_subject ON lines (subject, line);
        CREATE UNIQUE INDEX once ON lines (stream, life, number) WHERE life != 0;
        CREATE TABLE states (subject TEXT PRIMARY KEY, state TEXT NOT NULL) STRICT;
        CREATE TRIGGER no_update BEFORE UPDATE ON lines {refuse};
        CREATE TRIGGER no_delete BEFORE DELETE ON lines {refuse};
        CREATE TRIGGER no_replace BEFORE INSERT ON lines
            WHEN EXISTS (SELECT 1 FROM lines WHERE line = NEW.line) {refuse};
        PRAGMA user_version = {SCHEMA};
        COMMIT;
        """
    )


def _check(database: sqlite3.Connection) -> None:
    (found,) = database.execute("PRAGMA user_version").fetchone()
    if found != SCHEMA:
        raise ConfigError(f"expected an audit log of version {SCHEMA}, found version {found}")


def _type(column: str) -> str:
    if column == "line":
        return "INTEGER PRIMARY KEY AUTOINCREMENT"
    if column == "quality":  # not every stream tells it
        return "REAL"
    kind = "REAL" if column in _REALS else "INTEGER" if column in _INTEGERS else "TEXT"
    return f"{kind} NOT NULL"


def _insert(database: sqlite3.Connection, batch: list[_Entry]) -> None:
    database.executemany(
        f"INSERT INTO lines ({', '.join(COLUMNS[1:])}) "
        f"VALUES ({', '.join('?' * (len(COLUMNS) - 1))}) "
        "ON CONFLICT (stream, life, number) WHERE life != 0 DO NOTHING",
        [line for entry in batch for line in entry.lines],
    )
    for entry in batch:
        if entry.state is None:
            database.execute("DELETE FROM states WHERE subject = ?", (entry.subject,))
        else:
            database.execute(
                "INSERT OR REPLACE INTO states VALUES (?, ?)", (entry.subject, entry.state)
            )


def _line(alert: Alert, wall: str) -> tuple[Any, ...]:
    """Return the values of the columns after the first."""
    return (
        wall,
        alert.seconds,
        alert.index,
        alert.decided_at,
        alert.subject,
        alert.stream,
        alert.rule,
        alert.from_state,
        alert.state,
        alert.value,
        alert.limit,
        alert.priority,
        alert.kind,
        alert.onset,
        alert.transitions,
        alert.actor,
        alert.reason,
        json.dumps(alert.cannot_monitor),
        alert.quality,
        alert.model,
        alert.sha256,
        alert.life,
        alert.number,
    )
