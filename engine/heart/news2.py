"""NEWS2, the early-warning score of slow vitals that come when somebody measured them.

National Early Warning Score 2, Royal College of Physicians 2017, with the first scale of oxygen
saturation (not the second one, for hypercapnic failure of breathing). Seven parameters; the score
is known only while none of them is older than its limit. Reproduced for research: the college's own
chart is to be used, unmodified, where patients are.
"""

from collections.abc import Mapping
from typing import NamedTuple

import msgspec


class Parameter(NamedTuple):
    """What a vital may be, in the unit of its measure."""

    measure: str
    lowest: float
    highest: float  # of what a living body can have; beyond, it is an error
    units: Mapping[str, tuple[float, float]]  # UCUM: factor and offset to the measure's unit
    max_age_s: float  # measured by machines: an hour; by people: the four of their rounds


_HOUR_S = 3600.0
_PER_MINUTE = {"/min": (1.0, 0.0), "{beats}/min": (1.0, 0.0), "{breaths}/min": (1.0, 0.0)}

PARAMETERS: Mapping[str, Parameter] = {
    "respiration": Parameter(
        "respiratory_rate_per_minute", 0, 120, {**_PER_MINUTE, "Hz": (60.0, 0.0)}, _HOUR_S
    ),
    "spo2": Parameter("spo2_percent", 20, 100, {"%": (1.0, 0.0), "1": (100.0, 0.0)}, _HOUR_S),
    "oxygen": Parameter(  # 0 air, 1 oxygen; or the flow of it
        "on_oxygen",
        0,
        100,
        {"1": (1.0, 0.0), "L/min": (1.0, 0.0), "l/min": (1.0, 0.0)},
        4 * _HOUR_S,
    ),
    "systolic": Parameter(
        "systolic_mmhg", 20, 350, {"mm[Hg]": (1.0, 0.0), "kPa": (7.500617, 0.0)}, 4 * _HOUR_S
    ),
    "pulse": Parameter("pulse_per_minute", 0, 350, {**_PER_MINUTE, "Hz": (60.0, 0.0)}, _HOUR_S),
    "consciousness": Parameter(  # 0 alert; 1 new confusion, 2 to voice, 3 to pain, 4 unresponsive
        "consciousness_cvpu", 0, 4, {"1": (1.0, 0.0), "{ACVPU}": (1.0, 0.0)}, 4 * _HOUR_S
    ),
    "temperature": Parameter(
        "temperature_celsius",
        20,
        46,
        {"Cel": (1.0, 0.0), "K": (1.0, -273.15), "[degF]": (5 / 9, -160 / 9)},
        4 * _HOUR_S,
    ),
}

LONGEST_AGE_S = max(one.max_age_s for one in PARAMETERS.values())

# Points up to and with a value, in the steps of the chart; the last is of all beyond.
_CHART: Mapping[str, tuple[tuple[float, int], ...]] = {
    "respiration": ((8, 3), (11, 1), (20, 0), (24, 2), (float("inf"), 3)),
    "spo2": ((91, 3), (93, 2), (95, 1), (float("inf"), 0)),
    "oxygen": ((0, 0), (float("inf"), 2)),
    "systolic": ((90, 3), (100, 2), (110, 1), (219, 0), (float("inf"), 3)),
    "pulse": ((40, 3), (50, 1), (90, 0), (110, 1), (130, 2), (float("inf"), 3)),
    "consciousness": ((0, 0), (float("inf"), 3)),
    "temperature": ((35.0, 3), (36.0, 1), (38.0, 0), (39.0, 1), (float("inf"), 2)),
}
# The chart knows whole numbers, and tenths of a degree.
_DIGITS = {"temperature": 1}


def convert(parameter: str, value: float, unit: str) -> float:
    """Return a vital in the unit of its measure.

    Raises
    ------
    ValueError
        If there is no such parameter, it is not measured in that unit, or no body has that value.
    """
    if parameter not in PARAMETERS:
        raise ValueError(f"parameter: expected one of {sorted(PARAMETERS)}, found {parameter!r}")
    _, lowest, highest, units, _ = PARAMETERS[parameter]
    if unit not in units:
        raise ValueError(f"unit of {parameter}: expected one of {sorted(units)}, found {unit!r}")
    factor, offset = units[unit]
    converted = factor * value + offset
    if not lowest <= converted <= highest:  # nan as well
        least, most = ((bound - offset) / factor for bound in (lowest, highest))
        raise ValueError(f"{parameter}: expected {least:g} to {most:g} {unit}, found {value:g}")
    return converted


def points(parameter: str, value: float) -> int:
    """Return the points that the chart gives a value, 0 to 3."""
    rounded = round(value, _DIGITS.get(parameter, 0))
    if parameter in ("oxygen", "consciousness"):
        rounded = value  # any flow is oxygen
    return next(given for up_to, given in _CHART[parameter] if rounded <= up_to)


class Reading(msgspec.Struct, array_like=True):
    """A value and when it was measured, in seconds of the subject."""

    value: float
    seconds: float


class Vitals(msgspec.Struct):
    """The latest vitals of a subject, as plain data."""

    readings: dict[str, Reading] = {}  # by parameter
    heart: Reading | None = None  # heart rate of the subject's ECG
    now_s: float = 0.0  # latest time that was heard of
    score: int | None = None  # as reckoned last

    def note(self, parameter: str, value: float, seconds: float) -> None:
        """Take a value in the unit of its measure, unless a later one is known."""
        self.now_s = max(self.now_s, seconds)
        known = self.readings.get(parameter)
        if known is None or known.seconds <= seconds:
            self.readings[parameter] = Reading(value, seconds)

    def note_heart(self, bpm: float, seconds: float) -> None:
        """Take the heart rate of an ECG, which counts where no pulse is younger."""
        self.now_s = max(self.now_s, seconds)
        self.heart = Reading(bpm, seconds)

    def fresh(self, parameter: str) -> float | None:
        """Return what is known of a parameter now; None if nothing is, or it is too old."""
        found = self.readings.get(parameter)
        if parameter == "pulse" and self.heart is not None:
            younger = found is None or found.seconds < self.heart.seconds
            found = self.heart if younger else found
        if found is None or self.now_s - found.seconds > PARAMETERS[parameter].max_age_s:
            return None
        return found.value

    def measures(self) -> dict[str, float]:
        """Return all vitals that are fresh, and the score if all of them are.

        ``news2_single`` is 1 if a single parameter has three points, which is urgent by itself;
        ``news2_points_...`` says what each of them has.
        """
        known = self._known()
        values = {PARAMETERS[name].measure: value for name, value in known.items()}
        if values.get("on_oxygen"):
            values["on_oxygen"] = 1.0  # whatever the flow
        given = {name: points(name, value) for name, value in known.items()}
        values |= {f"news2_points_{name}": float(count) for name, count in given.items()}
        score = self.rate()
        if score is not None:
            values["news2"] = float(score)
            values["news2_single"] = float(3 in given.values())
        return values

    def rate(self) -> int | None:
        """Return the score; None while any parameter is unknown or too old."""
        known = self._known()
        whole = len(known) == len(PARAMETERS)
        self.score = sum(points(*one) for one in known.items()) if whole else None
        return self.score

    def _known(self) -> dict[str, float]:
        fresh = {parameter: self.fresh(parameter) for parameter in PARAMETERS}
        return {parameter: value for parameter, value in fresh.items() if value is not None}
