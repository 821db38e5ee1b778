"""From a window of samples to the tensor that a stage of a model reads, and back.

A recipe works on all rows of a batch at once. ``training`` imports these functions, so that a
model is trained on exactly what it will be given. Nothing here carries state: what overlaps
between windows is carried by :class:`engine.signal.Front`.
"""

from functools import lru_cache
from typing import Annotated, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy import fft

# Frames that are worked on together: their spectra stay in the L2 cache, a larger block leaves
# it and takes twice as long.
_BLOCK_FRAMES = 80
_PREEMPHASIS = np.float32(0.97)
_FLOOR = np.finfo(np.float32).eps  # of a filter's power, as Kaldi's


class LogMel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="log_mel"):
    """Logarithmic mel filter-bank energies, as NeMo and librosa compute them.

    Frame *k* of a window covers its samples from ``k * shift_samples`` on. All figures are those
    of kaldi-native-fbank with ``is_librosa``, without dither and without removal of the mean; a
    window that begins ``frame_samples / 2 - 80`` samples before a multiple of 160 has frames
    where its ``snip_edges = false`` has them. The samples count as ``gain`` times as loud: at 1
    a filter's least energy lies at some -74 dB of full scale and hides the consonants of a quiet
    voice, at 32 it lies where 16 bits end.
    """

    shift_samples: Annotated[int, msgspec.Meta(ge=1)] = 160
    bins: Annotated[int, msgspec.Meta(ge=1)] = 80
    frame_samples: Annotated[int, msgspec.Meta(ge=2)] = 400
    gain: Annotated[float, msgspec.Meta(ge=1e-9)] = 1.0

    def frames(self, window_samples: int) -> int:
        """Return how many whole frames a window holds."""
        return max(0, (window_samples - self.frame_samples) // self.shift_samples + 1)


Recipe = Literal["raw", "magnitude"] | LogMel


def extract(
    recipe: Recipe, windows: NDArray[np.float32], rate_hz: float = 0.0
) -> NDArray[np.float32]:
    """Turn windows into features.

    Parameters
    ----------
    recipe : {"raw", "magnitude"} or LogMel
        ``raw`` passes the samples on; ``magnitude`` is the absolute value of the real DFT of
        each window, without a taper (DTLN's first stage, Westhausen & Meyer 2020).
    windows : (rows, window, channels) float32
        One channel for :class:`LogMel`, in [-1, 1].
    rate_hz : float
        Of the samples; only :class:`LogMel` asks for it.

    Returns
    -------
    (rows, window, channels), (rows, window // 2 + 1, channels) or (rows, frames, bins) float32
    """
    if recipe == "raw":
        return windows
    if isinstance(recipe, LogMel):
        return _log_mel(recipe, windows[:, :, 0], rate_hz)
    spectrum = np.abs(np.fft.rfft(windows, axis=1))
    return spectrum.astype(np.float32, copy=False)


def _log_mel(recipe: LogMel, windows: NDArray[np.float32], rate_hz: float) -> NDArray[np.float32]:
    """Return the features of (rows, window) float32, (rows, frames, bins)."""
    size, shift = recipe.frame_samples, recipe.shift_samples
    num_frames = recipe.frames(windows.shape[1])
    fft_size = 1 << (size - 1).bit_length()
    taper, filters = _taper(size, recipe.gain), mel_filters(recipe.bins, fft_size, rate_hz)
    features = np.empty((len(windows), num_frames, recipe.bins), np.float32)
    step = max(1, min(len(windows), _BLOCK_FRAMES // num_frames))
    padded = np.zeros((step, num_frames, fft_size), np.float32)
    sharp = np.zeros((step, windows.shape[1]), np.float32)
    framed = np.lib.stride_tricks.sliding_window_view(sharp, size, axis=1)
    framed = framed[:, ::shift][:, :num_frames]
    for start in range(0, len(windows), step):
        block = windows[start : start + step]
        count = len(block)
        # Pre-emphasis of the whole window is that of each frame: the taper's first value is 0.
        np.multiply(block[:, :-1], -_PREEMPHASIS, out=sharp[:count, 1:])
        sharp[:count, 1:] += block[:, 1:]
        part = padded[:count]
        np.multiply(framed[:count], taper, out=part[:, :, :size])
        spectrum = fft.rfft(part, axis=2)
        parts = spectrum.view(np.float32)
        np.multiply(parts, parts, out=parts)
        # One product a row, of one size: a product over all rows would round by their number.
        energies = features[start : start + step]
        np.matmul(parts[:, :, ::2] + parts[:, :, 1::2], filters, out=energies)
        np.log(np.maximum(energies, _FLOOR, out=energies), out=energies)
    return features


@lru_cache(maxsize=8)
def _taper(size: int, gain: float) -> NDArray[np.float32]:
    """Return the periodic Hann window, so many times as high."""
    window: NDArray[np.float32] = (gain * np.hanning(size + 1)[:-1]).astype(np.float32)
    return window


@lru_cache(maxsize=8)
def mel_filters(bins: int, fft_size: int, rate_hz: float) -> NDArray[np.float32]:
    """Return triangular filters of equal area over the bins of a power spectrum.

    Returns
    -------
    (fft_size // 2 + 1, bins) float32

    Notes
    -----
    Slaney's scale (Auditory Toolbox 1998): linear below 1 kHz, logarithmic above.
    """
    edges = _mel_edges(bins, rate_hz)
    hz = np.linspace(0.0, rate_hz / 2, fft_size // 2 + 1)[:, None]
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    rising, falling = (hz - low) / (centre - low), (high - hz) / (high - centre)
    triangles = np.maximum(0.0, np.minimum(rising, falling)) * 2.0 / (high - low)
    filters: NDArray[np.float32] = triangles.astype(np.float32)
    return filters


def mel_centres(bins: int, rate_hz: float) -> NDArray[np.float64]:
    """Return the frequency at which each filter is highest, in Hz, (bins,)."""
    return _mel_edges(bins, rate_hz)[1:-1]


def _mel_edges(bins: int, rate_hz: float) -> NDArray[np.float64]:
    return _hz(np.linspace(0.0, _mel(np.array(rate_hz / 2)), bins + 2))


_HZ_PER_MEL = 200 / 3
_KNEE_MEL = 15.0  # 1 kHz
_LOG_STEP = np.log(6.4) / 27


def _mel(hz: NDArray[np.float64]) -> NDArray[np.float64]:
    above = _KNEE_MEL + np.log(np.maximum(hz, 1000.0) / 1000.0) / _LOG_STEP
    return np.where(hz < 1000.0, hz / _HZ_PER_MEL, above)


def _hz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    above = 1000.0 * np.exp(_LOG_STEP * (np.maximum(mel, _KNEE_MEL) - _KNEE_MEL))
    return np.where(mel < _KNEE_MEL, mel * _HZ_PER_MEL, above)


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
