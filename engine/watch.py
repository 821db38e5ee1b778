"""Results as they come: a subscriber of a server's PUB socket, and one line for each result."""

import math
import time
from collections.abc import Callable, Iterator
from typing import get_args

import zmq

from engine import messages
from engine.errors import Disconnected
from engine.keys import Handshake, Identity
from engine.messages import Message

_KINDS = [kind.__name__.lower() for kind in get_args(messages.Result)]
# Kept for a subscriber that is busy; beyond this the oldest stay and new ones are lost.
_MAX_QUEUED = 10_000


class Subscription:
    """A connection to what a server publishes.

    Parameters
    ----------
    address : str
    stream : str, optional
        Take the results of this stream only.
    timeout_s : float
        How long to wait for the server.
    identity : Identity, optional
        The subscriber's key and the server's; None: the server asks for none.

    Raises
    ------
    Disconnected
        If nobody publishes there, or not to this key.
    """

    def __init__(
        self,
        address: str,
        stream: str | None = None,
        timeout_s: float = 10.0,
        identity: Identity | None = None,
    ) -> None:
        self._stream = stream
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.RCVHWM, _MAX_QUEUED)
        self._socket.setsockopt(zmq.LINGER, 0)
        if identity is not None:
            identity.show(self._socket)
        for kind in _KINDS:
            self._socket.subscribe(f"{kind}/{stream or ''}")
        try:
            self._connect(address, timeout_s)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Subscription":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def results(self, timeout_s: float) -> Iterator[Message]:
        """Yield what has come, waiting at most so long for the first."""
        if not self._socket.poll(math.ceil(timeout_s * 1000)):
            return
        while True:
            try:
                _, body = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            for message in messages.decode_replies(body):
                # A topic is a prefix: that of stream bed-1 also brings those of bed-10.
                of = getattr(message, "stream", getattr(message, "subject", None))
                if self._stream in (None, of):
                    yield message

    def close(self) -> None:
        self._socket.close()
        self._context.term()

    def _connect(self, address: str, timeout_s: float) -> None:
        """Connect and wait for the server: what it publishes before that would be missed."""
        with Handshake(self._socket) as handshake:
            self._socket.connect(address)
            if not handshake.wait(timeout_s):
                why = handshake.reason or f"nobody publishes there; waited {timeout_s:g} s"
                raise Disconnected(f"{address}: {why}")


def watch(
    subscription: Subscription,
    tell: Callable[[Message], None],
    seconds: float = math.inf,
    count: float = math.inf,
) -> None:
    """Hand on results until the time is over or so many have come."""
    end = time.monotonic() + seconds
    while count > 0 and (left_s := end - time.monotonic()) > 0:
        for message in subscription.results(min(left_s, 1.0)):
            tell(message)
            count -= 1
            if count <= 0:
                return


def line(message: Message) -> str:
    """Say one result in a line for a person."""
    match message:
        case messages.Beat():
            rate = message.heart_rate_bpm
            bpm = f"{rate:5.0f} bpm" if rate is not None else "    - bpm"
            what = f"beat {message.label}  p {message.probability:.2f} {bpm}"
            return _placed(message.seconds, message.stream, what)
        case messages.Measures():
            values = message.values.items()
            what = "measures " + "  ".join(f"{name} {value:g}" for name, value in values)
            return _placed(message.seconds, message.stream, what)
        case messages.Alert():
            return _placed(message.seconds, message.stream, _alert(message))
        case messages.ActiveAlerts():
            what = ", ".join(f"{plain(a.rule)} {a.state} ({a.priority})" for a in message.alerts)
            if message.cannot_monitor:
                what += f"; cannot monitor {', '.join(map(plain, message.cannot_monitor))}"
            return _placed(message.seconds, message.subject, f"alerts  {what or 'none'}")
        case messages.Final() if message.words:
            what = f"final   {message.text}"
            return _placed(message.words[0].start_s, message.stream, what)
        case messages.Final():
            what = f"final   {message.text}"
        case messages.Partial():
            what = f"partial {message.text}"
        case messages.Gap():
            lost = message.end - message.start
            what = f"gap of {lost} samples from {message.start}; state: {message.state}"
        case messages.Bridged():
            what = f"bridged {message.end - message.start} samples from {message.start}"
        case messages.Scores():
            what = f"scores {message.output} {tuple(message.shape)} before {message.index}"
        case messages.Samples():
            count = len(message.data) // 4
            what = f"samples {count} at {message.rate_hz:g} Hz from {message.index}"
        case messages.Error():
            what = f"error {message.code}: {message.reason}"
        case messages.Closed():
            what = f"closed ({message.reason}) after {message.samples} samples"
        case _:
            what = repr(message)
    return f"{'':>11} {getattr(message, 'stream', '')}  {what}"


def _alert(message: messages.Alert) -> str:
    what = f"alert {plain(message.rule)} {message.state.upper()}"
    what += f" after {message.from_state}" if message.from_state != "inactive" else ""
    what += f": {message.value:g}, limit {message.limit:g} ({message.priority} priority)"
    if message.cannot_monitor:
        what += f"; cannot monitor {', '.join(map(plain, message.cannot_monitor))}"
    if message.actor:
        what += f"; by {message.actor}"
    if message.reason:
        what += f"; {message.reason}"
    if message.transitions > 1:
        what += f"; {message.transitions} transitions in one"
    return what


def plain(rule: str) -> str:
    return rule.replace("_", " ")


def _placed(seconds: float, stream: str, what: str) -> str:
    return f"{seconds:9.2f} s {stream}  {what}"
