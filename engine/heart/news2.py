"""NEWS2, the early-warning score of slow vitals that come when somebody measured them.

National Early Warning Score 2, Royal College of Physicians 2017. Seven parameters; the score is
known only while none of them is older than its limit. Oxygen saturation is on the first scale, or
on the second, for hypercapnic failure of breathing with a target of 88 to 92 %, where somebody says
so of the subject: that is a clinician's decision. Reproduced for research: the college's own chart
is to be used, unmodified, where patients are.
"""

import math
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

# Of the subject, not measured: it holds until another is stated, or the subject is forgotten.
SPO2_SCALE = "spo2_scale"
_STATED: Mapping[str, Parameter] = {
    SPO2_SCALE: Parameter("news2_spo2_scale", 1, 2, {"1": (1.0, 0.0)}, math.inf)
}

LONGEST_AGE_S = max(one.max_age_s for one in PARAMETERS.values())

# Points up to and with a value, in the steps of the chart; the last is of all beyond.
_CHART: Mapping[str, tuple[tuple[float, int], ...]] = {
    "respiration": ((8, 3), (11, 1), (20, 0), (24, 2), (math.inf, 3)),
    "spo2": ((91, 3), (93, 2), (95, 1), (math.inf, 0)),
    "oxygen": ((0, 0), (math.inf, 2)),
    "systolic": ((90, 3), (100, 2), (110, 1), (219, 0), (math.inf, 3)),
    "pulse": ((40, 3), (50, 1), (90, 0), (110, 1), (130, 2), (math.inf, 3)),
    "consciousness": ((0, 0), (math.inf, 3)),
    "temperature": ((35.0, 3), (36.0, 1), (38.0, 0), (39.0, 1), (math.inf, 2)),
}
# On the second scale; what is beyond the target has points on oxygen only.
_HYPERCAPNIC = ((83, 3), (85, 2), (87, 1), (92, 0), (94, 1), (96, 2), (math.inf, 3))
_TARGET = 92
# The chart knows whole numbers, and tenths of a degree.
_DIGITS = {"temperature": 1}


def convert(parameter: str, value: float, unit: str) -> float:
    """Return a vital in the unit of its measure.

    Raises
    ------
    ValueError
        If there is no such parameter, it is not measured in that unit, or no body has that value.
    """
    known = {**PARAMETERS, **_STATED}
    if parameter not in known:
        raise ValueError(f"parameter: expected one of {sorted(known)}, found {parameter!r}")
    _, lowest, highest, units, _ = known[parameter]
    if unit not in units:
        raise ValueError(f"unit of {parameter}: expected one of {sorted(units)}, found {unit!r}")
    factor, offset = units[unit]
    converted = factor * value + offset
    if not lowest <= converted <= highest:  # nan as well
        least, most = ((bound - offset) / factor for bound in (lowest, highest))
        raise ValueError(f"{parameter}: expected {least:g} to {most:g} {unit}, found {value:g}")
    if parameter in _STATED and not converted.is_integer():
        raise ValueError(f"{parameter}: expected {lowest:g} or {highest:g}, found {value:g}")
    return converted


def points(parameter: str, value: float) -> int:
    """Return the points that the chart gives a value, 0 to 3; of saturation on the first scale."""
    rounded = round(value, _DIGITS.get(parameter, 0))
    if parameter in ("oxygen", "consciousness"):
        rounded = value  # any flow is oxygen
    return next(given for up_to, given in _CHART[parameter] if rounded <= up_to)


def hypercapnic_points(spo2: float, on_oxygen: bool) -> int:
    """Return the points that the second scale gives an oxygen saturation in percent, 0 to 3."""
    rounded = round(spo2)
    if rounded > _TARGET and not on_oxygen:
        return 0
    return next(given for up_to, given in _HYPERCAPNIC if rounded <= up_to)


class Reading(msgspec.Struct, array_like=True):
    """A value and when it was measured, in seconds of the subject."""

    value: float
    seconds: float


class Vitals(msgspec.Struct):
    """The latest vitals of a subject, as plain data."""

    readings: dict[str, Reading] = {}  # by parameter; and what was stated
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
        given = self._given(known)
        if "spo2" in known:
            values[_STATED[SPO2_SCALE].measure] = self.spo2_scale
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
        self.score = sum(self._given(known).values()) if whole else None
        return self.score

    @property
    def spo2_scale(self) -> float:
        """1, unless 2 was stated of the subject."""
        stated = self.readings.get(SPO2_SCALE)
        return 1.0 if stated is None else stated.value

    def _given(self, known: Mapping[str, float]) -> dict[str, int]:
        """Return the points of what is known.

        On the second scale those of more than the target hang on whether oxygen is given.
        """
        given = {name: points(name, value) for name, value in known.items()}
        if "spo2" in known and self.spo2_scale == 2:
            del given["spo2"]
            if "oxygen" in known or round(known["spo2"]) <= _TARGET:
                given["spo2"] = hypercapnic_points(known["spo2"], known.get("oxygen", 0) > 0)
        return given

    def _known(self) -> dict[str, float]:
        fresh = {parameter: self.fresh(parameter) for parameter in PARAMETERS}
        return {parameter: value for parameter, value in fresh.items() if value is not None}
