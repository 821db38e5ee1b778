"""Small recurrent models, built on the spot with random weights: no torch, no files of data."""

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from engine import model_file
from engine.model_file import Input, ModelSpec, Output, Stage, State

HOP = 20
STRIDE = 4
FRAMES = HOP // STRIDE
HIDDEN = 8
RATE_HZ = 100.0
LABELS = ("N", "S", "V", "F", "Q")
_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def spec(name: str = "tiny", cell: str = "LSTM", **changes: object) -> ModelSpec:
    """State what :func:`graph` computes."""
    states = tuple(
        State(f"{letter}0", f"{letter}0_next", (HIDDEN,))
        for letter in ("h", "c")[: 2 if cell == "LSTM" else 1]
    )
    fields: dict[str, object] = {
        "format": model_file.FORMAT,
        "name": name,
        "pipeline": "scores",
        "input": Input(RATE_HZ, "mV"),
        "hop_samples": HOP,
        "window_samples": HOP,
        "stages": (Stage("x", (HOP, 1), states=states),),
        "outputs": (
            Output("beat", "beat"),
            Output("beat_class", "beat_class", LABELS),
        ),
        "licence": "CC0-1.0",
        "provenance": "random weights",
    }
    return ModelSpec(**(fields | changes))  # type: ignore[arg-type]


def graph(cell: str = "LSTM", seed: int = 0) -> onnx.ModelProto:
    """Every fourth sample through one recurrent layer to two heads."""
    rng = np.random.default_rng(seed)
    gates = _GATES[cell]
    weights: list[onnx.TensorProto] = []

    def constant(name: str, value: NDArray[np.generic]) -> str:
        weights.append(numpy_helper.from_array(value, name))
        return name

    def random(name: str, *shape: int) -> str:
        return constant(name, rng.normal(0, 0.6, shape).astype(np.float32))

    letters = ("h", "c")[: 2 if cell == "LSTM" else 1]
    first, one = constant("first", np.array([0])), constant("one", np.array([1]))
    attributes = {"linear_before_reset": 1} if cell == "GRU" else {}
    nodes = [
        # (N, HOP, 1) -> (FRAMES, N, STRIDE)
        helper.make_node(
            "Reshape", ["x", constant("cut", np.array([-1, FRAMES, STRIDE]))], ["cut_x"]
        ),
        helper.make_node("Transpose", ["cut_x"], ["frames"], perm=[1, 0, 2]),
        *(helper.make_node("Unsqueeze", [f"{s}0", "first"], [f"{s}_in"]) for s in letters),
        helper.make_node(
            cell,
            [
                "frames",
                random("W", 1, gates * HIDDEN, STRIDE),
                random("R", 1, gates * HIDDEN, HIDDEN),
                random("B", 1, 2 * gates * HIDDEN),
                "",
                *(f"{s}_in" for s in letters),
            ],
            ["Y", *(f"{s}_out" for s in letters)],
            hidden_size=HIDDEN,
            **attributes,
        ),
        *(helper.make_node("Squeeze", [f"{s}_out", "first"], [f"{s}0_next"]) for s in letters),
        helper.make_node("Squeeze", ["Y", one], ["hidden"]),
        helper.make_node("MatMul", ["hidden", random("V", HIDDEN, 1)], ["logit"]),
        helper.make_node("Sigmoid", ["logit"], ["probability"]),
        helper.make_node("Transpose", ["probability"], ["turned"], perm=[1, 0, 2]),
        helper.make_node("Squeeze", ["turned", constant("last", np.array([2]))], ["beat"]),
        helper.make_node("MatMul", ["hidden", random("U", HIDDEN, len(LABELS))], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["classes"], axis=2),
        helper.make_node("Transpose", ["classes"], ["beat_class"], perm=[1, 0, 2]),
    ]
    tensor = helper.make_tensor_value_info
    inputs = [tensor("x", TensorProto.FLOAT, ["batch", HOP, 1])]
    inputs += [tensor(f"{s}0", TensorProto.FLOAT, ["batch", HIDDEN]) for s in letters]
    outputs = [
        tensor("beat", TensorProto.FLOAT, ["batch", FRAMES]),
        tensor("beat_class", TensorProto.FLOAT, ["batch", FRAMES, len(LABELS)]),
        *(tensor(f"{s}0_next", TensorProto.FLOAT, ["batch", HIDDEN]) for s in letters),
    ]
    made = helper.make_model(
        helper.make_graph(nodes, "tiny", inputs, outputs, weights),
        opset_imports=[helper.make_opsetid("", 17)],
    )
    made.ir_version = 9
    return made


def write(folder: Path, statement: ModelSpec | None = None, cell: str = "LSTM") -> Path:
    """Write a model with its statement inside and return the file."""
    statement = statement or spec(cell=cell)
    made = graph(cell)
    entry = made.metadata_props.add()
    entry.key, entry.value = model_file.METADATA_KEY, model_file.encode_spec(statement)
    path = folder / f"{statement.name}.onnx"
    onnx.save(made, path)
    return path
