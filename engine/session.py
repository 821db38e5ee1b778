"""One stream's protocol: chunks in, samples in order out.

No socket, no clock, no model. A session checks each chunk, notices duplicates and gaps, turns
what was sent into samples of the model's rate and unit, and queues them with the gaps and
flushes in their order. It also knows which sample of the client each sample of the model is.
"""

import math
from collections import deque
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.errors import Refused
from engine.messages import Ack, Chunk, Closed, Open
from engine.model_file import Input
from engine.signal import Resampler, rate_ratio, unit_factor

_MAX_FLUSHES = 16
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

    Attributes
    ----------
    inbox : deque of Item
        What was accepted and not yet taken, in order.
    end_index : int
        The client's index after the last sample that was accepted.
    """

    def __init__(
        self,
        opened: Open,
        signal: Input,
        credit: int,
        max_chunk_bytes: int,
        num_anchors: int = 4,
    ) -> None:
        self.name = opened.stream
        self.rate_hz = opened.rate_hz
        self.inbox: deque[Item] = deque()
        self.end_index = opened.index
        self.ending = False
        self.chunks = self.samples = self.duplicates = self.gaps = self.lost_samples = 0
        self.opened, self._signal = opened, signal
        self._dtype = _DTYPES[opened.dtype]
        self._scale, self._offset = _calibration(opened, signal)
        self._ratio = _ratio(opened, signal)
        self._up, self._down = self._ratio.numerator, self._ratio.denominator
        self._resampler = self._new_resampler()
        # What a resampler holds back is in flight as well; a slow sensor's whole credit may be.
        self.credit = max(1, credit) + (self._resampler.reach if self._resampler else 0)
        self._max_chunk_bytes = max_chunk_bytes
        self._next_seq = 0
        self._acked = (-1, opened.index, 0)
        # Chunks whose effects are not all out: (model's position after it, *ack).
        self._marks: deque[tuple[int, int, int, int]] = deque()
        # Where the client's time axis was laid against the model's: (position, index).
        self._anchors: deque[tuple[int, int]] = deque([(0, opened.index)], maxlen=num_anchors)

    # --- in --------------------------------------------------------------------------------

    def accept(self, chunk: Chunk) -> bool:
        """Check a chunk and queue its samples.

        Returns
        -------
        bool
            False for a duplicate: it was counted and dropped.

        Raises
        ------
        Refused
            ``over_credit``, ``oversize``, ``index_back``: this chunk is not taken, and may be
            sent again. ``bad_length``, ``not_finite``: the stream cannot go on.
        """
        if chunk.seq < self._next_seq:
            self.duplicates += 1
            return False
        values = self._read(chunk)
        self._check_place(chunk, len(values))
        if chunk.index > self.end_index:
            self._note_gap(chunk.index)
        self._next_seq = chunk.seq + 1
        self.end_index = chunk.index + len(values)
        self.chunks += 1
        self.samples += len(values)
        if self._resampler is not None:
            values = self._resampler.push(values)
        self.inbox.append(Samples(values, (chunk.seq, self.end_index, self.samples)))
        return True

    def flush(self, flush_id: int) -> None:
        """Queue a flush behind all that was accepted.

        Raises
        ------
        Refused
            ``over_credit`` if too many are on their way: samples have a credit, so must these.
        """
        if sum(isinstance(item, Tail) for item in self.inbox) >= _MAX_FLUSHES:
            raise Refused("over_credit", f"expected at most {_MAX_FLUSHES} flushes on their way")
        self._drain_resampler()
        self.inbox.append(Tail(flush_id, self.end_index))

    def close(self) -> None:
        """Queue the end behind all that was accepted."""
        self.ending = True
        self.inbox.append(End())

    def _read(self, chunk: Chunk) -> NDArray[np.float32]:
        """Return (samples, channels) in the model's unit."""
        channels = self.opened.channels
        if len(chunk.data) > self._max_chunk_bytes:
            raise Refused(
                "oversize",
                f"chunk {chunk.seq}: expected at most {self._max_chunk_bytes} bytes, "
                f"found {len(chunk.data)}",
            )
        frame = self._dtype.itemsize * channels
        if not chunk.data or len(chunk.data) % frame:
            raise Refused(
                "bad_length",
                f"chunk {chunk.seq}: expected a multiple of {frame} bytes "
                f"({channels} channels of {self._dtype.name}), found {len(chunk.data)}",
            )
        raw = np.frombuffer(chunk.data, self._dtype).reshape(-1, channels)
        values: NDArray[np.float32] = raw.astype(np.float32, copy=False)
        if self._scale != 1.0 or self._offset != 0.0:
            with np.errstate(over="ignore", invalid="ignore"):  # found below
                values = values * np.float32(self._scale) + np.float32(self._offset)
        # One pass that allocates nothing; only a sum that overflows needs the closer look.
        if not math.isfinite(np.vdot(values, values)) and not np.isfinite(values).all():
            place = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
            raise Refused(
                "not_finite",
                f"chunk {chunk.seq}: expected finite numbers, "
                f"found {values[place].tolist()} at index {chunk.index + place}",
            )
        return values

    def _check_place(self, chunk: Chunk, count: int) -> None:
        if chunk.index < self.end_index:
            raise Refused(
                "index_back",
                f"chunk {chunk.seq}: expected index {self.end_index} or later, found {chunk.index}",
            )
        in_flight = self.samples - self._acked[2] + count  # what was lost takes no room
        if in_flight > self.credit:
            raise Refused(
                "over_credit",
                f"chunk {chunk.seq}: expected at most {self.credit} samples beyond the last ack, "
                f"found {in_flight}",
            )

    def _note_gap(self, index: int) -> None:
        self.gaps += 1
        self.lost_samples += index - self.end_index
        self._drain_resampler()
        self.inbox.append(Lost(self.end_index, index))

    def _drain_resampler(self) -> None:
        """Queue what the resampler kept back, and begin with a new one."""
        if self._resampler is not None:
            self.inbox.append(Samples(self._resampler.flush()))
            self._resampler = self._new_resampler()

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
        return index_0 + steps + (self._resampler.reach if self._resampler else 0)

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
        )


def _ratio(opened: Open, signal: Input) -> Fraction:
    """Return the model's rate over the rate of what is sent."""
    try:
        return rate_ratio(opened.rate_hz, signal.rate_hz)
    except ValueError as error:
        raise Refused("bad_rate", str(error)) from None


def _calibration(opened: Open, signal: Input) -> tuple[float, float]:
    """Return the scale and offset from what is sent to the model's unit."""
    if opened.channels != signal.channels:
        raise Refused(
            "bad_channels", f"channels: expected {signal.channels}, found {opened.channels}"
        )
    if not np.isfinite([opened.gain, opened.offset]).all() or opened.gain == 0:
        raise Refused(
            "bad_unit",
            f"gain, offset: expected finite, gain not 0, found {opened.gain}, {opened.offset}",
        )
    try:
        factor = unit_factor(opened.unit, signal.unit)
    except ValueError as error:
        raise Refused("bad_unit", str(error)) from None
    return opened.gain * factor, opened.offset * factor
