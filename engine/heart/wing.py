"""The heart wing: a step's scores and samples in; beats and measures out.

Measures are told once a second of signal, all that is known, and at once where a rule needs it:
a run, slow or fast beats, a pause. A beat is known only some time after it was; what is told at
the end of a second is of the beats that are known by then. Nothing told hangs on how samples were
cut into steps: what happens in one is told in the order in which it was known.
"""

import math
from collections.abc import Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import msgspec
import numpy as np

from engine import messages
from engine.errors import fault
from engine.heart import classes, seconds
from engine.heart.activity import Second, steepness
from engine.heart.beats import REFRACTORY_S, Beat, BeatFinder
from engine.heart.classes import BeatClassifier, Stepper
from engine.heart.fibrillation import Fibrillation
from engine.heart.quality import Quality
from engine.heart.rhythm import LONGEST_INTERVAL_S, Rhythm
from engine.heart.seconds import Seconds, restless
from engine.messages import Gapped, Message
from engine.model_file import ModelSpec
from engine.wing import Outputs, PromptWing, Rows, Timeline

_FIBRILLATION = "rhythm_a"  # CinC 2017: N normal, A atrial fibrillation, O other, ~ noise
_NEVER = 2**62  # a position beyond all; a lag added to it stays within int64

# The samples up to here sufficed, a beat before the end of a second, and which of them it was.
Event = tuple[int, int, "Beat | Judged"]


class Judged(NamedTuple):
    """A second of signal: what is told of it, and of each lead its greatest slope and mean."""

    values: dict[str, float]
    slopes: list[float]
    means: list[float]


class Carried(NamedTuple):
    """All that a stream carries in the wing, as plain data."""

    finder: tuple[float, int, int, int]
    seconds: seconds.Carried
    quality: bytes
    fibrillation: list[bool]
    rhythm: bytes
    cut: bool
    named: classes.Carried | None
    heard: dict[str, float]


class Naming(NamedTuple):
    """The model that steps once a beat, and what runs it."""

    spec: ModelSpec
    stepper: Stepper


class HeartWing(PromptWing):
    """Beats, rhythm and signal quality of all streams of a heart model.

    Parameters
    ----------
    spec : ModelSpec
    num_slots : int
    naming : Naming, optional
        Without it, a beat's class is the one that the model of `spec` gives it.
    """

    def __init__(self, spec: ModelSpec, num_slots: int, naming: Naming | None = None) -> None:
        self._rate_hz, channels = spec.input.rate_hz, spec.input.channels
        self.delay = spec.look_ahead_samples + round(REFRACTORY_S * self._rate_hz)
        self.finder = BeatFinder(spec, num_slots)
        self.classifier: BeatClassifier | None = None
        if naming is not None and spec.beats is not None:
            found_after = self.delay + spec.hop_samples
            self.classifier = BeatClassifier(
                naming.spec, spec.beats, naming.stepper, num_slots, found_after
            )
            self.delay = max(self.delay, self.classifier.after)
            self.runs = {naming.spec.name: naming.stepper.runs}
            self.failed = naming.stepper.failed  # also of what the second model fails on
        self._heard: dict[int, dict[str, float]] = {}  # the rhythm that the last beat told
        self.seconds = Seconds(self._rate_hz, channels, num_slots)
        self.quality = Quality(self._rate_hz, channels)
        self.fibrillation = Fibrillation(self.seconds.slow_hz)
        self._rhythm: dict[int, Rhythm] = {}
        self._cut = np.zeros(num_slots, bool)  # the next sample does not follow the last
        self._due = np.full(num_slots, _NEVER)  # position of the next pause to be told

    def reset(self, slot: int) -> None:
        self.finder.reset(slot)
        self._reset_signal(slot)
        self._rhythm[slot] = Rhythm(self._rate_hz)
        self._heard[slot] = {}
        if self.classifier is not None:
            self.classifier.reset(slot)

    def gap(self, slot: int, state: Gapped) -> None:
        """Join nothing over lost samples."""
        if state == "reset":
            self.finder.reset(slot)
        self._reset_signal(slot)
        if self.classifier is not None:
            self.classifier.gap(slot)

    def _reset_signal(self, slot: int) -> None:
        self.seconds.reset(slot)
        self.quality.reset(slot)
        self.fibrillation.reset(slot)
        self._cut[slot] = True

    def take(self, slot: int) -> Carried:
        """Return a copy of all that a stream carries, to be put back here or elsewhere."""
        return Carried(
            self.finder.take(slot),
            self.seconds.take(slot),
            self.quality.take(slot),
            self.fibrillation.take(slot),
            msgspec.msgpack.encode(self._rhythm[slot]),
            bool(self._cut[slot]),
            None if self.classifier is None else self.classifier.take(slot),
            self._heard[slot],
        )

    def put(self, slot: int, carried: Sequence[Any]) -> None:
        """Go on from what was taken, also after a way through MessagePack."""
        carried = Carried(*carried)
        self.finder.put(slot, carried.finder)
        self.seconds.put(slot, carried.seconds)
        self.quality.put(slot, carried.quality)
        self.fibrillation.put(slot, carried.fibrillation)
        self._rhythm[slot] = msgspec.msgpack.decode(carried.rhythm, type=Rhythm)
        self._cut[slot] = carried.cut
        if self.classifier is not None and carried.named is not None:
            self.classifier.put(slot, carried.named)
        self._heard[slot] = carried.heard
        self._await(slot)

    def push(self, rows: Rows, outputs: Outputs) -> list[tuple[int, Message]]:
        """Return beats and measures as (row, message)."""
        for row in np.flatnonzero(self._cut[rows.slots]).tolist():
            slot = int(rows.slots[row])
            self._rhythm[slot].gap(int(rows.start[row]))
            self._cut[slot] = False
            self._await(slot)
        lag = self.finder.lag(outputs, rows.hops)
        if self.classifier is not None:
            lag = max(lag, self.classifier.after)
        until = rows.start + rows.samples.shape[1]
        events = self._events(rows, outputs)
        for row in np.flatnonzero(self._due[rows.slots] + lag <= until).tolist():
            events.setdefault(row, [])
        told: list[tuple[int, Message]] = []
        for row, happened in events.items():
            try:
                messages = self._tell(rows, row, happened, lag, int(until[row]))
            except Exception as error:  # noqa: BLE001 - whatever it is, it is this stream's
                self.failed[int(rows.slots[row])] = fault(f"stream {rows.streams[row].name}", error)
                continue
            told += [(row, message) for message in messages]
        return told

    def _events(self, rows: Rows, outputs: Outputs) -> dict[int, list[Event]]:
        """Return the beats that a step decided and the seconds that it ended, by row."""
        events: dict[int, list[Event]] = {}
        found = [
            (row, beat)
            for row, beat in self.finder.push(rows.slots, outputs, rows.start, rows.hops)
            if rows.begin[row] <= beat.position < rows.end[row]
        ]
        if self.classifier is not None:
            found = self.classifier.push(rows.slots, rows.start, rows.samples, found)
        for row, beat in found:
            events.setdefault(row, []).append((beat.decided_at, 0, beat))
        for ended in self.seconds.push(rows.slots, rows.start, rows.samples):
            unrest = restless(ended.latest)
            judged = self.quality.push(ended, unrest)
            suspected = self.fibrillation.push(ended, unrest)
            slopes, means = steepness(ended.latest, self.seconds.slow_hz)
            for row, end, values, share, *leads in zip(
                ended.rows,
                ended.ends,
                judged,
                suspected,
                slopes.tolist(),
                means.tolist(),
                strict=True,
            ):
                if share is not None:
                    values["fibrillation_suspected"] = share
                if end <= rows.end[row]:
                    events.setdefault(row, []).append((end, 1, Judged(values, *leads)))
        return events

    def _tell(
        self, rows: Rows, row: int, events: list[Event], lag: int, until: int
    ) -> list[Message]:
        """Take a row's events in the order in which they were known, return what is told."""
        slot, stream, end = int(rows.slots[row]), rows.streams[row], int(rows.end[row])
        rhythm = self._rhythm[slot]
        told: list[Message] = []
        for known, _, what in sorted(events, key=itemgetter(0, 1)):
            told += _pauses(rhythm, stream, known - lag, lag, end)
            if isinstance(what, Beat):
                told += _beat(rhythm, stream, what)
                if self.classifier is not None:
                    self._heard[slot] = self.classifier.rhythm(what)
            else:
                rhythm.activity.second(Second(known, what.slopes, what.means))
                values = what.values | rhythm.measures(known - lag)
                if values.get("pause_s", math.inf) <= LONGEST_INTERVAL_S:
                    values |= _named(self._heard[slot])
                told.append(_measures(stream, known, known, values))
        told += _pauses(rhythm, stream, until - lag + 1, lag, end)
        self._await(slot)
        return told

    def _await(self, slot: int) -> None:
        due = self._rhythm[slot].due
        self._due[slot] = _NEVER if due is None else due


def _named(heard: dict[str, float]) -> dict[str, float]:
    """Return the rhythms that the naming model told, and its opinion of atrial fibrillation.

    That stands in place of what the irregularity of the intervals says (docs/decisions.md).
    """
    fibrillation = heard.get(_FIBRILLATION)
    return heard if fibrillation is None else heard | {"af_suspected": fibrillation}


def _beat(rhythm: Rhythm, stream: Timeline, beat: Beat) -> list[Message]:
    values = rhythm.beat(beat.position, beat.label)
    index = stream.index_at(beat.position)
    told: list[Message] = [
        messages.Beat(
            stream=stream.name,
            index=index,
            seconds=index / stream.rate_hz,
            label=beat.label,
            probability=beat.probability,
            decided_at=stream.needed_until(beat.decided_at),
            heart_rate_bpm=rhythm.heart_rate_bpm,
        )
    ]
    if values:
        told.append(_measures(stream, beat.position, beat.decided_at, values))
    return told


def _pauses(rhythm: Rhythm, stream: Timeline, before: int, lag: int, end: int) -> list[Message]:
    """Return the pauses that were due before a position and lie before the end of the signal."""
    told: list[Message] = []
    while (due := rhythm.due) is not None and due < before:
        values = rhythm.pause()
        if due < end:
            told.append(_measures(stream, due, due + lag, values))
    return told


def _measures(
    stream: Timeline, position: int, decided_at: int, values: dict[str, float]
) -> messages.Measures:
    index = stream.index_at(position)
    decided_at = stream.needed_until(decided_at)
    return messages.Measures(stream.name, index, index / stream.rate_hz, decided_at, values)
