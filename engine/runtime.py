"""One step of a model for many streams: gather their state rows, run, scatter them back.

Each model has one arena, ``(slots, values)`` float32, a packed row a stream. A batch is cut into
micro-batches, because larger ones leave the cache, and these are spread over the cores with one
thread each. A row's result does not depend on its neighbours, bit for bit on CPU: where a graph
breaks that, which the warm-up finds out by running it, rows are stepped in a way that keeps it.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from engine import features
from engine.errors import ModelFileError
from engine.model_file import Model, Stage, State

log = logging.getLogger(__name__)

Array = NDArray[Any]
Outputs = dict[str, NDArray[np.float32]]

# Rows of one ONNX Runtime call on CPU. Gains saturate at 16-32 rows and larger calls lose it
# again as the activations leave the L2 cache (benchmarks/results, `murmur bench step`).
MICRO_BATCH = 32
# And with a row of state as large as this, in values, nothing is gained by more rows than a few:
# what a stream carries leaves the caches as it is (docs/decisions.md).
_LARGE_STATE = 2**18
_FEW = 4
# Micro-batches of a full step, also of one thread: what is done around the calls costs nearly as
# much for 32 rows as for 64 (docs/decisions.md).
_LEAST_PARTS = 2
# Hops of one call, where several give the bits of one call each: enough for a chunk of a second,
# few enough that a batch does not keep the loop from its sockets for long.
_MAX_HOPS = 6
_WARM_UP_RUNS = 3
# Rows on which batches are compared. A sum whose order depends on the batch rounds otherwise in
# one row of ten or twelve only (ReduceMean over five frames), so a few rows would not show it.
_COMPARED_ROWS = 3  # times the micro-batch


class Runtime(Protocol):
    """What a lane needs of a device; :class:`CpuRuntime` and :class:`engine.device.DeviceRuntime`.

    Attributes
    ----------
    num_slots : int
        Rows of state that there are.
    max_rows : int
        Rows that one step takes at the most.
    max_hops : int
        Hops that one step advances each of its rows at the most.
    runs : Counter
        How many calls of the model were made, by their rows and hops.
    failed : dict of int to str
        Slots of which a step could make nothing, and why; who reads them clears them. Their
        outputs are 0 and their streams cannot go on.
    """

    failed: dict[int, str]
    num_slots: int
    max_rows: int
    max_hops: int
    runs: Counter[tuple[int, int]]

    def reset(self, slot: int) -> None: ...
    def step(self, slots: NDArray[np.intp], windows: NDArray[np.float32]) -> Outputs: ...
    def step_seconds(self, rows: int) -> float: ...
    def take(self, slot: int) -> NDArray[np.float32]: ...
    def put(self, slot: int, row: NDArray[np.float32]) -> None: ...


class CpuRuntime:
    """A model on the CPU.

    Parameters
    ----------
    model : Model
    num_slots : int
    threads : int
        Cores to use; batches above one micro-batch are spread over them.

    Raises
    ------
    ModelFileError
        If a graph does not take what it says that it takes.
    """

    def __init__(self, model: Model, num_slots: int, threads: int = 1) -> None:
        self.model = model
        self.failed: dict[int, str] = {}
        self._graphs = Step(model)
        self._nothing = {name: np.zeros_like(value) for name, value in self._try(1).items()}
        if model.batchable:
            self._try(2)
        self.runs: Counter[tuple[int, int]] = Counter()
        self.initial = initial_row(model.spec.states)
        self.num_slots = num_slots
        large = model.spec.state_size >= _LARGE_STATE
        self.micro_batch = _FEW if large else MICRO_BATCH
        self.arena = np.empty((num_slots, len(self.initial)), np.float32)
        # Threads inherit the flush-to-zero flag that the first session set in this one.
        self._threads = threads
        self._helpers = ThreadPoolExecutor(threads - 1) if threads > 1 else None
        self.single = not model.batchable
        self._pad_to = 1
        if model.batchable:
            self._keep_rows_apart()
        parts = threads if large or self.single else max(threads, _LEAST_PARTS)
        self.max_rows = self.micro_batch * parts
        self.micro_batch = 1 if self.single else self.micro_batch
        self.max_hops = 1 if self.single else self._hops_of_a_step()
        seconds = self._warm_up()
        self._seconds = [
            0.0,
            *(self._estimate(rows, seconds) for rows in range(1, self.max_rows + 1)),
        ]

    def reset(self, slot: int) -> None:
        """Give a row its model's initial state."""
        self.arena[slot] = self.initial

    def take(self, slot: int) -> NDArray[np.float32]:
        """Return a copy of a row, to be put back here or elsewhere."""
        row: NDArray[np.float32] = self.arena[slot].copy()
        return row

    def put(self, slot: int, row: NDArray[np.float32]) -> None:
        self.arena[slot] = row

    def step(self, slots: NDArray[np.intp], windows: NDArray[np.float32]) -> Outputs:
        """Advance some rows by one hop or several; the others do not change.

        A row that the model fails on, or makes NaN or infinities of, is noted in ``failed`` and
        left as it was; the others are given what they would have been given without it.

        Parameters
        ----------
        slots : (rows,) intp
            Distinct rows, at most ``max_rows``.
        windows : (rows, window, channels) float32
            Or, for several hops, (rows, hops * window, channels); at most ``max_hops``.

        Returns
        -------
        dict of the stated outputs, each (rows, ...) float32; the first axis after the rows is
        as many times longer as there are hops
        """
        parts = list(self._micro_batches(len(slots)))
        hops = windows.shape[1] // self.model.spec.window_samples
        self.runs.update((part.stop - part.start, hops) for part in parts)
        # A core that takes part must first fetch the weights, which costs as much as some ten
        # rows (docs/decisions.md); only a full batch says that there is work for all of them.
        # This thread takes its share: two helpers that are woken at once were seen to be put on one
        # core, the other left idle for some ten milliseconds.
        helped: list[Future[Outputs]] = []
        if len(slots) == self.max_rows and self._helpers is not None:
            parts, others = parts[:1], parts[1:]
            helped = [
                self._helpers.submit(self._step_part, slots[part], windows[part]) for part in others
            ]
        done = [self._step_part(slots[part], windows[part]) for part in parts]
        done += [one.result() for one in helped]
        if len(done) == 1:
            return done[0]
        return {name: np.concatenate([part[name] for part in done]) for name in done[0]}

    def step_seconds(self, rows: int) -> float:
        """Return the time that a step of so many rows took in the warm-up."""
        return self._seconds[rows]

    def _estimate(self, rows: int, seconds: dict[int, float]) -> float:
        """Return the time of the micro-batches of a step, from that of the next larger bucket."""
        sizes = [part.stop - part.start for part in self._micro_batches(rows)]
        rounds = -(-len(sizes) // self._threads) if rows == self.max_rows else len(sizes)
        return rounds * next(taken for size, taken in seconds.items() if size >= max(sizes))

    def _micro_batches(self, rows: int) -> Iterator[slice]:
        count = -(-rows // self.micro_batch)
        size = -(-rows // count)
        for start in range(0, rows, size):
            yield slice(start, min(start + size, rows))

    def _step_part(self, slots: NDArray[np.intp], windows: NDArray[np.float32]) -> Outputs:
        rows = self.arena[slots]
        try:
            outputs = self._run(rows, windows)
        except Exception as error:  # noqa: BLE001 - onnxruntime raises a class for each status
            log.warning("%s: a step failed: %s", self.model.spec.name, first_line(error))
            return self._step_apart(slots, windows)
        if not all_finite(rows, *outputs.values()):
            return self._step_apart(slots, windows)
        self.arena[slots] = rows
        return outputs

    def _step_apart(self, slots: NDArray[np.intp], windows: NDArray[np.float32]) -> Outputs:
        """Step rows one by one, after they failed together; a culprit stays as it was.

        The others get the bits that the batch would have given them: so rows are batched.
        """
        hops = windows.shape[1] // self.model.spec.window_samples
        parts = []
        for row, slot in enumerate(slots.tolist()):
            state = self.arena[slot : slot + 1].copy()
            try:
                outputs = self._run(state, windows[row : row + 1])
                finite = all_finite(state, *outputs.values())
                fault = "" if finite else "expected finite outputs and state, found others"
            except Exception as error:  # noqa: BLE001 - as above
                fault = first_line(error)
            if fault:
                self.failed[slot] = f"{self.model.spec.name}: {fault}"
                outputs = {
                    name: np.repeat(value, hops, axis=1) if hops > 1 else value
                    for name, value in self._nothing.items()
                }
            else:
                self.arena[slot] = state[0]
            parts.append(outputs)
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _run(self, rows: NDArray[np.float32], windows: NDArray[np.float32]) -> Outputs:
        """Run all stages on gathered rows and leave the new state in them."""
        wanted = len(rows)
        if wanted < self._pad_to:
            spare = self._pad_to - wanted
            windows = np.concatenate([windows, np.repeat(windows[:1], spare, axis=0)])
            padded = np.concatenate([rows, np.repeat(rows[:1], spare, axis=0)])
            outputs = self._run(padded, windows)
            rows[:] = padded[:wanted]
            return {name: value[:wanted] for name, value in outputs.items()}
        return self._graphs.run(rows, windows)

    def _warm_up(self) -> dict[int, float]:
        """Run each bucket size, and return the seconds that it took: the best of a few."""
        seconds = {}
        size = 1
        rng = np.random.default_rng(0)
        while size <= self.micro_batch:
            rows, windows = random_rows(self.model, size, rng)
            seconds[size] = min(self._time(rows, windows) for _ in range(_WARM_UP_RUNS))
            size *= 2
        return seconds

    def _time(self, rows: NDArray[np.float32], windows: NDArray[np.float32]) -> float:
        start = time.perf_counter()
        self._run(rows.copy(), windows)
        return time.perf_counter() - start

    def _hops_of_a_step(self) -> int:
        """Return how many hops one call may take, found out by running it.

        A recurrent operator gives the same bits whether it is called once for many frames or
        many times; a convolution may not, nor may another processor's kernels.
        """
        spec = self.model.spec
        stage = spec.stages[0]
        samples_in = len(spec.stages) == 1 and stage.features == "raw"
        apart = spec.window_samples == spec.hop_samples == stage.input_shape[0]
        if not samples_in or not apart or isinstance(self._time_axis(stage), int):
            return 1
        rng = np.random.default_rng(2)
        for count in (1, 2, MICRO_BATCH):
            rows, _ = random_rows(self.model, count, rng)
            shape = (count, _MAX_HOPS * spec.hop_samples, spec.input.channels)
            samples = rng.standard_normal(shape).astype(np.float32)
            if not self._same_over_time(rows, samples):
                return 1
        return _MAX_HOPS

    def _time_axis(self, stage: Stage) -> int | str | None:
        """Return what the graph says of the axis behind the batch: a number if it is fixed."""
        nodes = {node.name: node for node in self.model.sessions[0].get_inputs()}
        axis: int | str | None = nodes[stage.input].shape[1]
        return axis

    def _same_over_time(self, rows: NDArray[np.float32], samples: NDArray[np.float32]) -> bool:
        stepped, at_once = rows.copy(), rows.copy()
        hops = np.split(samples, _MAX_HOPS, axis=1)
        parts = [self._run(stepped, hop) for hop in hops]
        try:
            whole = self._run(at_once, samples)
        except Exception:  # noqa: BLE001 - onnxruntime raises a class for each status
            return False  # the graph does not keep what it says of its time axis
        return np.array_equal(stepped, at_once) and all(
            value.ndim > 1
            and np.array_equal(value, np.concatenate([part[name] for part in parts], axis=1))
            for name, value in whole.items()
        )

    def _try(self, rows: int) -> Outputs:
        """Run a graph before anything is built on it: what it says of its axes may be wrong."""
        spec = self.model.spec
        expected = f"{spec.name}: expected a graph that takes {rows} rows of a window"
        try:
            outputs = self._graphs.run(*random_rows(self.model, rows, np.random.default_rng(0)))
        except Exception as error:  # noqa: BLE001 - onnxruntime raises a class for each status
            raise ModelFileError(f"{expected}, found: {first_line(error)}") from None
        for name, value in outputs.items():
            if len(value) != rows:
                raise ModelFileError(f"{expected}, found {len(value)} rows in {name}")
        return outputs

    def _keep_rows_apart(self) -> None:
        """Find out how rows must be batched so that neighbours do not change their bits.

        ONNX Runtime multiplies a single row by another kernel than several, which rounds
        differently (vanilla RNN); such rows are padded to two. Graphs with a scale over the
        batch, as dynamic quantisation makes them, are stepped row by row.
        """
        if not self._same_in_any_batch((2, 3, self.micro_batch)):
            self.single = True
            log.warning("%s: rows change each other; stepped one by one", self.model.spec.name)
        elif not self._same_in_any_batch((1, 2)):
            self._pad_to = 2

    def _same_in_any_batch(self, sizes: tuple[int, ...]) -> bool:
        rng = np.random.default_rng(1)
        rows, windows = random_rows(self.model, _COMPARED_ROWS * self.micro_batch, rng)
        windows[::3] *= 30.0  # loud neighbours, to some
        first, *others = (self._in_groups(size, rows, windows) for size in sizes)
        return all(
            np.array_equal(one, value)
            for other in others
            for one, value in zip(first, other, strict=True)
        )

    def _in_groups(
        self, size: int, rows: NDArray[np.float32], windows: NDArray[np.float32]
    ) -> list[NDArray[np.float32]]:
        """Return new states and outputs of rows that are run so many at a time."""
        state = rows.copy()
        parts = [
            self._graphs.run(state[start : start + size], windows[start : start + size])
            for start in range(0, len(rows), size)
        ]
        return [state, *(np.concatenate([part[name] for part in parts]) for name in parts[0])]


def all_finite(*arrays: NDArray[np.float32]) -> bool:
    """Return whether there is neither NaN nor infinity.

    One pass that allocates nothing, 0.07 % of a step of the bundled heart model; only a sum that
    overflows needs the closer look.
    """
    return all(math.isfinite(np.vdot(x, x)) or bool(np.isfinite(x).all()) for x in arrays)


def first_line(error: Exception) -> str:
    """Return what an error says, on one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def constants(stage: Stage) -> dict[str, Array]:
    """Return the inputs of a graph that are the same at every step."""
    return {
        name: np.asarray(value, np.int64 if isinstance(value, int) else np.float32)
        for name, value in stage.constants.items()
    }


def initial_row(states: tuple[State, ...]) -> NDArray[np.float32]:
    """Return a new stream's packed state, (values,) float32."""
    parts = [np.full(state.size, state.initial, np.float32) for state in states]
    return np.concatenate([np.empty(0, np.float32), *parts])


def random_rows(
    model: Model, count: int, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return (count, values) of state and (count, window, channels) of signal, all distinct."""
    spec = model.spec
    rows = rng.uniform(-0.9, 0.9, (count, spec.state_size)).astype(np.float32)
    shape = (count, spec.window_samples, spec.input.channels)
    return rows, rng.standard_normal(shape).astype(np.float32)


class Step:
    """One step of a model on rows that have been gathered: its graphs, one after the other.

    Parameters
    ----------
    model : Model
    """

    def __init__(self, model: Model) -> None:
        outputs = [output.name for output in model.spec.outputs]
        self._stages: list[_StageStep] = []
        column = 0
        for stage, session in zip(model.spec.stages, model.sessions, strict=True):
            wanted = [stage.passes] if stage.passes else outputs
            step = _StageStep(stage, session, wanted, column, model.spec.input.rate_hz)
            self._stages.append(step)
            column += sum(state.size for state in stage.states)

    def run(self, rows: NDArray[np.float32], windows: NDArray[np.float32]) -> Outputs:
        """Run the graphs and leave the new state in the rows.

        Parameters
        ----------
        rows : (rows, values) float32
            Packed state, in the order in which the statement lists it; changed in place.
        windows : (rows, window, channels) float32

        Returns
        -------
        dict of the stated outputs
        """
        outputs: Outputs = {}
        for step in self._stages:
            outputs = step.run(rows, windows)
            passes = step.stage.passes
            if passes:
                passed = outputs[passes].reshape(len(windows), -1, windows.shape[2])
                mask = step.stage.passes_as == "mask"
                windows = features.apply_mask(windows, passed) if mask else passed
        return outputs


class _Column(NamedTuple):
    """Where a state tensor lies in a packed row, and how it is turned for the graph."""

    name: str
    place: slice
    row_shape: tuple[int, ...]
    batch_axis: int


class _StageStep:
    """One graph, with all that can be known of its call before it is made."""

    def __init__(
        self,
        stage: Stage,
        session: ort.InferenceSession,
        wanted: list[str],
        column: int,
        rate_hz: float,
    ) -> None:
        self.stage = stage
        self._rate_hz = rate_hz
        self._session = session
        self._row_size = math.prod(stage.input_shape)
        self._wanted = wanted
        self._names = wanted + [state.output for state in stage.states]
        self._columns: list[_Column] = []
        for state in stage.states:
            place = slice(column, column + state.size)
            self._columns.append(_Column(state.input, place, state.shape, state.batch_axis))
            column += state.size
        self._constants = constants(stage)

    def run(self, rows: NDArray[np.float32], windows: NDArray[np.float32]) -> Outputs:
        count = len(windows)
        tensor = features.extract(self.stage.features, windows, self._rate_hz)
        feed: dict[str, Array] = dict(self._constants)
        feed[self.stage.input] = tensor.reshape(count, *self._shape_of(tensor))
        for name, place, row_shape, batch_axis in self._columns:
            part = rows[:, place].reshape(count, *row_shape)
            feed[name] = np.moveaxis(part, 0, batch_axis).copy() if batch_axis else part
        results = self._session.run(self._names, feed)
        wanted = len(self._wanted)
        for (_, place, _, batch_axis), state in zip(self._columns, results[wanted:], strict=True):
            back = np.moveaxis(state, batch_axis, 0) if batch_axis else state
            rows[:, place] = back.reshape(count, -1)
        return dict(zip(self._wanted, results, strict=False))

    def _shape_of(self, tensor: NDArray[np.float32]) -> tuple[int, ...]:
        """Return the graph's shape of a row, longer by as many times as there are hops."""
        first, *rest = self.stage.input_shape
        hops = tensor[0].size // self._row_size
        return (hops * first, *rest)
