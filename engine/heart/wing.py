"""The heart wing: a step's scores in; beats, heart rate and alerts out."""

from engine import messages
from engine.alerts import AlertMachine
from engine.heart.beats import REFRACTORY_S, Beat, BeatFinder
from engine.heart.rhythm import RULES, Rhythm
from engine.messages import Gapped, Message
from engine.model_file import ModelSpec
from engine.wing import Outputs, PromptWing, Rows, Timeline


class HeartWing(PromptWing):
    """Beats, rhythm and alert rules of all streams of a heart model."""

    def __init__(self, spec: ModelSpec, num_slots: int) -> None:
        self._rate_hz = spec.input.rate_hz
        self.delay = spec.look_ahead_samples + round(REFRACTORY_S * self._rate_hz)
        self.finder = BeatFinder(spec, num_slots)
        self._rhythm: dict[int, Rhythm] = {}
        self._alerts: dict[int, AlertMachine] = {}

    def reset(self, slot: int) -> None:
        self.finder.reset(slot)
        self._rhythm[slot] = Rhythm(self._rate_hz)
        self._alerts[slot] = AlertMachine(RULES)

    def gap(self, slot: int, state: Gapped) -> None:
        """Join no beats over lost samples; alerts stay, since missing data resolves none."""
        if state == "reset":
            self.finder.reset(slot)
        self._rhythm[slot].gap()

    def push(self, rows: Rows, outputs: Outputs) -> list[tuple[int, Message]]:
        """Return beats and alerts as (row, message)."""
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
        told: list[Message] = [
            messages.Beat(
                stream=stream.name,
                index=index,
                seconds=seconds,
                label=beat.label,
                probability=beat.probability,
                decided_at=decided_at,
                heart_rate_bpm=self._rhythm[slot].heart_rate_bpm,
            )
        ]
        told += [
            messages.Alert(
                stream=stream.name,
                rule=change.rule.name,
                state=change.state,
                priority=change.rule.priority,
                value=change.value,
                limit=change.rule.raise_at if change.state == "active" else change.rule.clear_below,
                index=index,
                seconds=seconds,
                decided_at=decided_at,
            )
            for change in self._alerts[slot].update(values)
        ]
        return told
