"""How far recordings that go through a server are, on a terminal."""

import time
from collections.abc import Sequence
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)


class UnderWay(Protocol):
    """A recording that is being sent."""

    @property
    def done_s(self) -> float:
        """Seconds of it that are through."""


class Bar:
    """How far recordings are, on a terminal; nothing elsewhere.

    Parameters
    ----------
    console : Console
    total_s : float
        Length of all recordings.
    what : str
    """

    def __init__(self, console: Console, total_s: float, what: str) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[speed]}"),
        )
        self.shown = console.is_terminal
        # Standard output is the caller's: it may be a pipe.
        self._progress = Progress(
            *columns,
            console=console,
            transient=True,
            redirect_stdout=False,
            disable=not self.shown,
        )
        self._task = self._progress.add_task(what, total=total_s, speed="")
        self._over_s = 0.0
        self._begin = 0.0

    def __enter__(self) -> "Bar":
        self._begin = time.monotonic()
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def move(self, under_way: Sequence[UnderWay]) -> None:
        """Show those under way."""
        done_s = self._over_s + sum(one.done_s for one in under_way)
        speed = done_s / max(1e-3, time.monotonic() - self._begin)
        self._progress.update(self._task, completed=done_s, speed=f"{speed:.1f} x real time")

    def over(self, seconds: float) -> None:
        """Count what is over and done."""
        self._over_s += seconds

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
