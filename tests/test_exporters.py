"""Every kind of net exports, and every fault that the checks are for stops an export."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'export'")
onnx = pytest.importorskip("onnx", reason="needs the extra 'export'")

from torch import Tensor, nn  # noqa: E402

from engine import model_file  # noqa: E402
from engine.model_file import Input, ModelSpec, Output, Stage, State  # noqa: E402
from engine.runtime import CpuRuntime  # noqa: E402
from exporters import parity  # noqa: E402
from exporters.net import CausalConv, Conv, Head, NetConfig, StreamingNet  # noqa: E402
from exporters.to_onnx import ExportError, export, states_of, to_graph  # noqa: E402
from tests import tiny  # noqa: E402

HOP = 16
HEADS = {"beat": Head(1, "sigmoid"), "beat_class": Head(3, "softmax")}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny nets lose more by waiting for a second core than they win by it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def streaming_net(cell: str = "lstm", layers: int = 1, **changes: object) -> StreamingNet:
    torch.manual_seed(0)
    config = {"heads": HEADS, "convs": (Conv(6, 4, 2), Conv(6, 8, 2)), "hidden": 8, "dropout": 0.5}
    return StreamingNet(NetConfig(cell=cell, layers=layers, **(config | changes)))


def statement(states: tuple[State, ...], channels: int = 1, **changes: object) -> ModelSpec:
    fields = {
        "format": model_file.FORMAT,
        "name": "net",
        "pipeline": "scores",
        "input": Input(100.0, "mV", channels),
        "hop_samples": HOP,
        "window_samples": HOP,
        "stages": (Stage("x", (HOP, channels), states=states),),
        "outputs": (Output("beat", "beat"), Output("beat_class", "beat_class", ("N", "S", "V"))),
        "licence": "CC0-1.0",
        "provenance": "random weights",
    }
    return ModelSpec(**(fields | changes))


# An export takes torch a second, whatever the net's size; so one serves several promises.
@pytest.mark.parametrize(
    ("cell", "layers", "changes"),
    [
        ("rnn", 1, {"convs": (Conv(6, 3, 2), Conv(6, 4, 2))}),
        ("gru", 3, {"convs": (), "channels": 2, "linears": (7,)}),
        ("gru", 2, {"normalised": True, "layer_norms": True}),
        ("lstm", 1, {"convs": (Conv(16, 6, 2), Conv(8, 6, 2))}),  # blocks that are fetched by place
        ("lstm", 2, {"convs": (Conv(6, 4, 4),)}),  # a kernel as long as its stride: no state
    ],
)
def test_a_net_exports_as_native_operators_to_one_file(
    cell: str, layers: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    net = streaming_net(cell, layers, **changes)
    stated = statement(states_of(net), changes.get("channels", 1))
    export(net, stated, tmp_path / "net.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]
    loaded = model_file.load(tmp_path / "net.onnx")
    assert loaded.spec == stated
    assert loaded.batchable
    operators = [node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node]
    assert operators.count(cell.upper()) == layers


def test_a_kernel_as_long_as_its_stride_has_no_state() -> None:
    assert list(streaming_net("gru", convs=(Conv(6, 4, 4),)).state_shapes) == ["h0"]


class Stacked(nn.Module):
    """A net of one's own: two layers in one module, without biases, time first, ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(1, 8, num_layers=2, nonlinearity="relu", bias=False)
        self.beat, self.classes = nn.Linear(8, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        y, state = self.rnn(x.transpose(0, 1), state.transpose(0, 1).contiguous())
        y = y.transpose(0, 1)
        return self.beat(y).squeeze(2), self.classes(y), state.transpose(0, 1)


def test_any_module_with_that_forward_exports(tmp_path: Path) -> None:
    torch.manual_seed(0)
    export(Stacked(), statement((State("h", "h_next", (2, 8)),)), tmp_path / "net.onnx")


# Faults of the graph: what a careless exporter makes of a right net.


@pytest.fixture(scope="module")
def right() -> tuple[StreamingNet, ModelSpec, bytes]:
    net = streaming_net("lstm", layers=2).eval()
    spec = statement(states_of(net))
    return net, spec, to_graph(net, spec).SerializeToString()


def rewired(graph: bytes, change: Callable[[list[onnx.NodeProto]], None]) -> bytes:
    model = onnx.load_from_string(graph)
    change([node for node in model.graph.node if node.op_type == "LSTM"])
    return model.SerializeToString()


def test_the_right_graph_passes(right: tuple[StreamingNet, ModelSpec, bytes]) -> None:
    parity.check(*right)


def test_a_net_with_convolutions_takes_several_hops_in_one_call(
    right: tuple[StreamingNet, ModelSpec, bytes], tmp_path: Path
) -> None:
    """ONNX Runtime's own convolution would round otherwise, and the engine step hop by hop."""
    _, spec, graph = right
    path = tiny.write(tmp_path, spec, made=onnx.load_from_string(graph))
    assert CpuRuntime(model_file.load(path), 1).max_hops > 1


def test_h_in_the_place_of_c_is_caught(right: tuple[StreamingNet, ModelSpec, bytes]) -> None:
    def alias(lstms: list[onnx.NodeProto]) -> None:
        lstms[0].input[6] = lstms[0].input[5]

    net, spec, graph = right
    with pytest.raises(ExportError, match="every input counts: c0 changes no output"):
        parity.check(net, spec, rewired(graph, alias))


def test_h_and_c_exchanged_are_caught(right: tuple[StreamingNet, ModelSpec, bytes]) -> None:
    def exchange(lstms: list[onnx.NodeProto]) -> None:
        lstms[0].input[5], lstms[0].input[6] = lstms[0].input[6], lstms[0].input[5]

    net, spec, graph = right
    with pytest.raises(ExportError, match="torch is ONNX: beat differs"):
        parity.check(net, spec, rewired(graph, exchange))


def test_layers_that_exchange_their_states_are_caught(
    right: tuple[StreamingNet, ModelSpec, bytes],
) -> None:
    def exchange(lstms: list[onnx.NodeProto]) -> None:
        first, second = lstms
        first.output[1], second.output[1] = second.output[1], first.output[1]

    net, spec, graph = right
    with pytest.raises(ExportError, match="h0_next differs"):
        parity.check(net, spec, rewired(graph, exchange))


def test_gates_in_torchs_order_are_caught(right: tuple[StreamingNet, ModelSpec, bytes]) -> None:
    net, spec, graph = right
    model = onnx.load_from_string(graph)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("0.r"))
    gates = np.split(onnx.numpy_helper.to_array(weight), 4, axis=1)
    moved = np.concatenate([gates[gate] for gate in (0, 2, 3, 1)], axis=1)
    weight.CopyFrom(onnx.numpy_helper.from_array(moved, weight.name))
    with pytest.raises(ExportError, match="torch is ONNX"):
        parity.check(net, spec, model.SerializeToString())


# Faults of the net: torch and ONNX agree, and streaming it would still be wrong.


class Faulty(StreamingNet):
    """A net whose ``forward`` spoils what a right one takes or returns."""

    def __init__(self) -> None:
        super().__init__(NetConfig(HEADS, cell="lstm", hidden=8))


class AliasedState(Faulty):
    def forward(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        h, c = states
        return super().forward(x, h + c, h + c)


class MiswiredState(Faulty):
    def forward(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        *outputs, h, c = super().forward(x, *states)
        return *outputs, c, h


class LookingAhead(Faulty):
    def forward(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        return super().forward(torch.cat([x[:, 1:], x[:, -1:]], dim=1), *states)


class NormalisedOverTheBatch(Faulty):
    def forward(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        return super().forward(x - x.mean(dim=0, keepdim=True), *states)


@pytest.mark.parametrize(
    ("faulty", "named"),
    [
        (AliasedState, "states keep their places: h0 and c0"),
        (MiswiredState, "whole is chunks"),
        (LookingAhead, "whole is chunks"),
        (NormalisedOverTheBatch, "alone is batched"),
    ],
)
def test_a_faulty_net_is_not_written(faulty: type[Faulty], named: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = faulty()
    with pytest.raises(ExportError, match=named):
        export(net, statement(states_of(net)), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_two_directions_are_refused(tmp_path: Path) -> None:
    net = Stacked()
    net.rnn = nn.GRU(1, 8, bidirectional=True)
    spec = statement((State("h", "h_next", (2, 8)),))
    with pytest.raises(ExportError, match="one direction"):
        export(net, spec, tmp_path / "net.onnx")


def test_overlapping_windows_are_refused(tmp_path: Path) -> None:
    net = streaming_net()
    spec = statement(states_of(net), window_samples=2 * HOP)
    with pytest.raises(ExportError, match="window_samples: expected hop_samples"):
        export(net, spec, tmp_path / "net.onnx")


def test_statement_and_graph_must_name_the_same_tensors(
    right: tuple[StreamingNet, ModelSpec, bytes],
) -> None:
    net, _, graph = right
    with pytest.raises(ExportError, match="inputs: the statement names"):
        parity.check(net, statement(states_of(net)[:-1]), graph)


def test_a_convolution_shorter_than_its_stride_is_refused() -> None:
    with pytest.raises(ValueError, match="kernel: expected at least the stride 4"):
        CausalConv(1, Conv(6, 3, 4))


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_torch_alone_gives_the_same_for_whole_and_chunks(cell: str) -> None:
    net = streaming_net(cell, layers=2).eval()
    x = torch.randn(2, 4 * HOP, 1)
    states = net.initial_states(2)
    with torch.no_grad():
        whole = net(x, *states)
        parts = []
        for chunk in x.split([HOP, 3 * HOP], dim=1):
            outputs = net(chunk, *states)
            states = outputs[len(HEADS) :]
            parts.append(outputs[: len(HEADS)])
    for index in range(len(HEADS)):
        joined = torch.cat([part[index] for part in parts], dim=1)
        torch.testing.assert_close(joined, whole[index], atol=1e-6, rtol=0)
