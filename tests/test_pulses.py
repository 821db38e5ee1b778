"""Pacing pulses against a plain search of the whole signal, and against what must stay."""

from typing import NamedTuple

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine.pulses import PulseFilter

Signal = NDArray[np.float32]


class Heard(NamedTuple):
    signal: Signal
    told: list[tuple[int, int]]


def play(x: Signal, rate_hz: float, cuts: list[int] = [], begin: int = 0) -> Heard:  # noqa: B006
    pulses = PulseFilter(rate_hz, x.shape[1])
    parts, told, index = [], [], begin
    for chunk in np.split(x, sorted(cuts)):
        if len(chunk):
            parts.append(pulses.push(chunk, index))
            index += len(chunk)
            told += list(pulses.per_minute(index, begin))
    return Heard(np.concatenate([*parts, pulses.flush()]), told)


def wave(seconds: float, rate_hz: float, channels: int = 2) -> Signal:
    t = np.arange(round(seconds * rate_hz))[:, None] / rate_hz
    return np.sin(2 * np.pi * (3 + np.arange(channels)) * t).astype(np.float32) / 4


def paced(x: Signal, rate_hz: float, at_s: list[float], height: Signal, width_s: float) -> Signal:
    x = x.copy()
    for seconds in at_s:
        first = round(seconds * rate_hz)
        x[first : first + max(1, round(width_s * rate_hz))] += height
    return x


AT_S = [0.2, 0.35, 1.0, 1.012, 1.8]  # two chambers, and two pulses that all but touch


@pytest.mark.parametrize("rate_hz", [360.0, 1000.0])
def test_pulses_on_a_line_that_is_quite_flat_leave_it_so(rate_hz: float) -> None:
    x = np.zeros((round(2 * rate_hz), 1), np.float32)
    heard = play(paced(x, rate_hz, AT_S, np.float32([3.0]), 0.002), rate_hz)
    np.testing.assert_array_equal(heard.signal, x)
    assert heard.told[-1][1] == len(AT_S)


@pytest.mark.parametrize("rate_hz", [360.0, 500.0, 1000.0, 1440.0, 4000.0])
@pytest.mark.parametrize("millivolts", [1.5, -2.0, 20.0, 700.0])
def test_pulses_of_half_to_two_milliseconds_leave_a_line(rate_hz: float, millivolts: float) -> None:
    """On one lead the pulse is too small to be found: it is taken out all the same."""
    x = wave(2.0, rate_hz)
    for width_s in (0.0005, 0.002):
        height = np.array([millivolts, millivolts / 10], np.float32)
        heard = play(paced(x, rate_hz, AT_S, height, width_s), rate_hz)
        assert len(heard.signal) == len(x)
        # A wave of 4 Hz and 1/4 mV bends by less than this within 15 ms.
        assert np.abs(heard.signal - x).max() < 0.02
        assert heard.told[-1][1] == len(AT_S)


def test_a_pulse_of_two_phases_and_a_smeared_one_are_taken_out() -> None:
    x = wave(2.0, 1000.0)
    both = x.copy()
    both[500:502] += 3
    both[502:504] -= 3
    assert np.abs(play(both, 1000.0).signal - x).max() < 0.02
    smeared = wave(2.0, 360.0)
    smeared[200:203] += np.array([[0.9], [2.0], [0.6]], np.float32)
    assert np.abs(play(smeared, 360.0).signal - wave(2.0, 360.0)).max() < 0.1


def test_what_is_slower_or_smaller_or_stays_is_left_bit_for_bit() -> None:
    rate_hz = 360.0
    x = wave(3.0, rate_hz)
    t = np.arange(len(x)) / rate_hz
    x[:, 0] += 3 * np.maximum(0, 1 - np.abs(t - 1) / 0.0125)  # 240 mV/s, a base of 25 ms
    x[t >= 2] += 5  # a lead that comes off
    x[100] += 0.5
    np.testing.assert_array_equal(play(x, rate_hz).signal, x)
    assert play(x, rate_hz).told == []


def hostile(seed: int, rate_hz: float) -> Signal:
    """Return a signal with edges and pulses of all heights, widths and distances."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 0.02, (400, 2)).astype(np.float32)
    for _ in range(25):
        first, height = rng.integers(400), rng.normal(0, 1.5, 2)
        x[first : first + rng.integers(1, 12)] += height.astype(np.float32)
    return x


@given(
    seed=st.integers(0, 10**6),
    rate_hz=st.sampled_from([360.0, 720.0, 1100.0]),
    cuts=st.lists(st.integers(0, 400)),
)
def test_any_chunks_and_any_put_back_give_the_same(
    seed: int, rate_hz: float, cuts: list[int]
) -> None:
    x = hostile(seed, rate_hz)
    whole = play(x, rate_hz)
    for places in (cuts, list(range(400))):
        split = play(x, rate_hz, places)
        np.testing.assert_array_equal(split.signal, whole.signal)
        assert split.told == whole.told
    parts, pulses, index = [], PulseFilter(rate_hz, 2), 0
    for chunk in np.split(x, sorted(cuts)):
        if len(chunk):
            parts.append(pulses.push(chunk, index))
            index += len(chunk)
            again = PulseFilter(rate_hz, 2)
            plain = msgspec.to_builtins(pulses.take() | {"kept": None})
            again.put(plain | {"kept": pulses.take()["kept"]})
            pulses = again
    np.testing.assert_array_equal(np.concatenate([*parts, pulses.flush()]), whole.signal)


@given(seed=st.integers(0, 10**6), rate_hz=st.sampled_from([360.0, 720.0, 1100.0]))
def test_no_sample_hangs_on_more_than_is_stated(seed: int, rate_hz: float) -> None:
    x = hostile(seed, rate_hz)
    pulses = PulseFilter(rate_hz, 2)
    out = pulses.push(x, 0)
    rng = np.random.default_rng(seed)
    for index in range(1, len(out), 37):
        until = pulses.needed_until(index)
        assert index <= until <= index + pulses.reach
        other = x.copy()
        other[until:] = rng.normal(0, 3, other[until:].shape)
        np.testing.assert_array_equal(PulseFilter(rate_hz, 2).push(other, 0)[:index], out[:index])


def test_they_are_told_each_second_from_the_first_to_a_minute_after_the_last() -> None:
    rate_hz = 360.0
    at = [3.5, 4.0, 30.2]
    x = paced(wave(100.0, rate_hz), rate_hz, at, np.float32([2, 2]), 0.001)
    told = play(x, rate_hz).told
    assert [index / rate_hz for index, _ in told] == list(range(4, 92))
    for index, count in told:
        now = index / rate_hz - 0.02  # a pulse is known a few samples later
        assert count == sum(now - 60 < one <= now for one in at)
    assert play(x, rate_hz, list(range(7, len(x), 7))).told == told


def test_after_a_flush_nothing_is_joined() -> None:
    pulses = PulseFilter(360.0, 1)
    low, high = np.zeros((50, 1), np.float32), np.full((50, 1), 2, np.float32)
    held = low.copy()
    held[-1] = 3  # is it a pulse? nobody will know
    parts = [pulses.push(held, 0), pulses.flush(), pulses.push(high, 500), pulses.flush()]
    np.testing.assert_array_equal(np.concatenate(parts), np.concatenate([held, high]))
    assert len(parts[0]) == 49
