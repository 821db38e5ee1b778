"""From the beats of one stream to its measures: rate, runs, pauses, variability, fibrillation.

A function of (position, label) of the beats in order, and of how far the signal is known. Beats
on the two sides of lost samples are never joined. A count that may have begun before what is known
is a lower bound: it is told once it is as great as what its name stands for, and as what was told
of it before the loss, so that it can raise an alert and not end one.

All that is carried is plain data: ``msgspec.to_builtins(rhythm)`` takes it out,
``msgspec.convert(data, Rhythm)`` puts it back.
"""

import math
from statistics import median

import msgspec
import numpy as np

from engine.heart.activity import Activity

# How long until a count stands for what it is called: five slow and 17 fast beats and five
# ventricular ones are an alarm in the PhysioNet/CinC challenge of 2015; three ventricular ones a
# run, six a minute frequent (bedside monitors: 5 to 10); three pairs are bigeminy.
_RUN, _FREQUENT, _SLOW, _FAST, _BIGEMINY = 3, 6, 5, 17, 6
_SLOW_BPM, _FAST_BPM = 40.0, 140.0
LONGEST_INTERVAL_S = 3.0  # a longer one is a pause or a loss of signal, not a heart rate
# A pause is told from 3 s on, five times a second until 6 s; then once a second.
_TICKS_PER_S = 5
_PAUSE_TICK, _ASYSTOLE_TICK, _LAST_TICK = 15, 20, 30
ASYSTOLE_S = _ASYSTOLE_TICK / _TICKS_PER_S
# The heart rate is of the median of the last eight intervals: one early beat does not move it;
# of four, if all of these are longer than 1.2 s, or it would lag by 12 s and more.
_INTERVALS, _FEW = 8, 4
_LONG_S = 1.2
_MINUTE_S = 60.0
# Variability: short-term recordings are of five minutes (Task Force of ESC and NASPE 1996).
_VARIABILITY_S = 300.0
_LEAST_SINUS = 0.5  # of the five minutes, in intervals between normal beats
_PNN_S = 0.05
# Atrial fibrillation: coefficient of sample entropy (Lake & Moorman 2011), m = 1, of the last 32
# intervals between beats that are not ventricular, fusion or unknown. Supraventricular ones stay:
# the beats of fibrillation are often called so.
_ENTROPY_INTERVALS, _LEAST_INTERVALS, _LEAST_PAIRS = 32, 24, 12
_EVERY = 8  # intervals after which it is looked at anew
_TOLERANCE_S = 0.05
_OLDEST_S, _HELD_S = 60.0, 20.0
_ENTROPY_0, _ENTROPY_1 = -1.5, -0.5  # what is 0 and 1 on the scale of `af_suspected`


class Count(msgspec.Struct):
    """So many in a row, or at least so many if its beginning is not known."""

    limit: int  # from which on a lower bound says something
    value: int = 0
    exact: bool = False
    floor: int = 0  # what was told of it before samples were lost

    def step(self, goes_on: bool) -> None:
        self.value = self.value + 1 if goes_on else 0
        if not goes_on:
            self.exact, self.floor = True, 0

    def gap(self) -> None:
        self.floor = max(self.floor, self.value)
        self.value, self.exact = 0, False

    @property
    def known(self) -> int | None:
        """The count, or None if it may be more and says nothing yet."""
        return self.value if self.exact or self.value >= max(self.limit, self.floor) else None


class Sums(msgspec.Struct):
    """Sums over the intervals between normal beats, and over their differences, in samples.

    Integers, which can be subtracted again without a trace.
    """

    intervals: int = 0
    total: int = 0
    squares: int = 0
    differences: int = 0
    square_differences: int = 0
    large_differences: int = 0
    ectopic: int = 0

    def add(self, sign: int, beat: "Past", large: float) -> None:
        """Count a beat in or, with the sign -1, out."""
        self.ectopic += sign * beat.ectopic
        if beat.interval:
            self.intervals += sign
            self.total += sign * beat.interval
            self.squares += sign * beat.interval**2
        if beat.difference >= 0:
            self.differences += sign
            self.square_differences += sign * beat.difference**2
            self.large_differences += sign * (beat.difference > large)


class Past(msgspec.Struct, array_like=True):
    """A beat of the last five minutes."""

    position: int
    ectopic: bool
    interval: int  # since the last beat, if both were normal; or 0
    difference: int  # of that interval and the one before it, without sign; or -1


class Interval(msgspec.Struct, array_like=True):
    """An interval between two beats that may tell of atrial fibrillation."""

    position: int
    length: int
    follows: bool  # right after the one before it


class Rhythm(msgspec.Struct):
    """What the beats so far say.

    Parameters
    ----------
    rate_hz : float
        Of the positions.
    since : int
        From where on the signal is known.
    """

    rate_hz: float
    since: int = 0
    last: int | None = None  # position of the last beat
    label: str = ""  # and its class
    intervals: list[int] = []  # the latest ones
    run: Count = msgspec.field(default_factory=lambda: Count(_RUN))
    run_began: int = 0  # position of its first beat
    slow: Count = msgspec.field(default_factory=lambda: Count(_SLOW))
    fast: Count = msgspec.field(default_factory=lambda: Count(_FAST))
    bigeminy: Count = msgspec.field(default_factory=lambda: Count(_BIGEMINY))
    ventricular: list[int] = []  # positions within the last minute
    frequent_floor: int = 0  # how many were told before samples were lost
    tick: int = _ASYSTOLE_TICK  # the next telling of a pause, in fifths of a second
    least_tick: int = _ASYSTOLE_TICK  # from which on one is told whose begin is not known
    past: list[Past] = []
    sums: Sums = msgspec.field(default_factory=Sums)
    irregular: list[Interval] = []
    to_look: int = 0  # intervals until the next look at their entropy
    entropy: float | None = None
    looked_at: int = 0  # position of the last look
    told: dict[str, float] = {}  # what was told at once, as it was told last
    activity: Activity = msgspec.field(default_factory=Activity)

    # --- in --------------------------------------------------------------------------------

    def beat(self, position: int, label: str) -> dict[str, float]:
        """Take the next beat, return what a rule needs at once, if it has changed.

        Parameters
        ----------
        position : int
        label : str
            N, S, V, F or Q.
        """
        if position < self.since:
            return {}  # it lies before lost samples, and was found after them
        interval = None if self.last is None else position - self.last
        self.activity.beat(position)
        self._count(position, label, interval)
        self._note(position, label, interval)
        if interval is not None:
            self._add_interval(interval)
            self._add_irregular(position, label, interval)
        self.last, self.label = position, label
        counts = self._counts()
        paused = interval is None or self.tick > _PAUSE_TICK
        self.tick = _PAUSE_TICK
        changed, self.told = counts != self.told, counts
        if paused:
            return counts | {"pause_s": 0.0, "pause_activity": 0.0}
        return counts if changed else {}

    def gap(self, position: int) -> None:
        """Forget what must not be joined over lost samples, which end at a position."""
        # A pause may go on over the loss: what is told of it next is not less.
        pause = math.ceil((position - self._pause_began) * _TICKS_PER_S / self.rate_hz)
        known = self.least_tick if self.last is None else _ASYSTOLE_TICK
        self.tick = self.least_tick = max(known, pause)
        self.since, self.last, self.label = position, None, ""
        for count in (self.run, self.slow, self.fast, self.bigeminy):
            count.gap()
        self.frequent_floor = max(self.frequent_floor, len(self.ventricular))
        self.intervals, self.ventricular = [], []
        self.past, self.sums = [], Sums()
        self.irregular, self.entropy, self.to_look = [], None, 0
        self.told = {}
        self.activity.gap()

    # --- out -------------------------------------------------------------------------------

    @property
    def due(self) -> int | None:
        """Position at which a pause is to be told, if no beat comes before; None: it is not."""
        if self.tick > _LAST_TICK:
            return None
        return self._pause_began + math.ceil(self.tick * self.rate_hz / _TICKS_PER_S)

    def pause(self) -> dict[str, float]:
        """Return the pause that was due, and wait for the next."""
        self.tick += 1
        return {"pause_s": (self.tick - 1) / _TICKS_PER_S} | self._activity()

    def measures(self, position: int) -> dict[str, float]:
        """Return all that is known when every beat before a position is."""
        values: dict[str, float] = dict(self._counts())
        pause_s = (position - self._pause_began) / self.rate_hz
        if self.last is not None or pause_s * _TICKS_PER_S >= self.least_tick:
            values["pause_s"] = max(0.0, pause_s)
            if self.tick > _PAUSE_TICK:
                values |= self._activity()
        rate = self.heart_rate_bpm
        if rate is not None and pause_s <= LONGEST_INTERVAL_S:
            values["heart_rate_bpm"] = rate
        bigeminy = self.bigeminy.known
        if bigeminy is not None:
            values["bigeminy_beats"] = bigeminy
        self._forget(position)
        count = len(self.ventricular)
        whole = position - self.since >= _MINUTE_S * self.rate_hz
        if whole:
            self.frequent_floor = 0
        if whole or count >= max(_FREQUENT, self.frequent_floor):
            values["ventricular_per_minute"] = count
        if position - self.since >= _VARIABILITY_S * self.rate_hz:
            values |= self._variability()
        held = position - self.looked_at <= _HELD_S * self.rate_hz
        if self.entropy is not None and held and pause_s <= LONGEST_INTERVAL_S:
            share = (self.entropy - _ENTROPY_0) / (_ENTROPY_1 - _ENTROPY_0)
            values["af_suspected"] = min(1.0, max(0.0, share))
        return values

    @property
    def heart_rate_bpm(self) -> float | None:
        """Of the median of the latest intervals; None until two are known."""
        if len(self.intervals) < 2:
            return None
        few = self.intervals[-_FEW:]
        slow = len(few) == _FEW and min(few) > _LONG_S * self.rate_hz
        return 60.0 * self.rate_hz / median(few if slow else self.intervals)

    # --- inside ----------------------------------------------------------------------------

    def _activity(self) -> dict[str, float]:
        """Return how much the signal moves in a pause, if it is known."""
        share = self.activity.since(self._pause_began, self.rate_hz)
        return {} if share is None else {"pause_activity": share}

    @property
    def _pause_began(self) -> int:
        return self.since if self.last is None else self.last

    def _count(self, position: int, label: str, interval: int | None) -> None:
        """Go on with what is counted in a row, or end it."""
        ventricular = label == "V"
        if ventricular and not self.run.value:
            self.run_began = position
        self.run.step(ventricular)
        if ventricular:
            self.ventricular.append(position)
        if interval is not None:
            bpm = 60.0 * self.rate_hz / interval
            self.slow.step(bpm < _SLOW_BPM)
            self.fast.step(bpm > _FAST_BPM)
            self.bigeminy.step(ventricular != (self.label == "V"))

    def _counts(self) -> dict[str, float]:
        """Return what is known of runs and of beats in a row."""
        values: dict[str, float] = {}
        for name, count in (
            ("ventricular_in_a_row", self.run),
            ("slow_beats", self.slow),
            ("fast_beats", self.fast),
        ):
            known = count.known
            if known is not None:
                values[name] = known
        if self.run.value >= 2 and self.last is not None and self.last > self.run_began:
            seconds = (self.last - self.run_began) / self.rate_hz
            values["ventricular_run_bpm"] = 60.0 * (self.run.value - 1) / seconds
        return values

    def _add_interval(self, interval: int) -> None:
        if interval > LONGEST_INTERVAL_S * self.rate_hz:
            self.intervals = []
        else:
            self.intervals = [*self.intervals[1 - _INTERVALS :], interval]

    def _note(self, position: int, label: str, interval: int | None) -> None:
        """Note a beat for the variability of the next five minutes."""
        normal = label == "N" == self.label
        if interval is None or not normal or interval > LONGEST_INTERVAL_S * self.rate_hz:
            interval = 0
        before = self.past[-1].interval if self.past else 0
        difference = abs(interval - before) if interval and before else -1
        beat = Past(position, label != "N", interval, difference)
        self.past.append(beat)
        self.sums.add(1, beat, _PNN_S * self.rate_hz)

    def _forget(self, position: int) -> None:
        """Let go of what is older than the minute, and than the five."""
        oldest = position - _MINUTE_S * self.rate_hz
        while self.ventricular and self.ventricular[0] < oldest:
            del self.ventricular[0]
        oldest = position - _VARIABILITY_S * self.rate_hz
        while self.past and self.past[0].position < oldest:
            self.sums.add(-1, self.past.pop(0), _PNN_S * self.rate_hz)

    def _variability(self) -> dict[str, float]:
        """Return RMSSD, SDNN and pNN50 of the normal intervals, if they suffice."""
        values: dict[str, float] = {}
        if self.past:
            values["ectopic_share"] = self.sums.ectopic / len(self.past)
        sums, ms = self.sums, 1000.0 / self.rate_hz
        enough = _LEAST_SINUS * _VARIABILITY_S * self.rate_hz
        if sums.total >= enough and sums.differences:
            spread = sums.intervals * sums.squares - sums.total**2
            values["sdnn_ms"] = ms * math.sqrt(spread / (sums.intervals * (sums.intervals - 1)))
            values["rmssd_ms"] = ms * math.sqrt(sums.square_differences / sums.differences)
            values["pnn50"] = sums.large_differences / sums.differences
        return values

    def _add_irregular(self, position: int, label: str, interval: int) -> None:
        """Note an interval, and now and then look how irregular they are."""
        if (
            label not in "NS"
            or self.label not in "NS"
            or interval > LONGEST_INTERVAL_S * self.rate_hz
        ):
            return
        follows = bool(self.irregular) and self.irregular[-1].position == self.last
        self.irregular.append(Interval(position, interval, follows))
        oldest = position - _OLDEST_S * self.rate_hz
        while len(self.irregular) > _ENTROPY_INTERVALS or self.irregular[0].position < oldest:
            del self.irregular[0]
        self.to_look -= 1
        if self.to_look <= 0 and len(self.irregular) >= _LEAST_INTERVALS:
            self.entropy = entropy(self.irregular, self.rate_hz)
            self.looked_at, self.to_look = position, _EVERY


def entropy(intervals: list[Interval], rate_hz: float) -> float | None:
    """Return the coefficient of sample entropy of some intervals; None if too few follow others.

    Notes
    -----
    Lake & Moorman 2011: -ln(A / B) + ln(2 r) - ln(mean interval), in seconds. B counts pairs of
    intervals that are alike within r, A those whose next intervals are alike as well. Where a beat
    in between was left out, there is no next one. 1/2 is added to A and to B, which may be 0.
    """
    lengths = np.array([one.length for one in intervals])
    follows = np.array([one.follows for one in intervals[1:]])
    pairs = np.stack([lengths[:-1], lengths[1:]])[:, follows]
    count = pairs.shape[1]
    if count < _LEAST_PAIRS:
        return None
    alike = np.abs(pairs[:, :, None] - pairs[:, None, :]) <= _TOLERANCE_S * rate_hz
    both = np.count_nonzero(alike[0] & alike[1])
    first = np.count_nonzero(alike[0])
    # Each pair was counted twice, and each interval with itself.
    similar, lasting = (first - count) / 2 + 0.5, (both - count) / 2 + 0.5
    mean_s = float(lengths.mean()) / rate_hz
    return math.log(similar / lasting) + math.log(2 * _TOLERANCE_S / mean_s)
