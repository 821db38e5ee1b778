"""The unreliable network itself: it does what it is told, as often as it is told, and no more."""

import itertools
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zmq
from numpy.typing import NDArray

from engine import messages as m
from engine.client import Client
from tests import plain, tiny
from tests.chaos.proxy import Cutter, Faults, Line, Proxy
from tests.conftest import Server

BODIES = [bytes([number % 251]) * 40 + number.to_bytes(4, "big") for number in range(2000)]
SIGNAL = np.random.default_rng(5).standard_normal(1000).astype(np.float32)
NONE = Faults()


def timed(faults: Faults, seed: int = 0) -> tuple[list[tuple[int, bytes]], Counter[str]]:
    """Send bodies a millisecond apart; return when what came out, and what was done."""
    line = Line(faults, np.random.default_rng(seed), delay_s=0.05)
    out: list[tuple[int, bytes]] = []
    for number in range(len(BODIES) + 100):
        if number < len(BODIES):
            line.put(BODIES[number], number / 1000)
        out += [(number, body) for body in line.take(number / 1000)]
    return out, line.done


def passed(faults: Faults) -> tuple[list[bytes], Counter[str]]:
    out, done = timed(faults)
    return [body for _, body in out], done


def test_without_faults_all_passes_as_it_is() -> None:
    out, done = passed(NONE)
    assert out == BODIES
    assert done == {"bodies": len(BODIES), "": 0}


@pytest.mark.parametrize("fault", Faults._fields)
def test_each_fault_is_done_at_its_rate_and_again_with_the_same_seed(fault: str) -> None:
    faults = Faults(**{fault: 0.1})
    out, done = timed(faults, seed=3)
    assert 150 < done[fault] < 250  # of 2,000: 200, with a deviation of 13
    assert set(done) == {"bodies", fault, ""}
    assert (out, done) == timed(faults, seed=3)
    assert out != timed(faults, seed=4)[0]


def test_what_is_dropped_is_missing_and_what_is_duplicated_comes_twice_in_a_row() -> None:
    out, done = passed(Faults(drop=0.1))
    assert sorted(out) == sorted(set(out))
    assert len(out) == len(BODIES) - done["drop"]
    out, done = passed(Faults(duplicate=0.1))
    assert list(dict.fromkeys(out)) == BODIES
    twice = [body for body, next_ in itertools.pairwise(out) if body == next_]
    assert len(twice) == done["duplicate"] == len(out) - len(BODIES)


def test_what_is_reordered_is_overtaken_by_one() -> None:
    out, done = passed(Faults(reorder=0.1))
    assert sorted(out) == sorted(BODIES)
    moves = Counter(out.index(body) - place for place, body in enumerate(BODIES[:500]))
    assert set(moves) == {-1, 0, 1}
    assert done["reorder"] > 0


def test_what_is_truncated_is_a_beginning_and_what_is_corrupt_differs_in_one_byte() -> None:
    out, done = passed(Faults(truncate=0.1))
    short = [(a, b) for a, b in zip(out, BODIES, strict=True) if a != b]
    assert len(short) == done["truncate"]
    assert all(b.startswith(a) for a, b in short)
    out, done = passed(Faults(corrupt=0.1))
    apart = [
        sum(x != y for x, y in zip(a, b, strict=True)) for a, b in zip(out, BODIES, strict=True)
    ]
    assert Counter(apart) == {0: len(BODIES) - done["corrupt"], 1: done["corrupt"]}


def test_a_delay_holds_up_all_that_comes_behind() -> None:
    line = Line(Faults(delay=1.0), np.random.default_rng(0), delay_s=0.05)
    line.put(b"one", 10.0)
    line._shares = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    line.put(b"two", 10.01)
    assert line.take(10.04) == []
    assert line.until == pytest.approx(10.05)
    assert line.take(10.05) == [b"one", b"two"]


def play(address: str) -> list[m.Message]:
    """Send a signal in chunks and return all that a client hears of it."""
    with Client(address) as client:
        stream = client.open("s", "tiny", rate_hz=100.0, unit="mV")
        for start in range(0, len(SIGNAL), 40):
            stream.send(SIGNAL[start : start + 40])
        stream.flush()
        stream.close()
        return list(client.events())


def assert_plain(path: Path, told: list[m.Message], signal: NDArray[np.float32]) -> None:
    expected = plain.loop(path, plain.cut(signal, tiny.HOP, tiny.HOP))
    found = [one for one in told if isinstance(one, m.Scores) and one.output == "beat"]
    for scores, result in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.frombuffer(scores.data, "<f4"), result["beat"])


@pytest.mark.parametrize(
    ("up", "down"),
    [
        (NONE, NONE),
        (Faults(delay=0.1), Faults(delay=0.1)),
        (Faults(duplicate=0.2), NONE),
        (Faults(reorder=0.2), NONE),
    ],
    ids=["none", "delay", "duplicate", "reorder"],
)
def test_through_a_network_that_loses_nothing_a_client_hears_what_it_should(
    running: Server, tiny_path: Path, up: Faults, down: Faults
) -> None:
    with Proxy(running.address, up, down, seed=1, delay_s=0.02) as proxy:
        told = play(proxy.address)
        done = proxy.done(up=True)
    assert all(done[name] for name in up._fields if getattr(up, name))
    assert_plain(tiny_path, told, SIGNAL)


def test_a_link_breaks_after_so_many_bytes_wherever_in_a_frame_that_is() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with Cutter(f"tcp://127.0.0.1:{port}", iter([1000.0, 1e9]).__next__) as cutter:
            near = ("127.0.0.1", int(cutter.address.rsplit(":", 1)[1]))
            for carried in (1000, 1500):
                with socket.create_connection(near) as one, server.accept()[0] as other:
                    for each in (one, other):
                        each.settimeout(20.0)
                    one.sendall(bytes(1500))
                    got = 0
                    while got < carried:
                        got += len(other.recv(1500))
                    assert got == carried
                    if carried < 1500:
                        with pytest.raises(ConnectionResetError):
                            one.recv(1)
            assert cutter.cuts == 1


def test_zeromq_connects_again_over_a_link_that_breaks(
    sockets: Callable[[int], zmq.Socket],
) -> None:
    server, client = sockets(zmq.ROUTER), sockets(zmq.DEALER)
    server.bind("tcp://127.0.0.1:0")
    with Cutter(server.getsockopt_string(zmq.LAST_ENDPOINT), lambda: 5000.0) as cutter:
        client.connect(cutter.address)
        while cutter.cuts < 3:
            client.send(bytes(700))
            if server.poll(20):
                assert len(server.recv_multipart()[1]) == 700  # a frame that was cut never comes
