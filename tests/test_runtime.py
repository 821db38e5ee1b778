"""One step for many streams, against a plain loop over ONNX Runtime for each stream."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import quantize_dynamic

from engine import model_file
from engine.errors import ModelFileError
from engine.model_file import Model, Stage, State
from engine.runtime import MICRO_BATCH, CpuRuntime, random_rows
from tests import plain, tiny
from tests.plain import Results

HOPS = 4
CELLS = ["LSTM", "GRU", "RNN"]


def signals(rng: np.random.Generator, count: int) -> NDArray[np.float32]:
    """Return (streams, hops, hop, 1), each stream ten times louder than the one before."""
    loud = 10.0 ** (np.arange(count) % 4)
    x = rng.standard_normal((count, HOPS, tiny.HOP, 1)) * loud[:, None, None, None]
    return x.astype(np.float32)


def stepped(
    runtime: CpuRuntime, x: NDArray[np.float32], batches: list[NDArray[np.intp]]
) -> list[list[Results]]:
    """Step streams, each in its own slot, in the given batches; each stream's results."""
    for slot in range(len(x)):
        runtime.reset(slot)
    done: list[list[Results]] = [[] for _ in x]
    for slots in batches:
        windows = np.stack([x[slot, len(done[slot])] for slot in slots])
        outputs = runtime.step(slots, windows)
        for row, slot in enumerate(slots):
            done[slot].append({name: value[row].copy() for name, value in outputs.items()})
    return done


def lockstep(count: int) -> list[NDArray[np.intp]]:
    return [np.arange(count)] * HOPS


def ragged(rng: np.random.Generator, count: int, most: int) -> list[NDArray[np.intp]]:
    """Return batches of any size and order in which each stream comes HOPS times."""
    left = np.full(count, HOPS)
    batches = []
    while left.any():
        ready = rng.permutation(np.flatnonzero(left))[: rng.integers(1, most + 1)]
        left[ready] -= 1
        batches.append(ready)
    return batches


def assert_same(found: list[Results], expected: list[Results]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for name, value in one.items():
            np.testing.assert_array_equal(value, other[name])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 31, 32])
def test_a_batch_is_each_stream_alone(
    models: Callable[..., Path], rng: np.random.Generator, cell: str, count: int
) -> None:
    path = models(cell.lower(), cell)
    x = signals(rng, count)
    found = stepped(CpuRuntime(model_file.load(path), count), x, lockstep(count))
    for one, signal in zip(found, x, strict=True):
        assert_same(one, plain.loop(path, signal, copies=2 if cell == "RNN" else 1))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("threads", [1, 2])
def test_ragged_batches_on_any_number_of_threads_are_each_stream_alone(
    models: Callable[..., Path], rng: np.random.Generator, cell: str, threads: int
) -> None:
    path = models(cell.lower(), cell)
    x = signals(rng, 70)
    runtime = CpuRuntime(model_file.load(path), 70, threads)
    most = runtime.max_rows
    found = stepped(runtime, x, ragged(rng, 70, most))
    for one, signal in zip(found, x, strict=True):
        assert_same(one, plain.loop(path, signal, copies=2 if cell == "RNN" else 1))


def test_a_full_batch_on_two_threads_is_that_on_one(
    tiny_model: Model, rng: np.random.Generator
) -> None:
    two = CpuRuntime(tiny_model, 2 * MICRO_BATCH, threads=2)
    one = CpuRuntime(tiny_model, 2 * MICRO_BATCH, threads=1)
    assert two.max_rows == 2 * MICRO_BATCH
    x = signals(rng, two.max_rows)
    halves = [np.arange(MICRO_BATCH), np.arange(MICRO_BATCH, 2 * MICRO_BATCH)] * HOPS
    for found, expected in zip(
        stepped(two, x, lockstep(two.max_rows)), stepped(one, x, halves), strict=True
    ):
        assert_same(found, expected)


@pytest.mark.parametrize("wrong", [tiny.BREAKS, tiny.NAN, tiny.NAN_STATE])
@pytest.mark.parametrize("hops", [1, 3])
@pytest.mark.parametrize("count", [1, 2, 5, 33])
def test_a_row_that_fails_is_named_and_left_as_it_was_and_the_others_do_not_notice(
    tmp_path: Path, rng: np.random.Generator, wrong: float, hops: int, count: int
) -> None:
    model = model_file.load(tiny.write_fragile(tmp_path))
    struck, spared = CpuRuntime(model, count), CpuRuntime(model, count)
    assert struck.max_hops >= 3
    state, _ = random_rows(model, count, rng)
    struck.arena[:] = spared.arena[:] = state
    slots = rng.permutation(count)
    x = rng.standard_normal((count, hops * tiny.HOP, 1)).astype(np.float32)
    culprit = int(rng.integers(count))
    broken = x.copy()
    broken[culprit, 7] = wrong
    expected, found = spared.step(slots, x), struck.step(slots, broken)
    (slot, reason) = next(iter(struck.failed.items()))
    assert [*struck.failed] == [slot] == [slots[culprit]]
    assert re.match("fragile: .*(finite|out of data bounds)", reason)
    np.testing.assert_array_equal(struck.take(slot), state[slot])
    others = np.arange(count) != culprit
    for name, value in expected.items():
        assert value.shape == found[name].shape
        np.testing.assert_array_equal(found[name][others], value[others])
        assert not found[name][culprit].any()
    for other in slots[others]:
        np.testing.assert_array_equal(struck.take(other), spared.take(other))
    assert not spared.failed


def test_rows_that_infect_each_other_are_told_apart_from_the_culprit(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """A sum over the batch, weighted by 0, shows nothing until one row is infinite."""
    runtime = CpuRuntime(model_file.load(tiny.write_infectious(tmp_path)), 3)
    assert not runtime.single
    for slot in range(3):
        runtime.reset(slot)
    x = rng.standard_normal((3, tiny.HOP, 1)).astype(np.float32)
    x[1, 0] = np.inf
    found = runtime.step(np.arange(3), x)
    assert [*runtime.failed] == [1]
    for row in (0, 2):
        (expected,) = plain.loop(runtime.model.folder / "tiny.onnx", x[row : row + 1])
        for name, value in found.items():
            np.testing.assert_array_equal(value[row], expected[name])


@pytest.mark.parametrize("cell", CELLS)
def test_several_hops_in_one_call_are_as_many_calls(
    models: Callable[..., Path], rng: np.random.Generator, cell: str
) -> None:
    path = models(cell.lower(), cell)
    x = signals(rng, 3)
    runtime = CpuRuntime(model_file.load(path), 3)
    assert runtime.max_hops >= HOPS
    for slot in range(3):
        runtime.reset(slot)
    found = runtime.step(np.arange(3), x.reshape(3, HOPS * tiny.HOP, 1))
    for row, signal in enumerate(x):
        alone = plain.loop(path, signal, copies=2 if cell == "RNN" else 1)
        for name, value in found.items():
            np.testing.assert_array_equal(value[row], np.concatenate([a[name] for a in alone]))
        state = np.concatenate([alone[-1][f"{s.input}_next"] for s in runtime.model.spec.states])
        np.testing.assert_array_equal(runtime.take(row), state)


def a_length_that_is_not_said(folder: Path) -> Path:
    """Declare any length and take one: a sum with a constant of twenty samples."""
    made = tiny.graph(time="samples")
    made.graph.node[0].input[0] = "shifted"
    made.graph.initializer.append(
        numpy_helper.from_array(np.ones((tiny.HOP, 1), np.float32), "shift")
    )
    made.graph.node.insert(0, helper.make_node("Add", ["x", "shift"], ["shifted"]))
    return tiny.write(folder, made=made)


def a_look_back(folder: Path) -> Path:
    """Subtract a call's first sample from all of it: a call is not two."""
    made = tiny.graph(time="samples")
    made.graph.node[0].input[0] = "moved"
    zero = numpy_helper.from_array(np.array([0]), "begin")
    made.graph.initializer.append(zero)
    made.graph.node.insert(0, helper.make_node("Gather", ["x", "begin"], ["first_x"], axis=1))
    made.graph.node.insert(1, helper.make_node("Sub", ["x", "first_x"], ["moved"]))
    return tiny.write(folder, made=made)


@pytest.mark.parametrize(
    "write", [tiny.write_mean_of_frames, a_length_that_is_not_said, a_look_back]
)
def test_a_graph_that_takes_one_hop_a_call_is_stepped_hop_by_hop(
    tmp_path: Path, rng: np.random.Generator, write: Callable[[Path], Path]
) -> None:
    path = write(tmp_path)
    x = signals(rng, 3)
    runtime = CpuRuntime(model_file.load(path), 3)
    assert runtime.max_hops == 1
    for found, signal in zip(stepped(runtime, x, lockstep(3)), x, strict=True):
        assert_same(found, plain.loop(path, signal))


def test_a_row_not_in_the_batch_does_not_change(
    tiny_model: Model, rng: np.random.Generator
) -> None:
    runtime = CpuRuntime(tiny_model, 3)
    stepped(runtime, signals(rng, 3), lockstep(3))
    before = runtime.take(1)
    runtime.step(np.array([2, 0]), signals(rng, 2)[:, 0])
    np.testing.assert_array_equal(runtime.take(1), before)


def test_a_reused_slot_equals_a_new_one_and_differs_without_reset(
    tiny_path: Path, tiny_model: Model, rng: np.random.Generator
) -> None:
    runtime = CpuRuntime(tiny_model, 1)
    first, second = signals(rng, 2)
    stepped(runtime, first[None], lockstep(1))
    leftover = runtime.step(np.array([0]), second[:1])["beat"][0]
    (reused,) = stepped(runtime, second[None], lockstep(1))
    expected = plain.loop(tiny_path, second)
    assert_same(reused, expected)
    assert not np.array_equal(leftover, expected[0]["beat"])


def test_a_row_taken_out_and_put_elsewhere_goes_on(
    tiny_path: Path, tiny_model: Model, rng: np.random.Generator
) -> None:
    (signal,) = signals(rng, 1)
    here, there = CpuRuntime(tiny_model, 1), CpuRuntime(tiny_model, 4)
    here.reset(0)
    found = [here.step(np.array([0]), hop[None]) for hop in signal[:2]]
    there.put(3, here.take(0))
    found += [there.step(np.array([3]), hop[None]) for hop in signal[2:]]
    assert_same([{k: v[0] for k, v in one.items()} for one in found], plain.loop(tiny_path, signal))


def quantised(models: Callable[..., Path], folder: Path) -> Path:
    """Quantise the tiny LSTM dynamically: activations get one scale over the whole batch."""
    path = folder / "quantised.onnx"
    quantize_dynamic(models(), path)
    return path


@pytest.fixture(params=["quantised", "common offset"])
def mixing(request: pytest.FixtureRequest, models: Callable[..., Path], tmp_path: Path) -> Path:
    """Return a model whose rows change each other within a batch."""
    if request.param == "quantised":
        return quantised(models, tmp_path)
    return tiny.write_mixing(tmp_path)


def test_a_graph_that_mixes_its_rows_is_stepped_row_by_row(
    mixing: Path, rng: np.random.Generator
) -> None:
    x = signals(rng, 8)
    runtime = CpuRuntime(model_file.load(mixing), 8)
    for found, signal in zip(stepped(runtime, x, lockstep(8)), x, strict=True):
        assert_same(found, plain.loop(mixing, signal))
    assert runtime.runs == {(1, 1): 8 * HOPS}


def decaying(folder: Path) -> Path:
    """Halve the state at each step."""
    tensor = helper.make_tensor_value_info
    half = numpy_helper.from_array(np.array(0.5, np.float32), "half")
    made = helper.make_model(
        helper.make_graph(
            [
                helper.make_node("Mul", ["h0", "half"], ["h0_next"]),
                helper.make_node("Identity", ["x"], ["same"]),
            ],
            "decaying",
            [
                tensor("x", TensorProto.FLOAT, ["batch", tiny.HOP, 1]),
                tensor("h0", TensorProto.FLOAT, ["batch", 1]),
            ],
            [
                tensor("h0_next", TensorProto.FLOAT, ["batch", 1]),
                tensor("same", TensorProto.FLOAT, ["batch", tiny.HOP, 1]),
            ],
            [half],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
    )
    made.ir_version = 9
    stage = Stage("x", (tiny.HOP, 1), states=(State("h0", "h0_next", (1,), initial=1.5e-38),))
    output = model_file.Output("same", "scores")
    return tiny.write(folder, tiny.spec(stages=(stage,), outputs=(output,)), made=made)


@pytest.mark.parametrize("threads", [1, 2])
def test_denormal_states_are_flushed_on_every_thread(tmp_path: Path, threads: int) -> None:
    """They would be 160-205 times slower; half of 1.5e-38 is the first of them."""
    runtime = CpuRuntime(model_file.load(decaying(tmp_path)), 2 * MICRO_BATCH, threads)
    slots = np.arange(runtime.max_rows)
    for slot in slots:
        runtime.reset(slot)
    runtime.step(slots, np.zeros((len(slots), tiny.HOP, 1), np.float32))
    bits = np.concatenate([runtime.take(slot) for slot in slots]).view(np.int32)
    assert not bits.any()


def test_the_time_of_a_step_is_known_for_every_number_of_rows(tiny_model: Model) -> None:
    runtime = CpuRuntime(tiny_model, 4, threads=2)
    assert all(runtime.step_seconds(rows) > 0 for rows in range(1, runtime.max_rows + 1))


def test_two_micro_batches_take_twice_as_long_as_one_unless_two_threads_share_them(
    tiny_model: Model,
) -> None:
    one, two = (CpuRuntime(tiny_model, 4, threads) for threads in (1, 2))
    assert one.max_rows == two.max_rows == 2 * MICRO_BATCH
    assert one.step_seconds(2 * MICRO_BATCH) == 2 * one.step_seconds(MICRO_BATCH)
    assert two.step_seconds(2 * MICRO_BATCH) == two.step_seconds(MICRO_BATCH)


def test_every_call_of_the_model_is_counted_by_its_rows(
    tiny_model: Model, rng: np.random.Generator
) -> None:
    runtime = CpuRuntime(tiny_model, 3)
    stepped(runtime, signals(rng, 3), [np.array([0, 1, 2]), np.array([1])])
    assert runtime.runs == {(3, 1): 1, (1, 1): 1}


@pytest.mark.parametrize(
    ("write", "found"), [(tiny.write_one_row_only, "Reshape"), (tiny.write_mean_of_rows, "1 rows")]
)
def test_a_graph_that_does_not_take_the_batch_it_declares_is_refused(
    tmp_path: Path, write: Callable[[Path], Path], found: str
) -> None:
    model = model_file.load(write(tmp_path))
    with pytest.raises(ModelFileError, match=f"tiny: expected .* takes 2 rows .*{found}"):
        CpuRuntime(model, 4)
