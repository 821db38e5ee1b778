"""The heart wing: a step's scores in; beats and measures out."""

from engine import messages
from engine.heart.beats import REFRACTORY_S, Beat, BeatFinder
from engine.heart.rhythm import Rhythm
from engine.messages import Gapped, Message
from engine.model_file import ModelSpec
from engine.wing import Outputs, PromptWing, Rows, Timeline


class HeartWing(PromptWing):
    """Beats and rhythm of all streams of a heart model."""

    def __init__(self, spec: ModelSpec, num_slots: int) -> None:
        self._rate_hz = spec.input.rate_hz
        self.delay = spec.look_ahead_samples + round(REFRACTORY_S * self._rate_hz)
        self.finder = BeatFinder(spec, num_slots)
        self._rhythm: dict[int, Rhythm] = {}

    def reset(self, slot: int) -> None:
        self.finder.reset(slot)
        self._rhythm[slot] = Rhythm(self._rate_hz)

    def gap(self, slot: int, state: Gapped) -> None:
        """Join no beats over lost samples."""
        if state == "reset":
            self.finder.reset(slot)
        self._rhythm[slot].gap()

    def push(self, rows: Rows, outputs: Outputs) -> list[tuple[int, Message]]:
        """Return beats and measures as (row, message)."""
        told: list[tuple[int, Message]] = []
        for row, beat in self.finder.push(rows.slots, outputs, rows.start, rows.hops):
            if rows.begin[row] <= beat.position < rows.end[row]:
                slot, stream = int(rows.slots[row]), rows.streams[row]
                told += [(row, message) for message in self._tell(slot, stream, beat)]
        return told

    def _tell(self, slot: int, stream: Timeline, beat: Beat) -> list[Message]:
        values = self._rhythm[slot].push(beat.position, beat.label)
        index, decided_at = stream.index_at(beat.position), stream.needed_until(beat.decided_at)
        seconds = index / stream.rate_hz
        rate = self._rhythm[slot].heart_rate_bpm
        if rate is not None:
            values["heart_rate_bpm"] = rate
        return [
            messages.Beat(
                stream=stream.name,
                index=index,
                seconds=seconds,
                label=beat.label,
                probability=beat.probability,
                decided_at=decided_at,
                heart_rate_bpm=rate,
            ),
            messages.Measures(stream.name, index, seconds, decided_at, values),
        ]
