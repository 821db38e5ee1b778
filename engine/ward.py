"""Recordings that lie side by side on a ward: sent to a server, and what is told of each.

Each is a stream of its own, sent as fast as the server's credit allows, then flushed and closed.
Chunks can be of random sizes, and some can be lost on purpose. One thread. What is made of the
answers: see :mod:`engine.evaluate_ecg` and :mod:`engine.evaluate_rhythm`.
"""

import contextlib
import math
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine import messages
from engine.child import served
from engine.client import Client, Stream
from engine.errors import Disconnected, MurmurError, Refused
from engine.messages import Message
from engine.recordings import stretches

_TURN_S = 0.5  # at most, to wait for an answer before looking again
# What a server says of one recording; any other refusal concerns all.
_OWN_FAULT = frozenset({"bad_rate", "bad_unit", "bad_channels"})


class Signal(NamedTuple):
    """What is to be sent."""

    name: str
    samples: NDArray[np.float32]  # (samples, channels) in `unit`; NaN where one is missing
    rate_hz: float
    unit: str

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.rate_hz


class Plan(NamedTuple):
    """How to send it."""

    model: str = "heart"
    streams: int = 8  # recordings under way at once
    chunk_s: float = 0.5  # of signal in a chunk, at most
    seed: int | None = None  # given: each chunk's size is drawn, from one sample to `chunk_s`
    lose: float = 0.0  # share of the chunks that is lost
    burst_s: float = 0.0  # above 0: lost in bursts of so many seconds, of the same total share

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises
        ------
        MurmurError
        """
        if not 0 <= self.lose < 1:
            raise MurmurError(f"lose: expected a share from 0 to below 1, found {self.lose:g}")
        if self.burst_s and not self.lose:
            raise MurmurError("burst: expected a share to lose as well")


class Patient:
    """One recording on its way.

    Attributes
    ----------
    name : str
    told : list of Message
        Each result, gap and error, in the order of coming.
    missing : list of (int, int)
        First sample and the one after the last of each stretch that was not sent.
    fault : str
        What went wrong, if anything did.
    """

    def __init__(self, signal: Signal, stream: Stream | None, plan: Plan) -> None:
        self.name, self.seconds, self.length = signal.name, signal.seconds, len(signal.samples)
        self.told: list[Message] = []
        self.fault = ""
        self.stream = stream
        self._signal = signal
        longest = max(1, math.ceil(plan.chunk_s * signal.rate_hz))
        if stream is not None:  # so the server has something to do while an ack travels
            longest = max(1, min(longest, stream.room // 4))
        sent = list(cuts(signal, longest, plan))
        self.missing = _between(sent, self.length)
        self._chunks = iter(sent)
        self._next = next(self._chunks, None)
        self._index = 0
        self._asked = False

    @property
    def done_s(self) -> float:
        """Seconds of it that are through."""
        return self.stream.acked_index / self._signal.rate_hz if self.stream else 0.0

    @property
    def over(self) -> bool:
        return self.stream is None or self.stream.closed is not None

    def take(self, message: Message) -> None:
        """Note what has come."""
        if isinstance(message, messages.Closed):
            if message.reason != "closed":
                self.fault = self.fault or f"{self.name}: the server ended it: {message.reason}"
            return
        if isinstance(message, messages.Error):
            self.fault = f"{self.name}: {message.code}: {message.reason}"
        self.told.append(message)

    def advance(self) -> None:
        """Send what fits; behind all, ask for the tail and then for the end."""
        stream = self.stream
        if stream is None or self.over:
            return
        while self._next is not None:
            start, end = self._next
            if stream.room < end - start:
                return
            stream.skip(start - self._index)
            with contextlib.suppress(Refused):  # it has ended meanwhile; that is told as well
                stream.send(self._signal.samples[start:end])
            self._index = end
            self._next = next(self._chunks, None)
        if not self._asked:
            self._asked = True
            stream.ask_flush()
        elif not stream.flushing:
            stream.ask_close()

    def end(self) -> None:
        """Let go of the stream, which is over."""
        if self.stream is not None and self.over:
            self.stream.close()


def watch(
    client: Client,
    signals: Iterable[Signal],
    plan: Plan,
    show: Callable[[Sequence[Patient]], None] = lambda _: None,
) -> Iterator[Patient]:
    """Send recordings; yield each when its stream is over, in the order of their ends.

    Parameters
    ----------
    client : Client
    signals : iterable of Signal
        Asked for the next only when there is room for it.
    plan : Plan
    show : callable
        Called often with those under way.

    Raises
    ------
    Refused, Disconnected
        If the server takes none at all, or does not answer.
    """
    waiting, active = iter(signals), dict[str, Patient]()
    following = next(waiting, None)
    prefix, number, room = uuid.uuid4().hex[:6], 0, plan.streams
    while following is not None or active:
        while following is not None and len(active) < room:
            patient = _admit(client, following, f"{prefix}-{number}", plan, bool(active))
            if patient is None:
                room = len(active)
                break
            number += 1
            following = next(waiting, None)
            if patient.stream is None:
                yield patient
            else:
                active[patient.stream.name] = patient
        _turn(client, active)
        show(list(active.values()))
        for name in [name for name, patient in active.items() if patient.over]:
            patient = active.pop(name)
            patient.end()
            yield patient


def _admit(client: Client, signal: Signal, name: str, plan: Plan, may_wait: bool) -> Patient | None:
    """Open a recording's stream; None if there is no room for it before others end."""
    stem = re.sub(r"[^A-Za-z0-9_.:-]", "-", signal.name).lstrip("_.:-")[:40] or "record"
    try:
        stream = client.open(
            f"{stem}-{name}",
            served(client, plan.model),
            signal.rate_hz,
            signal.unit,
            channels=signal.samples.shape[1],
        )
    except Refused as refused:
        if refused.code == "full" and may_wait:
            return None
        if refused.code not in _OWN_FAULT:
            raise
        patient = Patient(signal, None, plan)
        patient.fault = f"{signal.name}: {refused}"
        return patient
    return Patient(signal, stream, plan)


def _turn(client: Client, active: dict[str, Patient]) -> None:
    """Send what fits, and take what comes."""
    for patient in active.values():
        patient.advance()
    for message in client.events(_TURN_S if active else 0.0):
        patient = active.get(getattr(message, "stream", ""))  # type: ignore[assignment]
        if patient is not None:
            patient.take(message)
    if client.silent_s > client.timeout_s:
        raise Disconnected(f"no answer from {client.address} for {client.silent_s:.0f} s")


def cuts(signal: Signal, longest: int, plan: Plan) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each chunk that is sent: in order, none with a missing sample.

    What is lost hangs on the seed and the recording's name only, not on the other recordings.
    """
    rng = np.random.default_rng([plan.seed or 0, *signal.name.encode()])
    there = np.array(np.isfinite(signal.samples).all(axis=1))
    if plan.burst_s:
        for start, end in _bursts(len(there), plan, signal.rate_hz, rng):
            there[start:end] = False
    lone = 0.0 if plan.burst_s else plan.lose
    for begin, end in stretches(np.where(there, np.float32(0), np.float32(np.nan))):
        start = begin
        while start < end:
            size = longest if plan.seed is None else int(rng.integers(1, longest + 1))
            stop = min(start + size, end)
            if not lone or rng.random() >= lone:
                yield start, stop
            start = stop


def _bursts(
    length: int, plan: Plan, rate_hz: float, rng: np.random.Generator
) -> Iterator[tuple[int, int]]:
    """Yield bursts so far apart, by an exponential distribution, that the share is lost."""
    burst = max(1, round(plan.burst_s * rate_hz))
    apart = burst * (1 - plan.lose) / plan.lose
    place = rng.exponential(apart)
    while place < length:
        yield int(place), int(place) + burst
        place += burst + rng.exponential(apart)


def _between(chunks: Sequence[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """Return the stretches that no chunk covers."""
    edges = [(0, 0), *chunks, (length, length)]
    return [(end, start) for (_, end), (start, _) in pairwise(edges) if start > end]
