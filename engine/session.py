"""One stream's protocol: chunks in, samples in order out.

No socket, no clock, no model. A session checks each chunk, notices duplicates and gaps, turns
what was sent into samples of the model's rate and unit, and queues them with the gaps and
flushes in their order. A chunk that overtook another waits for it within a bound, and a short
gap is bridged. It also knows which sample of the client each sample of the model is, and how the
sender's clock runs.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from operator import attrgetter
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.clock import Clock
from engine.errors import Refused
from engine.messages import Ack, Bridged, Channel, Chunk, Closed, Flags, Measures, Message, Open
from engine.model_file import Input
from engine.pulses import LEAST_HZ, PulseFilter
from engine.signal import Resampler, rate_ratio, unit_factor

_MAX_FLUSHES = 16
_NEVER = 2**63
_OWN = Bridged | Measures  # what a session tells by itself
# All that a session carries, beside what is not a number: see `take`.
_CARRIED = (
    "end_index",
    "ending",
    "chunks",
    "samples",
    "duplicates",
    "gaps",
    "lost_samples",
    "bridged_samples",
    "reordered",
    "late",
    "last_flush",
    "flushed",
    "_next_seq",
    "_unbroken_from",
)
_counts = attrgetter(*_CARRIED)
_REMEMBERED = 16  # stretches of chunks that were given up: who comes late is told from a duplicate
_DTYPES: dict[str, np.dtype[Any]] = {"f4": np.dtype("<f4"), "i2": np.dtype("<i2")}


class Samples(NamedTuple):
    """Calibrated samples at the model's rate, (samples, channels) float32.

    ``ack`` is the chunk's number, the index after it, and how many samples the stream has sent
    up to there; None for a resampler's tail.
    """

    values: NDArray[np.float32]
    ack: tuple[int, int, int] | None = None


class Lost(NamedTuple):
    """Samples that never came: the client's indices from ``start`` to ``end``."""

    start: int
    end: int


class Tail(NamedTuple):
    """A flush: what is kept back must come out, then the stream begins anew."""

    id: int
    end: int  # the client's index after the last sample before the flush


class End(NamedTuple):
    """A close: after what is queued before it, the stream is over."""


Item = Samples | Lost | Tail | End


class Held(NamedTuple):
    """A chunk that came before an earlier one."""

    chunk: Chunk
    values: NDArray[np.float32]
    arrived: float | None


class Session:
    """A stream between its open and its close.

    Parameters
    ----------
    opened : Open
    signal : Input
        What the model expects.
    credit : int
        Samples that may be in flight, beside those that a resampler holds back; more are refused.
    max_chunk_bytes : int
    num_anchors : int
        Of the last gaps and flushes, how many lie where a result may still be told.
    bridge_s : float
        Gaps up to so many seconds are interpolated, if as much signal lies before them since the
        last one: so nobody makes more work than twice of what they send.
    reorder_chunks : int
        How many chunks may wait for an earlier one, which is then given up. They wait for no more
        signal than half of the credit, or a client that counts the missing one could send nothing.
    pacing : bool
        Whether pulses of a pacemaker are looked for; the model's unit is mV then.

    Attributes
    ----------
    inbox : deque of Item
        What was accepted and not yet taken, in order.
    end_index : int
        The client's index after the last sample that was accepted in order.
    tap : callable or None
        Takes (index, values) of each chunk in order, in the model's unit at the stream's own rate.
    steps : list of (float, float)
        Gain and offset of each channel, from what is sent to the model's unit.
    last_flush, flushed : int
        Ids of the last flush that was asked for, and of the last that was answered.
    """

    def __init__(
        self,
        opened: Open,
        signal: Input,
        credit: int,
        max_chunk_bytes: int,
        num_anchors: int = 4,
        bridge_s: float = 0.0,
        reorder_chunks: int = 0,
        pacing: bool = False,
    ) -> None:
        self.name = opened.stream
        self.rate_hz = opened.rate_hz
        self.inbox: deque[Item] = deque()
        self.end_index = opened.index
        self.ending = False
        self.chunks = self.samples = self.duplicates = self.gaps = self.lost_samples = 0
        self.bridged_samples = self.reordered = self.late = 0
        self.last_flush = self.flushed = 0  # ids of the last that was asked for and answered
        self.tap: Callable[[int, NDArray[np.float32]], None] | None = None
        self.opened, self._signal = opened, signal
        self._dtype, self._channels = _DTYPES[opened.dtype], opened.channels
        self._frame_bytes = self._dtype.itemsize * opened.channels
        _check_channels(opened, signal)
        self.steps = _steps(opened, signal)
        self._scale, self._offset = _calibration(self.steps)
        self._calibrated = bool(
            opened.dtype == "i2" or np.any(self._scale != 1) or np.any(self._offset)
        )
        # Of int16 all values are known; to ask NumPy not to warn takes longer than to calibrate.
        scale, offset = np.float64(self._scale), np.float64(self._offset)
        extreme = 2.0**15 * np.abs(scale) + np.abs(offset)
        self._never_overflows = opened.dtype == "i2" and bool(np.all(extreme < 1e38))
        self._ratio = _ratio(opened, signal)
        self._up, self._down = self._ratio.numerator, self._ratio.denominator
        self._resampler = self._new_resampler()
        self._pulses: PulseFilter | None = None
        if pacing and opened.rate_hz >= LEAST_HZ:
            self._pulses = PulseFilter(opened.rate_hz, opened.channels)
        # What a resampler holds back is in flight as well; a slow sensor's whole credit may be.
        self.credit = max(1, credit) + (self._resampler.reach if self._resampler else 0)
        self._max_chunk_bytes = max_chunk_bytes
        self._next_seq = 0
        self._reorder_chunks = reorder_chunks
        self._held: list[Held] = []  # by their number
        self._held_samples = 0
        self._given_up: deque[range] = deque(maxlen=_REMEMBERED)
        self._bridge_samples = int(bridge_s * opened.rate_hz)
        self._latest = np.zeros((0, opened.channels), np.float32)
        self._unbroken_from = 0  # count of samples at the last gap or flush
        self._narrow = opened.channels < signal.channels
        self._watch = _Watch(opened, signal)
        # Messages to be told once the chunk that ends at an index is through: (index, message).
        self._due: deque[tuple[int, Message]] = deque()
        self._acked = (-1, opened.index, 0)
        # Chunks whose effects are not all out: (model's position after it, *ack).
        self._marks: deque[tuple[int, int, int, int]] = deque()
        # Where the client's time axis was laid against the model's: (position, index).
        self._anchors: deque[tuple[int, int]] = deque([(0, opened.index)], maxlen=num_anchors)

    # --- in --------------------------------------------------------------------------------

    def accept(self, chunk: Chunk, arrived: float | None = None) -> bool:
        """Check a chunk and queue its samples.

        Parameters
        ----------
        chunk : Chunk
        arrived : float, optional
            Seconds of the receiver's clock.

        Returns
        -------
        bool
            False for a duplicate, or one that had been given up: it was counted and dropped.

        Raises
        ------
        Refused
            ``over_credit``, ``oversize``, ``index_back``: this chunk is not taken, and may be
            sent again. ``bad_length``, ``not_finite``: the stream cannot go on.
        """
        if chunk.seq < self._next_seq:
            self._count_again(chunk.seq)
            return False
        if self._held and any(held.chunk.seq == chunk.seq for held in self._held):
            self.duplicates += 1
            return False
        values = self._read(chunk)
        self._check_place(chunk, len(values))
        if not self._held and (chunk.index == self.end_index or chunk.seq == self._next_seq):
            self._take(chunk, values, arrived)
        else:
            self._hold(Held(chunk, values, arrived))
        return True

    def give_up(self) -> None:
        """Wait no longer for chunks that others overtook."""
        while self._held:
            self._take_held()

    def flush(self, flush_id: int) -> None:
        """Queue a flush behind all that was accepted.

        Raises
        ------
        Refused
            ``over_credit`` if too many are on their way: samples have a credit, so must these.
        """
        if sum(isinstance(item, Tail) for item in self.inbox) >= _MAX_FLUSHES:
            raise Refused("over_credit", f"expected at most {_MAX_FLUSHES} flushes on their way")
        self.give_up()
        self._drain()
        self.last_flush = flush_id
        self._unbroken_from = self.samples
        self.inbox.append(Tail(flush_id, self.end_index))

    def close(self) -> None:
        """Queue the end behind all that was accepted."""
        self.ending = True
        self.give_up()
        self.inbox.append(End())

    def _hold(self, held: Held) -> None:
        """Put a chunk among those that wait, and take as many as need wait no more."""
        self._held.append(held)
        self._held.sort(key=lambda each: each.chunk.seq)
        self._held_samples += len(held.values)
        while self._held and (
            self._held[0].chunk.seq == self._next_seq
            or self._held[0].chunk.index == self.end_index
            or len(self._held) > self._reorder_chunks
            or self._held_until() - self.end_index > self.credit // 2
        ):
            self._take_held()
        self.reordered += any(each is held for each in self._held)

    def _held_until(self) -> int:
        last = self._held[-1]
        return last.chunk.index + len(last.values)

    def _take_held(self) -> None:
        first = self._held.pop(0)
        self._held_samples -= len(first.values)
        if first.chunk.seq > self._next_seq and first.chunk.index > self.end_index:
            self._given_up.append(range(self._next_seq, first.chunk.seq))
        self._take(*first)

    def _count_again(self, seq: int) -> None:
        if any(seq in numbers for numbers in self._given_up):
            self.late += 1
        else:
            self.duplicates += 1

    def _take(self, chunk: Chunk, values: NDArray[np.float32], arrived: float | None) -> None:
        """Queue the samples of the chunk that is next."""
        count = len(values)
        if self.tap is not None:
            self.tap(chunk.index, values)
        sent, lost = values, chunk.index - self.end_index
        if lost:
            values = self._pass_over(lost, values)
        self._latest = sent
        self._next_seq = chunk.seq + 1
        self.end_index = chunk.index + count
        self.chunks += 1
        self.samples += count
        if self._watch.on or chunk.t_device is not None or chunk.flags is not None:
            self._say(self._watch.chunk(chunk, sent, arrived))
        if self._pulses is not None:
            values = self._pulses.push(values, self.end_index - len(values))
            self._tell_pulses(self._pulses)
        if self._resampler is not None:
            values = self._resampler.push(values)
        if self._narrow:
            values = self._widen(values)
        self.inbox.append(Samples(values, (chunk.seq, self.end_index, self.samples)))

    def _tell_pulses(self, pulses: PulseFilter) -> None:
        for index, count in pulses.per_minute(self.end_index, self.opened.index):
            values = {"pacing_pulses_per_minute": float(count)}
            self._say([Measures(self.name, index, index / self.rate_hz, index, values)])

    def _pass_over(self, lost: int, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Bridge the samples that are missing before some, or queue the gap."""
        start, end = self.end_index, self.end_index + lost
        unbroken = self.samples - self._unbroken_from
        self._unbroken_from = self.samples
        if lost > min(self._bridge_samples, unbroken):
            self._note_gap(end)
            self._watch.gap(end)
            return values
        self.bridged_samples += lost
        self._say([Bridged(self.name, start, end)], end + len(values))
        before, after = self._latest[-1], values[0]
        share = np.arange(1, lost + 1, dtype=np.float32)[:, None] / np.float32(lost + 1)
        return np.concatenate([before + share * (after - before), values])

    def _widen(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Put zeros in place of the leads that the model has and the stream has not."""
        wide = np.zeros((len(values), self._signal.channels), np.float32)
        wide[:, : values.shape[1]] = values
        return wide

    def _say(self, told: list[Message], index: int | None = None) -> None:
        """Tell messages once the chunk that ends at an index is through."""
        end = self.end_index if index is None else index
        self._due += [(end, message) for message in told]

    def _read(self, chunk: Chunk) -> NDArray[np.float32]:
        """Return (samples, channels) in the model's unit."""
        data, length = chunk.data, len(chunk.data)
        if length > self._max_chunk_bytes:
            raise Refused(
                "oversize",
                f"chunk {chunk.seq}: expected at most {self._max_chunk_bytes} bytes, "
                f"found {length}",
            )
        if not length or length % self._frame_bytes:
            raise Refused(
                "bad_length",
                f"chunk {chunk.seq}: expected a multiple of {self._frame_bytes} bytes "
                f"({self._channels} channels of {self._dtype.name}), found {length}",
            )
        raw = np.frombuffer(data, self._dtype).reshape(-1, self._channels)
        values = self._calibrate(raw) if self._calibrated else raw
        # One pass that allocates nothing; only a sum that overflows needs the closer look.
        if not math.isfinite(np.vdot(values, values)) and not np.isfinite(values).all():
            place = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
            raise Refused(
                "not_finite",
                f"chunk {chunk.seq}: expected finite numbers, "
                f"found {values[place].tolist()} at index {chunk.index + place}",
            )
        return values

    def _calibrate(self, raw: NDArray[Any]) -> NDArray[np.float32]:
        """Return what was sent, int16 or float32, as float32 in the model's unit."""
        values: NDArray[np.float32]
        if self._never_overflows:
            values = raw * self._scale + self._offset
            return values
        with np.errstate(over="ignore", invalid="ignore"):  # found by who reads
            values = raw * self._scale + self._offset
        return values

    def _check_place(self, chunk: Chunk, count: int) -> None:
        least = self.end_index
        for held in self._held:
            if held.chunk.seq < chunk.seq:
                least = held.chunk.index + len(held.values)
            elif chunk.index + count > held.chunk.index:
                raise Refused(
                    "index_back",
                    f"chunk {chunk.seq}: expected an end of {held.chunk.index} or before, where "
                    f"chunk {held.chunk.seq} begins, found {chunk.index + count}",
                )
        if chunk.index < least:
            raise Refused(
                "index_back",
                f"chunk {chunk.seq}: expected index {least} or later, found {chunk.index}",
            )
        # What was lost takes no room.
        in_flight = self.samples + self._held_samples - self._acked[2] + count
        if in_flight > self.credit:
            raise Refused(
                "over_credit",
                f"chunk {chunk.seq}: expected at most {self.credit} samples beyond the last ack, "
                f"found {in_flight}",
            )

    def _note_gap(self, index: int) -> None:
        self.gaps += 1
        self.lost_samples += index - self.end_index
        self._drain()
        self.inbox.append(Lost(self.end_index, index))

    def _drain(self) -> None:
        """Queue what was kept back before the model, and begin anew."""
        rest = [] if self._pulses is None else [self._pulses.flush()]
        if self._resampler is not None:
            rest = [self._resampler.push(one) for one in rest] + [self._resampler.flush()]
            self._resampler = self._new_resampler()
        self.inbox += [Samples(self._widen(one) if self._narrow else one) for one in rest]

    def _new_resampler(self) -> Resampler | None:
        return Resampler(self._ratio, self.opened.channels) if self._ratio != 1 else None

    # --- out -------------------------------------------------------------------------------

    def index_at(self, position: int) -> int:
        """Return the client's index of the model's sample at a position."""
        position_0, index_0 = self._anchor_of(position)
        return index_0 + round((position - position_0) * self._down / self._up)

    def needed_until(self, position: int) -> int:
        """Return the index before which lies all that the model's samples before one came from."""
        position_0, index_0 = self._anchor_of(position)
        steps = -((position_0 - position) * self._down // self._up)
        index = index_0 + steps + (self._resampler.reach if self._resampler else 0)
        return index if self._pulses is None else self._pulses.needed_until(index)

    def _anchor_of(self, position: int) -> tuple[int, int]:
        for anchor in reversed(self._anchors):
            if position >= anchor[0]:
                break
        return anchor

    def anchor(self, position: int, index: int) -> None:
        """Lay the two time axes together anew: after a gap, after a flush."""
        if self._anchors[-1][0] == position:  # nothing lies between the two
            self._anchors.pop()
        self._anchors.append((position, index))

    def mark(self, position: int, ack: tuple[int, int, int]) -> int:
        """Note that the model must get to ``position`` before a chunk's effects are out.

        Returns
        -------
        int
            The position of the oldest such mark.
        """
        self._marks.append((position, *ack))
        return self._marks[0][0]

    def passed(self, position: int) -> tuple[Ack | None, int | None]:
        """Take the marks up to a position.

        Returns
        -------
        Ack or None
            For the last chunk among them.
        int or None
            The position of the oldest mark that is left.
        """
        ack = None
        while self._marks and self._marks[0][0] <= position:
            self._acked = self._marks.popleft()[1:]
            ack = self.repeat_ack()
        return ack, self._marks[0][0] if self._marks else None

    def due(self, index: int) -> list[Message]:
        """Take what is to be told before the ack of a chunk that ends at an index."""
        told = []
        while self._due and self._due[0][0] <= index:
            told.append(self._due.popleft()[1])
        return told

    def gap_measure(self, lost: Lost) -> Measures:
        """Return how long a gap was, as a measure; 0 comes after a second without another."""
        seconds = (lost.end - lost.start) / self.rate_hz
        return Measures(self.name, lost.end, lost.end / self.rate_hz, lost.end, {"gap_s": seconds})

    @property
    def next_seq(self) -> int:
        """The number of the chunk that is next."""
        return self._next_seq

    @property
    def acked_samples(self) -> int:
        """How many samples of the stream lie before the last ack's index."""
        return self._acked[2]

    def due_at(self) -> int | None:
        """Return the index before which something of the stream itself is to be told."""
        return self._due[0][0] if self._due else None

    # --- from one server to the next -------------------------------------------------------

    def take(self) -> dict[str, Any]:
        """Return all that is carried, as plain data and arrays, to be put back elsewhere.

        Chunks that wait for an earlier one are not: they are sent again with it.
        """
        return {
            "counts": _counts(self),
            "inbox": [(type(item).__name__, *item) for item in self.inbox],
            "resampler": None if self._resampler is None else self._resampler.take(),
            "pulses": None if self._pulses is None else self._pulses.take(),
            "given_up": [(numbers.start, numbers.stop) for numbers in self._given_up],
            "latest": self._latest[-1:],
            "due": list(self._due),
            "acked": self._acked,
            "marks": list(self._marks),
            "anchors": list(self._anchors),
            "watch": self._watch.take(),
        }

    def put(self, carried: Mapping[str, Any]) -> None:
        """Go on from what :meth:`take` returned of a session that was opened likewise."""
        for name, value in zip(_CARRIED, carried["counts"], strict=True):
            setattr(self, name, value)
        self.inbox.extend(_item(*item) for item in carried["inbox"])
        if self._resampler is not None:
            self._resampler.put(carried["resampler"])
        if self._pulses is not None:
            self._pulses.put(carried["pulses"])
        self._given_up.extend(range(*numbers) for numbers in carried["given_up"])
        self._latest = carried["latest"]
        self._due.extend((at, msgspec.convert(told, _OWN)) for at, told in carried["due"])
        self._acked = _three(carried["acked"])
        self._marks.extend((at, *_three(ack)) for at, *ack in carried["marks"])
        self._anchors.clear()
        self._anchors.extend((at, index) for at, index in carried["anchors"])
        self._watch.put(carried["watch"])

    def repeat_ack(self) -> Ack:
        """Return the last ack again, for a client that sent something twice."""
        seq, index, _ = self._acked
        return Ack(self.name, seq, index)

    def closed(self, reason: str) -> Closed:
        """Return the message that ends the stream, with its counts."""
        return Closed(
            self.name,
            reason,
            self.chunks,
            self.samples,
            self.duplicates,
            self.gaps,
            self.lost_samples,
            self.bridged_samples,
            self.reordered,
            self.late,
        )


def closed_of(name: str, reason: str, carried: Mapping[str, Any]) -> Closed:
    """Return the message that ends a stream of which only this is left: what it carried."""
    counts = dict(zip(_CARRIED, carried["counts"], strict=True))
    first = [counts[key] for key in ("chunks", "samples", "duplicates", "gaps", "lost_samples")]
    return Closed(name, reason, *first, *(counts[key] for key in ("bridged_samples", "reordered")))


class _Watch:
    """What is told of a stream itself: how its clock runs, and what its device says.

    Once a second of signal, at the same samples however it was cut, and only of what there is.
    """

    def __init__(self, opened: Open, signal: Input) -> None:
        self._name, self._rate_hz, self._clock_kind = opened.stream, opened.rate_hz, opened.clock
        self._second = max(1, round(opened.rate_hz))
        self._limits = _limits(opened, signal)
        self._clock: Clock | None = None
        self._flags: Flags | None = None
        self._leap_s = 0.0
        self._due = _NEVER  # index of the next telling
        self._outside = np.zeros(0, bool)  # of each sample since the last
        self._after_gap = False
        self.on = opened.clock is not None or self._limits is not None
        if self.on:
            self._due = opened.index + self._second

    def take(self) -> list[Any]:
        """Return all that is carried, to be put back elsewhere."""
        clock = None if self._clock is None else (self._source, self._clock.take())
        own = self._leap_s, self._due, self._outside, self._after_gap, self.on
        return [clock, self._flags, *own]

    def put(self, carried: Sequence[Any]) -> None:
        clock, flags, self._leap_s, self._due, self._outside, self._after_gap, self.on = carried
        self._flags = None if flags is None else msgspec.convert(flags, Flags)
        if clock is not None:
            self._source, line = clock
            self._clock = Clock(self._rate_hz, leaps=self._source != "arrived")
            if self._source != "arrived":  # of a clock that may have stopped with its server
                self._clock.put(line)

    def gap(self, end: int) -> None:
        """Begin the seconds anew after lost samples."""
        self.on = self._after_gap = True
        self._due = end + self._second
        self._outside = self._outside[:0]

    def chunk(
        self, chunk: Chunk, values: NDArray[np.float32], arrived: float | None
    ) -> list[Message]:
        """Take a chunk, return what is to be told."""
        end = chunk.index + len(values)
        told: list[Message] = []
        self._time(chunk, end, arrived)
        if chunk.flags is not None and chunk.flags != self._flags:
            self._flags = chunk.flags
            told.append(self._measures(chunk.index, _flag_measures(chunk.flags)))
            self._due = min(self._due, chunk.index + self._second)
        if self._limits is not None:
            lo, hi = self._limits
            outside = ((values <= lo) | (values >= hi)).any(axis=1)
            self._outside = np.concatenate([self._outside, outside])
        while self._due <= end:
            known = self._values(end)
            if known:
                told.append(self._measures(self._due, known))
            self._due += self._second
        if not self._after_gap and self._clock is None and not self._limits and not self._flags:
            self.on, self._due = self._clock_kind is not None, _NEVER  # it was only the gap
        return told

    def _time(self, chunk: Chunk, end: int, arrived: float | None) -> None:
        """Take the time of a chunk, always of the same kind: what its first has."""
        point = self._point(chunk, end, arrived)
        if self._clock is None and point is not None:
            self._source, self.on = point[0], True
            self._clock = Clock(self._rate_hz, leaps=self._source != "arrived")
            self._due = min(self._due, chunk.index + self._second)
        if self._clock is not None and point is not None and point[0] == self._source:
            self._leap_s += abs(self._clock.add(*point[1:]))

    def _point(
        self, chunk: Chunk, end: int, arrived: float | None
    ) -> tuple[str, int, float] | None:
        if chunk.t_device is not None:
            return "device", chunk.index, chunk.t_device
        if self._clock_kind is not None and chunk.t_published is not None:
            return "published", end, chunk.t_published
        if self._clock_kind == "host" and arrived is not None:
            return "arrived", end, arrived
        return None

    def _values(self, end: int) -> dict[str, float]:
        """Return what is known of the second that is over."""
        values: dict[str, float] = {}
        if self._after_gap:
            values["gap_s"], self._after_gap = 0.0, False
        if self._clock is not None:
            values["clock_jump_s"], self._leap_s = self._leap_s, 0.0
            line = self._clock.line()
            if line is not None:
                values["drift_ppm"] = line.drift_ppm
                values["rate_error_share"] = abs(line.rate_error_share)
        if self._flags is not None:
            values |= _flag_measures(self._flags)
        if self._limits is not None:
            count = len(self._outside) - (end - self._due)
            values["at_limit_share"] = float(self._outside[:count].mean())
            self._outside = self._outside[count:]
        return values

    def _measures(self, index: int, values: dict[str, float]) -> Message:
        return Measures(self._name, index, index / self._rate_hz, index, values)


def _item(kind: str, *fields: Any) -> Item:
    """Return an item of the inbox as it was."""
    if kind == "Samples":
        values, ack = fields
        return Samples(values, None if ack is None else _three(ack))
    kinds: dict[str, type[Lost | Tail | End]] = {"Lost": Lost, "Tail": Tail, "End": End}
    return kinds[kind](*fields)


def _three(numbers: Sequence[int]) -> tuple[int, int, int]:
    seq, index, samples = numbers
    return seq, index, samples


def _flag_measures(flags: Flags) -> dict[str, float]:
    return {
        "device_lead_off": float(flags.lead_off.bit_count()),
        "device_saturated": float(flags.saturated.bit_count()),
        "device_paced": float(flags.paced),
    }


def _limits(opened: Open, signal: Input) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """Return the least and greatest value of each channel, in the model's unit."""
    if all(each.lo is None and each.hi is None for each in opened.channel_info):
        return None
    bounds = []
    for number, each in enumerate(opened.channel_info):
        factor = _factor(each.unit or opened.unit, signal.unit)
        lo = -math.inf if each.lo is None else each.lo
        hi = math.inf if each.hi is None else each.hi
        if not lo < hi:
            raise Refused(
                "bad_unit", f"channel {number}: expected lo below hi, found {lo} and {hi}"
            )
        bounds.append((lo * factor, hi * factor))
    lows, highs = np.array(bounds, np.float32).T
    return lows, highs


def _ratio(opened: Open, signal: Input) -> Fraction:
    """Return the model's rate over the rate of what is sent."""
    try:
        return rate_ratio(opened.rate_hz, signal.rate_hz)
    except ValueError as error:
        raise Refused("bad_rate", str(error)) from None


def _check_channels(opened: Open, signal: Input) -> None:
    most = signal.channels
    least = signal.least_channels or most
    if not least <= opened.channels <= most:
        expected = f"{most}" if least == most else f"{least} to {most}"
        raise Refused("bad_channels", f"channels: expected {expected}, found {opened.channels}")
    if opened.channel_info and len(opened.channel_info) != opened.channels:
        raise Refused(
            "bad_channels",
            f"channel_info: expected as many as channels ({opened.channels}), "
            f"found {len(opened.channel_info)}",
        )


def _steps(opened: Open, signal: Input) -> list[tuple[float, float]]:
    """Return each channel's gain and offset, from what is sent to the model's unit."""
    steps = []
    for each in opened.channel_info or (Channel(),) * opened.channels:
        gain = opened.gain if each.gain is None else each.gain
        offset = opened.offset if each.offset is None else each.offset
        if not np.isfinite([gain, offset]).all() or gain == 0:
            raise Refused(
                "bad_unit",
                f"gain, offset: expected finite, gain not 0, found {gain}, {offset}",
            )
        factor = _factor(each.unit or opened.unit, signal.unit)
        steps.append((gain * factor, offset * factor))
    return steps


def _calibration(
    steps: list[tuple[float, float]],
) -> tuple[np.float32 | NDArray[np.float32], np.float32 | NDArray[np.float32]]:
    """Return the scale and offset: one if it is that of all channels, which is faster."""
    scales, offsets = np.array(steps, np.float64).T
    with np.errstate(over="ignore"):
        scales, offsets = scales.astype(np.float32), offsets.astype(np.float32)
    if len(set(steps)) == 1:
        return scales[0], offsets[0]
    return scales, offsets


def _factor(given: str, wanted: str) -> float:
    try:
        return unit_factor(given, wanted)
    except ValueError as error:
        raise Refused("bad_unit", str(error)) from None
