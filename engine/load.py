"""Many paced streams from one process, and what became of each chunk.

Used by :mod:`engine.bench`. The streams start evenly spread over one chunk's duration and keep
to an absolute schedule: a late server does not slow them, so lateness shows as latency.
"""

import contextlib
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import zmq
from numpy.typing import NDArray

from engine import messages
from engine.errors import Disconnected, Refused

_PATIENCE_S = 15.0
_LEARNING_S = 2.0


class Signal(NamedTuple):
    """A recording that every stream plays, each from another place."""

    samples: NDArray[np.float32]  # (samples,), or (samples, channels) of several
    rate_hz: float
    unit: str

    @property
    def channels(self) -> int:
        return 1 if self.samples.ndim == 1 else self.samples.shape[1]


class Outcome(NamedTuple):
    """What a run of :class:`Load` saw; times are seconds."""

    latency: NDArray[np.float64]  # chunk-to-event, one for each beat or partial
    final_latency: NDArray[np.float64]  # chunk-to-final, one for each final
    ack_latency: NDArray[np.float64]  # chunk-to-ack, one for each ack
    chunks: int
    late_sends: int  # chunks that the generator itself sent more than 5 ms late
    seconds: float


class Load:
    """Streams over a few connections.

    Parameters
    ----------
    address : str
    model : str
    signal : Signal
    num_streams : int
    chunk_samples : int
    connections : int
    prefix : str
        Of the streams' names.
    """

    def __init__(
        self,
        address: str,
        model: str,
        signal: Signal,
        num_streams: int,
        chunk_samples: int,
        connections: int = 8,
        prefix: str = "load",
    ) -> None:
        self._signal, self._chunk = signal, chunk_samples
        self._names = [f"{prefix}-{number}" for number in range(num_streams)]
        self._number = {name: number for number, name in enumerate(self._names)}
        self._sent: list[list[float]] = [[] for _ in self._names]  # send time of each chunk
        self._acked = [-1] * num_streams
        self._opened = self._unfilled = 0  # streams; chunks that may wait for more
        self._latency: list[float] = []
        self._final_latency: list[float] = []
        self._ack_latency: list[float] = []
        self._starts = np.linspace(0, len(signal.samples) - chunk_samples, num_streams).astype(int)
        self._context = zmq.Context()
        self._sockets = [self._connect(address) for _ in range(min(connections, num_streams))]
        self._poller = zmq.Poller()
        for one in self._sockets:
            self._poller.register(one, zmq.POLLIN)
        self._open(model)

    def run(
        self,
        seconds: float,
        on_start: Callable[[], None] | None = None,
        period_s: float | None = None,
    ) -> Outcome:
        """Send for a while, wait for the last results, and return what was seen.

        What is sent in the first two seconds is not counted: the server learns from it who
        sends when.

        Parameters
        ----------
        seconds : float
            That are counted.
        on_start : callable, optional
            Called when the counting begins.
        period_s : float, optional
            Time between two chunks of a stream; default: their duration, real time.
        """
        period_s = period_s or self._chunk / self._signal.rate_hz
        interval = period_s / len(self._names)
        begin = time.monotonic()
        self._pace(begin, interval, round(_LEARNING_S / interval))
        if on_start is not None:
            on_start()
        for latency in (self._latency, self._final_latency, self._ack_latency):
            latency.clear()
        total = round(seconds / interval)
        late = self._pace(begin + _LEARNING_S, interval, total)
        self._settle()
        return Outcome(
            np.array(self._latency),
            np.array(self._final_latency),
            np.array(self._ack_latency),
            total,
            late,
            seconds,
        )

    def _pace(self, begin: float, interval: float, total: int) -> int:
        """Send so many chunks at their times; return how many were sent late."""
        sent = late = 0
        while sent < total:
            now = time.monotonic()
            due = min(total, math.ceil((now - begin) / interval))
            for number in range(sent, due):
                late += now - begin - number * interval > 0.005
                self._send(number % len(self._names))
            sent = due
            self._receive(min(0.001, interval))
        return late

    def send_one_each(self) -> None:
        """Send one chunk of every stream as fast as they are taken."""
        for number in range(len(self._names)):
            self._send(number)
            if number % 64 == 0:
                self._receive(0.001)
        self._settle()

    def close(self) -> None:
        for one in self._sockets:
            one.close(linger=0)
        self._context.term()

    def _connect(self, address: str) -> zmq.Socket[bytes]:
        one = self._context.socket(zmq.DEALER)
        one.setsockopt(zmq.SNDHWM, 100_000)
        one.setsockopt(zmq.RCVHWM, 100_000)
        one.connect(address)
        one.send(_body(messages.Hello(messages.VERSION, "murmur-load")))
        return one

    def _open(self, model: str) -> None:
        for number, name in enumerate(self._names):
            signal = self._signal
            request = messages.Open(name, model, signal.rate_hz, signal.unit, signal.channels)
            self._socket(number).send(_body(request))
            if number % 256 == 0:
                self._receive(0.001)
        self._wait(lambda: self._opened == len(self._names))

    def _socket(self, number: int) -> zmq.Socket[bytes]:
        return self._sockets[number % len(self._sockets)]

    def _send(self, number: int) -> None:
        sent = self._sent[number]
        seq = len(sent)
        place = (self._starts[number] + seq * self._chunk) % (
            len(self._signal.samples) - self._chunk
        )
        data = self._signal.samples[place : place + self._chunk].tobytes()
        chunk = messages.Chunk(self._names[number], seq, seq * self._chunk, data)
        sent.append(time.monotonic())
        self._socket(number).send(_body(chunk))

    def _settle(self) -> None:
        """Wait until every chunk is acknowledged, but for those that fill no hop."""
        self._wait(
            lambda: all(
                acked >= len(sent) - 1 - self._unfilled
                for acked, sent in zip(self._acked, self._sent, strict=True)
            )
        )

    def _wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while not condition():
            self._receive(0.01)
            if time.monotonic() > deadline:
                raise Disconnected(f"no progress for {_PATIENCE_S:g} s")

    def _receive(self, timeout_s: float) -> None:
        for one, _ in self._poller.poll(math.ceil(timeout_s * 1000)):
            with contextlib.suppress(zmq.Again):
                while True:
                    body = one.recv(zmq.NOBLOCK)
                    now = time.monotonic()
                    for message in messages.decode_replies(body):
                        self._take(message, now)

    def _take(self, message: messages.Reply, now: float) -> None:
        match message:
            case messages.Ack():
                number = self._number[message.stream]
                self._acked[number] = message.seq
                self._ack_latency.append(now - self._sent[number][message.seq])
            case messages.Beat():
                self._latency.append(self._since(message.stream, message.decided_at, now))
            case messages.Partial():
                self._latency.append(self._since(message.stream, message.index, now))
            case messages.Final():
                self._final_latency.append(self._since(message.stream, message.endpoint, now))
            case messages.Opened():
                self._opened += 1
                self._unfilled = int(message.hop_s * self._signal.rate_hz) // self._chunk
            case messages.Error():
                raise Refused(message.code, message.reason)
            case messages.Closed():
                raise Refused(message.reason, f"{message.stream} was closed")

    def _since(self, stream: str, needed: int, now: float) -> float:
        """Return the time since the chunk was sent that held the last sample which was needed."""
        return now - self._sent[self._number[stream]][(needed - 1) // self._chunk]


def _body(message: messages.Message) -> bytes:
    return messages.body([messages.encode(message)])
