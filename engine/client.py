"""The other end: open streams, send NumPy samples, iterate over what comes back.

::

    with Client() as client:
        stream = client.open("bed-7", "heart", rate_hz=360, unit="mV")
        for chunk in chunks:
            stream.send(chunk)
            for event in client.events():
                print(event)
        stream.flush()

One thread, one socket, any number of streams. Sending waits while a stream has no credit. When
the server goes away and comes back, the client opens its streams again and sends once more what
was not acknowledged.
"""

import contextlib
import secrets
import time
import uuid
from collections import deque
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import zmq
from numpy.typing import ArrayLike, NDArray

from engine import messages
from engine.errors import Disconnected, Refused
from engine.keys import Handshake, Identity
from engine.messages import Message

DEFAULT_ADDRESS = "tcp://127.0.0.1:7700"
_PING_S = 2.0
_RETRY_S = 0.5
_SPEECH = messages.Speech()


class Stream:
    """One signal on its way; made by :meth:`Client.open`.

    Attributes
    ----------
    closed : messages.Closed or None
        Once the server has ended the stream: why, and its counts.
    """

    def __init__(self, client: "Client", request: messages.Open) -> None:
        self._client = client
        self.request = request
        self.name = request.stream
        self.closed: messages.Closed | None = None
        self._dtype = np.dtype("<" + request.dtype)
        self._seen: dict[str, int] = {}  # highest number, by type of result
        self._seq = 0
        self._index = request.index
        self._acked = request.index
        self._in_flight = 0  # samples sent and not acknowledged; skipped ones take no room
        self._credit = 0  # none until the server has opened the stream
        self._largest = 0  # samples in a chunk
        # Sent and not acknowledged; of the chunks the samples are in flight.
        self._kept: deque[messages.Chunk | messages.Flush] = deque()
        self._flushes = self._flushed = 0  # asked for, answered
        self._closing = False

    def send(
        self,
        samples: ArrayLike,
        t_device: float | None = None,
        flags: messages.Flags | None = None,
    ) -> None:
        """Send samples, after those of the last call; waits while there is no credit.

        Parameters
        ----------
        samples : (samples,) or (samples, channels)
            In the units of the open request: `gain` and `offset` are applied by the server.
        t_device : float, optional
            Seconds of the first of them, by the clock that the open request names.
        flags : messages.Flags, optional
            What the device says of all of them.

        Raises
        ------
        Refused
            If the server has ended the stream.
        Disconnected
            If the server is gone for longer than the client's time limit.
        """
        values = self._shaped(samples)
        limit = self._client.max_chunk_bytes // (self._dtype.itemsize * self.request.channels)
        limit = max(1, min(limit, self._largest))
        for start in range(0, len(values), limit):
            time_s = None if t_device is None else t_device + start / self.request.rate_hz
            self._send(values[start : start + limit], time_s, flags)

    def skip(self, samples: int) -> None:
        """Leave out samples that are missing: the next chunk begins so much later.

        The server tells the gap once that chunk has come.

        Parameters
        ----------
        samples : int
            Per channel; none changes nothing.
        """
        if samples < 0:
            raise ValueError(f"samples: expected 0 or more, found {samples}")
        self._index += samples

    @property
    def acked_index(self) -> int:
        """The effects of all samples before this index are out."""
        return self._acked

    @property
    def room(self) -> int:
        """How many samples can be sent now without waiting."""
        return max(0, self._credit - self._in_flight)

    def flush(self) -> int:
        """Force the tail out and wait until it is through; return the server's sample index.

        Results that come meanwhile are kept for :meth:`Client.events`.
        """
        self.ask_flush()
        self._client.wait(lambda: not self.flushing or self.closed is not None)
        self._raise_if_closed()
        return self._acked

    def ask_flush(self) -> None:
        """Ask for the tail and go on; :attr:`flushing` says until when it is on its way."""
        self._flushes += 1
        flush = messages.Flush(self.name, self._flushes)
        self._kept.append(flush)
        self._client.tell(flush)

    @property
    def flushing(self) -> bool:
        """Whether a flush has been asked for and is not through."""
        return self._flushed < self._flushes

    def close(self) -> messages.Closed:
        """End the stream and return its counts, once all that was sent is through."""
        self.ask_close()
        self._client.wait(lambda: self.closed is not None)
        assert self.closed is not None
        self._client.forget(self.name)
        return self.closed

    def ask_close(self) -> None:
        """Ask for the end and go on; then comes :attr:`closed`."""
        if self.closed is None and not self._closing:
            self._closing = True
            self._client.tell(messages.Close(self.name))

    def _shaped(self, samples: ArrayLike) -> NDArray[Any]:
        values = np.asarray(samples)
        channels = self.request.channels
        if values.ndim == 1 and channels == 1:
            values = values[:, None]
        if values.ndim != 2 or values.shape[1] != channels:
            raise ValueError(f"samples: expected (any, {channels}), found {values.shape}")
        return np.ascontiguousarray(values, self._dtype)

    def _send(
        self, values: NDArray[Any], t_device: float | None, flags: messages.Flags | None
    ) -> None:
        self._client.wait(
            lambda: self._in_flight + len(values) <= self._credit or self.closed is not None
        )
        self._raise_if_closed()
        t_published = None if self.request.clock is None else time.time()
        chunk = messages.Chunk(
            self.name, self._seq, self._index, values.tobytes(), t_device, t_published, flags
        )
        self._seq += 1
        self._index += len(values)
        self._in_flight += len(values)
        self._kept.append(chunk)
        self._client.tell(chunk)

    def _samples(self, chunk: messages.Chunk) -> int:
        return len(chunk.data) // (self._dtype.itemsize * self.request.channels)

    def _raise_if_closed(self) -> None:
        if self.closed is not None:
            raise Refused(self.closed.reason, self._client.last_error or self.closed.reason)

    # Called by the client with what the server says.

    def opened(self, message: messages.Opened) -> None:
        self._credit = message.credit
        self._largest = message.credit // 4
        if message.resumed:
            for kept in self._kept:
                if isinstance(kept, messages.Flush) or kept.seq >= message.seq:
                    self._client.tell(kept)
            if self._closing:
                self._client.tell(messages.Close(self.name))

    @property
    def is_open(self) -> bool:
        return self._credit > 0 and self.closed is None

    def is_new(self, message: messages.Numbered) -> bool:
        """Return whether a result has not come before; from then on it has."""
        if not message.life:
            return True
        kind = type(message).__name__
        if message.life != self.request.life or message.number <= self._seen.get(kind, 0):
            return False
        self._seen[kind] = message.number
        return True

    def acked(self, message: messages.Ack) -> None:
        if not self._credit:
            return  # meant for the connection before: chunks may be numbered anew since
        self._acked = max(self._acked, message.index)
        self._forget(message.seq, self._flushed)

    def flushed(self, message: messages.Flushed) -> None:
        self._flushed = max(self._flushed, message.id)
        self._acked = max(self._acked, message.index)
        if self._credit:
            self._forget(-1, message.id)

    def _forget(self, seq: int, flush: int) -> None:
        """Let go of chunks and flushes up to these."""
        while self._kept:
            first = self._kept[0]
            if isinstance(first, messages.Flush):
                if first.id > flush:
                    return
            elif first.seq > seq:
                return
            else:
                self._in_flight -= self._samples(first)
            self._kept.popleft()

    def refused(self, error: messages.Error) -> None:
        """Take that a server that has forgotten this stream does not open it once more."""
        self.closed = messages.Closed(self.name, error.code, 0, 0, 0, 0, 0)

    def resume(self) -> messages.Open:
        """Return what asks a server to go on with this stream; what it lacks is sent then."""
        self._credit = 0
        seen = {kind.lower(): number for kind, number in self._seen.items()}
        return msgspec.structs.replace(self.request, resume=True, seen=seen)

    def begin_anew(self) -> list[Message]:
        """Return what brings a server that knows nothing of this stream to where the last was.

        As far as a server can be that has not heard what was acknowledged: state begins anew.
        """
        # From where it was acknowledged: what was skipped since then is told as a gap once more.
        self.request = msgspec.structs.replace(self.request, index=self._acked, life=_life())
        self._seen, self._seq = {}, 0
        kept: list[messages.Chunk | messages.Flush] = []
        for one in self._kept:
            if isinstance(one, messages.Chunk):
                one = msgspec.structs.replace(one, seq=self._seq)
                self._seq += 1
            kept.append(one)
        self._kept = deque(kept)
        closing: list[Message] = [messages.Close(self.name)] if self._closing else []
        return [self.request, *kept, *closing]


class Client:
    """A connection to a server.

    Parameters
    ----------
    address : str
    timeout_s : float
        How long to wait for a server that does not answer, before :exc:`Disconnected`.
    identity : Identity, optional
        The client's key and the server's; None: the server asks for none.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        timeout_s: float = 10.0,
        identity: Identity | None = None,
    ) -> None:
        self.address, self.timeout_s, self._keys = address, timeout_s, identity
        self.welcome: messages.Welcome | None = None
        self.last_error = ""
        self._streams: dict[str, Stream] = {}
        self._events: deque[tuple[float, Message]] = deque()
        self._refusals: dict[str, Refused] = {}
        self._asked = self._adopted = 0
        self._answers: dict[int, messages.AlertList] = {}
        # One identity for all connections: the server knows who opens a stream once more.
        self._identity = uuid.uuid4().hex.encode()
        self._context = zmq.Context()
        self._socket = self._connect()
        self._pinged = self._heard = time.monotonic()
        self._recover_at: float | None = None
        self._recovered = self._heard
        try:
            with Handshake(self._socket) as handshake:
                self.tell(messages.Hello(messages.VERSION, "murmur-python"))
                self.wait(
                    lambda: self.welcome is not None or "" in self._refusals or handshake.refused()
                )
            if self.welcome is None:
                raise self._refusals.get("") or Disconnected(f"{address}: {handshake.reason}")
        except (Disconnected, Refused):
            self._socket.close(linger=0)
            self._context.term()
            raise

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(
        self,
        stream: str,
        model: str,
        rate_hz: float,
        unit: str,
        *,
        channels: int = 1,
        dtype: messages.Dtype = "f4",
        gain: float = 1.0,
        offset: float = 0.0,
        index: int = 0,
        latency_ms: float | None = None,
        speech: messages.Speech = _SPEECH,
        subject: str | None = None,
        device: messages.Device | None = None,
        channel_info: tuple[messages.Channel, ...] = (),
        clock: messages.Clock | None = None,
    ) -> Stream:
        """Start a stream; see :class:`engine.messages.Open` for what the values mean.

        Raises
        ------
        Refused
            With the server's code and reason.
        """
        request = messages.Open(
            stream,
            model,
            rate_hz,
            unit,
            channels,
            dtype,
            gain,
            offset,
            index,
            latency_ms,
            speech,
            subject,
            device,
            channel_info,
            clock,
            _life(),
        )
        try:
            msgspec.convert(msgspec.to_builtins(request), messages.Open)
        except msgspec.ValidationError as error:
            # The server's answer to a malformed message cannot say whose it was.
            raise Refused("malformed", f"stream {stream!r}: {error}") from None
        one = self._streams[stream] = Stream(self, request)
        self._refusals.pop(stream, None)
        self.tell(request)
        self.wait(lambda: one.is_open or stream in self._refusals)
        if stream in self._refusals:
            del self._streams[stream]
            raise self._refusals.pop(stream)
        return one

    def ask(self, request: messages.AlertRequest) -> messages.AlertList:
        """Acknowledge, pause, resume or list alerts; return those that are active then.

        Raises
        ------
        Refused
            If there is no such alert.
        """
        self._asked += 1
        self._refusals.pop("", None)
        self.tell(msgspec.structs.replace(request, id=self._asked))
        self.wait(lambda: self._asked in self._answers or "" in self._refusals)
        if "" in self._refusals:
            raise self._refusals.pop("")
        return self._answers.pop(self._asked)

    def drain(self, to: str, publish: str, key: str = "") -> None:
        """Let the server give all its streams to another, and stop.

        Raises
        ------
        Refused
            If the other does not take them; then all is as it was.
        """
        self._refusals.pop("", None)
        before = self.address
        self.tell(messages.Drain(to, publish, key))
        self.wait(lambda: self.address != before or "" in self._refusals)
        if "" in self._refusals:
            raise self._refusals.pop("")

    def wait_for_answers(self, count: int) -> None:
        """Wait until the server has taken all of so many checkpoints that it was told to adopt.

        Raises
        ------
        Refused
            If it does not take one.
        """
        self.wait(lambda: self._adopted >= count or "" in self._refusals)
        if "" in self._refusals:
            raise self._refusals.pop("")

    def events(self, timeout_s: float = 0.0) -> Iterator[Message]:
        """Yield results, gaps, errors and ends of streams that have come.

        Parameters
        ----------
        timeout_s : float
            How long to wait for the first, if none is there yet.
        """
        for _, message in self.timed_events(timeout_s):
            yield message

    def timed_events(self, timeout_s: float = 0.0) -> Iterator[tuple[float, Message]]:
        """Yield the same with the time of the monotonic clock at which each came in."""
        self._receive(0.0)
        if not self._events and timeout_s > 0:
            self._receive(timeout_s)
        while self._events:
            yield self._events.popleft()

    @property
    def silent_s(self) -> float:
        """For how long nothing has come, as far as this client has looked."""
        return time.monotonic() - self._heard

    def close(self) -> None:
        """End the connection and its streams, without waiting for what is on its way."""
        closes = [messages.Close(one.name) for one in self._streams.values() if one.is_open]
        with contextlib.suppress(zmq.Again):  # nobody is there who could be told
            if closes:
                body = messages.body([messages.encode(close) for close in closes])
                self._socket.send(body, zmq.NOBLOCK)
        self._socket.close(linger=1000)
        self._context.term()

    def tell(self, message: Message) -> None:
        """Send one message.

        Raises
        ------
        Disconnected
            If nobody takes it for the client's time limit, as at an address that is no server's.
        """
        try:
            self._socket.send(messages.body([messages.encode(message)]))
        except zmq.Again:
            raise Disconnected(
                f"no answer from {self.address} for {self.timeout_s:.0f} s"
            ) from None

    def wait(self, condition: Any) -> None:
        """Take what comes until a condition holds; keeps the connection alive meanwhile.

        Raises
        ------
        Disconnected
            If the server says nothing for the client's time limit.
        """
        self._receive(0.0)
        self._heard = time.monotonic()
        while not condition():
            self._receive(_RETRY_S)
            silent_s = time.monotonic() - self._heard
            if silent_s > self.timeout_s:
                raise Disconnected(f"no answer from {self.address} for {silent_s:.0f} s")

    @property
    def max_chunk_bytes(self) -> int:
        assert self.welcome is not None
        return self.welcome.max_chunk_bytes

    def forget(self, name: str) -> None:
        self._streams.pop(name, None)

    def _connect(self) -> zmq.Socket[bytes]:
        one = self._context.socket(zmq.DEALER)
        one.setsockopt(zmq.LINGER, 0)
        one.setsockopt(zmq.SNDTIMEO, round(self.timeout_s * 1000))
        one.setsockopt(zmq.IDENTITY, self._identity)
        if self._keys is not None:
            self._keys.show(one)
        one.connect(self.address)
        return one

    def _receive(self, timeout_s: float) -> None:
        """Take all that has come, waiting at most so long for the first of it."""
        now = time.monotonic()
        if self._recover_at is not None and now >= self._recover_at:
            self._recover()
        if now - self._pinged > _PING_S:
            self._pinged = now
            self.tell(messages.Ping())
        if not self._socket.poll(round(timeout_s * 1000)):
            return
        self._heard = time.monotonic()
        while True:
            try:
                body = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            for message in messages.decode_replies(body):
                self._take(message)

    def _take(self, message: messages.Reply) -> None:
        stream = self._streams.get(getattr(message, "stream", ""))
        match message:
            case messages.Welcome():
                self.welcome = message
                self._recover_at = None  # what was refused before was the last connection's
            case messages.Pong():
                pass
            case messages.AlertList():
                self._answers[message.id] = message
            case messages.Error(code="not_greeted"):
                self._recover_at = max(self._heard, self._recovered + _RETRY_S)
            case messages.Error(code="unknown_life") if stream is not None:
                self._events.append((self._heard, message))
                for one in stream.begin_anew():
                    self.tell(one)
            case messages.Error(code="unknown_stream") if stream is not None:
                if stream.is_open:  # or the error before this one has said why it is not
                    self._recover_at = max(self._heard, self._recovered + _RETRY_S)
            case messages.Error(code="draining") | messages.Closed(reason="draining"):
                self._recover_at = self._heard + _RETRY_S
            case messages.Error(code="too_many_peers") if self.welcome is not None:
                self._recover_at = self._heard + _RETRY_S
            case messages.Error():
                self.last_error = message.reason
                self._refusals[message.stream] = Refused(message.code, message.reason)
                self._events.append((self._heard, message))
                if stream is not None and not stream.is_open:
                    stream.refused(message)
            case messages.Opened() if stream is not None:
                stream.opened(message)
            case messages.Ack() if stream is not None:
                stream.acked(message)
            case messages.Flushed() if stream is not None:
                stream.flushed(message)
            case messages.Closed(reason="reopened"):
                pass
            case messages.Adopted():
                self._adopted += 1
            case messages.Moved():
                self.address = message.to
                if self._keys is not None and message.key:
                    self._keys = self._keys._replace(server=message.key.encode())
                self._recover_at = self._heard
            case messages.Numbered() if stream is not None and not stream.is_new(message):
                pass
            case messages.Closed() if stream is not None:
                stream.closed = message
                self._events.append((self._heard, message))
            case _:
                self._events.append((self._heard, message))

    def _recover(self) -> None:
        """Connect anew and bring every stream to where it was: the server has forgotten us."""
        self._recover_at = None
        self._recovered = time.monotonic()
        self._socket.close()
        self._socket = self._connect()
        self.tell(messages.Hello(messages.VERSION, "murmur-python"))
        for stream in self._streams.values():
            if stream.closed is None:
                self.tell(stream.resume())


def _life() -> int:
    """Return a number that nobody else guesses."""
    return 1 + secrets.randbelow(2**62)
