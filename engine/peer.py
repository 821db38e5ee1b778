"""A connection: what it has asked for and nobody has done yet, and what it is still to be sent.

Both queues are counted in bytes, since that is what memory is bounded by. The engine decides what
becomes of who asks for too much, or does not read.
"""

from collections import deque
from collections.abc import Iterator

from engine import messages
from engine.messages import Request
from engine.rights import Account

# Of what is sent at once: a socket holds some of these, whoever reads them.
LONGEST_BODY = 256 * 2**10
_EACH = 80  # bytes that Python and the queue take for a message beside its own


class Peer:
    """One connection.

    Parameters
    ----------
    now : float
    account : Account

    Attributes
    ----------
    requests : iterator of Request
        Of the body that has been begun, those that are still to be done; it came at ``arrived``.
    waiting, unsent : int
        Bytes of bodies that have not been begun, and of messages that were not sent.
    """

    def __init__(self, now: float, account: Account) -> None:
        self.account = account
        self.greeted = False
        self.seen = self.arrived = now
        self.streams: set[str] = set()
        self.parts: list[bytes] = []  # of a checkpoint that is still to come as a whole
        self.requests: Iterator[Request] = iter(())
        self._inbox: deque[tuple[bytes, float]] = deque()
        self.outbox: list[bytes] = []
        self._unread = b""  # a body that the socket did not take
        self.waiting = self.unsent = 0

    def queue(self, body: bytes, now: float) -> None:
        """Take a body that came."""
        self._inbox.append((body, now))
        self.waiting += len(body) + _EACH

    def next_body(self) -> bytes | None:
        """Return the oldest body that has not been begun."""
        if not self._inbox:
            return None
        body, self.arrived = self._inbox.popleft()
        self.waiting -= len(body) + _EACH
        return body

    def tell(self, encoded: bytes) -> None:
        """Take a message to be sent."""
        self.outbox.append(encoded)
        self.unsent += len(encoded) + _EACH

    def take(self) -> bytes:
        """Return a body with the oldest messages, of :data:`LONGEST_BODY` or one message."""
        if self._unread:
            body, self._unread = self._unread, b""
            self.unsent -= len(body)
            return body
        count, size = len(self.outbox), self.unsent
        if size > LONGEST_BODY:
            count = size = 0
            while not count or (
                count < len(self.outbox) and size + len(self.outbox[count]) <= LONGEST_BODY
            ):
                size += len(self.outbox[count]) + _EACH
                count += 1
        body = messages.body(self.outbox[:count])
        del self.outbox[:count]
        self.unsent -= size
        return body

    def put_back(self, body: bytes) -> None:
        """Keep a body that could not be sent, in front of all that is to be sent."""
        self._unread = body
        self.unsent += len(body)
