"""Peers that misbehave, die or never read, and servers that stop: real processes and sockets."""

import signal
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import zmq
from numpy.typing import NDArray

from engine import messages as m
from engine.client import Client, Stream
from engine.errors import Refused
from tests import plain, tiny
from tests.conftest import Server
from tests.drive import chunks

HOP = tiny.HOP
Starter = Callable[..., Server]
Sockets = Callable[[int], zmq.Socket]
SIGNAL = np.random.default_rng(11).standard_normal(2000).astype(np.float32)
DEADLINE_S = 40.0


def assert_plain(
    path: Path, events: list[m.Message], signal: NDArray[np.float32], name: str, first: int = 0
) -> None:
    """Compare a stream's scores with those of a plain loop over a signal that begins at first."""
    expected = plain.loop(path, plain.cut(signal, HOP, HOP))
    told = [event for event in events if isinstance(event, m.Scores) and event.stream == name]
    for output in ("beat", "beat_class"):
        mine = [scores for scores in told if scores.output == output]
        assert [scores.index for scores in mine] == [
            first + (k + 1) * HOP for k in range(len(expected))
        ]
        for scores, result in zip(mine, expected, strict=True):
            found = np.frombuffer(scores.data, "<f4").reshape(scores.shape)
            np.testing.assert_array_equal(found, result[output])


class Good:
    """A client who does all right while others do not."""

    def __init__(self, server: Server, name: str = "good") -> None:
        self.client = Client(server.address, timeout_s=DEADLINE_S)
        self.stream = self.client.open(name, "tiny", rate_hz=100.0, unit="mV")
        self.sent = 0
        self.events: list[m.Message] = []

    def send(self, count: int) -> None:
        self.stream.send(SIGNAL[self.sent : self.sent + count])
        self.sent += count
        self.events += self.client.events()

    def assert_unharmed(self, path: Path) -> None:
        """Send what is left; all must be as if nobody else had been there."""
        self.send(len(SIGNAL) - self.sent)
        assert self.stream.flush() == len(SIGNAL)
        self.events += self.client.events()
        assert_plain(path, self.events, SIGNAL, self.stream.name)
        closed = self.stream.close()
        assert (closed.reason, closed.samples) == ("closed", len(SIGNAL))
        assert closed.duplicates == closed.gaps == closed.lost_samples == 0


Beside = Callable[[Server], Good]


@pytest.fixture
def beside() -> Iterator[Beside]:
    """Return a starter of good clients, who are gone at the end whatever the test did."""
    with ExitStack() as stack:

        def start(server: Server) -> Good:
            good = Good(server)
            stack.enter_context(good.client)
            return good

        yield start


def metric(server: Server, name: str) -> float:
    """Read a metric's sum over its labels."""
    with urllib.request.urlopen(server.endpoints["metrics"]) as reply:
        lines = reply.read().decode().splitlines()
    return sum(float(line.split()[1]) for line in lines if line.split("{")[0].split()[0] == name)


def dealer(sockets: Sockets, server: Server, **options: int) -> zmq.Socket:
    """Return a socket that has been welcomed."""
    made = sockets(zmq.DEALER)
    for name, value in options.items():
        made.setsockopt(getattr(zmq, name), value)
    made.connect(server.address)
    tell(made, m.Hello(m.VERSION))
    (welcome,) = hear(made)
    assert isinstance(welcome, m.Welcome)
    return made


def tell(one: zmq.Socket, *requests: m.Message) -> None:
    one.send(m.body([m.encode(request) for request in requests]))


def hear(one: zmq.Socket) -> list[m.Message]:
    """Return the messages of the next body."""
    assert one.poll(DEADLINE_S * 1000), "no answer"
    return m.decode_replies(one.recv())


def opening(name: str) -> m.Open:
    return m.Open(name, "tiny", 100.0, "mV")


# --- peers ---------------------------------------------------------------------------------------


def test_a_client_that_never_reads_is_dropped_and_no_one_else_waits(
    serving: Starter, beside: Beside, tiny_path: Path, sockets: Sockets
) -> None:
    server = serving("--limit", "max_queued_bytes=300000")
    good = beside(server)
    deaf = dealer(sockets, server, RCVHWM=1, RCVBUF=4096, SNDHWM=0)
    tell(deaf, opening("deaf"))
    flood = m.body([m.encode(m.Hello(m.VERSION))] * 512)  # asks for ten times as many bytes
    deadline = time.monotonic() + DEADLINE_S
    while not metric(server, "murmur_dropped_peers_total"):
        assert time.monotonic() < deadline
        deaf.send(flood)
        good.send(HOP)  # and its answer, or the server would join the answers to many floods
        good.client.wait(lambda: good.stream.acked_index == good.sent)
    assert metric(server, "murmur_streams_open") == 1
    good.assert_unharmed(tiny_path)


def test_peers_that_never_read_cost_no_more_memory_than_their_limit(
    serving: Starter, beside: Beside, tiny_path: Path, sockets: Sockets
) -> None:
    server = serving("--limit", "max_queued_bytes=2000000")
    good = beside(server)
    good.send(HOP)
    before = metric(server, "process_resident_memory_bytes")
    flood = m.body([m.encode(m.Hello(m.VERSION))] * 512)  # asks for ten times as many bytes
    highest = 0.0
    for number in range(4):
        deaf = dealer(sockets, server, RCVHWM=1, RCVBUF=4096, SNDHWM=0)
        deadline = time.monotonic() + DEADLINE_S
        while metric(server, "murmur_dropped_peers_total") <= number:
            assert time.monotonic() < deadline
            for _ in range(20):
                deaf.send(flood)
            highest = max(highest, metric(server, "process_resident_memory_bytes"))
            good.client.tell(m.Ping())
    # Unread, undone, in the sockets' own queues, and what the allocator does not give back.
    assert highest - before < 4 * 10_000_000
    good.assert_unharmed(tiny_path)


def test_a_client_that_dies_frees_its_streams_after_the_idle_time(
    serving: Starter, beside: Beside, tiny_path: Path, sockets: Sockets
) -> None:
    server = serving("--limit", "idle_timeout_s=1")
    mortal = dealer(sockets, server)
    tell(mortal, opening("s"), *chunks("s", SIGNAL[:70]))
    told: list[m.Message] = []
    while not any(isinstance(one, m.Ack) for one in told):
        told += hear(mortal)
    mortal.close(linger=0)
    good = beside(server)
    with pytest.raises(Refused, match="stream 's' is another connection's"):
        good.client.open("s", "tiny", rate_hz=100.0, unit="mV")
    deadline = time.monotonic() + DEADLINE_S
    while metric(server, "murmur_streams_open") > 1:
        assert time.monotonic() < deadline
        good.client.tell(m.Ping())
        good.events += good.client.events(timeout_s=0.1)
    again = good.client.open("s", "tiny", rate_hz=100.0, unit="mV")
    assert again.close().chunks == 0
    assert metric(server, "murmur_dropped_peers_total") == 1
    good.events.clear()
    good.assert_unharmed(tiny_path)


def test_a_subscriber_that_never_reads_holds_up_no_one(
    serving: Starter, beside: Beside, tiny_path: Path, sockets: Sockets
) -> None:
    server = serving("--limit", "credit_s=100")
    lazy = sockets(zmq.SUB)
    lazy.setsockopt(zmq.RCVHWM, 1)
    lazy.setsockopt(zmq.RCVBUF, 4096)
    lazy.connect(server.endpoints["publish"])
    lazy.subscribe("scores/loud")
    good = beside(server)
    loud = good.client.open("loud", "tiny", rate_hz=100.0, unit="mV")
    loud.send(np.zeros(HOP, np.float32))
    while not lazy.poll(10):  # until its subscription has come through; then it reads no more
        loud.send(np.zeros(HOP, np.float32))
    before = loud.flush()
    for _ in range(60):
        loud.send(np.zeros(6000, np.float32))
        loud.flush()
        good.send(30)
    assert metric(server, "murmur_dropped_peers_total") == 0
    good.assert_unharmed(tiny_path)
    told = [one for one in good.events if isinstance(one, m.Scores) and one.stream == "loud"]
    assert len(told) == 2 * (before + 60 * 6000) // HOP
    read = 0
    while lazy.poll(100):
        lazy.recv_multipart()
        read += 1
    assert read < len(told)  # there was more than it could have been kept


def test_garbage_is_answered_and_harms_no_one(
    running: Server,
    beside: Beside,
    tiny_path: Path,
    sockets: Sockets,
    rng: np.random.Generator,
) -> None:
    good = beside(running)
    bad = dealer(sockets, running)
    before = metric(running, "murmur_refused_total")
    for number in range(300):
        frames = [rng.bytes(rng.integers(0, 80)) for _ in range(rng.integers(1, 5))]
        bad.send_multipart(frames)
        if number % 10 == 0:
            good.send(20)
    told: list[m.Message] = []
    while len(told) < 300:
        told += hear(bad)
    assert {(one.code, one.stream) for one in told} == {("malformed", "")}
    assert metric(running, "murmur_refused_total") == before + 300
    good.assert_unharmed(tiny_path)


def test_bytes_that_are_no_zeromq_and_bodies_beyond_all_bounds_harm_no_one(
    running: Server, beside: Beside, tiny_path: Path, sockets: Sockets
) -> None:
    good = beside(running)
    good.send(500)
    host, port = running.address.removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port)), timeout=DEADLINE_S) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\nHost: murmur\r\n\r\n" * 100)
        good.send(500)
    huge = dealer(sockets, running)
    with huge.get_monitor_socket(zmq.EVENT_DISCONNECTED) as monitor:
        huge.send(bytes(17 * 2**20))
        assert monitor.poll(DEADLINE_S * 1000), "the server did not hang up"
        good.send(500)
        huge.disable_monitor()
    good.assert_unharmed(tiny_path)


# --- servers -------------------------------------------------------------------------------------


def test_at_sigterm_all_that_was_sent_before_is_answered_first(
    serving: Starter, tiny_path: Path, sockets: Sockets
) -> None:
    server = serving()
    client = dealer(sockets, server)
    names = [f"s{number}" for number in range(5)]
    tell(client, *(opening(name) for name in names))
    told = hear(client)
    server.process.send_signal(signal.SIGSTOP)  # all of it waits when the server wakes
    for number in range(200):
        for name in names:
            tell(client, m.Chunk(name, number, number, SIGNAL[number : number + 1].tobytes()))
    server.process.send_signal(signal.SIGTERM)
    assert server.stop(signal.SIGCONT) == 0
    while sum(isinstance(one, m.Closed) for one in told) < len(names):
        told += hear(client)
    assert {one for one in told if isinstance(one, m.Closed)} == {
        m.Closed(name, "draining", 200, 200, 0, 0, 0) for name in names
    }
    for name in names:
        assert_plain(tiny_path, told, SIGNAL[:200], name)
        acks = [one for one in told if isinstance(one, m.Ack) and one.stream == name]
        assert acks[-1] == m.Ack(name, 199, 200)


def send_all_acked(client: Client, streams: list[Stream], signal: NDArray[np.float32]) -> None:
    """Send to each stream what ends with a whole hop, and take in all acks."""
    for stream in streams:
        wanted = stream.acked_index + len(signal)
        stream.send(signal)
        client.wait(lambda stream=stream, wanted=wanted: stream.acked_index == wanted)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda n: n.name)
def test_a_client_goes_on_with_the_next_server_at_that_address(
    serving: Starter, tiny_path: Path, number: signal.Signals
) -> None:
    """What was not acknowledged is sent again; the state begins anew there."""
    first = serving()
    with Client(first.address, timeout_s=DEADLINE_S) as client:
        streams = [client.open(name, "tiny", rate_hz=100.0, unit="mV") for name in "st"]
        ended = client.open("ended", "tiny", rate_hz=100.0, unit="mV")
        ended.send([np.nan])
        with pytest.raises(Refused):
            ended.flush()
        send_all_acked(client, streams, SIGNAL[:500])
        before = list(client.events())
        sent = 500
        if number == signal.SIGKILL:
            first.process.send_signal(signal.SIGSTOP)  # it takes what comes, and answers nothing
            for stream in streams:
                stream.send(SIGNAL[500:650])
            sent = 650
        first.stop(number)
        serving(bind=first.address)
        for stream in streams:
            stream.send(SIGNAL[sent:1200])
            assert stream.flush() == 1200
        after = list(client.events())
        for stream in streams:
            assert_plain(tiny_path, before, SIGNAL[:500], stream.name)
            assert_plain(tiny_path, after, SIGNAL[500:1200], stream.name, first=500)
            closed = stream.close()
            assert (closed.samples, closed.duplicates, closed.lost_samples) == (700, 0, 0)
    other = [event for event in after if isinstance(event, m.Gap | m.Error | m.Closed)]
    assert [(one.code, one.stream) for one in other] == [
        ("unknown_life", "s"),
        ("unknown_life", "t"),
    ]


def test_a_stream_that_the_next_server_refuses_ends_and_the_others_go_on(
    serving: Starter, tiny_path: Path
) -> None:
    first = serving()
    with Client(first.address, timeout_s=DEADLINE_S) as client:
        streams = [client.open(name, "tiny", rate_hz=100.0, unit="mV") for name in "st"]
        send_all_acked(client, streams, SIGNAL[:500])
        list(client.events())
        first.stop(signal.SIGKILL)
        serving("--limit", "max_streams=1", bind=first.address)
        streams[0].send(SIGNAL[500:1200])
        assert streams[0].flush() == 1200
        assert_plain(tiny_path, list(client.events()), SIGNAL[500:1200], "s", first=500)
        with pytest.raises(Refused, match=r"limits\.max_streams is 1") as caught:
            streams[1].send(SIGNAL[500:])
        assert caught.value.code == "full"
