"""The rhythm of beats, against sums over the list of all beats; and the wing, however it is cut."""

import math
from statistics import median
from typing import NamedTuple

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import messages, model_file
from engine.heart.rhythm import Count, Interval, Rhythm, entropy
from engine.heart.wing import HeartWing
from engine.wing import Outputs, Rows
from tests import tiny
from tests.drive import Driven, chunks

RATE = 100


def beats_of(text: str, bpm: float = 60.0, begin: int = 100) -> list[tuple[int, str]]:
    """Return beats of some labels at an even rate."""
    return [(begin + round(60 * RATE / bpm * k), label) for k, label in enumerate(text)]


def rhythm_of(beats: list[tuple[int, str]]) -> Rhythm:
    rhythm = Rhythm(RATE)
    for position, label in beats:
        rhythm.beat(position, label)
    return rhythm


def tail(flags: list[bool]) -> tuple[int, bool]:
    """Return how many at the end are true, and whether one before them is not."""
    count = next((k for k, flag in enumerate(reversed(flags)) if not flag), len(flags))
    return count, count < len(flags)


def expected(beats: list[tuple[int, str]], since: int, now: int) -> dict[str, float]:
    """Return what beats since a loss say at a position, from the whole list of them."""
    at = np.array([position for position, _ in beats])
    label = np.array([name for _, name in beats])
    rr = np.diff(at)
    values: dict[str, float] = {}

    def told(name: str, flags: list[bool], least: int) -> None:
        count, exact = tail(flags)
        if exact or count >= least:
            values[name] = count

    told("ventricular_in_a_row", list(label == "V"), 3)
    told("slow_beats", list(6000 / rr < 40), 5)
    told("fast_beats", list(6000 / rr > 140), 17)
    is_v = label == "V"
    told("bigeminy_beats", list(is_v[1:] != is_v[:-1]), 6)
    run, _ = tail(list(is_v))
    if run >= 2:
        values["ventricular_run_bpm"] = 6000 / np.mean(rr[-(run - 1) :])
    recent = int(np.sum(is_v & (now - at <= 6000)))
    if now - since >= 6000 or recent >= 6:
        values["ventricular_per_minute"] = recent
    values["pause_s"] = max(0, now - at[-1]) / RATE
    long_ = np.flatnonzero(rr > 300)
    latest = rr[long_[-1] + 1 if len(long_) else 0 :][-8:]
    if len(latest) >= 2 and now - at[-1] <= 300:
        slow = len(latest) >= 4 and min(latest[-4:]) > 120
        values["heart_rate_bpm"] = 6000 / median((latest[-4:] if slow else latest).tolist())
    if now - since >= 30000:
        within = at >= now - 30000
        values["ectopic_share"] = float(np.mean(label[within] != "N"))
        normal = (label[1:] == "N") & (label[:-1] == "N") & (rr <= 300)
        nn = rr[normal & within[1:]]
        both = normal[1:] & normal[:-1] & within[2:]
        differences = np.abs(np.diff(rr))[both]
        if nn.sum() >= 15000 and len(differences):
            values["sdnn_ms"] = 10 * float(np.std(nn, ddof=1))
            values["rmssd_ms"] = 10 * math.sqrt(np.mean(differences**2.0))
            values["pnn50"] = float(np.mean(differences > 5))
    return values


@given(
    seed=st.integers(0, 10**6),
    usual=st.sampled_from([30, 42, 60, 100, 155]),
    ventricular=st.sampled_from([0.0, 0.1, 0.5, 0.95]),
    count=st.integers(1, 500),
    lost=st.integers(0, 60),
)
def test_measures_are_those_of_the_list_of_beats(
    seed: int, usual: int, ventricular: float, count: int, lost: int
) -> None:
    rng = np.random.default_rng(seed)
    rr = (usual * rng.lognormal(0, rng.choice([0.02, 0.3]), count)).astype(int) + 1
    rr[rng.random(count) < 0.02] += 400  # pauses
    labels = np.where(rng.random(count) < ventricular, "V", "N")
    labels[rng.random(count) < 0.05] = "S"
    rhythm, since, kept = Rhythm(RATE), 0, []
    for number, (position, label) in enumerate(zip(np.cumsum(rr).tolist(), labels, strict=True)):
        if number == lost and number:
            since, kept = position - 1, []
            rhythm.gap(since)
        rhythm.beat(position, str(label))
        kept.append((position, str(label)))
        if number % 7 == 0 or number == count - 1:
            now = position + int(rng.integers(0, 30))
            found = rhythm.measures(now)
            found.pop("af_suspected", None)
            # What was told before a loss is tested by itself.
            wanted = expected(kept, since, now)
            missing = {name for name in wanted.keys() - found.keys() if lost and number >= lost}
            assert {k: v for k, v in wanted.items() if k not in missing} == pytest.approx(found)
            assert missing <= {
                "ventricular_in_a_row",
                "slow_beats",
                "fast_beats",
                "bigeminy_beats",
                "ventricular_per_minute",
            }


def test_a_count_whose_beginning_is_not_known_is_told_once_it_says_something() -> None:
    count = Count(limit=3)
    known = []
    for goes_on in (True, True, True, True, False, True):
        count.step(goes_on)
        known.append(count.known)
    assert known == [None, None, 3, 4, 0, 1]


def test_a_count_after_lost_samples_is_not_told_below_what_it_was_before() -> None:
    rhythm = rhythm_of(beats_of("N" + "V" * 7))
    assert rhythm.measures(900)["ventricular_in_a_row"] == 7
    rhythm.gap(1000)
    told = [rhythm.beat(1100 + 100 * k, "V") for k in range(8)]
    assert [v.get("ventricular_in_a_row") for v in told] == [None] * 6 + [7, 8]
    assert rhythm.beat(2000, "N")["ventricular_in_a_row"] == 0
    rhythm.gap(2100)
    assert [rhythm.beat(2200 + 100 * k, "V").get("ventricular_in_a_row") for k in range(3)] == [
        None,
        None,
        3,
    ]


def test_ventricular_beats_of_part_of_a_minute_are_told_only_if_they_are_many() -> None:
    rhythm = rhythm_of(beats_of("NV" * 10))
    assert rhythm.measures(2100)["ventricular_per_minute"] == 10
    rhythm.gap(2150)
    for position, label in beats_of("NV" * 9, begin=2200):
        rhythm.beat(position, label)
    assert "ventricular_per_minute" not in rhythm.measures(4000)  # nine, and there were ten
    rhythm.beat(4000, "V")
    assert rhythm.measures(4000)["ventricular_per_minute"] == 10
    assert rhythm.measures(2150 + 6000)["ventricular_per_minute"] == 10
    assert rhythm.measures(2150 + 6200)["ventricular_per_minute"] < 10


def test_a_beat_tells_at_once_what_changed_for_a_rule() -> None:
    rhythm = Rhythm(RATE)
    told = [rhythm.beat(position, label) for position, label in beats_of("NNNVVVN", bpm=120)]
    runs = [v.get("ventricular_in_a_row") for v in told]
    assert runs == [0, 0, None, 1, 2, 3, 0]  # nothing changed with the third
    assert told[5]["ventricular_run_bpm"] == pytest.approx(120)
    assert told[0]["pause_s"] == 0


def test_a_pause_is_told_from_three_seconds_on_at_fifths_of_a_second_and_that_it_is_over() -> None:
    rhythm = rhythm_of([(100, "N"), (200, "N")])
    ticks = []
    while rhythm.due is not None:
        ticks.append((rhythm.due, rhythm.pause()["pause_s"]))
    assert ticks == [(200 + 20 * k, k / 5) for k in range(15, 31)]
    assert (600, 4.0) in ticks
    assert rhythm.measures(1000)["pause_s"] == 8.0
    assert "heart_rate_bpm" not in rhythm.measures(1000)
    assert rhythm.beat(1010, "N")["pause_s"] == 0
    assert "pause_s" not in rhythm.beat(1110, "N")


def test_a_pause_whose_begin_is_not_known_is_told_from_asystole_on_and_not_below_the_last() -> None:
    rhythm = Rhythm(RATE)
    assert (rhythm.due, rhythm.pause()) == (400, {"pause_s": 4.0})
    assert "pause_s" not in Rhythm(RATE).measures(350)
    assert Rhythm(RATE).measures(450)["pause_s"] == 4.5
    rhythm = rhythm_of([(100, "N")])
    rhythm.gap(1000)  # nine seconds so far
    assert rhythm.due is None
    assert "pause_s" not in rhythm.measures(1899)
    assert rhythm.measures(1900)["pause_s"] == 9.0
    assert rhythm.beat(1950, "N")["pause_s"] == 0


def test_a_beat_found_late_before_lost_samples_is_not_joined_to_those_after() -> None:
    rhythm = rhythm_of(beats_of("NNN"))
    rhythm.gap(400)
    assert rhythm.beat(390, "N") == {}
    rhythm.beat(450, "N")
    assert rhythm.heart_rate_bpm is None


def test_variability_is_that_of_hand_computed_intervals() -> None:
    # 80, 90, 80, 90 ... hundredths: differences of 100 ms, spread of 50 ms.
    positions = np.cumsum([10] + [80, 90] * 190).tolist()
    rhythm = rhythm_of([(at, "N") for at in positions])
    values = rhythm.measures(positions[-1])
    assert values["rmssd_ms"] == pytest.approx(100)
    assert values["sdnn_ms"] == pytest.approx(50, rel=0.01)
    assert values["pnn50"] == 1
    assert values["ectopic_share"] == 0
    early = rhythm_of([(at, "N") for at in positions[:-50]])
    assert not {"rmssd_ms", "ectopic_share"} & early.measures(29_999).keys()


def test_variability_agrees_with_sleepecg(rng: np.random.Generator) -> None:
    sleepecg = pytest.importorskip("sleepecg")
    rr = 2 * rng.normal(40, 3, 400).astype(int)  # no two differ by exactly 50 ms
    at = np.concatenate([[0], np.cumsum(rr)])
    at = at[at < 300 * RATE]
    values = rhythm_of([(int(p), "N") for p in at]).measures(300 * RATE)
    record = sleepecg.SleepRecord(sleep_stage_duration=30, heartbeat_times=at / RATE)
    features, _, names = sleepecg.extract_features(
        [record],
        lookforward=300,
        feature_selection=["SDNN", "RMSSD", "pNN50"],
        max_nans=1,
    )
    found = dict(zip(names, features[0][0].tolist(), strict=True))
    assert values["sdnn_ms"] == pytest.approx(1000 * found["SDNN"])
    assert values["rmssd_ms"] == pytest.approx(1000 * found["RMSSD"])
    assert values["pnn50"] == pytest.approx(found["pNN50"])


def test_sample_entropy_is_that_of_a_plain_count(rng: np.random.Generator) -> None:
    lengths = rng.integers(50, 110, 32).tolist()
    follows = [False, *(rng.random(31) < 0.9).tolist()]
    intervals = [Interval(k, n, f) for k, (n, f) in enumerate(zip(lengths, follows, strict=True))]
    a = b = 0.5
    pairs = [k for k in range(31) if follows[k + 1]]
    for i in pairs:
        for j in pairs:
            if i < j and abs(lengths[i] - lengths[j]) <= 5:
                b += 1
                a += abs(lengths[i + 1] - lengths[j + 1]) <= 5
    wanted = -math.log(a / b) + math.log(0.1) - math.log(np.mean(lengths) / RATE)
    assert entropy(intervals, RATE) == pytest.approx(wanted)


def test_irregular_intervals_suspect_fibrillation_of_the_atria_and_regular_ones_do_not(
    rng: np.random.Generator,
) -> None:
    def suspected(rr: np.ndarray, labels: str = "N") -> float | None:
        at = np.cumsum(rr.astype(int)).tolist()
        beats = [(p, labels[k % len(labels)]) for k, p in enumerate(at)]
        return rhythm_of(beats).measures(at[-1]).get("af_suspected")

    irregular = suspected(70 * rng.lognormal(0, 0.25, 60))
    assert irregular is not None
    assert irregular > 0.5
    assert suspected(rng.normal(80, 2, 60)) == 0
    assert suspected(80 + 10 * np.sin(np.arange(60) / 2)) == 0  # breathing
    assert suspected(np.tile([60, 100], 40)) == 0  # two in turn
    assert suspected(np.tile([55, 105, 80], 40), labels="VNN") is None  # too few that follow
    assert suspected(70 * rng.lognormal(0, 0.25, 20)) is None


def test_what_is_carried_is_plain_data_and_can_be_put_back(rng: np.random.Generator) -> None:
    beats = [(int(p), str(rng.choice(list("NNNSV")))) for p in np.cumsum(rng.integers(40, 99, 400))]
    rhythm, other = Rhythm(RATE), Rhythm(RATE)
    for number, (position, label) in enumerate(beats):
        if number % 40 == 0:
            data = msgspec.msgpack.decode(msgspec.msgpack.encode(rhythm))
            rhythm = msgspec.convert(data, Rhythm)
        assert rhythm.beat(position, label) == other.beat(position, label)
        assert rhythm.measures(position) == other.measures(position)


# --- the wing ----------------------------------------------------------------------------------


class Timeline(NamedTuple):
    name: str = "s"
    rate_hz: float = float(RATE)

    def index_at(self, position: int) -> int:
        return position

    def needed_until(self, position: int) -> int:
        return position


class Bed:
    """A heart wing that is played some records side by side."""

    def __init__(self, hop: int, streams: int = 1) -> None:
        spec = tiny.spec(pipeline="heart", hop_samples=hop, look_ahead_samples=8)
        self.wing, self.hop = HeartWing(spec, streams), hop
        self.told: list[list[messages.Message]] = [[] for _ in range(streams)]
        for slot in range(streams):
            self.wing.reset(slot)

    def play(
        self, records: list[tuple[np.ndarray, Outputs]], start: int, end: int, hops: int
    ) -> None:
        count = len(records)
        for t in range(start, end, hops * self.hop):
            until = min(t + hops * self.hop, end)
            frames = slice(t // tiny.STRIDE, until // tiny.STRIDE)
            outputs = {
                name: np.stack([made[name][frames] for _, made in records])
                for name in ("beat", "beat_class")
            }
            samples = np.stack([signal[t:until, None] for signal, _ in records])
            zeros = np.zeros(count, np.int64)
            ends = np.full(count, len(records[0][0]) - 37)
            slots = np.arange(count)
            rows = Rows(
                slots,
                (until - t) // self.hop,
                zeros + t,
                zeros,
                ends,
                [Timeline()] * count,
                samples,
            )
            for row, message in self.wing.push(rows, outputs):
                self.told[row].append(message)


def record(seed: int, length: int) -> tuple[np.ndarray, Outputs]:
    """Return a signal and what a model might say of it: beats now and then, and long pauses."""
    rng = np.random.default_rng(seed)
    signal = rng.normal(0, 0.02, length).astype(np.float32)
    p = np.zeros(length // tiny.STRIDE, np.float32)
    classes = rng.random((len(p), len(tiny.LABELS))).astype(np.float32)
    place = 20
    while place < len(p):
        p[place] = rng.uniform(0.5, 1)
        p[place + 1 : place + rng.integers(1, 4)] = rng.uniform(0, 0.5)
        signal[place * tiny.STRIDE - 8] += 1
        place += int(rng.choice([9, 20, 25, 130, 220], p=[0.3, 0.3, 0.3, 0.05, 0.05]))
    return signal, {"beat": p, "beat_class": classes}


@given(seed=st.integers(0, 10**6), hop=st.sampled_from([4, 20, 40, 120]), hops=st.integers(1, 7))
def test_any_step_tells_the_same_messages_in_the_same_order(seed: int, hop: int, hops: int) -> None:
    length = 2520
    records = [record(seed + k, length) for k in range(3)]
    together = Bed(hop, 3)
    together.play(records, 0, length, hops)
    for k, one in enumerate(records):
        alone = Bed(4)
        alone.play([one], 0, length, 1)
        assert together.told[k] == alone.told[0]
        kinds = [type(message) for message in alone.told[0]]
        assert kinds.count(messages.Measures) >= length // RATE - 1


def test_the_wings_memory_can_be_put_back_in_another_row() -> None:
    records = [record(7, 2520), record(8, 2520)]
    whole, first, second = Bed(20, 2), Bed(20, 2), Bed(20, 2)
    whole.play(records, 0, 2520, 1)
    first.play(records, 0, 1260, 1)
    for slot in range(2):
        second.wing.put(slot, first.wing.take(1 - slot))
    second.play(records[::-1], 1260, 2520, 1)
    for slot in range(2):
        assert first.told[slot] + second.told[1 - slot] == whole.told[slot]


def test_asystole_is_known_four_tenths_of_a_second_after_its_four_seconds() -> None:
    signal, made = record(1, 2520)
    made["beat"][:] = 0
    made["beat"][25] = 1.0  # the only beat
    bed = Bed(20)
    bed.play([(signal, made)], 0, 2520, 1)
    measures = [m for m in bed.told[0] if isinstance(m, messages.Measures)]
    first = next(m for m in measures if m.values.get("pause_s", 0) >= 4)
    beat = 25 * tiny.STRIDE - 8
    assert first.index == beat + 4 * RATE
    assert first.decided_at - first.index <= 0.4 * RATE


def test_a_second_tells_of_the_signal_and_of_the_beats_known_by_its_end() -> None:
    bed = Bed(20)
    signal, made = record(3, 1000)
    bed.play([(signal, made)], 0, 1000, 1)
    seconds = [
        m for m in bed.told[0] if isinstance(m, messages.Measures) and "flat_line" in m.values
    ]
    assert (
        [m.index for m in seconds] == [m.decided_at for m in seconds] == list(range(100, 901, 100))
    )
    beats = [m for m in bed.told[0] if isinstance(m, messages.Beat)]
    for one in seconds:
        known = [beat.index for beat in beats if beat.decided_at <= one.index]
        if known:
            wanted = max(0, one.index - 32 - known[-1]) / RATE
            assert one.values["pause_s"] == pytest.approx(wanted)


def test_any_chunks_tell_the_same_measures_before_and_after_lost_samples(
    rng: np.random.Generator,
) -> None:
    t = np.arange(250 * 14) / 250
    ecg = 1.2 * np.exp(-(((t % 0.9 - 0.4) / 0.015) ** 2)) + rng.normal(0, 0.02, len(t))
    ecg[(t > 4) & (t < 9.5)] = 0.0  # asystole
    before, after = np.split(ecg.astype(np.float32), [2807])

    def told(size: int) -> list[messages.Measures]:
        driven = Driven(model_file.find("heart"))
        driven.open("a", "s", "heart", rate_hz=250.0)
        first = chunks("s", before, range(size, len(before), size))
        second = chunks("s", after, range(size, len(after), size), len(first), len(before) + 500)
        for chunk in [*first, *second]:
            driven.say("a", chunk)
            driven.run()
        driven.say("a", messages.Flush("s"))
        driven.run()
        # The session tells of gaps by itself, as chunks come.
        return [one for one in driven.told("a", messages.Measures) if "gap_s" not in one.values]

    whole = told(500)
    assert told(7) == told(83) == whole
    assert max(one.values.get("pause_s", 0) for one in whole) > 5
