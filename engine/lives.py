"""What a stream with a life has told, and to whom it is still owed.

A life is what lets a stream outlast its connection, and its server. Results are numbered by their
type; the latest are kept as long as the client may not have got them, and told again to who asks.
"""

from collections import deque
from itertools import islice
from typing import Any, NamedTuple

import msgspec

from engine import messages
from engine.checkpoint import Entry, Store
from engine.messages import Message, Numbered

_MOST = 64  # groups that are written in one turn: it takes some milliseconds
_MOST_BEHIND = 8  # batches that may wait for the disk
# A disk that takes nothing for so long is full or gone: signals go on, and clients are told.
_PATIENCE_S = 5.0


class Result(NamedTuple):
    """A result as it was told."""

    samples: int  # that the stream had sent by then
    kind: str
    number: int
    encoded: bytes


class Life:
    """One stream's results: their numbers, and the latest of them.

    Parameters
    ----------
    id : int

    Attributes
    ----------
    ack : Ack or None
        The last that was told.
    waiting : Ack or None
        One that may be told with the next checkpoint.
    written : int
        Samples that the stream had sent at the last checkpoint.
    """

    def __init__(self, id: int) -> None:
        self.id = id
        self.numbers: dict[str, int] = {}
        self.told: deque[Result] = deque()
        self.ack: messages.Ack | None = None
        self.waiting: messages.Ack | None = None
        self.written = 0

    def number(self, message: Numbered) -> None:
        """Give a result, which nobody else has seen yet, the next number of its type."""
        kind = type(message).__name__.lower()
        number = self.numbers[kind] = self.numbers.get(kind, 0) + 1
        msgspec.structs.force_setattr(message, "life", self.id)
        msgspec.structs.force_setattr(message, "number", number)

    def keep(self, message: Numbered, encoded: bytes, samples: int, credit: int) -> None:
        """Keep a result, and let go of those that the client is known to have.

        Who sends a sample has got an ack of a sample within the credit before it, and that ack
        came behind all results that were told when the stream was as far as the ack.
        """
        while self.told and self.told[0].samples <= samples - credit:
            self.told.popleft()
        kind = type(message).__name__.lower()
        self.told.append(Result(samples, kind, message.number, encoded))

    def missed(self, seen: dict[str, int]) -> list[bytes]:
        """Return the kept results behind those that were seen, in their order."""
        return [one.encoded for one in self.told if one.number > seen.get(one.kind, 0)]

    def take(self) -> list[Any]:
        """Return all that is carried, as plain data."""
        return [self.id, self.numbers, list(self.told)]


def put(carried: list[Any]) -> Life:
    """Return what :meth:`Life.take` was asked for."""
    life = Life(carried[0])
    life.numbers = carried[1]
    life.told.extend(Result(*one) for one in carried[2])
    return life


class Over(NamedTuple):
    """A stream that has ended: what its client may not have got yet."""

    life: Life
    closed: messages.Closed
    since: float  # of the loop's clock


class Owed(NamedTuple):
    """A message that is told once the next checkpoint of its group is on the disk."""

    peer: bytes
    message: Message


class Taken(NamedTuple):
    """The streams of one subject, as they are taken out of a server."""

    name: str
    streams: list[str]
    state: bytes  # a checkpoint


class Group:
    """The streams of one subject, which are written down together: their alerts are one.

    Attributes
    ----------
    streams : set of str
        Those with a life.
    over : set of str
        Those that ended a short time ago.
    owed : list of Owed
    due : float or None
        When the next checkpoint is to be written; None: nothing has happened since the last.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.streams: set[str] = set()
        self.over: set[str] = set()
        self.owed: list[Owed] = []
        self.due: float | None = None


class Keeper:
    """Which groups are to be written down next, and what waits until they are.

    Parameters
    ----------
    store : Store or None
        None: nothing is written, and nothing waits.
    every_s : float
        Seconds between two checkpoints of a group that moves.
    """

    def __init__(self, store: Store | None, every_s: float) -> None:
        self.store, self._every_s = store, every_s
        self.groups: dict[str, Group] = {}
        self._due: deque[tuple[float, str]] = deque()  # in order: all wait equally long
        self._at_once: set[str] = set()
        self._written: deque[tuple[int, list[Owed]]] = deque()  # batches on their way to the disk
        self._failing_since: float | None = None

    def group(self, name: str) -> Group:
        return self.groups.setdefault(name, Group(name))

    def moved(self, name: str, now: float, at_once: bool = False) -> None:
        """Note that a group is to be written, in a while or with the next turn."""
        if self.store is None:
            return
        group = self.group(name)
        if group.due is None:
            group.due = now + self._every_s
            self._due.append((group.due, name))
        if at_once:
            self._at_once.add(name)

    def due(self, now: float) -> list[Group]:
        """Return the groups that are to be written now, at most :data:`_MOST`."""
        if self.store is None or self.store.behind > _MOST_BEHIND:
            return []
        found = {name: self.groups[name] for name in islice(self._at_once, _MOST)}
        self._at_once.difference_update(found)
        while self._due and self._due[0][0] <= now and len(found) < _MOST:
            at, name = self._due.popleft()
            group = self.groups.get(name)
            if group is not None and group.due == at:  # it was not written before its time
                found[name] = group
        return list(found.values())

    def again(self, group: Group) -> None:
        """Ask once more for a group of which a part cannot be taken now."""
        self._at_once.add(group.name)

    @property
    def busy(self) -> bool:
        """Whether anything is on its way to the disk, or should be at once."""
        return bool(self._at_once or self._written)

    def write(self, states: list[tuple[Group, bytes]]) -> None:
        """Hand checkpoints to the store; what is owed until now waits for it."""
        assert self.store is not None
        entries, owed = [], list[Owed]()
        for group, state in states:
            entries.append(Entry(group.name, state if group.streams or group.over else None))
            owed += group.owed
            group.owed, group.due = [], None
            if not (group.streams or group.over):
                self.groups.pop(group.name)
                self._at_once.discard(group.name)
        if entries:
            self._written.append((self.store.put(entries), owed))

    def pay_all(self) -> list[Owed]:
        """Return all that is owed, on its way to the disk or not."""
        told = [one for _, owed in self._written for one in owed]
        self._written.clear()
        for group in self.groups.values():
            told += group.owed
            group.owed = []
        return told

    def let_out(self, now: float) -> list[Owed]:
        """Return what may be told now."""
        if self.store is None:
            return []
        told: list[Owed] = []
        while self._written and self._written[0][0] <= self.store.committed:
            told += self._written.popleft()[1]
        if not self.store.fault:
            self._failing_since = None
            return told
        if self._failing_since is None:
            self._failing_since = now
        if self.failing(now):
            told += self.pay_all()
        return told

    def failing(self, now: float) -> bool:
        """Return whether the disk has taken nothing for so long that nothing waits any more."""
        return self._failing_since is not None and now - self._failing_since > _PATIENCE_S
