"""Beats, rhythm and alerts, against a plain search of the whole record."""

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine import messages, model_file, rules
from engine.alerts import Alerts, Moment
from engine.heart.beats import Beat, BeatFinder
from engine.heart.wing import HeartWing
from engine.model_file import ModelSpec
from engine.wing import Rows
from tests import plain, tiny
from tests.drive import Driven, chunks

RATE_HZ = int(tiny.RATE_HZ)
LOOK_AHEAD = 8
REFRACTORY = RATE_HZ // 5
STRIDE = tiny.STRIDE
LEVELS = [0.0, 0.2, 0.25, 0.3, 0.49, 0.5, 0.6, 0.6, 0.9, 1.0]
NEVER = 2**60
FREQUENT = "frequent_ventricular_beats"
BUMP = np.exp(-((np.arange(-50, 50) / 3) ** 2)).astype(np.float32)  # in mV, at the middle


def spec(frames: int) -> ModelSpec:
    return tiny.spec(pipeline="heart", hop_samples=frames * STRIDE, look_ahead_samples=LOOK_AHEAD)


def scores(probability: list[float]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return a record's probabilities, and classes whose greatest is a function of the frame."""
    classes = np.zeros((len(probability), len(tiny.LABELS)), np.float32)
    classes[np.arange(len(classes)), np.arange(len(classes)) % len(tiny.LABELS)] = 1.0
    return np.array(probability, np.float32), classes


def search_all(probability: list[float]) -> list[Beat]:
    p, _ = scores(probability)
    place = STRIDE * np.arange(len(p)) - LOOK_AHEAD
    return [
        Beat(int(place[peak]), tiny.LABELS[peak % 5], float(p[peak]), STRIDE * (decided + 1))
        for peak, decided in plain.peaks(p, place, REFRACTORY)
    ]


def search_in_steps(
    records: list[list[float]], frames: int = tiny.FRAMES, hops: int = 1
) -> list[list[Beat]]:
    """Search some records side by side, so many frames a hop and hops a step."""
    finder = BeatFinder(spec(frames), len(records))
    found: list[list[Beat]] = [[] for _ in records]
    made = [scores(record) for record in records]
    frames *= hops
    for t in range(0, len(records[0]), frames):
        outputs = {
            "beat": np.stack([p[t : t + frames] for p, _ in made]),
            "beat_class": np.stack([classes[t : t + frames] for _, classes in made]),
        }
        start = np.full(len(records), t * STRIDE)
        for row, beat in finder.push(np.arange(len(records)), outputs, start, hops):
            found[row].append(beat)
    return found


records = st.lists(st.sampled_from(LEVELS), min_size=60, max_size=60)


@given(
    rows=st.lists(records, min_size=1, max_size=3),
    frames=st.sampled_from([1, 5, 10]),
    hops=st.sampled_from([1, 2, 6]),
)
def test_any_step_finds_the_beats_of_the_whole_record(
    rows: list[list[float]], frames: int, hops: int
) -> None:
    assert search_in_steps(rows, frames, hops) == [search_all(row) for row in rows]


def test_two_maxima_within_the_refractory_time_are_one_beat_the_higher() -> None:
    (found,) = search_in_steps([[0.0, 0.6, 0.3, 0.9, 0.3, 0.7, 0.0] + [0.0] * 13])
    assert [(beat.position, beat.probability) for beat in found] == [
        (3 * STRIDE - LOOK_AHEAD, pytest.approx(0.9))
    ]


def test_a_row_that_was_reset_searches_as_a_new_one() -> None:
    finder = BeatFinder(spec(tiny.FRAMES), 1)
    slot, start = np.array([0]), np.array([0])
    p, classes = scores([0.9, 0.0, 0.0, 0.0, 0.8])
    outputs = {"beat": p[None], "beat_class": classes[None]}
    first = finder.push(slot, outputs, start)
    assert finder.push(slot, outputs, start) != first  # the maximum held back, and its beat
    finder.reset(0)
    assert finder.push(slot, outputs, start) == first


class Timeline(NamedTuple):
    name: str = "s"
    rate_hz: float = float(RATE_HZ)

    def index_at(self, position: int) -> int:
        return 1000 + position

    def needed_until(self, position: int) -> int:
        return 1010 + position


class Patient:
    """A heart wing of one row, told of beats by their label; one a second."""

    def __init__(self) -> None:
        self.wing = HeartWing(spec(frames=25), 1)
        self.wing.reset(0)
        self.position = 0
        self.alerts = Alerts(rules.load())

    def beat(self, label: str, begin: int = 0, end: int = NEVER) -> list[messages.Message]:
        p, classes = scores([0.0] * 25)
        p[10] = 1.0
        classes[10] = np.eye(len(tiny.LABELS))[tiny.LABELS.index(label)]
        rows = Rows(
            slots=np.array([0]),
            hops=1,
            start=np.array([self.position]),
            begin=np.array([begin]),
            end=np.array([end]),
            streams=[Timeline()],
            samples=np.roll(BUMP, 32).reshape(1, RATE_HZ, 1),
        )
        self.position += RATE_HZ
        outputs = {"beat": p[None], "beat_class": classes[None]}
        return [message for _, message in self.wing.push(rows, outputs)]

    def changes(self, labels: str, only: str = "") -> list[tuple[str, str]]:
        """Return each alert that some beats change, or those of one rule: rule and new state."""
        told = [message for label in labels for message in self.beat(label)]
        return [
            (alert.rule, alert.state)
            for one in told
            if isinstance(one, messages.Measures)
            for alert in self.alerts.update(
                "s", "s", Moment(one.index, one.seconds, one.decided_at), one.values
            )
            if only in ("", alert.rule)
        ]


def test_a_beat_is_told_at_the_clients_index() -> None:
    patient = Patient()
    told = [patient.beat("N")[0] for _ in range(3)]
    place = 1000 + 10 * STRIDE - LOOK_AHEAD
    expected = [
        messages.Beat("s", index, index / RATE_HZ, "N", 1.0, decided_at, rate)
        for index, decided_at, rate in [
            (place, 1010 + 12 * STRIDE, None),
            (place + 100, 1110 + 12 * STRIDE, None),
            (place + 200, 1210 + 12 * STRIDE, 60.0),
        ]
    ]
    assert told == expected


def test_a_beat_before_the_beginning_or_in_the_padding_is_not_told() -> None:
    place = 10 * STRIDE - LOOK_AHEAD

    def told(**bounds: int) -> bool:
        return any(isinstance(one, messages.Beat) for one in Patient().beat("N", **bounds))

    assert told(begin=place)
    assert not told(begin=place + 1)
    assert told(end=place + 1)
    assert not told(end=place)


def test_three_ventricular_beats_in_a_row_are_a_run_until_another_ends_it() -> None:
    patient = Patient()
    assert patient.changes("NVVNVV") == []
    assert patient.changes("V") == [("ventricular_run_short", "active")]
    assert patient.changes("N") == [("ventricular_run_short", "resolved")]


def test_six_ventricular_beats_a_minute_are_frequent_until_fewer_than_four_are() -> None:
    patient = Patient()
    assert patient.changes("VN" * 5, FREQUENT) == []
    assert patient.changes("V", FREQUENT) == [(FREQUENT, "active")]
    assert patient.changes("N" * 53, FREQUENT) == []
    assert patient.changes("N", FREQUENT) == [
        (FREQUENT, "resolved")
    ]  # the third of six is a minute old


def test_lost_samples_neither_resolve_an_alert_nor_help_to_raise_one() -> None:
    patient = Patient()
    assert patient.changes("NVVV") == [("ventricular_run_short", "active")]
    patient.wing.gap(0, "reset")
    assert patient.changes("V") == []  # new data, and it does not say that the run is over
    assert patient.changes("N") == [("ventricular_run_short", "resolved")]
    patient.wing.gap(0, "reset")
    assert patient.changes("VVN") == []  # six in all, but who knows how far apart


def test_lost_samples_do_not_resolve_frequent_ventricular_beats() -> None:
    patient = Patient()
    assert (FREQUENT, "active") in patient.changes("VN" * 6, FREQUENT)
    patient.wing.gap(0, "reset")
    assert patient.changes("N" * 60, FREQUENT) == []
    assert patient.changes("N", FREQUENT) == [(FREQUENT, "resolved")]  # a whole minute was seen


def test_beats_on_the_two_sides_of_lost_samples_make_no_heart_rate_though_the_state_is_held() -> (
    None
):
    patient = Patient()
    told = [patient.beat("N") for _ in range(3)]
    patient.wing.gap(0, "hold")
    told += [patient.beat("N") for _ in range(3)]
    rates = [beat.heart_rate_bpm for beat, *_ in told if isinstance(beat, messages.Beat)]
    assert rates == [None, None, 60.0, None, None, 60.0]


@pytest.mark.parametrize("rate_hz", [360.0, 250.0, 500.0, 100.0])
def test_no_sample_from_decided_at_on_changes_a_beat(
    rate_hz: float, rng: np.random.Generator
) -> None:
    t = np.arange(round(8 * rate_hz)) / rate_hz
    ecg = np.exp(-((t % 0.8 - 0.4) ** 2) / 2 / 0.03**2) + rng.normal(0, 0.05, len(t))

    def beats(signal: NDArray[np.float64]) -> list[messages.Beat]:
        driven = Driven(model_file.find("heart"))
        driven.open("a", "s", "heart", rate_hz=rate_hz)
        for chunk in chunks("s", signal.astype(np.float32), range(0, len(signal), 50)):
            driven.say("a", chunk)
            driven.run()
        return driven.told("a", messages.Beat)

    found = beats(ecg)
    assert len(found) > 5
    for beat in found[1:4]:
        other = ecg.copy()
        other[beat.decided_at :] = rng.normal(0, 4, len(t) - beat.decided_at)
        assert beat in beats(other)
