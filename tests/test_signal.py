"""Units, rates, filters and windows, against SciPy applied to the whole record at once."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import signal

from engine.model_file import Filter, Input
from engine.signal import Front, Resampler, design, rate_ratio, unit_factor
from tests import plain, tiny

RATES = [(250.0, 360.0), (360.0, 250.0), (1000.0, 100.0), (100.0, 1000.0), (48000.0, 16000.0)]
LONG = (90000.0, 360.0)  # outputs are computed one by one


@pytest.mark.parametrize(
    ("given_unit", "wanted", "factor"),
    [
        ("mV", "mV", 1.0),
        ("uV", "mV", 1e-3),
        ("V", "mV", 1e3),
        ("nV", "V", 1e-9),
        ("kPa", "Pa", 1e3),
        ("1", "1", 1.0),
        ("m", "mm", 1e3),
    ],
)
def test_a_unit_with_another_prefix_is_scaled(given_unit: str, wanted: str, factor: float) -> None:
    assert unit_factor(given_unit, wanted) == pytest.approx(factor)


@pytest.mark.parametrize(("given_unit", "wanted"), [("kPa", "mV"), ("", "mV"), ("MV", "mV")])
def test_another_unit_is_refused(given_unit: str, wanted: str) -> None:
    with pytest.raises(ValueError, match=f"expected {wanted} or a multiple of it, found"):
        unit_factor(given_unit, wanted)


def resampled(
    rate_in: float, rate_out: float, chunks: list[NDArray[np.float32]]
) -> NDArray[np.float32]:
    resampler = Resampler(rate_ratio(rate_in, rate_out), chunks[0].shape[1])
    return np.concatenate([*map(resampler.push, chunks), resampler.flush()])


@pytest.mark.parametrize(("rate_in", "rate_out"), [*RATES, LONG])
def test_the_resampler_is_scipys(rate_in: float, rate_out: float, rng: np.random.Generator) -> None:
    x = rng.standard_normal((1234, 2)).astype(np.float32)
    up, down = int(rate_out), int(rate_in)
    expected = plain.resampled(x, up, down)
    found = resampled(rate_in, rate_out, [x])
    np.testing.assert_allclose(found, expected, atol=2e-5)


@given(
    rates=st.sampled_from([*RATES, LONG, (359.0, 360.0), (0.9, 360.0)]),
    cuts=st.lists(st.integers(0, 700), max_size=8),
)
def test_any_split_is_resampled_as_the_whole(rates: tuple[float, float], cuts: list[int]) -> None:
    x = np.random.default_rng(1).standard_normal((700, 1)).astype(np.float32)
    split = resampled(*rates, np.split(x, sorted(cuts)))
    np.testing.assert_array_equal(split, resampled(*rates, [x]))


@pytest.mark.parametrize(("rate_in", "rate_out"), RATES)
def test_the_resampler_holds_back_ten_samples_of_the_lower_rate(
    rate_in: float, rate_out: float
) -> None:
    resampler = Resampler(rate_ratio(rate_in, rate_out), 1)
    produced = 0
    for received in range(1, 2000):
        produced += len(resampler.push(np.zeros((1, 1), np.float32)))
        held_s = received / rate_in - produced / rate_out
        assert held_s <= 11 / min(rate_in, rate_out) + 1 / rate_out


@pytest.mark.parametrize(("rate_in", "rate_out"), RATES)
def test_an_offset_is_no_step_where_a_stream_begins_or_ends(
    rate_in: float, rate_out: float
) -> None:
    offset = np.full((500, 1), 300.0, np.float32)
    np.testing.assert_allclose(resampled(rate_in, rate_out, [offset]), 300.0, rtol=3e-3)


@pytest.mark.parametrize("rate_in", [1e-6, 0.359, 360_001.0, 1e6])
def test_a_rate_beyond_a_thousand_times_is_refused(rate_in: float) -> None:
    with pytest.raises(ValueError, match=r"expected 0\.36 to 360000 Hz, found"):
        rate_ratio(rate_in, 360.0)


@given(st.integers(-2_999, 2_999))
def test_a_ratio_is_near_and_of_small_integers(thousandths: int) -> None:
    true = 10 ** (thousandths / 1000)
    found = rate_ratio(1.0, true)
    assert abs(found / true - 1) < 1e-3
    assert max(found.numerator, found.denominator) <= 1000


@pytest.mark.parametrize(
    "filter_",
    [
        Filter("highpass", (5.0,)),
        Filter("lowpass", (30.0,), 4),
        Filter("bandpass", (5.0, 30.0), 3),
        Filter("notch", (25.0, 4.0)),
    ],
)
def test_a_filter_has_half_its_power_at_its_corners(filter_: Filter) -> None:
    corners = list(filter_.hz)
    if filter_.kind == "notch":
        centre, width = filter_.hz
        corners = [centre - width / 2, centre + width / 2]
    _, response = signal.sosfreqz(design([filter_], 100.0), corners, fs=100.0)
    np.testing.assert_allclose(np.abs(response), np.sqrt(0.5), rtol=0.02)


FILTERS = (Filter("highpass", (0.5,)), Filter("notch", (25.0, 2.0)), Filter("lowpass", (40.0,), 4))


def front(num_slots: int, window: int = tiny.HOP, channels: int = 1) -> Front:
    changes: dict[str, Any] = {"input": Input(100.0, "mV", channels, FILTERS)}
    made = Front(tiny.spec(window_samples=window, **changes), num_slots)
    for slot in range(num_slots):
        made.reset(slot)
    return made


def whole(x: NDArray[np.float32], window: int) -> NDArray[np.float32]:
    """Filter a record, (samples, channels), at once and cut it into windows."""
    sos = design(FILTERS, 100.0)
    zi = signal.sosfilt_zi(sos)[:, :, None] * x[0].astype(np.float64)
    y, _ = signal.sosfilt(sos, x.astype(np.float64), axis=0, zi=zi)
    padded = np.concatenate([np.zeros((window - tiny.HOP, x.shape[1])), y]).astype(np.float32)
    starts = range(0, len(padded) - window + 1, tiny.HOP)
    return np.stack([padded[t : t + window] for t in starts])


@pytest.mark.parametrize("window", [20, 25, 60])
@pytest.mark.parametrize("channels", [1, 3])
def test_hops_of_many_rows_are_filtered_as_each_whole_record(
    window: int, channels: int, rng: np.random.Generator
) -> None:
    made = front(5, window, channels)
    records = 10 + rng.standard_normal((5, 15 * tiny.HOP, channels)).astype(np.float32)
    done: list[list[NDArray[np.float32]]] = [[] for _ in records]
    while any(len(row) < 15 for row in done):  # rows are never in step
        ready = [slot for slot, row in enumerate(done) if len(row) < 15 and rng.random() < 0.6]
        hops = [records[s, len(done[s]) * tiny.HOP :][: tiny.HOP] for s in ready]
        if ready:
            for slot, one in zip(ready, made.push(np.array(ready), np.stack(hops)), strict=True):
                done[slot].append(one)
    for record, row in zip(records, done, strict=True):
        np.testing.assert_array_equal(np.stack(row), whole(record, window))


def test_a_constant_offset_is_no_step_for_a_high_pass() -> None:
    windows = front(1).push(np.array([0]), np.full((1, tiny.HOP, 1), 300.0, np.float32))
    np.testing.assert_allclose(windows, 0.0, atol=1e-4)


def test_a_row_that_was_reset_is_as_new_and_differs_from_one_that_was_not(
    rng: np.random.Generator,
) -> None:
    made = front(2, window=30)
    slots = np.array([0, 1])
    hop = rng.standard_normal((1, tiny.HOP, 1)).astype(np.float32)
    made.push(slots, rng.standard_normal((2, tiny.HOP, 1)).astype(np.float32))
    made.reset(0)
    reused, continued = made.push(slots, np.repeat(hop, 2, axis=0))
    new = front(1, window=30).push(np.array([0]), hop)[0]
    np.testing.assert_array_equal(reused, new)
    assert not np.array_equal(continued, new)


def test_a_row_not_pushed_does_not_change(rng: np.random.Generator) -> None:
    made = front(3, window=30)
    made.push(np.arange(3), rng.standard_normal((3, tiny.HOP, 1)).astype(np.float32))
    before = made.memory[1].copy(), made.overlap[1].copy()
    made.push(np.array([2, 0]), rng.standard_normal((2, tiny.HOP, 1)).astype(np.float32))
    np.testing.assert_array_equal(made.memory[1], before[0])
    np.testing.assert_array_equal(made.overlap[1], before[1])
