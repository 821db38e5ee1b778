"""One model and all of its streams, from queued samples to results.

A lane owns the rows: queued samples, filters, model state, the wing's memory. Its work on a
batch is done on all rows at once; Python is entered per row only where something happened.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from engine.errors import Refused, fault
from engine.messages import Flushed, Gap, Message
from engine.model_file import ModelSpec
from engine.runtime import Runtime
from engine.session import End, Item, Lost, Samples, Session, Tail
from engine.signal import Front
from engine.slots import Slots
from engine.wing import Outputs, Rows, Wing

_NEVER = 2**62  # a position beyond all; differences with it stay within int64


class Told(NamedTuple):
    """A message and the stream that it concerns."""

    session: Session
    message: Message


class Lane:
    """The streams of one model.

    Parameters
    ----------
    spec : ModelSpec
    runtime : Runtime
    wing : Wing
    num_slots : int
    credit_s : float
        Seconds of signal that a stream may have in flight; the queue of each row holds them.
    """

    def __init__(
        self, spec: ModelSpec, runtime: Runtime, wing: Wing, num_slots: int, credit_s: float
    ) -> None:
        self.spec, self.runtime, self.wing = spec, runtime, wing
        self.hop = spec.hop_samples
        num_slots = min(num_slots, runtime.num_slots)
        self.slots = Slots(num_slots)
        self.front = Front(spec, num_slots)
        self.sessions: dict[int, Session] = {}
        # Seconds that a stream may have in flight: a few hops at least, or it would never fill one.
        self.credit_s = max(credit_s, 4 * self.hop / spec.input.rate_hz)
        # A flush appends up to the delay and a hop to what credit allows.
        self._capacity = round(self.credit_s * spec.input.rate_hz) + wing.delay + 3 * self.hop
        # Rows are written from their beginning whenever they run empty, so that the memory of a
        # stream that keeps up is a few hops; the system gives pages only where something is.
        self._queue = np.zeros((num_slots, self._capacity, spec.input.channels), np.float32)
        self._stretches: dict[int, NDArray[np.float32]] = {}  # views of it, by their length
        self._head = np.zeros(num_slots, np.int64)
        self._fill = np.zeros(num_slots, np.int64)
        self._position = np.zeros(num_slots, np.int64)  # samples consumed since the open
        self._begin = np.zeros(num_slots, np.int64)  # position at which all began anew
        self._mark = np.full(num_slots, _NEVER)  # position at which the next ack is due
        self._told_at = np.full(num_slots, _NEVER)  # up to where a step may go, see `most_hops`
        self._held = np.zeros(num_slots, bool)  # something waits in the session's inbox
        self._end = np.full(num_slots, _NEVER)  # where a flush's padding begins
        # Slots whose streams cannot go on, and why; who reads them closes them.
        self.failed: dict[int, str] = {}

    def open(self, session: Session) -> int:
        """Give a stream a row like new; the caller has checked that one is free.

        Raises
        ------
        Refused
            If the wing cannot do what the stream asks for; no row is taken.
        """
        slot = self.slots.acquire()
        try:
            self.wing.open(slot, session, session.opened)
        except Refused:
            self.slots.release(slot)
            raise
        self.sessions[slot] = session
        self._position[slot] = 0
        self._clear(slot)
        self._restart(slot)
        return slot

    def take(self, slot: int) -> dict[str, Any]:
        """Return all that a row carries, as plain data and arrays, to be put back elsewhere.

        No results may be pending in the wing: those cannot be taken along.
        """
        begin = max(0, int(self._head[slot]) - 1)  # with what was stepped last, see `_pad`
        end = int(self._head[slot] + self._fill[slot])
        return {
            "samples": self._queue[slot, begin:end],
            "fill": int(self._fill[slot]),
            "position": int(self._position[slot]),
            "begin": int(self._begin[slot]),
            "mark": int(self._mark[slot]),
            "told_at": int(self._told_at[slot]),
            "held": bool(self._held[slot]),
            "end": int(self._end[slot]),
            "front": self.front.take(slot),
            "state": self.runtime.take(slot),
            "wing": self.wing.take(slot),
            "session": self.sessions[slot].take(),
        }

    def put(self, session: Session, carried: Mapping[str, Any]) -> int:
        """Give a stream a row that goes on from what :meth:`take` returned.

        Raises
        ------
        Refused
            If the wing cannot do what the stream asks for; no row is taken.
        """
        slot = self.open(session)
        try:
            self._put(slot, session, carried)
        except BaseException:
            self.close(slot)
            raise
        return slot

    def _put(self, slot: int, session: Session, carried: Mapping[str, Any]) -> None:
        samples, fill = carried["samples"], carried["fill"]
        self._queue[slot, : len(samples)] = samples
        self._head[slot], self._fill[slot] = len(samples) - fill, fill
        self._position[slot], self._begin[slot] = carried["position"], carried["begin"]
        self._mark[slot], self._held[slot] = carried["mark"], carried["held"]
        self._told_at[slot], self._end[slot] = carried["told_at"], carried["end"]
        self.front.put(slot, carried["front"])
        self.runtime.put(slot, carried["state"])
        session.put(carried["session"])
        self.wing.put(slot, carried["wing"])

    def close(self, slot: int) -> None:
        self.wing.close(slot)
        self.slots.release(slot)
        del self.sessions[slot]
        self.failed.pop(slot, None)
        self._clear(slot)

    def hops(self, slot: int) -> int:
        """Return how many steps a row's samples suffice for."""
        return int(self._fill[slot]) // self.hop

    def feed(self, slot: int) -> list[Message]:
        """Move what a stream has accepted into its row, as far as its order allows.

        A gap, a flush and an end wait until every whole hop before them has been stepped, and
        its results are told. The end stays in the inbox, for the caller to see.
        """
        session = self.sessions[slot]
        told: list[Message] = []
        while session.inbox:
            item = session.inbox[0]
            if isinstance(item, Samples):
                room = self._capacity - int(self._fill[slot])
                self._append(slot, item.values[:room])
                if len(item.values) > room:
                    session.inbox[0] = item._replace(values=item.values[room:])
                    break
                if item.ack is not None:
                    self._mark_ack(slot, session, item.ack)
            elif self._fill[slot] >= self.hop or self._waits(slot, item):
                break
            elif isinstance(item, Lost):
                told += self._skip(slot, session, item)
            elif isinstance(item, Tail):
                if self._end[slot] == _NEVER:
                    self._pad(slot)
                    continue  # most often there is now a hop to step first
                told += self._finish(slot, session, item)
            else:
                told += self._ack(slot, session, _NEVER)
                break
            session.inbox.popleft()
        self._held[slot] = bool(session.inbox)
        return told

    def step(self, slots: NDArray[np.intp], hops: int) -> list[Told]:
        """Advance rows by some hops each and return what came of it, in order per stream.

        Parameters
        ----------
        slots : (rows,) intp
            Distinct rows that have as many hops of samples.
        hops : int
            At most what the runtime takes at once.
        """
        start = self._position[slots]
        samples = self._take(slots, hops)
        outputs: Outputs = self.runtime.step(slots, self.front.push(slots, samples))
        sessions = [self.sessions[slot] for slot in slots.tolist()]
        rows = Rows(slots, hops, start, self._begin[slots], self._end[slots], sessions, samples)
        if self.runtime.failed:
            rows, outputs = self._without_failed(rows, outputs)
            slots = rows.slots
            sessions = [self.sessions[slot] for slot in slots.tolist()]
        told = [Told(sessions[row], message) for row, message in self._push(rows, outputs)]
        due = (self._mark[slots] <= self._position[slots]) | self._held[slots]
        for slot in slots[due].tolist():
            told += self._proceed(slot)
        return told

    def _proceed(self, slot: int) -> list[Told]:
        """Return the ack that has become due, and what comes of what waited for results."""
        if slot in self.failed:
            return []
        session = self.sessions[slot]
        try:
            messages = self._ack(slot, session, int(self._position[slot]))
            if self._held[slot]:
                messages += self.feed(slot)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this stream's
            self.failed[slot] = fault(f"stream {session.name}", error)
            return []
        return [Told(session, message) for message in messages]

    def _without_failed(self, rows: Rows, outputs: Outputs) -> tuple[Rows, Outputs]:
        """Note the rows that the model failed on, and leave them out."""
        self.failed |= self.runtime.failed
        self.runtime.failed.clear()
        kept = [row for row, slot in enumerate(rows.slots.tolist()) if slot not in self.failed]
        return (
            Rows(
                rows.slots[kept],
                rows.hops,
                rows.start[kept],
                rows.begin[kept],
                rows.end[kept],
                [rows.streams[row] for row in kept],
                rows.samples[kept],
            ),
            {name: value[kept] for name, value in outputs.items()},
        )

    def _push(self, rows: Rows, outputs: Outputs) -> list[tuple[int, Message]]:
        """Let the wing read a step's outputs; note the rows that it failed on.

        A wing contains a fault of one row itself. Where it fails as a whole, nobody knows which
        rows it had changed by then, and all of the step's are given up.
        """
        if not len(rows.slots):
            return []
        try:
            results = self.wing.push(rows, outputs)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is these streams'
            reason = fault(f"{self.spec.name}, {len(rows.slots)} rows", error)
            self.failed |= dict.fromkeys(rows.slots.tolist(), reason)
            return []
        if self.wing.failed:
            self.failed |= self.wing.failed
            self.wing.failed.clear()
            results = [one for one in results if int(rows.slots[one[0]]) not in self.failed]
        return results

    def collect(self) -> list[Told]:
        """Return results that took longer than their step, and what waited for them."""
        results = self.wing.collect()
        if self.wing.failed:
            self.failed |= self.wing.failed
            self.wing.failed.clear()
            results = [one for one in results if one[0] not in self.failed]
        told = [Told(self.sessions[slot], message) for slot, message in results]
        for slot in dict.fromkeys(slot for slot, _ in results):
            told += self._proceed(slot)
        return told

    def remaining(self, slots: NDArray[np.intp]) -> NDArray[np.int64]:
        """Return how many whole hops each row has."""
        left: NDArray[np.int64] = self._fill[slots] // self.hop
        return left

    def most_hops(self, slots: NDArray[np.intp]) -> int:
        """Return how many hops a step may take all of these rows at once.

        What a session tells of itself comes behind the results of the hop that its chunk ends in,
        and before those of the next: else the order hung on how hops were joined.
        """
        hops = min(int(self.remaining(slots).min()), self.runtime.max_hops)
        until = int((self._told_at[slots] - self._position[slots]).min())
        return max(1, min(hops, until // self.hop))

    def ending(self, slots: NDArray[np.intp]) -> list[int]:
        """Return the rows that have nothing left to step and whose session's end is next."""
        idle = slots[self._held[slots] & (self._fill[slots] < self.hop)]
        if self.failed:
            idle = idle[[slot not in self.failed for slot in idle.tolist()]]
        return [slot for slot in idle.tolist() if self.over(slot)]

    def idle(self, slot: int) -> bool:
        """Return whether a row has nothing to step, and nothing of what it stepped to tell."""
        return not self.hops(slot) and not self.wing.pending(slot)

    def over(self, slot: int) -> bool:
        """Return whether nothing is left of a stream but its end."""
        inbox = self.sessions[slot].inbox
        return bool(inbox) and isinstance(inbox[0], End) and self.idle(slot)

    def _append(self, slot: int, values: NDArray[np.float32]) -> None:
        """Queue samples, for which there is room, at the end of a row."""
        if not len(values):
            return  # what was stepped last stays in an empty queue, see _pad
        head, fill = int(self._head[slot]), int(self._fill[slot])
        if not fill or head + fill + len(values) > self._capacity:
            self._queue[slot, :fill] = self._queue[slot, head : head + fill].copy()
            self._head[slot] = head = 0
        end = head + fill
        self._queue[slot, end : end + len(values)] = values
        self._fill[slot] = fill + len(values)

    def _take(self, slots: NDArray[np.intp], hops: int) -> NDArray[np.float32]:
        """Return the next hops of each row, (rows, hops * hop, channels), and move on."""
        count = hops * self.hop
        head = self._head[slots]
        if count not in self._stretches:
            self._stretches[count] = _stretches(self._queue, count)
        samples: NDArray[np.float32] = self._stretches[count][slots, head]
        self._fill[slots] -= count
        self._head[slots] = head + count
        self._position[slots] += count
        return samples

    def _mark_ack(self, slot: int, session: Session, ack: tuple[int, int, int]) -> None:
        # A chunk is through when its last whole hop is; what is left waits for the next chunk.
        position = int(self._position[slot] + self._fill[slot] // self.hop * self.hop)
        self._mark[slot] = session.mark(position, ack)
        told_at = session.due_at()
        if told_at is not None and told_at <= ack[1]:
            self._told_at[slot] = min(self._told_at[slot], position)

    def _ack(self, slot: int, session: Session, position: int) -> list[Message]:
        """Return the ack that is due, unless results of what it would name are still to come."""
        if self.wing.pending(slot):
            return []
        ack, mark = session.passed(position)
        self._mark[slot] = _NEVER if mark is None else mark
        if ack is None:
            return []
        told = session.due(ack.index)
        if told:
            self._told_at[slot] = _NEVER if session.due_at() is None else position
        return [*told, ack]

    def _skip(self, slot: int, session: Session, lost: Lost) -> list[Message]:
        """Pass over lost samples; those before them that fill no hop are lost as well."""
        position = int(self._position[slot])
        first = session.index_at(position) if self._fill[slot] else lost.start
        self._clear(slot)
        if self.spec.gap == "reset":
            self._begin[slot] = position
            self.front.reset(slot)
            self.runtime.reset(slot)
        else:
            self.front.settle(slot)
        self.wing.gap(slot, self.spec.gap)
        told = self._ack(slot, session, position)
        session.anchor(position, lost.end)
        gap = Gap(session.name, first, lost.end, self.spec.gap)
        return [*told, gap, session.gap_measure(lost)]

    def _pad(self, slot: int) -> None:
        """Append the last value until the tail has come through."""
        fill = int(self._fill[slot])
        self._end[slot] = self._position[slot] + fill
        if self._end[slot] == self._begin[slot]:
            return  # nothing came since all began anew
        used = int(self._head[slot]) + fill
        last = self._queue[slot, used - 1] if used else 0.0
        wanted = -(-(fill + self.wing.delay) // self.hop) * self.hop - fill
        padding = np.empty((wanted, self._queue.shape[2]), np.float32)
        padding[:] = last
        self._append(slot, padding)

    def _waits(self, slot: int, item: Item) -> bool:
        """Return whether an item must wait for results that are still to come."""
        unpadded = isinstance(item, Tail) and self._end[slot] == _NEVER
        return self.wing.pending(slot) and not unpadded

    def _finish(self, slot: int, session: Session, tail: Tail) -> list[Message]:
        """Answer a flush whose padding is through, and begin anew."""
        told = self._ack(slot, session, _NEVER)
        self._clear(slot)
        self._restart(slot)
        session.anchor(int(self._position[slot]), tail.end)
        session.flushed = tail.id
        return [*told, Flushed(session.name, tail.id, tail.end)]

    def _clear(self, slot: int) -> None:
        """Forget queued samples."""
        self._head[slot] = self._fill[slot] = 0
        self._mark[slot] = self._told_at[slot] = _NEVER
        self._end[slot] = _NEVER
        self._held[slot] = False

    def _restart(self, slot: int) -> None:
        """Make all that is carried like new."""
        self._begin[slot] = self._position[slot]
        self.front.reset(slot)
        self.runtime.reset(slot)
        self.wing.reset(slot)


def _stretches(queue: NDArray[np.float32], length: int) -> NDArray[np.float32]:
    """Return a view of all stretches of a length, (slots, beginnings, length, channels).

    Out of it a row's samples are one copy; an index for each sample takes twenty times as long.
    """
    return sliding_window_view(queue, length, axis=1).transpose(0, 1, 3, 2)
