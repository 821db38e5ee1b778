"""A clock's line: what runs fast is told by how much, whatever the network does to the times."""

import numpy as np
import pytest
from scipy.stats import theilslopes

from engine.clock import Clock, Line

RATE_HZ = 250.0


def line_of(index: np.ndarray, seconds: np.ndarray, leaps: bool = False) -> Line | None:
    clock = Clock(RATE_HZ, leaps)
    for place, time_s in zip(index.tolist(), seconds.tolist(), strict=True):
        clock.add(place, time_s)
    return clock.line()


def chunks(seconds: float, chunk: int = 50) -> np.ndarray:
    return np.arange(0, round(seconds * RATE_HZ), chunk)


@pytest.mark.parametrize("ppm", [-300.0, -20.0, 0.0, 45.0, 2000.0])
def test_drift_is_told_in_spite_of_delays_and_stalls(rng: np.random.Generator, ppm: float) -> None:
    index = chunks(1200.0)
    delay = rng.exponential(0.02, len(index))
    delay[rng.random(len(index)) < 0.05] += 0.4
    delay[2000:2040] += np.linspace(8.0, 0.0, 40)  # 8 s in which nothing came through
    line = line_of(index, 1e9 + index / RATE_HZ * (1 + ppm / 1e6) + delay)
    assert line is not None
    assert line.drift_ppm == pytest.approx(ppm, abs=10.0)
    assert line.rate_error_share == pytest.approx(0.0, abs=0.005)


def test_the_slope_is_that_of_theil_and_sen(rng: np.random.Generator) -> None:
    """One point a second: as many as are kept, and each the lowest of its second."""
    index = np.arange(17) * round(RATE_HZ)
    seconds = np.arange(17) + rng.normal(0, 0.1, 17)
    line = line_of(index, seconds)
    assert line is not None
    slope = theilslopes(seconds[:16], np.arange(16)).slope
    assert line.rate_error_share == pytest.approx(1 / slope - 1)
    assert line.drift_ppm == pytest.approx(1e6 * (slope - 1))


@pytest.mark.parametrize("share", [-0.05, -0.012, 0.012, 0.3])
def test_a_rate_that_becomes_wrong_shows_within_twenty_seconds(share: float) -> None:
    index = chunks(620.0)
    signal_s = index / RATE_HZ
    seconds = signal_s + np.maximum(0.0, signal_s - 600.0) * (1 / (1 + share) - 1)
    line = line_of(index, seconds)
    assert line is not None
    assert line.rate_error_share == pytest.approx(share, abs=1e-3)


def test_too_little_tells_nothing() -> None:
    index = chunks(8.0)
    assert line_of(index, index / RATE_HZ) is None
    assert line_of(chunks(10.0), chunks(10.0) / RATE_HZ) is not None


def test_a_leap_is_told_where_it_is_and_forgotten() -> None:
    clock = Clock(RATE_HZ, leaps=True)
    index = chunks(60.0)
    jumps = [clock.add(int(i), i / RATE_HZ + 7200.0 * (k >= 150)) for k, i in enumerate(index)]
    assert [k for k, jump in enumerate(jumps) if jump] == [150]
    assert jumps[150] == pytest.approx(7200.0)
    line = clock.line()
    assert line is not None
    assert line.drift_ppm == pytest.approx(0.0, abs=1e-3)


def test_times_that_stand_still_or_go_back_are_a_rate_and_no_fault() -> None:
    index = chunks(60.0)
    for seconds in (np.zeros(len(index)), -index / RATE_HZ):
        line = line_of(index, seconds)
        assert line is not None
        assert line.rate_error_share > 100


def test_a_day_takes_no_more_memory_than_a_minute() -> None:
    clock = Clock(RATE_HZ, leaps=False)
    for second in range(86_400):
        clock.add(round(second * RATE_HZ), second * (1 + 12e-6))
    kept = [len(value) for value in vars(clock).values() if hasattr(value, "__len__")]
    assert max(kept) <= 32
    line = clock.line()
    assert line is not None
    assert line.drift_ppm == pytest.approx(12.0, abs=0.01)
