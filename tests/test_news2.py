"""NEWS2 by the rows of the chart, its ages, and vitals on their way through the engine."""

from pathlib import Path
from typing import Any

import pytest

from engine import messages as m
from engine.heart import news2
from engine.heart.news2 import PARAMETERS, Vitals, convert, hypercapnic_points, points
from tests.drive import Driven

# The chart of the Royal College of Physicians, 2017: the first and last value of each box.
CHART = {
    "respiration": [(0, 8, 3), (9, 11, 1), (12, 20, 0), (21, 24, 2), (25, 120, 3)],
    "spo2": [(20, 91, 3), (92, 93, 2), (94, 95, 1), (96, 100, 0)],
    "oxygen": [(0, 0, 0), (1, 1, 2)],
    "systolic": [(20, 90, 3), (91, 100, 2), (101, 110, 1), (111, 219, 0), (220, 350, 3)],
    "pulse": [(0, 40, 3), (41, 50, 1), (51, 90, 0), (91, 110, 1), (111, 130, 2), (131, 350, 3)],
    "consciousness": [(0, 0, 0), (1, 4, 3)],
    "temperature": [
        (20.0, 35.0, 3),
        (35.1, 36.0, 1),
        (36.1, 38.0, 0),
        (38.1, 39.0, 1),
        (39.1, 46.0, 2),
    ],
}
# The second scale of oxygen saturation, on air and on oxygen.
HYPERCAPNIC = [
    (20, 83, 3, 3),
    (84, 85, 2, 2),
    (86, 87, 1, 1),
    (88, 92, 0, 0),
    (93, 94, 0, 1),
    (95, 96, 0, 2),
    (97, 100, 0, 3),
]
WELL = {
    "respiration": 16.0,
    "spo2": 97.0,
    "oxygen": 0.0,
    "systolic": 120.0,
    "pulse": 70.0,
    "consciousness": 0.0,
    "temperature": 37.0,
}
UNITS = {
    "respiration": "/min",
    "spo2": "%",
    "oxygen": "1",
    "systolic": "mm[Hg]",
    "pulse": "/min",
    "consciousness": "1",
    "temperature": "Cel",
    "spo2_scale": "1",
}


def vitals(**changes: float) -> Vitals:
    found = Vitals()
    for parameter, value in (WELL | changes).items():
        found.note(parameter, value, 100.0)
    return found


@pytest.mark.parametrize(
    ("parameter", "first", "last", "given"),
    [(name, *row) for name, boxes in CHART.items() for row in boxes],
)
def test_each_box_of_the_chart_from_its_first_to_its_last_value(
    parameter: str, first: float, last: float, given: int
) -> None:
    assert points(parameter, first) == points(parameter, last) == given
    assert vitals(**{parameter: last}).measures()["news2"] == given


@pytest.mark.parametrize(("first", "last", "on_air", "on_oxygen"), HYPERCAPNIC)
def test_each_box_of_the_second_scale_of_saturation(
    first: float, last: float, on_air: int, on_oxygen: int
) -> None:
    for oxygen, given in ((0.0, on_air), (1.0, on_oxygen), (0.5, on_oxygen)):
        assert hypercapnic_points(first, oxygen > 0) == given
        told = vitals(spo2=last, oxygen=oxygen, spo2_scale=2.0).measures()
        assert told["news2_points_spo2"] == given
        assert told["news2"] == given + (2 if oxygen else 0)
        assert told["news2_spo2_scale"] == 2
        assert vitals(spo2=last, spo2_scale=1.0).measures() == vitals(spo2=last).measures()


def test_on_the_second_scale_more_than_the_target_says_nothing_before_oxygen_is_known() -> None:
    found = Vitals()
    found.note("spo2_scale", 2.0, 0.0)
    for spo2, given in ((96.0, None), (92.0, 0), (85.0, 2)):
        found.note("spo2", spo2, 1.0)
        assert found.measures().get("news2_points_spo2") == given
        assert found.measures()["spo2_percent"] == spo2


def test_a_scale_is_stated_and_is_no_parameter_of_the_score() -> None:
    found = Vitals()
    found.note("spo2_scale", 2.0, 0.0)
    assert found.measures() == {}
    assert vitals(spo2_scale=2.0, spo2=90.0).rate() == 0
    changed = vitals(spo2_scale=2.0, spo2=90.0)
    changed.note("spo2_scale", 1.0, 200.0)
    assert changed.rate() == 3
    assert convert("spo2_scale", 2.0, "1") == 2.0
    for value in (0.0, 1.5, 3.0):
        with pytest.raises(ValueError, match="spo2_scale: expected 1"):
            convert("spo2_scale", value, "1")


def test_values_between_two_boxes_count_as_the_chart_would_have_them_written() -> None:
    assert points("temperature", 38.04) == 0
    assert points("temperature", 38.06) == 1
    assert points("pulse", 90.4) == 0
    assert points("pulse", 90.6) == 1
    assert points("oxygen", 0.25) == 2  # a low flow is oxygen all the same


def test_the_score_is_the_sum_and_a_single_three_is_told_by_itself() -> None:
    told = vitals(respiration=22, spo2=93, pulse=115, temperature=38.5).measures()
    assert told["news2"] == 2 + 2 + 2 + 1
    assert told["news2_single"] == 0
    told = vitals(systolic=85).measures()
    assert (told["news2"], told["news2_single"], told["news2_points_systolic"]) == (3, 1, 3)
    worst = {name: next(a for a, _, p in boxes if p == max(q for *_, q in boxes))
             for name, boxes in CHART.items()}  # fmt: skip
    assert vitals(**worst).measures()["news2"] == 3 * 5 + 2 + 3


@pytest.mark.parametrize("parameter", WELL)
def test_the_score_is_unknown_while_a_parameter_is_missing_or_too_old(parameter: str) -> None:
    partly = Vitals()
    for name in WELL.keys() - {parameter}:
        partly.note(name, WELL[name], 0.0)
    assert "news2" not in partly.measures()
    assert PARAMETERS[parameter].measure not in partly.measures()
    partly.note(parameter, WELL[parameter], 0.0)
    assert partly.measures()["news2"] == 0
    age = PARAMETERS[parameter].max_age_s
    for name in WELL.keys() - {parameter}:
        partly.note(name, WELL[name], age)
    assert partly.measures()["news2"] == 0
    other = next(name for name in WELL if name != parameter)
    partly.note(other, WELL[other], age + 1)
    assert "news2" not in partly.measures()
    assert PARAMETERS[parameter].measure not in partly.measures()


def test_the_later_value_counts_in_whatever_order_they_come() -> None:
    found = vitals()
    found.note("spo2", 90.0, 90.0)
    assert found.measures()["spo2_percent"] == 97
    found.note("spo2", 92.0, 110.0)
    assert found.measures()["spo2_percent"] == 92


def test_the_heart_rate_of_an_ecg_is_the_pulse_where_none_is_younger() -> None:
    found = vitals(pulse=70)
    found.note_heart(135.0, 90.0)
    assert found.measures()["news2"] == 0
    found.note_heart(135.0, 101.0)
    assert found.measures()["pulse_per_minute"] == 135
    assert found.measures()["news2"] == 3
    found.note("pulse", 80.0, 102.0)
    assert found.measures()["news2"] == 0


@pytest.mark.parametrize(
    ("parameter", "value", "unit", "expected"),
    [
        ("systolic", 16.0, "kPa", 120.01),
        ("temperature", 310.15, "K", 37.0),
        ("temperature", 98.6, "[degF]", 37.0),
        ("spo2", 0.97, "1", 97.0),
        ("respiration", 0.25, "Hz", 15.0),
        ("pulse", 71.0, "{beats}/min", 71.0),
        ("oxygen", 2.0, "L/min", 2.0),
    ],
)
def test_units_are_converted(parameter: str, value: float, unit: str, expected: float) -> None:
    assert convert(parameter, value, unit) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
    ("parameter", "value", "unit", "reason"),
    [
        ("glucose", 5.0, "mmol/L", "parameter: expected one of .*'temperature'.*, found 'glucose'"),
        ("spo2", 97.0, "mm[Hg]", r"unit of spo2: expected one of \['%', '1'\], found 'mm\[Hg\]'"),
        ("spo2", 101.0, "%", "spo2: expected 20 to 100 %, found 101"),
        ("temperature", 98.6, "Cel", "temperature: expected 20 to 46 Cel, found 98.6"),
        ("temperature", 10.0, "[degF]", r"temperature: expected 68 to 114.8 \[degF\], found 10"),
        ("pulse", float("nan"), "/min", "pulse: expected 0 to 350 /min, found nan"),
        ("systolic", float("inf"), "kPa", "systolic: expected .* kPa, found inf"),
    ],
)
def test_a_vital_that_cannot_be_is_refused_with_what_was_expected(
    parameter: str, value: float, unit: str, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        convert(parameter, value, unit)


# --- through the engine ------------------------------------------------------------------------


def raised_by(driven: Driven) -> set[str]:
    """Return the rules whose alert of the subject became active."""
    return {
        alert.rule
        for topic, body in driven.engine.published
        if topic == b"alert/p-17"
        for alert in m.decode_replies(body)
        if isinstance(alert, m.Alert) and alert.state == "active"
    }


def vital(parameter: str, value: float, seconds: float = 10.0, **fields: Any) -> m.Vital:
    return m.Vital(fields.get("subject", "p-17"), parameter, value, UNITS[parameter], seconds)


def test_vitals_come_back_as_measures_and_raise_an_alert(tiny_path: Path) -> None:
    driven = Driven(tiny_path)
    for number, (parameter, value) in enumerate((WELL | {"spo2": 88.0, "oxygen": 1.0}).items()):
        driven.say("nurse", vital(parameter, value, 10.0 + number))
    driven.say("nurse", vital("respiration", 26.0, 20.0))
    told = driven.told("nurse", m.Measures, "p-17")
    assert len(told) == len(WELL) + 1
    assert [("news2" in one.values) for one in told] == [False] * 6 + [True] * 2
    assert told[-1].values["news2"] == 3 + 2 + 3
    assert (told[-1].index, told[-1].seconds, told[-1].decided_at) == (20_000, 20.0, 20_000)
    published = {topic for topic, _ in driven.engine.published}
    assert published >= {b"measures/p-17", b"alert/p-17"}
    assert "news2_emergency" in raised_by(driven)


@pytest.mark.parametrize(
    ("scale", "spo2", "raised"),
    [
        (1.0, 88.0, {"spo2_low"}),
        (2.0, 88.0, set()),
        (2.0, 83.0, {"spo2_low_hypercapnic"}),
        (1.0, 83.0, {"spo2_low"}),
    ],
)
def test_a_low_saturation_is_low_for_its_scale(
    tiny_path: Path, scale: float, spo2: float, raised: set[str]
) -> None:
    driven = Driven(tiny_path)
    driven.say("nurse", vital("spo2_scale", scale))
    driven.say("nurse", *(vital("spo2", spo2, 10.0 + 5 * number) for number in range(4)))
    assert raised_by(driven) == raised


def test_the_ecg_of_the_same_subject_gives_the_pulse(heart_path: Path) -> None:
    driven = Driven(heart_path)
    driven.open("bed", "ecg-1", "tinyheart", subject="p-17")
    for parameter in WELL.keys() - {"pulse"}:
        driven.say("nurse", vital(parameter, WELL[parameter]))
    stream = driven.engine._streams["ecg-1"]
    driven.engine.published.clear()
    for seconds, bpm in ((11.0, 120.0), (12.0, 121.0), (13.0, 135.0)):
        measures = m.Measures("ecg-1", 0, seconds, 0, {"heart_rate_bpm": bpm})
        driven.engine._route(stream, measures)
    scores = [
        one.values["news2"]
        for topic, body in driven.engine.published
        if topic == b"measures/p-17"
        for one in m.decode_replies(body)
    ]
    assert scores == [2, 3]  # told when it changes, and not in between


def test_a_bad_vital_is_refused_and_the_next_is_taken(tiny_path: Path) -> None:
    driven = Driven(tiny_path)
    driven.say(
        "nurse",
        vital("spo2", 140.0),
        m.Vital("p-17", "spo2", 96.0, "percent", 1.0),
        vital("spo2", 96.0),
    )
    driven.say("nurse", vital("spo2", 95.0, float("nan")))  # time must be a number
    errors = driven.told("nurse", m.Error)
    assert [error.code for error in errors] == ["bad_vital", "bad_vital", "malformed"]
    assert driven.told("nurse", m.Measures, "p-17")[-1].values["spo2_percent"] == 96


def test_subjects_are_bounded_and_forgotten_when_all_they_had_is_old(tiny_path: Path) -> None:
    driven = Driven(tiny_path, max_streams=2)
    driven.say("nurse", *(vital("spo2", 96.0, subject=f"p-{k}") for k in range(3)))
    assert [error.code for error in driven.told("nurse", m.Error)] == ["full"]
    driven.now += news2.LONGEST_AGE_S + 1
    driven.say("nurse", m.Ping())
    driven.engine.tick(driven.now)
    driven.say("nurse", vital("spo2", 96.0, subject="p-2"))
    assert driven.told("nurse", m.Measures, "p-2")
