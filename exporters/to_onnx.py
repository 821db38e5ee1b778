"""From a PyTorch network to one ``.onnx`` file with its states and its statement.

The file is written only after :mod:`exporters.parity` has found that it computes what torch
does, streamed and batched; a fault raises :class:`ExportError` and leaves no file.

A network is any module with ``forward(x, *states) -> (*outputs, *new_states)`` that uses
``nn.RNN``, ``nn.LSTM`` or ``nn.GRU``; :class:`exporters.net.StreamingNet` is one.
"""

import copy
import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from onnx import ModelProto
from torch import Tensor, nn

from engine.model_file import METADATA_KEY, ModelSpec, State, encode_spec
from exporters import parity
from exporters.net import CausalConv, StreamingNet, activate
from exporters.parity import ExportError

# Torch orders an LSTM's gates i f g o and a GRU's r z n; ONNX wants i o f c and z r h.
# Values of a block that several frames see, from which on it is faster fetched for each of them
# than all blocks are cut and joined.
_LONG_BLOCK = 32
_GATE_ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}


def export(
    net: nn.Module,
    spec: ModelSpec,
    path: Path | str,
    tolerance: float = parity.TOLERANCE,
    *,
    hop_by_hop: bool = False,
) -> None:
    """Write a network and its statement to one file, if both are right.

    Parameters
    ----------
    net : nn.Module
        With the statement's outputs and states, in the statement's order.
    spec : ModelSpec
        One stage of raw samples whose windows do not overlap, or of log-mel frames, of which
        each window brings new ones only: a network that streams carries what it needs of the
        past as state.
    path : Path or str
    tolerance : float
        Greatest difference from torch; more than is usual only for a network whose own float32
        is as far from its float64.
    hop_by_hop : bool
        The graph takes one hop a call: for a network that walks through hops in Python.

    Raises
    ------
    ExportError
        If the network cannot be exported, or a check of :func:`exporters.parity.check` fails.
    """
    _check_spec(spec)
    net = copy.deepcopy(net).cpu().eval()
    model = to_graph(net, spec, hop_by_hop)
    entry = model.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, encode_spec(spec)
    graph = model.SerializeToString()
    parity.check(net, spec, graph, tolerance, hop_by_hop)
    Path(path).write_bytes(graph)


def states_of(net: StreamingNet) -> tuple[State, ...]:
    """Return what a statement says of this network's states."""
    return tuple(State(name, f"{name}_next", shape) for name, shape in net.state_shapes.items())


def to_graph(net: nn.Module, spec: ModelSpec, hop_by_hop: bool = False) -> ModelProto:
    """Return the unchecked ONNX graph; batch and time are free, hop by hop the batch alone.

    Raises
    ------
    ExportError
        If torch cannot trace the network.
    """
    stage = spec.stages[0]
    # Distinct random tensors: with samples that alias, torch.export wires h and c to one input.
    rows = (stage.input_shape, *(state.shape for state in stage.states))
    samples = tuple(torch.randn(2, *row) for row in rows)
    free = {0: "batch"} if hop_by_hop else {0: "batch", 1: "time"}
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                _Positional(_with_onnx_ops(net)).eval(),
                samples,
                input_names=[stage.input, *(state.input for state in stage.states)],
                output_names=[
                    *(output.name for output in spec.outputs),
                    *(state.output for state in stage.states),
                ],
                dynamic_shapes=((free, *[{0: "batch"}] * len(stage.states)),),
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise ExportError(f"torch cannot trace the network: {error}") from error
    assert program is not None  # None is for the exporter of old
    return _without_traces(program.model_proto)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what torch 2.13 says at every export and what nobody here can act on."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)  # "torchvision is not installed", four times
    with warnings.catch_warnings():
        # Several inputs share the axis "batch", as they should.
        warnings.filterwarnings("ignore", "# The axis name: batch", UserWarning)
        for kind in (DeprecationWarning, FutureWarning):  # of torch by torch and by onnxscript
            warnings.simplefilter("ignore", kind)
        try:
            yield
        finally:
            log.setLevel(level)


def _check_spec(spec: ModelSpec) -> None:
    if len(spec.stages) != 1 or spec.stages[0].features == "magnitude":
        raise ExportError(f"stages: expected one, of raw samples or log_mel, found {spec.stages}")
    if spec.stages[0].features == "raw" and spec.window_samples != spec.hop_samples:
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


class _Positional(nn.Module):
    """Gives every network one signature, whatever its ``forward`` calls its arguments."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *tensors: Tensor) -> Any:
        return self.net(*tensors)


class _OnnxRecurrent(nn.Module):
    """Stands for a recurrent module during export and emits ONNX's own operator.

    Torch's exporter leaves ``nn.RNN`` unrolled over time, and fixes the time of the others.
    """

    def __init__(self, module: nn.RNNBase) -> None:
        super().__init__()
        if module.bidirectional or module.proj_size:
            raise ExportError(f"{module}: expected one direction and no projection")
        self.op = module.mode.split("_")[0]
        self.letters = "hc" if self.op == "LSTM" else "h"
        self.hidden = module.hidden_size
        self.batch_first = module.batch_first
        self.attributes: dict[str, int | Sequence[str]] = {"hidden_size": self.hidden}
        if self.op == "GRU":
            self.attributes["linear_before_reset"] = 1  # as torch computes it
        if module.mode == "RNN_RELU":
            self.attributes["activations"] = ["Relu"]
        self.layers = nn.ModuleList(_Layer(module, index) for index in range(module.num_layers))

    def forward(
        self, x: Tensor, before: Tensor | tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor | tuple[Tensor, ...]]:
        """As ``nn.LSTM``: (N, T, C) and states (layers, N, hidden) in, the same out."""
        states = before if isinstance(before, tuple) else (before,)
        y, ends = self.over_time(x.transpose(0, 1) if self.batch_first else x, states)
        y = y.transpose(0, 1) if self.batch_first else y
        return y, ends if isinstance(before, tuple) else ends[0]

    def over_time(self, x: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Take (T, N, C) and states (layers, N, hidden), return as much."""
        after: list[list[Tensor]] = [[] for _ in states]
        for index, layer in enumerate(cast(Iterable[_Layer], self.layers)):
            x, *new = self._emit(layer, x, [state[index : index + 1] for state in states])
            for letter, state in zip(after, new, strict=True):
                letter.append(state)
        return x, tuple(torch.cat(letter) for letter in after)

    def _emit(self, layer: "_Layer", x: Tensor, states: list[Tensor]) -> list[Tensor]:
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


class _Layer(nn.Module):
    """One layer's weights in ONNX's order of gates, with its axis for directions."""

    w: Tensor
    r: Tensor
    b: Tensor

    def __init__(self, module: nn.RNNBase, layer: int) -> None:
        super().__init__()
        order = _GATE_ORDER[module.mode.split("_")[0]]

        def ordered(name: str) -> Tensor:
            gates = getattr(module, f"{name}_l{layer}").detach().chunk(len(order))
            return torch.cat([gates[gate] for gate in order])

        w, r = ordered("weight_ih"), ordered("weight_hh")
        b = w.new_zeros(2 * len(w))
        if module.bias:
            b = torch.cat([ordered("bias_ih"), ordered("bias_hh")])
        for name, value in (("w", w), ("r", r), ("b", b)):
            self.register_buffer(name, value.unsqueeze(0))


class _FramedConv(nn.Module):
    """Stands for a convolution during export: each frame's samples times one matrix.

    ONNX Runtime's *Conv* rounds a frame differently with the number of frames that are computed
    with it; a row of its matrix product does not. So several hops can be run in one call and
    give the bits of one call each, as its recurrent operators do.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Conv1d) -> None:
        super().__init__()
        (self.kernel,), (self.stride,) = conv.kernel_size, conv.stride
        outputs, inputs, _ = conv.weight.shape
        weight = conv.weight.detach().permute(2, 1, 0).reshape(self.kernel * inputs, outputs)
        bias = conv.bias.detach() if conv.bias is not None else weight.new_zeros(outputs)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """As ``nn.Conv1d``: (N, C, T) in, (N, outputs, frames) out."""
        return self.over_time(x.transpose(1, 2)).transpose(1, 2)

    def over_time(self, x: Tensor) -> Tensor:
        """Take (N, T, C), return (N, frames, outputs)."""
        blocks = x.reshape(x.shape[0], -1, self.stride * x.shape[2])
        per_frame = self.kernel // self.stride
        frames = blocks.shape[1] - per_frame + 1
        if blocks.shape[2] >= _LONG_BLOCK:
            places = torch.arange(frames)[:, None] + torch.arange(per_frame)
            seen = blocks.index_select(1, places.reshape(-1))
        else:
            seen = torch.cat([blocks[:, j : j + frames] for j in range(per_frame)], dim=2)
        y: Tensor = seen.reshape(x.shape[0], frames, -1) @ self.weight + self.bias
        return y


class _OnnxStreaming(nn.Module):
    """Stands for a :class:`StreamingNet` during export: as few passes over the frames as will do.

    Channels stay last, as the matrix products want them; time is first from the first recurrent
    operator to the heads, which are one product.
    """

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, net: StreamingNet) -> None:
        super().__init__()
        self.config = net.config
        if net.config.normalised:
            self.register_buffer("mean", net.mean)
            self.register_buffer("scale", net.scale)
        causal = cast(Iterable[CausalConv], net.convs)
        self.convs = nn.ModuleList(_FramedConv(one.conv) for one in causal)
        self.kept = [one.kept for one in causal]
        layers = cast(Iterable[nn.RNNBase], net.recurrent)
        self.recurrent = nn.ModuleList(_OnnxRecurrent(layer) for layer in layers)
        self.norms, self.linears = net.norms, net.linears
        heads = cast(Iterable[nn.Linear], net.heads.values())
        self.register_buffer("weight", torch.cat([head.weight.detach() for head in heads]).T)
        self.register_buffer("bias", torch.cat([head.bias.detach() for head in heads]))

    def forward(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """As :meth:`StreamingNet.forward`."""
        carried = list(states)
        new_states: list[Tensor] = []
        y = (x - self.mean) * self.scale if self.config.normalised else x
        for conv, kept in zip(cast(Iterable[_FramedConv], self.convs), self.kept, strict=True):
            if kept:
                y = torch.cat([carried.pop(0).transpose(1, 2), y], dim=1)
                new_states.append(y[:, -kept:].transpose(1, 2))
            y = torch.relu(conv.over_time(y))
        y = y.transpose(0, 1)
        layers = cast(Iterable[_OnnxRecurrent], self.recurrent)
        for norm, layer in zip(self.norms, layers, strict=True):
            before = [carried.pop(0).unsqueeze(0) for _ in layer.letters]
            y, after = layer.over_time(norm(y), before)
            new_states += [state.squeeze(0) for state in after]
        y = (self.linears(y) @ self.weight + self.bias).transpose(0, 1)
        heads = self.config.heads.values()
        parts = y.split([head.size for head in heads], dim=2)
        outputs = (activate(part, head) for part, head in zip(parts, heads, strict=True))
        return (*outputs, *new_states)


def _can_be_framed(conv: nn.Conv1d) -> bool:
    plain = conv.padding == (0,) and conv.dilation == (1,) and conv.groups == 1
    return plain and conv.kernel_size[0] % conv.stride[0] == 0


def _with_onnx_ops(net: nn.Module) -> nn.Module:
    """Return a copy whose modules are those that export well, and that run well when batched."""
    if type(net) is StreamingNet:
        causal = cast(Iterable[CausalConv], net.convs)
        if all(_can_be_framed(one.conv) for one in causal):
            return _OnnxStreaming(net)
    if isinstance(net, nn.RNNBase):
        return _OnnxRecurrent(net)
    if isinstance(net, nn.Conv1d) and _can_be_framed(net):
        return _FramedConv(net)
    net = copy.deepcopy(net)
    for name, child in net.named_children():
        setattr(net, name, _with_onnx_ops(child))
    return net
