"""Who may come in: keys are checked, connections counted, and those who may not are shut out.

A thread answers ZeroMQ's own questions about keys (ZAP, by pyzmq's authenticator) and follows the
connections of the server's two sockets. ZeroMQ has no call that ends a connection of a bound
socket; so one is ended as the network would end it, by a shutdown of its descriptor.
"""

import asyncio
import contextlib
import errno
import logging
import os
import socket
import stat
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import zmq
from zmq.auth import Authenticator
from zmq.utils.monitor import recv_monitor_message

from engine import rights
from engine.config import Limits
from engine.errors import ConfigError
from engine.keys import Pair
from engine.metrics import Metrics
from engine.rights import ANYONE, Account, Key

log = logging.getLogger(__name__)

Side = Literal["clients", "subscribers"]

# A handshake takes milliseconds; who opens a connection and says nothing is gone after so long.
_HANDSHAKE_MS = 5_000
# Beyond the limit some more are let in, to be told that it is reached.
_SPARE = 32
# Of one reason so often a line in the log; it says how many were not logged.
_LOG_S = 10.0
# Who asked for too much is not let in again before so long.
_PENANCE_S = 10.0
_REASONS: dict[int, str] = {
    zmq.Event.HANDSHAKE_FAILED_PROTOCOL: "no_key",  # or another protocol
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL: "wrong_server_key",  # or it hung up
}
_EVENTS = (
    zmq.Event.ACCEPTED
    | zmq.Event.DISCONNECTED
    | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
    | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
)


class Connection:
    """One connection of one of the sockets, from its first byte to its last."""

    def __init__(self, side: Side, descriptor: int, address: str, now: float) -> None:
        self.side, self.descriptor, self.address = side, descriptor, address
        self.heard = now  # of the last message; for a subscriber, of the first
        self.accepted = self.spoke = self.cut = False
        self.account: Account | None = None  # once it spoke
        self.wanted: set[bytes] = set()  # topics that a subscriber asked for
        self.granted: set[bytes] = set()


class Visitor(NamedTuple):
    """Who sent a message."""

    account: Account | None  # None: its key is not valid any more
    connection: Connection


class Door(Authenticator):
    """The checks at the server's two sockets.

    Parameters
    ----------
    context : zmq.Context
    own : Pair, optional
        The server's key; None: who comes needs none.
    file : Path, optional
        Of the clients' keys; it is read again when it changes.
    limits : Limits
    metrics : Metrics

    Raises
    ------
    ConfigError
        If the file of keys cannot be read.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        own: Pair | None,
        file: Path | None,
        limits: Limits,
        metrics: Metrics,
    ) -> None:
        super().__init__(context, log=logging.getLogger("engine.door.zap"))
        self.log.setLevel(logging.ERROR)
        self._own, self._file, self._limits, self._metrics = own, file, limits, metrics
        self._accounts: dict[str, Account] = {}  # of valid keys, by public key
        self._revoked: set[str] = set()
        self._read_at: tuple[float, int] | None = None
        self.connections: dict[int, Connection] = {}  # by descriptor
        self._sockets: list[zmq.Socket[bytes]] = []
        self._monitors: dict[zmq.Socket[bytes], Side] = {}
        self._failed = ""  # why the handshake failed whose connection is reported next
        self._logged: dict[str, float] = {}
        self._unlogged: Counter[str] = Counter()
        self._penance: dict[str, float] = {}  # by address or public key: until when
        self._address = ""  # of whom ZAP asks
        self._stopping, self._stopped = socket.socketpair()
        if file is not None:
            self._read_at = _changed(file)
            self._take(rights.read(file))
        self._thread = threading.Thread(target=self._run, name="door", daemon=True)

    # --- of the server ---------------------------------------------------------------------

    def guard(self, one: zmq.Socket[bytes], side: Side) -> None:
        """Prepare a socket before it is bound."""
        one.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
        if self._own is not None:
            self._own.guard(one)
            one.zap_domain = side.encode()
            # Without it, a door that is not there would be an open one.
            one.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
            self.configure_curve_callback(side, self)
        self._sockets.append(one)
        one.monitor(f"inproc://door-{side}", _EVENTS)
        monitor: zmq.Socket[bytes] = self.context.socket(zmq.PAIR)
        # ZeroMQ's own thread waits where this is full, and all connections with it.
        monitor.setsockopt(zmq.RCVHWM, 0)
        monitor.connect(f"inproc://door-{side}")
        self._monitors[monitor] = side

    def open(self) -> None:
        """Begin to let in, once all sockets are prepared."""
        if self._own is not None:
            super().start()
        self._thread.start()

    def close(self) -> None:
        """Let nobody in any more; before the sockets are closed."""
        for one in self._sockets:
            one.disable_monitor()  # or ZeroMQ's thread waits for a reader that is gone
        self._stopping.close()
        self._thread.join()
        self._stopped.close()

    def visitor(self, frame: zmq.Frame, now: float, side: Side) -> Visitor:
        """Return who sent a message, and take note that it was heard of.

        The key is asked for with every message: a routing id is only a name, and the next one who
        uses it need not have the same key.
        """
        try:
            descriptor = int(frame.get(zmq.SRCFD))
        except zmq.ZMQError:  # a peer of before ZMTP 3, which can have no key
            return Visitor(None if self._own else ANYONE, Connection(side, -1, "", now))
        connection = self.connections.get(descriptor)
        if connection is None:  # the thread is behind
            made = Connection(side, descriptor, _address(descriptor), now)
            connection = self.connections.setdefault(descriptor, made)
        account: Account | None = ANYONE
        if self._own is not None:
            account = self._accounts.get(str(frame.get("User-Id")))
        connection.heard, connection.spoke, connection.account = now, True, account
        return Visitor(account, connection)

    def cut(self, connection: Connection) -> None:
        """End a connection, if it is still the one of that descriptor."""
        if not connection.cut and self.connections.get(connection.descriptor) is connection:
            connection.cut = True
            with contextlib.suppress(OSError):  # the other side was faster
                descriptor = os.dup(connection.descriptor)
                with socket.socket(fileno=descriptor) as shut:
                    shut.shutdown(socket.SHUT_RDWR)

    def refuse(self, connection: Connection, reason: str) -> None:
        """End a connection that asked for too much; its key gets no other for a while."""
        if connection.account is not None:
            self._penance[connection.account.key.public] = time.monotonic() + _PENANCE_S
        self.note(reason, connection)
        self.cut(connection)

    def note(self, reason: str, connection: Connection) -> None:
        """Count and log what a connection is refused."""
        named = connection.account is not None and connection.account.name
        who = f", key {named}" if named else ""
        self._note(reason, connection.address + who)

    def sweep(self, now: float) -> list[Account]:
        """Read the keys again if they have changed, and end connections that nobody uses.

        Returns
        -------
        list of Account
            Of keys that are valid no more.
        """
        gone = self._reread()
        patience = self._limits.idle_timeout_s
        for connection in list(self.connections.values()):
            # A subscriber says nothing once it has said what it wants; a client pings.
            quiet = now - connection.heard
            silent = quiet > patience and not connection.spoke
            idle = quiet > 2 * patience and connection.side == "clients"
            if silent:
                self.note("silent", connection)
            if silent or idle or connection.account in gone:
                self.cut(connection)
        return gone

    def _reread(self) -> list[Account]:
        """Take the file of keys as it is now; one that cannot be read changes nothing."""
        if self._file is None or _changed(self._file) == self._read_at:
            return []
        self._read_at = _changed(self._file)
        try:
            keys = rights.read(self._file)
        except ConfigError as error:
            log.error("the keys stay as they were: %s", error)
            return []
        gone = self._take(keys)
        log.info("keys read again: %d are valid; %d had others", len(self._accounts), len(gone))
        return gone

    def _take(self, keys: dict[str, Key]) -> list[Account]:
        """Let these keys be valid, and return the accounts of those that were and are not."""
        before = self._accounts
        valid = {}
        for name, key in keys.items():
            account = before.get(key.public)
            if account is None or account.key != key or account.name != name:
                account = Account(name, key)
            valid[key.public] = account
        self._revoked = {public for public, one in valid.items() if one.key.revoked}
        self._accounts = {p: one for p, one in valid.items() if p not in self._revoked}
        return [one for public, one in before.items() if self._accounts.get(public) is not one]

    # --- of the thread ---------------------------------------------------------------------

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._stopped, zmq.POLLIN)
        for monitor in self._monitors:
            poller.register(monitor, zmq.POLLIN)
        if self._own is not None:
            poller.register(self.zap_socket, zmq.POLLIN)
        asking = asyncio.new_event_loop()  # pyzmq's authenticator is written for one
        try:
            while True:
                for ready, _ in poller.poll():
                    if ready in self._monitors:
                        self._follow(ready, self._monitors[ready])
                    elif ready is self.zap_socket:
                        asking.run_until_complete(self._answer(ready.recv_multipart()))
                    else:
                        return
        finally:
            asking.close()
            for monitor in self._monitors:
                monitor.close(linger=0)
            super().stop()

    async def _answer(self, request: list[bytes]) -> None:
        self._address = request[3].decode("ascii", "replace")
        await self.handle_zap_message(request)

    def callback(self, domain: str, key: bytes) -> bool:
        """Say whether a key may come in; called by the authenticator."""
        public = key.decode()
        account = self._accounts.get(public)
        now = time.monotonic()
        if account is None:
            reason = "revoked_key" if public in self._revoked else "unknown_key"
        elif domain == "subscribers" and not account.key.subscribe:
            reason = "no_topics"
        elif self._penance.get(public, 0.0) > now:
            reason = "penance"
        elif not account.may_knock(now, self._limits.idle_timeout_s):
            reason = "too_many_handshakes"
        else:
            return True
        who = self._address if account is None else f"{self._address}, key {account.name}"
        self._note(reason, who)
        return False

    def _follow(self, monitor: zmq.Socket[bytes], side: Side) -> None:
        """Take note of a connection's beginning or end."""
        event = recv_monitor_message(monitor)
        kind, value = event["event"], event["value"]
        if kind == zmq.Event.ACCEPTED:
            self._accept(side, value)
        elif kind == zmq.Event.DISCONNECTED:
            gone = self.connections.pop(value, None)
            if self._failed and gone is not None and not gone.cut:
                self._note(self._failed, gone.address)
            self._failed = ""
        elif kind in _REASONS and value != errno.EPIPE:  # who hangs up before it greets
            self._failed = _REASONS[kind]
        self._metrics.connections = len(self.connections)

    def _accept(self, side: Side, descriptor: int) -> None:
        """Take note of a connection; end it if there are too many, or too many that say nothing."""
        before = self.connections.get(descriptor)
        if before is not None and before.spoke and before.side == side and not before.accepted:
            connection = before  # it was faster than this thread
        else:
            connection = Connection(side, descriptor, _address(descriptor), time.monotonic())
            self.connections[descriptor] = connection
        connection.accepted = True
        most = self._limits.max_peers + _SPARE
        if len(self.connections) <= most // 2:
            return
        others = [one for one in list(self.connections.values()) if one.side == side]
        silent = sum(not one.spoke and one.address == connection.address for one in others)
        if len(others) > most or silent > most // 2:
            self._note("too_many_connections", connection.address)
            self.cut(connection)

    def _note(self, reason: str, who: str) -> None:
        """Count somebody who was shut out, and write it down, but not for each of a flood."""
        self._metrics.shut_out[reason] += 1
        now = time.monotonic()
        if now - self._logged.get(reason, -_LOG_S) < _LOG_S:
            self._unlogged[reason] += 1
            return
        self._logged[reason] = now
        more = self._unlogged.pop(reason, 0)
        log.warning("shut out: %s, from %s (%d more before)", reason, who or "nowhere", more)


def _changed(file: Path) -> tuple[float, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino


def _address(descriptor: int) -> str:
    """Return the address at the other end of a connection."""
    with contextlib.suppress(OSError):
        descriptor = os.dup(descriptor)
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            return ""
        with socket.socket(fileno=descriptor) as one:
            return str(one.getpeername()[0])
    return ""
