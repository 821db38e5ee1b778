"""Ventricular fibrillation or flutter, suspected from the signal itself: there are no beats then.

Four seconds look like it if the signal is all but a sine wave in time, by the leakage of the
VF filter (Kuo & Dillman 1978), and in frequency, by the spectral algorithm (Barro et al. 1989):
most of it lies around one frequency, with little at its multiples. What is told is how many
of the last four seconds ended such a window.

Limits were chosen on DS1 of MIT-BIH, 11 hours of which record 207 has the only stretches of
flutter, six in 144 s; ``python -m training.rhythm`` prints what they find (training/LOG.md).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from engine.heart.seconds import LATEST, Array, Ended

SUSPECTED = 0.5  # of the last four seconds; fewer windows than four can say so, but not deny it
# Least mean over greatest slope. Found for the signal quality anyhow, it leaves one window in ten.
_RESTLESS = 0.1
_LEAKAGE = 0.6  # greatest; of 1, what is left of the signal beside itself half a period later
_PEAK_HZ = (2.0, 7.0)  # 120 to 420 a minute
_AROUND = 0.35  # least share of the amplitude within 0.7 to 1.4 times the peak's frequency
_MOMENT = 1.6  # greatest mean frequency, in multiples of the peak's
_LEAST_MV = 0.1  # from peak to peak: a smaller signal is a flat line
_FROM_HZ, _MULTIPLES = 0.5, 20.0  # what counts of the spectrum, as by Barro
_NOISE = 0.05  # amplitudes under this share of the peak count as none
_TINY = 1e-12  # mV: keeps a share of nothing from being 0 / 0

Bools = NDArray[np.bool_]


class Fibrillation:
    """Which of the last four seconds of each stream ended a window that looked like it.

    Parameters
    ----------
    slow_hz : float
        Of :attr:`Ended.latest`.
    """

    def __init__(self, slow_hz: float) -> None:
        self._slow_hz = slow_hz
        self._hits: dict[int, list[bool]] = {}  # by slot, the newest last

    def reset(self, slot: int) -> None:
        self._hits[slot] = []

    def take(self, slot: int) -> list[bool]:
        """Return all that a row carries, to be put back here or elsewhere."""
        return self._hits[slot]

    def put(self, slot: int, carried: Sequence[bool]) -> None:
        self._hits[slot] = list(carried)

    def push(self, ended: Ended, restless: Array) -> list[float | None]:
        """Return for each ended second how much it looks like it, 0 to 1; None: not known.

        Parameters
        ----------
        ended : Ended
        restless : (ended, channels) float32
            What :func:`engine.heart.seconds.restless` says.
        """
        looks: Bools = np.logical_or.reduce(restless >= _RESTLESS, axis=1)
        if looks.any():
            looks[looks] = looks_like_it(ended.latest[looks], self._slow_hz)
        return [
            self._note(slot, hit) if whole else None
            for slot, hit, whole in zip(ended.slots, looks.tolist(), ended.whole, strict=True)
        ]

    def _note(self, slot: int, hit: bool) -> float | None:
        hits = self._hits[slot] = [*self._hits[slot][1 - LATEST :], hit]
        share = sum(hits) / LATEST
        return share if len(hits) == LATEST or share >= SUSPECTED else None


def looks_like_it(windows: Array, rate_hz: float) -> Bools:
    """Return whether every lead with a signal looks like it, and there is one.

    Parameters
    ----------
    windows : (rows, channels, samples) float32
        In mV.
    rate_hz : float

    Returns
    -------
    (rows,) bool
    """
    flat = np.ptp(windows, axis=2) < _LEAST_MV
    hit = ~flat
    for looks in (_in_time, _in_frequency):
        if hit.any():
            signals = windows[hit]
            hit[hit] = looks(signals - signals.mean(axis=1, keepdims=True), rate_hz)
    result: Bools = (hit | flat).all(axis=1) & hit.any(axis=1)
    return result


def _in_time(centred: Array, rate_hz: float) -> Bools:
    return leakage(centred, rate_hz) < _LEAKAGE


def leakage(centred: Array, rate_hz: float) -> NDArray[np.float64]:
    """Return what is left of each signal beside itself half a period later, 0 to 1.

    The period is that of a sine wave of the same mean amplitude and mean slope. 0 for a sine
    wave, near 1 for complexes with rest between them.
    """
    # Summed over a thirtieth of a second: no mains, no muscle.
    width = max(1, round(rate_hz / 30))
    length = centred.shape[1] - width + 1
    smooth = centred[:, :length].astype(np.float64)
    for offset in range(1, width):
        smooth += centred[:, offset : offset + length]
    size = np.abs(smooth)
    steep = np.abs(smooth[:, 1:] - smooth[:, :-1]).sum(axis=1)
    half = np.rint(np.pi * size.sum(axis=1) / np.maximum(steep, _TINY)).astype(np.int64)
    half = np.clip(half, 1, length - 1)
    found = np.empty(len(smooth))
    for row, shift in enumerate(half.tolist()):  # no two rows have the same
        left = np.abs(smooth[row, shift:] + smooth[row, :-shift]).sum()
        both = size[row, shift:].sum() + size[row, :-shift].sum()
        found[row] = left / max(both, _TINY)
    return found


def _in_frequency(centred: Array, rate_hz: float) -> Bools:
    """Return whether the spectrum of each signal is one narrow peak, (rows,) bool."""
    count = centred.shape[1]
    amplitude = np.abs(fft.rfft(centred * np.hamming(count).astype(np.float32), axis=1))
    hz = fft.rfftfreq(count, 1 / rate_hz)
    lo, hi = np.searchsorted(hz, (_FROM_HZ, 9.0))
    peak = lo + amplitude[:, lo : hi + 1].argmax(axis=1)
    peak_hz = hz[peak][:, None]
    least = _NOISE * amplitude[np.arange(len(peak)), peak][:, None]
    counts = (hz >= _FROM_HZ) & (hz <= _MULTIPLES * peak_hz) & (amplitude >= least)
    amplitude = np.where(counts, amplitude, 0.0)
    total = amplitude.sum(axis=1)
    around = np.where((hz >= 0.7 * peak_hz) & (hz <= 1.4 * peak_hz), amplitude, 0.0).sum(axis=1)
    moment = (amplitude * hz).sum(axis=1) / peak_hz[:, 0]
    result: Bools = (
        (peak_hz[:, 0] >= _PEAK_HZ[0])
        & (peak_hz[:, 0] <= _PEAK_HZ[1])
        & (around >= _AROUND * total)
        & (moment <= _MOMENT * total)
    )
    return result
