"""One step of a model whose state rows stay on the device: the runtime of the provider ``cuda``.

At load the model's graph is wrapped: *Gather* takes the batch's rows out of the arena, the model
runs, *ScatterND* puts the new rows back. The arena never leaves the device; a step sends up
samples and slot numbers, and brings down the outputs. Batches are padded to buckets with a
scratch row, so that each bucket has fixed shapes and can be captured as a CUDA graph.

ScatterND with one buffer as its input and output is exact when run, but captured it is known to
corrupt (onnxruntime#32243), so two arenas take turns under CUDA graphs. The same code runs on
``cpu``, where tests compare it with :class:`engine.runtime.CpuRuntime`.
"""

import logging
import time
from collections import Counter
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from engine import features
from engine.errors import ModelFileError
from engine.model_file import Model, Stage, open_session
from engine.runtime import Outputs, all_finite, constants, first_line, initial_row

log = logging.getLogger(__name__)

# Rows of the captured graphs. The largest bounds a step; measured by benchmarks/gpu_check.py.
BUCKETS = (1, 4, 16, 32, 64, 128, 256, 512, 1024)
_ARENA, _ARENA_OUT, _SLOTS = "murmur_arena", "murmur_arena_out", "murmur_slots"
_OPSET = 17
# Parity with the CPU is worth more than the last tenth of speed.
_CUDA_OPTIONS = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}


class _Bucket(NamedTuple):
    """Buffers and bindings for one number of rows; a binding for each direction of the arenas."""

    samples: ort.OrtValue
    slots: ort.OrtValue
    outputs: dict[str, ort.OrtValue]
    bindings: list[ort.IOBinding]
    options: list[ort.RunOptions]


class DeviceRuntime:
    """A model whose state stays on a device.

    Parameters
    ----------
    model : Model
        Of one stage, with a free batch axis.
    num_slots : int
    device : {"cuda", "cpu"}
    graphs : bool
        Capture each bucket as a CUDA graph.
    buckets : tuple of int

    Raises
    ------
    ModelFileError
        If the model cannot be stepped in batches.
    """

    def __init__(
        self,
        model: Model,
        num_slots: int,
        device: str = "cuda",
        graphs: bool = False,
        buckets: tuple[int, ...] = BUCKETS,
    ) -> None:
        if len(model.spec.stages) != 1 or not model.batchable:
            raise ModelFileError(
                f"{model.spec.name}: provider cuda expects one graph with a free batch axis"
            )
        self.model = model
        self.failed: dict[int, str] = {}
        self.max_rows = buckets[-1]
        self.max_hops = 1  # the shapes of a captured graph are fixed
        self.runs: Counter[tuple[int, int]] = Counter()
        self.initial = initial_row(model.spec.states)
        self._device, self._graphs = device, graphs
        self._stage, self._rate_hz = model.spec.stages[0], model.spec.input.rate_hz
        self.num_slots = num_slots
        self._scratch = num_slots  # the row that padding reads and writes
        options = dict(_CUDA_OPTIONS) if device == "cuda" else {}
        if graphs:
            options["enable_cuda_graph"] = "1"
        wrapped = wrap(model.graphs[0], self._stage, [o.name for o in model.spec.outputs])
        self._session = open_session(wrapped, device, options, model.folder)
        plain = {name: value for name, value in options.items() if name != "enable_cuda_graph"}
        self._taking = open_session(_take_graph(), device, plain)
        self._putting = open_session(_put_graph(), device, plain)
        rows = np.tile(self.initial, (num_slots + 1, 1))
        # Outside of graphs the one arena is both ends of every step.
        self._arenas = [self._upload(rows) for _ in range(2 if graphs else 1)]
        self._turn = 0
        self._row_shapes = self._output_shapes()
        self._buckets = {size: self._bucket(size) for size in buckets}
        self._seconds = {size: self._warm_up(size) for size in buckets}
        self._reset_rows(range(num_slots))

    def reset(self, slot: int) -> None:
        """Give a row its model's initial state."""
        self._reset_rows([slot])

    def take(self, slot: int) -> NDArray[np.float32]:
        """Return a copy of a row."""
        feed = {_ARENA: self._arena, _SLOTS: self._upload(np.array([slot]))}
        (row,) = self._taking.run_with_ort_values(["rows"], feed)
        out: NDArray[np.float32] = row.numpy()[0]
        return out

    def put(self, slot: int, row: NDArray[np.float32]) -> None:
        self._put(np.array([slot]), row[None])

    def step(self, slots: NDArray[np.intp], windows: NDArray[np.float32]) -> Outputs:
        """Advance some rows by one hop; see :meth:`engine.runtime.CpuRuntime.step`.

        A call that fails may have changed the arena, so all of its rows fail. Only outputs are
        looked at for NaN: the state does not leave the device, and what is wrong with it shows in
        a later output.
        """
        try:
            outputs = self._run(slots, windows)
        except Exception as error:  # noqa: BLE001 - onnxruntime raises a class for each status
            fault = f"{self.model.spec.name}: {first_line(error)}"
            self.failed.update(dict.fromkeys(slots.tolist(), fault))
            shapes = self._row_shapes.items()
            return {name: np.zeros((len(slots), *row), np.float32) for name, row in shapes}
        for row in range(len(slots)) if not all_finite(*outputs.values()) else ():
            if not all_finite(*(value[row] for value in outputs.values())):
                fault = "expected finite outputs, found others"
                self.failed[int(slots[row])] = f"{self.model.spec.name}: {fault}"
        return outputs

    def _run(self, slots: NDArray[np.intp], windows: NDArray[np.float32]) -> Outputs:
        count = len(slots)
        size = next(size for size in self._buckets if size >= count)
        bucket = self._buckets[size]
        tensor = features.extract(self._stage.features, windows, self._rate_hz)
        samples = np.zeros((size, *self._stage.input_shape), np.float32)
        samples[:count] = tensor.reshape(count, *self._stage.input_shape)
        padded = np.full(size, self._scratch, np.int64)
        padded[:count] = slots
        bucket.samples.update_inplace(samples)
        bucket.slots.update_inplace(padded)
        self._session.run_with_iobinding(bucket.bindings[self._turn], bucket.options[self._turn])
        self._turn = (self._turn + 1) % len(self._arenas)
        self.runs[size, 1] += 1
        return {name: value.numpy()[:count] for name, value in bucket.outputs.items()}

    def step_seconds(self, rows: int) -> float:
        """Return the time that a step of so many rows took in the warm-up."""
        return next(taken for size, taken in self._seconds.items() if size >= rows)

    @property
    def _arena(self) -> ort.OrtValue:
        """The arena that the next step reads."""
        return self._arenas[self._turn]

    def _upload(self, array: NDArray[np.generic]) -> ort.OrtValue:
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self._device, 0)

    def _reset_rows(self, slots: "range | list[int]") -> None:
        self._put(np.array(slots), np.tile(self.initial, (len(slots), 1)))

    def _put(self, slots: NDArray[np.int64], rows: NDArray[np.float32]) -> None:
        binding = self._putting.io_binding()
        binding.bind_ortvalue_input(_ARENA, self._arena)
        binding.bind_ortvalue_input(_SLOTS, self._upload(slots[:, None]))
        binding.bind_ortvalue_input("rows", self._upload(rows))
        binding.bind_ortvalue_output(_ARENA_OUT, self._arena)
        self._putting.run_with_iobinding(binding)

    def _bucket(self, size: int) -> _Bucket:
        """Make the buffers of a bucket, with the output shapes that a plain run shows."""
        samples = self._upload(np.zeros((size, *self._stage.input_shape), np.float32))
        slots = self._upload(np.full(size, self._scratch, np.int64))
        outputs = {
            name: self._upload(np.zeros((size, *shape), np.float32))
            for name, shape in self._row_shapes.items()
        }
        bindings, options = [], []
        for turn in range(len(self._arenas)):
            binding = self._session.io_binding()
            binding.bind_ortvalue_input(self._stage.input, samples)
            binding.bind_ortvalue_input(_SLOTS, slots)
            binding.bind_ortvalue_input(_ARENA, self._arenas[turn])
            for name, constant in constants(self._stage).items():
                binding.bind_ortvalue_input(name, self._upload(constant))
            for name, value in outputs.items():
                binding.bind_ortvalue_output(name, value)
            binding.bind_ortvalue_output(_ARENA_OUT, self._arenas[turn - 1])
            bindings.append(binding)
            run_options = ort.RunOptions()
            if self._graphs:
                run_options.add_run_config_entry("gpu_graph_id", str(2 * size + turn))
            options.append(run_options)
        return _Bucket(samples, slots, outputs, bindings, options)

    def _output_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of one row of each output, by running the model as it came."""
        feed = {self._stage.input: np.zeros((1, *self._stage.input_shape), np.float32)}
        for state in self._stage.states:
            shape = list(state.shape)
            shape.insert(state.batch_axis, 1)
            feed[state.input] = np.full(shape, state.initial, np.float32)
        feed |= constants(self._stage)
        names = [output.name for output in self.model.spec.outputs]
        results = self.model.sessions[0].run(names, feed)
        return {name: value.shape[1:] for name, value in zip(names, results, strict=True)}

    def _warm_up(self, size: int) -> float:
        """Run a bucket in both directions, which also captures its graphs; return the seconds."""
        spec = self.model.spec
        windows = np.zeros((size, spec.window_samples, spec.input.channels), np.float32)
        slots = np.full(size, self._scratch)
        best = np.inf
        for _ in range(4 * len(self._arenas)):
            begin = time.perf_counter()
            self.step(slots, windows)
            best = min(best, time.perf_counter() - begin)
        self.runs.clear()
        return best


def wrap(graph: bytes, stage: Stage, outputs: list[str]) -> bytes:
    """Put *Gather* before and *ScatterND* behind a graph, so that its states are arena rows.

    Parameters
    ----------
    graph : bytes
        ONNX, as the model file holds it.
    stage : Stage
    outputs : list of str
        To keep, beside the arena.

    Returns
    -------
    bytes
        ONNX with the inputs samples, arena (slots, values) and slots (rows,), and the given
        outputs and the new arena.
    """
    model = onnx.load_from_string(graph)
    body = model.graph
    constants: list[onnx.TensorProto] = []
    before = [helper.make_node("Gather", [_ARENA, _SLOTS], ["murmur_rows"], axis=0)]
    after: list[onnx.NodeProto] = []

    def constant(name: str, values: list[int]) -> str:
        constants.append(numpy_helper.from_array(np.array(values, np.int64), f"murmur_{name}"))
        return f"murmur_{name}"

    sizes = constant("sizes", [state.size for state in stage.states])
    parts = [f"murmur_part{number}" for number in range(len(stage.states))]
    before.append(helper.make_node("Split", ["murmur_rows", sizes], parts, axis=1))
    returned = []
    for number, state in enumerate(stage.states):
        axes = list(range(1, len(state.shape) + 1))
        axes.insert(state.batch_axis, 0)  # where each axis of the graph's tensor comes from
        row = constant(f"row{number}", [-1, *state.shape])
        flat = constant(f"flat{number}", [-1, state.size])
        turned, back = f"murmur_turned{number}", f"murmur_back{number}"
        before.append(helper.make_node("Reshape", [parts[number], row], [turned]))
        before.append(helper.make_node("Transpose", [turned], [state.input], perm=axes))
        inverse = [axes.index(axis) for axis in range(len(axes))]
        after.append(helper.make_node("Transpose", [state.output], [back], perm=inverse))
        returned.append(f"murmur_new{number}")
        after.append(helper.make_node("Reshape", [back, flat], [returned[-1]]))
    after += [
        helper.make_node("Concat", returned, ["murmur_new_rows"], axis=1),
        helper.make_node("Unsqueeze", [_SLOTS, constant("last", [1])], ["murmur_places"]),
        helper.make_node("ScatterND", [_ARENA, "murmur_places", "murmur_new_rows"], [_ARENA_OUT]),
    ]
    _replace(body.node, [*before, *body.node, *after])
    body.initializer.extend(constants)
    states = {state.input for state in stage.states}
    _replace(body.input, [i for i in body.input if i.name not in states] + _arena_inputs(stage))
    kept = [output for output in body.output if output.name in outputs]
    _replace(body.output, [*kept, helper.make_tensor_value_info(_ARENA_OUT, 1, None)])
    wrapped: bytes = model.SerializeToString()
    return wrapped


def _replace(field: "list[onnx.NodeProto]", values: "list[onnx.NodeProto]") -> None:
    del field[:]
    field.extend(values)


def _arena_inputs(stage: Stage) -> list[onnx.ValueInfoProto]:
    width = sum(state.size for state in stage.states)
    return [
        helper.make_tensor_value_info(_ARENA, TensorProto.FLOAT, ["slots", width]),
        helper.make_tensor_value_info(_SLOTS, TensorProto.INT64, ["batch"]),
    ]


def _take_graph() -> bytes:
    node = helper.make_node("Gather", [_ARENA, _SLOTS], ["rows"], axis=0)
    return _tiny_graph([node], [(_ARENA, 1, 2), (_SLOTS, 7, 1)], "rows")


def _put_graph() -> bytes:
    node = helper.make_node("ScatterND", [_ARENA, _SLOTS, "rows"], [_ARENA_OUT])
    return _tiny_graph([node], [(_ARENA, 1, 2), (_SLOTS, 7, 2), ("rows", 1, 2)], _ARENA_OUT)


def _tiny_graph(
    nodes: list[onnx.NodeProto], inputs: list[tuple[str, int, int]], output: str
) -> bytes:
    """Return a graph of inputs (name, element type, rank) with one float output of rank 2."""
    declared = [
        helper.make_tensor_value_info(name, kind, [None] * rank) for name, kind, rank in inputs
    ]
    result = helper.make_tensor_value_info(output, TensorProto.FLOAT, [None, None])
    model = helper.make_model(
        helper.make_graph(nodes, "murmur", declared, [result]),
        opset_imports=[helper.make_opsetid("", _OPSET)],
    )
    model.ir_version = 9
    made: bytes = model.SerializeToString()
    return made
