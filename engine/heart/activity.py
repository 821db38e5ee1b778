"""Whether a pause is one: how much each lead moves in it, beside the seconds that hold beats.

Where the heart stands still little is as steep as a QRS complex. Where beats were missed, or noise
hides whether there are any, much is. And an electrode that comes off an amplifier without a
continuous path makes a step and creeps back for seconds, without a beat and without noise.

Slopes are looked at between T waves and the mains (50 and 60 Hz are nulls), the greatest of each
second. What is told is of the lead that moves least: noise on one does not make up for the beats
that a quiet one should show. On DS1 of MIT-BIH the rest between two beats is as steep as 0.7 of
what is usual in 0.06 % of the intervals (0.5 % on MLII alone), and three seconds with beats are
in 97.6 % (98.8 % on MLII alone).
"""

import math
from collections.abc import Sequence
from statistics import median

import msgspec
import numpy as np

from engine.heart.seconds import Array

_TOGETHER = 3  # whole seconds of a pause are looked at together: a lone artefact is outvoted
_LEAST = 2  # so many fit into any pause of 4 s
_T_WAVE_S = 0.4  # after a beat
_USUAL = 8  # seconds with beats
# mV, on the scale of `steepness`, where a narrow complex of 1 mV is about 2. Less than the first is
# no lead; the second stands for a patient of whom no beat is known yet (0.2 to 4.5 on DS1).
_NO_LEAD, _TYPICAL = 0.1, 1.0
# mV: by so much the means of a pause's seconds lie apart where an electrode came off (of any six
# seconds of DS1 0.1 % on both leads, 1 % on one), and so near the last four where it is still.
_SHIFT_MV, _STILL_MV = 1.3, 0.3
_STILL = 4
_KEPT = 12  # seconds that a shift is remembered for


class Second(msgspec.Struct, array_like=True, gc=False):
    """The second that ends at a position: of each lead its greatest slope, and its mean in mV."""

    end: int
    slopes: list[float]
    means: list[float]


def steepness(latest: Array, rate_hz: float) -> tuple[Array, Array]:
    """Return the greatest slope and the mean of each signal in its last second.

    Parameters
    ----------
    latest : (ended, channels, samples) float32
        In mV, of more than a second.
    rate_hz : float
        About 120: a sum of two samples is blind to 60 Hz then, and 1, sqrt(3), 1 to 50 Hz.

    Returns
    -------
    slopes, means : (ended, channels) float32
    """
    count = round(rate_hz)
    x = latest[:, :, -count - 4 :]
    slope = x[:, :, 3:-1] - x[:, :, 1:-3]
    slope *= np.float32(math.sqrt(3))
    slope += x[:, :, 4:]
    slope -= x[:, :, :-4]
    means: Array = np.add.reduce(x[:, :, 4:], axis=2) / np.float32(count)
    return np.maximum.reduce(np.abs(slope, out=slope), axis=2), means


class Activity(msgspec.Struct):
    """The latest seconds of one stream, as plain data."""

    fresh: bool = True  # nothing came before the next second
    seconds: list[Second] = []
    usual: list[list[float]] = []  # slopes of the latest seconds with a beat
    beats: list[int] = []  # positions of those in a second that is not over, or has just been

    def beat(self, position: int) -> None:
        self.beats.append(position)

    def second(self, second: Second) -> None:
        """Take a second, when every beat before the last one's end is known."""
        if self.fresh:  # its first slopes are over what is not of this signal
            self.fresh = False
            return
        if self.seconds and self.beats and self.beats[0] < self.seconds[-1].end:
            last = self.seconds[-1]
            self.beats = [position for position in self.beats if position >= last.end]
            self.usual = [*self.usual[1 - _USUAL :], last.slopes]
        self.seconds.append(second)
        if len(self.seconds) > _KEPT:
            del self.seconds[0]

    def gap(self) -> None:
        """Forget the signal, and not what is usual of the patient."""
        self.fresh, self.seconds, self.beats = True, [], []

    def since(self, beat: int, rate_hz: float) -> float | None:
        """Return how much the signal moves since a beat, 1 if as where beats are; None: unknown."""
        begin = beat + (1 + _T_WAVE_S) * rate_hz
        whole = [one.slopes for one in self.seconds if one.end >= begin][-_TOGETHER:]
        if len(whole) < _LEAST:
            return None
        slopes = [median(lead) for lead in zip(*whole, strict=True)]
        pause = [one.means for one in self.seconds if one.end > beat - rate_hz]  # and one before
        shifted = [_shifted(lead) for lead in zip(*pause, strict=True)]
        usual = [median(lead) for lead in zip(*self.usual, strict=True)] or [_TYPICAL] * len(slopes)
        shares: list[float] = [
            max(slope / most, float(off))
            for slope, most, off in zip(slopes, usual, shifted, strict=True)
            if most >= _NO_LEAD
        ]
        return min(shares) if shares else max(slopes) / _TYPICAL


def _shifted(means: Sequence[float]) -> bool:
    """Return whether a lead has gone elsewhere in a pause, and is not still yet."""
    latest = means[-_STILL:]
    return max(means) - min(means) >= _SHIFT_MV and max(latest) - min(latest) >= _STILL_MV
