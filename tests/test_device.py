"""State that stays on a device; on the device "cpu" it has the bits of the plain runtime."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from engine import model_file
from engine.device import DeviceRuntime
from engine.errors import ModelFileError
from engine.model_file import Stage, State
from engine.runtime import CpuRuntime, random_rows
from tests import tiny

SLOTS = 9
BUCKETS = (1, 4, 8)
CELLS = ["LSTM", "GRU"]

gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(
    "CUDAExecutionProvider" not in ort.get_available_providers(),
    reason="this onnxruntime has no CUDA provider",
)


def batches(
    model: model_file.Model, rng: np.random.Generator, steps: int = 40
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.float32]]]:
    """Yield random rows in any order, of every number from one to the largest bucket."""
    for step in range(steps):
        count = 1 + step % BUCKETS[-1]
        _, windows = random_rows(model, count, rng)
        yield rng.permutation(SLOTS)[:count], windows


def fill(runtimes: tuple[CpuRuntime, DeviceRuntime], rng: np.random.Generator) -> None:
    rows, _ = random_rows(runtimes[0].model, SLOTS, rng)
    for runtime in runtimes:
        for slot, row in enumerate(rows):
            runtime.put(slot, row)


def state(runtime: CpuRuntime | DeviceRuntime) -> NDArray[np.float32]:
    return np.stack([runtime.take(slot) for slot in range(SLOTS)])


def test_a_row_that_fails_is_named_and_the_others_do_not_notice(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    model = model_file.load(tiny.write_fragile(tmp_path))
    struck, spared = (DeviceRuntime(model, SLOTS, "cpu", buckets=BUCKETS) for _ in range(2))
    slots = rng.permutation(SLOTS)[:5]
    others = [0, 1, 3, 4]
    for _ in range(3):
        x = rng.standard_normal((5, tiny.HOP, 1)).astype(np.float32)
        broken = x.copy()
        broken[2, 7] = tiny.NAN
        expected, found = spared.step(slots, x), struck.step(slots, broken)
        assert [*struck.failed] == [slots[2]]
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name][others], value[others])
        for other in slots[others]:
            np.testing.assert_array_equal(struck.take(other), spared.take(other))


def test_a_call_that_fails_names_all_of_its_rows(tmp_path: Path, rng: np.random.Generator) -> None:
    model = model_file.load(tiny.write_fragile(tmp_path))
    runtime = DeviceRuntime(model, SLOTS, "cpu", buckets=BUCKETS)
    x = rng.standard_normal((3, tiny.HOP, 1)).astype(np.float32)
    x[1, 7] = tiny.BREAKS
    assert not runtime.step(np.array([4, 0, 2]), x)["beat"].any()
    assert set(runtime.failed) == {4, 0, 2}


@pytest.mark.parametrize("cell", CELLS)
def test_many_steps_of_any_rows_are_those_of_the_cpu_bit_for_bit(
    models: Callable[..., Path], rng: np.random.Generator, cell: str
) -> None:
    model = model_file.load(models(cell.lower(), cell))
    cpu = CpuRuntime(model, SLOTS)
    device = DeviceRuntime(model, SLOTS, device="cpu", buckets=BUCKETS)
    fill((cpu, device), rng)
    for slots, windows in batches(model, rng):
        expected = {name: value.copy() for name, value in cpu.step(slots, windows).items()}
        found = device.step(slots, windows)
        assert list(found) == list(expected)
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value)
        np.testing.assert_array_equal(state(device), state(cpu))


def turned(folder: Path) -> Path:
    """Move the batch of one state to the last axis, behind another that has one value."""
    made = tiny.graph()
    for output in ("h_in", "h0_next"):
        (node,) = [node for node in made.graph.node if node.output[0] == output]
        node.CopyFrom(helper.make_node("Transpose", node.input[:1], [output], perm=[0, 2, 1]))
    for value in (*made.graph.input, *made.graph.output):
        if value.name in ("h0", "h0_next"):
            shape = [1, tiny.HIDDEN, "batch"]
            value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, shape))
    states = (
        State("h0", "h0_next", (1, tiny.HIDDEN), batch_axis=2, initial=0.5),
        State("c0", "c0_next", (tiny.HIDDEN,)),
    )
    stage = Stage("x", (tiny.HOP, 1), states=states)
    return tiny.write(folder, tiny.spec("turned", stages=(stage,)), made=made)


def test_a_state_whose_batch_axis_is_not_the_first_is_carried_alike(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    model = model_file.load(turned(tmp_path))
    cpu = CpuRuntime(model, SLOTS)
    device = DeviceRuntime(model, SLOTS, device="cpu", buckets=BUCKETS)
    for slot in range(SLOTS):
        cpu.reset(slot)
    np.testing.assert_array_equal(state(device), state(cpu))  # new rows need no reset
    for slots, windows in batches(model, rng, steps=8):
        cpu.step(slots, windows)
        device.step(slots, windows)
    np.testing.assert_array_equal(state(device), state(cpu))


def test_a_row_not_in_the_batch_does_not_change(tiny_path: Path, rng: np.random.Generator) -> None:
    """Three rows fill a bucket of four: the padding, too, leaves the others alone."""
    model = model_file.load(tiny_path)
    device = DeviceRuntime(model, SLOTS, device="cpu", buckets=BUCKETS)
    fill((CpuRuntime(model, SLOTS), device), rng)
    before = state(device)
    slots = np.array([7, 2, 3])
    device.step(slots, random_rows(model, 3, rng)[1])
    after = state(device)
    others = np.setdiff1d(np.arange(SLOTS), slots)
    np.testing.assert_array_equal(after[others], before[others])
    assert not (after[slots] == before[slots]).all(axis=1).any()


def test_a_row_that_was_reset_is_a_new_one_and_no_other_is(
    tiny_path: Path, rng: np.random.Generator
) -> None:
    model = model_file.load(tiny_path)
    device = DeviceRuntime(model, SLOTS, device="cpu", buckets=BUCKETS)
    fill((CpuRuntime(model, SLOTS), device), rng)
    before = state(device)
    device.reset(4)
    after = state(device)
    assert not after[4].any()
    np.testing.assert_array_equal(np.delete(after, 4, axis=0), np.delete(before, 4, axis=0))


def test_a_row_taken_out_and_put_elsewhere_goes_on(
    tiny_path: Path, rng: np.random.Generator
) -> None:
    model = model_file.load(tiny_path)
    here, there = (DeviceRuntime(model, SLOTS, "cpu", buckets=BUCKETS) for _ in range(2))
    _, hops = random_rows(model, 6, rng)
    expected = [here.step(np.array([2]), hop[None])["beat"].copy() for hop in hops[:3]]
    there.put(5, here.take(2))
    expected += [here.step(np.array([2]), hop[None])["beat"].copy() for hop in hops[3:]]
    for hop, value in zip(hops[3:], expected[3:], strict=True):
        np.testing.assert_array_equal(there.step(np.array([5]), hop[None])["beat"], value)


def two_stages(folder: Path) -> Path:
    tiny.write(folder, tiny.spec("part"))
    statement = (
        'format = 1\nname = "two"\npipeline = "scores"\nhop_samples = 20\nwindow_samples = 20\n'
        'licence = "CC0-1.0"\nprovenance = "random weights"\n'
        'input = { rate_hz = 100, unit = "mV" }\noutputs = [{ name = "y", meaning = "scores" }]\n'
    )
    tiny.write_smoother(folder, tiny.HOP, look_ahead_samples=0)
    stage = (
        '[[stages]]\nfile = "smoother.onnx"\ninput = "x"\ninput_shape = [20, 1]\n'
        'states = [{ input = "m0", output = "m0_next", shape = [1, 1] }]\n'
    )
    path = folder / "two.toml"
    path.write_text(f'{statement}{stage}passes = "y"\n{stage}')
    return path


def a_fixed_batch(folder: Path) -> Path:
    made = tiny.graph()
    for value in (*made.graph.input, *made.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    return tiny.write(folder, tiny.spec("fixed"), made=made)


@pytest.mark.parametrize("write", [two_stages, a_fixed_batch])
def test_a_model_that_cannot_be_stepped_on_a_device_is_refused(
    tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    model = model_file.load(write(tmp_path))
    with pytest.raises(ModelFileError, match="expects one graph with a free batch axis"):
        DeviceRuntime(model, SLOTS, device="cpu", buckets=BUCKETS)


@gpu
@needs_cuda
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_cuda_is_the_cpu_within_a_ten_thousandth(
    models: Callable[..., Path], rng: np.random.Generator, cell: str, graphs: bool
) -> None:
    pytest.importorskip("torch", reason="brings the cuDNN that onnxruntime-gpu loads")
    model = model_file.load(models(cell.lower(), cell))
    cpu = CpuRuntime(model, SLOTS)
    device = DeviceRuntime(model, SLOTS, device="cuda", graphs=graphs, buckets=BUCKETS)
    fill((cpu, device), rng)
    for slots, windows in batches(model, rng):
        before = state(device)
        expected, found = cpu.step(slots, windows), device.step(slots, windows)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-4)
        np.testing.assert_allclose(state(device), state(cpu), rtol=0, atol=1e-4)
        others = np.setdiff1d(np.arange(SLOTS), slots)
        np.testing.assert_array_equal(state(device)[others], before[others])
