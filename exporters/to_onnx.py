"""From a PyTorch network to one ``.onnx`` file with its states and its statement.

The file is written only after :mod:`exporters.parity` has found that it computes what torch
does, streamed and batched; a fault raises :class:`ExportError` and leaves no file.

A network is any module with ``forward(x, *states) -> (*outputs, *new_states)`` that uses
``nn.RNN``, ``nn.LSTM`` or ``nn.GRU``; :class:`exporters.net.StreamingNet` is one.
"""

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from onnx import ModelProto
from torch import Tensor, nn

from engine.model_file import METADATA_KEY, ModelSpec, State, encode_spec
from exporters import parity
from exporters.net import StreamingNet
from exporters.parity import ExportError

# Torch orders an LSTM's gates i f g o and a GRU's r z n; ONNX wants i o f c and z r h.
_GATE_ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}


def export(net: nn.Module, spec: ModelSpec, path: Path | str) -> None:
    """Write a network and its statement to one file, if both are right.

    Parameters
    ----------
    net : nn.Module
        With the statement's outputs and states, in the statement's order.
    spec : ModelSpec
        One stage of raw samples whose windows do not overlap: a network that streams carries
        what it needs of the past as state.
    path : Path or str

    Raises
    ------
    ExportError
        If the network cannot be exported, or a check of :func:`exporters.parity.check` fails.
    """
    _check_spec(spec)
    net = copy.deepcopy(net).cpu().eval()
    model = to_graph(net, spec)
    entry = model.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, encode_spec(spec)
    graph = model.SerializeToString()
    parity.check(net, spec, graph)
    Path(path).write_bytes(graph)


def states_of(net: StreamingNet) -> tuple[State, ...]:
    """Return what a statement says of this network's states."""
    return tuple(
        State(name, f"{name}_next", shape) for name, shape in net.state_shapes.items()
    )


def to_graph(net: nn.Module, spec: ModelSpec) -> ModelProto:
    """Return the unchecked ONNX graph; batch and time are free."""
    stage = spec.stages[0]
    # Distinct random tensors: with samples that alias, torch.export wires h and c to one input.
    rows = 2
    samples = [
        torch.randn(rows, *shape)
        for shape in (stage.input_shape, *(state.shape for state in stage.states))
    ]
    time = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    free = ({0: torch.export.Dim.DYNAMIC},) * len(stage.states)
    with warnings.catch_warnings(), torch.no_grad():
        # Not ours to fix: torch 2.13 and onnxscript 0.7 meet deprecations of their own.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.onnx.export(
            _with_onnx_ops(net),
            tuple(samples),
            input_names=[stage.input, *(state.input for state in stage.states)],
            output_names=[
                *(output.name for output in spec.outputs),
                *(state.output for state in stage.states),
            ],
            dynamic_shapes=(time, free),
            dynamo=True,
            verbose=False,
        )
    return _without_traces(program.model_proto)


def _check_spec(spec: ModelSpec) -> None:
    if len(spec.stages) != 1 or spec.stages[0].features != "raw":
        raise ExportError(f"stages: expected one, of raw samples, found {spec.stages}")
    if spec.window_samples != spec.hop_samples:
        raise ExportError(
            f"window_samples: expected hop_samples ({spec.hop_samples}), "
            f"found {spec.window_samples}"
        )


def _without_traces(model: ModelProto) -> ModelProto:
    """Drop the Python stack trace that the exporter attaches to every node."""
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        del value.metadata_props[:]
    return model


class _OnnxRecurrent(nn.Module):
    """Stands for a recurrent module during export and emits ONNX's own operator.

    Torch's exporter leaves ``nn.RNN`` unrolled over time, and fixes the time of the others.
    """

    def __init__(self, module: nn.RNNBase) -> None:
        super().__init__()
        if module.bidirectional or module.proj_size:
            raise ExportError(f"{module}: expected one direction and no projection")
        self.op = module.mode.split("_")[0]
        self.hidden = module.hidden_size
        self.batch_first = module.batch_first
        self.attributes: dict[str, int | Sequence[str]] = {"hidden_size": self.hidden}
        if self.op == "GRU":
            self.attributes["linear_before_reset"] = 1  # as torch computes it
        if module.mode == "RNN_RELU":
            self.attributes["activations"] = ["Relu"]
        self.layers = nn.ModuleList(_weights(module, index) for index in range(module.num_layers))

    def forward(
        self, x: Tensor, before: Tensor | tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor]]:
        """As ``nn.LSTM``: (N, T, C) and states (layers, N, hidden) in, the same out."""
        states = before if isinstance(before, tuple) else (before,)
        y = x.transpose(0, 1) if self.batch_first else x
        after = []
        for index, layer in enumerate(self.layers):
            y, *new = self._emit(layer, y, [s[index : index + 1] for s in states])
            after.append(new)
        ends = tuple(torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*after))
        y = y.transpose(0, 1) if self.batch_first else y
        return y, ends if isinstance(before, tuple) else ends[0]

    def _emit(self, layer: nn.Module, x: Tensor, states: list[Tensor]) -> list[Tensor]:
        time, rows = x.shape[0], x.shape[1]
        kept = [(1, rows, self.hidden)] * len(states)
        y, *new = torch.onnx.ops.symbolic_multi_out(
            self.op,
            [x, layer.w, layer.r, layer.b, None, *states],
            dict(self.attributes),
            dtypes=[x.dtype] * (1 + len(states)),
            shapes=[(time, 1, rows, self.hidden), *kept],
            version=14,
        )
        return [y.squeeze(1), *new]


def _weights(module: nn.RNNBase, layer: int) -> nn.Module:
    """Return one layer's weights in ONNX's order of gates, with its axis for directions."""
    op = module.mode.split("_")[0]

    def ordered(name: str) -> Tensor:
        weight = getattr(module, f"{name}_l{layer}").detach()
        gates = weight.chunk(len(_GATE_ORDER[op]))
        return torch.cat([gates[gate] for gate in _GATE_ORDER[op]])

    holder = nn.Module()
    holder.register_buffer("w", ordered("weight_ih").unsqueeze(0))
    holder.register_buffer("r", ordered("weight_hh").unsqueeze(0))
    if module.bias:
        bias = torch.cat([ordered("bias_ih"), ordered("bias_hh")])
    else:
        bias = torch.zeros(2 * len(holder.w[0]))
    holder.register_buffer("b", bias.unsqueeze(0))
    return holder


def _with_onnx_ops(net: nn.Module) -> nn.Module:
    """Return a copy whose recurrent modules emit ONNX operators."""
    if isinstance(net, nn.RNNBase):
        return _OnnxRecurrent(net)
    net = copy.deepcopy(net)
    for name, child in net.named_children():
        setattr(net, name, _with_onnx_ops(child))
    return net
