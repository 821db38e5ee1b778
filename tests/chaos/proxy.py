"""A network that cannot be relied on: between client and server, body by body or byte by byte.

:class:`Proxy` stands between DEALERs and a ROUTER and does to the bodies that pass what its
faults say, in both directions. :class:`Cutter` stands between any two ends of TCP and breaks
connections in the middle of what they carry, as a failing link does: ZeroMQ connects again by
itself, and what was on its way is gone.
"""

import heapq
import math
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import zmq


class Faults(NamedTuple):
    """Shares of all bodies, 0 to 1, to which each thing is done; at most one to each body."""

    drop: float = 0.0
    delay: float = 0.0  # and with it all that comes behind, as in a network that stands still
    duplicate: float = 0.0
    reorder: float = 0.0  # held back until the next one has overtaken it
    truncate: float = 0.0  # all bytes from some place on are missing
    corrupt: float = 0.0  # one byte is another


class Line:
    """One direction of one connection: bodies in, bodies out when they are due.

    Parameters
    ----------
    faults : Faults
    rng : numpy.random.Generator
    delay_s : float
        How long a delayed body takes, and how long at most one waits to be overtaken.

    Attributes
    ----------
    done : Counter
        How often each fault was done, by its name; ``bodies`` of all.
    """

    def __init__(self, faults: Faults, rng: np.random.Generator, delay_s: float = 0.05) -> None:
        self.done: Counter[str] = Counter()
        self._rng, self._delay_s = rng, delay_s
        self._names = [*faults._fields, ""]
        self._shares = [*faults, 1.0 - sum(faults)]
        self._free = -math.inf  # when the network that stands still goes on
        self._queue: list[tuple[float, int, bytes]] = []  # (when due, number, body)
        self._number = 0
        self._held: tuple[float, bytes] | None = None  # who waits to be overtaken, until when

    def put(self, body: bytes, now: float) -> None:
        """Take a body."""
        self.done["bodies"] += 1
        fault = str(self._rng.choice(self._names, p=self._shares))
        self.done[fault] += bool(fault)
        if fault == "drop":
            return
        if fault == "reorder" and self._held is None:
            self._held = (now + self._delay_s, body)
            return
        if fault == "delay":
            self._free = now + self._delay_s
        elif fault == "truncate":
            body = body[: self._rng.integers(len(body))] if body else body
        elif fault == "corrupt" and body:
            place = int(self._rng.integers(len(body)))
            other = body[place] ^ int(self._rng.integers(1, 256))
            body = body[:place] + bytes([other]) + body[place + 1 :]
        self._send(body, now)
        if fault == "duplicate":
            self._send(body, now)
        if self._held is not None:
            self._send(self._held[1], now)
            self._held = None

    def take(self, now: float) -> list[bytes]:
        """Return the bodies that are due."""
        if self._held is not None and self._held[0] <= now:
            self._send(self._held[1], now)
            self._held = None
        due = []
        while self._queue and self._queue[0][0] <= now:
            due.append(heapq.heappop(self._queue)[2])
        return due

    @property
    def until(self) -> float:
        """When the next body is due, if no other comes before."""
        times = [self._queue[0][0]] if self._queue else []
        times += [self._held[0]] if self._held is not None else []
        return min(times, default=math.inf)

    def _send(self, body: bytes, now: float) -> None:
        heapq.heappush(self._queue, (max(now, self._free), self._number, body))
        self._number += 1


class Proxy:
    """Clients' address of a server behind an unreliable network; a thread of its own.

    Parameters
    ----------
    server : str
        Address of its ROUTER.
    up, down : Faults
        What is done to bodies on their way to the server, and to those on their way back.
    seed : int
        The k-th body of a client in a direction meets the same fault each time.
    delay_s : float

    Attributes
    ----------
    address : str
        For the clients.
    """

    def __init__(
        self, server: str, up: Faults, down: Faults, seed: int = 0, delay_s: float = 0.05
    ) -> None:
        self._server, self._up, self._down = server, up, down
        self._seed, self._delay_s = seed, delay_s
        self._lines: dict[tuple[bytes, bool], Line] = {}  # by client, and whether on its way up
        self._context = zmq.Context()
        self._context.setsockopt(zmq.LINGER, 0)
        self._front = self._context.socket(zmq.ROUTER)
        self._front.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._front.setsockopt(zmq.RCVHWM, 0)
        self._front.setsockopt(zmq.SNDHWM, 0)
        self._front.bind("tcp://127.0.0.1:0")
        self.address = self._front.getsockopt_string(zmq.LAST_ENDPOINT)
        self._backs: dict[bytes, zmq.Socket[bytes]] = {}
        self._poller = zmq.Poller()
        self._poller.register(self._front, zmq.POLLIN)
        self._ends, self._end = socket.socketpair()
        self._poller.register(self._ends, zmq.POLLIN)
        self._thread = threading.Thread(target=self._run, name="proxy")
        self._thread.start()

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *_: object) -> None:
        self._end.send(b"\0")
        self._thread.join()

    def done(self, up: bool) -> Counter[str]:
        """Return how often each fault was done in a direction so far; ``bodies`` of all."""
        lines = list(self._lines.items())
        return sum((line.done for (_, way), line in lines if way == up), Counter())

    def _run(self) -> None:
        with ExitStack() as stack:
            stack.callback(self._context.term)
            stack.callback(self._ends.close)
            stack.callback(self._end.close)
            stack.enter_context(self._front)
            while True:
                wait_s = min((line.until for line in self._lines.values()), default=math.inf)
                wait_s -= time.monotonic()
                timeout = None if wait_s == math.inf else max(0, math.ceil(wait_s * 1000))
                ready = dict(self._poller.poll(timeout))
                if self._ends.fileno() in ready:
                    break
                self._read(ready)
                self._write()
            for back in self._backs.values():
                back.close()

    def _read(self, ready: dict[object, int]) -> None:
        now = time.monotonic()
        if self._front in ready:
            client, body = self._front.recv_multipart()
            if client not in self._backs:
                self._connect(client)
            self._lines[client, True].put(body, now)
        for client, back in self._backs.items():
            if back in ready:
                self._lines[client, False].put(back.recv(), now)

    def _write(self) -> None:
        now = time.monotonic()
        for (client, up), line in self._lines.items():
            for body in line.take(now):
                if up:
                    self._backs[client].send(body)
                else:
                    self._front.send_multipart((client, body))

    def _connect(self, client: bytes) -> None:
        """Be this client to the server: by its routing id, the server knows it again."""
        back = self._backs[client] = self._context.socket(zmq.DEALER)
        back.setsockopt(zmq.IDENTITY, client)
        back.setsockopt(zmq.SNDHWM, 0)
        back.setsockopt(zmq.RCVHWM, 0)
        back.connect(self._server)
        self._poller.register(back, zmq.POLLIN)
        number = len(self._backs)
        for up, faults in ((True, self._up), (False, self._down)):
            rng = np.random.default_rng((self._seed, number, up))
            self._lines[client, up] = Line(faults, rng, self._delay_s)


class Cutter:
    """A server's address over links that break; a thread of its own.

    Parameters
    ----------
    server : str
        Address of any server of TCP, such as a ROUTER's.
    lives : callable
        Returns how many bytes, of both directions together, the next connection carries. Then
        it is reset, wherever in a frame that is.

    Attributes
    ----------
    address : str
        For the clients.
    cuts : int
        Connections that were broken so far.
    """

    def __init__(self, server: str, lives: Callable[[], float]) -> None:
        host, port = server.removeprefix("tcp://").rsplit(":", 1)
        self._server, self._lives = (host, int(port)), lives
        self.cuts = 0
        self._front = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._front.getsockname()[1]}"
        self._ends, self._end = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="cutter")
        self._thread.start()

    def __enter__(self) -> "Cutter":
        return self

    def __exit__(self, *_: object) -> None:
        self._end.send(b"\0")
        self._thread.join()

    def _run(self) -> None:
        others: dict[socket.socket, socket.socket] = {}
        left: dict[frozenset[socket.socket], float] = {}
        with self._front, self._ends, self._end:
            while True:
                ready, _, _ = select.select([self._front, self._ends, *others], [], [])
                if self._ends in ready:
                    break
                for one in ready:
                    if one is self._front:
                        self._connect(others, left)
                    elif one in others and not self._carry(one, others[one], left):
                        pair = frozenset((one, others[one]))
                        del left[pair]
                        for each in pair:
                            del others[each]
                            each.close()
            for one in others:
                one.close()

    def _connect(
        self,
        others: dict[socket.socket, socket.socket],
        left: dict[frozenset[socket.socket], float],
    ) -> None:
        near, _ = self._front.accept()
        try:
            far = socket.create_connection(self._server)
        except ConnectionRefusedError:  # no server at present
            near.close()
            return
        for one in (near, far):
            # Closing is then a reset: what the kernel still holds is thrown away, as by a crash.
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        others[near], others[far] = far, near
        left[frozenset((near, far))] = self._lives()

    def _carry(
        self,
        source: socket.socket,
        sink: socket.socket,
        left: dict[frozenset[socket.socket], float],
    ) -> bool:
        """Hand on what has come; return whether the connection lives on."""
        pair = frozenset((source, sink))
        try:
            data = source.recv(65536)
            whole = len(data) < left[pair]
            sink.sendall(data if whole else data[: int(left[pair])])
        except OSError:  # either end is gone
            return False
        left[pair] -= len(data)
        self.cuts += not whole
        return bool(data) and whole
