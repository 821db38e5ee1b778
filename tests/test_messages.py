"""The wire: what is written can be read, by MessagePack's rules, and anything else is refused."""

from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine import messages as m

REQUESTS: list[m.Request] = [
    m.Hello(1, "a client"),
    m.Open("bed-7", "heart", 360.0, "mV", 2, "i2", 0.005, -1.0, 100, 50.0, None, "p-17"),
    m.Chunk("bed-7", 3, 1080, b"\x00\x01\x02\x03"),
    m.Flush("bed-7", 9),
    m.Close("bed-7"),
    m.Ping(4),
    m.Vital("p-17", "spo2", 96.0, "%", 3600.5),
    m.Acknowledge("p-17", "asystole", "nurse-3", 1),
    m.PauseAlerts("p-17", "", 120.0, "nurse-3", True, 2),
    m.ResumeAlerts("p-17", "", "nurse-3", 3),
    m.ListAlerts("p-17", 4),
    m.Again("bed-7", 77, {"beat": 12}, 5),
    m.Adopt("p-17", b"murmur", False, 6),
    m.Drain("tcp://10.0.0.2:7700", "tcp://10.0.0.2:7701", "", 7),
]
ACTIVE = m.ActiveAlerts(
    "p-17",
    0.5,
    (m.Active("lead_off", "paused", "low", "technical", "bed-7", 1.0, 1.0, 180, 0.5, "me", 9.0),),
    ("asystole",),
)
REPLIES: list[m.Reply] = [
    m.Welcome(1, "murmur", ["heart"], 1000, 64, 500, 60.0),
    m.Opened("bed-7", "heart", "0" * 64, 720, 0.1, 0.05),
    m.Ack("bed-7", -1, 0),
    m.Gap("bed-7", 100, 200, "hold"),
    m.Bridged("bed-7", 100, 103),
    m.Flushed("bed-7", 9, 200),
    m.Closed("bed-7", "closed", 1, 2, 3, 4, 5),
    m.Pong(4),
    m.Recalled("bed-7", 77, {"beat": 13}, 5),
    m.Adopted(6),
    m.Moved("tcp://10.0.0.2:7700", "tcp://10.0.0.2:7701"),
    m.Error("malformed", "why", "bed-7", 3),
    m.Beat("bed-7", 180, 0.5, "N", 0.75, 250, None),
    m.Measures("bed-7", 180, 0.5, 250, {"heart_rate_bpm": 61.5}),
    m.Alert("bed-7", "ventricular_run", "active", "high", 3.0, 3.0, 180, 0.5, 250),
    ACTIVE,
    m.AlertList(4, (ACTIVE,)),
    m.Scores("bed-7", "speech", 512, (1, 2), b"\x00" * 8),
    m.Samples("bed-7", 0, 16000.0, b"\x00" * 8),
    m.Partial("desk-1", 2, "the girl", 9216, 1),
    m.Final("desk-1", 2, "The girl.", 0, 8000, 20800, "silence", (), ("The girl.", "the girl")),
]
OPEN = {"type": "open", "stream": "a", "model": "heart", "rate_hz": 360.0, "unit": "mV"}
CHUNK = {"type": "chunk", "stream": "a", "seq": 0, "index": 0, "data": b"\x00" * 4}


@pytest.mark.parametrize("message", [*REQUESTS, *REPLIES], ids=lambda x: type(x).__name__)
def test_a_message_is_a_map_with_its_type_in_lower_case(message: m.Message) -> None:
    fields = msgpack.unpackb(m.encode(message))
    assert fields.pop("type") == type(message).__name__.lower()
    told = {
        name: msgspec.to_builtins(getattr(message, name), builtin_types=(bytes,))
        for name in message.__struct_fields__
    }
    assert fields == msgpack.unpackb(msgpack.packb(told))


def test_every_kind_of_message_is_among_the_examples() -> None:
    kinds = set(m.Request.__args__) | set(m.Reply.__args__)
    assert {type(message) for message in [*REQUESTS, *REPLIES]} == kinds


def test_both_ends_read_what_the_other_wrote() -> None:
    assert m.decode_requests(m.body([m.encode(r) for r in REQUESTS])) == REQUESTS
    assert m.decode_replies(m.body([m.encode(r) for r in REPLIES])) == REPLIES


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 255, 256, 65_535, 65_536])
def test_a_body_is_the_array_of_its_messages(count: int) -> None:
    pong = m.encode(m.Pong(7))
    assert m.body([pong] * count) == msgpack.packb([{"type": "pong", "id": 7}] * count)


def test_a_key_of_a_later_version_is_skipped() -> None:
    later = CHUNK | {"quality": {"snr": [1, 2]}}
    assert m.decode_requests(msgpack.packb([later])) == [m.Chunk("a", 0, 0, b"\x00" * 4)]


@pytest.mark.parametrize("missing", sorted(CHUNK))
def test_a_missing_key_is_refused(missing: str) -> None:
    fields = {key: value for key, value in CHUNK.items() if key != missing}
    with pytest.raises(msgspec.ValidationError, match=missing):
        m.decode_requests(msgpack.packb([fields]))


@pytest.mark.parametrize(
    ("message", "key", "value"),
    [
        (OPEN, "stream", ""),
        (OPEN, "stream", "a" * 65),
        (OPEN, "stream", "a/b"),
        (OPEN, "stream", "a\n"),
        (OPEN, "rate_hz", 0.0),
        (OPEN, "rate_hz", -1.0),
        (OPEN, "rate_hz", float("nan")),
        (OPEN, "rate_hz", float("inf")),
        (OPEN, "rate_hz", 5e-324),
        (OPEN, "latency_ms", 0.0),
        (OPEN, "latency_ms", float("nan")),
        (OPEN, "channels", 0),
        (OPEN, "dtype", "f8"),
        (OPEN, "index", -1),
        (OPEN, "index", 2**62 + 1),
        (OPEN, "index", 0.5),
        (CHUNK, "seq", -1),
        (CHUNK, "seq", 2**64 - 1),
        (CHUNK, "data", "text"),
        (CHUNK, "data", [0.0, 1.0]),
        (CHUNK, "type", "welcome"),
        (CHUNK, "type", 1),
    ],
)
def test_a_value_out_of_bounds_is_refused(message: dict[str, Any], key: str, value: Any) -> None:
    with pytest.raises(msgspec.ValidationError, match=rf"at `\$\[0\]\.{key}`"):
        m.decode_requests(msgpack.packb([message | {key: value}]))


@given(st.binary(max_size=60))
@example(b"\xdd\xff\xff\xff\xff")  # an array of four thousand million elements
@example(b"\xc6\xff\xff\xff\xff")  # as many bytes
@example(b"\x91" * 5000)
@example(msgpack.packb([CHUNK])[:-1])
@example(msgpack.packb([CHUNK]) + b"\x00")
@example(msgpack.packb([CHUNK | {"stream": b"\xff"}]))
def test_any_bytes_decode_or_are_refused(body: bytes) -> None:
    assert_decodes_or_refuses(body)


@given(st.integers(0, len(msgpack.packb([CHUNK, OPEN])) - 1), st.integers(0, 255))
def test_a_message_with_a_changed_byte_decodes_or_is_refused(place: int, byte: int) -> None:
    body = bytearray(msgpack.packb([CHUNK, OPEN]))
    body[place] = byte
    assert_decodes_or_refuses(bytes(body))


def assert_decodes_or_refuses(body: bytes) -> None:
    try:
        requests = m.decode_requests(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return
    assert all(isinstance(request, m.Request) for request in requests)
