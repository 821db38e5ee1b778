"""The sockets of the engine, and the process around it. No other file of the server has any.

ROUTER for clients, PUB for subscribers. The loop is: take what has come, let the engine run one
batch, send what came of it, and wait for the next arrival or for the time that the engine named.
"""

import contextlib
import gc
import logging
import math
import re
import signal
import socket
import time
from pathlib import Path
from typing import NamedTuple

import zmq

from engine import handover, keys, metrics, model_file, rules
from engine.alerts import Alerts
from engine.audit import Audit
from engine.checkpoint import Store
from engine.config import Config
from engine.door import Connection, Door
from engine.errors import ConfigError, MurmurError
from engine.gate import GatedRuntime
from engine.keys import Pair
from engine.loop import Engine
from engine.model_file import Model
from engine.publisher import Publisher
from engine.recorder import Recorder
from engine.runtime import CpuRuntime, Runtime

log = logging.getLogger(__name__)

# Of receiving, and as long again of what peers have asked for in many messages, before the engine
# gets its turn: no flood keeps the loop from its deadlines.
_LONGEST_DRAIN_S = 0.01
_TICK_S = 1.0
# After the signal to stop: what was sent before it may still be on its way through the kernel.
_GRACE_S = 0.1
# libzmq hangs up on a peer that announces so many times `max_message_bytes`, before it takes
# memory for it. Up to there the engine answers with its own, lower limit.
_HARD_MAX = 2
# Bodies that a socket keeps for a peer: enough for its thread to work while this one does.
_SENDING = 8
# After so long a peer that did not read is tried again.
_RETRY_S = 0.05
_LOOPBACK = re.compile(r"(ipc|inproc)://|tcp://(127\.[0-9.]+|localhost|\[::1\]):")


class Endpoints(NamedTuple):
    """Where a server is to be found."""

    bind: str
    publish: str
    metrics: str  # empty: nowhere


class Server:
    """An engine behind its sockets.

    Parameters
    ----------
    config : Config

    Raises
    ------
    ModelFileError, ConfigError, zmq.ZMQError
        If a model cannot be served, rules or an audit log cannot be read, or an address cannot be
        bound.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        own, keys_file = _keys(config) or (None, None)
        models = [model_file.load(name, config.provider) for name in config.models]
        _check_hashes(models, config.sha256)
        served = [(model, runtime(model, config)) for model in models]
        self.metrics = metrics.Metrics()
        self._waker, self._woken = socket.socketpair()
        self._waker.setblocking(False)
        chosen = config.alerts
        self._audit = Audit(Path(chosen.audit)) if chosen.audit else None
        kept = config.record
        self._recorder = (
            Recorder(Path(kept.folder), kept.max_mb, kept.flush_s) if kept.folder else None
        )
        saved = config.checkpoints
        self._store = Store(Path(saved.path), saved.max_mb, self._wake) if saved.path else None
        self.engine = Engine(
            served,
            config.limits,
            self.metrics,
            wake=self._wake,
            subjects=config.subjects,
            alerts=Alerts(rules.load(Path(chosen.rules) if chosen.rules else None)),
            audit=self._audit,
            summary_s=chosen.summary_s,
            recorder=self._recorder,
            store=self._store,
            checkpoints=saved,
        )
        self.model_names = [model.spec.name for model, _ in served]
        self._stopping = False
        self._context = zmq.Context()
        self._door = Door(self._context, own, keys_file, config.limits, self.metrics)
        self._leaving: set[Connection] = set()  # have been told why
        self._unwelcome: set[Connection] = set()  # are being told
        self._clients = self._context.socket(zmq.ROUTER)
        self._publisher = Publisher(self._context, self._door, config.limits)
        limits = config.limits
        self._clients.setsockopt(zmq.SNDHWM, _SENDING)
        self._publisher.socket.setsockopt(zmq.SNDHWM, limits.max_queued_messages)
        for one in (self._clients, self._publisher.socket):
            one.setsockopt(zmq.LINGER, 1000)
            # TCP says nothing of a host that vanished; ZeroMQ's own heartbeat does.
            one.setsockopt(zmq.HEARTBEAT_IVL, 5_000)
            one.setsockopt(zmq.HEARTBEAT_TIMEOUT, 15_000)
        longest = _HARD_MAX * limits.max_message_bytes
        self._clients.setsockopt(zmq.MAXMSGSIZE, longest)
        self._clients.setsockopt(zmq.RCVHWM, max(2, limits.max_queued_bytes // longest))
        # A peer that is gone or does not read is an error to see, not a message to lose.
        self._clients.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._clients.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._door.guard(self._clients, "clients")
        self._door.guard(self._publisher.socket, "subscribers")
        self._door.open()
        self.endpoints = Endpoints(
            _bind(self._clients, config.bind),
            _bind(self._publisher.socket, config.publish),
            metrics.serve(self.metrics, config.metrics) if config.metrics else "",
        )

    def stop(self) -> None:
        """Finish what has arrived, then let :meth:`run` return."""
        self._stopping = True

    def run(self) -> None:
        """Serve until :meth:`stop`, SIGTERM or SIGINT."""
        signal.set_wakeup_fd(self._waker.fileno())  # ends a poll at once when a signal comes
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.stop())
        arrivals, signals = zmq.Poller(), zmq.Poller()
        for one in (self._clients, self._publisher.socket):
            arrivals.register(one, zmq.POLLIN)
        for poller in (arrivals, signals):
            poller.register(self._woken, zmq.POLLIN)
        try:
            self._loop(arrivals, signals)
        finally:
            signal.set_wakeup_fd(-1)
            self._close()

    def _wake(self) -> None:
        """End the poll, from any thread."""
        with contextlib.suppress(BlockingIOError, OSError):  # full, or the server is gone
            self._waker.send(b"\0")

    def _loop(self, arrivals: zmq.Poller, signals: zmq.Poller) -> None:
        gc.freeze()  # what was made so far stays; no collection need look at it again
        next_tick = time.monotonic() + _TICK_S
        stopped = math.inf
        arrival = time.monotonic()
        self.engine.restore(arrival)
        while True:
            all_read = self._receive(arrival)
            # What comes during a step or a deaf pause is taken to have come at its beginning: its
            # deadline counts from then, so that no one is late for having been left in the socket.
            arrival = now = time.monotonic()
            pause = self.engine.turn(now)
            if now >= next_tick:
                self.engine.tick(now)
                self._sweep(now)
                next_tick = now + _TICK_S
            if self.engine.handover is not None:
                self._hand_over()
            if self._stopping:
                stopped = min(stopped, now)
                self.engine.draining = True
            late = now > stopped + self.config.limits.drain_s
            graced = late or (all_read and now > stopped + _GRACE_S)
            drained = graced and self.engine.drain(at_once=late)
            all_sent = self._send()
            if drained and (all_sent or late):
                return
            next_tick = min(next_tick, now + _GRACE_S) if self._stopping else next_tick
            until = min(next_tick, pause.until, math.inf if all_sent else now + _RETRY_S)
            left_s = until - time.monotonic()
            if left_s > 0:
                (signals if pause.deaf else arrivals).poll(math.ceil(left_s * 1000))
                self._hush()
                if not pause.deaf:
                    arrival = time.monotonic()

    def _hand_over(self) -> None:
        """Give all streams to another server, once they can be; nothing else is done meanwhile."""
        if not self.engine.movable:
            return
        assert self.engine.handover is not None
        request = self.engine.handover[1]
        try:
            own = keys.pair(Path(self.config.security.key)) if request.key else None
            identity = keys.Identity(own, keys.public(request.key)) if own else None
            handover.give(self.engine.take_all(), request.to, identity)
        except MurmurError as error:
            log.error("no stream was given to %s: %s", request.to, error)
            self.engine.keep(str(error))
            return
        log.info("all streams were given to %s", request.to)
        self.engine.give_away(request)
        self.stop()

    def _hush(self) -> None:
        """Take note of having been woken."""
        with contextlib.suppress(BlockingIOError):
            self._woken.recv(4096, socket.MSG_DONTWAIT)

    def _receive(self, arrival: float) -> bool:
        """Hand what has come to the engine; return whether that was all, and all is done."""
        all_read = self._read(arrival)
        return self.engine.catch_up(_LONGEST_DRAIN_S) and all_read

    def _read(self, arrival: float) -> bool:
        until = time.monotonic() + _LONGEST_DRAIN_S
        while time.monotonic() < until:
            try:
                peer = self._clients.recv(zmq.NOBLOCK)
            except zmq.Again:
                return True
            frame = self._clients.recv(copy=False)
            body = frame.bytes
            while frame.more:
                frame = self._clients.recv(copy=False)
                body = b""  # the engine refuses it
            account, connection = self._door.visitor(frame, arrival, "clients")
            if account is None:  # its key is not valid any more
                self._door.cut(connection)
            elif not self.engine.receive(peer, body, arrival, account):
                self._unwelcome.add(connection)
        return False

    def _sweep(self, now: float) -> None:
        """End connections that nobody uses, and those that have no place here."""
        for connection in self._leaving:
            self._door.cut(connection)
        self._leaving, self._unwelcome = self._unwelcome, set()
        for account in self._door.sweep(now):
            for peer_id in list(account.peers):
                self.engine.drop(peer_id, "other_key")

    def _send(self) -> bool:
        """Send what there is; return whether every peer had room for it."""
        self._publisher.send(self.engine.published, time.monotonic())
        self.engine.published.clear()
        for peer_id, body in self.engine.turned_away:
            with contextlib.suppress(zmq.ZMQError):  # nobody's loss if it is gone or does not read
                self._clients.send_multipart((peer_id, body), zmq.NOBLOCK)
        self.engine.turned_away.clear()
        lost: list[tuple[bytes, str]] = []
        all_sent = True
        for peer_id in self.engine.waiting():
            reason = self._send_to(peer_id)
            if reason:
                lost.append((peer_id, reason))
            elif self.engine.peers[peer_id].unsent:
                all_sent = False
        for peer_id, reason in lost:
            log.warning("peer %s given up: %s", peer_id.hex(), reason)
            self.engine.drop(peer_id, reason)
        return all_sent

    def _send_to(self, peer_id: bytes) -> str:
        """Send what a peer has room for; return why it must be given up, or nothing."""
        peer = self.engine.peers[peer_id]
        while peer.unsent:
            body = peer.take()
            try:
                self._clients.send_multipart((peer_id, body), zmq.NOBLOCK)
            except zmq.Again:
                peer.put_back(body)
                too_many = peer.unsent > self.config.limits.max_queued_bytes
                return "slow_reader" if too_many else ""
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
                return "gone"
        return ""

    def _close(self) -> None:
        self._door.close()
        self._clients.close()
        self._publisher.socket.close()
        self._waker.close()
        self._woken.close()
        if self._store is not None:
            self._store.close()
        if self._audit is not None:
            self._audit.close()
        self._context.term()
        if self._recorder is not None:
            self._recorder.stop()


def runtime(model: Model, config: Config) -> Runtime:
    """Return the runtime of the configured provider for a model, behind its gate if it has one."""
    if model.gate is not None:
        bare = model._replace(gate=None)
        detector = runtime(model.gate, config)
        return GatedRuntime(model.spec, runtime(bare, config), detector, model.gate.spec)
    limits = config.limits
    row_bytes = max(1, 4 * model.spec.state_size)
    num_slots = max(1, min(limits.max_streams, limits.max_state_mb * 2**20 // row_bytes))
    if config.provider == "cuda":
        from engine.device import DeviceRuntime  # needs the extra 'gpu'

        return DeviceRuntime(model, num_slots, device="cuda")
    return CpuRuntime(model, num_slots, config.num_threads)


def _check_hashes(models: list[Model], wanted: dict[str, str]) -> None:
    """Check that models are the ones that the configuration means.

    Raises
    ------
    ConfigError
        If one is another, or a hash is of none of them and would check nothing.
    """
    found = {model.spec.name: model.sha256 for model in models}
    for name, sha256 in wanted.items():
        if name not in found:
            raise ConfigError(f"sha256: expected one of the models {sorted(found)}, found {name!r}")
        if found[name] != sha256:
            raise ConfigError(f"sha256 of {name}: expected {sha256}, found {found[name]}")


def _keys(config: Config) -> tuple[Pair, Path] | None:
    """Return the server's key and the file of its clients' keys, if there are any.

    Raises
    ------
    ConfigError
        If there are none, and an address can be reached from elsewhere.
    """
    chosen = config.security
    if bool(chosen.key) != bool(chosen.keys):
        raise ConfigError("security: expected both key and keys, or neither")
    if chosen.key:
        return keys.pair(Path(chosen.key)), Path(chosen.keys)
    for name, address in (("bind", config.bind), ("publish", config.publish)):
        if not chosen.allow_plain and _LOOPBACK.match(address) is None:
            raise ConfigError(
                f"{name} = {address!r}: expected security.key and security.keys, as it can be "
                "reached from other machines (murmur keys make), or security.allow_plain = true"
            )
    return None


def _bind(one: zmq.Socket[bytes], address: str) -> str:
    try:
        one.bind(address)
    except zmq.ZMQError as error:
        raise zmq.ZMQError(error.errno, f"cannot bind {address}: {error}") from None
    return one.getsockopt_string(zmq.LAST_ENDPOINT)
