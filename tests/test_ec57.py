"""Scores against plain counts by hand, WFDB's own comparison, and the formulas of ``bxb``."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import ec57
from engine.ec57 import LABELS, Alarms, Beats, Episode, Reference, Table, Transition

wfdb = pytest.importorskip("wfdb.processing", reason="needs the extra 'ecg'")

RATE_HZ = 100
WINDOW = 15
SPARSE = st.lists(st.integers(2 * WINDOW + 1, 300), min_size=1, max_size=40)


def compared_by_wfdb(annotated: np.ndarray, found: np.ndarray) -> list[int]:
    # WFDB counts a distance below its window, not one that equals it.
    made = wfdb.compare_annotations(annotated, found, WINDOW + 1)
    return made.matching_sample_nums.tolist()


def beats(samples: list[int], labels: str | None = None) -> Beats:
    labels = labels or "N" * len(samples)
    return Beats(
        np.array(samples, np.int64),
        np.array([LABELS.index(label) for label in labels], np.int64),
    )


def reference(
    samples: list[int],
    labels: str | None = None,
    length: int | None = None,
    flutter: list[tuple[int, int]] | None = None,
    rhythms: list[tuple[str, int, int]] | None = None,
) -> Reference:
    end = samples[-1] + 1 if length is None else length
    return Reference(RATE_HZ, end, beats(samples, labels), flutter or [], rhythms or [])


# Matching


@given(annotated=SPARSE, found=SPARSE)
def test_beats_two_windows_apart_match_as_wfdb_matches_them(
    annotated: list[int], found: list[int]
) -> None:
    one, other = np.cumsum(annotated), np.cumsum(found)
    assert ec57.match(one, other, WINDOW).tolist() == compared_by_wfdb(one, other)


def test_as_many_beats_match_as_by_wfdb_where_hearts_beat_and_detectors_err() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        annotated = np.cumsum(rng.integers(33, 110, 60))
        found = annotated[rng.random(60) > 0.1]
        found = np.sort(found + rng.integers(-5, 6, len(found)))
        found = np.unique(np.concatenate([found, rng.integers(0, annotated[-1], 5)]))
        partner = ec57.match(annotated, found, WINDOW)
        hit = partner >= 0
        assert hit.sum() == np.sum(np.array(compared_by_wfdb(annotated, found)) >= 0)
        assert len(set(partner[hit].tolist())) == hit.sum()
        assert np.abs(annotated[hit] - found[partner[hit]]).max() <= WINDOW


def test_a_beat_goes_to_the_nearer_of_two_as_in_bxb() -> None:
    match = ec57.match
    assert match(np.array([100, 112]), np.array([110]), WINDOW).tolist() == [-1, 0]
    assert match(np.array([110]), np.array([100, 112]), WINDOW).tolist() == [1]
    assert match(np.array([100, 200]), np.array([115, 216]), WINDOW).tolist() == [0, -1]
    assert match(np.array([100]), np.empty(0, np.int64), WINDOW).tolist() == [-1]


# Classes


def test_a_comparison_counts_each_pair_each_miss_and_each_false_beat_once() -> None:
    annotated = beats([100, 200, 300, 400, 500], "NSVFQ")
    found = beats([101, 199, 250, 300, 402], "NNVVV")
    table = ec57.compare(annotated, found, WINDOW)
    expected = np.zeros((6, 6), int)
    for row, column in ("NN", "SN", "VV", "FV", "Q-", "-V"):
        expected["NSVFQ-".index(row), "NSVFQ-".index(column)] += 1
    assert table.counts.tolist() == expected.tolist()
    assert (table.hits, table.missed, table.false) == (4, 1, 1)
    assert (table.sensitivity, table.predictivity, table.f1) == (4 / 5, 4 / 5, 4 / 5)
    assert ec57.gross([table, table]).counts.tolist() == (2 * expected).tolist()


def test_what_is_left_out_takes_pairs_by_their_annotated_beat_and_false_beats_by_themselves() -> (
    None
):
    annotated = beats([95, 199, 300, 400])
    found = beats([101, 201, 250, 305, 399])
    # From 100: the pair 95-101 is gone. In [200, 310): 199-201 stays, 250 and 300-305 are gone.
    table = ec57.compare(annotated, found, WINDOW, begin=100, left_out=[(200, 310)])
    assert (table.hits, table.missed, table.false) == (2, 0, 0)
    assert ec57.widened([(200, 310)], 5) == [(195, 315)]


def test_the_figures_of_v_and_s_are_those_of_bxb() -> None:
    n = np.random.default_rng(1).integers(1, 99, (6, 6))
    n[5, 5] = 0
    cell = {
        one + other.lower(): int(n[row, column])
        for row, one in enumerate("NSVFQO")
        for column, other in enumerate("NSVFQO")
    }

    def total(cells: str) -> int:
        return sum(cell[one] for one in cells.split())

    veb, sveb = Table(n).of("V"), Table(n).of("S")
    missed = total("Vn Vs Vf Vq Vo")
    false = total("Nv Sv Ov")
    negative = total("Nn Ns Nf Nq Sn Ss Sf Sq Fn Fs Ff Fq Qn Qs Qf Qq On Os Of Oq")
    assert veb.sensitivity == cell["Vv"] / (cell["Vv"] + missed)
    assert veb.predictivity == cell["Vv"] / (cell["Vv"] + false)
    assert veb.false_positive_rate == false / (false + negative)
    assert veb.f1 == 2 * cell["Vv"] / (2 * cell["Vv"] + false + missed)
    strict = false + total("Fv Qv")
    assert veb.f1_strict == 2 * cell["Vv"] / (2 * cell["Vv"] + strict + missed)
    missed, false = total("Sn Sv Sf Sq So"), total("Ns Vs Fs Os")
    assert sveb.sensitivity == cell["Ss"] / (cell["Ss"] + missed)
    assert sveb.predictivity == cell["Ss"] / (cell["Ss"] + false)


def test_a_class_that_is_not_there_has_no_figures() -> None:
    nothing = ec57.gross([])
    assert math.isnan(nothing.f1)
    assert math.isnan(nothing.of("V").f1)
    assert math.isnan(nothing.of("V").sensitivity)


# Heart rate


def test_heart_rates_are_compared_in_windows_that_have_one_in_both_lists() -> None:
    annotated = np.arange(0, 4000, 100)  # 60 bpm for 40 s
    found = np.concatenate([np.arange(0, 1000, 100), np.arange(1000, 2000, 50), [2100, 3000]])
    # 60 in the first window, 120 in the second, one beat in the third and fourth.
    assert ec57.rate_errors(annotated, found, RATE_HZ).tolist() == pytest.approx([0, 60])
    left_out = [(1500, 1600)]
    assert ec57.rate_errors(annotated, found, RATE_HZ, left_out).tolist() == pytest.approx([0])


def test_a_told_rate_is_compared_with_the_last_eight_annotated_intervals() -> None:
    intervals = [100, 100, 50, 60, 70, 80, 90, 100, 110, 120, 130]
    annotated = np.cumsum(intervals)
    partner = np.full(len(annotated), -1)
    partner[[1, 2, 10]] = [0, 1, 2]
    told = np.array([60.0, 61.0, 64.0])
    # At the second beat one interval is known; at the third 100 and 50; at the last 60 to 130.
    expected = [61 - 6000 / 75, 64 - 6000 / 95]
    assert ec57.told_rate_errors(annotated, partner, told, RATE_HZ).tolist() == pytest.approx(
        expected
    )


# Episodes


def test_a_pause_lasts_from_the_beat_before_it_to_the_one_behind_it_or_the_end() -> None:
    made = reference([0, 399, 799, 900], length=1300)
    assert ec57.pauses(made) == [Episode(399, 799, 799), Episode(900, 1300, 1300)]


def test_bradycardia_is_five_slow_beats_in_a_row() -> None:
    slow = [100 + 151 * k for k in range(6)]  # the first is the one before
    (episode,) = ec57.slow_beats(reference([0, *slow, slow[-1] + 100]))
    assert episode == Episode(slow[1], slow[5], slow[5])
    assert ec57.slow_beats(reference([0, *slow[:5], slow[4] + 150])) == []


def test_tachycardia_is_seventeen_fast_beats_in_a_row() -> None:
    fast = [100 + 42 * k for k in range(20)]
    (episode,) = ec57.fast_beats(reference([0, *fast]))
    assert episode == Episode(fast[1], fast[17], fast[19])
    assert ec57.fast_beats(reference([0, *fast[:17]])) == []


def test_a_ventricular_run_counts_v_beats_and_perhaps_their_rate() -> None:
    samples = [0, 100, 160, 220, 280, 340, 500, 600]
    made = reference(samples, "NVVVVVNV")
    assert ec57.ventricular_run(made, 5) == [Episode(100, 340, 340)]
    assert ec57.ventricular_run(made, 6) == []
    assert ec57.ventricular_run(made, 5, above_bpm=100) == []  # 60 samples apart: 100 bpm
    assert ec57.ventricular_run(made, 5, above_bpm=99) == [Episode(100, 340, 340)]


def test_frequent_is_six_v_beats_in_a_minute_until_the_first_of_the_last_six_is_a_minute_old() -> (
    None
):
    samples = [1000 * k for k in range(8)]
    made = reference(samples, "V" * 8, length=20_000)
    assert ec57.frequent_ventricular(made) == [Episode(5000, 5000, 8000)]
    assert ec57.frequent_ventricular(reference([1201 * k for k in range(8)], "V" * 8)) == []


def test_annotated_rhythms_and_flutter_are_episodes_as_they_are() -> None:
    made = reference(
        [0, 2000],
        flutter=[(100, 499), (600, 1000)],
        rhythms=[("(N", 0, 50), ("(AFIB", 50, 90), ("(AFL", 90, 100), ("(B", 1100, 2001)],
    )
    assert ec57.fibrillation(made) == [Episode(600, 1000, 1000)]
    assert ec57.rhythm(made, "(AFIB", "(AFL") == [Episode(50, 50, 90), Episode(90, 90, 100)]
    assert ec57.rhythm(made, "(B") == [Episode(1100, 1100, 2001)]


# Alerts

PAUSE = reference([0, 100, 1000, 1100, 4000], length=4100)  # asystole from 100, and from 1100


def alert(*changes: tuple[str, int], rule: str = "asystole") -> list[Transition]:
    return [Transition(rule, state, sample - 40, sample) for state, sample in changes]


def test_an_alert_finds_the_episode_that_it_becomes_active_in() -> None:
    told = alert(("pending", 450), ("active", 540), ("resolved", 1040))
    found = ec57.alarms("asystole", PAUSE, told)
    assert (found.episodes, found.found, found.alerts, found.false) == (2, 1, 1, 0)
    assert found.sensitivity == 0.5
    assert found.latencies_s == pytest.approx((4.4,))
    assert found.delays_s == pytest.approx((0.4,))
    assert found.resolved_early == 0


@pytest.mark.parametrize(("known", "is_found"), [(99, False), (2000, True), (2001, False)])
def test_ten_seconds_after_an_episode_is_in_time(known: int, is_found: bool) -> None:
    one = reference([0, 100, 1000, 1100], length=1200)
    found = ec57.alarms("asystole", one, alert(("active", known), ("resolved", known + 10)))
    assert (found.found, found.false) == ((1, 0) if is_found else (0, int(known != 99)))


def test_an_alert_of_no_episode_is_false_and_one_from_before_is_still_active() -> None:
    one = reference([*range(0, 3000, 50), 3400, 3450], length=3460)
    told = alert(("active", 100), ("resolved", 200), ("active", 2900), ("latched", 3500))
    found = ec57.alarms("asystole", one, told)
    assert found == Alarms(episodes=1, found=0, still_active=1, alerts=2, false=1, resolved_early=0)
    assert found.sensitivity == 1.0


def test_resolving_that_goes_back_to_active_is_one_alert_and_a_latched_one_is_raised_anew() -> None:
    back = alert(("active", 540), ("resolving", 700), ("active", 800), ("resolved", 1100))
    assert ec57.alarms("asystole", PAUSE, back).alerts == 1
    anew = alert(("active", 540), ("latched", 1100), ("active", 1540), ("latched", 4040))
    assert ec57.alarms("asystole", PAUSE, anew).found == 2


def test_an_alert_that_is_resolved_while_the_episode_goes_on_is_early() -> None:
    told = alert(("active", 540), ("resolved", 700), ("active", 1540), ("resolved", 4030))
    assert ec57.alarms("asystole", PAUSE, told).resolved_early == 1


def test_in_fibrillation_neither_a_pause_nor_an_alert_counts_if_it_is_left_out() -> None:
    one = reference([0, 100, 2000, 2100], length=2200, flutter=[(150, 1950)])
    told = alert(("active", 540), ("resolved", 2050))
    tachycardia = alert(("active", 600), ("resolved", 700), rule="tachycardia")
    assert ec57.alarms("asystole", one, told).found == 1
    assert ec57.alarms("tachycardia", one, tachycardia).false == 1
    without = ec57.alarms("asystole", one, told, one.flutter)
    assert (without.episodes, without.false) == (0, 0)
    assert ec57.alarms("tachycardia", one, tachycardia, one.flutter).false == 0
    name = "ventricular_fibrillation_suspected"
    suspected = alert(("active", 700), ("resolved", 2050), rule=name)
    assert ec57.alarms(name, one, suspected, one.flutter).found == 1


def test_other_rules_do_not_count() -> None:
    assert ec57.alarms("asystole", PAUSE, alert(("active", 540), rule="bradycardia")).alerts == 0


def test_an_alert_is_resolved_unheard_if_it_is_over_about_or_upon_lost_samples() -> None:
    told = alert(("resolved", 1000), ("latched", 2039), ("active", 1500), ("resolved", 3000))
    # They are about 960, 1999, 1460 and 2960.
    assert ec57.resolved_unheard(told, [(970, 1000)]) == 1
    assert ec57.resolved_unheard(told, [(961, 970), (1460, 1550)]) == 0
    assert ec57.resolved_unheard(told, [(1990, 2000)]) == 1
    assert ec57.resolved_unheard(told, []) == 0


def test_counts_of_records_add_up() -> None:
    one = Alarms(1, 2, 3, 4, 5, 6, (1.0,), (2.0,))
    assert one.plus(one) == Alarms(2, 4, 6, 8, 10, 12, (1.0, 1.0), (2.0, 2.0))


def test_every_definition_finds_nothing_in_a_quiet_record() -> None:
    quiet = reference([80 * k for k in range(100)], rhythms=[("(N", 0, 8000)])
    assert [one.find(quiet) for one in ec57.DEFINITIONS.values()] == [[]] * len(ec57.DEFINITIONS)
