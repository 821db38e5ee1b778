"""A recording, played to a running server in chunks at a multiple of real time.

Where the recording has no samples none are sent: the sample index jumps, and the server tells
the gap. No files here, see :mod:`engine.recordings`.
"""

import re
import time
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np

from engine import messages
from engine.client import Client, Stream
from engine.messages import Message
from engine.recordings import Recording, stretches


class Latency(msgspec.Struct, frozen=True):
    """From handing over the chunk that decided a result until the result has come, in ms."""

    p50_ms: float
    p99_ms: float
    max_ms: float
    results: int


class Summary(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="summary"):
    """What became of a replay."""

    record: str
    channel: str
    start: str | None  # ISO 8601
    rate_hz: float
    unit: str
    speed: float  # 0: as fast as credit allowed
    signal_s: float  # of what was played
    wall_s: float
    chunks: int
    acknowledged: int  # of them
    samples: int
    missing_samples: int  # that the recording lacks: not sent
    results: dict[str, int]  # by type
    errors: list[str]
    closed: str  # why the stream ended; "closed": it was asked to
    latency: Latency | None  # None: no result was decided by a chunk


def play(
    client: Client,
    stream: Stream,
    recording: Recording,
    tell: Callable[[Message], None],
    speed: float = 1.0,
    chunk_s: float = 0.5,
) -> Summary:
    """Send a recording, hand on each result as it comes, and end the stream.

    Parameters
    ----------
    client : Client
    stream : Stream
        Of that client, newly opened with the recording's rate and unit.
    recording : Recording
    tell : callable
        Takes each result, gap and error, and the end of the stream.
    speed : float
        Multiple of real time: a chunk is sent when its last sample would have been measured.
        0: as fast as credit allows.
    chunk_s : float
        Seconds of signal in a chunk.

    Raises
    ------
    Refused, Disconnected
        If the server ends the stream, or does not answer.
    """
    hearing = _Hearing(client, tell)
    longest = max(1, round(chunk_s * recording.rate_hz))
    begin, place, samples = time.monotonic(), 0, 0
    for start, end in _chunks(recording, longest):
        if speed > 0:
            hearing.until(begin + end / recording.rate_hz / speed)
        stream.skip(start - place)
        hearing.handing(end)
        stream.send(recording.samples[start:end])
        hearing.take()
        place, samples = end, samples + end - start
    stream.flush()
    hearing.take()
    closed = stream.close()
    hearing.take()
    return Summary(
        record=recording.name,
        channel=recording.channel,
        start=recording.start.isoformat() if recording.start else None,
        rate_hz=recording.rate_hz,
        unit=recording.unit,
        speed=speed,
        signal_s=recording.seconds,
        wall_s=time.monotonic() - begin,
        chunks=len(hearing.ends),
        acknowledged=bisect_right(hearing.ends, stream.acked_index),
        samples=samples,
        missing_samples=len(recording.samples) - samples,
        results=dict(hearing.results),
        errors=hearing.errors,
        closed=closed.reason,
        latency=hearing.latency(),
    )


def request(
    recording: Recording, model: str, stream: str | None = None, **further: Any
) -> dict[str, Any]:
    """Return the arguments of :meth:`Client.open` for a recording, with some further ones."""
    channels = 1 if recording.samples.ndim == 1 else recording.samples.shape[1]
    names = [recording.channel] if channels == 1 else recording.channel.split(", ")
    named = tuple(messages.Channel(name[:256]) for name in names)
    return {
        "stream": stream or stream_name(recording),
        "model": model,
        "rate_hz": recording.rate_hz,
        "unit": recording.unit,
        "channels": channels,
        "channel_info": named if len(named) == channels else (),
        **further,
    }


def stream_name(recording: Recording) -> str:
    """Return a name for a recording's stream, of the letters that the wire allows."""
    return re.sub(r"[^A-Za-z0-9_.:-]", "-", recording.name).lstrip("_.:-")[:64] or "replay"


def _chunks(recording: Recording, longest: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each chunk; none holds a missing sample."""
    for start, end in stretches(recording.samples):
        for cut in range(start, end, longest):
            yield cut, min(cut + longest, end)


class _Hearing:
    """What the client hears while a recording is played, and when."""

    def __init__(self, client: Client, tell: Callable[[Message], None]) -> None:
        self._client, self._tell = client, tell
        self.ends: list[int] = []  # the index after each chunk
        self._handed_at: list[float] = []
        self._latencies: list[float] = []
        self.results: Counter[str] = Counter()
        self.errors: list[str] = []

    def handing(self, end: int) -> None:
        """Note that a chunk, up to this index, is about to be given to the client."""
        self.ends.append(end)
        self._handed_at.append(time.monotonic())

    def until(self, due: float) -> None:
        """Take what comes until a time."""
        while (left_s := due - time.monotonic()) > 0:
            self.take(left_s)

    def take(self, timeout_s: float = 0.0) -> None:
        for message in self._client.events(timeout_s):
            now = time.monotonic()
            if isinstance(message, messages.Error):
                self.errors.append(f"{message.code}: {message.reason}")
            elif not isinstance(message, messages.Closed):
                self.results[type(message).__name__.lower()] += 1
                self._time(message, now)
            self._tell(message)

    def latency(self) -> Latency | None:
        if not self._latencies:
            return None
        p50, p99, longest = np.percentile(self._latencies, [50, 99, 100]) * 1e3
        return Latency(float(p50), float(p99), float(longest), len(self._latencies))

    def _time(self, message: Message, now: float) -> None:
        match message:
            case messages.Beat() | messages.Measures() | messages.Alert():
                last = message.decided_at
            case messages.Scores() | messages.Partial():
                last = message.index
            case messages.Final():
                last = message.endpoint
            case _:
                return
        number = bisect_left(self.ends, last)
        if number < len(self.ends):  # else the flush decided it
            self._latencies.append(now - self._handed_at[number])
