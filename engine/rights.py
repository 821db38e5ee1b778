"""What each client key may do, and how much: a TOML file of keys, and the count of what they use.

No sockets and no secrets: the file names public keys only. ``docs/security.md`` explains it.
"""

import math
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Protocol, get_args

import msgspec
from msgspec import Meta

from engine import messages
from engine.errors import ConfigError, Refused

KINDS = tuple(kind.__name__.lower() for kind in get_args(messages.Result))

MOVED = b"moved/"  # a topic that everybody may have: where all streams of the server go on

KeyName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,31}\Z")]
PublicKey = Annotated[str, Meta(pattern=r"^[0-9A-Za-z.:+=^!/*?&<>()\[\]{}@%$#-]{40}\Z")]  # Z85
Topics = Annotated[str, Meta(pattern=r"^(\*|(\*|[a-z]+)/[A-Za-z0-9_.:-]*\*)\Z")]
Count = Annotated[int, Meta(ge=1, le=2**31)]
Rate = Annotated[float, Meta(ge=1e-3, le=1e12)]

# Who knows it gets what its owner is told: so it must be too long to guess.
_LEAST_ID = 16
# Handshakes of a key in `idle_timeout_s` beyond two for each connection that it may have.
_KNOCKS = 16
# A key that was silent may send so much at once.
_BURST_S = 2.0
# Of refusals for the rate one is told in so long; it says how many there were.
_TELL_S = 1.0


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Who has the secret half of a key, may do this. What is not said is not allowed."""

    public: PublicKey
    publish: tuple[str, ...] = ()  # names of streams, with * and ?
    subscribe: tuple[Topics, ...] = ()  # KIND/BEGIN*, */BEGIN* or *
    subjects: tuple[str, ...] = ("*",)  # whose streams, vitals and alerts; with * and ?
    acknowledge: bool = False  # acknowledge, pause and resume alerts
    list_alerts: bool = False
    vitals: bool = False  # send them
    adopt: bool = False  # take over the streams of a server, or hand them to it
    revoked: bool = False
    max_peers: Count = 64  # connections for work, and as many of subscribers
    max_streams: Count = 4096
    max_bodies_per_s: Rate = 20_000.0
    max_bytes_per_s: Rate = 50e6

    def check_publish(self, stream: str) -> None:
        if not any(fnmatchcase(stream, pattern) for pattern in self.publish):
            raise Refused("forbidden", f"publish: this key may use {list(self.publish)}")

    def check_subject(self, subject: str) -> None:
        """Refuse a subject that is not the key's, without naming it."""
        if not any(fnmatchcase(subject, pattern) for pattern in self.subjects):
            raise Refused("forbidden", f"subjects: this key may use {list(self.subjects)}")

    def check(self, right: str) -> None:
        """Refuse what needs a right that the key lacks: ``acknowledge``, ``vitals``, ..."""
        if not getattr(self, right):
            raise Refused("forbidden", f"{right}: expected true for this key, found false")


# Where there are no keys: on the loopback interface, or where the configuration says so.
_EVERYTHING = Key(
    public="0" * 40,
    publish=("*",),
    subscribe=("*",),
    acknowledge=True,
    list_alerts=True,
    vitals=True,
    adopt=True,
)


class _Peer(Protocol):
    streams: set[str]


class Account:
    """A key, and what those who have it use at the moment.

    Parameters
    ----------
    name : str
        Empty: nobody's key, where none is needed; then nothing is counted.
    key : Key
    """

    def __init__(self, name: str = "", key: Key = _EVERYTHING) -> None:
        self.name, self.key = name, key
        self.topics = beginnings(key)
        self.peers: dict[bytes, _Peer] = {}
        self._knocks, self._knocked_at = math.inf, -math.inf
        self._bodies = self._bytes = 0.0  # that may be sent now
        self._counted_at = -1e9
        self._over = 0  # bodies refused and not told of
        self._told_at = -1e9

    @property
    def bounded(self) -> bool:
        return bool(self.name)

    def admit(self, peer_id: bytes) -> None:
        """Refuse a connection more than the key may have, or one that could be taken over.

        What the server says to a peer goes to whoever uses its routing id.
        """
        if not self.bounded:
            return
        if len(peer_id) < _LEAST_ID:
            raise Refused(
                "bad_routing_id",
                f"routing id: expected {_LEAST_ID} random bytes or more, found {len(peer_id)}",
            )
        if len(self.peers) >= self.key.max_peers:
            raise Refused("too_many_peers", f"max_peers of this key is {self.key.max_peers}")

    def permit(self, request: messages.Request) -> None:
        """Refuse what the key has no right to."""
        if not self.bounded:
            return
        key = self.key
        match request:
            case messages.Open():
                key.check_publish(request.stream)
                key.check_subject(request.subject or request.stream)
                self._check_streams(request.stream)
            case messages.Vital():
                key.check("vitals")
                key.check_subject(request.subject)
            case messages.Acknowledge() | messages.PauseAlerts() | messages.ResumeAlerts():
                key.check("acknowledge")
                key.check_subject(request.subject)
            case messages.Again():
                self._check_watch(request.stream)
            case messages.Adopt() | messages.Drain():
                key.check("adopt")
            case messages.ListAlerts():
                key.check("list_alerts")
                key.check_subject(request.subject or "*")

    def _check_watch(self, stream: str) -> None:
        """Refuse to tell again what a key could not have subscribed to."""
        wanted = {f"{kind}/{stream}".encode() for kind in KINDS}
        if granted(wanted, self.topics) != wanted:
            raise Refused("forbidden", f"subscribe: this key may have {list(self.key.subscribe)}")

    def _check_streams(self, stream: str) -> None:
        """Refuse a stream more than the key may have; one that is open may be opened again."""
        others = sum(len(peer.streams - {stream}) for peer in self.peers.values())
        if others >= self.key.max_streams:
            raise Refused("full", f"max_streams of this key is {self.key.max_streams}")

    def may_knock(self, now: float, patience_s: float) -> bool:
        """Count a handshake; return False if there are more than the key's connections explain.

        A connection that says nothing is ended after ``patience_s``: so this bounds those.
        """
        most = 2.0 * self.key.max_peers + _KNOCKS
        passed = min(now - self._knocked_at, patience_s)
        self._knocks = min(most, self._knocks + passed * most / patience_s)
        self._knocked_at = now
        if self._knocks < 1:
            return False
        self._knocks -= 1
        return True

    def spend(self, num_bytes: int, now: float) -> bool:
        """Count a body; return False if it is one too many, or too large, for the key's rate."""
        if not self.bounded:
            return True
        key, passed = self.key, now - self._counted_at
        self._counted_at = now
        self._bodies = min(self._bodies + passed * key.max_bodies_per_s, self._most_bodies)
        self._bytes = min(self._bytes + passed * key.max_bytes_per_s, self._most_bytes)
        if self._bodies < 1 or self._bytes < num_bytes:
            self._over += 1
            return False
        self._bodies -= 1
        self._bytes -= num_bytes
        return True

    def complaint(self, now: float) -> Refused | None:
        """Return what to tell of bodies that were refused for the rate; None: told a moment ago."""
        if now - self._told_at < _TELL_S:
            return None
        over, self._over, self._told_at = self._over, 0, now
        return Refused(
            "over_rate",
            f"{over} bodies refused: max_bodies_per_s of this key is "
            f"{self.key.max_bodies_per_s:g}, max_bytes_per_s {self.key.max_bytes_per_s:g}",
        )

    @property
    def _most_bodies(self) -> float:
        return max(1.0, _BURST_S * self.key.max_bodies_per_s)

    @property
    def _most_bytes(self) -> float:
        return _BURST_S * self.key.max_bytes_per_s


def read(path: Path) -> dict[str, Key]:
    """Read a file of keys: a table for each, under its name.

    Raises
    ------
    ConfigError
        Naming the file, the key and what was expected there.
    """
    try:
        return parse(path.read_bytes())
    except (OSError, ConfigError) as error:
        raise ConfigError(f"{path}: {error}") from None


def parse(text: bytes) -> dict[str, Key]:
    """Read the text of a file of keys.

    Raises
    ------
    ConfigError
        Naming the key and what was expected there.
    """
    try:
        keys = msgspec.toml.decode(text, type=dict[KeyName, Key])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(str(error)) from None
    named: dict[str, str] = {}
    for name, key in keys.items():
        if key.public in named:
            raise ConfigError(f"{name}: expected a key of its own, found {named[key.public]}'s")
        named[key.public] = name
        for pattern in key.subscribe:
            kind = pattern.partition("/")[0]
            if kind not in ("*", *KINDS):
                raise ConfigError(f"{name}: subscribe: expected one of {KINDS}, found {kind!r}")
    return keys


def line(key: Key) -> str:
    """Say in a line for a person what a key may do."""
    if key.revoked:
        return "revoked"
    said = [
        f"{what} {', '.join(some)}"
        for what, some in (("publish", key.publish), ("subscribe", key.subscribe))
        if some
    ]
    said += [f"of {', '.join(key.subjects)}"] if key.subjects != ("*",) else []
    flags = ("acknowledge", "list_alerts", "vitals", "adopt")
    return "; ".join([*said, *(flag for flag in flags if getattr(key, flag))]) or "nothing"


def beginnings(key: Key) -> frozenset[bytes]:
    """Return with what a topic begins that a key may subscribe to.

    A topic is matched from its beginning, ``beat/bed-7`` with ``beat/bed-70`` too: so a pattern
    has its ``*`` at the end, and can have none elsewhere.
    """
    found = set()
    for pattern in key.subscribe:
        kind, _, begin = pattern.removesuffix("*").partition("/")
        if pattern in ("*", "*/*"):
            found.add(b"")
        else:
            kinds = KINDS if kind == "*" else (kind,)
            found |= {f"{one}/{begin}".encode() for one in kinds}
    return frozenset({*found, MOVED})


def granted(wanted: Iterable[bytes], allowed: frozenset[bytes]) -> set[bytes]:
    """Return the subscriptions that give what is wanted and no more than is allowed."""
    return {
        topic if topic.startswith(begin) else begin
        for topic in wanted
        for begin in allowed
        if topic.startswith(begin) or begin.startswith(topic)
    }


ANYONE = Account()
