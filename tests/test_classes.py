"""The class of each beat: its window, its interval, and its independence of cuts and neighbours."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine.heart.beats import Beat
from engine.heart.classes import BeatClassifier
from engine.model_file import Beats, Output
from tests import tiny

RATE_HZ = int(tiny.RATE_HZ)
CUT = Beats("named", leads=2, points=10, before=6, factor=3)
BEFORE, AFTER = 18, 12
LAG = 40
LABELS = ("N", "V")


class Recorder:
    """Stands for a runtime: it keeps what it is given, and carries a count of beats."""

    max_rows = 2

    def __init__(self, rows: int) -> None:
        self.beats = np.zeros((rows, 1), np.float32)
        self.seen: list[list[NDArray[np.float32]]] = [[] for _ in range(rows)]

    def reset(self, slot: int) -> None:
        self.beats[slot] = 0

    def take(self, slot: int) -> NDArray[np.float32]:
        return self.beats[slot].copy()

    def put(self, slot: int, row: NDArray[np.float32]) -> None:
        self.beats[slot] = row

    def step(
        self, slots: NDArray[np.intp], windows: NDArray[np.float32]
    ) -> dict[str, NDArray[np.float32]]:
        assert len(set(slots.tolist())) == len(slots) <= self.max_rows
        for slot, window in zip(slots.tolist(), windows[:, :, 0], strict=True):
            self.seen[slot].append(window)
        self.beats[slots] += 1
        odd = (self.beats[slots] % 2).astype(np.float32)
        named = np.concatenate([1 - odd, odd], axis=1)[:, None]
        return {"named": named, "rhythm": self.beats[slots][:, None] / 100}


def classifier(rows: int) -> tuple[BeatClassifier, Recorder]:
    spec = tiny.spec(
        input=tiny.spec().input.__class__(RATE_HZ / CUT.factor, "mV"),
        outputs=(Output("named", "beat_class", LABELS), Output("rhythm", "rhythm", ("n",))),
    )
    runtime = Recorder(rows)
    made = BeatClassifier(spec, CUT, runtime, rows, LAG)
    for slot in range(rows):
        made.reset(slot)
    return made, runtime


def run(
    signals: NDArray[np.float32], beats: Sequence[Sequence[int]], steps: Sequence[int]
) -> tuple[list[list[Beat]], Recorder]:
    """Walk through signals in steps; a beat is found between 20 and LAG samples after it."""
    made, runtime = classifier(len(signals))
    slots = np.arange(len(signals))
    named: list[list[Beat]] = [[] for _ in signals]
    start = 0
    for step in steps:
        end = start + step
        found = [
            (row, Beat(place, "?", 0.9, place + 20 + place % 20))
            for row, places in enumerate(beats)
            for place in places
            if start < place + 20 + place % 20 <= end
        ]
        for row, beat in made.push(
            slots, np.full(len(signals), start), signals[:, start:end], found
        ):
            named[row].append(beat)
        start = end
    return named, runtime


def record(seed: int, samples: int = 600) -> tuple[NDArray[np.float32], list[int]]:
    rng = np.random.default_rng(seed)
    signal = rng.normal(0, 1, (samples, 2)).astype(np.float32)
    return signal, (np.cumsum(rng.integers(25, 60, 9)) + 5).tolist()


def test_a_window_is_the_mean_signal_around_the_beat_lead_by_lead() -> None:
    signal, beats = record(0)
    _, runtime = run(signal[None], [beats], [600])
    padded = np.concatenate([np.repeat(signal[:1], BEFORE, axis=0), signal])
    for place, window in zip(beats, runtime.seen[0], strict=True):
        around = padded[place : place + BEFORE + AFTER]
        expected = [
            around[3 * point : 3 * point + 3, lead].mean()
            for lead in range(2)
            for point in range(CUT.points)
        ]
        np.testing.assert_allclose(window[:-1], expected, rtol=1e-5, atol=1e-6)


def test_an_interval_is_given_in_seconds_and_the_first_is_unknown() -> None:
    signal, beats = record(1)
    _, runtime = run(signal[None], [beats], [600])
    given = [float(window[-1]) for window in runtime.seen[0]]
    assert given[0] == 0.0
    np.testing.assert_allclose(given[1:], np.diff(beats) / RATE_HZ, rtol=1e-6)


def test_no_interval_reaches_over_lost_samples_and_the_patient_is_remembered() -> None:
    signal, _ = record(2)
    made, runtime = classifier(1)
    row = np.array([0])
    made.push(row, np.array([0]), signal[None, :100], [(0, Beat(40, "?", 0.9, 70))])
    made.gap(0)
    made.push(row, np.array([100]), signal[None, 300:400], [(0, Beat(140, "?", 0.9, 170))])
    assert [float(window[-1]) for window in runtime.seen[0]] == [0.0, 0.0]
    assert runtime.beats[0, 0] == 2
    made.reset(0)
    assert runtime.beats[0, 0] == 0


def test_a_class_is_decided_when_its_window_is_there_or_the_beat_is_found_later() -> None:
    signal, beats = record(3)
    named, _ = run(signal[None], [beats], [600])
    assert [beat.position for beat in named[0]] == beats
    assert [beat.decided_at for beat in named[0]] == [
        max(place + AFTER, place + 20 + place % 20) for place in beats
    ]
    assert [beat.label for beat in named[0]] == ["V", "N"] * 4 + ["V"]
    assert [beat.rhythm for beat in named[0]] == [
        pytest.approx((number / 100,)) for number in range(1, 10)
    ]


@given(st.lists(st.integers(1, 90), min_size=1, max_size=40), st.integers(0, 9))
@settings(deadline=None)
def test_any_cut_gives_the_same_windows_and_beats(sizes: list[int], seed: int) -> None:
    signal, beats = record(seed)
    cut = [*sizes, 600]
    named, runtime = run(signal[None], [beats], cut)
    whole, expected = run(signal[None], [beats], [sum(cut)])
    assert named == whole
    np.testing.assert_array_equal(runtime.seen[0], expected.seen[0])


def test_neighbours_change_nothing() -> None:
    records = [record(seed) for seed in range(5)]
    signals = np.stack([signal for signal, _ in records])
    together, shared = run(signals, [beats for _, beats in records], [45] * 13 + [15])
    for row, (signal, beats) in enumerate(records):
        alone, runtime = run(signal[None], [beats], [45] * 13 + [15])
        assert together[row] == alone[0]
        np.testing.assert_array_equal(shared.seen[row], runtime.seen[0])


def test_what_a_stream_carries_can_go_on_elsewhere() -> None:
    signal, beats = record(4)
    made, _ = classifier(2)
    other, runtime = classifier(1)
    found = [(0, Beat(place, "?", 0.9, place + 30)) for place in beats]
    early = [one for one in found if one[1].position < 290]
    first = made.push(np.array([1]), np.array([0]), signal[None, :300], early)
    other.put(0, made.take(1))
    later = [one for one in found if one not in early]
    second = other.push(np.array([0]), np.array([300]), signal[None, 300:], later)
    whole, expected = run(signal[None], [beats], [600])
    assert [b.position for _, b in first + second] == [beat.position for beat in whole[0]]
    assert [b.label for _, b in first + second] == [beat.label for beat in whole[0]]
    np.testing.assert_array_equal(runtime.seen[0], expected.seen[0][len(first) :])
