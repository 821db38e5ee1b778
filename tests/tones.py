"""Words that are tones, for tests that must know to the sample what was said and when.

Each word has its own pitch. :func:`write_model` makes a model file for the real engine, and
:class:`ToneServer` is a server that needs no model, resampling or batching, and asks nothing.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import zmq
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from engine import messages as m
from engine import model_file
from tests import tiny

PITCH = {"zero": 300.0, "one": 500.0, "two": 700.0, "three": 900.0, "four": 1100.0}
RATE_HZ = 16_000  # of the model
FRAME_S = 0.05
_LOUD = 0.02  # of the mean square's root


def say(*words: str, rate_hz: int = RATE_HZ, each_s: float = 0.3) -> NDArray[np.float32]:
    """Return words one after another, each between silences of 0.1 s; "-" is 1 s of silence."""
    parts = []
    for word in words:
        if word == "-":
            parts.append(np.zeros(rate_hz))
            continue
        time_s = np.arange(round(each_s * rate_hz)) / rate_hz
        quiet = np.zeros(round(0.1 * rate_hz))
        parts += [quiet, 0.5 * np.sin(2 * np.pi * PITCH[word] * time_s), quiet]
    return np.concatenate(parts).astype(np.float32) if parts else np.zeros(0, np.float32)


def write_model(folder: Path, frames: int = 2) -> Path:
    """Write a model of speech that tells, every 50 ms, which tone is there; so many in a step.

    The pitches make whole periods in a frame, so that their waves are orthogonal there. It looks
    at each frame a step late, so that it has a look-ahead as real models have.
    """
    frame = round(FRAME_S * RATE_HZ)
    hop = frames * frame
    phase = 2 * np.pi * np.outer(np.arange(frame) / RATE_HZ, list(PITCH.values()))
    waves = np.concatenate([np.cos(phase), np.sin(phase)], 1) * 2 / frame
    constants = {
        "from": np.array([0]),
        "to": np.array([hop]),
        "axis": np.array([1]),
        "frames": np.array([0, -1, frame]),
        "waves": waves.astype(np.float32),
        "halves": np.array([0, -1, 2, len(PITCH)]),
        "least": np.float32(_LOUD),
        "slope": np.float32(100),
        "room": np.array([0, 0, 1, 0, 0, 0]),
    }
    nodes = [
        helper.make_node("Slice", ["x", "from", "to", "axis"], ["older"]),
        helper.make_node("Reshape", ["older", "frames"], ["cut"]),
        helper.make_node("MatMul", ["cut", "waves"], ["parts"]),
        helper.make_node("Reshape", ["parts", "halves"], ["pairs"]),
        helper.make_node("ReduceL2", ["pairs"], ["amplitude"], axes=[2], keepdims=0),
        helper.make_node("Sub", ["amplitude", "least"], ["above"]),
        helper.make_node("Mul", ["above", "slope"], ["logits"]),
        helper.make_node("Pad", ["logits", "room"], ["with_blank"]),
        helper.make_node("LogSoftmax", ["with_blank"], ["ctc"], axis=2),
    ]
    tensor = helper.make_tensor_value_info
    made = helper.make_model(
        helper.make_graph(
            nodes,
            "tones",
            [tensor("x", TensorProto.FLOAT, ["batch", 2 * hop, 1])],
            [tensor("ctc", TensorProto.FLOAT, ["batch", frames, len(PITCH) + 1])],
            [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
    )
    made.ir_version = 9
    spec = model_file.ModelSpec(
        format=model_file.FORMAT,
        name=f"tones{frames}",
        pipeline="speech",
        input=model_file.Input(float(RATE_HZ), "1"),
        hop_samples=hop,
        window_samples=2 * hop,
        stages=(model_file.Stage("x", (2 * hop, 1)),),
        outputs=(model_file.Output("ctc", "ctc", ("", *PITCH)),),
        licence="CC0-1.0",
        provenance="made by a test",
        look_ahead_samples=hop,
    )
    return tiny.write(folder, spec, made=made)


class Ear:
    """One stream: samples in, partials and finals out."""

    def __init__(self, opened: m.Open) -> None:
        self.opened, self.rate_hz = opened, opened.rate_hz
        self.frame = round(FRAME_S * self.rate_hz)
        self.kept = np.zeros(0, np.float32)
        self.index = self.place = opened.index  # received; taken into frames
        self.utterance = 0
        self.words: list[m.Word] = []
        self.word: str | None = None
        self.begun = self.quiet = 0

    def push(self, samples: NDArray[np.float32]) -> list[m.Message]:
        self.kept = np.concatenate([self.kept, samples])
        self.index += len(samples)
        told: list[m.Message] = []
        while len(self.kept) >= self.frame:
            told += self._step(_word(self.kept[: self.frame], self.rate_hz))
            self.kept = self.kept[self.frame :]
        return told

    def flush(self) -> list[m.Message]:
        told = self._step(None) + self._final("flush")
        self.kept, self.place = np.zeros(0, np.float32), self.index
        return told

    def _step(self, word: str | None) -> list[m.Message]:
        end = self.place + self.frame
        told: list[m.Message] = []
        if self.word is not None and word != self.word:
            told = self._heard(self.word)
        if word != self.word:
            self.begun = self.place
        self.word, self.place = word, end
        self.quiet = 0 if word else self.quiet + self.frame
        silence = self.opened.speech.silence_s * self.rate_hz
        if self.words and self.quiet >= silence:
            told += self._final("silence")
        return told

    def _heard(self, word: str) -> list[m.Message]:
        times = (self.begun / self.rate_hz, self.place / self.rate_hz)
        self.words.append(m.Word(word, *times, 0.9))
        if not self.opened.speech.partials:
            return []
        index = self.place + self.frame
        return [m.Partial(self.opened.stream, self.utterance, self.text, index, len(self.words))]

    @property
    def text(self) -> str:
        return " ".join(word.text for word in self.words)

    def _final(self, reason: str) -> list[m.Message]:
        if not self.words:
            return []
        start, end = (
            round(t * self.rate_hz) for t in (self.words[0].start_s, self.words[-1].end_s)
        )
        text = f"{self.text.capitalize()}."
        told = m.Final(
            self.opened.stream,
            self.utterance,
            text,
            start,
            end,
            self.place,
            reason,  # type: ignore[arg-type]
            tuple(self.words),
        )
        self.utterance += 1
        self.words = []
        return [told]


def _word(frame: NDArray[np.float32], rate_hz: float) -> str | None:
    if np.sqrt(np.mean(frame**2)) < _LOUD:
        return None
    pitch = np.argmax(np.abs(np.fft.rfft(frame))) * rate_hz / len(frame)
    return min(PITCH, key=lambda word: abs(PITCH[word] - pitch))


class ToneServer:
    """Answers in a thread of its own, one message at a time.

    Attributes
    ----------
    most : int
        Streams that are taken at once.
    opened : list of Open
        All that were ever asked for and taken.
    """

    def __init__(self, most: int = 100, credit_s: float = 2.0) -> None:
        self.most, self.credit_s = most, credit_s
        self.opened: list[m.Open] = []
        self.gaps: list[m.Gap] = []
        self.most_open = 0
        self._ears: dict[str, Ear] = {}
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self.address = f"tcp://127.0.0.1:{port}"
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()
        self._socket.close()
        self._context.term()

    def _run(self) -> None:
        while not self._stopping.is_set():
            if self._socket.poll(20):
                peer, body = self._socket.recv_multipart()
                answers: list[m.Message] = []
                for request in m.decode_requests(body):
                    answers += self._answer(request)
                if answers:
                    self._socket.send_multipart(
                        (peer, m.body([m.encode(answer) for answer in answers]))
                    )

    def _answer(self, request: m.Request) -> list[m.Message]:
        match request:
            case m.Hello():
                sizes = (1_048_576, 512, 262_144, 60.0)
                return [m.Welcome(m.VERSION, "tones", ["english", "words"], *sizes)]
            case m.Ping():
                return [m.Pong(request.id)]
            case m.Open():
                return self._open(request)
            case m.Chunk():
                return self._chunk(request)
            case m.Flush():
                ear = self._ears[request.stream]
                return [*ear.flush(), m.Flushed(request.stream, request.id, ear.index)]
        ear = self._ears.pop(request.stream)
        return [m.Closed(request.stream, "closed", 0, ear.index, 0, 0, 0)]

    def _open(self, request: m.Open) -> list[m.Message]:
        if len(self._ears) >= self.most:
            return [m.Error("full", f"limits.max_streams is {self.most}", request.stream)]
        self.opened.append(request)
        self._ears[request.stream] = Ear(request)
        self.most_open = max(self.most_open, len(self._ears))
        credit = round(self.credit_s * request.rate_hz)
        return [m.Opened(request.stream, request.model, "0" * 64, credit, 0.0, FRAME_S)]

    def _chunk(self, chunk: m.Chunk) -> list[m.Message]:
        ear = self._ears[chunk.stream]
        told: list[m.Message] = []
        if chunk.index > ear.index:
            gap = m.Gap(chunk.stream, ear.index, chunk.index, "reset")
            self.gaps.append(gap)
            ear.index = ear.place = chunk.index
            ear.kept = np.zeros(0, np.float32)
            told.append(gap)
        kind = "<f4" if ear.opened.dtype == "f4" else "<i2"
        samples = np.frombuffer(chunk.data, kind).astype(np.float32) * np.float32(ear.opened.gain)
        told += ear.push(samples)
        return [*told, m.Ack(chunk.stream, chunk.seq, ear.index)]


@contextmanager
def tone_server(**options: float) -> Iterator[ToneServer]:
    server = ToneServer(**options)  # type: ignore[arg-type]
    try:
        yield server
    finally:
        server.stop()
