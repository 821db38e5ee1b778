"""What reads a model's outputs: the contract of a wing, and the two that need no folder.

A wing knows nothing of sockets or batching. It keeps a row of memory for each stream, is given
the outputs of one step for some rows, and returns the results to be told. :class:`ScoresWing`
and :class:`AudioWing` serve any model; ``engine/heart`` is a wing of its own.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.messages import Gapped, Message, Open, Samples, Scores
from engine.model_file import ModelSpec

Outputs = Mapping[str, NDArray[np.float32]]
Runs = Mapping[str, Counter[tuple[int, int]]]
NO_RUNS: Runs = MappingProxyType({})


class Timeline(Protocol):
    """What a wing may know of a stream: its name and its time axis."""

    name: str
    rate_hz: float

    def index_at(self, position: int) -> int:
        """Return the client's sample index of the model's sample at a position."""

    def needed_until(self, position: int) -> int:
        """Return the index before which lies all that the model's samples before one came from."""


class Rows(NamedTuple):
    """Whose outputs a step's are. Positions count a stream's samples at the model's rate."""

    slots: NDArray[np.intp]
    hops: int  # that the step advanced each row; outputs have so many times the frames
    start: NDArray[np.int64]  # position of the step's first new sample
    begin: NDArray[np.int64]  # where the stream began anew: no result lies before
    end: NDArray[np.int64]  # where a flush's padding begins: no result lies there or later
    streams: Sequence[Timeline]
    samples: NDArray[np.float32]  # (rows, hops * hop, channels), the new ones, not filtered


class Wing(Protocol):
    """A reader of outputs.

    Attributes
    ----------
    delay : int
        Samples of the model's rate by which a result may follow the step that holds its
        cause; so much is appended at a flush.
    share : float
        Of the machine that a stream takes beside the model's steps.
    runs : mapping of str to Counter
        Calls of further models that the wing makes, by their rows and hops.
    failed : dict of int to str
        Slots that it could not read, or take further, and why; who reads them clears them. What
        is told of them then is void, and their streams cannot go on.
    """

    delay: int
    share: float
    runs: Runs

    @property
    def failed(self) -> dict[int, str]: ...

    def open(self, slot: int, timeline: Timeline, request: Open) -> None:
        """Begin a stream, with what its open asks for; a reset follows.

        Raises
        ------
        Refused
            If that cannot be done; the row stays free.
        """

    def close(self, slot: int) -> None:
        """Let go of a stream, of which no more is to be told."""

    def reset(self, slot: int) -> None:
        """Forget all: a new stream, or the same one after a flush."""

    def gap(self, slot: int, state: Gapped) -> None:
        """Forget what lost samples made void, but nothing that only samples may revoke.

        ``state`` says what became of the model's state. Where it was held, the outputs go on as
        if the samples on both sides were neighbours.
        """

    def take(self, slot: int) -> Any:
        """Return all that a stream carries, in numbers, texts, bytes, arrays, lists and maps.

        Nothing may be pending. It is not a copy: encode it before the next step.
        """

    def put(self, slot: int, carried: Any) -> None:
        """Go on from what :meth:`take` returned, in a row that was opened and reset likewise.

        Tuples have become lists.
        """

    def push(self, rows: Rows, outputs: Outputs) -> list[tuple[int, Message]]:
        """Return results as (row, message), those of a row in the order of time."""

    def pending(self, slot: int) -> bool:
        """Return whether results of what was pushed are still to be collected."""

    def collect(self) -> list[tuple[int, Message]]:
        """Return results that took longer than their step, as (slot, message)."""


class PromptWing:
    """What the wings have in common that tell all with the step that it came of."""

    share = 0.0
    runs = NO_RUNS

    @cached_property
    def failed(self) -> dict[int, str]:
        return {}

    def open(self, slot: int, timeline: Timeline, request: Open) -> None:
        """Nothing is asked for."""

    def close(self, slot: int) -> None:
        """Nothing is left."""

    def pending(self, slot: int) -> bool:
        return False

    def collect(self) -> list[tuple[int, Message]]:
        return []


def each_hop(rows: Rows, outputs: Outputs, hop: int) -> Iterator[tuple[Rows, Outputs]]:
    """Yield the rows and outputs of a step hop by hop, as if it had been taken so."""
    if rows.hops == 1:
        yield rows, outputs
        return
    parts = {name: np.split(value, rows.hops, axis=1) for name, value in outputs.items()}
    for number in range(rows.hops):
        start = rows.start + number * hop
        part = {name: values[number] for name, values in parts.items()}
        yield rows._replace(hops=1, start=start), part


class ScoresWing(PromptWing):
    """Each output of each step as it is."""

    def __init__(self, spec: ModelSpec, num_slots: int) -> None:
        self.delay = spec.look_ahead_samples
        self._outputs = [output.name for output in spec.outputs]
        self._hop = spec.hop_samples
        self._reach = spec.hop_samples - spec.look_ahead_samples

    def reset(self, slot: int) -> None:
        """Nothing is remembered."""

    def gap(self, slot: int, state: Gapped) -> None:
        """Nothing is remembered."""

    def take(self, slot: int) -> None:
        """Nothing is remembered."""

    def put(self, slot: int, carried: None) -> None:
        """Nothing is remembered."""

    def push(self, rows: Rows, outputs: Outputs) -> list[tuple[int, Message]]:
        """Return one message per row, hop and output."""
        return [
            told
            for hop_rows, hop_outputs in each_hop(rows, outputs, self._hop)
            for told in self._tell(hop_rows, hop_outputs)
        ]

    def _tell(self, rows: Rows, outputs: Outputs) -> list[tuple[int, Message]]:
        last = rows.start + self._reach  # the first sample that the scores are not about
        told = np.flatnonzero((last > rows.begin) & (last - self._hop < rows.end))
        return [
            (row, self._scores(rows, row, name, outputs[name][row]))
            for row in told.tolist()
            for name in self._outputs
        ]

    def _scores(self, rows: Rows, row: int, name: str, values: NDArray[np.float32]) -> Scores:
        stream = rows.streams[row]
        index = stream.index_at(min(int(rows.start[row]) + self._reach, int(rows.end[row])))
        return Scores(stream.name, name, index, values.shape, values.astype("<f4").tobytes())


class AudioWing(PromptWing):
    """Windows of signal that a model made, added where they overlap.

    A sample is complete when the last window that covers it has been added, which is
    ``look_ahead_samples`` (window less hop) after it came in.
    """

    def __init__(self, spec: ModelSpec, num_slots: int) -> None:
        self.delay = spec.look_ahead_samples
        self._hop = spec.hop_samples
        self._rate_hz = spec.input.rate_hz
        self._output = next(o.name for o in spec.outputs if o.meaning == "samples")
        self.sums = np.zeros((num_slots, spec.window_samples), np.float32)

    def reset(self, slot: int) -> None:
        self.sums[slot] = 0.0

    def gap(self, slot: int, state: Gapped) -> None:
        """Let go of the overlap, unless the model goes on."""
        if state == "reset":
            self.reset(slot)

    def take(self, slot: int) -> NDArray[np.float32]:
        """Return the overlap."""
        row: NDArray[np.float32] = self.sums[slot]
        return row

    def put(self, slot: int, carried: NDArray[np.float32]) -> None:
        self.sums[slot] = carried

    def push(self, rows: Rows, outputs: Outputs) -> list[tuple[int, Message]]:
        """Return the samples that each row's step completed."""
        return [
            told
            for hop_rows, hop_outputs in each_hop(rows, outputs, self._hop)
            for told in self._add(hop_rows, hop_outputs)
        ]

    def _add(self, rows: Rows, outputs: Outputs) -> list[tuple[int, Message]]:
        hop = self._hop
        sums = self.sums[rows.slots]
        sums[:, :-hop] = sums[:, hop:]
        sums[:, -hop:] = 0.0
        sums += outputs[self._output].reshape(sums.shape)
        self.sums[rows.slots] = sums
        first = rows.start - self.delay
        told: list[tuple[int, Message]] = []
        for row, stream in enumerate(rows.streams):
            skip = max(0, int(rows.begin[row] - first[row]))
            keep = min(hop, int(rows.end[row] - first[row]))
            if skip < keep:
                index = stream.index_at(int(first[row]) + skip)
                data = sums[row, skip:keep].astype("<f4").tobytes()
                told.append((row, Samples(stream.name, index, self._rate_hz, data)))
        return told
