"""The client against a real server: credit, events, refusals, silence, several streams."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import zmq
from numpy.typing import NDArray

from engine import messages as m
from engine.client import Client, Stream
from engine.errors import Disconnected, Refused
from tests import plain, tiny
from tests.conftest import Server

Starter = Callable[..., Server]
SIGNAL = np.random.default_rng(3).standard_normal(1010).astype(np.float32)


@pytest.fixture
def client(running: Server) -> Iterator[Client]:
    with Client(running.address) as made:
        yield made


def opened(client: Client, name: str = "s", **fields: object) -> Stream:
    return client.open(name, "tiny", **({"rate_hz": 100.0, "unit": "mV"} | fields))


def beats(events: list[m.Message], name: str = "s") -> list[m.Scores]:
    """Return the scores of the output "beat"."""
    return [
        event
        for event in events
        if isinstance(event, m.Scores) and event.stream == name and event.output == "beat"
    ]


def assert_plain(path: Path, told: list[m.Scores], signal: NDArray[np.float32]) -> None:
    expected = plain.loop(path, plain.cut(signal, tiny.HOP, tiny.HOP))
    assert [scores.index for scores in told] == [(k + 1) * tiny.HOP for k in range(len(expected))]
    for scores, result in zip(told, expected, strict=True):
        np.testing.assert_array_equal(np.frombuffer(scores.data, "<f4"), result["beat"])


def test_any_length_is_sent_as_the_credit_allows(client: Client, tiny_path: Path) -> None:
    stream = opened(client)
    stream.send(SIGNAL[:1])
    stream.send(SIGNAL[1:])  # five times the credit
    assert stream.flush() == 1010
    told = beats(list(client.events()))
    assert len(told) == 51
    assert_plain(tiny_path, told[:50], SIGNAL)
    closed = stream.close()
    assert (closed.reason, closed.samples, closed.duplicates, closed.gaps) == ("closed", 1010, 0, 0)


def test_events_wait_for_the_first_and_end_with_the_last(client: Client) -> None:
    stream = opened(client)
    assert list(client.events()) == []
    stream.send(SIGNAL[:40])
    told: list[m.Message] = []
    while len(beats(told)) < 2:
        told += client.events(timeout_s=10.0)
    assert [scores.index for scores in beats(told)] == [20, 40]
    stream.close()
    (last,) = client.events()
    assert isinstance(last, m.Closed)


def test_samples_may_be_left_out_and_the_gap_is_told(client: Client) -> None:
    stream = opened(client, index=500)
    stream.send(SIGNAL[:40])
    stream.skip(60)
    stream.send(SIGNAL[:40])
    assert stream.flush() == 640
    told = list(client.events())
    (gap,) = (event for event in told if isinstance(event, m.Gap))
    assert gap == m.Gap("s", 540, 600, "reset", life=stream.request.life, number=1)
    assert [scores.index for scores in beats(told)] == [520, 540, 620, 640]


def test_integers_are_scaled_by_the_gain(client: Client, tiny_path: Path) -> None:
    raw = np.round(SIGNAL * 200).astype(np.int16)
    stream = opened(client, dtype="i2", gain=0.005)
    stream.send(raw)
    stream.flush()
    told = beats(list(client.events()))
    assert_plain(tiny_path, told[:50], raw.astype(np.float32) * np.float32(0.005))


def test_a_stream_says_how_much_it_may_send_and_a_flush_need_not_be_waited_for(
    client: Client, tiny_path: Path
) -> None:
    stream = opened(client)
    credit = stream.room
    assert credit == 200  # two seconds
    stream.send(SIGNAL[:30])
    assert stream.room == credit - 30
    stream.ask_flush()
    assert stream.flushing
    client.wait(lambda: not stream.flushing)
    assert stream.room == credit
    stream.ask_close()
    client.wait(lambda: stream.closed is not None)
    assert stream.close().samples == 30
    assert len(beats(list(client.events()))) == 2


def test_events_have_the_time_at_which_they_came(client: Client) -> None:
    stream = opened(client)
    stream.send(SIGNAL[:20])
    client.wait(lambda: stream.acked_index == 20)
    came = time.monotonic()
    deadline = came + 0.05
    client.wait(lambda: time.monotonic() > deadline)
    times = [at for at, _ in client.timed_events()]
    assert len(times) == 2
    assert all(came - 0.05 < at <= came for at in times)
    assert client.silent_s >= 0


def test_two_streams_share_a_client(client: Client, tiny_path: Path) -> None:
    one, other = opened(client, "one"), opened(client, "other")
    for start in range(0, 1000, 90):
        one.send(SIGNAL[start : start + 90])
        other.send(-SIGNAL[start : start + 90])
    one.flush()
    other.flush()
    told = list(client.events())
    assert_plain(tiny_path, beats(told, "one")[:50], SIGNAL)
    assert_plain(tiny_path, beats(told, "other")[:50], -SIGNAL)


@pytest.mark.parametrize(
    ("fields", "code", "said"),
    [
        ({"unit": "kPa"}, "bad_unit", "found 'kPa'"),
        ({"channels": 2}, "bad_channels", "expected 1, found 2"),
        ({"rate_hz": 0.01}, "bad_rate", "found 0.01"),
        ({"latency_ms": -1.0}, "malformed", "latency_ms"),
    ],
)
def test_a_stream_that_is_refused_says_why_and_another_can_be_opened(
    client: Client, fields: dict[str, object], code: str, said: str
) -> None:
    with pytest.raises(Refused, match=said) as caught:
        opened(client, **fields)
    assert caught.value.code == code
    stream = opened(client)
    stream.send(SIGNAL[:20])
    assert stream.close().samples == 20


def test_samples_of_a_wrong_shape_are_not_sent(client: Client) -> None:
    stream = opened(client)
    for wrong in (np.zeros((5, 2)), np.zeros((5, 1, 1)), np.float32(0.0)):
        with pytest.raises(ValueError, match=r"expected \(any, 1\), found \("):
            stream.send(wrong)
    stream.send(np.zeros((30, 1)))
    assert stream.close().samples == 30


def test_a_stream_that_sends_nan_ends_and_the_others_of_the_client_do_not(
    client: Client, tiny_path: Path
) -> None:
    good, bad = opened(client, "good"), opened(client, "bad")
    good.send(SIGNAL[:50])
    bad.send([1.0, np.nan])
    client.tell(m.Chunk("bad", 1, 2, bytes(4)))  # on its way before the client could know
    with pytest.raises(Refused, match=r"found \[nan\] at index 1") as caught:
        bad.flush()
    assert caught.value.code == "not_finite"
    deadline = time.monotonic() + 0.6  # longer than the client waits before it connects anew
    client.wait(lambda: time.monotonic() > deadline)
    good.send(SIGNAL[50:])
    good.flush()
    assert_plain(tiny_path, beats(list(client.events()), "good")[:50], SIGNAL)


class Wire:
    """A connection on which all is said and nothing waited for."""

    max_chunk_bytes = 1000

    def __init__(self) -> None:
        self.told: list[m.Message] = []
        self.tell = self.told.append

    def wait(self, condition: Callable[[], bool]) -> None:
        assert condition()


def test_an_ack_of_the_connection_before_is_not_taken_for_one_of_the_next() -> None:
    """Chunks are numbered anew, so the old number would name another chunk."""
    wire = Wire()
    stream = Stream(wire, m.Open("s", "tiny", 100.0, "mV"))  # type: ignore[arg-type]
    stream.opened(m.Opened("s", "tiny", "", 200, 0.0, 0.2))
    stream.send(SIGNAL[:150])  # chunks of 50
    stream.acked(m.Ack("s", 0, 50))
    stream.resume()
    opened, *again = stream.begin_anew()
    assert opened == m.Open("s", "tiny", 100.0, "mV", index=50, life=stream.request.life)
    second, third = wire.told[1:]
    assert [(one.seq, one.index, one.data) for one in again] == [
        (0, 50, second.data),
        (1, 100, third.data),
    ]
    stream.acked(m.Ack("s", 1, 100))  # of the old numbering: the second chunk
    assert stream.acked_index == 50
    assert stream.begin_anew()[1:] == again


def test_a_fast_stream_is_cut_into_chunks_that_the_server_takes(serving: Starter) -> None:
    limits = ("--limit", "max_chunk_bytes=2000")
    with Client(serving(*limits).address) as client:
        stream = opened(client, rate_hz=10_000.0)
        stream.send(np.zeros(30_000, np.float32))
        stream.flush()
        told = beats(list(client.events()))
        assert [scores.index for scores in told] == list(range(2000, 30_001, 2000))
        assert stream.close().lost_samples == 0


def test_a_client_that_goes_gives_its_streams_names_back(running: Server) -> None:
    with Client(running.address) as client:
        opened(client).send(SIGNAL[:30])
    with Client(running.address) as client:
        assert opened(client).close().samples == 0


def test_nobody_there_is_told_after_the_time_limit(
    sockets: Callable[[int], zmq.Socket],
) -> None:
    port = sockets(zmq.ROUTER).bind_to_random_port("tcp://127.0.0.1")  # and never answers
    with pytest.raises(Disconnected, match=f"no answer from tcp://127.0.0.1:{port}"):
        Client(f"tcp://127.0.0.1:{port}", timeout_s=0.2)


def test_a_server_that_is_gone_is_told_after_the_time_limit(serving: Starter) -> None:
    server = serving()
    with Client(server.address, timeout_s=1.0) as client:
        stream = opened(client)
        server.stop()
        with pytest.raises(Disconnected):
            stream.send(SIGNAL)  # more than the credit, so that an answer is waited for


def test_a_full_house_is_told_to_the_client_that_comes(serving: Starter) -> None:
    server = serving("--limit", "max_peers=1")
    with Client(server.address) as client:
        with pytest.raises(Refused, match=r"limits\.max_peers is 1") as caught:
            Client(server.address)
        assert caught.value.code == "too_many_peers"
        stream = opened(client)
        stream.send(SIGNAL[:20])
        assert stream.close().samples == 20


def test_an_address_that_publishes_and_takes_nothing_is_no_server(running: Server) -> None:
    with pytest.raises(Disconnected, match=f"no answer from {running.endpoints['publish']}"):
        Client(running.endpoints["publish"], timeout_s=3.0)  # longer than a ping
