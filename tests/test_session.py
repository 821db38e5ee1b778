"""One stream's protocol, without sockets or models: what is taken, what is refused, and why."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.errors import Refused
from engine.messages import Ack, Chunk, Closed, Open
from engine.model_file import Input
from engine.session import End, Lost, Samples, Session, Tail

SIGNAL = Input(100.0, "mV")
CREDIT = 200
MAX_BYTES = 600


def session(signal: Input = SIGNAL, **changes: Any) -> Session:
    fields: dict[str, Any] = {
        "stream": "s",
        "model": "tiny",
        "rate_hz": 100.0,
        "unit": "mV",
    }
    return Session(Open(**(fields | changes)), signal, CREDIT, MAX_BYTES)


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
    assert (one.gaps, one.lost_samples, one.duplicates) == (1, 1, 1)


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
