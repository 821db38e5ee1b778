"""A client written from docs/protocol.md alone, with nothing but ZeroMQ and MessagePack."""

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import msgpack
import numpy as np
import pytest
import zmq
from numpy.typing import NDArray

from tests import plain

HOP = 20  # samples at 100 Hz, as the model of the tests has it
SIGNAL = np.random.default_rng(5).standard_normal(170).astype("<f4")
Sockets = Callable[[int], zmq.Socket]
Map = dict[str, Any]
UNNUMBERED = {"life": 0, "number": 0}  # of a stream that was opened without a life


class Server(Protocol):
    address: str
    endpoints: dict[str, str]


class Peer:
    """A DEALER, and all that it was told."""

    def __init__(self, sockets: Sockets, address: str) -> None:
        self.socket = sockets(zmq.DEALER)
        self.socket.setsockopt(zmq.ROUTING_ID, uuid.uuid4().hex.encode())
        self.socket.connect(address)
        self.told: list[Map] = []

    def tell(self, *messages: Map) -> None:
        self.socket.send(msgpack.packb(list(messages)))

    def until(self, kind: str, **fields: Any) -> Map:
        """Read until a message with these fields has come, and return it."""
        wanted = {"type": kind} | fields
        seen = 0
        while True:
            for message in self.told[seen:]:
                if all(message.get(key) == value for key, value in wanted.items()):
                    return message
            seen = len(self.told)
            assert self.socket.poll(10_000), f"no {wanted}"
            self.told += msgpack.unpackb(self.socket.recv())

    def of(self, kind: str) -> list[Map]:
        return [message for message in self.told if message["type"] == kind]


@pytest.fixture
def peer(sockets: Sockets, running: Server) -> Peer:
    made = Peer(sockets, running.address)
    made.tell({"type": "hello", "version": 1, "client": "the tests"})
    made.until("welcome")
    return made


@pytest.fixture
def name() -> str:
    return f"bed-{uuid.uuid4().hex[:8]}"


def opening(name: str, **fields: Any) -> Map:
    return {
        "type": "open",
        "stream": name,
        "model": "tiny",
        "rate_hz": 100.0,
        "unit": "mV",
    } | fields


def chunking(name: str, samples: NDArray[Any], lengths: list[int], first: int = 0) -> list[Map]:
    """Cut samples into the chunks of a stream, numbered from 0."""
    assert sum(lengths) == len(samples)
    places = np.cumsum([0, *lengths])
    return [
        {
            "type": "chunk",
            "stream": name,
            "seq": seq,
            "index": first + int(place),
            "data": samples[place : place + length].tobytes(),
        }
        for seq, (place, length) in enumerate(zip(places, lengths, strict=False))
    ]


def flushing(name: str, number: int) -> Map:
    return {"type": "flush", "stream": name, "id": number}


def closing(name: str) -> Map:
    return {"type": "close", "stream": name}


def assert_scores(
    path: Path, told: list[Map], signal: NDArray[np.float32], indices: list[int]
) -> None:
    """Compare scores, bit for bit, with a plain loop over the record and its padded tail."""
    windows = plain.cut(plain.tail_padded(signal, HOP), HOP, HOP)
    expected = plain.loop(path, windows)
    for output in ("beat", "beat_class"):
        mine = [scores for scores in told if scores["output"] == output]
        assert [scores["index"] for scores in mine] == indices
        for scores, result in zip(mine, expected, strict=True):
            found = np.frombuffer(scores["data"], "<f4").reshape(scores["shape"])
            np.testing.assert_array_equal(found, result[output])


def test_a_server_says_who_it_is_and_what_it_takes(peer: Peer) -> None:
    (welcome,) = peer.told
    assert welcome["version"] == 1
    assert welcome["models"] == ["tiny"]
    assert welcome["max_chunk_bytes"] <= welcome["max_message_bytes"]
    assert welcome["idle_timeout_s"] > 0
    assert welcome["notice"] == "Research and education software, not a medical device."


def test_a_conversation_from_open_to_close(peer: Peer, name: str, tiny_path: Path) -> None:
    """Many messages in one body; the stream goes on as new after its flush."""
    chunks = chunking(name, SIGNAL, [30, 1, 69, 50, 20], first=1000)
    peer.tell(opening(name, index=1000), *chunks[:3])
    opened = peer.until("opened")
    assert (opened["stream"], opened["model"], opened["hop_s"]) == (name, "tiny", 0.2)
    assert len(opened["sha256"]) == 64
    assert opened["credit"] >= 200
    peer.until("ack", seq=2)
    peer.tell(*chunks[3:], flushing(name, 77))
    assert peer.until("flushed") == {
        "type": "flushed",
        "stream": name,
        "id": 77,
        "index": 1170,
    }
    assert_scores(tiny_path, peer.of("scores"), SIGNAL, [*range(1020, 1170, HOP), 1170])
    acks = [(ack["seq"], ack["index"]) for ack in peer.of("ack")]
    assert acks == sorted(acks)
    assert acks[-1] == (4, 1170)

    before = len(peer.of("scores"))
    again = {"type": "chunk", "stream": name, "seq": 5, "index": 1170}
    peer.tell(again | {"data": SIGNAL[:40].tobytes()}, closing(name))
    assert peer.until("closed") == {
        "type": "closed",
        "stream": name,
        "reason": "closed",
        "chunks": 6,
        "samples": 210,
        "duplicates": 0,
        "gaps": 0,
        "lost_samples": 0,
        "bridged_samples": 0,
        "reordered": 0,
        "late": 0,
    }
    assert_scores(tiny_path, peer.of("scores")[before:], SIGNAL[:40], [1190, 1210])
    assert not peer.of("error")


def test_integers_in_another_unit_are_scaled(peer: Peer, name: str, tiny_path: Path) -> None:
    raw = np.round(SIGNAL * 100).astype("<i2")
    chunks = chunking(name, raw, [100, 70])
    peer.tell(opening(name, dtype="i2", gain=5.0, unit="uV"), *chunks, flushing(name, 1))
    peer.until("flushed")
    millivolts = raw.astype(np.float32) * np.float32(0.005)
    assert_scores(tiny_path, peer.of("scores"), millivolts, [*range(20, 170, HOP), 170])


def test_a_gap_a_duplicate_and_the_end_are_told_with_their_numbers(peer: Peer, name: str) -> None:
    first, second, third = chunking(name, SIGNAL[:120], [50, 30, 40])
    (behind,) = chunking(name, SIGNAL[:40], [40], first=150)
    peer.tell(opening(name), first, third, second, third, behind | {"seq": 3}, closing(name))
    closed = peer.until("closed")
    assert peer.of("gap") == [
        {"type": "gap", "stream": name, "start": 120, "end": 150, "state": "reset"} | UNNUMBERED
    ]
    assert (closed["chunks"], closed["samples"]) == (4, 160)
    assert (closed["duplicates"], closed["reordered"], closed["late"]) == (1, 1, 0)
    assert (closed["gaps"], closed["lost_samples"]) == (1, 30)


def test_a_short_gap_is_told_as_bridged(peer: Peer, name: str) -> None:
    (first,) = chunking(name, SIGNAL[:50], [50])
    (behind,) = chunking(name, SIGNAL[:50], [50], first=53)
    peer.tell(opening(name), first, behind | {"seq": 1}, closing(name))
    assert peer.until("closed")["bridged_samples"] == 3
    bridged = {"type": "bridged", "stream": name, "start": 50, "end": 53}
    assert peer.of("bridged") == [bridged | UNNUMBERED]
    assert not peer.of("gap")


def test_a_ping_is_answered_with_its_number(peer: Peer) -> None:
    peer.tell({"type": "ping", "id": 12}, {"type": "ping"})
    peer.until("pong", id=0)
    assert [pong["id"] for pong in peer.of("pong")] == [12, 0]


def test_keys_of_a_later_version_are_skipped(peer: Peer, name: str) -> None:
    peer.tell(opening(name, colour="green"), closing(name) | {"because": [1, None]})
    assert peer.until("closed")["reason"] == "closed"


def test_an_error_names_its_stream_and_chunk_and_what_was_expected(peer: Peer, name: str) -> None:
    peer.tell(*chunking("nobody", SIGNAL[:3], [3]), opening(name, unit="kPa"))
    peer.until("error", stream=name)
    unknown, bad_unit = peer.of("error")
    assert (unknown["code"], unknown["stream"], unknown["seq"]) == ("unknown_stream", "nobody", 0)
    assert (bad_unit["code"], bad_unit["stream"], bad_unit["seq"]) == ("bad_unit", name, None)
    assert "mV" in bad_unit["reason"]
    assert "kPa" in bad_unit["reason"]


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ({"type": "hello", "version": 2}, "bad_version"),
        ({"type": "ping"}, "not_greeted"),
        ({"type": "hello"}, "malformed"),
        ({"type": "hello", "version": 1.0}, "malformed"),
    ],
)
def test_who_does_not_begin_with_hello_is_told_so(
    sockets: Sockets, running: Server, message: Map, code: str
) -> None:
    stranger = Peer(sockets, running.address)
    stranger.tell(message)
    assert stranger.until("error")["code"] == code
    stranger.tell({"type": "hello", "version": 1})
    stranger.until("welcome")


@pytest.mark.parametrize("place", [0, 1], ids=["before", "behind"])
def test_a_socket_that_adds_a_frame_is_told_so(
    sockets: Sockets, running: Server, place: int
) -> None:
    """A REQ socket sends an empty one before the body."""
    frames = [msgpack.packb([{"type": "hello", "version": 1}])]
    frames.insert(place, b"")
    request = sockets(zmq.DEALER)
    request.connect(running.address)
    request.send_multipart(frames)
    assert request.poll(10_000)
    (error,) = msgpack.unpackb(request.recv())
    assert error["code"] == "malformed"


def test_subscribers_get_the_results_that_the_client_gets(
    sockets: Sockets, running: Server, peer: Peer, name: str
) -> None:
    subscriber = sockets(zmq.SUB)
    subscriber.connect(running.endpoints["publish"])
    for kind in ("scores", "gap"):
        subscriber.subscribe(f"{kind}/{name}")
    peer.tell(opening(name))
    seq = 0
    while not subscriber.poll(20):  # until the subscription has come through
        peer.tell(*[c | {"seq": seq, "index": seq * 20} for c in chunking(name, SIGNAL[:20], [20])])
        peer.until("ack", seq=seq)
        seq += 1
    begin = seq * 20
    later = [c | {"seq": c["seq"] + seq} for c in chunking(name, SIGNAL[:60], [60], begin + 40)]
    peer.tell(*later, closing(name))
    peer.until("closed")
    wanted = [m for m in peer.told if m["type"] in ("scores", "gap")]
    wanted = [m for m in wanted if m.get("index", begin + 1) > begin]
    assert [m["type"] for m in wanted] == ["gap", *["scores"] * 6]
    found: list[Map] = []
    while len([m for m in found if m.get("index", begin + 1) > begin]) < len(wanted):
        assert subscriber.poll(10_000)
        topic, body = subscriber.recv_multipart()
        (message,) = msgpack.unpackb(body)
        assert topic.decode() == f"{message['type']}/{name}"
        found.append(message)
    assert [m for m in found if m.get("index", begin + 1) > begin] == wanted
