"""An ECG that is not as it should be has a stated outcome, through the real engine and model.

=========================  =======================================================================
what is wrong              what comes of it
=========================  =======================================================================
flat line                  no beat in it; ``flat_line``, and ``asystole`` after 4.0 s + 0.4: it may
                           be one. That is what a signal a thousand times too small looks like, too
saturation                 ``saturated``: cannot monitor any rule of the heart, nor resolve one
NaN                        the stream ends, ``not_finite``; its alerts stay, ``stream_lost`` says
                           that they cannot be monitored; its neighbours do not notice
pacing pulses              taken out from 360 Hz on: each beat once, behind one pulse or two of any
                           height; without beats behind them ``asystole``, in its time.
                           ``pacing_pulses_per_minute`` says them. Below 360 Hz a pulse of 2 mV may
                           be taken for the beat
inverted leads             the same beats
beats hidden by noise      as steep as beats, or by an electrode that came off an AC amplifier and
                           creeps back: ``unclear_pause``, cannot monitor, and no asystole
asystole in noise          ``asystole`` at 4.0 s while the noise is less steep than 0.7 of this
                           patient's beats; beyond, cannot monitor until it is less
mains of 1 mV              the same beats; ``quality`` says it: bad, and a half of it poor
a lead swap in mid-record  the same beats, no alert
uV that are called mV      ``implausible_amplitude``: cannot monitor (test_quality.py)
mV that are called uV      ``flat_line`` and ``asystole``: loud, as it cannot be told from one
clock jumps in t_device    ``clock_jump`` (test_engine.py), and no other beat or measure
a subject in the clear     refused, and repeated nowhere (test_engine.py, test_pseudonyms.py)
a lead off and on again    ``lead_off``: cannot monitor; no false asystole, and one that goes on is
                           still active. With one good lead of two the beats go on: ``lead_lost``
lost chunks                a gap; no alert is resolved while its cause lasts, nor upon lost samples
any chunks                 identical beats, classes, measures and alerts
=========================  =======================================================================
"""

from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from engine import annotated, model_file
from engine import messages as m
from tests.drive import Driven, chunks

RATE = 360
CHUNK = RATE // 2
MITDB = Path(__file__).parents[2] / "shared" / "data" / "ecg" / "mitdb"
LEADS = model_file.load("heart").spec.input.channels
MONITORED = {"asystole", "bradycardia", "tachycardia", "ventricular_tachycardia"}
OVER = ("latched", "resolved")

Signal = NDArray[np.float32]
Seconds = NDArray[np.float64]


class Ward:
    """One engine for all tests of this file: each plays its record as a stream of its own."""

    def __init__(self) -> None:
        self.driven = Driven(
            model_file.find("heart"), max_streams=100, credit_s=3600.0, bridge_s=0.05
        )
        self.count = 0

    def open(self, channels: int, rate_hz: float = RATE, **fields: Any) -> str:
        self.count += 1
        name = f"bed-{self.count}"
        fields = {"rate_hz": float(rate_hz), "channels": channels} | fields
        self.driven.open("ward", name, "heart", **fields)
        return name

    def send(self, sent: Iterable[m.Chunk]) -> None:
        for chunk in sent:
            self.driven.say("ward", chunk)
            self.driven.run()

    def play(self, signal: Signal, size: int = CHUNK, **fields: Any) -> str:
        """Play a record to its end in chunks of so many samples; return its stream's name."""
        name = self.open(signal.shape[1], **fields)
        self.send(chunks(name, signal, range(size, len(signal), size)))
        self.driven.say("ward", m.Flush(name))
        self.driven.run()
        return name

    def beats(self, name: str) -> list[m.Beat]:
        return self.driven.told("ward", m.Beat, name)

    def seconds(self, name: str) -> Seconds:
        return np.array([beat.seconds for beat in self.beats(name)])

    def measures(self, name: str) -> list[m.Measures]:
        return self.driven.told("ward", m.Measures, name)

    def alerts(self, name: str, rule: str = "") -> list[m.Alert]:
        told = self.driven.told("ward", m.Alert, name)
        return [one for one in told if rule in ("", one.rule)]

    def raised(self, name: str) -> set[str]:
        return {one.rule for one in self.alerts(name) if one.state == "active"}

    def known(self, name: str) -> list[list[dict[str, Any]]]:
        """Return all beats, measures and alerts, as plain data without the stream's name."""
        drop = dict.fromkeys(("stream", "subject"))
        return [
            [msgspec.to_builtins(one) | drop for one in told]
            for told in (self.beats(name), self.measures(name), self.alerts(name))
        ]


@pytest.fixture(scope="module")
def ward() -> Ward:
    return Ward()


def rhythm(*stretches: tuple[float, float]) -> Seconds:
    """Return when the heart beats: for so many seconds at so many a minute; 0: not at all."""
    begin, beats = 0.4, []
    for seconds, bpm in stretches:
        if bpm:
            beats.append(np.arange(begin, begin + seconds - 0.01, 60 / bpm))
        begin += seconds
    return np.concatenate(beats)


def ecg(beats: Seconds, seconds: float, rate_hz: float = RATE, width: float = 1.0) -> Signal:
    """Return P waves, complexes and T waves in each lead of the model, and a little noise; in mV.

    With a width of 3 there are no P waves: so do ventricles look that are paced.
    """
    t = np.arange(round(seconds * rate_hz)) / rate_hz
    noise = np.random.default_rng(0).normal(0, 0.008, (len(t), LEADS))
    signal = noise.astype(np.float32)
    shape = [  # after the beat, width and amplitude in two leads, in s and mV
        (-0.16, 0.025, (0.15, 0.1) if width == 1 else (0.0, 0.0)),
        (0.0, 0.012 * width, (1.2, 0.8)),
        (0.026 * width, 0.012 * width, (-0.3, -0.5)),
        (0.25 + 0.012 * width, 0.05, (0.25, 0.18)),
    ]
    for beat in beats:
        near = (t > beat - 0.4) & (t < beat + 0.6)
        for after, wide, mv in shape:
            bump = np.exp(-(((t[near] - beat - after) / wide) ** 2))
            signal[near] += np.outer(bump, mv[:LEADS]).astype(np.float32)
    return signal


def each_once(found: Seconds, beats: Seconds, within_s: float = 0.05) -> bool:
    """Return whether there is one beat for each of the heart's, and no other."""
    return len(found) == len(beats) and bool(np.all(np.abs(found - beats) <= within_s))


HALF_A_MINUTE = rhythm((29.0, 75))
NORMAL = ecg(HALF_A_MINUTE, 30.0)
TIME = np.arange(len(NORMAL)) / RATE
MIDDLE = (TIME >= 10) & (TIME < 20)
# Ten seconds, of which the heart beats in none, between ten of seventy-five a minute.
STANDSTILL = rhythm((9.5, 75), (10.5, 0), (19.5, 75))


def test_an_ecg_as_it_should_be_has_its_beats_and_no_alert(ward: Ward) -> None:
    name = ward.play(NORMAL)
    assert each_once(ward.seconds(name), HALF_A_MINUTE)
    assert {beat.label for beat in ward.beats(name)} == {"N"}
    assert ward.alerts(name) == []
    assert {one.values["quality"] for one in ward.measures(name) if "quality" in one.values} == {2}


# --- a signal that is none ---------------------------------------------------------------------


def test_a_flat_line_has_no_beats_and_may_be_asystole(ward: Ward) -> None:
    flat = NORMAL.copy()
    flat[TIME >= 10.5] = 0
    name = ward.play(flat)
    before = HALF_A_MINUTE[HALF_A_MINUTE < 10.5]
    assert each_once(ward.seconds(name), before)
    (asystole,) = ward.alerts(name, "asystole")
    assert asystole.state == "active"
    assert asystole.index / RATE == pytest.approx(before[-1] + 4.0, abs=0.02)
    assert (asystole.decided_at - asystole.index) / RATE <= 0.4
    assert ward.raised(name) == {"asystole", "flat_line", "poor_signal"}


def test_a_signal_at_the_rail_is_saturated_and_nothing_is_raised_or_resolved_meanwhile(
    ward: Ward,
) -> None:
    wander = 8 * np.sin(2 * np.pi * 0.3 * (TIME - 10)) * MIDDLE
    clipped = np.clip(NORMAL + wander[:, None].astype(np.float32), -5, 5)
    name = ward.play(clipped)
    (raised,) = [one for one in ward.alerts(name, "saturated") if one.from_state == "pending"]
    assert 10 < raised.seconds < 13
    assert set(raised.cannot_monitor) >= MONITORED
    assert {one.kind for one in ward.alerts(name)} == {"technical"}
    outside = ~((HALF_A_MINUTE > 9.9) & (HALF_A_MINUTE < 21))
    found = ward.seconds(name)
    assert each_once(found[(found < 9.9) | (found > 21)], HALF_A_MINUTE[outside])


def test_what_is_not_a_number_ends_its_stream_only_and_resolves_nothing(ward: Ward) -> None:
    standstill = ecg(STANDSTILL, 40.0)
    broken = standstill.copy()
    broken[17 * RATE + 7, -1] = np.nan
    names = [ward.open(LEADS) for _ in range(2)]
    for pair in zip(
        *(
            chunks(name, signal, range(CHUNK, len(signal), CHUNK))
            for name, signal in zip(names, (broken, standstill), strict=True)
        ),
        strict=True,
    ):
        ward.send(pair)
    closed = ward.driven.told("ward", m.Closed, names[0])
    assert [one.reason for one in closed] == ["not_finite"]
    assert [one.state for one in ward.alerts(names[0], "asystole")] == ["active"]
    (lost,) = ward.alerts(names[0], "stream_lost")
    assert (lost.state, set(lost.cannot_monitor) >= MONITORED) == ("active", True)
    (still,) = ward.driven.engine._alerts.active(names[0])
    assert {one.rule: one.state for one in still.alerts}["asystole"] == "active"
    assert each_once(ward.seconds(names[1]), STANDSTILL)


@pytest.mark.parametrize("factor", [1.0, 1000.0])
def test_millivolts_that_are_called_microvolts_are_a_flat_line_and_asystole(
    ward: Ward, factor: float
) -> None:
    name = ward.play(np.float32(factor) * NORMAL, unit="uV")
    wrong = factor == 1.0
    assert ward.raised(name) == ({"flat_line", "asystole", "poor_signal"} if wrong else set())
    assert each_once(ward.seconds(name), HALF_A_MINUTE[:0] if wrong else HALF_A_MINUTE)


# --- a signal with something on it -------------------------------------------------------------


def pulsed(
    signal: Signal, at: Seconds, millivolts: float, rate_hz: float, width_s: float = 0.001
) -> Signal:
    """Return a record with pulses of a pacemaker; on the second lead they are smaller."""
    changed = signal.copy()
    for first in np.round(at * rate_hz).astype(int):
        height = millivolts * np.array([1, 0.6], np.float32)[: signal.shape[1]]
        changed[first : first + max(1, round(width_s * rate_hz))] += height
    return changed


def pulse_rate(ward: Ward, name: str) -> float:
    """Return how many pulses a minute were told at most."""
    told = [one.values.get("pacing_pulses_per_minute", 0.0) for one in ward.measures(name)]
    return max(told, default=0.0)


@pytest.mark.parametrize("rate_hz", [360.0, 500.0, 1000.0])
@pytest.mark.parametrize("millivolts", [2.0, -5.0, 50.0])
@pytest.mark.parametrize("before_s", [(0.08,), (0.08, 0.24)])
def test_paced_beats_are_found_once_each(
    ward: Ward, rate_hz: float, millivolts: float, before_s: tuple[float, ...]
) -> None:
    """One pulse or two of 1 ms, before the peak of complexes as wide as paced ones are."""
    beats = rhythm((29.0, 70))
    signal = ecg(beats, 30.0, rate_hz, width=3.0)
    for earlier in before_s:
        signal = pulsed(signal, beats - earlier, millivolts, rate_hz)
    name = ward.play(signal, rate_hz=rate_hz)
    assert each_once(ward.seconds(name), beats, within_s=0.1)
    assert ward.raised(name) == set()
    pulses = [beat - earlier for beat in beats for earlier in before_s]
    assert pulse_rate(ward, name) == sum(one < 29.9 for one in pulses)


@pytest.mark.parametrize("rate_hz", [360.0, 1000.0])
@pytest.mark.parametrize("millivolts", [2.0, -5.0, 50.0])
def test_pulses_without_beats_are_asystole_in_its_time(
    ward: Ward, rate_hz: float, millivolts: float
) -> None:
    """The heart stands still from 10 s on, and the pacemaker goes on at seventy a minute."""
    beats = rhythm((9.5, 70))
    pulses = rhythm((29.0, 70)) - 0.08
    name = ward.play(
        pulsed(ecg(beats, 30.0, rate_hz, width=3.0), pulses, millivolts, rate_hz), rate_hz=rate_hz
    )
    assert each_once(ward.seconds(name), beats, within_s=0.1)
    (asystole,) = ward.alerts(name, "asystole")
    assert asystole.seconds == pytest.approx(beats[-1] + 4.0, abs=0.1)
    assert (asystole.decided_at - asystole.index) / rate_hz <= 0.4


@pytest.mark.skipif(not MITDB.is_dir(), reason=f"no MIT-BIH records at {MITDB}")
@pytest.mark.filterwarnings("ignore:The inplace keyword")  # wfdb 4.3 under pandas 3
@pytest.mark.parametrize("record", ["106", "119", "208"])  # many ventricular beats
def test_pulses_on_a_real_minute_change_no_beat(ward: Ward, record: str) -> None:
    """At seventy a minute, wherever they fall: on complexes, T waves and between them."""
    pytest.importorskip("wfdb")
    signal = annotated.read(MITDB, record, LEADS).samples[600 * RATE : 660 * RATE]
    beats = ward.seconds(ward.play(signal))
    name = ward.play(pulsed(signal, rhythm((59.0, 70)), 4.0, RATE))
    assert each_once(ward.seconds(name), beats, within_s=0.03)
    assert pulse_rate(ward, name) == 69


@pytest.mark.parametrize("inverted", [range(LEADS), range(1)])
def test_inverted_leads_have_the_same_beats(ward: Ward, inverted: Iterable[int]) -> None:
    signal = NORMAL.copy()
    signal[:, list(inverted)] *= -1
    name = ward.play(signal)
    assert each_once(ward.seconds(name), HALF_A_MINUTE)
    assert ward.alerts(name) == []


@pytest.mark.parametrize("mains_hz", [50.0, 60.0])
@pytest.mark.parametrize(("millivolts", "quality"), [(0.5, 1), (1.0, 0)])
def test_mains_leave_the_beats_as_they_are_and_are_told(
    ward: Ward, mains_hz: float, millivolts: float, quality: int
) -> None:
    hum = millivolts * np.sin(2 * np.pi * mains_hz * TIME).astype(np.float32)
    name = ward.play(NORMAL + hum[:, None])
    found = ward.seconds(name)
    # Where it ends, the last value goes on: on a hum that is an edge, and may be a beat.
    assert each_once(found[found < 29.9], HALF_A_MINUTE)
    told = {one.values["quality"] for one in ward.measures(name) if "quality" in one.values}
    assert told == {quality}
    assert ward.raised(name) == ({"poor_signal"} if quality == 0 else set())


@pytest.mark.skipif(LEADS < 2, reason="the heart model reads one lead")
@pytest.mark.parametrize("sign", [1, -1])
def test_leads_that_are_swapped_in_mid_record_have_the_same_beats(ward: Ward, sign: int) -> None:
    signal = NORMAL.copy()
    signal[TIME >= 15] = sign * signal[TIME >= 15, ::-1]
    name = ward.play(signal)
    assert each_once(ward.seconds(name), HALF_A_MINUTE)
    assert ward.alerts(name) == []


def test_a_clock_that_jumps_changes_no_beat_and_no_measure_of_the_heart(ward: Ward) -> None:
    told = []
    for jump_s in (0.0, 3600.0, -86_400.0):
        name = ward.open(LEADS, clock="device")
        for chunk in chunks(name, NORMAL, range(CHUNK, len(NORMAL), CHUNK)):
            late = jump_s * (chunk.index >= 15 * RATE)
            ward.send([msgspec.structs.replace(chunk, t_device=chunk.index / RATE + late)])
        beats, measures, _ = ward.known(name)
        told.append((beats, [one for one in measures if "clock_jump_s" not in one["values"]]))
        assert ("clock_jump" in ward.raised(name)) == (jump_s != 0)
        assert ward.raised(name) <= {"clock_jump"}
    assert told[0] == told[1] == told[2]


# --- pauses that are none ----------------------------------------------------------------------


def noise(millivolts: float, seed: int = 1) -> Signal:
    """Return muscle noise for half a minute, white up to 60 Hz, of one standard deviation."""
    rng = np.random.default_rng(seed)
    white = np.repeat(rng.normal(0, millivolts, (len(NORMAL) // 3, LEADS)), 3, axis=0)
    return white.astype(np.float32)


STANDING = ecg(rhythm((9.5, 75), (20.0, 0)), 30.0)
LAST = STANDSTILL[STANDSTILL < 10][-1]


@pytest.mark.parametrize("millivolts", [0.0, 0.05, 0.1])
def test_asystole_in_some_noise_is_one_in_time(ward: Ward, millivolts: float) -> None:
    name = ward.play(STANDING + noise(millivolts))
    raised = [one for one in ward.alerts(name, "asystole") if one.state == "active"]
    assert raised[0].seconds == pytest.approx(LAST + 4.0, abs=0.05)
    assert ward.alerts(name, "unclear_pause") == []


def test_a_pause_in_noise_as_steep_as_beats_is_an_asystole_once_the_noise_is_over(
    ward: Ward,
) -> None:
    """The heart stands still from 9.2 s on; what noise is taken for beats ends before 16 s."""
    loud = noise(0.3) * ((TIME > 10) & (TIME < 18))[:, None]
    name = ward.play(STANDING + loud)
    unclear = ward.alerts(name, "unclear_pause")
    (asystole,) = ward.alerts(name, "asystole")
    assert [one.state for one in unclear] == ["active", "resolved"]
    assert "asystole" in unclear[0].cannot_monitor
    assert "ventricular_fibrillation_suspected" not in unclear[0].cannot_monitor
    assert 18 < unclear[1].seconds <= asystole.seconds < 20.5


def test_an_electrode_that_came_off_an_ac_amplifier_is_no_asystole(ward: Ward) -> None:
    """The lead makes a step of 3 mV and creeps back, without a beat, as in records of MIT-BIH."""
    away = (TIME >= 10.3) & (TIME < 16)
    creeping = 3 * np.exp(-(TIME - 10.3) / 1.5)
    signal = np.where(away[:, None], creeping[:, None], NORMAL).astype(np.float32)
    name = ward.play(signal)
    (unclear,) = [one for one in ward.alerts(name, "unclear_pause") if one.state == "active"]
    assert set(unclear.cannot_monitor) >= MONITORED
    assert ward.alerts(name, "asystole") == []
    assert ward.alerts(name, "unclear_pause")[-1].state == "resolved"


# --- a rhythm that is not heard any more ---------------------------------------------------------


def test_fibrillation_of_the_atria_is_told_while_there_are_beats(ward: Ward) -> None:
    """Irregular beats without P waves for 40 s, and then none: what was heard then is old."""
    beats = 0.4 + np.cumsum(np.random.default_rng(0).uniform(0.4, 1.1, 52))
    beats = beats[beats < 40]
    name = ward.play(ecg(beats, 60.0, width=1.01))
    alerts = ward.alerts(name, "atrial_fibrillation_suspected")
    (raised,) = [one for one in alerts if one.state == "active"]
    assert raised.seconds < 40
    seconds = [one for one in ward.measures(name) if "flat_line" in one.values]
    told = [one.seconds for one in seconds if one.values.get("af_suspected", 0.0) >= 0.5]
    named = [one.seconds for one in seconds if "rhythm_a" in one.values]
    assert max(told) <= max(named) < beats[-1] + 3.5
    for one in seconds:
        if "rhythm_a" in one.values:
            assert one.values["af_suspected"] == one.values["rhythm_a"]


def test_no_rhythm_is_told_over_lost_samples_before_the_next_beat(ward: Ward) -> None:
    name = ward.open(LEADS)
    first = chunks(name, NORMAL[: 20 * RATE], range(CHUNK, 20 * RATE, CHUNK))
    after = ecg(np.zeros(0), 20.0)
    ward.send([*first, *chunks(name, after, range(CHUNK, 20 * RATE, CHUNK), 40, 25 * RATE)])
    named = [one.seconds for one in ward.measures(name) if "rhythm_n" in one.values]
    assert 19 <= max(named) <= 20


# --- leads that come off -----------------------------------------------------------------------


def off(signal: Signal, leads: list[int], rail_mv: float = 5.0) -> Signal:
    """Return a record of which some leads lie at a rail from 10 to 20 s."""
    changed = signal.copy()
    for lead in leads:
        changed[MIDDLE, lead] = rail_mv
    return changed


@pytest.mark.parametrize("rail_mv", [5.0, -5.0, 320.0])
def test_leads_that_come_off_and_on_again_cannot_be_monitored_and_are_no_asystole(
    ward: Ward, rail_mv: float
) -> None:
    name = ward.play(off(NORMAL, list(range(LEADS)), rail_mv))
    (raised,) = [one for one in ward.alerts(name, "lead_off") if one.state == "active"]
    assert 10 < raised.seconds <= 11
    assert set(raised.cannot_monitor) >= MONITORED
    assert ward.alerts(name, "lead_off")[-1].state == "resolved"
    assert {one.kind for one in ward.alerts(name)} == {"technical"}
    found = ward.seconds(name)
    heard = HALF_A_MINUTE[(HALF_A_MINUTE < 9.9) | (HALF_A_MINUTE > 22.4)]
    assert each_once(found[(found < 9.9) | (found > 22.4)], heard)
    # What the filters make of a step lasts for a second or two.
    assert np.sum((found > 12) & (found < 19.5)) == 0


@pytest.mark.skipif(LEADS < 2, reason="the heart model reads one lead")
@pytest.mark.parametrize("lead", range(LEADS))
def test_with_one_good_lead_the_beats_go_on(ward: Ward, lead: int) -> None:
    """But for some around the edges, as what the filters make of a step lasts for a second."""
    name = ward.play(off(NORMAL, [lead]))
    found = ward.seconds(name)
    calm = (np.abs(HALF_A_MINUTE - 10) > 1.2) & (np.abs(HALF_A_MINUTE - 20) > 1.2)
    near = np.abs(found[:, None] - HALF_A_MINUTE[calm]) < 0.05
    assert near.sum(axis=0).tolist() == [1] * int(calm.sum())
    assert np.sum(~near.any(axis=1)) <= np.sum(~calm) + 2
    assert ward.raised(name) == {"lead_lost"}
    assert not any(one.cannot_monitor for one in ward.alerts(name))


@pytest.mark.parametrize("leads", [list(range(LEADS)), [0]])
def test_a_lead_that_comes_off_resolves_no_asystole(ward: Ward, leads: list[int]) -> None:
    """The heart stands still from 9.5 to 30 s; what the step looks like is no beat to end that."""
    beats = rhythm((9.0, 75), (21.5, 0), (29.0, 75))
    signal = ecg(beats, 60.0)
    time = np.arange(len(signal)) / RATE
    for lead in leads:
        signal[(time >= 16) & (time < 22), lead] = 5.0
    name = ward.play(signal)
    states = [(one.state, one.seconds) for one in ward.alerts(name, "asystole")]
    assert states[0][0] == "active"
    assert [state for state, seconds in states if seconds < 30] == ["active"]
    assert states[-1][0] == "latched"  # once it beats again, and that can be believed
    if len(leads) == LEADS:
        (raised,) = [one for one in ward.alerts(name, "lead_off") if one.state == "active"]
        assert "asystole" in raised.cannot_monitor


# --- promises ----------------------------------------------------------------------------------


def test_any_chunks_tell_the_same(ward: Ward) -> None:
    signal = off(np.concatenate([NORMAL, ecg(STANDSTILL, 40.0)])[: len(NORMAL)], [0])
    signal = np.concatenate([signal, ecg(STANDSTILL, 35.0)])
    whole = ward.known(ward.play(signal, len(signal)))
    assert all(whole)
    for size in (1, 101):
        assert ward.known(ward.play(signal, size)) == whole


@pytest.mark.skipif(not MITDB.is_dir(), reason=f"no MIT-BIH records at {MITDB}")
@pytest.mark.filterwarnings("ignore:The inplace keyword")  # wfdb 4.3 under pandas 3
def test_any_chunks_of_a_real_minute_tell_the_same(ward: Ward) -> None:
    """Of record 208, with beats of several classes and alerts."""
    pytest.importorskip("wfdb")
    record = annotated.read(MITDB, "208", LEADS)
    signal = record.samples[600 * RATE : 660 * RATE]
    whole = ward.known(ward.play(signal, len(signal)))
    beats, _, alerts = whole
    assert len({beat["label"] for beat in beats}) > 1
    assert alerts
    for size in (1, 777):
        assert ward.known(ward.play(signal, size)) == whole


# When each condition holds, by the beats themselves: rule, from and to which second.
SICK = rhythm((20, 75), (20, 0), (20, 75), (40, 30), (20, 75), (30, 160), (20, 75))
TROUBLE = (("asystole", 20.5, 40.0), ("bradycardia", 71.0, 98.0), ("tachycardia", 127.5, 149.5))


def some_lost(
    name: str, signal: Signal, share: float, burst_s: float, seed: int
) -> tuple[list[m.Chunk], list[tuple[float, float]]]:
    """Return the chunks of a record that are left, and which seconds are lost."""
    rng = np.random.default_rng(seed)
    left: list[m.Chunk] = []
    lost: list[tuple[float, float]] = []
    until = 0.0
    for chunk in chunks(name, signal, range(CHUNK, len(signal), CHUNK)):
        begin = chunk.index / RATE
        if begin >= until and rng.random() < share * 0.5 / burst_s:
            until = begin + burst_s
        if begin < until:
            lost.append((begin, begin + 0.5))
        else:
            left.append(msgspec.structs.replace(chunk, seq=len(left)))
    return left, lost


@pytest.mark.parametrize(("share", "burst_s"), [(0.01, 0.5), (0.05, 0.5), (0.05, 2.0), (0.2, 2.0)])
def test_lost_chunks_resolve_no_alert_while_its_cause_lasts(
    ward: Ward, share: float, burst_s: float
) -> None:
    signal = ecg(SICK, 170.0)
    names = [ward.open(LEADS) for _ in range(4)]
    heard = [
        some_lost(name, signal, share, burst_s, seed) for seed, name in enumerate([*names[1:]])
    ]
    whole = chunks(names[0], signal, range(CHUNK, len(signal), CHUNK))
    for together in zip_longest(whole, *(left for left, _ in heard)):
        ward.driven.say("ward", *(chunk for chunk in together if chunk))
        ward.driven.run()
    over = [one for one in ward.alerts(names[0]) if one.state in OVER]
    assert {one.rule for one in over} >= {rule for rule, _, _ in TROUBLE}
    assert any(lost for _, lost in heard)
    for name, (_, lost) in zip(names[1:], heard, strict=True):
        assert ward.driven.told("ward", m.Error, name) == []
        over = [one for one in ward.alerts(name) if one.state in OVER]
        for rule, begin, end in TROUBLE:
            assert [one for one in over if one.rule == rule and begin <= one.seconds < end] == []
        for begin, end in lost:
            assert [one for one in over if begin < one.seconds < end] == []
