"""Recordings side by side, walked window by window, as an engine would stream them.

A lane is a long stretch of one recording. A batch is one window of every lane, and the next
batch is the window after it in the same lanes, so that a network can carry its state along:
truncated back-propagation through time.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as lightning
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from engine.model_file import ModelSpec
from engine.signal import Front
from training import augment, data
from training.data import Recording, Targets

_MAX_STRETCH = 0.1


class Window(NamedTuple):
    """One window of every lane."""

    x: Tensor  # (lanes, samples, 2)
    beat: Tensor  # (lanes, frames)
    label: Tensor  # (lanes, frames)
    weight: Tensor  # (lanes, frames)
    first: bool  # no state comes from before


class Lanes(Dataset[Window]):
    """One epoch of augmented lanes; the same seed gives the same one. Windows are in order.

    Parameters
    ----------
    recordings : sequence of Recording
    spec : ModelSpec
        For the filters and the look-ahead.
    stride : int
        Samples a frame.
    window_samples : int
        Samples of one window; a multiple of the stride.
    per_recording : int
        Lanes that one recording is cut into.
    seed : sequence of int
    """

    def __init__(
        self,
        recordings: Sequence[Recording],
        spec: ModelSpec,
        stride: int,
        window_samples: int,
        per_recording: int,
        seed: Sequence[int],
    ) -> None:
        self.spec = spec
        self.stride = stride
        self.window_samples = window_samples
        rng = np.random.default_rng(seed)
        varied = [self._vary(recording, rng) for recording in recordings]
        shortest = min(len(signal) for signal, _ in varied)
        self._windows = shortest // per_recording // window_samples
        signals = self._cut([signal for signal, _ in varied], per_recording, 1)
        self.samples = filter_all(signals, spec)
        self.targets = Targets._make(
            self._cut(field, per_recording, stride)
            for field in zip(*(marks for _, marks in varied), strict=True)
        )

    def __len__(self) -> int:
        return self._windows

    def __getitem__(self, index: int) -> Window:
        frames = self.window_samples // self.stride
        x = self.samples[:, index * self.window_samples : (index + 1) * self.window_samples]
        part = slice(index * frames, (index + 1) * frames)
        beat, label, weight = (torch.from_numpy(field[:, part]) for field in self.targets)
        return Window(torch.from_numpy(x), beat, label, weight, first=index == 0)

    def _vary(
        self, recording: Recording, rng: np.random.Generator
    ) -> tuple[NDArray[np.float32], Targets]:
        """Return both leads, augmented, and their targets, all rolled to begin anywhere."""
        recording = augment.stretch(recording, 1 + rng.uniform(-_MAX_STRETCH, _MAX_STRETCH))
        marks = data.targets(recording, self.spec, self.stride)
        signal = augment.place(recording.signal, rng)
        signal = augment.disturb(signal, self.spec.input.rate_hz, rng)
        roll = int(rng.integers(len(marks.beat)))
        whole = len(marks.beat) * self.stride
        return (
            np.roll(signal[:whole], -roll * self.stride, axis=0),
            Targets._make(np.roll(field, -roll) for field in marks),
        )

    def _cut(self, rows: Sequence[NDArray[Any]], per_recording: int, stride: int) -> NDArray[Any]:
        """Cut each row, of one value every `stride` samples, into lanes of whole windows."""
        length = self._windows * self.window_samples // stride
        kept = [
            row[: length * per_recording].reshape(per_recording, length, *row.shape[1:])
            for row in rows
        ]
        return np.concatenate(kept)


class Whole(NamedTuple):
    """Unchanged recordings of one length, for validation."""

    x: Tensor  # (recordings, samples, 2), filtered
    recordings: Sequence[Recording]


class HeartData(lightning.LightningDataModule):
    """New lanes every epoch, and the validation recordings as they are.

    Parameters
    ----------
    make_lanes : callable
        From a seed, two integers, to an epoch's :class:`Lanes`.
    validation : Whole
    seed : int
    """

    def __init__(
        self, make_lanes: Callable[[Sequence[int]], Lanes], validation: Whole, seed: int
    ) -> None:
        super().__init__()
        self._make_lanes = make_lanes
        self._validation = validation
        self._seed = seed

    def train_dataloader(self) -> DataLoader[Window]:
        assert self.trainer is not None
        lanes = self._make_lanes((self._seed, self.trainer.current_epoch))
        return DataLoader(lanes, batch_size=None)

    def val_dataloader(self) -> DataLoader[Whole]:
        return DataLoader([self._validation], batch_size=None, collate_fn=_unchanged)


def whole(recordings: Sequence[Recording], spec: ModelSpec) -> Whole:
    """Put recordings side by side."""
    signals = np.stack([recording.signal[:, :2] for recording in recordings])
    return Whole(torch.from_numpy(filter_all(signals, spec)), recordings)


def filter_all(samples: NDArray[np.float32], spec: ModelSpec) -> NDArray[np.float32]:
    """Pass (rows, samples, leads) through the engine's filters."""
    return Front(spec, len(samples)).push(np.arange(len(samples)), samples)


def _unchanged(item: Any) -> Any:
    """Keep the loader from turning the recordings' arrays into tensors."""
    return item
