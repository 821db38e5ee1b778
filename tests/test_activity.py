"""How much a pause moves, against numpy over the whole signal; and by how much it must."""

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from engine.heart.activity import Activity, Second, steepness

RATE = 360
SLOW = 120.0
T = np.arange(4 * 120) / SLOW


def heard(slopes: list[list[float]], beats: list[float], means: list[float]) -> Activity:
    """Return what is known after some seconds, the first of which is of another signal."""
    activity = Activity()
    for number, (second, mean) in enumerate(zip(slopes, means, strict=True), start=1):
        for beat in beats:
            if number - 1 <= beat < number:
                activity.beat(round(beat * RATE))
        activity.second(Second(number * RATE, second, [mean] * len(second)))
    return activity


def pause(slopes: list[list[float]], means: list[float] | None = None) -> float | None:
    """Return the activity of a pause behind twelve seconds with beats as steep as 2 and 1 mV."""
    all_ = [[2.0, 1.0]] * 12 + slopes
    levels = [0.0] * 12 + (means or [0.0] * len(slopes))
    beats = [0.5 + second for second in range(12)]
    return heard(all_, beats, levels).since(round(11.5 * RATE), RATE)


def test_the_greatest_slope_and_the_mean_are_those_of_the_last_second(
    rng: np.random.Generator,
) -> None:
    windows = rng.normal(0, 1, (3, 2, 480)).astype(np.float32)
    slopes, means = steepness(windows, SLOW)
    kernel = np.array([1, np.sqrt(3), 0, -np.sqrt(3), -1])
    for row, lead in np.ndindex(3, 2):
        slope = np.convolve(windows[row, lead].astype(float), kernel, "valid")[-120:]
        assert slopes[row, lead] == pytest.approx(np.abs(slope).max(), rel=1e-5)
        assert means[row, lead] == pytest.approx(windows[row, lead, -120:].mean(), abs=1e-5)


def steep(signal: NDArray[np.float64]) -> float:
    return float(steepness(signal[None, None].astype(np.float32), SLOW)[0][0, 0])


def test_mains_and_t_waves_are_nothing_beside_a_qrs_complex() -> None:
    qrs = steep(np.exp(-(((T - 3.5) / 0.015) ** 2)))
    assert 1.5 < qrs < 2.5
    assert steep(np.sin(2 * np.pi * 50 * T)) < 1e-4 * qrs
    assert steep(np.sin(2 * np.pi * 60 * T)) < 1e-4 * qrs
    assert steep(0.3 * np.exp(-(((T - 3.5) / 0.06) ** 2))) < 0.2 * qrs
    assert steep(np.full(480, 300.0)) == 0


def test_a_pause_as_steep_as_beats_counts_by_the_lead_that_moves_least() -> None:
    assert pause([[2.0, 1.0]] * 4) == pytest.approx(1.0)
    assert pause([[2.0, 0.5]] * 4) == pytest.approx(0.5)
    assert pause([[0.2, 5.0]] * 4) == pytest.approx(0.1)
    assert pause([[0.0, 0.0]] * 4) == 0


def test_one_steep_second_of_three_is_outvoted_and_the_t_wave_is_not_of_the_pause() -> None:
    quiet = [0.1, 0.05]
    assert pause([quiet, [9.0, 9.0], quiet, quiet]) == pytest.approx(0.05)
    assert pause([[9.0, 9.0]] * 2 + [quiet] * 3) == pytest.approx(0.05)
    # The second of the beat, and a T wave 0.4 s behind it, are not looked at.
    activity = heard([[2.0]] * 12 + [[9.0], [0.1], [0.1]], [11.7], [0.0] * 15)
    assert activity.since(round(11.7 * RATE), RATE) == pytest.approx(0.05)


def test_a_false_beat_in_an_asystole_does_not_make_its_noise_usual() -> None:
    slopes = [[2.0]] * 10 + [[0.1]] * 5 + [[0.4]] + [[0.1]] * 4
    activity = heard(slopes, [*(0.5 + k for k in range(10)), 15.5], [0.0] * 20)
    assert activity.since(round(15.5 * RATE), RATE) == pytest.approx(0.05)


def test_a_lead_that_went_elsewhere_in_the_pause_counts_until_it_is_still() -> None:
    quiet = [[0.1, 0.05]] * 5
    creeping = [3.0, 2.0, 1.3, 0.9, 0.6]
    assert pause(quiet, creeping) == 1.0
    assert pause(quiet, [0.4 * level for level in creeping]) == pytest.approx(0.05)
    assert pause(quiet, [3.0, 3.1, 3.0, 3.1, 3.0]) == pytest.approx(0.05)


def test_two_whole_seconds_are_needed_and_without_beats_a_patients_are_usual() -> None:
    assert pause([[2.0, 1.0]]) is None
    assert heard([[9.0]] * 5, [], [0.0] * 5).since(0, RATE) == pytest.approx(9.0)
    assert heard([[0.0]] * 5, [], [0.0] * 5).since(0, RATE) == 0
    # A lead that is not there, and is zero, is not the one that moves least.
    slopes = [[2.0, 0.0]] * 16
    activity = heard(slopes, [0.5 + k for k in range(12)], [0.0] * 16)
    assert activity.since(round(11.5 * RATE), RATE) == pytest.approx(1.0)


def test_lost_samples_end_what_is_known_of_the_pause_and_not_what_is_usual() -> None:
    activity = heard([[2.0]] * 12, [0.5 + k for k in range(12)], [0.0] * 12)
    activity.gap()
    assert activity.since(12 * RATE, RATE) is None
    for number in range(13, 18):
        activity.second(Second(number * RATE, [0.5], [0.0]))
    assert activity.since(12 * RATE, RATE) == pytest.approx(0.25)
    again = msgspec.convert(msgspec.to_builtins(activity), Activity)
    assert again.since(12 * RATE, RATE) == pytest.approx(0.25)
