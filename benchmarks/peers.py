"""The same CTC weights in this engine and in sherpa-onnx, side by side in one run.

::

    python -m benchmarks.peers [MODEL] [--data ../shared/data/speech/librispeech] [--json]

Both are given the same sound in the same chunks of one hop, for 1, 4, 16 and 64 streams, and take
turns; a turn is timed from samples to tokens, front end included, float32. Here that is the path
of a chunk through the engine behind its sockets: session, lane, front, features, runtime, greedy
search. There it is ``accept_waveform``, ``is_ready`` and ``decode_streams`` of
``OnlineRecognizer.from_nemo_ctc``. The tokens of every stream are compared.

Without a MODEL the weights are random: a net of the size that recognises English (convolutions
by 4, four LSTM of 256), in steps of 160 ms, whose blank is as frequent as in a trained one.
"""

import argparse
import gc
import importlib
import importlib.metadata
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from engine import bench, features, messages, model_file
from engine.errors import MurmurError
from engine.features import LogMel
from engine.lane import Lane
from engine.model_file import Input, Model, ModelSpec, Output, Stage
from engine.runtime import CpuRuntime
from engine.session import Session
from engine.speech.ctc import GreedyDecoder
from engine.wing import Outputs, PromptWing, Rows
from exporters import sherpa

Samples = NDArray[np.float32]

STREAMS = (1, 4, 16, 64)
THREADS = (1, 2)
RATE_HZ = 16_000
_SILENCE_S = 0.5  # before the sound: the front ends differ at the very edge
_CREDIT_S = 2.0
# At the beginning of a turn, whose caches and cores are still as the other left them.
_UNTIMED_HOPS = 4


class Recogniser(Protocol):
    """One that takes the next hop of each stream."""

    def push(self, number: int) -> None: ...
    def text(self, stream: int) -> str: ...


class Tokens(PromptWing):
    """Greedy search and nothing else: no utterances, no messages."""

    def __init__(self, spec: ModelSpec, num_slots: int) -> None:
        self.delay = 0
        self.decoder = GreedyDecoder(spec.outputs[0].labels, num_slots)
        self._output = spec.outputs[0].name

    def reset(self, slot: int) -> None:
        self.decoder.reset(slot)

    def gap(self, slot: int, state: messages.Gapped) -> None:
        """There is none."""

    def push(self, rows: Rows, outputs: Outputs) -> list[tuple[int, messages.Message]]:
        self.decoder.push(rows.slots, outputs[self._output])
        return []


class Ours:
    """The engine behind its sockets; no scheduler, for all streams are ready at once.

    Parameters
    ----------
    model : Model
    sounds : (streams, samples) float32
    threads : int
    """

    def __init__(self, model: Model, sounds: Samples, threads: int) -> None:
        spec = model.spec
        count = len(sounds)
        self._wing = Tokens(spec, count)
        self._lane = Lane(spec, CpuRuntime(model, count, threads), self._wing, count, _CREDIT_S)
        self._slots = np.arange(count)
        self._sessions = []
        for stream in range(count):
            opened = messages.Open(f"s{stream}", spec.name, RATE_HZ, spec.input.unit)
            session = Session(opened, spec.input, round(_CREDIT_S * RATE_HZ), 2**20)
            assert self._lane.open(session) == stream
            self._sessions.append(session)
        hop = spec.hop_samples
        self._chunks = [
            [
                messages.Chunk(session.name, number, number * hop, part.tobytes())
                for session, part in zip(self._sessions, parts, strict=True)
            ]
            for number, parts in enumerate(_hops(sounds, hop))
        ]

    def push(self, number: int) -> None:
        lane = self._lane
        for slot, (session, chunk) in enumerate(
            zip(self._sessions, self._chunks[number], strict=True)
        ):
            session.accept(chunk)
            lane.feed(slot)
        for start in range(0, len(self._slots), lane.runtime.max_rows):
            lane.step(self._slots[start : start + lane.runtime.max_rows], 1)

    def text(self, stream: int) -> str:
        return self._wing.decoder.best(stream).text


class Theirs:
    """sherpa-onnx in the manner of its own examples, and its batches as large as they can be."""

    def __init__(self, model: Model, sounds: Samples, threads: int) -> None:
        wrapped = sherpa.wrap(model)
        with tempfile.TemporaryDirectory() as folder:
            graph, tokens = wrapped.write(Path(folder))
            self._recogniser = _sherpa_onnx().OnlineRecognizer.from_nemo_ctc(
                tokens=str(tokens), model=str(graph), num_threads=threads
            )
        self._letters = " " in model.spec.outputs[0].labels
        self._streams = [self._recogniser.create_stream() for _ in sounds]
        self._hops = _hops(sounds * np.float32(wrapped.gain), model.spec.hop_samples)

    def push(self, number: int) -> None:
        for stream, samples in zip(self._streams, self._hops[number], strict=True):
            stream.accept_waveform(RATE_HZ, samples)
        while ready := [one for one in self._streams if self._recogniser.is_ready(one)]:
            self._recogniser.decode_streams(ready)

    def text(self, stream: int) -> str:
        tokens = self._recogniser.tokens(self._streams[stream])
        said = "".join(tokens).replace(sherpa.SPACE, " ") if self._letters else " ".join(tokens)
        return " ".join(said.split())


class Turns(NamedTuple):
    """What a number of streams on a number of threads came to."""

    streams: int
    threads: int
    ours: float  # seconds of sound a second, the median of all turns
    theirs: float
    ratio: float  # median of the turns' ratios
    ratio_of_cpu: float  # of their processor time to ours
    identical: int  # streams whose tokens are
    tokens: int  # compared


def compare(
    model: Model, sound: Samples, streams: int, threads: int, turns: int, hops: int
) -> Turns:
    """Let both take turns on the same sound.

    Parameters
    ----------
    model : Model
    sound : (samples,) float32
        Every stream plays it from another place on.
    streams, threads, turns : int
    hops : int
        In a turn.
    """
    hop = model.spec.hop_samples
    silence = np.zeros(-(-round(_SILENCE_S * RATE_HZ) // hop) * hop, np.float32)
    needed = hop * (turns * (_UNTIMED_HOPS + hops) + 4)
    sounds = np.stack(
        [
            np.concatenate([silence, np.take(sound, np.arange(place, place + needed), mode="wrap")])
            for place in np.linspace(0, len(sound), streams, endpoint=False).astype(int)
        ]
    )
    early = sherpa.wrap(model).early_samples
    ours = Ours(model, sounds[:, early:], threads)
    theirs = Theirs(model, sounds, threads)
    gc.freeze()  # as the server does: no collection looks at the chunks that are still to come
    next_hop = len(silence) // hop + 2
    for number in range(next_hop):
        ours.push(number)
        theirs.push(number)
    seconds = np.empty((turns, 2, 2))
    for turn in range(turns):
        begin, end = next_hop + _UNTIMED_HOPS, next_hop + _UNTIMED_HOPS + hops
        for who in (0, 1) if turn % 2 else (1, 0):
            _timed((ours, theirs)[who], range(next_hop, begin))
            seconds[turn, who] = _timed((ours, theirs)[who], range(begin, end))
        next_hop = end
    gc.unfreeze()
    theirs.push(next_hop)  # it hears a hop once the next has begun
    texts = [(ours.text(stream), theirs.text(stream)) for stream in range(streams)]
    sound_s = streams * hops * hop / RATE_HZ
    wall, cpu = seconds[:, :, 0], seconds[:, :, 1]
    return Turns(
        streams,
        threads,
        ours=float(np.median(sound_s / wall[:, 0])),
        theirs=float(np.median(sound_s / wall[:, 1])),
        ratio=float(np.median(wall[:, 1] / wall[:, 0])),
        ratio_of_cpu=float(np.median(cpu[:, 1] / cpu[:, 0])),
        identical=sum(one == other for one, other in texts),
        tokens=sum(len(other.split()) for _, other in texts),
    )


def _timed(who: Recogniser, numbers: range) -> tuple[float, float]:
    """Return the wall and the processor time of some hops."""
    wall, cpu = time.perf_counter(), time.process_time()
    for number in numbers:
        who.push(number)
    return time.perf_counter() - wall, time.process_time() - cpu


def _hops(sounds: Samples, hop: int) -> list[Samples]:
    """Cut (streams, samples) into hops."""
    whole = sounds.shape[1] // hop
    return np.split(sounds[:, : whole * hop], whole, axis=1)


# --- the weights -----------------------------------------------------------------------------

_LABELS = 512  # word pieces, as is usual
_LIVELY = 3.0  # times torch's own first weights, or four layers let next to nothing through
_SAID = 0.15  # share of outputs that are not blank: some four word pieces a second


def random_model(sound: Samples, path: Path, layers: int = 4, hidden: int = 256) -> None:
    """Write a net of the size that recognises English; needs the extra ``export``.

    Each label's logit is made to vary as much as any other's, and the blank to be the highest as
    often as a trained one is, on some sound, (samples,) float32.
    """
    import torch
    from torch import nn

    from exporters.net import Conv, Head, NetConfig, StreamingNet
    from exporters.to_onnx import export, states_of

    torch.manual_seed(0)
    torch.set_num_threads(1)
    recipe = LogMel()
    net = StreamingNet(
        NetConfig(
            heads={"ctc": Head(_LABELS, "log_softmax")},
            channels=recipe.bins,
            convs=(Conv(hidden, 4, 2), Conv(hidden, 4, 2)),
            layers=layers,
            hidden=hidden,
            normalised=True,
        )
    )
    with torch.no_grad():
        for name, weight in net.recurrent.named_parameters():
            if "weight" in name:
                weight *= _LIVELY
        x = torch.from_numpy(features.extract(recipe, sound[None, :, None], RATE_HZ))
        x = x[:, : x.shape[1] // net.config.stride * net.config.stride]
        net.mean.copy_(x.mean((0, 1)))
        net.scale.copy_(1 / x.std((0, 1)))
        head = net.heads["ctc"]
        assert isinstance(head, nn.Linear)
        logits = net.logits(x, *net.initial_states(1))[0]["ctc"][0]
        spread = logits.std(0)
        head.weight /= spread[:, None]
        head.bias.copy_((head.bias - logits.mean(0)) / spread)
        logits = net.logits(x, *net.initial_states(1))[0]["ctc"][0]
        head.bias[0] += (logits[:, 1:].amax(1) - logits[:, 0]).quantile(1 - _SAID)
    hop = 16 * recipe.shift_samples
    spec = ModelSpec(
        format=model_file.FORMAT,
        name="random",
        pipeline="speech",
        input=Input(float(RATE_HZ), "1"),
        hop_samples=hop,
        window_samples=hop + recipe.frame_samples - 120,
        stages=(Stage("x", (16, recipe.bins), features=recipe, states=states_of(net)),),
        outputs=(Output("ctc", "ctc", ("", *(f"piece{k}" for k in range(1, _LABELS)))),),
        licence="Apache-2.0",
        provenance="random weights",
    )
    export(net, spec, path)


# --- the command -----------------------------------------------------------------------------


def _sherpa_onnx() -> Any:
    try:
        return importlib.import_module("sherpa_onnx")
    except ImportError as error:
        raise MurmurError(f"{error}: pip install 'murmur-engine[peers]'") from None


def report(model: Model, sound: Samples, turns: int, hops: int) -> dict[str, Any]:
    """Return the table, and as its figure the ratio of the most streams on the most threads."""
    rows = [
        compare(model, sound, streams, threads, turns, hops)
        for threads in THREADS
        for streams in STREAMS
    ]
    return {
        "figure": rows[-1].ratio,
        "what": f"{STREAMS[-1]} streams, {THREADS[-1]} threads: seconds of sound a second, ours "
        "over sherpa-onnx's",
        "model": model.spec.name,
        "hop_s": model.spec.hop_samples / RATE_HZ,
        "sherpa_onnx": importlib.metadata.version("sherpa-onnx"),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "rows": [row._asdict() for row in rows],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="model file or name; default: random weights")
    parser.add_argument("--data", type=Path, default=bench.RECORDINGS / "librispeech")
    parser.add_argument("--split", default="valid", help="of the manifest")
    parser.add_argument("--turns", type=int, default=9, help="of each, at each number of streams")
    parser.add_argument("--hops", type=int, default=25, help="in a turn")
    parser.add_argument("--json", action="store_true", help="print one object on the last line")
    arguments = parser.parse_args()
    try:
        sound = bench.speech([arguments.data], arguments.split).samples
        with tempfile.TemporaryDirectory() as folder:
            path = arguments.model or Path(folder) / "random.onnx"
            if arguments.model is None:
                random_model(sound[: 20 * RATE_HZ], path)
            made = report(model_file.load(path), sound, arguments.turns, arguments.hops)
    except MurmurError as error:
        print(f"peers: {error}", file=sys.stderr)  # noqa: T201
        return 1
    if arguments.json:
        print(json.dumps(made))  # noqa: T201
    else:
        print("\n".join(lines(made)))  # noqa: T201
    return 0


def lines(made: dict[str, Any]) -> list[str]:
    """Return the table for a person."""
    head = f"{'streams':>7} {'threads':>7} {'ours':>8} {'theirs':>8} {'ratio':>6} {'CPU':>6}  same"
    return [
        f"{made['model']}, steps of {made['hop_s']:g} s; sherpa-onnx {made['sherpa_onnx']}; "
        "seconds of sound a second",
        f"{head} tokens",
        *(
            f"{row['streams']:7} {row['threads']:7} {row['ours']:8.0f} {row['theirs']:8.0f} "
            f"{row['ratio']:6.2f} {row['ratio_of_cpu']:6.2f}  "
            f"{row['identical']} of {row['streams']} streams, {row['tokens']} tokens"
            for row in made["rows"]
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())
