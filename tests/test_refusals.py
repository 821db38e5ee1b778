"""What is wrong is refused with a reason, counted, and changes nothing for another stream."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import messages as m
from tests import plain, tiny
from tests.drive import Driven, chunks

HOPS = 6
SIGNAL = np.random.default_rng(7).standard_normal(HOPS * tiny.HOP).astype(np.float32)
HELLO = {"type": "hello", "version": m.VERSION}
OPEN = {"type": "open", "stream": "s", "model": "tiny", "rate_hz": 100.0, "unit": "mV"}
DATA = bytes(4 * 20)
CHUNK = {"type": "chunk", "stream": "s", "seq": 0, "index": 0, "data": DATA}
CLOSE = {"type": "close", "stream": "s"}
FLUSH = {"type": "flush", "stream": "s"}
LIMITS = {"max_message_bytes": 4000, "max_messages": 64, "max_chunk_bytes": 800, "credit_s": 1.0}


def floats(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


class Bad(NamedTuple):
    """What comes before from the same peer, what is wrong, and the answer."""

    name: str
    before: Sequence[dict[str, Any]]
    wrong: dict[str, Any] | bytes
    code: str
    reason: str
    stream: str = "s"
    seq: int | None = None
    ends: bool = False  # the stream, as its signal is not what was announced


GREETED = [HELLO]
OPENED = [HELLO, OPEN]
TABLE = [
    Bad("no msgpack", GREETED, b"\xc1", "malformed", "expected an array of messages: .+", ""),
    Bad("nothing", GREETED, b"", "malformed", "expected an array of messages: .+", ""),
    Bad("no array", GREETED, msgpack.packb(HELLO), "malformed", "`array`, got `object`", ""),
    Bad("no type", GREETED, {"stream": "s"}, "malformed", "required field `type`", ""),
    Bad("unknown type", GREETED, {"type": "steal"}, "malformed", "'steal'", ""),
    Bad(
        "oversize message",
        OPENED,
        CHUNK | {"data": bytes(4000)},
        "oversize",
        r"expected at most 4000 bytes, found 4\d\d\d",
        "",
    ),
    Bad(
        "too many messages",
        OPENED,
        msgpack.packb([{"type": "ping"}] * 65),
        "oversize",
        "expected an array of at most 64, found 65",
        "",
    ),
    Bad("version", [], HELLO | {"version": 99}, "bad_version", "speaks 1, found 99", ""),
    Bad("no hello", [], OPEN, "not_greeted", "expected hello first"),
    Bad("ping before hello", [], {"type": "ping"}, "not_greeted", "expected hello first", ""),
    Bad("chunk before hello", [], CHUNK, "not_greeted", "expected hello first", seq=0),
    Bad(
        "model",
        GREETED,
        OPEN | {"model": "huge"},
        "unknown_model",
        r"expected one of \['tiny'\], found 'huge'",
    ),
    Bad("dtype", GREETED, OPEN | {"dtype": "f8"}, "malformed", r"'f8'.*\.dtype", ""),
    Bad("name", GREETED, OPEN | {"stream": "a/b"}, "malformed", r"\.stream", ""),
    Bad("rate", GREETED, OPEN | {"rate_hz": 0.01}, "bad_rate", "0.1 to 100000 Hz, found 0.01"),
    Bad("negative rate", GREETED, OPEN | {"rate_hz": -1.0}, "malformed", r"\.rate_hz", ""),
    Bad("unit", GREETED, OPEN | {"unit": "kPa"}, "bad_unit", "expected mV .*found 'kPa'"),
    Bad("gain", GREETED, OPEN | {"gain": 0.0}, "bad_unit", "gain not 0, found 0.0"),
    Bad("channels", GREETED, OPEN | {"channels": 3}, "bad_channels", "expected 1, found 3"),
    Bad("taken", GREETED, OPEN | {"stream": "good"}, "stream_taken", "'good' is another", "good"),
    Bad("chunk before open", GREETED, CHUNK, "unknown_stream", "'s' is not open", seq=0),
    Bad("flush before open", GREETED, FLUSH, "unknown_stream", "'s' is not open"),
    Bad("close before open", GREETED, CLOSE, "unknown_stream", "'s' is not open"),
    Bad("chunk after close", [*OPENED, CLOSE], CHUNK, "unknown_stream", "'s' is not open", seq=0),
    Bad(
        "chunk while it closes",
        [*OPENED, CHUNK, CLOSE],
        CHUNK | {"seq": 1, "index": 20},
        "unknown_stream",
        "'s' is not open",
        seq=1,
    ),
    Bad(
        "another's chunk",
        OPENED,
        CHUNK | {"stream": "good", "seq": 9},
        "unknown_stream",
        "'good' is not open on this connection",
        "good",
        9,
    ),
    Bad(
        "another's close",
        OPENED,
        CLOSE | {"stream": "good"},
        "unknown_stream",
        "'good' is not open on this connection",
        "good",
    ),
    Bad(
        "length",
        OPENED,
        CHUNK | {"data": bytes(7)},
        "bad_length",
        r"multiple of 4 bytes \(1 channels of float32\), found 7",
        seq=0,
        ends=True,
    ),
    Bad(
        "no samples",
        OPENED,
        CHUNK | {"data": b""},
        "bad_length",
        "multiple of 4 .*found 0",
        seq=0,
        ends=True,
    ),
    Bad(
        "other dtype",
        [HELLO, OPEN | {"dtype": "i2"}],
        CHUNK | {"data": bytes(3)},
        "bad_length",
        "multiple of 2 bytes .*int16.*found 3",
        seq=0,
        ends=True,
    ),
    Bad("list of samples", OPENED, CHUNK | {"data": [1.0]}, "malformed", r"`bytes`.*\.data", ""),
    Bad(
        "NaN",
        OPENED,
        CHUNK | {"data": floats(1, np.nan)},
        "not_finite",
        r"expected finite numbers, found \[nan\] at index 1",
        seq=0,
        ends=True,
    ),
    Bad(
        "infinity",
        OPENED,
        CHUNK | {"index": 50, "data": floats(np.inf)},
        "not_finite",
        r"found \[inf\] at index 50",
        seq=0,
        ends=True,
    ),
    Bad(
        "oversize chunk",
        OPENED,
        CHUNK | {"data": bytes(804)},
        "oversize",
        "expected at most 800 bytes, found 804",
        seq=0,
    ),
    Bad(
        "index back",
        [*OPENED, CHUNK],
        CHUNK | {"seq": 1, "index": 19},
        "index_back",
        "expected index 20 or later, found 19",
        seq=1,
    ),
    Bad(
        "over credit",
        [*OPENED, CHUNK | {"data": bytes(400)}],
        CHUNK | {"seq": 1, "index": 100, "data": bytes(4)},
        "over_credit",
        "expected at most 100 samples beyond the last ack, found 101",
        seq=1,
    ),
    Bad(
        "flushes",
        [*OPENED, CHUNK, *[FLUSH] * 16],
        FLUSH,
        "over_credit",
        "at most 16 flushes",
    ),
]


class Beside:
    """An engine with a good stream that is half through, and a peer who is up to something."""

    def __init__(self, path: Path) -> None:
        self.driven, self._path = Driven(path, **LIMITS), path
        self._made = chunks("good", SIGNAL, (25, 60, 75))
        self.driven.open("honest", "good")
        self.driven.say("honest", *self._made[:2])
        self.driven.turn()

    def throw(self, given: dict[str, Any] | bytes) -> None:
        self.driven.throw("bad", given if isinstance(given, bytes) else msgpack.packb([given]))

    def assert_unharmed(self) -> None:
        """Send the good stream's other half; it must be as if nobody else had been there."""
        for chunk in self._made[2:]:
            self.driven.say("honest", chunk)
            self.driven.turn()
        self.driven.run()
        told = self.driven.told("honest", m.Scores)
        expected = plain.loop(self._path, plain.cut(SIGNAL, tiny.HOP, tiny.HOP))
        assert len(told) == 2 * len(expected)
        for scores in told:
            found = np.frombuffer(scores.data, "<f4").reshape(scores.shape)
            result = expected[scores.index // tiny.HOP - 1]
            np.testing.assert_array_equal(found, result[scores.output])
        assert not self.driven.told("honest", m.Error)
        assert not self.driven.told("honest", m.Closed)


@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.name)
def test_what_is_wrong_is_told_and_counted_and_harms_no_one_else(tiny_path: Path, bad: Bad) -> None:
    beside = Beside(tiny_path)
    for message in bad.before:
        beside.throw(message)
    beside.throw(bad.wrong)
    (error,) = beside.driven.told("bad", m.Error)
    assert (error.code, error.stream, error.seq) == (bad.code, bad.stream, bad.seq)
    assert re.search(bad.reason, error.reason)
    assert beside.driven.refused() == {bad.code: 1}
    beside.assert_unharmed()
    reasons = [closed.reason for closed in beside.driven.told("bad", m.Closed)]
    assert (bad.code in reasons) == bad.ends


def test_a_chunk_that_is_not_taken_may_be_sent_again_as_it_should_have_been(
    tiny_path: Path,
) -> None:
    beside = Beside(tiny_path)
    for message in [*OPENED, CHUNK | {"data": bytes(804)}, CHUNK | {"data": DATA}]:
        beside.throw(message)
    beside.assert_unharmed()
    assert beside.driven.told("bad", m.Ack) == [m.Ack("s", 0, 20)]


def test_the_messages_beside_a_refused_one_are_done(tiny_path: Path) -> None:
    beside = Beside(tiny_path)
    wrong = CHUNK | {"stream": "other"}
    beside.throw(msgpack.packb([HELLO, OPEN, wrong, CHUNK, {"type": "ping", "id": 5}]))
    beside.driven.run()
    kinds = [type(told) for told in beside.driven.heard("bad")]
    assert kinds == [m.Welcome, m.Opened, m.Error, m.Pong, m.Scores, m.Scores, m.Ack]


def test_a_number_that_goes_back_is_a_duplicate_and_no_error(tiny_path: Path) -> None:
    beside = Beside(tiny_path)
    for message in [*OPENED, CHUNK | {"seq": 5}, CHUNK | {"seq": 2, "index": 20}]:
        beside.throw(message)
    assert beside.driven.metrics.duplicates == 1
    assert beside.driven.refused() == {}
    beside.assert_unharmed()
    assert beside.driven.told("bad", m.Ack)[-1] == m.Ack("s", 5, 20)


def test_after_a_fatal_refusal_the_name_can_be_opened_again(tiny_path: Path) -> None:
    beside = Beside(tiny_path)
    for message in [*OPENED, CHUNK | {"data": floats(np.nan)}, OPEN, CHUNK]:
        beside.throw(message)
    beside.assert_unharmed()
    assert len(beside.driven.told("bad", m.Opened)) == 2
    assert beside.driven.told("bad", m.Ack) == [m.Ack("s", 0, 20)]


@given(
    bodies=st.lists(st.binary(max_size=60), max_size=8),
    edits=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=4),
)
def test_any_bytes_leave_the_engine_alive_and_others_unharmed(
    tiny_path: Path, bodies: list[bytes], edits: list[tuple[int, int]]
) -> None:
    beside = Beside(tiny_path)
    beside.throw(HELLO)
    talk = bytearray(msgpack.packb([OPEN, CHUNK, FLUSH, CLOSE]))
    for place, byte in edits:
        talk[place % len(talk)] = byte
    for body in [*bodies, bytes(talk)]:
        beside.throw(body)
        beside.driven.turn()
    beside.assert_unharmed()
    beside.throw({"type": "ping", "id": 77})
    assert beside.driven.heard("bad")[-1] == m.Pong(77)
