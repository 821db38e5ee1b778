"""A microphone on its way to a server, and its text as it comes: partials in grey, then finals.

Sound is taken at the device's own rate and sent as it is; samples that the device or a full queue
lost are left out of the count of none: the index moves on, and the server tells the gap. Needs
the extra ``mic``, and PortAudio.
"""

import signal
import time
import uuid
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.live import Live
from rich.text import Text

from engine import keys
from engine.child import running, served
from engine.client import Client, Stream
from engine.dictation import UNIT
from engine.errors import Disconnected, MurmurError, Refused
from engine.messages import Error, Final, Gap, Message, Partial, Speech
from engine.scoring import quantiles

_QUEUED_S = 10.0  # of sound that may wait for the server; more is lost, and told as a gap
_TURN_S = 0.05  # between two looks at the microphone
_SILENT_S = 5.0  # without a sample: the device is gone
_REMEMBERED = 4096  # chunks of which it is known when they were sent: minutes
_FULL_SCALE = 0.999
_FLOOR_DB = -60.0
_METER_CELLS = 12
_CLIP_SHOWN_S = 1.0


class Block(NamedTuple):
    """Sound from a device, in order."""

    lost: int  # samples that are missing before it
    samples: NDArray[np.float32]  # (samples,) in [-1, 1]


class Microphone:
    """An input device that is open.

    Parameters
    ----------
    device : int or str, optional
        Number or part of a name; default: the system's.

    Raises
    ------
    MurmurError
        If PortAudio, the device, or any device is missing; the message says what there is.

    Attributes
    ----------
    name : str
    rate_hz : float
    overflows, lost_samples : int
        How often samples were lost, and how many.
    """

    def __init__(self, device: int | str | None = None) -> None:
        library = _sounddevice()
        info = _find(library, device)
        self.name = str(info["name"])
        self.rate_hz = float(info["default_samplerate"])
        self.overflows = self.lost_samples = 0
        self._blocks: deque[Block] = deque()
        self._queued = self._lost = 0
        self._due: float | None = None  # when the next block's first sample should be measured
        self._came = time.monotonic()
        self._stream = self._open(library, info)

    def __enter__(self) -> "Microphone":
        self._came = time.monotonic()
        self._stream.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def take(self) -> Iterator[Block]:
        """Yield what has come meanwhile, each stretch without a loss as one block.

        Raises
        ------
        MurmurError
            If nothing has come for so long that the device must be gone.
        """
        parts: list[Block] = []
        while self._blocks:
            block = self._blocks.popleft()
            self._queued -= len(block.samples)
            if block.lost and parts:
                yield _joined(parts)
                parts = []
            parts.append(block)
        if parts:
            yield _joined(parts)
        if time.monotonic() - self._came > _SILENT_S:
            raise MurmurError(f"{self.name}: no sound for {_SILENT_S:g} s, is it unplugged?")

    def heard(self, sound: NDArray[np.float32], _: int, times: Any, status: Any) -> None:
        """Take a block from PortAudio's thread: (samples, channels), its times and flags."""
        self._came = time.monotonic()
        began = times.inputBufferAdcTime
        if status.input_overflow:
            # PortAudio says that samples were lost, and by its clock how many.
            missing = 0 if self._due is None else round((began - self._due) * self.rate_hz)
            self._lose(max(1, missing))
        self._due = began + len(sound) / self.rate_hz
        if self._queued + len(sound) > _QUEUED_S * self.rate_hz:
            self._lose(len(sound))
            return
        self._queued += len(sound)
        self._blocks.append(Block(self._lost, sound.mean(axis=1, dtype=np.float32)))
        self._lost = 0

    def _lose(self, samples: int) -> None:
        self.overflows += not self._lost  # one after another is one
        self.lost_samples += samples
        self._lost += samples

    def _open(self, library: Any, info: Any) -> Any:
        """Open the device with one channel, or with all where it has not one alone."""
        fault: Exception | None = None
        for channels in sorted({1, int(info["max_input_channels"])}):
            try:
                return library.InputStream(
                    device=info["index"],
                    samplerate=self.rate_hz,
                    channels=channels,
                    dtype="float32",
                    callback=self.heard,
                )
            except library.PortAudioError as error:
                fault = error
        raise MurmurError(f"{self.name}: cannot be opened at {self.rate_hz:g} Hz: {fault}")


def devices() -> list[dict[str, Any]]:
    """Return the input devices that there are, the default one marked."""
    library = _sounddevice()
    chosen = library.default.device[0]
    return [
        {
            "device": info["index"],
            "name": info["name"],
            "channels": info["max_input_channels"],
            "rate_hz": info["default_samplerate"],
            "default": info["index"] == chosen,
        }
        for info in library.query_devices()
        if info["max_input_channels"] > 0
    ]


def device_line(device: dict[str, Any]) -> str:
    star = "*" if device["default"] else " "
    about = f"{device['channels']} channels, {device['rate_hz']:g} Hz"
    return f"{star} {device['device']:3}  {device['name']}  ({about})"


def _sounddevice() -> Any:
    try:
        return import_module("sounddevice")
    except ImportError:
        raise MurmurError(
            "a microphone needs sounddevice: pip install 'murmur-engine[mic]'"
        ) from None
    except OSError as error:
        raise MurmurError(
            f"sounddevice needs PortAudio: apt install libportaudio2, or brew install portaudio "
            f"({error})"
        ) from None


def _find(library: Any, device: int | str | None) -> Any:
    try:
        return library.query_devices(device, "input")
    except (ValueError, library.PortAudioError):
        found = [device_line(one) for one in devices()]
        wanted = "a microphone" if device is None else f"an input device {device!r}"
        there = "\n" + "\n".join(found) if found else " none: PortAudio sees no input device"
        raise MurmurError(f"expected {wanted}, found{there}") from None


def _joined(parts: list[Block]) -> Block:
    return Block(parts[0].lost, np.concatenate([part.samples for part in parts]))


# --- what is shown ---------------------------------------------------------------------------


class Meter:
    """How loud it is, and whether it was too loud."""

    def __init__(self) -> None:
        self.level_db = _FLOOR_DB
        self.clipped = 0
        self._clipped_at = -_CLIP_SHOWN_S

    def take(self, samples: NDArray[np.float32], now: float) -> None:
        loud = float(np.sqrt(np.mean(samples**2)))
        self.level_db = max(_FLOOR_DB, 20 * float(np.log10(loud + 1e-9)))
        clipped = int(np.count_nonzero(np.abs(samples) >= _FULL_SCALE))
        if clipped:
            self.clipped += clipped
            self._clipped_at = now

    def text(self, now: float) -> Text:
        cells = round((1 - self.level_db / _FLOOR_DB) * _METER_CELLS)
        rest = "\u2591" * (_METER_CELLS - cells)
        bar = Text.assemble(("\u2588" * cells, "green"), (rest, "dim"))
        if now - self._clipped_at < _CLIP_SHOWN_S:
            bar.append(" CLIPPED", "bold red")
        return bar


class Display(Protocol):
    """What shows a dictation as it goes on."""

    def take(self, message: Message) -> None:
        """Show a result."""

    def move(self, meter: Text) -> None:
        """Show how loud it is."""


class Screen:
    """On a terminal: the level, what is being said in grey, and above it what was said."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._partial, self._meter = "", Text()
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> "Screen":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def take(self, message: Message) -> None:
        if isinstance(message, Partial):
            self._partial = message.text
        elif isinstance(message, Final):
            self._partial = ""
            self._say(message.text, "")
        elif isinstance(message, Gap):
            self._say(_gap(message), "yellow")
        elif isinstance(message, Error):
            self._say(f"{message.code}: {message.reason}", "red")

    def move(self, meter: Text) -> None:
        self._meter = meter
        self._live.update(self._line(), refresh=True)

    def _say(self, line: str, style: str) -> None:
        """Print a line above the moving one, which no longer holds what became final."""
        self._live.update(self._line(), refresh=True)
        if line:
            self._console.print(Text(line, style))

    def _line(self) -> Text:
        room = max(20, 3 * self._console.width - len(self._meter) - 3)  # three lines
        told = self._partial if len(self._partial) <= room else f"\u2026{self._partial[-room:]}"
        return Text.assemble(self._meter, (f"  {told}", "bright_black"))


class Lines:
    """Elsewhere: a line for each final, or a JSON object for each message."""

    def __init__(self, echo: Callable[[str], None], as_json: bool) -> None:
        self._echo, self._as_json = echo, as_json

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held."""

    def take(self, message: Message) -> None:
        if self._as_json:
            self._echo(msgspec.json.encode(message).decode())
        elif isinstance(message, Final) and message.text:
            self._echo(message.text)
        elif isinstance(message, Gap):
            self._echo(_gap(message))

    def move(self, meter: Text) -> None:
        """There is nothing to move."""


def _gap(gap: Gap) -> str:
    return f"[{gap.end - gap.start} samples from {gap.start} were lost]"


# --- the dictation ---------------------------------------------------------------------------


class Session:
    """A microphone's stream, from the first sample to the last final."""

    def __init__(
        self, microphone: Microphone, client: Client, stream: Stream, display: Display
    ) -> None:
        self._microphone, self._client, self._stream = microphone, client, stream
        self._display = display
        self._meter = Meter()
        self._sent: deque[tuple[int, float]] = deque(maxlen=_REMEMBERED)
        self._lags: list[float] = []
        self.samples = self._index = self.finals = self.words = 0

    @property
    def about(self) -> str:
        return f"listening to {self._microphone.name} at {self._microphone.rate_hz:g} Hz"

    def turn(self, timeout_s: float) -> None:
        """Send what the microphone has, wait for the server a little, and show what came of it."""
        for block in self._microphone.take():
            self._stream.skip(block.lost)
            self._index += block.lost + len(block.samples)
            self.samples += len(block.samples)
            self._sent.append((self._index, time.monotonic()))
            self._stream.send(block.samples)
            self._meter.take(block.samples, time.monotonic())
        self._hear(timeout_s)
        self._display.move(self._meter.text(time.monotonic()))

    def finish(self) -> None:
        """Have the rest transcribed, show it, and end the stream."""
        self._stream.flush()
        self._hear()
        self._stream.close()
        self._hear()

    def report(self) -> dict[str, Any]:
        """Return what ``--json`` prints last."""
        lag = quantiles(self._lags)
        return {
            "figure": lag.p90_s if lag else None,
            "what": "from sending an endpoint's last sample to its final, 90th percentile, s",
            "device": self._microphone.name,
            "rate_hz": self._microphone.rate_hz,
            "seconds": self.samples / self._microphone.rate_hz,
            "finals": self.finals,
            "words": self.words,
            "overflows": self._microphone.overflows,
            "lost_samples": self._microphone.lost_samples,
            "clipped_samples": self._meter.clipped,
            "endpoint_sent_to_final": lag._asdict() if lag else None,
        }

    def _hear(self, timeout_s: float = 0.0) -> None:
        for at, message in self._client.timed_events(timeout_s):
            if not isinstance(message, Partial | Final | Gap | Error):
                continue
            if isinstance(message, Final):
                self._note(at, message)
            self._display.take(message)

    def _note(self, at: float, final: Final) -> None:
        self.finals += 1
        self.words += len(final.words)
        sent = list(self._sent)
        number = bisect_left(sent, (final.endpoint, 0.0))
        if final.reason == "silence" and number < len(sent):
            self._lags.append(at - sent[number][1])


def run(
    device: int | str | None,
    model: str,
    display: Screen | Lines,
    ready: Callable[[str], None],
    stream: str | None = None,
    address: str | None = None,
    speech: Speech = Speech(),  # noqa: B008, frozen
    seconds: float = float("inf"),
    timeout_s: float = 10.0,
) -> dict[str, Any]:
    """Listen until Ctrl-C, SIGTERM or the end of the time; then flush, and report.

    Parameters
    ----------
    device : int or str, optional
    model : str
    display : Screen or Lines
    ready : callable
        Called with a line for a person once what is said is heard.
    stream : str, optional
        Its name on the server.
    address : str, optional
        Of a running server; default: one is started for the purpose.
    speech : Speech
    seconds : float
    timeout_s : float

    Returns
    -------
    dict
        Key ``fault`` if the microphone went away meanwhile.

    Raises
    ------
    MurmurError
        If there is no microphone, or no server.
    """
    microphone = Microphone(device)  # first: a server takes seconds to start
    with (
        running(model, address) as (found, _),
        Client(found, timeout_s, keys.ours(address)) as client,
    ):
        name = stream or f"mic-{uuid.uuid4().hex[:6]}"
        opened = client.open(name, served(client, model), microphone.rate_hz, UNIT, speech=speech)
        session = Session(microphone, client, opened, display)
        fault: str | None = None
        with _interrupts() as interrupted, microphone, display:
            try:
                _listen(session, ready, seconds, interrupted)
            except (Disconnected, Refused):
                raise
            except MurmurError as error:  # the microphone's: what it gave is worth finishing
                fault = str(error)
            session.finish()
        return session.report() | ({"fault": fault} if fault else {})


def _listen(
    session: Session, ready: Callable[[str], None], seconds: float, interrupted: Sequence[int]
) -> None:
    """Turn until the time is over; it counts from the first sample, which may take a while."""
    told, end = False, float("inf")
    while not interrupted and time.monotonic() < end:
        session.turn(_TURN_S)
        if session.samples and not told:
            told, end = True, time.monotonic() + seconds
            ready(f"{session.about}; Ctrl-C ends")
    session.turn(0.0)


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collect the first SIGINT and SIGTERM, so that what is under way can be finished."""
    came: list[int] = []

    def note(number: int, _: object) -> None:
        if came:
            raise KeyboardInterrupt  # a second one does not wait
        came.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
