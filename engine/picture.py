"""How the demonstration looks: plain lines, or on a terminal a picture that moves.

Both show a :class:`Tally`, which is what the published results say so far. No processes and no
sockets: see :mod:`engine.demo`.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping

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
QUALITY = (("bad", "bold red"), ("poor", "yellow"), ("good", "green"))  # as it is numbered
# What a model hears as the rhythm; "n" to "noise" are the classes of CinC 2017.
_RHYTHMS = {"n": "normal", "a": "AF", "o": "other", "noise": "noise"}
_AF_SUSPECTED = 0.5  # as in the rule of that name
_PRIORITIES = {"high": "red", "medium": "yellow", "low": "cyan"}  # the most urgent first
_STATES = ("active", "latched", "acknowledged", "resolving", "pending", "paused", "off", "resolved")
_STRIP_S = 8.0  # of signal in the picture
_STRIP_ROWS = 6
_OVER = ("inactive", "pending", "resolved")  # states that are no alert
_ALERTS = 4  # in the picture
_RESOLVED_S = 10.0  # for which one that is over stays in it
_VOICE_ROWS = 3  # of text
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
        self.latest: dict[str, messages.Alert] = {}  # by rule: the last transition of each
        self.changes: list[messages.Alert] = []
        self.seconds: list[messages.Measures] = []  # what was known at the end of each
        self.index = 0  # the samples before it have been decided upon

    def take(self, message: Message) -> None:
        match message:
            case messages.Beat():
                self.classes[message.label] += 1
                self.beats.append(message)
                self.index = max(self.index, message.decided_at)
            case messages.Measures() if "flat_line" in message.values:
                self.seconds.append(message)
                self.index = max(self.index, message.decided_at)
            case messages.Alert():
                self.changes.append(message)
                self.latest[message.rule] = message
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
    def known(self) -> Mapping[str, float]:
        """What is known now; a measure that is not known is absent."""
        return self.seconds[-1].values if self.seconds else {}

    @property
    def now_s(self) -> float:
        """Seconds of the signal, as far as an alert or a measure says."""
        told: list[messages.Measures | messages.Alert] = [*self.seconds[-1:], *self.changes[-1:]]
        return max((one.seconds for one in told), default=0.0)

    def in_sight(self) -> list[messages.Alert]:
        """Return the alerts that are not over, or not for long; the most urgent first."""
        shown = [
            one
            for one in self.latest.values()
            if one.state != "inactive"
            and (one.state != "resolved" or self.now_s - one.seconds <= _RESOLVED_S)
        ]
        order = list(_PRIORITIES)
        return sorted(
            shown, key=lambda one: (one.state == "resolved", order.index(one.priority), _rank(one))
        )

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
        self._state = ""  # as it was printed last
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

    def _tens(self, one: messages.Beat | messages.Alert | messages.Measures) -> int:
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
        self._print_state(ten)

    def _print_state(self, ten: int) -> None:
        """Print what the signal and the rhythm were like in these ten seconds, if that is new."""
        known = [one.values for one in self._tally.seconds if self._tens(one) == ten]
        if not known:
            return
        worst = min((int(one["quality"]) for one in known if "quality" in one), default=None)
        signal = "-" if worst is None else QUALITY[worst][0]
        state = f"signal {signal}, rhythm {_rhythm(known[-1], shares=False)}"
        if hrv := _variability(known[-1]):
            state += f", {hrv}"
        if state != self._state:
            self._print(f"      {state}")
        self._state = state

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
            *self._strip(width),
            self._letters(width),
            *self._figures(),
            Text(),
            *self._alerts(width),
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

    def _figures(self) -> Iterator[RenderableType]:
        tally, known = self._tally, self._tally.known
        bpm = tally.beats[-1].heart_rate_bpm if tally.beats else None
        rate = "-" if bpm is None else f"{bpm:.0f}"
        minute = tally.ventricular_since(tally.index - 60 * self._recording.rate_hz)
        quality, colour = QUALITY[int(known["quality"])] if "quality" in known else ("-", "dim")
        first = Text.assemble(
            ("heart rate ", "dim"), (f"{rate:>3}", "bold bright_white"), " bpm   ",
            ("signal ", "dim"), (f"{quality:4}", colour), "   ",
            ("rhythm ", "dim"), _rhythm(known),
        )  # fmt: skip
        second = Text.assemble(
            ("V in the last minute ", "dim"), (f"{minute:>2}", "bold red"), "   ",
            ("variability ", "dim"), _variability(known) or "- (of five minutes)",
        )  # fmt: skip
        counts = Text()
        for label, (name, style) in CLASSES.items():
            if tally.classes[label] or label in "NSV":
                counts.append(f"{label} {tally.classes[label]}", style)
                counts.append(f" {name}   ", "dim")
        yield from (_line(text) for text in (first, second, counts))

    def _alerts(self, width: int) -> Iterator[RenderableType]:
        """Draw a line for each alert that is not over, and for those that just were."""
        shown = self._tally.in_sight()
        left_out = len(shown) - _ALERTS
        for number in range(_ALERTS):  # the picture keeps its height
            row = Text("alerts " if not number else " " * 7, "dim")
            if number < len(shown):
                row.append(_alert(shown[number]))
            elif not number:
                row.append("\u25cb none", "dim")
            if left_out > 0 and number == _ALERTS - 1:
                row.append(f"  and {left_out} more", "dim")
            yield _line(row)

    def _voice(self, width: int) -> Iterator[RenderableType]:
        """Draw the last lines of what the voice said, and in grey of what it is saying."""
        if not self._tally.with_voice:
            return
        text = Text(" ".join(final.text for final in self._tally.finals))
        text.append(f"{' ' if text else ''}{self._tally.partial}", "bright_black")
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


def _line(text: Text) -> Text:
    """Keep a text to one line, whatever the width."""
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def _rank(alert: messages.Alert) -> int:
    return _STATES.index(alert.state)


def _alert(alert: messages.Alert) -> Text:
    """Say how an alert is now: its colour is its priority, reversed while nobody has seen it."""
    colour = _PRIORITIES[alert.priority]
    style = {
        "active": f"bold reverse {colour}",
        "latched": f"reverse {colour}",
        "acknowledged": colour,
        "resolving": colour,
        "resolved": "green",
    }.get(alert.state, "dim")
    name = plain(alert.rule).removesuffix(" suspected")
    text = Text.assemble(
        (f"\u25cf {name:26.26}", style), (f" {alert.state:12} {alert.priority:6}", style)
    )
    text.append(f" {_clock(alert.seconds)}  ", "dim")
    if alert.cannot_monitor:  # other rules, while this one holds
        text.append("cannot monitor", "red")
    else:
        text.append(f"{alert.value:.3g}, limit {alert.limit:g}", "dim")
    return text


def _rhythm(known: Mapping[str, float], shares: bool = True) -> str:
    """Say what the rhythm is: what a model hears, and whether the atria may fibrillate."""
    heard = {name.removeprefix("rhythm_"): p for name, p in known.items() if name[:7] == "rhythm_"}
    parts = []
    if heard:
        best = max(heard, key=lambda name: heard[name])
        parts.append(_RHYTHMS.get(best, best) + (f" {heard[best]:.0%}" if shares else ""))
    if "af_suspected" in known:
        suspected = known["af_suspected"] >= _AF_SUSPECTED
        parts.append("AF suspected" if suspected else "AF not suspected")
    return ", ".join(parts) or "-"


def _variability(known: Mapping[str, float]) -> str:
    """Say the variability of the heart rate; empty while it is not known."""
    if "rmssd_ms" not in known:
        return ""
    return (
        f"RMSSD {known['rmssd_ms']:.0f} ms, SDNN {known['sdnn_ms']:.0f} ms, "
        f"pNN50 {known['pnn50']:.0%}"
    )


def _change(alert: messages.Alert) -> Text:
    """Say a transition: an alert by its state, and what it was about."""
    style = "green" if alert.state in _OVER else "bold red"
    name = "ALERT" if alert.state == "active" else alert.state
    return Text.assemble(
        (f"{_clock(alert.seconds)}  ", "dim"),
        (f"{name:11} ", style),
        f"{plain(alert.rule)}: {alert.value:.3g}, limit {alert.limit:g}",
        f", by {alert.actor}" if alert.actor else "",
    )


def plain(rule: str) -> str:
    return rule.replace("_", " ")


def _clock(seconds: float) -> str:
    return f"{int(seconds // 60)}:{int(seconds % 60):02}"
