"""The graphs of the open-vocabulary recogniser, node by node: ``python -m exporters.speech``.

Three graphs, each the equal of a module of :mod:`exporters.moonshine`: a chunk of a stream, the
encoder over a whole utterance, and the decoder's step. They are written by hand because torch's
export of the same modules takes twice the time: here keys are turned in halves, nothing is
transposed that the next product can read as it is, and matrices are multiplied as 8-bit integers.

Rows stay apart: each row of activations has its own scale, and integers add up to the same sum in
any order, so that a stream's results do not depend on its neighbours, bit for bit.

A graph is made in two forms. The one of float32 must compute what torch computes; the one that
is served differs from it by the rounding to 8 bits alone, which is measured and bounded. Graphs
hold no weights: they name what :mod:`engine.speech.tensors` makes, in one file beside them.
"""

import argparse
import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from engine import model_file
from engine.model_file import open_session
from engine.speech import build, moonshine, tensors
from engine.speech.second_pass import LONGEST_S, MOST_TOKENS, RATE_HZ
from engine.speech.tensors import HEAD, HEADS, LAYERS, ROTATED, WIDTH, Linear, Parts, Tensors
from exporters.moonshine import (
    LONGEST_FRAMES,
    PRIOR_FRAMES,
    PRIOR_SQUARE,
    SAMPLES_PER_FRAME,
    Chunking,
    CtcHead,
    Decoder,
    Encoder,
    angles,
)
from exporters.parity import ExportError

Form = Literal["float", "columns", "blocks"]
Array = NDArray[Any]

SERVED = Chunking(24, 16, 192)
_RATIO = 6  # frames of the first convolution in one of the last
_EXTRA = 7
_EPSILON = 1e-5  # of all norms
_MASKED = np.float32(-1e4)
_OPSET, _IR = 21, 10
_FUSED = "com.microsoft"  # ONNX Runtime's own operators
_FUSED_OPS = {
    "BiasGelu", "MatMulIntegerToFloat", "MatMulNBits", "MultiHeadAttention", "QuickGelu",
    "RotaryEmbedding",
}  # fmt: skip
# No value behind a GELU is below -0.17: there the integers begin at 0 - _GELU_ZERO.
_GELU_LEAST, _GELU_ZERO = 0.1701, 16
_END = np.iinfo(np.int64).max


class Graph:
    """An ONNX graph in the making.

    Parameters
    ----------
    form : {"float", "columns", "blocks"}
        How its matrices are multiplied, and so what :mod:`engine.speech.tensors` keeps of them.
    parts : dict
        All that it names, and must name.
    """

    def __init__(self, form: Form, parts: Parts) -> None:
        self.form = form
        make = {"float": _in_floats, "columns": tensors.in_columns, "blocks": tensors.in_blocks}
        self.tensors: Tensors = make[form](parts)
        self._parts = parts
        self._nodes: list[NodeProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._small: list[TensorProto] = []
        self._named: set[str] = set()
        self._rounded: dict[str, tuple[str, str]] = {}
        self._zeros: dict[tuple[str, int], str] = {}
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []

    def input(self, name: str, shape: Sequence[int | str], dtype: int = TensorProto.FLOAT) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, shape: Sequence[int | str], dtype: int = TensorProto.FLOAT) -> str:
        self._outputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def weight(self, name: str) -> str:
        """Return a tensor of the file of weights, by its name."""
        self._named.add(name)
        return f"weights.{name}"

    def op(self, kind: str, *inputs: Any, into: str = "", **attributes: Any) -> str:
        """Add a node of one output; inputs are names, or values that become constants."""
        (name,) = self.ops(kind, *inputs, into=(into,), **attributes)
        return name

    def ops(self, kind: str, *inputs: Any, into: Sequence[str], **attributes: Any) -> list[str]:
        """Add a node of several outputs; those without a name get one."""
        read = [each if isinstance(each, str) else self._constant(each) for each in inputs]
        made = [name or f"{kind}.{len(self._nodes)}.{place}" for place, name in enumerate(into)]
        domain = _FUSED if kind in _FUSED_OPS else ""
        self._nodes.append(helper.make_node(kind, read, made, domain=domain, **attributes))
        return made

    def _constant(self, value: Any) -> str:
        array = np.asarray(value)
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant.{len(self._constants)}"
            self._constants[key] = name
            self._small.append(numpy_helper.from_array(array, name))
        return self._constants[key]

    # --- products ----------------------------------------------------------------------------

    def product(self, x: str, name: str, rows: str = "frames", gelu: bool = False) -> str:
        """Multiply rows by a matrix.

        Parameters
        ----------
        x : str
            (rows, inputs)
        name : str
            Of the matrix.
        rows : str
            The same word wherever there are as many rows.
        gelu : bool
            The rows come from a GELU.
        """
        if self.form == "float":
            return self.op("MatMul", x, self.weight(name))
        matrix = [self.weight(name), self.weight(f"{name}.scale"), self.weight(f"{name}.zero")]
        if self.form == "blocks":
            part = self._parts[name]
            assert isinstance(part, Linear)
            inputs, outputs = part.integers.shape
            sizes = {"K": inputs, "N": outputs, "bits": 8, "block_size": tensors.BLOCK}
            return self.op("MatMulNBits", x, *matrix, accuracy_level=4, **sizes)
        values, scale, zero, one = matrix[0], matrix[1], matrix[2], np.float32(1)
        integers, step = self._integers(x, rows, gelu)
        middle = np.uint8(_GELU_ZERO if gelu else 128)
        y = self.op("MatMulIntegerToFloat", integers, values, one, scale, middle, zero)
        return self.op("Mul", y, step)

    def _integers(self, x: str, rows: str, gelu: bool) -> tuple[str, str]:
        """Round each row to 8 bits of its own scale; return integers and scales."""
        if x in self._rounded:
            return self._rounded[x]
        last = np.array([-1])
        if gelu:
            highest = self.op("ReduceMax", x, last, keepdims=1)
            least = np.float32(_GELU_LEAST / _GELU_ZERO)
            step = self.op("Max", self.op("Mul", highest, 1 / (255 - _GELU_ZERO)), least)
        else:
            highest = self.op("ReduceMax", self.op("Abs", x), last, keepdims=1)
            step = self.op("Mul", self.op("Max", highest, np.float32(1e-9)), 1 / 127)
        steps = self.op("Reshape", step, last)
        middle = _GELU_ZERO if gelu else 128
        if (rows, middle) not in self._zeros:
            shape = self.op("Shape", steps)
            self._zeros[rows, middle] = self.op("Expand", np.uint8(middle), shape)
        integers = self.op("QuantizeLinear", x, steps, self._zeros[rows, middle], axis=0)
        self._rounded[x] = integers, step
        return self._rounded[x]

    def looked_up(self, name: str, tokens: str) -> str:
        """Return the inputs of a matrix of blocks for some of its outputs, (1, tokens, inputs)."""
        part = self._parts[name]
        assert isinstance(part, Linear)
        inputs, _ = part.integers.shape
        if self.form == "float":
            return self.op("Gather", self.op("Transpose", self.weight(name)), tokens)
        blocks = self.op("Gather", self.weight(name), tokens)
        row = self.op("Slice", self.op("Reshape", blocks, [0, 0, -1]), [0], [inputs], [2])
        # The embedding has one scale and one zero.
        scale = self.op("Slice", self.weight(f"{name}.scale"), [0], [1])
        zero = self.op("Slice", self.weight(f"{name}.zero"), [0], [1])
        row = self.op("Sub", *(self.op("Cast", each, to=TensorProto.FLOAT) for each in (row, zero)))
        return self.op("Mul", row, scale)

    # --- what all three have -------------------------------------------------------------------

    def cut(
        self, x: str, begin: int, end: int, axis: int = 1, step: int = 1, into: str = ""
    ) -> str:
        return self.op("Slice", x, [begin], [end], [axis], [step], into=into)

    def norm(self, x: str, name: str) -> str:
        return self.op("LayerNormalization", x, self.weight(name), axis=-1, epsilon=_EPSILON)

    def turned(self, x: str, first: Any, size: int, into: str = "") -> str:
        """Turn queries or keys by their positions, which begin at one."""
        cos, sin = (part[:, ::2].numpy() for part in angles(torch.arange(size)))
        attributes = {"num_heads": HEADS, "rotary_embedding_dim": ROTATED, "interleaved": 0}
        return self.op("RotaryEmbedding", x, first, cos, sin, into=into, **attributes)

    def heads(self, x: str, frames: int) -> str:
        """(rows, WIDTH) to (batch, HEADS, frames, HEAD)."""
        return self.op(
            "Transpose", self.op("Reshape", x, [-1, frames, HEADS, HEAD]), perm=[0, 2, 1, 3]
        )

    def added(self, x: str, *more: str) -> str:
        # Not Add: ONNX Runtime would fuse it with the norm behind it into an operator that takes
        # nine times as long as that norm (1.32.0, 40 rows of 416: 84 us against 9).
        return self.op("Sum", x, *more)

    # --- the end -----------------------------------------------------------------------------

    def filled(self) -> ModelProto:
        """Return the graph with its weights inside, to compare."""
        return self._model(
            [numpy_helper.from_array(v, self.weight(n)) for n, v in self.tensors.items()]
        )

    def bare(self, file: str) -> ModelProto:
        """Return the graph without its weights, which are to lie in a file beside it."""
        if self._named != set(self.tensors):
            raise ExportError(f"weights: the graph leaves {set(self.tensors) - self._named} unused")
        outside = []
        for name, offset in build.offsets(self.tensors).items():
            array = self.tensors[name]
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            tensor = TensorProto(name=self.weight(name), data_type=kind, dims=array.shape)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", file), ("offset", offset), ("length", array.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
            outside.append(tensor)
        return self._model(outside)

    def _model(self, weights: Iterable[TensorProto]) -> ModelProto:
        graph = helper.make_graph(
            self._nodes, "murmur", self._inputs, self._outputs, [*self._small, *weights]
        )
        opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(_FUSED, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=_IR)


def _in_floats(parts: Parts) -> Tensors:
    return {n: part.values if isinstance(part, Linear) else part for n, part in parts.items()}


# --- the encoder -----------------------------------------------------------------------------


def _first(graph: Graph, audio: str) -> str:
    """(batch, samples), whole hops and one more, to (batch, frames of 4 ms, WIDTH)."""
    hops = graph.op("Reshape", audio, [0, -1, tensors.CONV1_HOP])
    seen = graph.op("Concat", graph.cut(hops, 0, -1), graph.cut(hops, 1, _END), axis=2)
    return graph.op("Tanh", graph.op("MatMul", seen, graph.weight("conv1")))


def _normed(graph: Graph, h: str, mean: str, square: str) -> str:
    """Scale by statistics of (batch, 1)."""
    variance = graph.op(
        "Max", graph.op("Sub", square, graph.op("Mul", mean, mean)), np.float32(1e-8)
    )
    deviation = graph.op("Sqrt", graph.op("Add", variance, np.float32(_EPSILON)))
    scale = graph.op("Div", graph.weight("group_norm.weight"), deviation)
    shift = graph.op("Sub", graph.weight("group_norm.bias"), graph.op("Mul", mean, scale))
    scale, shift = (graph.op("Unsqueeze", each, [1]) for each in (scale, shift))
    return graph.op("Add", graph.op("Mul", h, scale), shift)


def _stem(graph: Graph, h: str) -> str:
    """(batch, 6 T + 7 frames of 4 ms, WIDTH) to (batch * T, WIDTH).

    Each convolution is one product of all that its kernel sees. ONNX Runtime's *Conv* would need
    two transposes, and is slower by the time that they take.
    """
    threes = graph.op("Reshape", graph.cut(h, 0, -1), [0, -1, 3 * WIDTH])
    parts = (graph.cut(threes, 0, -1), graph.cut(threes, 1, _END), graph.cut(h, 6, _END, step=3))
    seen = graph.op("Concat", *parts, axis=2)
    double = graph.op("Shape", seen, start=0, end=2)
    y = graph.product(graph.op("Reshape", seen, [-1, 7 * WIDTH]), "conv2", "conv2")
    y = graph.op("BiasGelu", y, graph.weight("conv2.bias"))
    y = graph.op("Reshape", y, graph.op("Concat", double, [2 * WIDTH], axis=0))
    twos = graph.op("Reshape", graph.cut(y, 0, -1), [0, -1, 4 * WIDTH])
    seen = graph.op("Concat", twos, graph.cut(y, 2, _END, step=2), axis=2)
    y = graph.product(graph.op("Reshape", seen, [-1, 6 * WIDTH]), "conv3", "conv3", gelu=True)
    return graph.op("BiasGelu", y, graph.weight("conv3.bias"))


def _finished(graph: Graph, x: str, attended: str, layer: int) -> tuple[str, str]:
    """Add what was attended to and the feed-forward; return frames, and frames normed."""
    name = f"layers.{layer}"
    x = graph.added(x, graph.product(attended, f"{name}.o"))
    y = graph.product(graph.norm(x, f"{name}.norm2"), f"{name}.fc1")
    y = graph.op("BiasGelu", y, graph.weight(f"{name}.fc1.bias"))
    y = graph.product(y, f"{name}.fc2", gelu=True)
    x = graph.added(x, y, graph.weight(f"{name}.fc2.bias"))
    return x, graph.norm(x, f"layers.{layer + 1}.norm1" if layer + 1 < LAYERS else "norm")


def state_shapes(cut: Chunking, hidden: int, layers: int) -> dict[str, tuple[int, ...]]:
    """Return each state's row of the graph of :func:`streaming`, by its name."""
    past = (HEADS, cut.left, HEAD)
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(LAYERS):
        shapes |= {f"keys.{layer}": past, f"values.{layer}": past}
    shapes |= dict.fromkeys(("mean", "square", "count"), (1,))
    for layer in range(layers):
        shapes |= {f"h.{layer}": (hidden,), f"c.{layer}": (hidden,)}
    return shapes


def initial(name: str) -> float:
    """Return what a new stream's state holds."""
    return {"square": PRIOR_SQUARE, "count": PRIOR_FRAMES}.get(name, 0.0)


def streaming(parts: Parts, cut: Chunking, form: Form) -> Graph:
    """Return the graph of :class:`exporters.moonshine.StreamingRecogniser`.

    The past lies in one state for each layer's keys and values, and by heads, as the products
    read it.
    """
    graph = Graph(form, parts)
    hidden, size = parts["letters"].shape[0], cut.chunk + cut.ahead  # type: ignore[union-attr]
    layers = sum(name.endswith(".r") for name in parts)
    labels = parts["letters"].shape[1]  # type: ignore[union-attr]
    samples = window_samples(cut)
    graph.input("audio", ["rows", samples])
    graph.output("ctc", ["rows", cut.chunk, labels])
    for name, shape in state_shapes(cut, hidden, layers).items():
        graph.input(name, ["rows", *shape])
        graph.output(f"{name}.next", ["rows", *shape])
    frames = size * _RATIO + _EXTRA
    audio = graph.op("Pad", "audio", [0, 0, 0, (frames + 1) * tensors.CONV1_HOP - samples])
    h = _first(graph, audio)
    x = _stem(graph, _normed(graph, h, *_statistics(graph, h, cut.chunk * _RATIO)))
    place = np.arange(cut.left + size, dtype=np.float32)
    heard = graph.op("Mul", graph.op("Sub", "count", np.float32(PRIOR_FRAMES)), 1 / _RATIO)
    known = graph.op("GreaterOrEqual", place, graph.op("Sub", np.float32(cut.left), heard))
    mask = graph.op("Unsqueeze", graph.op("Where", known, np.float32(0), _MASKED), [1, 2])
    normed = graph.norm(x, "layers.0.norm1")
    for layer in range(LAYERS):
        q, k, v = (
            graph.heads(graph.product(normed, f"layers.{layer}.{name}"), size) for name in "qkv"
        )
        k = graph.op("Concat", f"keys.{layer}", k, axis=2)
        v = graph.op("Concat", f"values.{layer}", v, axis=2)
        for name, all_of_it in (("keys", k), ("values", v)):
            into = f"{name}.{layer}.next"
            graph.cut(all_of_it, cut.chunk, cut.chunk + cut.left, axis=2, into=into)
        q = graph.turned(q, [cut.left], cut.left + size)
        k = graph.turned(k, [0], cut.left + size)
        scores = graph.op("MatMul", q, graph.op("Transpose", k, perm=[0, 1, 3, 2]))
        weights = graph.op("Softmax", graph.op("Add", scores, mask), axis=-1)
        attended = graph.op("Transpose", graph.op("MatMul", weights, v), perm=[0, 2, 1, 3])
        attended = graph.op("Reshape", attended, [-1, WIDTH])
        x, normed = _finished(graph, x, attended, layer)
    y = graph.cut(graph.op("Reshape", normed, [-1, size, WIDTH]), 0, cut.chunk)
    _letters(graph, graph.op("Transpose", y, perm=[1, 0, 2]), hidden, layers)
    return graph


def window_samples(cut: Chunking) -> int:
    """Return the samples of a step."""
    frames = (cut.chunk + cut.ahead) * _RATIO + _EXTRA
    return (frames - 1) * tensors.CONV1_HOP + tensors.CONV1_SIZE


def _statistics(graph: Graph, h: str, new: int) -> tuple[str, str]:
    """Let the newest frames of 4 ms enter the running mean and mean square."""
    fresh = graph.op("Reshape", graph.cut(h, -new, _END), [0, new * WIDTH])
    count = graph.op("Add", "count", np.float32(new))
    count = graph.op("Min", count, np.float32(LONGEST_FRAMES), into="count.next")
    weight = graph.op("Div", np.float32(new), count)
    found = []
    for name, reduce in (("mean", "ReduceSum"), ("square", "ReduceSumSquare")):
        # Over one axis: over two, the order of the sum may change with the number of rows.
        average = graph.op("Mul", graph.op(reduce, fresh, [1], keepdims=1), 1 / (new * WIDTH))
        step = graph.op("Mul", weight, graph.op("Sub", average, name))
        found.append(graph.op("Add", name, step, into=f"{name}.next"))
    return found[0], found[1]


def _letters(graph: Graph, y: str, hidden: int, layers: int) -> None:
    """(frames, rows, WIDTH) to the logarithms of the letters' probabilities."""
    for layer in range(layers):
        weights = [graph.weight(f"lstm.{layer}.{letter}") for letter in "wrb"]
        before = [graph.op("Unsqueeze", f"{letter}.{layer}", [0]) for letter in "hc"]
        y, *after = graph.ops("LSTM", y, *weights, "", *before, into=[""] * 3, hidden_size=hidden)
        for letter, state in zip("hc", after, strict=True):
            graph.op("Squeeze", state, [0], into=f"{letter}.{layer}.next")
        y = graph.op("Squeeze", y, [1])
    y = graph.op(
        "Add", graph.op("MatMul", y, graph.weight("letters")), graph.weight("letters.bias")
    )
    graph.op("Transpose", graph.op("LogSoftmax", y, axis=-1), perm=[1, 0, 2], into="ctc")


def whole(parts: Parts, form: Form) -> Graph:
    """Return the graph of :class:`exporters.moonshine.Encoder` and what the decoder remembers.

    Its input are whole hops of 64 samples, 6 T + 8 for T frames; the last sample is not looked at.
    """
    graph = Graph(form, parts)
    graph.input("audio", [1, "samples"])
    h = _first(graph, "audio")
    all_of_it = graph.op("Reshape", h, [1, -1])
    mean = graph.op("ReduceMean", all_of_it, [1], keepdims=1)
    square = graph.op("ReduceMean", graph.op("Mul", all_of_it, all_of_it), [1], keepdims=1)
    x = _stem(graph, _normed(graph, h, mean, square))
    longest = int(LONGEST_S * RATE_HZ / SAMPLES_PER_FRAME) + 1
    normed = graph.norm(x, "layers.0.norm1")
    for layer in range(LAYERS):
        q, k, v = (
            graph.op("Reshape", graph.product(normed, f"layers.{layer}.{name}"), [1, -1, WIDTH])
            for name in "qkv"
        )
        q, k = (graph.turned(each, [0], longest) for each in (q, k))
        attended = graph.op("MultiHeadAttention", q, k, v, num_heads=HEADS, scale=1.0)
        x, normed = _finished(graph, x, graph.op("Reshape", attended, [-1, WIDTH]), layer)
    for layer in range(LAYERS):
        for letter in "kv":
            name = f"memory.{layer}.{letter}"
            y = graph.op("Reshape", graph.product(normed, name), [1, -1, HEADS, HEAD])
            graph.output(name, [1, HEADS, "frames", HEAD])
            graph.op("Transpose", y, perm=[0, 2, 1, 3], into=name)
    return graph


# --- the decoder -----------------------------------------------------------------------------


def decoder(parts: Parts, form: Form) -> Graph:
    """Return the graph of :class:`exporters.moonshine.Decoder` for one utterance.

    Inputs are some tokens, the position of the first, what may not be attended to, and keys and
    values of the tokens before (``keys.0`` ...) and of the frames (``memory.0.k`` ...). Outputs
    are the best next token after each, its probability, all logits, and the tokens' own keys and
    values, which the caller puts behind those that it has.
    """
    graph = Graph(form, parts)
    graph.input("tokens", [1, "new"], TensorProto.INT64)
    graph.input("position", [1], TensorProto.INT64)
    graph.input("mask", [1, 1, "new", "known"])
    graph.output("best", [1, "new"], TensorProto.INT64)
    graph.output("probability", [1, "new"])
    graph.output("logits", [1, "new", "vocabulary"])
    x = graph.looked_up("embedding", "tokens")
    normed = graph.norm(x, "layers.0.norm1")
    for layer in range(LAYERS):
        name = f"layers.{layer}"
        attended = _self_attended(graph, normed, layer)
        x = graph.added(x, graph.product(attended, f"{name}.self.o"))
        q = graph.product(graph.norm(x, f"{name}.norm2"), f"{name}.cross.q")
        shape: list[int | str] = [1, HEADS, "frames", HEAD]
        memory = [graph.input(f"memory.{layer}.{letter}", shape) for letter in "kv"]
        attended = graph.op("MultiHeadAttention", q, *memory, num_heads=HEADS, scale=1.0)
        x = graph.added(x, graph.product(attended, f"{name}.cross.o"))
        y = graph.product(graph.norm(x, f"{name}.norm3"), f"{name}.up_proj")
        y = graph.op("Add", y, graph.weight(f"{name}.up_proj.bias"))
        up, gate = graph.ops("Split", y, into=["", ""], axis=2, num_outputs=2)
        y = graph.op("Mul", graph.op("QuickGelu", gate, alpha=1.0), up)
        y = graph.product(y, f"{name}.down_proj")
        x = graph.added(x, y, graph.weight(f"{name}.down_proj.bias"))
        normed = graph.norm(x, f"layers.{layer + 1}.norm1" if layer + 1 < LAYERS else "norm")
    logits = graph.op("Identity", graph.product(normed, "embedding"), into="logits")
    graph.op("ArgMax", logits, axis=2, keepdims=0, into="best")
    probability = graph.op("Softmax", logits, axis=-1)
    graph.op("ReduceMax", probability, [2], keepdims=0, into="probability")
    return graph


def _self_attended(graph: Graph, normed: str, layer: int) -> str:
    qkv = graph.product(normed, f"layers.{layer}.qkv")
    values = f"values.{layer}"
    q, k, v = graph.ops("Split", qkv, into=["", "", f"{values}.new"], axis=2, num_outputs=3)
    q = graph.turned(q, "position", MOST_TOKENS)
    k = graph.turned(k, "position", MOST_TOKENS, into=f"keys.{layer}.new")
    both = []
    for name, new in ((f"keys.{layer}", k), (values, v)):
        graph.input(name, [1, "old", WIDTH])
        graph.output(f"{name}.new", [1, "new", WIDTH])
        both.append(graph.op("Concat", name, new, axis=1))
    return graph.op("MultiHeadAttention", q, *both, "", "", "mask", num_heads=HEADS, scale=1.0)


# --- what must hold ----------------------------------------------------------------------------

# Torch and ONNX Runtime sum in another order; measured on what these graphs give: 2e-6 of the
# largest value for a chunk of a stream, 2e-5 for a whole utterance through all layers.
_TOLERANCE = 1e-4
_CHUNKS = 11  # so many that the past is full, and some of it forgotten again


def check_streaming(encoder: Encoder, head: CtcHead, parts: Parts, cut: Chunking) -> None:
    """Compare the graph of a chunk with torch's whole recording, and with itself in batches.

    Parameters
    ----------
    encoder, head : Encoder, CtcHead
        With the weights of ``parts``, in eval mode.
    parts : dict
    cut : Chunking

    Raises
    ------
    ExportError
        At the first difference; the message names the check.
    """
    rng = np.random.default_rng(0)
    length = _CHUNKS * cut.chunk * SAMPLES_PER_FRAME
    audio = _noise(rng, 2, length + window_samples(cut) - cut.chunk * SAMPLES_PER_FRAME)
    with torch.no_grad():
        expected = head(encoder.stream(torch.from_numpy(audio), cut))[:, : _CHUNKS * cut.chunk]
    exact = open_session(streaming(parts, cut, "float").filled().SerializeToString())
    _compare("torch is ONNX, whole is chunks", expected.numpy(), _streamed(exact, audio, cut)[0])
    served = open_session(streaming(parts, cut, "columns").filled().SerializeToString())
    _, states = _streamed(served, audio, cut)
    _every_state_counts(served, audio, states, cut)
    _alone_is_batched(served, states, cut)


def _noise(rng: np.random.Generator, rows: int, samples: int) -> NDArray[np.float32]:
    """Return noise that comes and goes, each row at its own level."""
    loud = np.abs(np.sin(np.arange(samples) / 3000 + np.arange(rows)[:, None]))
    level = 0.02 * (1 + np.arange(rows))[:, None]
    return (rng.standard_normal((rows, samples)) * loud * level).astype(np.float32)


def _streamed(
    session: Any, audio: NDArray[np.float32], cut: Chunking
) -> tuple[NDArray[np.float32], dict[str, NDArray[np.float32]]]:
    """Run a recording chunk by chunk; return the letters' scores and the last states."""
    _, *states = session.get_inputs()
    feed = {
        state.name: np.full((len(audio), *state.shape[1:]), initial(state.name), np.float32)
        for state in states
    }
    names = [output.name for output in session.get_outputs()]
    scores = []
    size, hop = window_samples(cut), cut.chunk * SAMPLES_PER_FRAME
    for begin in range(0, audio.shape[1] - size + 1, hop):
        found = session.run(names, {"audio": audio[:, begin : begin + size]} | feed)
        results = dict(zip(names, found, strict=True))
        scores.append(results["ctc"])
        feed = {name: results[f"{name}.next"] for name in feed}
    return np.concatenate(scores, 1), feed


def _compare(check: str, expected: Array, found: Array, tolerance: float = _TOLERANCE) -> None:
    worst = float(np.abs(expected - found).max())
    allowed = tolerance * max(1.0, float(np.abs(expected).max()))
    if not worst <= allowed:  # not ">", which a NaN would pass
        raise ExportError(f"{check}: differs by {worst:.2g}, allowed: {allowed:.2g}")


def _every_state_counts(
    session: Any, audio: Array, states: dict[str, Array], cut: Chunking
) -> None:
    feed = {"audio": audio[:, : window_samples(cut)]} | states
    expected = session.run(None, feed)
    for name, value in states.items():
        # A quarter less of the count: more would be cut off at its bound.
        changed = session.run(None, feed | {name: value * np.float32(0.75) + np.float32(0.01)})
        if all(np.array_equal(one, other) for one, other in zip(changed, expected, strict=True)):
            raise ExportError(f"every state counts: {name} changes no output")


def _alone_is_batched(session: Any, states: dict[str, Array], cut: Chunking) -> None:
    """Check bit for bit that a row does not depend on neighbours, however loud they are."""
    rng = np.random.default_rng(1)
    rows = 16
    feed = {"audio": _noise(rng, rows, window_samples(cut))}
    feed["audio"][::3] *= 30
    for name, value in states.items():
        spread = rng.uniform(0.5, 1.5, (rows, *value.shape[1:])).astype(np.float32)
        feed[name] = value[rng.integers(len(value), size=rows)] * spread
    together = session.run(None, feed)
    for size in (1, 2, 3):
        for begin in range(0, rows - size + 1, size):
            part = {name: value[begin : begin + size] for name, value in feed.items()}
            for one, all_rows in zip(session.run(None, part), together, strict=True):
                if not np.array_equal(one, all_rows[begin : begin + size]):
                    raise ExportError(f"alone is batched: a row of {size} differs")


def check_whole(encoder: Encoder, torch_decoder: Decoder, parts: Parts) -> None:
    """Compare the graph of a whole utterance with torch: what the decoder remembers of it."""
    audio = _noise(np.random.default_rng(2), 1, (6 * 100 + 8) * tensors.CONV1_HOP)
    with torch.no_grad():
        expected = torch_decoder.remember(encoder(torch.from_numpy(audio))).numpy()
    session = open_session(whole(parts, "float").filled().SerializeToString())
    found = np.stack(session.run(None, {"audio": audio})).reshape(expected.shape)
    _compare("whole utterance: torch is ONNX", expected, found)


def check_decoder(torch_decoder: Decoder, parts: Parts) -> None:
    """Compare the graph of the decoder's step with torch, in one call and in several.

    The form that is served must give the bits of one call whether tokens come in one call or in
    several, as long as each brings an even number of them.
    """
    rng = np.random.default_rng(3)
    tokens = rng.integers(259, 30000, (1, 12))
    memory = rng.standard_normal((LAYERS, 2, 1, HEADS, 150, HEAD)).astype(np.float32)
    with torch.no_grad():
        none = torch.zeros(LAYERS, 2, 1, HEADS, 0, HEAD)
        expected, _ = torch_decoder(torch.from_numpy(tokens), torch.from_numpy(memory), none)
    exact = open_session(decoder(parts, "float").filled().SerializeToString())
    for cut in ([12], [1] * 12, [5, 7]):
        _compare("decoder: torch is ONNX", expected.numpy(), _decoded(exact, tokens, memory, cut))
    served = open_session(decoder(parts, "blocks").filled().SerializeToString())
    once = _decoded(served, tokens, memory, [12])
    for cut in ([2] * 6, [4, 8], [10, 2]):
        if not np.array_equal(once, _decoded(served, tokens, memory, cut)):
            raise ExportError(f"decoder: tokens in calls of {cut} are not those of one call")


def _decoded(session: Any, tokens: Array, memory: Array, cut: Sequence[int]) -> Array:
    """Return the logits of tokens that come in several calls."""
    feed = {
        f"memory.{layer}.{letter}": memory[layer, place]
        for layer in range(LAYERS)
        for place, letter in enumerate("kv")
    }
    names = [f"{kind}.{layer}" for kind in ("keys", "values") for layer in range(LAYERS)]
    past = {name: np.zeros((1, 0, WIDTH), np.float32) for name in names}
    logits, known = [], 0
    for count in cut:
        later = np.arange(known + count) > np.arange(count)[:, None] + known
        results = session.run(
            ["logits", *(f"{name}.new" for name in names)],
            feed
            | past
            | {
                "tokens": tokens[:, known : known + count],
                "position": np.array([known]),
                "mask": np.where(later, _MASKED, np.float32(0))[None, None],
            },
        )
        logits.append(results[0])
        new = zip(names, results[1:], strict=True)
        past = {name: np.concatenate([past[name], rows], 1) for name, rows in new}
        known += count
    return np.concatenate(logits, 1)


# --- the command -------------------------------------------------------------------------------


def rebuilt(
    encoder: moonshine.Weights, head: moonshine.Weights, in_8_bits: bool
) -> tuple[Encoder, CtcHead]:
    """Return torch modules with what :func:`tensors.load_trained` gives.

    Parameters
    ----------
    encoder, head : dict
    in_8_bits : bool
        The matrices as the graph has them.
    """
    weights = moonshine.encoder() | encoder
    if in_8_bits:
        weights |= {n: tensors.rounded(v).values.T for n, v in encoder.items() if v.ndim == 2}
    module = CtcHead(len(head["linear.bias"]), len(head["lstm.bias_hh_l0"]) // 4)
    module.load_state_dict({name: torch.tensor(value) for name, value in head.items()})
    return Encoder(weights).eval(), module.eval()


def _losses(
    path: Path, checkpoint: dict[str, Any], trained: tuple[Any, Any], parts: Parts
) -> dict[str, float]:
    """Measure on a recording what each rounding changes of the letters' probabilities."""
    audio, rate_hz = soundfile.read(path, dtype="float32")
    if rate_hz != RATE_HZ or audio.ndim != 1:
        raise ExportError(f"{path}: expected mono at {RATE_HZ} Hz, found {rate_hz} Hz")
    chunks = (len(audio) - window_samples(SERVED)) // (SERVED.chunk * SAMPLES_PER_FRAME) + 1
    found = {}
    with torch.no_grad():
        states = _arrays(checkpoint["encoder"]), _arrays(checkpoint["head"])
        encoder, head = rebuilt(*states, in_8_bits=False)
        before = head(encoder.stream(torch.from_numpy(audio)[None], SERVED)).exp()
        encoder, head = rebuilt(*trained, in_8_bits=False)
        kept = head(encoder.stream(torch.from_numpy(audio)[None], SERVED)).exp()
    served = open_session(streaming(parts, SERVED, "columns").filled().SerializeToString())
    scores = np.exp(_streamed(served, audio[None], SERVED)[0])
    length = chunks * SERVED.chunk
    for name, one, other in (
        ("difference_kept", before, kept),
        ("served_in_8_bits", kept, torch.from_numpy(scores)),
    ):
        change = (one[:, :length] - other[:, :length]).abs()
        found[f"{name}_max"] = float(change.max())
        found[f"{name}_mean"] = float(change.sum(-1).mean() / 2)
    return found


def _arrays(state: dict[str, torch.Tensor]) -> moonshine.Weights:
    return {name: value.numpy() for name, value in state.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="of training.distil")
    parser.add_argument("--out", type=Path, default=build.RECIPE)
    parser.add_argument("--recording", type=Path, help="on which roundings are measured")
    args = parser.parse_args()
    second = args.out / build.SECOND_PASS
    second.mkdir(parents=True, exist_ok=True)
    checkpoint = torch.load(args.checkpoint, weights_only=True)
    states = (_arrays(checkpoint["encoder"]), _arrays(checkpoint["head"]))
    tensors.save_trained(args.out / build.TRAINED, *states)
    trained = tensors.load_trained(args.out / build.TRAINED)
    parts = {"stream": tensors.streaming(*trained), "encoder": tensors.whole()}
    parts["decoder"] = tensors.decoder()
    base = Encoder(moonshine.encoder()).eval(), Decoder(moonshine.decoder()).eval()
    check_streaming(*rebuilt(*trained, in_8_bits=True), parts["stream"], SERVED)
    check_whole(*base, parts["encoder"])
    check_decoder(base[1], parts["decoder"])
    graphs = {
        args.out / "stream": streaming(parts["stream"], SERVED, "columns"),
        second / "encoder": whole(parts["encoder"], "columns"),
        second / "decoder": decoder(parts["decoder"], "blocks"),
    }
    for path, graph in graphs.items():
        content = graph.bare(f"{path.name}.bin").SerializeToString(deterministic=True)
        path.with_suffix(".onnx").write_bytes(content)
    with tempfile.TemporaryDirectory() as folder:
        made = build.make(Path(folder), lambda *_: None, args.out)
    manifest = build.encode_manifest("murmur models build speech", made)
    (args.out / model_file.MANIFEST).write_bytes(manifest)
    report: dict[str, Any] = {"steps": checkpoint["steps"]}
    report["bytes"] = {p.name: p.stat().st_size for p in args.out.rglob("*") if p.is_file()}
    if args.recording:
        report |= _losses(args.recording, checkpoint, trained, parts["stream"])
    print(json.dumps(report))  # noqa: T201 - the command's result


if __name__ == "__main__":
    main()
