"""The engine without sockets: any split, neighbours, reuse, gaps, flushes, limits; bit for bit."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine import messages as m
from engine import model_file
from engine.config import Subjects
from engine.scheduler import Batch
from tests import plain, tiny
from tests.drive import Driven, chunks
from tests.plain import Results

HOP = tiny.HOP
OUTPUTS = ("beat", "beat_class")
Models = Callable[..., Path]


class Kind(NamedTuple):
    """A model of the tests, and how many equal rows the plain loop needs for its bits."""

    name: str
    cell: str
    time: int | str = "samples"
    copies: int = 1


KINDS = [Kind("lstm", "LSTM"), Kind("gru", "GRU"), Kind("rnn", "RNN", copies=2)]
KINDS.append(Kind("fixed", "LSTM", HOP))  # one hop a step


def noise(count: int, seed: int = 0, loud: float = 3.0) -> NDArray[np.float32]:
    return (loud * np.random.default_rng(seed).standard_normal(count)).astype(np.float32)


def reference(path: Path, signal: NDArray[np.float32], copies: int = 1) -> list[Results]:
    return plain.loop(path, plain.cut(signal, HOP, HOP), copies)


def ends(count: int, first: int = 0) -> list[int]:
    """Return the index after each whole hop of so many samples."""
    return list(range(first + HOP, first + count + 1, HOP))


def values(scores: m.Scores) -> NDArray[np.float32]:
    return np.frombuffer(scores.data, "<f4").reshape(scores.shape)


def assert_scores(
    driven: Driven, name: str, expected: list[Results], indices: list[int], peer: str = "a"
) -> None:
    """Compare all scores of a stream with those of plain loops, bit for bit."""
    told = driven.told(peer, m.Scores, name)
    for output in OUTPUTS:
        mine = [scores for scores in told if scores.output == output]
        assert [scores.index for scores in mine] == indices
        for scores, result in zip(mine, expected, strict=True):
            np.testing.assert_array_equal(values(scores), result[output])


def deliver(driven: Driven, peer: str, requests: Iterable[m.Message], eager: bool = True) -> None:
    """Send messages, and let the engine run after each or only after all."""
    for request in requests:
        driven.say(peer, request)
        if eager:
            driven.run()
    driven.run()


cuts = st.lists(st.integers(0, 400), max_size=12)


# --- any split is the whole ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@given(length=st.integers(0, 400), cuts=cuts, eager=st.booleans())
def test_any_split_gives_the_scores_of_the_plain_loop(
    models: Models, kind: Kind, length: int, cuts: list[int], eager: bool
) -> None:
    path = models(kind.name, kind.cell, kind.time)
    driven = Driven(path, credit_s=10.0)
    signal = noise(length)
    driven.open("a", "s", kind.name)
    deliver(driven, "a", chunks("s", signal, cuts), eager)
    assert_scores(driven, "s", reference(path, signal, kind.copies), ends(length))


@given(length=st.integers(60, 400), cuts=cuts, eager=st.booleans())
def test_any_split_gives_the_scores_of_overlapping_windows(
    wide_path: Path, length: int, cuts: list[int], eager: bool
) -> None:
    driven = Driven(wide_path, credit_s=10.0)
    signal = noise(length)
    driven.open("a", "s", "wide")
    deliver(driven, "a", chunks("s", signal, cuts), eager)
    expected = plain.loop(wide_path, plain.cut(signal, HOP, 60))
    assert_scores(driven, "s", expected, ends(length))


@pytest.mark.parametrize("rate_hz", [250, 360, 44])
@given(length=st.integers(1, 400), cuts=cuts, eager=st.booleans())
def test_any_split_at_another_rate_gives_the_scores_of_the_whole_record_resampled(
    tiny_path: Path, rate_hz: int, length: int, cuts: list[int], eager: bool
) -> None:
    signal = noise(length)
    driven = Driven(tiny_path, credit_s=20.0)
    driven.open("a", "s", rate_hz=float(rate_hz))
    deliver(driven, "a", [*chunks("s", signal, cuts), m.Flush("s", 1)], eager)
    at_100_hz = plain.resampled(signal, 100, rate_hz)
    expected = reference(tiny_path, plain.tail_padded(at_100_hz, HOP))
    told = [s for s in driven.told("a", m.Scores, "s") if s.output == "beat"]
    for scores, result in zip(told, expected, strict=True):
        np.testing.assert_allclose(values(scores), result["beat"], atol=1e-4)
    true = np.minimum(np.arange(1, len(told) + 1) * HOP, len(at_100_hz)) * rate_hz / 100
    assert np.abs(true - [scores.index for scores in told]).max() <= 0.5


@given(cuts=cuts)
def test_any_split_at_another_rate_gives_the_same_bits(tiny_path: Path, cuts: list[int]) -> None:
    signal = noise(400)
    told = []
    for places in ([], cuts):
        driven = Driven(tiny_path, credit_s=10.0)
        driven.open("a", "s", rate_hz=250.0)
        deliver(driven, "a", chunks("s", signal, places))
        told.append(driven.told("a", m.Scores, "s"))
    assert told[0]
    assert told[0] == told[1]


@given(length=st.integers(0, 400), cuts=cuts, eager=st.booleans())
def test_audio_is_the_overlap_add_of_the_whole_record(
    smoother: tuple[Path, int], length: int, cuts: list[int], eager: bool
) -> None:
    path, window = smoother
    delay = window - HOP
    signal = noise(length)
    driven = Driven(path, credit_s=10.0)
    driven.open("a", "s", "smoother")
    deliver(driven, "a", [*chunks("s", signal, cuts), m.Flush("s", 1)], eager)
    told = driven.told("a", m.Samples, "s")
    found = np.concatenate([noise(0), *(np.frombuffer(one.data, "<f4") for one in told)])
    lengths = [len(one.data) // 4 for one in told]
    assert [one.index for one in told] == [sum(lengths[:k]) for k in range(len(told))]
    assert len(found) == length
    if length:
        padded = plain.tail_padded(signal, HOP, delay)
        windows = plain.loop(path, plain.cut(padded, HOP, window), copies=2)
        whole = plain.overlap_add([each["y"][:, 0] for each in windows], HOP)
        np.testing.assert_array_equal(found, whole[delay : delay + length])


@given(length=st.integers(200, 800), cuts=cuts, eager=st.booleans())
def test_beats_are_those_of_a_search_of_the_whole_record(
    heart_path: Path, length: int, cuts: list[int], eager: bool
) -> None:
    signal = noise(length, seed=4, loud=1.0)
    driven = Driven(heart_path, credit_s=10.0)
    driven.open("a", "s", "tinyheart", index=5000)
    deliver(driven, "a", [*chunks("s", signal, cuts, index=5000), m.Flush("s", 1)], eager)
    look_ahead, refractory = 8, 20
    padded = plain.tail_padded(signal, HOP, look_ahead + refractory)
    results = reference(heart_path, padded)
    p = np.concatenate([result["beat"] for result in results])
    classes = np.concatenate([result["beat_class"] for result in results])
    place = tiny.STRIDE * np.arange(len(p)) - look_ahead
    expected = [
        (5000 + place[peak], tiny.LABELS[classes[peak].argmax()], p[peak])
        for peak, _ in plain.peaks(p, place, refractory)
        if 0 <= place[peak] < length
    ]
    beats = driven.told("a", m.Beat, "s")
    assert len(beats) > length // 200
    assert [(beat.index, beat.label, beat.probability) for beat in beats] == expected


# --- alone is batched ----------------------------------------------------------------------------


class Neighbour:
    """Another stream, which sends loud signals and loses some."""

    def __init__(self, driven: Driven, name: str) -> None:
        self.driven, self.name = driven, name
        self.is_open = False

    def act(self, what: str, count: int) -> None:
        if what == "open":
            self.driven.open("b", self.name)  # once more, if it is open
            self.is_open, self.seq, self.index = True, 0, 0
        elif self.is_open and what == "close":
            self.driven.say("b", m.Close(self.name))
            self.is_open = False
        elif self.is_open:
            self.index += count if what == "lose" else 0
            signal = noise(count, self.seq, loud=1e4)
            self.driven.say("b", *chunks(self.name, signal, (), self.seq, self.index))
            self.seq += 1
            self.index += count


@given(
    actions=st.lists(
        st.tuples(
            st.sampled_from(["send", "turn", "open", "loud", "loud", "lose", "close"]),
            st.integers(0, 3),
            st.integers(1, 70),
        ),
        max_size=60,
    )
)
def test_a_streams_scores_do_not_depend_on_its_neighbours(
    tiny_path: Path, actions: list[tuple[str, int, int]]
) -> None:
    driven = Driven(tiny_path, credit_s=60.0)
    others = [Neighbour(driven, f"n{number}") for number in range(4)]
    signal = noise(600)
    driven.open("a", "s")
    sent = seq = 0
    for what, who, count in [*actions, ("send", 0, 600)]:
        if what == "turn":
            driven.turn()
        elif what == "send" and sent < 600:
            part = signal[sent : sent + count]
            driven.say("a", *chunks("s", part, (), seq, sent))
            sent, seq = sent + len(part), seq + 1
        elif what != "send":
            others[who].act(what, count)
    driven.run()
    assert_scores(driven, "s", reference(tiny_path, signal), ends(600))
    assert not driven.told("b", m.Scores, "s")


def test_many_streams_of_two_models_are_each_as_alone(
    models: Models, rng: np.random.Generator
) -> None:
    paths = {"lstm": models("lstm"), "gru": models("gru", "GRU")}
    driven = Driven(*paths.values(), max_streams=40, credit_s=10.0)
    signals = {f"s{k}": noise(300, k, loud=10.0 ** (k % 4)) for k in range(70)}
    model = {name: sorted(paths)[k % 2] for k, name in enumerate(signals)}
    left = {name: chunks(name, x, rng.integers(0, 300, 8)) for name, x in signals.items()}
    for name in signals:
        driven.open("a", name, model[name])
    while left:
        name = str(rng.choice(sorted(left)))
        driven.say("a", left[name].pop(0))
        if rng.random() < 0.1:
            driven.turn()
        if not left[name]:
            del left[name]
    driven.run()
    for name, signal in signals.items():
        assert_scores(driven, name, reference(paths[model[name]], signal), ends(300))
    assert max(rows for runs in driven.metrics.runs.values() for rows, _ in runs) > 8


# --- slots ---------------------------------------------------------------------------------------


def test_a_reused_slot_equals_a_new_one_and_state_would_have_mattered(tiny_path: Path) -> None:
    driven = Driven(tiny_path, max_streams=1)
    first, second = noise(100, 1), noise(100, 2)
    driven.open("a", "old")
    deliver(driven, "a", [*chunks("old", first), m.Close("old")])
    driven.open("a", "new")
    deliver(driven, "a", chunks("new", second))
    new = reference(tiny_path, second)
    assert_scores(driven, "new", new, ends(100))
    carried = reference(tiny_path, np.concatenate([first, second]))[5:]
    assert not np.array_equal(carried[0]["beat"], new[0]["beat"])


def end_by_reopening(driven: Driven) -> None:
    driven.open("a", "s")


def end_by_dropping(driven: Driven) -> None:
    driven.engine.drop(b"a", "gone")
    driven.open("b", "s")


@pytest.mark.parametrize("end", [end_by_reopening, end_by_dropping])
def test_a_new_tenant_never_gets_the_old_ones_results(
    tiny_path: Path, end: Callable[[Driven], None]
) -> None:
    driven = Driven(tiny_path, max_streams=1)
    driven.open("a", "s")
    driven.say("a", *chunks("s", noise(150, 1), (30, 70)))  # nothing of it is stepped yet
    end(driven)
    peer = "b" if b"b" in driven.engine.peers else "a"
    signal = noise(100, 2)
    deliver(driven, peer, chunks("s", signal))
    assert_scores(driven, "s", reference(tiny_path, signal), ends(100), peer)


# --- gaps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["hold", "reset"])
@given(
    parts=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 70)), min_size=1, max_size=6),
    eager=st.booleans(),
)
def test_gaps_are_told_and_the_state_is_as_the_model_says(
    models: Models, policy: str, parts: list[tuple[int, int]], eager: bool
) -> None:
    """Parts are (samples lost, samples sent)."""
    path = models(policy, gap=policy)
    driven = Driven(path, credit_s=10.0)
    driven.open("a", "s", policy, index=100)
    expected: list[list[NDArray[np.float32]]] = [[]]  # whole hops between resets
    gaps: list[m.Gap] = []
    indices: list[int] = []
    sent: list[m.Chunk] = []
    whole_until, rest, index = 100, noise(0), 100
    for seq, (lost, count) in enumerate(parts):
        if lost:
            gaps.append(m.Gap("s", whole_until, index + lost, policy))
            rest, whole_until = noise(0), index + lost
            if policy == "reset":
                expected.append([])
        index += lost
        part = noise(count, seq)
        sent += chunks("s", part, (), seq, index)
        index += count
        rest = np.concatenate([rest, part])
        hops = len(rest) // HOP
        expected[-1].append(rest[: hops * HOP])
        indices += ends(hops * HOP, whole_until)
        rest, whole_until = rest[hops * HOP :], whole_until + hops * HOP
    deliver(driven, "a", sent, eager)

    assert driven.told("a", m.Gap) == gaps
    runs = [reference(path, np.concatenate(run)) for run in expected if run]
    assert_scores(driven, "s", [result for run in runs for result in run], indices)
    places = [
        told.start if isinstance(told, m.Gap) else told.index
        for told in driven.heard("a")
        if isinstance(told, m.Gap | m.Scores)
    ]
    assert places == sorted(places)
    assert driven.metrics.gaps == len(gaps)
    assert driven.metrics.lost_samples == sum(lost for lost, _ in parts)


def test_holding_and_resetting_the_state_differ(models: Models) -> None:
    told = []
    for policy in ("hold", "reset"):
        driven = Driven(models(policy, gap=policy))
        driven.open("a", "s", policy)
        sent = [*chunks("s", noise(HOP)), *chunks("s", noise(HOP), (), 1, 50)]
        deliver(driven, "a", sent)
        told.append([values(scores) for scores in driven.told("a", m.Scores)])
    np.testing.assert_array_equal(told[0][0], told[1][0])
    assert not np.array_equal(told[0][2], told[1][2])


def test_after_a_gap_windows_see_nothing_of_the_samples_before_it(wide_path: Path) -> None:
    driven = Driven(wide_path)
    driven.open("a", "s", "wide")
    before, after = noise(70, 1), noise(60, 2)
    deliver(driven, "a", [*chunks("s", before), *chunks("s", after, (), 1, 90)])
    expected = [
        result
        for part in (before, after)
        for result in plain.loop(wide_path, plain.cut(part, HOP, 60))
    ]
    assert driven.told("a", m.Gap) == [m.Gap("s", 60, 90, "reset")]
    assert_scores(driven, "s", expected, [20, 40, 60, 110, 130, 150])


def test_a_gap_at_another_rate_is_told_in_the_clients_samples(tiny_path: Path) -> None:
    driven = Driven(tiny_path, credit_s=10.0)
    driven.open("a", "s", rate_hz=250.0)
    deliver(driven, "a", [*chunks("s", noise(120)), *chunks("s", noise(200), (), 1, 1000)])
    assert driven.told("a", m.Gap) == [m.Gap("s", 100, 1000, "reset")]  # 2 hops of 50
    told = [s.index for s in driven.told("a", m.Scores, "s") if s.output == "beat"]
    assert told == [50, 100, 1050, 1100, 1150]


def test_a_late_chunk_is_dropped_and_acked_again(tiny_path: Path) -> None:
    driven = Driven(tiny_path, reorder_chunks=0)
    driven.open("a", "s")
    first, late, third = chunks("s", noise(60), (20, 40))
    deliver(driven, "a", [first, third, late])
    assert driven.told("a", m.Gap) == [m.Gap("s", 20, 40, "reset")]
    assert driven.told("a", m.Ack) == [m.Ack("s", 0, 20), m.Ack("s", 2, 60), m.Ack("s", 2, 60)]
    assert (driven.metrics.late, driven.metrics.duplicates) == (1, 0)
    assert not driven.told("a", m.Error)
    assert len(driven.told("a", m.Scores)) == 2 * len(OUTPUTS)


@given(repeats=st.lists(st.integers(1, 3), min_size=8, max_size=8), eager=st.booleans())
def test_chunks_sent_again_change_nothing(tiny_path: Path, repeats: list[int], eager: bool) -> None:
    driven = Driven(tiny_path, credit_s=10.0)
    signal = noise(200)
    made = chunks("s", signal, (10, 50, 90, 95, 130, 150, 190))
    driven.open("a", "s")
    sent = [chunk for chunk, times in zip(made, repeats, strict=True) for _ in range(times)]
    deliver(driven, "a", sent, eager)
    assert_scores(driven, "s", reference(tiny_path, signal), ends(200))
    assert driven.metrics.duplicates == sum(repeats) - 8
    assert not driven.told("a", m.Gap)
    assert not driven.told("a", m.Error)


def test_numbers_that_jump_ahead_are_no_gap_while_the_index_goes_on(tiny_path: Path) -> None:
    driven = Driven(tiny_path)
    signal = noise(100)
    driven.open("a", "s")
    numbered = zip(chunks("s", signal, (30, 60)), (0, 7, 1000), strict=True)
    deliver(driven, "a", [msgspec.structs.replace(chunk, seq=seq) for chunk, seq in numbered])
    assert_scores(driven, "s", reference(tiny_path, signal), ends(100))
    assert not driven.told("a", m.Gap)
    assert driven.told("a", m.Ack)[-1] == m.Ack("s", 1000, 100)


@given(
    cuts=st.lists(st.integers(0, 400), max_size=20),
    shuffle=st.lists(st.integers(0, 2), min_size=25, max_size=25),
    eager=st.booleans(),
)
def test_chunks_in_another_order_give_the_scores_of_the_plain_loop(
    tiny_path: Path, cuts: list[int], shuffle: list[int], eager: bool
) -> None:
    driven = Driven(tiny_path, credit_s=10.0)
    signal = noise(400)
    driven.open("a", "s")
    left, sent = chunks("s", signal, cuts), []
    for wish in shuffle:
        # At most two may be ahead of the first that is left.
        ahead = sum(bool(left) and each.seq > left[0].seq for each in sent)
        if left:
            sent.append(left.pop(min(wish, 2 - ahead, len(left) - 1)))
    deliver(driven, "a", sent, eager)
    assert_scores(driven, "s", reference(tiny_path, signal), ends(400))
    assert not driven.told("a", m.Gap)
    assert not driven.told("a", m.Error)
    assert driven.told("a", m.Ack)[-1].index == 400
    assert (driven.metrics.late, driven.metrics.duplicates) == (0, 0)


@given(cuts=cuts, eager=st.booleans())
def test_a_short_gap_is_bridged_as_if_the_samples_had_come(
    tiny_path: Path, cuts: list[int], eager: bool
) -> None:
    signal, there = noise(400), np.ones(400, bool)
    for start, end in ((45, 46), (100, 105), (220, 223)):
        there[start:end] = False
    driven = Driven(tiny_path, credit_s=10.0, bridge_s=0.05)
    driven.open("a", "s")
    sent: list[m.Chunk] = []
    for start, end in ((0, 45), (46, 100), (105, 220), (223, 400)):
        part = [cut - start for cut in cuts if start < cut < end]
        sent += chunks("s", signal[start:end], part, len(sent), start)
    deliver(driven, "a", sent, eager)
    places = np.arange(400)
    filled = np.interp(places, places[there], signal[there]).astype(np.float32)
    told = [s for s in driven.told("a", m.Scores, "s") if s.output == "beat"]
    assert [scores.index for scores in told] == ends(400)
    for scores, result in zip(told, reference(tiny_path, filled), strict=True):
        np.testing.assert_allclose(values(scores), result["beat"], atol=1e-6)
    bridges = [m.Bridged("s", 45, 46), m.Bridged("s", 100, 105), m.Bridged("s", 220, 223)]
    assert driven.told("a", m.Bridged) == bridges
    assert not driven.told("a", m.Gap)
    assert driven.metrics.bridged_samples == 9


def test_what_is_told_of_a_stream_comes_before_the_ack_of_its_chunk(tiny_path: Path) -> None:
    driven = Driven(tiny_path, credit_s=10.0)
    driven.open("a", "s", clock="device")
    for seq in range(10):
        (one,) = chunks("s", noise(40), (), seq, 40 * seq)
        driven.say("a", msgspec.structs.replace(one, t_device=0.4 * seq))
    driven.run()
    acked = 0
    for each in driven.heard("a"):
        acked = each.index if isinstance(each, m.Ack) else acked
        assert not isinstance(each, m.Measures) or each.index > acked
    assert [each.index for each in driven.told("a", m.Measures)] == [100, 200, 300, 400]


@pytest.mark.parametrize(("rate_hz", "rule"), [(100.0, None), (98.5, "rate_wrong"), (0, "jump")])
def test_a_rate_that_is_off_and_a_clock_that_jumps_are_technical_alerts(
    heart_path: Path, rate_hz: float, rule: str | None
) -> None:
    """Half a minute of a device, whose clock says an hour more after ten seconds (rate 0)."""
    driven = Driven(heart_path, credit_s=60.0)
    driven.open("a", "s", "tinyheart", clock="device")
    for seq in range(60):
        (one,) = chunks("s", noise(50, seq), (), seq, 50 * seq)
        time_s = 50 * seq / rate_hz if rate_hz else 0.5 * seq + 3600.0 * (seq > 20)
        driven.say("a", msgspec.structs.replace(one, t_device=time_s))
        driven.run()
    active = {one.rule for one in driven.told("a", m.Alert) if one.state == "active"}
    assert ("rate_wrong" in active) == (rule == "rate_wrong")
    assert ("clock_jump" in active) == (rule == "jump")


def test_filters_begin_anew_behind_a_gap_although_the_state_is_held(models: Models) -> None:
    """Silence at another level behind the gap: carried filters would ring for a second."""
    filters = (model_file.Filter("highpass", (0.5,)),)
    path = models("held", gap="hold", input=model_file.Input(100.0, "mV", filters=filters))
    told = []
    for level in (0.0, 300.0):
        driven = Driven(path, credit_s=10.0)
        driven.open("a", "s", "held")
        zeros = np.zeros(HOP, np.float32)
        sent = [*chunks("s", zeros), *chunks("s", zeros + np.float32(level), (), 1, 100)]
        deliver(driven, "a", sent)
        told.append([values(scores) for scores in driven.told("a", m.Scores)])
    for quiet, stepped in zip(*told, strict=True):
        np.testing.assert_allclose(quiet, stepped, atol=1e-4)


# --- flush, close, acks --------------------------------------------------------------------------


@pytest.mark.parametrize("delay", [0, 8, 25])
@given(lengths=st.lists(st.integers(0, 90), min_size=1, max_size=4), eager=st.booleans())
def test_a_flush_brings_out_the_tail_and_begins_anew(
    models: Models, delay: int, lengths: list[int], eager: bool
) -> None:
    path = models(f"ahead{delay}", look_ahead_samples=delay)
    driven = Driven(path, credit_s=10.0)
    driven.open("a", "s", f"ahead{delay}")
    sent: list[m.Message] = []
    expected: list[Results] = []
    told: list[tuple[str, int]] = []
    begin = 0
    for number, length in enumerate(lengths):
        signal = noise(length, number)
        sent += [*chunks("s", signal, (), number, begin), m.Flush("s", 70 + number)]
        if length:
            results = reference(path, plain.tail_padded(signal, HOP, delay))
            about = [(r, (k + 1) * HOP - delay) for k, r in enumerate(results)]
            expected += [result for result, end in about if end > 0]
            told += [("beat", begin + min(end, length)) for _, end in about if end > 0]
        begin += length
        told.append(("flushed", 70 + number))
    deliver(driven, "a", sent, eager)
    indices = [index for kind, index in told if kind == "beat"]
    assert_scores(driven, "s", expected, indices)
    in_order = [
        ("flushed", one.id) if isinstance(one, m.Flushed) else (one.output, one.index)
        for one in driven.heard("a")
        if isinstance(one, m.Flushed | m.Scores)
    ]
    assert [one for one in in_order if one[0] != "beat_class"] == told
    assert [one.index for one in driven.told("a", m.Flushed)] == np.cumsum(lengths).tolist()


def test_a_close_comes_back_when_all_that_was_sent_is_through(tiny_path: Path) -> None:
    driven = Driven(tiny_path)
    driven.open("a", "s")
    driven.say("a", *chunks("s", noise(110), (30, 70)), m.Close("s"))
    driven.run()
    assert_scores(driven, "s", reference(tiny_path, noise(110)), ends(110))
    assert driven.heard("a")[-2:] == [
        m.Ack("s", 2, 110),
        m.Closed("s", "closed", 3, 110, 0, 0, 0),
    ]
    assert driven.metrics.streams_open == 0


@given(cuts=cuts, eager=st.booleans())
def test_an_ack_follows_the_results_of_what_it_names(
    tiny_path: Path, cuts: list[int], eager: bool
) -> None:
    driven = Driven(tiny_path, credit_s=10.0)
    driven.open("a", "s")
    deliver(driven, "a", chunks("s", noise(400), cuts), eager)
    hops = 0
    for told in driven.heard("a"):
        hops += isinstance(told, m.Scores) and told.output == "beat"
        if isinstance(told, m.Ack):
            assert hops >= told.index // HOP
    acks = driven.told("a", m.Ack)
    assert acks[-1].index == 400
    assert [ack.index for ack in acks] == sorted({ack.index for ack in acks})


def test_acks_give_credit_back(tiny_path: Path) -> None:
    driven = Driven(tiny_path, credit_s=1.0)
    driven.open("a", "s")
    (opened,) = driven.told("a", m.Opened)
    made = chunks("s", noise(3 * opened.credit), range(25, 3 * opened.credit, 25))
    sent = 0
    while sent < len(made):
        allowed = opened.credit + max([ack.index for ack in driven.told("a", m.Ack)], default=0)
        assert made[sent].index + 25 <= allowed, "no credit, and nothing left to step"
        while sent < len(made) and made[sent].index + 25 <= allowed:
            driven.say("a", made[sent])
            sent += 1
        driven.run()
    assert not driven.told("a", m.Error)
    assert driven.told("a", m.Ack)[-1].index == 3 * opened.credit


@pytest.mark.parametrize("rate_hz", [0.1, 1.0, 5.0, 99.0, 100_000.0])
def test_a_stream_of_any_rate_has_the_credit_to_fill_a_hop(tiny_path: Path, rate_hz: float) -> None:
    driven = Driven(tiny_path, credit_s=0.01)
    driven.open("a", "s", rate_hz=rate_hz)
    (opened,) = driven.told("a", m.Opened)
    deliver(driven, "a", chunks("s", noise(opened.credit), range(1, opened.credit)), eager=False)
    assert driven.told("a", m.Ack)
    assert driven.told("a", m.Scores)


# --- results for subscribers ---------------------------------------------------------------------


def test_results_and_gaps_are_published_under_their_type_and_stream(tiny_path: Path) -> None:
    driven = Driven(tiny_path)
    driven.open("a", "s")
    deliver(driven, "a", [*chunks("s", noise(20)), *chunks("s", noise(20), (), 1, 50)])
    published = [(topic, m.decode_replies(body)) for topic, body in driven.engine.published]
    told = [one for one in driven.heard("a") if isinstance(one, m.Scores | m.Gap | m.Measures)]
    assert [one for _, (one,) in published] == told
    assert {topic for topic, _ in published} == {b"scores/s", b"gap/s", b"measures/s"}
    assert all(topic.startswith(type(one).__name__.lower().encode()) for topic, (one,) in published)


# --- subjects ------------------------------------------------------------------------------------


@pytest.mark.parametrize("subject", [None, "john.smith", "smithjohn1950", "0012345678"])
def test_a_subject_in_the_clear_is_refused_and_stands_nowhere(
    tiny_path: Path, subject: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    insisting = Subjects(require_pseudonyms=True, pattern="[A-Za-z0-9.]+")
    driven = Driven(tiny_path, subjects=insisting)
    driven.open("a", "s", subject=subject)
    (refused,) = driven.told("a", m.Error)
    assert (refused.code, refused.stream) == ("bad_subject", "s")
    driven.open("a", "s", subject="k3v9x7q2m4")
    assert len(driven.told("a", m.Opened)) == 1
    told = repr(driven.heard("a")) + caplog.text
    assert "k3v9x7q2m4" not in told
    assert subject is None or subject not in told


# --- limits, time-outs, draining -----------------------------------------------------------------


def assert_goes_on(driven: Driven, path: Path, name: str = "s", peer: str = "a") -> None:
    """Send a first record through a stream that is open."""
    signal = noise(100, 9)
    deliver(driven, peer, chunks(name, signal, (33, 60)))
    assert_scores(driven, name, reference(path, signal), ends(100), peer)


def test_streams_beyond_the_limit_are_refused_until_one_closes(tiny_path: Path) -> None:
    driven = Driven(tiny_path, max_streams=2)
    for name in ("s", "t", "u"):
        driven.open("a", name)
    assert driven.told("a", m.Error) == [m.Error("full", "limits.max_streams is 2", "u")]
    assert driven.refused() == {"full": 1}
    driven.say("a", m.Close("t"))
    driven.open("a", "v")
    assert [opened.stream for opened in driven.told("a", m.Opened)] == ["s", "t", "v"]
    assert_goes_on(driven, tiny_path)


def test_a_peer_has_its_own_limit_of_streams(tiny_path: Path) -> None:
    driven = Driven(tiny_path, max_streams_per_peer=1)
    driven.open("a", "s")
    driven.open("a", "t")
    driven.open("b", "t")
    assert driven.told("a", m.Error) == [m.Error("full", "limits.max_streams_per_peer is 1", "t")]
    assert [opened.stream for opened in driven.told("b", m.Opened)] == ["t"]
    assert_goes_on(driven, tiny_path)


def test_peers_beyond_the_limit_are_turned_away_with_the_reason(tiny_path: Path) -> None:
    driven = Driven(tiny_path, max_peers=1)
    driven.open("a", "s")
    driven.throw("b", m.body([m.encode(m.Hello(m.VERSION))]))
    ((peer, body),) = driven.engine.turned_away
    assert peer == b"b"
    assert m.decode_replies(body) == [m.Error("too_many_peers", "limits.max_peers is 1")]
    assert driven.refused() == {"too_many_peers": 1}
    assert list(driven.engine.peers) == [b"a"]
    assert_goes_on(driven, tiny_path)


def test_load_beyond_what_was_measured_is_refused_until_there_is_less(tiny_path: Path) -> None:
    driven = Driven(tiny_path)
    (runtime,) = driven.runtimes
    per_row_s = runtime.step_seconds(runtime.max_rows) / runtime.max_rows
    hops_per_s = tiny.RATE_HZ / HOP
    bound = 2.5 * hops_per_s * per_row_s
    driven.engine.limits = msgspec.structs.replace(driven.engine.limits, max_load=bound)
    for name in ("s", "t", "u"):
        driven.open("a", name)
    (refused,) = driven.told("a", m.Error)
    assert (refused.code, refused.stream) == ("full", "u")
    assert f"limits.max_load is {bound:g}" in refused.reason
    driven.say("a", m.Close("t"))
    driven.open("a", "u")
    assert [opened.stream for opened in driven.told("a", m.Opened)] == ["s", "t", "u"]
    assert_goes_on(driven, tiny_path)


def test_a_peer_that_says_nothing_is_given_up_and_one_that_pings_is_not(tiny_path: Path) -> None:
    driven = Driven(tiny_path, idle_timeout_s=60.0, max_streams=2)
    driven.open("a", "s")
    driven.open("b", "t")
    driven.now += 40
    driven.say("a", m.Ping(3))
    driven.engine.tick(driven.now)
    assert len(driven.engine.peers) == 2
    driven.now += 40
    driven.engine.tick(driven.now)
    assert list(driven.engine.peers) == [b"a"]
    assert driven.told("a", m.Pong) == [m.Pong(3)]
    assert (driven.metrics.dropped_peers, driven.metrics.streams_open) == (1, 1)
    driven.open("a", "t")  # its row and its name are free
    assert driven.told("a", m.Opened, "t")
    assert_goes_on(driven, tiny_path)


def test_a_stream_without_chunks_is_closed_although_its_peer_lives(tiny_path: Path) -> None:
    driven = Driven(tiny_path, stream_timeout_s=600.0, idle_timeout_s=1e6)
    driven.open("a", "s")
    driven.open("a", "t")
    driven.now += 400
    driven.say("a", *chunks("t", noise(5)))
    driven.now += 400
    driven.engine.tick(driven.now)
    assert driven.told("a", m.Closed) == [m.Closed("s", "idle", 0, 0, 0, 0, 0)]
    assert driven.metrics.streams_open == 1


def test_draining_finishes_what_has_arrived_and_opens_nothing(tiny_path: Path) -> None:
    driven = Driven(tiny_path)
    driven.open("a", "s")
    driven.open("b", "idle")
    signal = noise(150)
    driven.say("a", *chunks("s", signal, (40, 90)))
    assert not driven.engine.drain()
    driven.open("b", "late")
    (refused,) = driven.told("b", m.Error)
    assert (refused.code, refused.stream) == ("draining", "late")
    driven.run()
    assert driven.engine.drain()
    assert_scores(driven, "s", reference(tiny_path, signal), ends(150))
    assert driven.heard("a")[-1] == m.Closed("s", "draining", 3, 150, 0, 0, 0)
    assert driven.told("b", m.Closed) == [m.Closed("idle", "draining", 0, 0, 0, 0, 0)]


def test_results_behind_many_gaps_are_told_at_their_own_indices(models: Models) -> None:
    path = models("gappy", gap="hold", look_ahead_samples=5 * HOP)
    driven = Driven(path)
    driven.open("a", "s", "gappy")
    starts = [1000 * number for number in range(12)]  # a hop each, the rest is missing
    for seq, start in enumerate(starts):
        driven.say("a", *chunks("s", noise(HOP), seq=seq, index=start))
        driven.run()
    told = [s.index for s in driven.told("a", m.Scores, "s") if s.output == "beat"]
    # The last sample of a hop and the first of the next are neighbours to the model.
    assert told == starts[1 : len(told) + 1]
    assert len(told) == len(starts) - 5


def test_a_tight_budget_keeps_no_one_awake_while_nothing_comes(tiny_path: Path) -> None:
    driven = Driven(tiny_path)
    driven.open("a", "tight", latency_ms=0.01)
    for number in range(10):
        driven.open("a", f"s{number}")
        driven.say("a", *chunks(f"s{number}", noise(HOP)))
    while isinstance(driven.engine._scheduler.next(driven.now), Batch):
        driven.engine.turn(driven.now)
    driven.now += HOP / tiny.RATE_HZ
    driven.say("a", *chunks("s0", noise(HOP), seq=1, index=HOP))  # waits for the other nine
    assert driven.engine.turn(driven.now).until > driven.now
