"""How the demonstration looks: plain lines, or on a terminal a picture that moves.

Both show a :class:`Tally`, which is what the published results say so far. No processes and no
sockets: see :mod:`engine.demo`.
"""

from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from engine import messages
from engine.messages import NOTICE, Message
from engine.recordings import Recording

HEART, VOICE = "bed-208", "voice"  # the streams
CLASSES = {
    "N": ("normal", "green"),
    "S": ("supraventricular", "yellow"),
    "V": ("ventricular", "bold red"),
    "F": ("fusion", "magenta"),
    "Q": ("unclassified", "blue"),
}
_STRIP_S = 8.0  # of signal in the picture
_STRIP_ROWS = 6
_OVER = ("inactive", "pending", "resolved")  # states that are no alert
_RECENT = 3  # alerts in the picture
_VOICE_ROWS = 4  # of text
_LINE_S = 10.0  # of signal in a plain line


class Tally:
    """What the published results say so far."""

    def __init__(self, with_voice: bool = False) -> None:
        self.with_voice = with_voice
        self.finals: list[messages.Final] = []
        self.partial = ""  # what is being said
        self.partials = 0
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
                if message.state not in _OVER:
                    self.active[message.rule] = message
            case messages.Partial():
                self.partial = message.text
                self.partials += 1
            case messages.Final():
                self.partial = ""
                self.finals.append(message)

    @property
    def raised(self) -> Counter[str]:
        """How often each rule was raised."""
        return Counter(
            one.rule
            for one in self.changes
            if one.state == "active" and one.from_state in (*_OVER, "latched")
        )

    def ventricular_since(self, index: float) -> int:
        return sum(beat.label == "V" and beat.index >= index for beat in self.beats)


class Lines:
    """One line for each ten seconds of signal, alert that changes, and utterance of the voice."""

    def __init__(self, console: Console, recording: Recording, tally: Tally, _: float) -> None:
        self._console, self._recording, self._tally = console, recording, tally
        self._beats = self._changes = self._finals = 0  # printed
        self._over = False

    def __enter__(self) -> Callable[[], None]:
        return self._show

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._show()

    def _show(self) -> None:
        while self._line_is_due():
            self._print_line()
        for final in self._tally.finals[self._finals :]:
            self._print(f"{VOICE}  {final.text}")
        self._finals = len(self._tally.finals)

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
            *self._voice(width),
        )
        return Panel(
            picture,
            title=f"[bold]murmur[/]  {self._title}",
            subtitle=f"[dim]{how}. {NOTICE}[/]",
            width=width + 4,
            border_style="cyan",
        )

    @property
    def _title(self) -> str:
        voice = " and one voice, word by word" if self._tally.with_voice else ""
        return f"live ECG, one beat at a time{voice}"

    def _progress(self, width: int) -> RenderableType:
        rate_hz, total_s = self._recording.rate_hz, self._recording.seconds
        now_s = min(self._tally.index / rate_hz, total_s)
        row = Table.grid(padding=(0, 1))
        row.add_row(
            Text(f"{HEART}, lead {self._recording.channel}", "bold"),
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
        for name, alert in self._tally.active.items():
            style = "bold white on red" if alert.state == "active" else "red"
            state = "" if alert.state == "active" else f", {alert.state}"
            row.append(f" \u25cf {plain(name)}{state} ", style)
            row.append("  ")
        row.append("" if self._tally.active else "\u25cb none", "dim")
        row.truncate(max(20, min(self._console.width, 120) - 4))
        yield row
        recent = self._tally.changes[-_RECENT:]
        yield from (_change(change) for change in recent)
        yield from (Text() for _ in range(_RECENT - len(recent)))  # the picture keeps its height

    def _voice(self, width: int) -> Iterator[RenderableType]:
        """Draw the last lines of what the voice said, and in grey of what it is saying."""
        if not self._tally.with_voice:
            return
        text = Text(" ".join(final.text for final in self._tally.finals))
        text.append(f" {self._tally.partial}", "bright_black")
        lines = text.wrap(self._console, width - 7)[-_VOICE_ROWS:]
        yield Text()
        for number in range(_VOICE_ROWS):  # the picture keeps its height
            label = "voice  " if not number else " " * 7
            yield Text.assemble((label, "dim"), lines[number] if number < len(lines) else "")


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
    """Say a transition: an alert by its state, and what it was about."""
    style = "green" if alert.state in _OVER else "bold red"
    name = "ALERT" if alert.state == "active" else alert.state
    return Text.assemble(
        (f"{_clock(alert.seconds)}  ", "dim"),
        (f"{name:12}", style),
        f"{plain(alert.rule)}: {alert.value:g}, limit {alert.limit:g}",
    )


def plain(rule: str) -> str:
    return rule.replace("_", " ")


def _clock(seconds: float) -> str:
    return f"{int(seconds // 60)}:{int(seconds % 60):02}"
