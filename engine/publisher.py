"""The socket of subscribers: results go out, and nobody gets what its key may not see.

An XPUB socket in manual mode: ZeroMQ hands over what each connection asks for, and what it gets
is decided here. A connection may ask for so much; who asks for more is shut out, as ZeroMQ keeps
every topic that it was ever asked for, byte by byte.
"""

from typing import Any

import zmq

from engine import rights
from engine.config import Limits
from engine.door import Connection, Door
from engine.rights import Account

# Of subscriptions, before the engine gets its turn.
_MOST_AT_ONCE = 64
# ZeroMQ takes in, in one go and in the thread that sends, all that a subscriber asks for while it
# asks. It never catches up with one that floods unless that one has to wait: with its usual
# 1,000 the loop was held for as long as the flood lasted, with 32 for 30 ms.
_QUEUED = 32
# A handshake has 600 bytes, the longest topic of ours 77.
_HARD_MAX_BYTES = 1024
_MAX_TOPIC_BYTES = 96
_UNSUBSCRIBE, _SUBSCRIBE = b"\0", b"\1"


class Publisher:
    """What a server publishes.

    Parameters
    ----------
    context : zmq.Context
    door : Door
    limits : Limits

    Attributes
    ----------
    socket : zmq.Socket
        To be bound, polled and closed by the server.
    """

    def __init__(self, context: zmq.Context[Any], door: Door, limits: Limits) -> None:
        self._door, self._limits = door, limits
        self._astray = False
        self.socket: zmq.Socket[bytes] = context.socket(zmq.XPUB)
        self.socket.setsockopt(zmq.XPUB_MANUAL, 1)
        self.socket.setsockopt(zmq.RCVHWM, _QUEUED)
        self.socket.setsockopt(zmq.MAXMSGSIZE, _HARD_MAX_BYTES)

    def send(self, published: list[tuple[bytes, bytes]], now: float) -> None:
        """Publish results, to those as well who have asked for them until now."""
        self.take(now)
        for topic, body in published:
            # Each by itself: `send_multipart` looks at every part first, in three times the time.
            self.socket.send(topic, zmq.SNDMORE)
            self.socket.send(body)

    def take(self, now: float) -> None:
        """Do what subscribers have asked for."""
        for _ in range(_MOST_AT_ONCE):
            try:
                frame = self.socket.recv(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                self._astray = False
                return
            self._take(frame, now)

    def _take(self, frame: zmq.Frame, now: float) -> None:
        account, connection = self._door.visitor(frame, now, "subscribers")
        asked = frame.bytes
        if connection.descriptor < 0:
            return  # what a connection had asked for is over, as the connection is
        if asked[:1] not in (_SUBSCRIBE, _UNSUBSCRIBE) or frame.more:
            # A SUB socket sends no such thing. For it libzmq 4.3.5 takes the next connection off
            # the list of those that asked for something, so until that list is empty it would do
            # for one what another has asked for.
            self._astray = True
            self._door.refuse(connection, "no_subscription")
        elif account is None or self._astray:
            self._door.cut(connection)  # it will come again, and ask again
        elif len(asked) - 1 > _MAX_TOPIC_BYTES:
            self._door.refuse(connection, "long_topic")
        elif asked[:1] == _UNSUBSCRIBE:
            connection.wanted.discard(asked[1:])
            self._give(connection, rights.granted(connection.wanted, account.topics))
        else:
            self._add(account, connection, asked[1:])

    def _add(self, account: Account, connection: Connection, topic: bytes) -> None:
        connection.wanted.add(topic)
        if len(connection.wanted) > self._limits.max_subscriptions:
            self._door.refuse(connection, "max_subscriptions")
            return
        granted = rights.granted([topic], account.topics)
        if not granted:
            self._door.note("forbidden_topic", connection)
        self._give(connection, connection.granted | granted)

    def _give(self, connection: Connection, granted: set[bytes]) -> None:
        """Let a connection, that which was heard of last, get these topics and no other."""
        for topic in granted - connection.granted:
            self.socket.setsockopt(zmq.SUBSCRIBE, topic)
        for topic in connection.granted - granted:
            self.socket.setsockopt(zmq.UNSUBSCRIBE, topic)
        connection.granted = granted
