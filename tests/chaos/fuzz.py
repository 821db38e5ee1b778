"""Malformed and mad input: ``python -m tests.chaos.fuzz wire --messages 10000000 --json``.

Two targets, each of which can be replayed without a fuzzer:

- :class:`Wire`: bodies of strangers, to an engine that serves four tiny models and an honest
  neighbour. Whatever they are, the neighbour's results are those of the neighbour alone, all that
  is told decodes, nothing stays behind of a stranger who is gone, and no body takes long.
- :class:`Files`: model files, both kinds. Each is loaded or refused with a ``ModelFileError``.

Inputs come from atheris (coverage-guided, of the extra ``fuzz``), which is also given a mutation
that keeps a body well-formed and makes it mad. It runs in a child process, so that a crash of
native code is told like any other.
"""

import argparse
import gc
import json
import logging
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import msgpack
import msgspec
import numpy as np

from engine import messages as m
from engine import model_file
from engine.errors import ModelFileError
from engine.rights import Account, Key
from tests import tiny
from tests.drive import Driven, chunks

CORPUS = Path(__file__).parent / "corpus"
# A body of the largest size takes some hundredths; the rest is for a machine with other work.
HANG_S = 10.0
_ROUND = 400  # bodies, after which all strangers are gone and the neighbour is compared
_EVERY = 10  # bodies between two chunks of the neighbour
_STRANGERS = (b"stranger-number-1", b"stranger-number-2")
# May name any stream, the neighbour's as well; but not the neighbour as the subject.
_RIGHTS = Key(
    public="0" * 40,
    publish=("*",),
    subscribe=("*",),
    subjects=("[!g]*",),
    acknowledge=True,
    list_alerts=True,
    vitals=True,
    max_bodies_per_s=1e12,
    max_bytes_per_s=1e12,
)
# Objects that the collector looks at which may be more than after the first rounds: what is kept on
# purpose is bounded. (Blocks of memory say nothing here: atheris 3.0 never lets go of what NumPy's
# comparisons return.)
_SPARE_OBJECTS = 2_000
_WARM_ROUNDS = 40
_WEIGHED = 20  # rounds from one weighing to the next: a collection takes as long as many bodies


class Found(Exception):
    """What must not be: the first word says which kind."""


class Target(Protocol):
    """Takes inputs; raises what must not be."""

    tried: int
    thrown: list[bytes]

    def throw(self, data: bytes) -> None: ...

    def settle(self) -> None: ...

    def mutate(self, data: bytes, rng: random.Random) -> bytes: ...


# --- bodies --------------------------------------------------------------------------------------


class Wire:
    """An engine, strangers who send it anything, and a neighbour who must not notice.

    Parameters
    ----------
    folder : Path
        For the models.

    Attributes
    ----------
    tried : int
        Messages so far: those of a body, or one for a body that is none.
    thrown : list of bytes
        Bodies of this round: together they lead to what is found.
    """

    def __init__(self, folder: Path) -> None:
        self.tried = 0
        self.thrown: list[bytes] = []
        self._account = Account("strangers", _RIGHTS)
        self._driven = Driven(*write_models(folder), max_streams=8, max_peers=4)
        self._signal = np.random.default_rng(1).standard_normal(20 * _ROUND // _EVERY)
        self._chunks = chunks("good", self._signal.astype(np.float32), range(0, 20 * _ROUND, 20))
        self._sent = self._rounds = self._most_objects = 0
        self._begin()
        self._expected: list[m.Message] = []
        for _ in range(_ROUND // _EVERY):
            self._send()
        self._expected = self._heard()
        self._end()
        self._begin()

    def throw(self, data: bytes) -> None:
        """Send a body of a stranger, and now and then a chunk of the neighbour."""
        if len(self.thrown) >= _ROUND:
            self.settle()
        self.thrown.append(data)
        driven, engine = self._driven, self._driven.engine
        refused = self._refused()
        began = time.perf_counter()
        engine.receive(_STRANGERS[len(data) % 2], data, driven.now, self._account)
        driven.run()
        took_s = time.perf_counter() - began
        if took_s > HANG_S:
            raise Found(f"hang: one body took {took_s:.1f}")
        # The head of a body that was taken says how many messages it has.
        self.tried += 1 if self._refused() > refused else _count(data)
        driven.now += 0.001
        if len(self.thrown) % _EVERY == 0:
            self._send()
        if len(self.thrown) % 100 == 0:
            engine.tick(driven.now)
        self._listen()

    def settle(self) -> None:
        """End a round: let the strangers go, compare the neighbour, look for what stays behind."""
        while self._sent < len(self._chunks):
            self._send()
        heard = self._heard()
        if heard != self._expected:
            raise Found(f"neighbour: {_difference(self._expected, heard)}")
        self._end()
        self._rounds += 1
        if self._rounds % _WEIGHED == 0:
            self._weigh()
        self._begin()

    def mutate(self, data: bytes, rng: random.Random) -> bytes:
        """Return a body that is well-formed, and mad."""
        try:
            body = msgpack.unpackb(data, strict_map_key=False)
        except (ValueError, TypeError, RecursionError, msgpack.UnpackException):
            body = []
        body = [one for one in body if isinstance(one, dict)] if isinstance(body, list) else []
        for _ in range(rng.randint(1, 4)):
            _change(body, rng)
        try:
            return msgpack.packb(body)
        except (OverflowError, ValueError):  # a sum beyond 64 bits, or too deep
            return data

    def _refused(self) -> int:
        """Return how many bodies were refused as a whole."""
        return self._driven.metrics.refused["malformed"]

    def _weigh(self) -> None:
        """Compare how many objects there are with how many there were after the first rounds."""
        gc.collect()
        objects = len(gc.get_objects())
        if self._rounds <= _WARM_ROUNDS:
            self._most_objects = objects + _SPARE_OBJECTS
        elif objects > self._most_objects:
            raise Found(f"leak: {objects} objects, expected {self._most_objects} at most")

    def _begin(self) -> None:
        self.thrown.clear()
        self._sent = 0
        self._driven.open("good", "good")
        hello = m.body([m.encode(m.Hello(m.VERSION))])
        for stranger in _STRANGERS:
            self._driven.engine.receive(stranger, hello, self._driven.now, self._account)

    def _send(self) -> None:
        if self._sent < len(self._chunks):
            self._driven.say("good", self._chunks[self._sent])
            self._sent += 1
        self._driven.run()

    def _heard(self) -> list[m.Message]:
        """Return what the neighbour was told in this round, after a flush."""
        self._driven.say("good", m.Flush("good", 1))
        self._driven.run()
        return list(self._driven.heard("good"))

    def _listen(self) -> None:
        """Take what strangers and subscribers are told: it must decode."""
        engine = self._driven.engine
        for stranger in _STRANGERS:
            if stranger in engine.peers and engine.peers[stranger].outbox:
                for told in m.decode_replies(engine.take(stranger)):
                    if isinstance(told, m.Error) and told.code == "server_error":
                        raise Found(f"crash: {told.reason}")
        for topic, body in engine.published:
            (result,) = m.decode_replies(body)
            kind, _, name = topic.decode().partition("/")
            of = getattr(result, "stream", getattr(result, "subject", name))
            if (kind, name) != (type(result).__name__.lower(), of):
                raise Found(f"neighbour: {result!r} was published as {topic!r}")
        engine.published.clear()
        engine.turned_away.clear()

    def _end(self) -> None:
        """Let everybody go; nothing may be left of them."""
        driven, engine = self._driven, self._driven.engine
        for peer in list(engine.peers):
            engine.drop(peer, "gone")
        driven._heard.clear()
        driven.now += 10_000.0  # whatever is kept for a while has been kept long enough
        engine.tick(driven.now)
        driven.run()
        self._listen()
        rows = [len(lane.sessions) for lane in engine._lanes.values()]
        free = [lane.slots.full for lane in engine._lanes.values()]
        if engine.peers or engine._streams or any(rows) or any(free):
            raise Found(f"leak: {engine._streams} and {rows} rows are left of peers who are gone")


def write_models(folder: Path) -> list[Path]:
    """Write one tiny model of each pipeline."""
    heart = tiny.spec("tinyheart", pipeline="heart", look_ahead_samples=8)
    return [
        tiny.write(folder, time="samples"),
        tiny.write(folder, heart, time="samples"),
        tiny.write_talker(folder, "talker"),
        tiny.write_smoother(folder, 60),
    ]


def _count(body: bytes) -> int:
    """Return of how many messages a body is."""
    return (
        body[0] & 15 if body[0] < 0xA0 else int.from_bytes(body[1 : 5 if body[0] & 1 else 3], "big")
    )


def _difference(expected: list[m.Message], found: list[m.Message]) -> str:
    """Say where two lists part."""
    for number, (one, other) in enumerate(zip(expected, found, strict=False)):
        if one != other:
            return f"message {number}: expected {one!r}, found {other!r}"
    return f"expected {len(expected)} messages, found {len(found)}"


def _templates() -> list[dict[str, Any]]:
    """Return honest requests of every kind, as maps."""
    wave = (np.sin(np.arange(100) / 3) * 2).astype("<f4").tobytes()
    made: list[m.Message] = [m.Hello(m.VERSION, "x"), m.Ping(1), m.ListAlerts()]
    models = (("tiny", "mV"), ("tinyheart", "mV"), ("talker", "1"), ("smoother", "mV"))
    for stream, (model, unit) in zip("abcd", models, strict=True):
        made += [
            m.Open(stream, model, 100.0, unit, speech=m.Speech(), device=m.Device("m")),
            m.Open(stream, model, 250.0, unit, dtype="i2", gain=0.01, clock="device"),
            m.Open(stream, model, 100.0, unit, channel_info=(m.Channel("I", lo=-1.0, hi=1.0),)),
            *(m.Chunk(stream, seq, 100 * seq, wave) for seq in range(3)),
            m.Chunk(stream, 3, 400, wave[:80], 4.0, 4.2, m.Flags(1, 1, True)),
            m.Flush(stream, 1),
            m.Close(stream),
        ]
    made += [
        m.Vital("p", "pulse", 80.0, "/min", 5.0),
        m.Acknowledge("b", "", "me"),
        m.PauseAlerts("b", "", 60.0, "me"),
        m.ResumeAlerts("b", "", "me"),
    ]
    return [msgpack.unpackb(m.encode(one)) for one in made]


TEMPLATES = _templates()
_MAD = [
    None, True, False, 0, 1, -1, 2, 7, 19, 20, 21, 2**31, 2**53, 2**62, 2**62 + 1, 2**63, 2**64 - 1,
    -(2**63), 0.0, -0.0, 0.5, 1e-9, 1e-300, 5e-324, 1e6, 1e12, 3.4e38, 1.8e308, float("inf"),
    float("-inf"), float("nan"), "", "a", "b", "good", "tiny", "mV", "kV", "i2", "f4", "a/b",
    "\x00", "é" * 30, "x" * 64, "x" * 65, "x" * 300, b"", b"\0", bytes(3), bytes(4), bytes(80),
    np.full(20, np.nan, "<f4").tobytes(), np.full(20, 3e38, "<f4").tobytes(), bytes(4000),
    [], [1], {}, {"x": 1},
]  # fmt: skip


def _change(body: list[dict[str, Any]], rng: random.Random) -> None:
    """Make one thing about a list of messages other than it was."""
    what = rng.random()
    if what < 0.3 or not body:
        at = rng.randint(0, len(body))
        body[at:at] = [dict(one) for one in _run(rng)]
    elif what < 0.4:
        body.insert(rng.randint(0, len(body)), dict(rng.choice(body)))
    elif what < 0.5:
        body.pop(rng.randrange(len(body)))
    elif what < 0.55:
        body.append(body.pop(rng.randrange(len(body))))
    else:
        _change_field(rng.choice(body), rng)


def _run(rng: random.Random) -> list[dict[str, Any]]:
    """Return a few requests that follow each other in a conversation."""
    at = rng.randrange(len(TEMPLATES))
    return TEMPLATES[at : at + rng.choice((1, 1, 2, 4, 9))]


def _change_field(message: dict[str, Any], rng: random.Random) -> None:
    if not message:
        return
    key = rng.choice(list(message))
    value = message[key]
    what = rng.random()
    if isinstance(value, dict) and what < 0.7:
        _change_field(value, rng)
    elif isinstance(value, bool) or what < 0.3:
        message[key] = rng.choice(_MAD)
    elif isinstance(value, int | float) and what < 0.9:
        message[key] = value + rng.choice((-100, -1, 1, 2, 20, 100, 1000))
    elif isinstance(value, bytes) and value:
        at = rng.randrange(len(value))
        message[key] = rng.choice((value[:at], value + value, value[:at] + rng.randbytes(4)))
    elif isinstance(value, str) and what < 0.9:
        message[key] = rng.choice(("a", "b", "c", "d", "good", "tiny", "tinyheart", "mV", "1"))
    elif what < 0.95:
        del message[key]
    else:
        other = rng.choice(TEMPLATES)
        message |= {name: other[name] for name in other if name != "type"}


# --- model files ---------------------------------------------------------------------------------


class Files:
    """Model files: a statement in JSON behind a graph, in TOML beside one, or any bytes.

    An input is such a statement; its first byte says which kind: ``{`` JSON, else TOML. A file of
    other bytes is left to the parser of ONNX Runtime, see :func:`main`.
    """

    def __init__(self, folder: Path) -> None:
        self.tried = 0
        self.thrown: list[bytes] = []
        self._json, self._toml = folder / "mad.onnx", folder / "mad.toml"
        self._graph = tiny.graph().SerializeToString()
        (folder / "graph.onnx").write_bytes(self._graph)
        tiny.write_detector(folder)

    def throw(self, data: bytes) -> None:
        """Load a model file; it may be refused, in words."""
        self.tried += 1
        self.thrown = [data]
        path = self._json if data[:1] == b"{" else self._toml
        path.write_bytes(with_metadata(self._graph, data) if path == self._json else data)
        began = time.perf_counter()
        try:
            model_file.load(path)
        except ModelFileError as error:
            if not str(error).startswith(f"{path}: "):
                raise Found(f"crash: the error does not name the file: {error}") from None
        took_s = time.perf_counter() - began
        if took_s > HANG_S:
            raise Found(f"hang: one file took {took_s:.1f}")

    def settle(self) -> None:
        """Nothing is carried from file to file."""

    def mutate(self, data: bytes, rng: random.Random) -> bytes:
        """Return a statement that is well-formed, and mad."""
        as_json = data[:1] == b"{"
        try:
            raw = msgspec.json.decode(data) if as_json else msgspec.toml.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raw = msgspec.to_builtins(tiny.spec())
        if not isinstance(raw, dict):
            raw = {}
        for _ in range(rng.randint(1, 3)):
            _change_statement(raw, rng)
        try:
            return msgspec.json.encode(raw) if as_json else msgspec.toml.encode(raw)
        except (TypeError, ValueError):  # TOML has no null
            return msgspec.json.encode(raw)


def _change_statement(part: Any, rng: random.Random) -> None:
    """Change something somewhere inside a statement."""
    keys = list(part) if isinstance(part, dict) else list(range(len(part)))
    if not keys:
        return
    key = rng.choice(keys)
    if isinstance(part[key], dict | list) and part[key] and rng.random() < 0.8:
        _change_statement(part[key], rng)
    elif rng.random() < 0.1:
        part.pop(key)
    elif isinstance(part[key], int | float) and rng.random() < 0.5:
        part[key] += rng.choice((-20, -1, 1, 20))
    else:
        plain = [one for one in _MAD if not isinstance(one, bytes)]
        part[key] = rng.choice([*plain, "graph.onnx", "detector.onnx", "..", "os:x", "x", "h0"])


def with_metadata(graph: bytes, statement: bytes) -> bytes:
    """Return a graph with a statement of any bytes behind it, as protobuf joins messages."""

    def field(number: int, content: bytes) -> bytes:
        length, size = bytearray(), len(content)
        while size > 127:
            length.append(size & 127 | 128)
            size >>= 7
        return bytes([number << 3 | 2, *length, size]) + content

    entry = field(1, model_file.METADATA_KEY.encode()) + field(2, statement)
    return graph + field(14, entry)  # ModelProto.metadata_props


# --- the fuzzer ----------------------------------------------------------------------------------

# The engine must be imported under the eyes of atheris, and this file imports it. Not the parts
# that compare whole arrays: nothing that a body says is decided there, and see above.
_CHILD = """
import sys, atheris
names = ("alerts config errors lives loop messages model_file pseudonyms rights rules session "
         "signal heart.news2 heart.wing speech.hotwords speech.wing").split()
with atheris.instrument_imports(include=[f"engine.{name}" for name in names]):
    from tests.chaos import fuzz
fuzz.run(*sys.argv[1:])
"""
# Of one process; the next begins with the inputs that it has found worth keeping.
_MOST_MESSAGES = 500_000
TARGETS: dict[str, Callable[[Path], Target]] = {"wire": Wire, "files": Files}


def seeds(target: str) -> list[bytes]:
    """Return the committed inputs of a target."""
    return [path.read_bytes() for path in sorted((CORPUS / target).iterdir())]


def fuzz(target: str, messages: int, seed: int = 1, most_s: float = math.inf) -> dict[str, Any]:
    """Try so many inputs, in child processes, and report what was found.

    Parameters
    ----------
    target : {"wire", "files"}
    messages : int
    seed : int
        Of the first process, and one more for each that follows.
    most_s : float
        End after so many seconds in any case.
    """
    began = time.monotonic()
    tried = inputs = 0
    report: dict[str, Any] = {
        "figure": 0,
        "what": f"crashes, hangs, leaks and effects on a neighbour; inputs of {target}",
    }
    with tempfile.TemporaryDirectory() as folder:
        grown = Path(folder) / "grown"
        grown.mkdir()
        while tried < messages and (left_s := most_s - time.monotonic() + began) > 0:
            wanted = min(_MOST_MESSAGES, messages - tried)
            done, told = _one_process(target, Path(folder), wanted, seed, left_s)
            tried, inputs = tried + told["tried"], inputs + told["inputs"]
            report |= {"tried": tried, "inputs": inputs, "resident_mb": told["resident_mb"]}
            if done.returncode or not told["tried"]:
                kept = Path(f"fuzz-{target}-failure.msgpack")
                report |= {"figure": 1, "seed": seed, "exit_code": done.returncode}
                report |= {"said": done.stdout[-4000:]}
                failure = Path(folder) / "failure"
                if failure.exists():
                    kept.write_bytes(failure.read_bytes())
                    report["replay"] = f"python -m tests.chaos.fuzz {target} --replay {kept}"
                break
            seed += 1
        report |= {"kept": len(list(grown.iterdir()))}
    return report | {"seconds": round(time.monotonic() - began, 1)}


def _one_process(
    target: str, folder: Path, messages: int, seed: int, most_s: float
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """Let atheris run; return how it ended, and what it counted."""
    state = folder / "state.json"
    state.unlink(missing_ok=True)
    command = [sys.executable, "-c", _CHILD, target, str(folder), str(messages), f"-seed={seed}"]
    command += ["-max_len=8192", "-timeout=60", "-rss_limit_mb=4096", "-verbosity=0"]
    command += [f"-artifact_prefix={folder}/", str(folder / "grown"), str(CORPUS / target)]
    if most_s < math.inf:
        command.append(f"-max_total_time={math.ceil(most_s)}")
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    nothing = {"tried": 0, "inputs": 0, "resident_mb": 0.0}
    return done, json.loads(state.read_text()) if state.exists() else nothing


def run(name: str, folder: str, messages: str, *arguments: str) -> None:
    """Feed a target from atheris until it has so many messages; ends the process."""
    import atheris

    target, inputs = TARGETS[name](Path(folder)), 0
    state, failure = Path(folder) / "state.json", Path(folder) / "failure"
    logging.disable()

    def note() -> None:
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
        told = {"tried": target.tried, "inputs": inputs}
        state.write_text(json.dumps(told | {"resident_mb": round(resident / 2**20, 1)}))

    def one_input(data: bytes) -> None:
        nonlocal inputs
        inputs += 1
        try:
            target.throw(data)
            if target.tried >= int(messages):
                target.settle()
                note()
                os._exit(0)
        except BaseException:
            note()
            failure.write_bytes(msgpack.packb(target.thrown))
            raise
        if inputs % 200 == 0:
            note()

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.4:
            return atheris.Mutate(data, max_size)
        made = target.mutate(data, rng)
        return made if len(made) <= max_size else atheris.Mutate(data, max_size)

    atheris.Setup([sys.argv[0], *arguments], one_input, custom_mutator=mutate)
    atheris.Fuzz()


def main() -> None:
    """Run a target, or replay what one has found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=math.inf, help="At most.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--replay", type=Path, help="A file that an earlier run left.")
    given = parser.parse_args()
    if given.replay:
        with tempfile.TemporaryDirectory() as folder:
            target = TARGETS[given.target](Path(folder))
            for data in msgpack.unpackb(given.replay.read_bytes()):
                target.throw(data)
            target.settle()
        return
    report = fuzz(given.target, given.messages, given.seed, given.seconds)
    if not given.json:
        sys.stdout.write(f"{report.pop('said', '')}\n")
    sys.stdout.write(json.dumps(report) + "\n")
    sys.exit(report["figure"])


if __name__ == "__main__":
    main()
