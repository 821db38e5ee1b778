"""A CTC model of ours as sherpa-onnx reads one: the same graph behind other names.

:func:`wrap` makes of a model with log-mel features what
``sherpa_onnx.OnlineRecognizer.from_nemo_ctc`` opens: all states packed into one cache, the blank
last, and the frames of a step in the metadata. No weight is touched, so that both run the same
network. Needs no torch.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, TensorProto, compose, helper
from onnx.helper import make_node

from engine.errors import MurmurError
from engine.features import LogMel
from engine.model_file import Model, ModelSpec
from engine.runtime import Step, random_rows

# What kaldi-native-fbank computes for it, whatever the model says.
_RATE_HZ, _BINS, _FRAME, _SHIFT = 16_000.0, 80, 400, 160
_INSIDE = "net/"  # before the names of the model's own graph
SPACE = "<space>"  # its table of tokens has a blank between columns


class Wrapped(NamedTuple):
    """A model for sherpa-onnx, and how sound must be given to it to be the same for both."""

    model: ModelProto
    tokens: tuple[str, ...]  # the blank last
    gain: float  # by which its samples must be louder
    early_samples: int  # by which our first frame begins before its first

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write the graph and the table of tokens, and return their paths."""
        graph, table = folder / "model.onnx", folder / "tokens.txt"
        onnx.save(self.model, str(graph))
        lines = [f"{token} {number}\n" for number, token in enumerate(self.tokens)]
        table.write_text("".join(lines), encoding="utf-8")
        return graph, table


def wrap(model: Model) -> Wrapped:
    """Return a model for sherpa-onnx.

    Parameters
    ----------
    model : Model
        One graph that turns log-mel frames into log-probabilities of CTC. Where its frames are
        further apart than 10 ms, sherpa-onnx computes those between for nothing.

    Raises
    ------
    MurmurError
        If sherpa-onnx has no place for something that the model states.

    Notes
    -----
    Names, order and metadata are those that sherpa-onnx 2.0.1 reads in
    ``online-nemo-ctc-model.cc``.
    """
    spec = model.spec
    recipe = _checked(spec)
    net = onnx.load_model_from_string(model.graphs[0])
    frames, labels = spec.hop_samples // _SHIFT, spec.outputs[0].labels
    factor = frames // _outputs_of_a_step(model)
    graph = _graph(net.graph, spec, recipe.shift_samples // _SHIFT, factor)
    wrapped = helper.make_model(graph, opset_imports=net.opset_import, ir_version=net.ir_version)
    facts = {
        "window_size": frames,
        "chunk_shift": frames,
        "subsampling_factor": factor,
        "vocab_size": len(labels) - 1,
        **{f"cache_last_{cache}_dim{n}": 1 for cache in ("channel", "time") for n in (1, 2, 3)},
        "cache_last_channel_dim3": spec.state_size,
    }
    helper.set_model_props(wrapped, {key: str(value) for key, value in facts.items()})
    onnx.checker.check_model(wrapped)
    tokens = (*(label.replace(" ", SPACE) for label in labels[1:]), "<blk>")
    overlap = spec.window_samples - spec.hop_samples
    return Wrapped(wrapped, tokens, recipe.gain, overlap - (_FRAME - _SHIFT) // 2)


def _checked(spec: ModelSpec) -> LogMel:
    """Return the model's features, if they and all else can be had in sherpa-onnx."""
    stage = spec.stages[0]
    recipe = stage.features
    if len(spec.stages) > 1 or [output.meaning for output in spec.outputs] != ["ctc"]:
        raise MurmurError(f"{spec.name}: expected one graph with one output, of the meaning ctc")
    if not isinstance(recipe, LogMel) or spec.input.rate_hz != _RATE_HZ:
        raise MurmurError(f"{spec.name}: expected log-mel features of sound of {_RATE_HZ:g} Hz")
    if (recipe.bins, recipe.frame_samples) != (_BINS, _FRAME) or recipe.shift_samples % _SHIFT:
        raise MurmurError(
            f"{spec.name}: expected {_BINS} bins, and frames of {_FRAME} samples, a multiple of "
            f"{_SHIFT} apart; found {recipe}"
        )
    if any(state.initial or state.batch_axis for state in stage.states) or stage.constants:
        raise MurmurError(f"{spec.name}: expected no constants, and states of 0, the batch first")
    return recipe


def _outputs_of_a_step(model: Model) -> int:
    rows, windows = random_rows(model, 1, np.random.default_rng(0))
    (scores,) = Step(model).run(rows, windows).values()
    return int(scores.shape[1])


def _graph(net: GraphProto, spec: ModelSpec, every: int, factor: int) -> GraphProto:
    """Return a graph around the model's own: what goes in, the model, what comes out."""
    inside = compose.add_prefix_graph(net, _INSIDE)
    stage, output = spec.stages[0], spec.outputs[0]
    numbers = _Numbers()
    before = [
        make_node("Transpose", ["audio_signal"], ["frames"], perm=(0, 2, 1)),
        make_node(
            "Slice",
            ["frames", numbers(0), numbers(2**62), numbers(1), numbers(every)],
            [_INSIDE + stage.input],
        ),
        make_node("Squeeze", ["cache_last_channel", numbers(1, 2)], ["row"]),
        make_node(
            "Split",
            ["row", numbers(*(state.size for state in stage.states))],
            [f"flat/{state.input}" for state in stage.states],
            axis=1,
        ),
    ]
    after = [
        make_node(
            "Gather",
            [_INSIDE + output.name, numbers(*range(1, len(output.labels)), 0)],
            ["logprobs"],
            axis=2,
        ),
        make_node("Div", ["length", numbers(factor)], ["encoded_lengths"]),
        make_node("Identity", ["cache_last_time"], ["cache_last_time_next"]),
        make_node("Identity", ["cache_last_channel_len"], ["cache_last_channel_len_next"]),
    ]
    for state in stage.states:
        shape = numbers(0, *state.shape)
        before.append(make_node("Reshape", [f"flat/{state.input}", shape], [_INSIDE + state.input]))
        after.append(make_node("Flatten", [_INSIDE + state.output], [f"flat/{state.output}"]))
    flat = [f"flat/{state.output}" for state in stage.states]
    after.append(make_node("Concat", flat, ["row_next"], axis=1))
    after.append(make_node("Unsqueeze", ["row_next", numbers(1, 2)], ["cache_last_channel_next"]))
    caches = {
        "cache_last_channel": (TensorProto.FLOAT, ("N", 1, 1, spec.state_size)),
        "cache_last_time": (TensorProto.FLOAT, ("N", 1, 1, 1)),
        "cache_last_channel_len": (TensorProto.INT64, ("N",)),
    }
    inputs = {
        "audio_signal": (TensorProto.FLOAT, ("N", _BINS, "T")),
        "length": (TensorProto.INT64, ("N",)),
        **caches,
    }
    outputs = {
        "logprobs": (TensorProto.FLOAT, ("N", "frames_out", len(output.labels))),
        "encoded_lengths": (TensorProto.INT64, ("N",)),
        **{f"{name}_next": tensor for name, tensor in caches.items()},
    }
    return helper.make_graph(
        [*before, *inside.node, *after],
        spec.name,
        [helper.make_tensor_value_info(name, *tensor) for name, tensor in inputs.items()],
        [helper.make_tensor_value_info(name, *tensor) for name, tensor in outputs.items()],
        [*inside.initializer, *numbers.made],
    )


class _Numbers:
    """Constants of a graph, by the names that they are given."""

    def __init__(self) -> None:
        self.made: list[TensorProto] = []

    def __call__(self, *values: int) -> str:
        name = f"numbers/{len(self.made)}"
        self.made.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
        return name
