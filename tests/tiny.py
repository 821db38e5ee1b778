"""Small recurrent models, built on the spot with random weights: no torch, no files of data."""

from pathlib import Path

import msgspec
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


def graph(
    cell: str = "LSTM", seed: int = 0, time: int | str = HOP, leads: int = 1
) -> onnx.ModelProto:
    """Four samples at a time through one recurrent layer to two heads.

    ``time`` is what the graph says of its axis of samples: a name if it takes any number.
    """
    rng = np.random.default_rng(seed)
    gates = _GATES[cell]
    weights: list[onnx.TensorProto] = []

    def constant(name: str, value: NDArray[np.generic]) -> str:
        weights.append(numpy_helper.from_array(value, name))
        return name

    def random(name: str, *shape: int) -> str:
        return constant(name, rng.normal(0, 0.6, shape).astype(np.float32))

    letters = ("h", "c")[: 2 if cell == "LSTM" else 1]
    constant("first", np.array([0]))
    one = constant("one", np.array([1]))
    attributes = {"linear_before_reset": 1} if cell == "GRU" else {}
    nodes = [
        # (N, HOP, leads) -> (FRAMES, N, STRIDE * leads)
        helper.make_node(
            "Reshape", ["x", constant("cut", np.array([0, -1, STRIDE * leads]))], ["cut_x"]
        ),
        helper.make_node("Transpose", ["cut_x"], ["frames"], perm=[1, 0, 2]),
        *(helper.make_node("Unsqueeze", [f"{s}0", "first"], [f"{s}_in"]) for s in letters),
        helper.make_node(
            cell,
            [
                "frames",
                random("W", 1, gates * HIDDEN, STRIDE * leads),
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
    frames = "frames" if isinstance(time, str) else time // STRIDE
    inputs = [tensor("x", TensorProto.FLOAT, ["batch", time, leads])]
    inputs += [tensor(f"{s}0", TensorProto.FLOAT, ["batch", HIDDEN]) for s in letters]
    outputs = [
        tensor("beat", TensorProto.FLOAT, ["batch", frames]),
        tensor("beat_class", TensorProto.FLOAT, ["batch", frames, len(LABELS)]),
        *(tensor(f"{s}0_next", TensorProto.FLOAT, ["batch", HIDDEN]) for s in letters),
    ]
    made = helper.make_model(
        helper.make_graph(nodes, "tiny", inputs, outputs, weights),
        opset_imports=[helper.make_opsetid("", 17)],
    )
    made.ir_version = 9
    return made


def smoother(window: int) -> onnx.ModelProto:
    """A window of signal, a quarter as loud, around the mean of the window before."""
    tensor = helper.make_tensor_value_info
    made = helper.make_model(
        helper.make_graph(
            [
                helper.make_node("Mul", ["x", "quarter"], ["soft"]),
                helper.make_node("Add", ["soft", "m0"], ["y"]),
                helper.make_node("ReduceMean", ["x"], ["m0_next"], axes=[1]),
            ],
            "smoother",
            [
                tensor("x", TensorProto.FLOAT, ["batch", window, 1]),
                tensor("m0", TensorProto.FLOAT, ["batch", 1, 1]),
            ],
            [
                tensor("y", TensorProto.FLOAT, ["batch", window, 1]),
                tensor("m0_next", TensorProto.FLOAT, ["batch", 1, 1]),
            ],
            [numpy_helper.from_array(np.array(0.25, np.float32), "quarter")],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
    )
    made.ir_version = 9
    return made


ALPHABET = ("", " ", "a", "b", "c", "d")
FRAME = 4
VOICE_HOP = 10  # of the detector: a hop of the model is two of them, and not whole frames


def talker(look_ahead: int) -> onnx.ModelProto:
    """A recogniser of signals that are what they say: the mean of a frame is its label's number.

    It decides so many samples behind the signal, which its state carries.
    """
    tensor = helper.make_tensor_value_info
    constants = {
        "labels": np.arange(len(ALPHABET), dtype=np.float32).reshape(1, 1, -1),
        "sharp": np.array(-8.0, np.float32),
        "cut": np.array([0, -1, FRAME]),
        "zero": np.array([0]),
        "one": np.array([1]),
        "late": np.array([-look_ahead]),
        "never": np.array([2**31 - 1]),
    }
    nodes = [
        helper.make_node("Concat", ["past", "x"], ["known"], axis=1),
        helper.make_node("Slice", ["known", "late", "never", "one"], ["past_next"]),
        helper.make_node("Slice", ["known", "zero", "late", "one"], ["now"]),
    ]
    state = ["batch", look_ahead, 1]
    nodes += [
        helper.make_node("Reshape", ["now" if look_ahead else "x", "cut"], ["frames"]),
        helper.make_node("ReduceMean", ["frames"], ["mean"], axes=[2], keepdims=1),
        helper.make_node("Sub", ["mean", "labels"], ["apart"]),
        helper.make_node("Mul", ["apart", "apart"], ["square"]),
        helper.make_node("Mul", ["square", "sharp"], ["logits"]),
        helper.make_node("LogSoftmax", ["logits"], ["ctc"], axis=2),
    ]
    inputs = [tensor("x", TensorProto.FLOAT, ["batch", "samples", 1])]
    outputs = [tensor("ctc", TensorProto.FLOAT, ["batch", "frames", len(ALPHABET)])]
    if look_ahead:
        inputs.append(tensor("past", TensorProto.FLOAT, state))
        outputs.append(tensor("past_next", TensorProto.FLOAT, state))
    made = helper.make_model(
        helper.make_graph(
            nodes if look_ahead else nodes[3:],
            "talker",
            inputs,
            outputs,
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
    )
    made.ir_version = 9
    return made


def write_talker(folder: Path, name: str, look_ahead: int = 12, **changes: object) -> Path:
    """Write a model of the pipeline speech; see :func:`talker`."""
    state = State("past", "past_next", (look_ahead, 1)) if look_ahead else None
    fields: dict[str, object] = {
        "pipeline": "speech",
        "input": Input(RATE_HZ, "1"),
        "stages": (Stage("x", (HOP, 1), states=(state,) if state else ()),),
        "outputs": (Output("ctc", "ctc", ALPHABET),),
        "look_ahead_samples": look_ahead,
    }
    return write(folder, spec(name, **(fields | changes)), made=talker(look_ahead))


def write_detector(
    folder: Path, name: str = "detector", values: int = 1, **changes: object
) -> Path:
    """Write a detector of voice: how loud the loudest sample of a hop is, at most 1."""
    tensor = helper.make_tensor_value_info
    made = helper.make_model(
        helper.make_graph(
            [
                helper.make_node("Abs", ["x"], ["loud"]),
                helper.make_node("ReduceMax", ["loud"], ["loudest"], axes=[1, 2], keepdims=0),
                helper.make_node("Min", ["loudest", "most"], ["p"]),
                helper.make_node("Reshape", ["p", "column"], ["one"]),
                helper.make_node("Concat", ["one"] * values, ["voice"], axis=1),
            ],
            "detector",
            [tensor("x", TensorProto.FLOAT, ["batch", "samples", 1])],
            [tensor("voice", TensorProto.FLOAT, ["batch", values])],
            [
                numpy_helper.from_array(np.array(1.0, np.float32), "most"),
                numpy_helper.from_array(np.array([-1, 1]), "column"),
            ],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
    )
    made.ir_version = 9
    fields: dict[str, object] = {
        "input": Input(RATE_HZ, "1"),
        "hop_samples": VOICE_HOP,
        "window_samples": VOICE_HOP,
        "stages": (Stage("x", (VOICE_HOP, 1)),),
        "outputs": (Output("voice", "scores"),),
    }
    return write(folder, spec(name, **(fields | changes)), made=made)


def write(
    folder: Path,
    statement: ModelSpec | None = None,
    cell: str = "LSTM",
    made: onnx.ModelProto | None = None,
    time: int | str = HOP,
) -> Path:
    """Write a model with its statement inside and return the file."""
    statement = statement or spec(cell=cell)
    made = made or graph(cell, time=time)
    entry = made.metadata_props.add()
    entry.key, entry.value = model_file.METADATA_KEY, model_file.encode_spec(statement)
    path = folder / f"{statement.name}.onnx"
    onnx.save(made, path)
    return path


def write_two_leads(folder: Path, least: int = 1) -> Path:
    """Write a model of two leads, of which a stream may have fewer."""
    two = spec(
        "two",
        input=Input(RATE_HZ, "mV", channels=2, least_channels=least),
        stages=(msgspec.structs.replace(spec().stages[0], input_shape=(HOP, 2)),),
    )
    return write(folder, two, made=graph(leads=2))


def write_smoother(folder: Path, window: int, **changes: object) -> Path:
    """Write a model of the audio pipeline, whose windows overlap."""
    stage = Stage("x", (window, 1), states=(State("m0", "m0_next", (1, 1)),))
    fields: dict[str, object] = {
        "pipeline": "audio",
        "window_samples": window,
        "look_ahead_samples": window - HOP,
        "stages": (stage,),
        "outputs": (Output("y", "samples"),),
    }
    return write(folder, spec("smoother", **(fields | changes)), made=smoother(window))


# Samples that a fragile model does not bear: it fails; its outputs are NaN; its state alone is.
BREAKS, NAN, NAN_STATE = 5000.0, 500.0, -500.0


def write_fragile(folder: Path, name: str = "fragile", **changes: object) -> Path:
    """Write the LSTM behind what breaks on some samples: a row that has one, and with it a call."""
    made = graph(time="samples")
    constants = {
        "bound": np.array(200.0, np.float32),
        "zero": np.array(0.0, np.float32),
        "far": np.array(1000.0, np.float32),
        "table": np.zeros(1, np.float32),
        "row": np.array([-1, 1]),
    }
    made.graph.initializer.extend(
        numpy_helper.from_array(value, key) for key, value in constants.items()
    )
    node = helper.make_node
    before = [
        node("ReduceMax", ["x"], ["most"], axes=[1, 2]),
        node("ReduceMin", ["x"], ["least"], axes=[1, 2]),
        # An index of 0, or beyond the table.
        node("Div", ["most", "far"], ["share"]),
        node("Relu", ["share"], ["place"]),
        node("Cast", ["place"], ["index"], to=TensorProto.INT64),
        node("Gather", ["table", "index"], ["looked_up"]),
        # The logarithm of a negative number.
        node("Sub", ["bound", "most"], ["below"]),
        node("Log", ["below"], ["log"]),
        node("Mul", ["log", "zero"], ["nothing"]),
        node("Add", ["nothing", "looked_up"], ["both"]),
        node("Reshape", ["both", "row"], ["of_outputs"]),
        node("Add", ["bound", "least"], ["above"]),
        node("Log", ["above"], ["other_log"]),
        node("Mul", ["other_log", "zero"], ["other_nothing"]),
        node("Reshape", ["other_nothing", "row"], ["of_state"]),
    ]
    after = [
        node("Add", ["sound_beat", "of_outputs"], ["beat"]),
        node("Add", ["sound_c", "of_state"], ["c0_next"]),
    ]
    for each in made.graph.node:
        if each.output[0] in ("beat", "c0_next"):
            each.output[0] = {"beat": "sound_beat", "c0_next": "sound_c"}[each.output[0]]
    nodes = [*before, *made.graph.node, *after]
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    return write(folder, spec(name, **changes), made=made)


def write_mixing(folder: Path) -> Path:
    """Subtract the greatest sample of the whole batch from each: no row is its own."""
    made = graph()
    made.graph.node[0].input[0] = "below"
    made.graph.node.insert(0, helper.make_node("ReduceMax", ["x"], ["most"]))
    made.graph.node.insert(1, helper.make_node("Sub", ["x", "most"], ["below"]))
    return write(folder, made=made)


def write_infectious(folder: Path) -> Path:
    """Add the greatest sample of the whole batch, times 0, to each output: unseen while finite."""
    made = graph()
    made.graph.initializer.append(numpy_helper.from_array(np.array(0.0, np.float32), "zero"))
    for each in made.graph.node:
        if each.output[0] == "beat":
            each.output[0] = "own_beat"
    made.graph.node.extend(
        [
            helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
            helper.make_node("Mul", ["most", "zero"], ["nothing"]),
            helper.make_node("Add", ["own_beat", "nothing"], ["beat"]),
        ]
    )
    return write(folder, made=made)


def write_one_row_only(folder: Path) -> Path:
    """Declare any number of rows and take one, in a way that no inference of shapes sees."""
    made = graph()
    made.graph.node[0].input[1] = "one_row"
    made.graph.initializer.append(
        numpy_helper.from_array(np.array([1, FRAMES, STRIDE]), "one_row_of_frames")
    )
    for number, node in enumerate(
        [
            helper.make_node("Shape", ["x"], ["shape"]),
            helper.make_node("Sub", ["shape", "shape"], ["nothing"]),
            helper.make_node("Add", ["nothing", "one_row_of_frames"], ["one_row"]),
        ]
    ):
        made.graph.node.insert(number, node)
    return write(folder, made=made)


def write_mean_of_rows(folder: Path) -> Path:
    """Give one result for all rows of a batch."""
    made = graph()
    made.graph.node.append(helper.make_node("ReduceMean", ["beat"], ["mean"], axes=[0]))
    made.graph.output[0].CopyFrom(
        helper.make_tensor_value_info("mean", TensorProto.FLOAT, ["batch", FRAMES])
    )
    return write(folder, spec(outputs=(Output("mean", "scores"),)), made=made)


def write_mean_of_frames(folder: Path) -> Path:
    """Sum frames in an order that the number of rows decides; it shows in a row of ten."""
    made = graph(time="samples")
    made.graph.node.append(
        helper.make_node("ReduceMean", ["beat"], ["score"], axes=[1], keepdims=0)
    )
    made.graph.output[0].CopyFrom(
        helper.make_tensor_value_info("score", TensorProto.FLOAT, ["batch"])
    )
    return write(folder, spec(outputs=(Output("score", "scores"),)), made=made)
