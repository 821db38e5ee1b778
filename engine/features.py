"""From a window of samples to the tensor that a stage of a model reads, and back.

A recipe works on all rows of a batch at once. ``training`` imports these functions, so that a
model is trained on exactly what it will be given. Nothing here carries state: what overlaps
between windows is carried by :class:`engine.signal.Front`.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Recipe = Literal["raw", "magnitude"]


def extract(recipe: Recipe, windows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Turn windows into features.

    Parameters
    ----------
    recipe : {"raw", "magnitude"}
        ``raw`` passes the samples on; ``magnitude`` is the absolute value of the real DFT of
        each window, without a taper (DTLN's first stage, Westhausen & Meyer 2020).
    windows : (rows, window, channels) float32

    Returns
    -------
    (rows, window, channels) or (rows, window // 2 + 1, channels) float32
    """
    if recipe == "raw":
        return windows
    spectrum = np.abs(np.fft.rfft(windows, axis=1))
    return spectrum.astype(np.float32, copy=False)


def apply_mask(windows: NDArray[np.float32], mask: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale the spectrum of each window and return to samples; the phase is kept.

    Parameters
    ----------
    windows : (rows, window, channels) float32
    mask : (rows, window // 2 + 1, channels) float32

    Returns
    -------
    (rows, window, channels) float32
    """
    spectrum = np.fft.rfft(windows, axis=1)
    magnitude = np.abs(spectrum).astype(np.float32, copy=False)
    masked = magnitude * mask * np.exp(1j * np.angle(spectrum))
    samples: NDArray[np.float32] = np.fft.irfft(masked, axis=1).astype(np.float32, copy=False)
    return samples
