"""Signal quality and fibrillation: seconds that hang on no cut, and signals of one fault each."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine import messages as m
from engine import model_file
from engine.heart.fibrillation import Fibrillation, leakage, looks_like_it
from engine.heart.quality import BAD, GOOD, POOR, Quality
from engine.heart.seconds import LATEST, Seconds, restless
from tests.drive import Driven, chunks

RATE = 360
MITDB = Path(__file__).parents[2] / "shared" / "data" / "ecg" / "mitdb"

Signal = NDArray[np.float32]
Told = list[tuple[int, dict[str, float], float | None]]


class Judge:
    """The three stages of some streams, as the wing joins them."""

    def __init__(self, streams: int, channels: int = 1, rate: float = RATE) -> None:
        self.seconds = Seconds(rate, channels, streams)
        self.quality = Quality(rate, channels)
        self.fibrillation = Fibrillation(self.seconds.slow_hz)
        self.position = np.zeros(streams, np.int64)
        self.told: list[Told] = [[] for _ in range(streams)]
        for slot in range(streams):
            self.reset(slot)

    def reset(self, slot: int) -> None:
        for stage in (self.seconds, self.quality, self.fibrillation):
            stage.reset(slot)

    def push(self, slots: list[int], samples: Signal) -> None:
        """Take (rows, samples, channels)."""
        which = np.array(slots)
        for ended in self.seconds.push(which, self.position[which], samples):
            unrest = restless(ended.latest)
            judged = self.quality.push(ended, unrest)
            suspected = self.fibrillation.push(ended, unrest)
            for slot, end, values, share in zip(
                ended.slots, ended.ends, judged, suspected, strict=True
            ):
                self.told[slot].append((end, values, share))
        self.position[which] += samples.shape[1]


def told(signal: Signal, cuts: list[int] | None = None) -> Told:
    """Judge one stream, (samples,) or (samples, channels), in pieces."""
    signal = signal.reshape(len(signal), -1)
    judge = Judge(1, signal.shape[1])
    for piece in np.split(signal, sorted(cuts or [])):
        judge.push([0], piece[None])
    return judge.told[0]


def last(signal: Signal) -> dict[str, float]:
    return told(signal)[-1][1]


def ecg(seconds: float, rng: np.random.Generator, bpm: float = 75.0) -> Signal:
    """Return complexes and T waves with a little noise, in mV."""
    t = np.arange(round(seconds * RATE)) / RATE
    phase = t % (60 / bpm) - 0.3
    qrs = 1.2 * np.exp(-((phase / 0.012) ** 2)) - 0.3 * np.exp(-(((phase - 0.03) / 0.012) ** 2))
    wave = qrs + 0.25 * np.exp(-(((phase - 0.22) / 0.05) ** 2))
    return (wave + rng.normal(0, 0.008, len(t))).astype(np.float32)


@given(
    cuts=st.lists(st.integers(0, 2500), max_size=12),
    seed=st.integers(0, 9),
    length=st.integers(0, 2500),
)
def test_seconds_are_those_of_the_whole_signal_however_it_is_cut(
    cuts: list[int], seed: int, length: int
) -> None:
    rng = np.random.default_rng(seed)
    signal = rng.normal(0, 1, (length, 2)).astype(np.float32)
    seconds = Seconds(RATE, 2, 3)
    found = []
    position = 0
    for piece in np.split(signal, sorted(cut for cut in cuts if cut < length)):
        for ended in seconds.push(np.array([1]), np.array([position]), piece[None]):
            slow = signal[: ended.ends[0]].reshape(-1, 3, 2).mean(axis=1)[-LATEST * 120 :]
            np.testing.assert_allclose(ended.latest[0].T[-len(slow) :], slow, atol=1e-5)
            found.append((ended.ends[0], ended.second[0].T.copy(), ended.whole[0]))
        position += len(piece)
    assert [end for end, _, _ in found] == list(range(RATE, length + 1, RATE))
    for number, (end, second, whole) in enumerate(found, 1):
        np.testing.assert_array_equal(second, signal[end - RATE : end])
        assert whole == (number >= LATEST)


def test_a_stream_is_judged_alone_as_among_others_that_began_elsewhere(
    rng: np.random.Generator,
) -> None:
    signals = np.stack(
        [ecg(12, rng, bpm) * gain for bpm, gain in zip(range(50, 90), range(1, 41), strict=True)]
    )
    signals += 0.3 * np.sin(np.arange(signals.shape[1]) / 7)[None]
    judge = Judge(len(signals))
    for slot in range(len(signals)):  # seconds that end in different steps
        judge.push([slot], signals[slot : slot + 1, : 17 * slot, None])
    left = signals.shape[1] - 17 * len(signals)
    for t in range(0, left, 60):
        slots = list(range(len(signals)))
        piece = [signals[slot, 17 * slot :][t : min(t + 60, left)] for slot in slots]
        judge.push(slots, np.stack(piece)[:, :, None])
    for slot, signal in enumerate(signals):
        assert judge.told[slot] == told(signal[: judge.position[slot]])


def test_what_is_carried_can_be_put_back_elsewhere(rng: np.random.Generator) -> None:
    signal = ecg(10, rng)[:, None]
    judge, other = Judge(1), Judge(3)
    judge.push([0], signal[None, :2000])
    for stage in ("seconds", "quality", "fibrillation"):
        getattr(other, stage).put(2, getattr(judge, stage).take(0))
    other.position[2] = 2000
    other.push([2], signal[None, 2000:])
    assert other.told[2] == told(signal)[5:]


def test_a_good_ecg_is_good_and_told_so_from_the_fourth_second_on(rng: np.random.Generator) -> None:
    judged = told(ecg(8, rng))
    assert ["quality" in values for _, values, _ in judged] == [False] * 3 + [True] * 5
    for _, values, _ in judged[3:]:
        assert values["quality"] == GOOD
        assert values["noise"] < 0.35
        assert values["mains_share"] < 0.05
        assert values["flat_line"] == values["lead_off"] == values["saturated"] == 0


def test_a_second_that_moves_by_a_few_microvolts_is_a_flat_line_at_once() -> None:
    assert told(np.zeros(RATE, np.float32))[0][1] == {
        "flat_line": 1,
        "lead_off": 0,
        "leads_off": 0,
        "saturated": 0,
        "implausible_amplitude": 0,
        "quality": BAD,
    }
    t = np.arange(5 * RATE) / RATE
    small = np.sin(2 * np.pi * 7 * t).astype(np.float32)
    assert last(0.009 * small)["flat_line"] == 1
    assert last(0.011 * small)["flat_line"] == 0


def test_microvolts_that_are_called_millivolts_are_implausible_at_once_and_a_pulse_is_not(
    rng: np.random.Generator,
) -> None:
    good = ecg(5, rng)
    paced = good.copy()
    paced[100::RATE] += 700.0  # the largest pulse that IEC 60601-2-27 tests with
    assert told(1000 * good)[0][1]["implausible_amplitude"] == 1
    assert last(1000 * good)["quality"] == BAD
    assert last(good)["implausible_amplitude"] == last(paced)["implausible_amplitude"] == 0
    both = np.stack([1000 * good, good], axis=1)
    assert last(both)["implausible_amplitude"] == 0  # the other lead suffices


def test_a_flat_line_far_from_where_the_lead_was_is_a_lead_off_and_one_near_it_is_not(
    rng: np.random.Generator,
) -> None:
    good = ecg(5, rng)
    off = np.concatenate([good, np.full(RATE, 5.0, np.float32)])
    stopped = np.concatenate([good, np.full(RATE, 0.1, np.float32)])
    assert last(off)["lead_off"] == 1
    assert last(off)["quality"] == BAD
    assert last(stopped)["lead_off"] == 0
    assert last(stopped)["flat_line"] == 1


def test_more_offset_than_electrodes_may_have_is_a_lead_off(rng: np.random.Generator) -> None:
    assert last(ecg(5, rng) + np.float32(299))["lead_off"] == 0
    assert last(ecg(5, rng) - np.float32(301))["lead_off"] == 1


@pytest.mark.parametrize("sign", [1, -1])
def test_a_signal_that_rests_at_a_rail_is_saturated(sign: int, rng: np.random.Generator) -> None:
    t = np.arange(8 * RATE) / RATE
    wide = ecg(8, rng) + 6 * np.sin(2 * np.pi * 0.4 * t).astype(np.float32) * (t > 5)
    assert [v["saturated"] for _, v, _ in told(sign * wide)] == [0] * 8
    clipped = np.clip(wide, -5, 5)
    judged = [values for _, values, _ in told(sign * clipped)]
    expected = [
        float(any(np.mean(part[k : k + 18] == part[k]) == 1 and abs(part[k]) == 5
                  for k in range(RATE - 17)))
        for part in clipped.reshape(-1, RATE)
    ]  # fmt: skip
    assert [values["saturated"] for values in judged] == expected
    assert sum(expected) >= 2
    assert all(v["quality"] == BAD for v in judged if v["saturated"])


def test_an_ecg_without_any_noise_is_not_saturated(rng: np.random.Generator) -> None:
    t = np.arange(5 * RATE) / RATE
    clean = np.maximum(0, 1 - np.abs(t % 1 - 0.5) / 0.04).astype(np.float32)  # rests at 0
    assert [values["saturated"] for _, values, _ in told(clean)] == [0] * 5


@pytest.mark.parametrize("mains", [50.0, 60.0])
def test_mains_are_told_by_their_power(mains: float, rng: np.random.Generator) -> None:
    t = np.arange(6 * RATE) / RATE
    clean = ecg(6, rng)
    for amplitude, worst in ((0.01, GOOD), (0.3, POOR), (3.0, BAD)):
        hum = amplitude * np.sin(2 * np.pi * mains * t).astype(np.float32)
        values = last(clean + hum)
        # Power under the same window, by a plain sum over the whole spectrum of the parts.
        window = np.hanning(RATE + 1)[:-1]
        power = [
            np.abs(np.fft.rfft(part.reshape(-1, RATE) * window, axis=1)) ** 2
            for part in (clean, hum)
        ]
        beats = (power[0] + power[1])[-4:, 2:20].sum(axis=1).max()
        share = power[1][-1].sum() / (power[1][-1].sum() + beats)
        assert values["mains_share"] == pytest.approx(share, abs=0.02)
        assert values["quality"] == worst


def test_muscle_movement_and_unrest_make_noise(rng: np.random.Generator) -> None:
    clean = ecg(6, rng)
    t = np.arange(len(clean)) / RATE
    muscle = np.diff(rng.normal(0, 1, len(clean) + 1)).astype(np.float32)
    assert last(clean + 0.06 * muscle)["quality"] == POOR
    assert last(clean + 0.3 * muscle)["quality"] == BAD
    assert last(clean + (1.2 * t / 4).astype(np.float32))["quality"] == POOR
    assert last(clean + (8.0 * t / 4).astype(np.float32))["quality"] == BAD
    tachycardia = np.sin(2 * np.pi * 3 * t).astype(np.float32)
    assert last(tachycardia)["noise"] == pytest.approx(0.9)
    assert last(tachycardia)["quality"] == POOR  # never bad: it must not silence an alert


def test_one_good_lead_of_two_suffices(rng: np.random.Generator) -> None:
    good = ecg(6, rng)
    nothing, noise = np.zeros_like(good), rng.normal(0, 1, len(good)).astype(np.float32)
    alone = last(good)
    assert last(np.stack([nothing, good], axis=1)) == alone
    assert last(np.stack([good, noise], axis=1)) == alone
    assert last(np.stack([nothing, noise], axis=1)) == last(noise)
    off = np.concatenate([good, np.full(RATE, 5.0, np.float32)])
    assert last(np.stack([np.zeros_like(off), off], axis=1)) == last(off)
    assert last(np.stack([nothing, 1000 * good], axis=1)) == last(1000 * good)


def test_nothing_is_remembered_over_a_reset(rng: np.random.Generator) -> None:
    judge = Judge(1)
    judge.push([0], 5 + ecg(7.3, rng)[None, :, None])
    judge.reset(0)
    judge.told[0].clear()
    judge.position[0] = 0
    fresh = np.concatenate([np.zeros(400, np.float32), ecg(6, rng)])
    judge.push([0], fresh[None, :, None])
    assert judge.told[0] == told(fresh)


def test_the_leakage_of_a_sine_wave_is_none_and_of_sharp_beats_nearly_all() -> None:
    t = np.arange(480) / 120
    sine = np.sin(2 * np.pi * 4 * t)
    beats = np.exp(-(((t % 1 - 0.5) / 0.03) ** 2))
    signals = np.stack([sine, beats - beats.mean()]).astype(np.float32)
    assert leakage(signals, 120.0) == pytest.approx([0.0, 0.85], abs=0.15)


def test_flutter_is_suspected_in_every_lead_that_has_a_signal(rng: np.random.Generator) -> None:
    t = np.arange(480) / 120
    flutter = (np.sin(2 * np.pi * 3.7 * t) + 0.2 * np.sin(2 * np.pi * 1.3 * t)).astype(np.float32)
    beats = ecg(4, rng).reshape(-1, 3).mean(axis=1)
    nothing = np.zeros_like(beats)
    leads = [(flutter, flutter), (flutter, nothing), (flutter, beats), (beats, beats)]
    leads += [(nothing, nothing), (0.04 * flutter, nothing)]
    windows = np.array(leads, np.float32)
    assert looks_like_it(windows, 120.0).tolist() == [True, True, False, False, False, False]


def test_fibrillation_is_told_by_the_share_of_the_last_four_seconds(
    rng: np.random.Generator,
) -> None:
    t = np.arange(20 * RATE) / RATE
    flutter = np.sin(2 * np.pi * 3.7 * t) + 0.2 * np.sin(2 * np.pi * 1.3 * t)
    signal = np.concatenate([flutter, ecg(20, rng)]).astype(np.float32)
    shares = [share for _, _, share in told(signal)]
    # Four seconds are a window; two of them can say so, and only four deny it.
    assert shares[:8] == [None, None, None, None, 0.5, 0.75, 1.0, 1.0]
    assert shares[19] == 1.0
    assert shares[28:] == [0.0] * 12
    assert [share for _, _, share in told(ecg(8, rng))] == [None] * 6 + [0.0, 0.0]


def test_flutter_of_record_207_is_found_and_none_in_others() -> None:
    if not MITDB.exists():
        pytest.skip("needs ../shared/data/ecg/mitdb")
    wfdb = pytest.importorskip("wfdb")

    def lead(name: str, start_s: int, end_s: int) -> Signal:
        record = wfdb.rdrecord(
            str(MITDB / name), sampfrom=start_s * RATE, sampto=end_s * RATE, channels=[0]
        )
        return record.p_signal[:, 0].astype(np.float32)

    # The annotated flutter from 1540.8 to 1639.3 s, and 40 s of idioventricular rhythm.
    found = [share or 0.0 for _, _, share in told(lead("207", 1530, 1680))]
    assert max(found[:10]) == 0.0
    assert any(share >= 0.5 for share in found[10:17])
    assert max(found[120:]) == 0.0
    for name in ("106", "203", "223"):  # bigeminy; fibrillation of the atria; ventricular runs
        assert max(share or 0.0 for _, _, share in told(lead(name, 600, 900))) < 0.5


def test_a_stream_in_the_wrong_unit_ends_in_an_alert_that_says_so(
    rng: np.random.Generator,
) -> None:
    alerts = {}
    for unit in ("uV", "mV"):
        driven = Driven(model_file.find("heart"), credit_s=60.0)
        driven.open("a", "s", "heart", rate_hz=float(RATE), unit=unit)
        driven.say("a", *chunks("s", 1000 * ecg(12, rng), range(360, 12 * RATE, 360)))
        driven.run()
        told = driven.told("a", m.Alert)
        alerts[unit] = {one.rule for one in told if one.state == "active"}
        if unit == "mV":
            (wrong,) = [one for one in told if one.rule == "implausible_amplitude"][-1:]
            assert "asystole" in wrong.cannot_monitor
    assert "implausible_amplitude" in alerts["mV"]
    assert "implausible_amplitude" not in alerts["uV"]
