"""A runtime with a detector of voice in front: a model of speech rests where nobody speaks.

The detector hears every sample of every stream, in batches like any model. The model itself is
stepped for those rows only in which there was voice a moment ago; a row whose gate opens again
begins anew, because what was said before a long silence helps no more. Which rows those are
depends on the samples alone, so the promises of :mod:`engine.runtime` hold.
"""

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from engine.errors import ModelFileError
from engine.model_file import ModelSpec
from engine.runtime import Outputs, Runtime

VOICE = "voice"  # an output beside the model's: (rows, hops of the detector), 1 where there is some
_NEVER = 1 << 30
_UNLIKELY = -30.0  # natural log of any label's probability where nobody speaks


class GatedRuntime:
    """A model behind a detector of voice.

    Parameters
    ----------
    spec : ModelSpec
        With a gate.
    model, detector : Runtime
        Of as many slots each. The detector's windows end where the model's do.
    detector_spec : ModelSpec

    Raises
    ------
    ModelFileError
        If the detector gives anything but one probability a hop.
    """

    def __init__(
        self, spec: ModelSpec, model: Runtime, detector: Runtime, detector_spec: ModelSpec
    ) -> None:
        assert spec.gate is not None
        self.gate = spec.gate
        self.model, self.detector = model, detector
        self.num_slots = min(model.num_slots, detector.num_slots)
        self.max_rows, self.max_hops = model.max_rows, 1
        self.runs: Counter[tuple[int, int]] = model.runs
        self.failed = model.failed = detector.failed = {}  # whichever of the two it was
        self._output = detector_spec.outputs[0].name
        self._hop = detector_spec.hop_samples
        self._window = detector_spec.window_samples
        self._hops = spec.hop_samples // self._hop
        self._hold = round(self.gate.hold_s * spec.input.rate_hz / self._hop)
        self._voiced = np.zeros(self.num_slots, bool)  # what the last hop was
        self._quiet = np.full(self.num_slots, _NEVER)  # hops since the last voice
        (self._scores,) = (one.name for one in spec.outputs if one.meaning == "ctc")
        (heard,) = self._first(detector, detector_spec, self._output)
        if heard.size != 1:
            raise ModelFileError(
                f"gate.model: expected one probability a hop, found {heard.size} values"
            )
        # What is said where nobody speaks: the blank, in as many frames as the model has.
        self._nothing = np.full_like(self._first(model, spec, self._scores), _UNLIKELY)
        self._nothing[:, :, 0] = 0.0  # the blank is the first label

    def _first(self, runtime: Runtime, spec: ModelSpec, output: str) -> NDArray[np.float32]:
        """Return an output of one row's first step, in silence, as if it had not been taken."""
        silence = np.zeros((1, spec.window_samples, spec.input.channels), np.float32)
        runtime.reset(0)
        found = runtime.step(np.array([0]), silence)[output]
        runtime.reset(0)
        runtime.runs.clear()
        return found

    def reset(self, slot: int) -> None:
        """Close a row's gate and forget all behind it."""
        self.detector.reset(slot)
        self.model.reset(slot)
        self._voiced[slot], self._quiet[slot] = False, _NEVER

    def step(self, slots: NDArray[np.intp], windows: NDArray[np.float32]) -> Outputs:
        """Advance some rows by a hop; see :meth:`engine.runtime.CpuRuntime.step`.

        Returns
        -------
        dict
            The model's scores, of rows whose gate is shut the blank's certainty, and
            :data:`VOICE`.
        """
        voice = self._hear(slots, windows)
        quiet = self._quiet[slots]
        was_open = quiet < self._hold
        hops = np.arange(1, self._hops + 1)
        last = (voice * hops).max(axis=1)  # the hop after the last with voice; 0: none
        self._quiet[slots] = np.where(last > 0, self._hops - last, quiet + self._hops)
        is_open = was_open | (last > 0)
        for slot in slots[is_open & ~was_open].tolist():
            self.model.reset(slot)
        scores = np.repeat(self._nothing, len(slots), axis=0)
        if is_open.any():
            scores[is_open] = self.model.step(slots[is_open], windows[is_open])[self._scores]
        return {self._scores: scores, VOICE: voice.astype(np.float32)}

    def _hear(self, slots: NDArray[np.intp], windows: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Return in which of the detector's hops there is voice, (rows, hops)."""
        voice = np.empty((len(slots), self._hops), bool)
        now = self._voiced[slots]
        first = windows.shape[1] - self._hops * self._hop - (self._window - self._hop)
        for number in range(self._hops):
            begin = first + number * self._hop
            probability = self.detector.step(slots, windows[:, begin : begin + self._window])
            heard = probability[self._output].reshape(len(slots))
            now = np.where(now, heard >= self.gate.release, heard >= self.gate.threshold)
            voice[:, number] = now
        self._voiced[slots] = now
        return voice

    def step_seconds(self, rows: int) -> float:
        """Return what a step of so many rows takes, detector included."""
        hearing = self._hops * self.detector.step_seconds(min(rows, self.detector.max_rows))
        return hearing + self.model.step_seconds(rows)

    def take(self, slot: int) -> NDArray[np.float32]:
        """Return a copy of all that a row carries."""
        own = np.array([self._voiced[slot], self._quiet[slot]], np.float32)
        return np.concatenate([own, self.detector.take(slot), self.model.take(slot)])

    def put(self, slot: int, row: NDArray[np.float32]) -> None:
        size = len(self.detector.take(slot))
        self._voiced[slot], self._quiet[slot] = row[0] > 0, int(row[1])
        self.detector.put(slot, row[2 : 2 + size])
        self.model.put(slot, row[2 + size :])
