"""An engine without sockets, under a clock that the test sets; peers have names."""

import math
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from engine import messages as m
from engine import model_file
from engine.alerts import Alerts
from engine.audit import Audit
from engine.checkpoint import Store
from engine.config import Config, Limits, Subjects
from engine.loop import Engine
from engine.metrics import Metrics
from engine.recorder import Recorder
from engine.server import runtime

Kind = TypeVar("Kind", bound=m.Message)

# Ten thousand times the capacity of a slow machine: tests of admission set their own. No gap is
# bridged, as most of the tests' gaps are short: tests of bridging say how long theirs may be.
_AMPLE = {"max_streams": 16, "max_load": 1e9, "bridge_s": 0.0}
_ANY = Subjects()


class Driven:
    """An engine that serves some model files to peers who were all welcomed."""

    def __init__(
        self,
        *paths: Path,
        subjects: Subjects = _ANY,
        recorder: Recorder | None = None,
        store: Store | None = None,
        alerts: Alerts | None = None,
        audit: Audit | None = None,
        **limits: Any,
    ) -> None:
        bounds = Limits(**(_AMPLE | limits))
        config = Config(threads=1, limits=bounds)
        served = [(model, runtime(model, config)) for model in map(model_file.load, paths)]
        self.runtimes = [each for _, each in served]
        self.metrics = Metrics()
        self.now = 1000.0
        self._woken = threading.Event()
        self.engine = Engine(
            served,
            bounds,
            self.metrics,
            clock=lambda: self.now,
            wake=self._woken.set,
            subjects=subjects,
            recorder=recorder,
            store=store,
            alerts=alerts,
            audit=audit,
        )
        self._heard: dict[str, list[Any]] = {}

    def say(self, peer: str, *requests: m.Message) -> None:
        """Send messages of a peer, after its hello if it is a new one."""
        if peer.encode() not in self.engine.peers:
            self.throw(peer, m.body([m.encode(m.Hello(m.VERSION))]))
        self.throw(peer, m.body([m.encode(request) for request in requests]))

    def throw(self, peer: str, body: bytes) -> None:
        """Send any bytes of a peer."""
        self.engine.receive(peer.encode(), body, self.now)

    def open(self, peer: str, name: str, model: str = "tiny", **fields: Any) -> None:
        fields = {"rate_hz": 100.0, "unit": "mV"} | fields
        self.say(peer, m.Open(name, model, **fields))

    def refused(self) -> dict[str, float]:
        """Return how many messages were not accepted, by code, as Prometheus would read it."""
        return {
            sample.labels["code"]: sample.value
            for family in self.metrics.collect()
            for sample in family.samples
            if sample.name == "murmur_refused_total"
        }

    def turn(self) -> bool:
        """Let the engine run one batch, or the clock go on to when it wants to; False if idle."""
        until = self.engine.turn(self.now).until
        if until == math.inf:
            return False
        self.now = max(self.now, until)
        return True

    def run(self) -> None:
        """Turn until nothing waits."""
        while self.turn():
            pass

    def settle(self) -> None:
        """Turn until nothing waits, nor is on its way in another thread."""
        self.run()
        lanes = self.engine._lanes.values()
        while any(lane.wing.pending(slot) for lane in lanes for slot in lane.sessions):
            assert self._woken.wait(20.0), "results did not come"
            self._woken.clear()
            self.run()

    def heard(self, peer: str) -> list[Any]:
        """Return all that a peer was told since the beginning."""
        told = self._heard.setdefault(peer, [])
        while peer.encode() in self.engine.waiting():
            told += m.decode_replies(self.engine.take(peer.encode()))
        return told

    def told(self, peer: str, kind: type[Kind], stream: str | None = None) -> list[Kind]:
        """Return what a peer was told of one kind, of one stream."""
        return [
            message
            for message in self.heard(peer)
            if isinstance(message, kind) and stream in (None, getattr(message, "stream", None))
        ]


def chunks(
    name: str, signal: NDArray[np.float32], cuts: Iterable[int] = (), seq: int = 0, index: int = 0
) -> list[m.Chunk]:
    """Cut a signal at some places into the chunks of a stream; equal places give no empty one."""
    made = []
    for part in np.split(signal, sorted(cuts)):
        if len(part):
            made.append(m.Chunk(name, seq + len(made), index, part.astype("<f4").tobytes()))
            index += len(part)
    return made
