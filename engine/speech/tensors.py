"""What fills the graphs of the open-vocabulary recogniser: Moonshine, and what we trained of it.

The graphs (``exporters/speech.py``) hold no weights, they name them; here stands what lies under
each name, made from the wheel and from the difference that our training made. Only elementwise
arithmetic is used, so that every machine makes the same bytes and a hash can tell.

A matrix is a :class:`Linear`: integers of 8 bits with a scale and a zero for each output. For the
wheel's own matrices, which have them for the whole tensor, that is exact. It is kept in one of
two forms, after the kernel that reads it: in columns where many rows are multiplied at once, in
blocks where one or a few are.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.speech import moonshine

WIDTH, HEADS, LAYERS = 416, 8, 8
HEAD = WIDTH // HEADS
ROTATED = 32  # dimensions of each head that carry the position
BLOCK = 128  # inputs under one scale, in the form of blocks
CONV1_SIZE, CONV1_HOP = 127, 64

# The wheel's rotary embedding turns neighbouring dimensions; halves are turned with fewer copies.
_HALVES = np.concatenate([
    head * HEAD + np.r_[0:ROTATED:2, 1:ROTATED:2, ROTATED:HEAD] for head in range(HEADS)
])  # fmt: skip
# torch orders an LSTM's gates i f g o, ONNX i o f c.
_GATES = (0, 3, 1, 2)


class Linear(NamedTuple):
    """A matrix whose values are ``(integers - zero) * scale``."""

    integers: NDArray[np.int8]  # (inputs, outputs)
    scale: NDArray[np.float32]  # (outputs,)
    zero: NDArray[np.int8]  # (outputs,)

    @property
    def values(self) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self.integers.astype(np.float32) - self.zero
        return found * self.scale

    def outputs(self, order: NDArray[np.intp]) -> "Linear":
        """Return the same with its outputs in another order."""
        integers = np.ascontiguousarray(self.integers[:, order])
        return Linear(integers, self.scale[order], self.zero[order])

    def times(self, factor: float) -> "Linear":
        return self._replace(scale=self.scale * np.float32(factor))


Part = Linear | NDArray[np.float32]
Parts = dict[str, Part]
Tensors = dict[str, NDArray[Any]]


def exact(matrix: moonshine.Matrix) -> Linear:
    """Return a matrix of the wheel, (outputs, inputs, ...), as it is.

    A convolution's becomes the matrix that multiplies all that its kernel sees, place by place.
    """
    integers = matrix.integers.reshape(*matrix.integers.shape[:2], -1)
    integers = integers.transpose(2, 1, 0).reshape(-1, len(integers))
    count = integers.shape[1]
    return Linear(
        np.ascontiguousarray(integers),
        np.full(count, matrix.scale, np.float32),
        np.full(count, matrix.zero, np.int8),
    )


def rounded(values: NDArray[np.float32]) -> Linear:
    """Return the nearest of 255 steps for each value of an (outputs, inputs) matrix."""
    scale = np.maximum(np.abs(values).max(1), np.float32(1e-8)) / np.float32(127)
    integers = np.rint(values / scale[:, None]).astype(np.int8)
    return Linear(np.ascontiguousarray(integers.T), scale, np.zeros(len(values), np.int8))


# --- what we trained -----------------------------------------------------------------------------


class Difference(NamedTuple):
    """What training changed of a matrix: ``integers * scale``, a scale for each output."""

    integers: NDArray[np.int8]  # (outputs, inputs)
    scale: NDArray[np.float32]  # (outputs, 1)


def difference(
    before: NDArray[np.float32], after: NDArray[np.float32], steps: int = 127
) -> Difference:
    """Return what lies between two matrices, in so many steps up and down."""
    change = after - before
    scale = np.maximum(np.abs(change).max(1, keepdims=True), np.float32(1e-12)) / np.float32(steps)
    return Difference(np.rint(change / scale).astype(np.int8), scale)


def save_trained(
    path: Path, encoder: moonshine.Weights, head: moonshine.Weights, steps: int = 127
) -> None:
    """Write what differs from the wheel's encoder, and the head, which is all ours.

    Parameters
    ----------
    path : Path
    encoder : dict
        As :func:`engine.speech.moonshine.encoder` names its weights; the convolutions and the
        group norm are not looked at, because they are not trained.
    head : dict
        Of ``exporters.moonshine.CtcHead``.
    steps : int
    """
    matrices, _ = moonshine.encoder_parts()
    kept: dict[str, NDArray[Any]] = {
        f"head.{name}": v.astype(np.float16) for name, v in head.items()
    }
    for name, value in encoder.items():
        if name in matrices and name.startswith("layers."):
            found = difference(matrices[name].values, value, steps)
            kept |= {name: found.integers, f"{name}.scale": found.scale}
        elif name.startswith(("layers.", "norm.")):
            kept[name] = value.astype(np.float16)
    np.savez_compressed(path, allow_pickle=False, **kept)


def load_trained(path: Path) -> tuple[moonshine.Weights, moonshine.Weights]:
    """Return the layers and the final norm that we trained, and the head."""
    matrices, _ = moonshine.encoder_parts()
    encoder: moonshine.Weights = {}
    head: moonshine.Weights = {}
    with np.load(path, allow_pickle=False) as kept:
        for name in kept.files:
            value = kept[name]
            if name.startswith("head."):
                head[name.removeprefix("head.")] = value.astype(np.float32)
            elif value.dtype == np.int8:
                change = value.astype(np.float32) * kept[f"{name}.scale"]
                encoder[name] = matrices[name].values + change
            elif not name.endswith(".scale"):
                encoder[name] = value.astype(np.float32)
    return encoder, head


# --- the three graphs ----------------------------------------------------------------------------


def streaming(encoder: moonshine.Weights, head: moonshine.Weights) -> Parts:
    """Return what the graph of a chunk of a stream names.

    Parameters
    ----------
    encoder, head : dict
        Of :func:`load_trained`.
    """
    matrices = {name: rounded(value) for name, value in encoder.items() if value.ndim == 2}
    return _stem() | _layers(matrices, encoder) | _head(head)


def whole() -> Parts:
    """Return what the graph of a whole utterance names: the wheel's encoder, exactly.

    With it go the matrices that make the decoder's memory of the encoder's frames.
    """
    found, weights = moonshine.encoder_parts()
    matrices = {name: exact(matrix) for name, matrix in found.items()}
    memory, _ = moonshine.decoder_parts()
    return (
        _stem()
        | _layers(matrices, weights)
        | {
            f"memory.{layer}.{letter}": exact(memory[f"layers.{layer}.cross.{letter}.weight"])
            for layer in range(LAYERS)
            for letter in "kv"
        }
    )


def decoder() -> Parts:
    """Return what the graph of the decoder's step names: the wheel's decoder, exactly."""
    found, weights = moonshine.decoder_parts()
    parts: Parts = {"embedding": exact(found["embedding.weight"]), "norm": weights["norm.weight"]}
    for layer in range(LAYERS):
        old, new = f"layers.{layer}", f"layers.{layer}"
        matrices = {
            name.removeprefix(f"{old}.").removesuffix(".weight"): exact(matrix)
            for name, matrix in found.items()
            if name.startswith(f"{old}.")
        }
        q, k = _turned(matrices["self.q"], matrices["self.k"])
        parts[f"{new}.qkv"] = _beside(q, k, matrices["self.v"])
        parts[f"{new}.cross.q"] = matrices["cross.q"].times(HEAD**-0.5)
        for name in ("self.o", "cross.o", "up_proj", "down_proj"):
            parts[f"{new}.{name}"] = matrices[name]
        for name in ("up_proj.bias", "down_proj.bias"):
            parts[f"{new}.{name}"] = weights[f"{old}.{name}"]
        for number in (1, 2, 3):
            parts[f"{new}.norm{number}"] = weights[f"{old}.norm{number}.weight"]
    return parts


def _stem() -> Parts:
    matrices, weights = moonshine.encoder_parts()
    # One place more than the kernel has, so that a frame sees two whole hops.
    first = np.zeros((2 * CONV1_HOP, WIDTH), np.float32)
    first[:CONV1_SIZE] = matrices["conv1.weight"].values[:, 0].T
    return {
        "conv1": first,
        "conv2": exact(matrices["conv2.weight"]),
        "conv3": exact(matrices["conv3.weight"]),
        "conv2.bias": weights["conv2.bias"],
        "conv3.bias": weights["conv3.bias"],
        "group_norm.weight": weights["group_norm.weight"],
        "group_norm.bias": weights["group_norm.bias"],
    }


def _layers(matrices: dict[str, Linear], weights: moonshine.Weights) -> Parts:
    parts: Parts = {"norm": weights["norm.weight"]}
    for layer in range(LAYERS):
        name = f"layers.{layer}"
        q, k = _turned(matrices[f"{name}.q.weight"], matrices[f"{name}.k.weight"])
        parts |= {f"{name}.q": q, f"{name}.k": k}
        for linear in ("v", "o", "fc1", "fc2"):
            parts[f"{name}.{linear}"] = matrices[f"{name}.{linear}.weight"]
        for linear in ("fc1", "fc2"):
            parts[f"{name}.{linear}.bias"] = weights[f"{name}.{linear}.bias"]
        for norm in ("norm1", "norm2"):
            parts[f"{name}.{norm}"] = weights[f"{name}.{norm}.weight"]
    return parts


def _head(head: moonshine.Weights) -> Parts:
    parts: Parts = {"letters": head["linear.weight"].T.copy(), "letters.bias": head["linear.bias"]}
    layers = sum(name.startswith("lstm.weight_ih") for name in head)
    for layer in range(layers):

        def ordered(name: str, layer: int = layer) -> NDArray[np.float32]:
            gates = np.split(head[f"lstm.{name}_l{layer}"], len(_GATES))
            return np.concatenate([gates[gate] for gate in _GATES])

        biases = [ordered("bias_ih"), ordered("bias_hh")]
        parts[f"lstm.{layer}.w"] = ordered("weight_ih")[None]
        parts[f"lstm.{layer}.r"] = ordered("weight_hh")[None]
        parts[f"lstm.{layer}.b"] = np.concatenate(biases)[None]
    return parts


def _turned(q: Linear, k: Linear) -> tuple[Linear, Linear]:
    """Return queries and keys as the graphs turn them, with the attention's scale in one."""
    return q.outputs(_HALVES).times(HEAD**-0.5), k.outputs(_HALVES)


def _beside(*matrices: Linear) -> Linear:
    """Return one matrix with the outputs of several."""
    integers, scales, zeros = zip(*matrices, strict=True)
    return Linear(np.concatenate(integers, 1), np.concatenate(scales), np.concatenate(zeros))


# --- as the kernels read them --------------------------------------------------------------------


def in_columns(parts: Parts) -> Tensors:
    """Return tensors for *MatMulIntegerToFloat*."""
    found: Tensors = {}
    for name, part in parts.items():
        if isinstance(part, Linear):
            found |= {name: part.integers, f"{name}.scale": part.scale, f"{name}.zero": part.zero}
        else:
            found[name] = part
    return found


def in_blocks(parts: Parts) -> Tensors:
    """Return tensors for *MatMulNBits*: unsigned integers, inputs in whole blocks."""
    found: Tensors = {}
    for name, part in parts.items():
        if not isinstance(part, Linear):
            found[name] = part
            continue
        inputs, outputs = part.integers.shape
        count = -(-inputs // BLOCK)
        zero = (part.zero.astype(np.int16) + 128).astype(np.uint8)
        filled = np.repeat(zero[:, None], count * BLOCK, 1)
        filled[:, :inputs] = (part.integers.T.astype(np.int16) + 128).astype(np.uint8)
        found[name] = filled.reshape(outputs, count, BLOCK)
        found[f"{name}.scale"] = np.repeat(part.scale, count)
        found[f"{name}.zero"] = np.repeat(zero, count)
    return found
