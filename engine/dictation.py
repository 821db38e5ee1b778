"""Recordings dictated to a running server, many at once, and what comes back and when.

Each recording is a stream of its own, sent in real time or as fast as the server's credit allows,
then flushed and closed. One thread. What is made of the answers: see :mod:`engine.transcribe` and
:mod:`engine.evaluate`.
"""

import contextlib
import math
import re
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine import messages
from engine.audio import Sound
from engine.child import served
from engine.client import Client, Stream
from engine.errors import Disconnected, MurmurError, Refused
from engine.messages import Final, Message, Speech

MODEL = "english"
UNIT = "1"  # sound in [-1, 1]
_LONGEST_WAIT_S = 0.5


class Plan(NamedTuple):
    """How to dictate."""

    model: str = MODEL
    streams: int = 1  # recordings under way at once
    pace: float = 0.0  # multiple of real time; 0: as fast as credit allows
    chunk_s: float = 0.5  # of sound in a chunk
    silence_s: float = 0.0  # behind each recording, as a microphone would go on
    speech: Speech = Speech()


class Take:
    """One recording on its way.

    Attributes
    ----------
    path : Path
    rate_hz : float
    channels : int
        Of the file; they were mixed down to one.
    begin : float
        When its first sample is taken to have been spoken, of the monotonic clock.
    sent : list of (int, float)
        The index after each chunk, and when it was sent.
    sound_samples : int
        Of the recording, without the silence behind it.
    flushed_at : float
        When the tail was asked for; infinite before.
    told : list of (float, Message)
        When each result, gap and error came in.
    faults : list of str
        What went wrong.
    """

    def __init__(self, sound: Sound, stream: Stream, plan: Plan) -> None:
        self.path, self.rate_hz, self.channels = sound.path, sound.rate_hz, sound.channels
        self.stated_s = sound.seconds
        self.stream = stream
        self.begin = time.monotonic()
        self.sent: list[tuple[int, float]] = []
        self.sound_samples = self.clipped = 0
        self.flushed_at = self.closed_at = math.inf
        self.told: list[tuple[float, Message]] = []
        self.faults: list[str] = []
        self._sound, self._plan = sound, plan
        # A quarter of the credit, so that the server has something to do while an ack travels.
        self._longest = max(1, min(math.ceil(plan.chunk_s * self.rate_hz), stream.room // 4))
        self._silence = round(plan.silence_s * self.rate_hz)
        self._index = 0
        self._next = self._read()

    @property
    def seconds(self) -> float:
        return self.sound_samples / self.rate_hz

    @property
    def done_s(self) -> float:
        """Seconds of it that are through."""
        return self.stream.acked_index / self.rate_hz

    @property
    def over(self) -> bool:
        return self.stream.closed is not None

    @property
    def finals(self) -> list[Final]:
        return [message for _, message in self.told if isinstance(message, Final)]

    @property
    def text(self) -> str:
        """All that was said, as the finals have it."""
        return " ".join(final.text for final in self.finals if final.text)

    def take(self, at: float, message: Message) -> None:
        """Note what has come."""
        if isinstance(message, messages.Closed):
            self.closed_at = at
            if message.reason != "closed" and not self.faults:
                self.faults.append(f"{self.path}: the server ended it: {message.reason}")
            return
        if isinstance(message, messages.Error):
            self.faults.append(f"{self.path}: {message.code}: {message.reason}")
        self.told.append((at, message))

    def advance(self, now: float) -> float:
        """Send what is due and fits; return when to call again, whatever comes meanwhile."""
        while self._next is not None and not self.over:
            due = self._due()
            if due > now:
                return due
            if self.stream.room < len(self._next):
                return math.inf
            self._send(self._next)
        if self.over:
            return math.inf
        if self._next is None and self.flushed_at == math.inf:
            self.flushed_at = time.monotonic()
            self.stream.ask_flush()
        elif not self.stream.flushing:
            self.stream.ask_close()
        return math.inf

    def end(self) -> None:
        """Let go of the file and of the stream, which is over."""
        self._sound.close()
        if self.over:
            self.stream.close()

    def _due(self) -> float:
        """Return when the next chunk's last sample is spoken; at once if there is no pace."""
        if not self._plan.pace or self._next is None:
            return -math.inf
        return self.begin + (self._index + len(self._next)) / self.rate_hz / self._plan.pace

    def _send(self, block: NDArray[np.float32]) -> None:
        if not self._plan.pace and not self.sent:
            self.begin = time.monotonic()
        self._index += len(block)
        self.sent.append((self._index, time.monotonic()))
        with contextlib.suppress(Refused):  # it has ended meanwhile; that is told as well
            self.stream.send(block)
        self._next = self._read()

    def _read(self) -> NDArray[np.float32] | None:
        """Return the next block of sound, then of silence; None behind both."""
        try:
            block = self._sound.read(self._longest)
        except MurmurError as error:  # what came before it is worth having
            self.faults.append(str(error))
            return None
        self.sound_samples, self.clipped = self._sound.samples, self._sound.clipped
        if not len(block):
            block = np.zeros(min(self._silence, self._longest), np.float32)
            self._silence -= len(block)
        return block if len(block) else None


class Unheard(NamedTuple):
    """A recording that is no sound, or that the server does not take."""

    path: Path
    reason: str


def dictate(
    client: Client,
    paths: Iterable[Path],
    plan: Plan,
    show: Callable[[Sequence[Take]], None] = lambda _: None,
    hear: Callable[[Take, Message], None] = lambda *_: None,
) -> Iterator[Take | Unheard]:
    """Dictate recordings; yield each when its stream is over, in the order of their ends.

    Parameters
    ----------
    client : Client
    paths : iterable of Path
    plan : Plan
    show : callable
        Called often with those under way.
    hear : callable
        Takes each message as it comes, and whose it is.

    Yields
    ------
    Take or Unheard
        The second for a file that is no sound, or that the server does not take.

    Raises
    ------
    Refused, Disconnected
        If the server takes none at all, or does not answer.
    """
    waiting, active = deque(paths), dict[str, Take]()
    prefix = uuid.uuid4().hex[:6]
    number, room = 0, plan.streams
    try:
        while waiting or active:
            while waiting and len(active) < room:
                started = _start(client, waiting[0], f"{prefix}-{number}", plan, bool(active))
                if started is None:
                    room = len(active)
                    break
                waiting.popleft()
                number += 1
                if isinstance(started, Unheard):
                    yield started
                else:
                    active[started.stream.name] = started
            for take, message in _turn(client, active):
                hear(take, message)
            show(list(active.values()))
            for name in [name for name, take in active.items() if take.over]:
                take = active.pop(name)
                take.end()
                yield take
    finally:
        for take in active.values():
            take.end()


def _start(
    client: Client, path: Path, name: str, plan: Plan, may_wait: bool
) -> Take | Unheard | None:
    """Open a recording and its stream; None if there is no room for it before others end."""
    try:
        sound = Sound(path)
    except MurmurError as error:
        return Unheard(path, str(error))
    stem = re.sub(r"[^A-Za-z0-9_.:-]", "-", path.stem).lstrip("_.:-")[:40] or "sound"
    try:
        model = served(client, plan.model)
        stream = client.open(f"{stem}-{name}", model, sound.rate_hz, UNIT, speech=plan.speech)
    except Refused as refused:
        sound.close()
        if refused.code == "full" and may_wait:
            return None
        if refused.code == "bad_rate":
            return Unheard(path, f"{path}: {refused}")
        raise
    return Take(sound, stream, plan)


def _turn(client: Client, active: dict[str, Take]) -> Iterator[tuple[Take, Message]]:
    """Send what is due, and yield what comes until there is more to send."""
    now = time.monotonic()
    again = min((take.advance(now) for take in active.values()), default=now)
    wait_s = min(again - time.monotonic(), _LONGEST_WAIT_S)
    for at, message in client.timed_events(max(0.0, wait_s)):
        take = active.get(getattr(message, "stream", ""))
        if take is not None:
            take.take(at, message)
            yield take, message
    if client.silent_s > client.timeout_s:
        raise Disconnected(f"no answer from {client.address} for {client.silent_s:.0f} s")


def length_s(paths: Iterable[Path]) -> float:
    """Return how long recordings are together, as far as they can be read."""
    total = 0.0
    for path in paths:
        try:
            with Sound(path) as sound:
                total += sound.seconds
        except MurmurError:  # told when its turn comes
            continue
    return total
