"""One stream's protocol, without sockets or models: what is taken, what is refused, and why."""

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine.errors import Refused
from engine.messages import Ack, Bridged, Channel, Chunk, Closed, Flags, Measures, Open
from engine.model_file import Input
from engine.session import End, Lost, Samples, Session, Tail

SIGNAL = Input(100.0, "mV")
CREDIT = 200
MAX_BYTES = 600


def session(
    signal: Input = SIGNAL,
    credit: int = CREDIT,
    bridge_s: float = 0.0,
    reorder_chunks: int = 0,
    **changes: Any,
) -> Session:
    fields: dict[str, Any] = {
        "stream": "s",
        "model": "tiny",
        "rate_hz": 100.0,
        "unit": "mV",
    }
    opened = Open(**(fields | changes))
    return Session(opened, signal, credit, MAX_BYTES, 4, bridge_s, reorder_chunks)


def chunk(seq: int, index: int, values: Any, dtype: str = "<f4") -> Chunk:
    return Chunk("s", seq, index, np.asarray(values, dtype).tobytes())


def refusal(one: Session, given: Chunk) -> Refused:
    with pytest.raises(Refused) as caught:
        one.accept(given)
    return caught.value


def taken(one: Session) -> NDArray[np.float32]:
    """Empty the inbox of samples, (samples,)."""
    values = [item.values[:, 0] for item in one.inbox if isinstance(item, Samples)]
    one.inbox.clear()
    return np.concatenate(values)


def through(one: Session) -> Ack | None:
    """Take all that waits as if the model had stepped it."""
    for item in one.inbox:
        if isinstance(item, Samples) and item.ack:
            one.mark(0, item.ack)
    one.inbox.clear()
    return one.passed(0)[0]


def test_chunks_queue_their_samples_in_order() -> None:
    one = session()
    assert one.accept(chunk(0, 0, [1, 2]))
    assert one.accept(chunk(1, 2, [3]))
    assert taken(one).tolist() == [1, 2, 3]
    assert (one.end_index, one.chunks, one.samples) == (3, 2, 3)


@pytest.mark.parametrize(
    ("changes", "sent", "expected"),
    [
        ({"unit": "uV"}, [500.0], [0.5]),
        ({"gain": 2.0, "offset": -1.0}, [3.0], [5.0]),
        ({"unit": "V", "gain": 0.001, "offset": 0.002}, [3.0], [5.0]),
        ({"dtype": "i2", "gain": 0.005}, [-200, 32767], [-1.0, 163.835]),
    ],
)
def test_samples_come_out_in_the_models_unit(
    changes: dict[str, Any], sent: list[float], expected: list[float]
) -> None:
    one = session(**changes)
    one.accept(chunk(0, 0, sent, "<" + changes.get("dtype", "f4")))
    np.testing.assert_allclose(taken(one), expected, rtol=1e-6)


def test_channels_are_interleaved() -> None:
    one = session(Input(100.0, "mV", channels=2), channels=2)
    one.accept(chunk(0, 0, [1, 2, 3, 4]))
    (item,) = one.inbox
    assert isinstance(item, Samples)
    assert item.values.tolist() == [[1, 2], [3, 4]]
    assert one.end_index == 2


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({"channels": 2}, "bad_channels", "expected 1, found 2"),
        ({"unit": "kPa"}, "bad_unit", "found 'kPa'"),
        ({"gain": 0.0}, "bad_unit", "gain not 0"),
        ({"gain": float("nan")}, "bad_unit", "nan"),
        ({"offset": float("inf")}, "bad_unit", "inf"),
        ({"rate_hz": 0.01}, "bad_rate", "expected 0.1 to 100000 Hz, found 0.01"),
        ({"rate_hz": 1e6}, "bad_rate", "expected 0.1 to 100000 Hz, found 1e+06"),
    ],
)
def test_a_stream_that_does_not_fit_the_model_is_refused(
    changes: dict[str, Any], code: str, said: str
) -> None:
    with pytest.raises(Refused) as caught:
        session(**changes)
    assert caught.value.code == code
    assert said in caught.value.reason


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        (chunk(0, 0, [1, np.nan]), "not_finite", "found [nan] at index 1"),
        (chunk(0, 5, [-np.inf]), "not_finite", "found [-inf] at index 5"),
        (chunk(0, 0, []), "bad_length", "found 0"),
        (Chunk("s", 0, 0, b"12345"), "bad_length", "expected a multiple of 4 bytes"),
        (chunk(0, 0, np.zeros(151)), "oversize", "expected at most 600 bytes, found 604"),
    ],
)
def test_bad_samples_are_refused_with_what_was_found(given: Chunk, code: str, said: str) -> None:
    refused = refusal(session(), given)
    assert refused.code == code
    assert said in refused.reason


def test_a_gain_that_overflows_is_not_finite() -> None:
    assert refusal(session(gain=1e38), chunk(0, 0, [1, 100])).code == "not_finite"


def test_a_chunk_sent_twice_is_dropped_and_counted() -> None:
    one = session()
    one.accept(chunk(0, 0, [1, 2]))
    assert not one.accept(chunk(0, 0, [1, 2]))
    assert taken(one).tolist() == [1, 2]
    assert (one.chunks, one.duplicates) == (1, 1)


def test_a_chunk_that_comes_late_is_dropped_after_its_gap_was_noted() -> None:
    one = session()
    one.accept(chunk(0, 0, [1]))
    one.accept(chunk(2, 2, [3]))
    assert not one.accept(chunk(1, 1, [2]))
    assert [type(item) for item in one.inbox] == [Samples, Lost, Samples]
    assert one.inbox[1] == Lost(1, 2)
    assert (one.gaps, one.lost_samples, one.late, one.duplicates) == (1, 1, 1, 0)


def test_a_gap_is_counted_by_index_whatever_the_sequence_says() -> None:
    one = session(index=1000)
    one.accept(chunk(7, 1010, [1]))
    one.accept(chunk(8, 1011, [1]))
    assert one.inbox[0] == Lost(1000, 1010)
    assert (one.gaps, one.lost_samples) == (1, 10)


def test_an_index_that_goes_back_is_refused_and_changes_nothing() -> None:
    one = session()
    one.accept(chunk(0, 0, [1, 2]))
    refused = refusal(one, chunk(1, 1, [9]))
    assert refused.code == "index_back"
    assert "expected index 2 or later, found 1" in refused.reason
    assert one.accept(chunk(1, 2, [3]))
    assert taken(one).tolist() == [1, 2, 3]


def test_more_than_the_credit_is_refused_until_an_ack() -> None:
    one = session()
    one.accept(chunk(0, 0, np.zeros(150)))
    late = chunk(1, 150, np.zeros(51))
    refused = refusal(one, late)
    assert refused.code == "over_credit"
    assert "expected at most 200 samples beyond the last ack, found 201" in refused.reason
    assert through(one) == Ack("s", 0, 150)
    assert one.accept(late)


def test_lost_samples_take_no_credit() -> None:
    one = session()
    one.accept(chunk(0, 0, [1]))
    for seq in range(1, 5):  # each far behind the one before, none of them acknowledged
        assert one.accept(chunk(seq, seq * 10 * CREDIT, np.zeros(40)))
    assert refusal(one, chunk(5, 60 * CREDIT, np.zeros(40))).code == "over_credit"


def test_an_ack_is_of_the_last_chunk_whose_mark_was_passed() -> None:
    one = session()
    for seq, position in enumerate([20, 20, 40]):
        assert one.mark(position, (seq, 10 * seq + 10, 10)) == 20
    assert one.passed(19) == (None, 20)
    assert one.passed(20) == (Ack("s", 1, 20), 40)
    assert one.repeat_ack() == Ack("s", 1, 20)
    assert one.passed(60) == (Ack("s", 2, 30), None)


def test_before_any_ack_the_repeated_one_names_no_chunk() -> None:
    assert session(index=5).repeat_ack() == Ack("s", -1, 5)


def test_a_flush_and_a_close_queue_behind_what_was_accepted() -> None:
    one = session()
    one.accept(chunk(0, 0, [1, 2]))
    one.flush(7)
    one.close()
    assert [type(item) for item in one.inbox] == [Samples, Tail, End]
    assert one.inbox[1] == Tail(7, 2)
    assert one.ending


def test_flushes_without_end_are_refused() -> None:
    one = session()

    def flush_for_ever() -> None:
        for number in range(1000):
            one.flush(number)

    with pytest.raises(Refused) as caught:
        flush_for_ever()
    assert caught.value.code == "over_credit"
    assert len(one.inbox) < 100


@pytest.mark.parametrize("rate_hz", [250.0, 360.0, 44.0])
def test_all_samples_before_a_gap_and_a_flush_come_out(rate_hz: float) -> None:
    one = session(rate_hz=rate_hz)
    one.accept(chunk(0, 0, np.ones(120)))
    one.accept(chunk(1, 500, np.ones(80)))
    one.flush(1)
    kinds = [type(item) for item in one.inbox]
    assert kinds == [Samples, Samples, Lost, Samples, Samples, Tail]
    counts = [len(item.values) for item in one.inbox if isinstance(item, Samples)]
    assert counts[0] + counts[1] == int(np.ceil(120 * 100 / rate_hz))
    assert counts[2] + counts[3] == int(np.ceil(80 * 100 / rate_hz))


@pytest.mark.parametrize("rate_hz", [100.0, 250.0, 44.0])
def test_the_clients_index_follows_the_models_position(rate_hz: float) -> None:
    one = session(rate_hz=rate_hz, index=1000)
    one.anchor(200, 9000)  # after a gap or a flush
    for position in (0, 7, 199):
        assert abs(one.index_at(position) - (1000 + position * rate_hz / 100)) <= 0.5
    for position in (200, 207, 100_000):
        assert abs(one.index_at(position) - (9000 + (position - 200) * rate_hz / 100)) <= 0.5


def test_many_gaps_at_one_position_do_not_push_out_an_older_anchor() -> None:
    one = session()
    for index in range(100, 1000, 100):
        one.anchor(50, index)
    assert one.index_at(20) == 20
    assert one.index_at(50) == 900


def test_the_index_does_not_drift_from_a_rate_that_is_taken_for_another() -> None:
    """249.9 Hz is taken for the model's 250: every sample is one sample, for ever."""
    one = session(Input(250.0, "mV"), rate_hz=249.9)
    one.accept(chunk(0, 0, np.zeros(100)))
    assert len(taken(one)) == 100
    assert one.index_at(10_000_000) == 10_000_000


def test_the_end_of_a_stream_carries_its_counts() -> None:
    one = session()
    one.accept(chunk(0, 0, [1, 2]))
    one.accept(chunk(0, 0, [1, 2]))
    one.accept(chunk(1, 12, [1]))
    assert one.closed("closed") == Closed("s", "closed", 2, 3, 1, 1, 10)


# --- order --------------------------------------------------------------------------------------


def in_order(one: Session) -> list[Any]:
    """Return what was queued: a list of samples between gaps, and each gap."""
    queued: list[Any] = [[]]
    for item in one.inbox:
        if isinstance(item, Samples):
            queued[-1] += item.values.tolist()
        elif isinstance(item, Lost):
            queued += [item, []]
    return queued


@given(data=st.data(), reorder=st.integers(0, 3), rate_hz=st.sampled_from([100.0, 250.0]))
def test_cut_order_within_the_bound_and_repetition_change_no_bit(
    data: st.DataObject, reorder: int, rate_hz: float
) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    fields: dict[str, Any] = {"rate_hz": rate_hz, "credit": 10_000, "bridge_s": 0.05}
    plain, shaken = session(**fields), session(reorder_chunks=reorder, **fields)
    # Stretches of (lost, there), the first sample of all being there.
    stretches = data.draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 60)), max_size=4))
    signal = rng.normal(size=400).astype(np.float32)
    made: list[Chunk] = []
    seq, index = 0, 0
    for number, (lost, count) in enumerate([(0, 40), *stretches]):
        index += lost
        seq += number > 0 and data.draw(st.booleans())  # a chunk was lost, or the sender knew
        part = signal[index : index + count]
        plain.accept(chunk(len(plain.inbox), index, part))
        for cut in np.split(part, sorted(data.draw(st.sets(st.integers(1, 59), max_size=5)))):
            if len(cut):
                made.append(chunk(seq, index, cut))
                seq, index = seq + 1, index + len(cut)
    plain.flush(1)
    ahead: set[int] = set()  # sent before one that still waits
    while made:
        number = data.draw(st.integers(0, min(len(made) - 1, reorder - len(ahead))))
        ahead = {each for each in ahead | {made[number].seq} if each > made[0].seq}
        shaken.accept(made[number])
        if data.draw(st.booleans()):
            assert not shaken.accept(made[number])
        del made[number]
        ahead = {each for each in ahead if made and each > made[0].seq}
    shaken.flush(1)
    assert in_order(shaken) == in_order(plain)
    assert shaken.late == 0
    assert (shaken.samples, shaken.lost_samples, shaken.bridged_samples, shaken.gaps) == (
        plain.samples,
        plain.lost_samples,
        plain.bridged_samples,
        plain.gaps,
    )


def test_a_chunk_waits_for_the_one_that_it_overtook() -> None:
    one = session(reorder_chunks=2)
    assert one.accept(chunk(0, 0, [1]))
    assert one.accept(chunk(2, 2, [3]))
    assert in_order(one) == [[[1]]]
    assert one.accept(chunk(1, 1, [2]))
    assert in_order(one) == [[[1], [2], [3]]]
    assert (one.reordered, one.late, one.duplicates, one.gaps) == (1, 0, 0, 0)


def test_a_chunk_is_given_up_once_too_many_wait_and_is_late_then() -> None:
    one = session(reorder_chunks=2)
    one.accept(chunk(0, 0, [1]))
    for seq in (2, 3, 4):
        assert one.accept(chunk(seq, seq, [seq + 1]))
    assert in_order(one) == [[[1]], Lost(1, 2), [[3], [4], [5]]]
    assert not one.accept(chunk(1, 1, [2]))
    assert not one.accept(chunk(3, 3, [4]))
    assert (one.reordered, one.late, one.duplicates) == (2, 1, 1)


def test_what_waits_is_no_more_than_half_of_the_credit() -> None:
    """A client that counts the missing chunk as sent would have no credit to go on with."""
    one = session(reorder_chunks=64)
    one.accept(chunk(1, 20, np.zeros(80)))
    assert not one.inbox
    one.accept(chunk(2, 100, np.zeros(1)))  # 101 samples after what was in order: 0
    assert [type(item) for item in one.inbox] == [Lost, Samples, Samples]


def test_a_gap_whose_numbers_go_on_is_known_at_once() -> None:
    one = session(reorder_chunks=2)
    one.accept(chunk(0, 0, [1]))
    one.accept(chunk(1, 9, [2]))
    assert in_order(one) == [[[1]], Lost(1, 9), [[2]]]


@pytest.mark.parametrize("end", [lambda one: one.flush(3), lambda one: one.close()])
def test_a_flush_and_a_close_end_the_waiting(end: Any) -> None:
    one = session(reorder_chunks=2)
    one.accept(chunk(1, 5, [1]))
    end(one)
    assert [type(item) for item in one.inbox][:2] == [Lost, Samples]


def test_what_waits_counts_against_the_credit_and_may_not_overlap() -> None:
    one = session(reorder_chunks=2)
    one.accept(chunk(0, 0, np.zeros(120)))
    one.accept(chunk(2, 125, np.zeros(75)))
    refused = refusal(one, chunk(3, 200, np.zeros(6)))
    assert (refused.code, "found 201" in refused.reason) == ("over_credit", True)
    assert refusal(one, chunk(3, 199, np.zeros(2))).code == "index_back"
    refused = refusal(one, chunk(1, 120, np.zeros(6)))
    assert refused.code == "index_back"
    assert "expected an end of 125 or before, where chunk 2 begins, found 126" in refused.reason
    assert one.accept(chunk(1, 120, np.zeros(5)))
    assert one.end_index == 200


# --- short gaps ---------------------------------------------------------------------------------


def test_a_short_gap_is_bridged_straight_from_one_side_to_the_other() -> None:
    one = session(Input(100.0, "mV", channels=2), channels=2, bridge_s=0.05)
    one.accept(chunk(0, 0, np.tile([1, -2], (5, 1))))
    one.accept(chunk(1, 9, [4, 8, 5, 5]))
    (told,) = one.due(11)
    assert told == Bridged("s", 5, 9)
    (values,) = in_order(one)
    expected = [
        np.interp(np.arange(11), [0, 4, 9, 10], known) for known in ([1, 1, 4, 5], [-2, -2, 8, 5])
    ]
    np.testing.assert_allclose(values, np.transpose(expected), rtol=1e-6)
    assert (one.bridged_samples, one.gaps, one.lost_samples, one.samples) == (4, 0, 0, 7)
    assert through(one) == Ack("s", 1, 11)


@pytest.mark.parametrize(
    ("before", "lost", "bridged"), [(9, 5, 5), (9, 6, 0), (3, 3, 3), (3, 4, 0)]
)
def test_a_gap_is_bridged_up_to_the_bound_and_the_signal_before_it(
    before: int, lost: int, bridged: int
) -> None:
    one = session(bridge_s=0.05)
    one.accept(chunk(0, 0, np.ones(before)))
    one.accept(chunk(1, before + lost, np.ones(1)))
    assert (one.bridged_samples, one.lost_samples) == (bridged, lost - bridged)


@pytest.mark.parametrize("what", ["flush", "start"])
def test_nothing_is_bridged_to_what_is_over_or_never_was(what: str) -> None:
    one = session(bridge_s=0.05)
    if what == "flush":
        one.accept(chunk(0, 0, np.ones(20)))
        one.flush(1)
    one.accept(chunk(1, one.end_index + 1, [1]))
    assert (one.bridged_samples, one.gaps) == (0, 1)


# --- channels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rate_hz", [100.0, 250.0])
def test_leads_that_a_stream_does_not_have_are_zeros(rate_hz: float) -> None:
    wide = Input(100.0, "mV", channels=3, least_channels=1)
    one = session(wide, channels=2, rate_hz=rate_hz)
    one.accept(chunk(0, 0, np.ones((60, 2))))
    one.flush(1)
    values = np.concatenate([item.values for item in one.inbox if isinstance(item, Samples)])
    assert values.shape[1] == 3
    np.testing.assert_allclose(values[:, :2], 1, atol=2e-3)
    assert not values[:, 2].any()


@pytest.mark.parametrize("channels", [1, 4])
def test_no_fewer_and_no_more_leads_than_the_model_allows(channels: int) -> None:
    with pytest.raises(Refused) as caught:
        session(Input(100.0, "mV", channels=3, least_channels=2), channels=channels)
    assert caught.value.code == "bad_channels"
    assert f"expected 2 to 3, found {channels}" in caught.value.reason


def test_each_channel_may_have_a_unit_and_a_calibration_of_its_own() -> None:
    info = (Channel("II", "ecg", "uV"), Channel("V5", "ecg", gain=2.0, offset=-1.0))
    one = session(Input(100.0, "mV", channels=2), channels=2, gain=10.0, channel_info=info)
    one.accept(chunk(0, 0, [100, 3]))
    np.testing.assert_allclose(in_order(one), [[[1.0, 5.0]]], rtol=1e-6)


@pytest.mark.parametrize(
    ("info", "code", "said"),
    [
        ((Channel(), Channel()), "bad_channels", "expected as many as channels (1), found 2"),
        ((Channel(unit="kPa"),), "bad_unit", "found 'kPa'"),
        ((Channel(gain=0.0),), "bad_unit", "gain not 0"),
        ((Channel(lo=1.0, hi=1.0),), "bad_unit", "channel 0: expected lo below hi, found 1.0"),
        ((Channel(lo=float("nan")),), "bad_unit", "found nan"),
    ],
)
def test_channels_that_make_no_sense_are_refused(
    info: tuple[Channel, ...], code: str, said: str
) -> None:
    with pytest.raises(Refused) as caught:
        session(channel_info=info)
    assert caught.value.code == code
    assert said in caught.value.reason


# --- what is told of the stream itself ----------------------------------------------------------


def told(one: Session) -> list[tuple[int, dict[str, float]]]:
    """Return the measures so far, as (index, values)."""
    due = [each for each in one.due(10**9) if isinstance(each, Measures)]
    assert all(each.decided_at == each.index for each in due)
    return [(each.index, each.values) for each in due]


def test_flags_are_told_when_they_change_and_then_each_second() -> None:
    one = session(credit=1000)
    flags = [None, Flags(lead_off=0b101), Flags(lead_off=0b101), None, Flags(paced=True), Flags()]
    for seq, each in enumerate(flags):
        given_flags = msgspec.structs.replace(chunk(seq, 50 * seq, np.zeros(50)), flags=each)
        one.accept(given_flags)
    names = ("device_lead_off", "device_saturated", "device_paced")
    found = [(index, tuple(values[name] for name in names)) for index, values in told(one)]
    assert found == [
        (50, (2, 0, 0)),
        (150, (2, 0, 0)),
        (200, (0, 0, 1)),
        (250, (0, 0, 1)),
        (250, (0, 0, 0)),
    ]


@given(cuts=st.lists(st.integers(0, 400), max_size=12))
def test_the_share_at_the_limits_is_that_of_each_whole_second(cuts: list[int]) -> None:
    one = session(credit=1000, unit="uV", channel_info=(Channel(lo=-2000, hi=2000),))
    cuts = [*cuts, 100, 200, 300]  # what a chunk can hold
    signal = np.random.default_rng(5).choice([0, 1999, 2000, -3000], 400, p=[0.6, 0.2, 0.1, 0.1])
    for part in np.split(signal, sorted(cuts)):
        if len(part):
            one.accept(chunk(one.chunks, one.end_index, part))
    expected = [
        (100 * k, {"at_limit_share": np.mean(np.abs(signal[100 * k - 100 : 100 * k]) >= 2000)})
        for k in (1, 2, 3, 4)
    ]
    assert told(one) == expected


def test_after_a_gap_a_whole_second_says_that_it_is_over() -> None:
    one = session(credit=1000)
    one.accept(chunk(0, 0, np.zeros(30)))
    one.accept(chunk(1, 530, np.zeros(60)))
    assert isinstance(one.inbox[1], Lost)
    assert one.gap_measure(one.inbox[1]).values == {"gap_s": 5.0}
    one.accept(chunk(2, 600, np.zeros(90)))
    one.accept(chunk(3, 690, np.zeros(150)))
    assert told(one) == [(700, {"gap_s": 0.0})]


def timed(
    one: Session, seconds: int, rate_hz: float, jump_s: float = 0.0
) -> list[dict[str, float]]:
    """Send chunks of half a second, stamped by a device of another rate whose clock jumps."""
    for seq in range(2 * seconds):
        time_s = 50 * seq / rate_hz + jump_s * (seq >= seconds)
        one.accept(msgspec.structs.replace(chunk(seq, 50 * seq, np.zeros(50)), t_device=time_s))
    return [values for _, values in told(one)]


def test_a_device_whose_rate_is_off_is_told_by_how_much() -> None:
    last = timed(session(credit=10**6, clock="device"), 30, rate_hz=102.0)[-1]
    assert last["rate_error_share"] == pytest.approx(0.02)
    assert last["drift_ppm"] == pytest.approx(1e6 * (100 / 102 - 1))
    assert last["clock_jump_s"] == 0.0


def test_a_clock_that_jumps_is_told_and_the_line_begins_anew() -> None:
    values = timed(session(credit=10**6), 30, rate_hz=100.0, jump_s=-3600.0)
    jumps = [each["clock_jump_s"] for each in values]
    assert sum(jumps) == pytest.approx(3600.0)
    assert sum(jump != 0 for jump in jumps) == 1
    assert {round(each["drift_ppm"], 3) for each in values if "drift_ppm" in each} == {0.0}
    assert "drift_ppm" not in values[16]
    assert "drift_ppm" in values[-1]


def test_arrival_is_a_time_only_for_a_stream_that_says_it_is_live() -> None:
    live, played = session(credit=10**6, clock="host"), session(credit=10**6)
    for one in (live, played):
        for seq in range(60):
            one.accept(chunk(seq, 50 * seq, np.zeros(50)), arrived=7.0 + seq * 0.5 / 1.05)
    assert told(live)[-1][1]["rate_error_share"] == pytest.approx(0.05)
    assert told(played) == []
