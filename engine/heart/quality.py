"""Signal quality once a second, from the raw samples: whether what is seen is to be believed.

Each lead is judged by itself, and what is told is of the best one: one good lead suffices to find
beats, and of two a stream may have only one.

flat_line
    1 if the second moves by less than 20 uV: bad.
lead_off
    1 if it is flat and lies 2 mV from where the lead was before, which is how an amplifier runs
    into its rail; or beyond 300 mV, the offset that electrodes may have (IEC 60601-2-27): bad.
leads_off
    How many leads are off, whatever the others are like.
saturated
    1 if it rests at its very extreme for 5 % of the second or more, in one piece and 2 mV from
    where the lead was before: bad.
implausible_amplitude
    1 if the second lies 20 mV from its mean, on the mean: no heart does, so the unit must be wrong,
    as uV that are called mV. A pacemaker's pulse is too short to count: bad.
mains_share
    Power around 50 or 60 Hz over that and of beats, 2 to 20 Hz. From 0.2 poor, 0.8 bad.
noise
    0 to 1, the worst of three: muscle (power from 35 Hz on, mains left out, over that and of
    beats), movement (how far the means of the latest seconds lie apart), and a signal without rest
    (mean over greatest slope). From 0.5 poor, 1 bad. A signal without rest is never bad by
    that alone: ventricular tachycardia and fibrillation are so as well.
quality
    2 good, 1 poor, 0 bad.

Mains and noise look at the latest four seconds, so that a second without a beat is not all noise;
they are not told before there are four. The limits were chosen on DS1 of MIT-BIH and the training
part of CinC 2017, resampled to 360 Hz: ``python -m training.rhythm --cinc`` prints how they$
(training/LOG.md).
"""

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy import fft

from engine.heart.seconds import LATEST, Array, Ended

GOOD, POOR, BAD = 2, 1, 0

_FLAT_MV = 0.02
_OFFSET_MV = 300.0
_RAIL_MV = 2.0
_PINNED = 0.05  # of the samples of a second
_IMPLAUSIBLE_MV = 20.0
_EXTREME = 1e-3  # of the second's range: so close to its extreme is at it
# Where the bands of the spectrum begin: beats, and ventricular flutter has nothing above 5 Hz;
# neither; muscle, with the mains in it.
_BANDS_HZ = (2.0, 20.0, 35.0, 48.5, 51.5, 58.5, 61.5)
_POOR_MAINS, _BAD_MAINS = 0.2, 0.8
# What is 1 on the scale of `noise`; half of it is poor.
_MUSCLE, _MOVED_MV, _RESTLESS = 0.2, 1.6, 0.24
_MOST_RESTLESS = 0.9  # on that scale: poor, and not bad
_TINY = 1e-12  # keeps a share of nothing from being 0 / 0


class Lead(msgspec.Struct):
    """What is kept of one lead."""

    level: float | None = None  # mean of the last second that was neither flat nor pinned, mV
    beats: list[float] = []  # power of their band in the latest seconds
    means: list[float] = []  # of the latest seconds, mV


class Second(msgspec.Struct):
    """What is found of a second of one lead by arithmetic on all of them at once."""

    low: float  # mV
    high: float
    mean: float
    beats: float  # power of their band
    mains: float
    muscle: float
    restless: float
    rests_at: float  # mV: the extreme at which it rests; nan: it does not
    swings: float  # mV: mean distance from the mean; 0 if the range is plausible


class Quality:
    """What the latest seconds of each stream were like.

    Parameters
    ----------
    rate_hz : float
    channels : int
    """

    def __init__(self, rate_hz: float, channels: int) -> None:
        samples = round(rate_hz)
        hz = fft.rfftfreq(samples, 1 / rate_hz)
        # The mean leaks through this window into the lowest two bins only.
        self._window = np.hanning(samples + 1)[:-1].astype(np.float32)
        # A spectrum is looked at as its real and imaginary parts in turn.
        starts = np.minimum(np.searchsorted(hz, _BANDS_HZ), len(hz) - 1)
        self._bands = 2 * starts
        self._channels = channels
        self._leads: dict[int, list[Lead]] = {}  # by slot

    def reset(self, slot: int) -> None:
        self._leads[slot] = [Lead() for _ in range(self._channels)]

    def take(self, slot: int) -> bytes:
        """Return all that a row carries, to be put back here or elsewhere."""
        return msgspec.msgpack.encode(self._leads[slot])

    def put(self, slot: int, carried: bytes) -> None:
        self._leads[slot] = msgspec.msgpack.decode(carried, type=list[Lead])

    def push(self, ended: Ended, restless: Array) -> list[dict[str, float]]:
        """Return the measures of each ended second; what is not known is absent.

        Parameters
        ----------
        ended : Ended
        restless : (ended, channels) float32
            What :func:`engine.heart.seconds.restless` says.
        """
        return [
            _measures(
                [
                    _judge(lead, Second(*of))
                    for lead, of in zip(self._leads[slot], all_, strict=True)
                ],
                whole,
            )
            for slot, all_, whole in zip(
                ended.slots, self._look(ended.second, restless), ended.whole, strict=True
            )
        ]

    def _look(self, second: Array, restless: Array) -> list[list[list[float]]]:
        """Return the fields of :class:`Second`, of each ended second and lead."""
        found = np.empty((*restless.shape, len(Second.__struct_fields__)))
        low = np.minimum.reduce(second, axis=2, out=found[:, :, 0])
        high = np.maximum.reduce(second, axis=2, out=found[:, :, 1])
        found[:, :, 2] = np.add.reduce(second, axis=2) / second.shape[2]
        spectrum = np.fft.rfft(second * self._window, axis=2)
        parts = spectrum.view(spectrum.real.dtype)
        parts *= parts
        bands = np.add.reduceat(parts, self._bands, axis=2)
        fifty, sixty = bands[:, :, 3], bands[:, :, 5]
        found[:, :, 3] = bands[:, :, 0]
        mains = np.maximum(fifty, sixty, out=found[:, :, 4])
        found[:, :, 5] = np.add.reduce(bands[:, :, 2:], axis=2) - mains
        found[:, :, 6] = restless
        found[:, :, 7] = _rests_at(second, low, high)
        found[:, :, 8] = _swings(second, low, high)
        rows: list[list[list[float]]] = found.tolist()
        return rows


class Verdict(msgspec.Struct):
    """What one lead is like."""

    flat: bool
    off: bool
    pinned: bool
    implausible: bool
    mains_share: float
    noise: float

    @property
    def dead(self) -> bool:
        return self.flat or self.off or self.pinned or self.implausible

    @property
    def quality(self) -> int:
        if self.dead or self.noise >= 1 or self.mains_share >= _BAD_MAINS:
            return BAD
        return POOR if self.noise >= 0.5 or self.mains_share >= _POOR_MAINS else GOOD


def _judge(lead: Lead, second: Second) -> Verdict:
    """Judge a second by itself and by the latest ones, and remember it."""
    flat = second.high - second.low < _FLAT_MV
    level = second.mean if lead.level is None else lead.level
    pinned = not flat and abs(second.rests_at - level) > _RAIL_MV  # False if it does not rest
    off = (flat and abs(second.mean - level) > _RAIL_MV) or abs(second.mean) > _OFFSET_MV
    if not flat and not pinned:
        lead.level = second.mean
    lead.beats = [*lead.beats[1 - LATEST :], second.beats]
    lead.means = [*lead.means[1 - LATEST :], second.mean]
    beats = max(lead.beats) + _TINY
    muscle = second.muscle / (second.muscle + beats)
    noise = max(
        muscle / _MUSCLE,
        (max(lead.means) - min(lead.means)) / _MOVED_MV,
        min(_MOST_RESTLESS, second.restless / _RESTLESS),
    )
    return Verdict(
        flat,
        off,
        pinned,
        second.swings > _IMPLAUSIBLE_MV,
        0.0 if flat else second.mains / (second.mains + beats),
        0.0 if flat else min(1.0, noise),
    )


def _measures(leads: list[Verdict], whole: bool) -> dict[str, float]:
    """Return the measures of a second; `whole`: whether the ones before it are known."""
    # Of several that say nothing, one whose trouble is more than that nothing comes from it.
    best = max(
        leads,
        key=lambda lead: (not lead.dead, lead.off or not lead.flat, lead.quality, -lead.noise),
    )
    values: dict[str, float] = {
        "flat_line": float(best.flat),
        "lead_off": float(best.off),
        "leads_off": float(sum(lead.off for lead in leads)),
        "saturated": float(best.pinned),
        "implausible_amplitude": float(best.implausible),
    }
    if whole:
        values["mains_share"] = best.mains_share
        values["noise"] = best.noise
    if whole or best.dead:
        values["quality"] = best.quality
    return values


def _swings(second: Array, low: Array, high: Array) -> NDArray[np.float64]:
    """Return the mean distance from the mean, (ended, channels); 0 if it is plausible anyway."""
    found = np.zeros(low.shape)
    for row, channel in np.argwhere(high - low > _IMPLAUSIBLE_MV).tolist():
        one = second[row, channel]
        found[row, channel] = np.abs(one - one.mean()).mean()
    return found


def _rests_at(
    second: Array, low: NDArray[np.float64], high: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the maximum or minimum if the second rests at it, else nan, (ended, channels).

    Only one stretch counts: a quiet baseline touches its minimum here and there.
    """
    length = max(2, round(_PINNED * second.shape[2]))
    middle, half = (high + low) / 2, (high - low) * (0.5 - _EXTREME)
    away = second - middle.astype(np.float32)[:, :, None]
    extreme = np.abs(away) >= half.astype(np.float32)[:, :, None]
    found = np.full(low.shape, np.nan)
    # Few seconds have so many such samples at all; only they are looked at more closely.
    for row, channel in np.argwhere(np.add.reduce(extreme, axis=2) >= length).tolist():
        side = np.where(extreme[row, channel], np.sign(away[row, channel]), 0)
        edges = np.flatnonzero(np.diff(side, prepend=2, append=2))
        for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            if side[start] and end - start >= length:
                found[row, channel] = (high if side[start] > 0 else low)[row, channel]
    return found
