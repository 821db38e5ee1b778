"""Run a model and see whether it keeps what it states: ``murmur models check``.

Each check runs the model's own graphs on random, distinct state; none looks at how the graph
was made. :mod:`exporters` asks the same of every model it writes.
"""

from collections.abc import Callable
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.model_file import Model
from engine.runtime import MICRO_BATCH, CpuRuntime, Step, initial_row, random_rows


class Finding(NamedTuple):
    """One check's outcome."""

    name: str
    passed: bool
    detail: str


_Check = Callable[[Model, np.random.Generator], tuple[bool, str]]


class _Result(NamedTuple):
    state: NDArray[np.float32]
    outputs: dict[str, NDArray[np.float32]]

    def differs(self, other: "_Result") -> bool:
        return not np.array_equal(self.state, other.state) or any(
            not np.array_equal(value, other.outputs[name]) for name, value in self.outputs.items()
        )


def check(model: Model, seed: int = 0) -> list[Finding]:
    """Return every check of a model on the CPU.

    Parameters
    ----------
    model : Model
        Opened with the provider ``cpu``.
    seed : int
        Of the random state and signal.
    """
    rng = np.random.default_rng(seed)
    return [_outcome(name, one, model, rng) for name, one in _CHECKS.items()]


def _outcome(name: str, one: _Check, model: Model, rng: np.random.Generator) -> Finding:
    try:
        return Finding(name, *one(model, rng))
    except Exception as error:  # noqa: BLE001 - onnxruntime raises a class for each status
        return Finding(name, False, f"the graph cannot be run: {str(error).splitlines()[0]}")


def _run(model: Model, rows: NDArray[np.float32], windows: NDArray[np.float32]) -> _Result:
    state = rows.copy()
    return _Result(state, Step(model).run(state, windows))


def _outputs_fit(model: Model, rng: np.random.Generator) -> tuple[bool, str]:
    """Expect finite outputs whose last axis has a value for each label."""
    result = _run(model, *random_rows(model, 1, rng))
    faults = []
    for output in model.spec.outputs:
        value = result.outputs[output.name]
        if not np.isfinite(value).all():
            faults.append(f"{output.name} is not finite")
        if output.labels and value.shape[-1] != len(output.labels):
            faults.append(f"{output.name}: {value.shape[-1]} values, {len(output.labels)} labels")
    shapes = {name: value.shape[1:] for name, value in result.outputs.items()}
    return not faults, "; ".join(faults) or f"a row gives {shapes}"


def _inputs_are_consumed(model: Model, rng: np.random.Generator) -> tuple[bool, str]:
    """Change the signal, and each state alone: some result must change."""
    rows, windows = random_rows(model, 1, rng)
    _, other_windows = random_rows(model, 1, rng)
    before = _run(model, rows, windows)
    unused = [] if before.differs(_run(model, rows, other_windows)) else ["the signal"]
    column = 0
    for state in model.spec.states:
        changed = rows.copy()
        changed[:, column : column + state.size] *= -0.5
        # The state's own next value counts: a delay line may show nothing else at once.
        if not before.differs(_run(model, changed, windows)):
            unused.append(state.input)
        column += state.size
    count = len(model.spec.states) + 1
    return not unused, f"not consumed: {unused}" if unused else f"all {count} are consumed"


def _states_are_told_apart(model: Model, rng: np.random.Generator) -> tuple[bool, str]:
    """Expect no two states to be given one value: an export that aliases them does that."""
    states = model.spec.states
    result = _run(model, *random_rows(model, 1, rng))
    ends = np.cumsum([state.size for state in states])
    values = np.split(result.state[0], ends[:-1]) if states else []
    alike = [
        f"{one.input} and {other.input}"
        for (one, value), (other, another) in combinations(zip(states, values, strict=True), 2)
        if np.array_equal(value, another)
    ]
    detail = f"one value for {alike}" if alike else f"{len(states)} states, each its own"
    return not alike, detail


def _state_round_trips(model: Model, rng: np.random.Generator) -> tuple[bool, str]:
    """Take a row out at every step and put it back elsewhere: nothing may change."""
    spec = model.spec
    _, signal = random_rows(model, 6, rng)
    slot = np.array([0])
    unbroken, broken = CpuRuntime(model, 2), CpuRuntime(model, 2)
    for runtime in (unbroken, broken):
        runtime.reset(0)
    same = True
    for hop in signal:
        expected = unbroken.step(slot, hop[None])
        broken.reset(1)
        row = broken.take(0)
        broken.put(1, row)
        broken.arena[0] = np.nan  # whatever is not taken out is lost
        found = broken.step(np.array([1]), hop[None])
        broken.put(0, broken.take(1))
        same = same and all(np.array_equal(expected[name], found[name]) for name in expected)
    detail = f"{spec.state_size} values, {4 * spec.state_size} bytes a stream"
    if not spec.state_size:
        return False, "the model carries no state"
    moved = not np.array_equal(unbroken.arena[0], initial_row(spec.states))
    return same and moved, detail if same and moved else f"{detail}: not kept"


def _batches(model: Model, rng: np.random.Generator) -> tuple[bool, str]:
    """Run two sizes of batch, unless the graph says that it takes one row."""
    if not model.batchable:
        return True, "the graph fixes the batch at 1: stepped row by row"
    for size in (2, 5):
        result = _run(model, *random_rows(model, size, rng))
        for name, value in result.outputs.items():
            if value.shape[0] != size:
                return False, f"{size} rows in, {name} has {value.shape[0]}"
    return True, "2 and 5 rows"


def _alone_is_batched(model: Model, rng: np.random.Generator) -> tuple[bool, str]:
    """Compare rows alone with the same rows beside others, bit for bit, through the runtime."""
    rows, windows = random_rows(model, 3 * MICRO_BATCH, rng)
    windows[1::2] *= 30.0
    runtime = CpuRuntime(model, len(rows))
    alone, *others = (
        _in_batches(runtime, rows, windows, min(size, runtime.max_rows))
        for size in (1, 2, 5, MICRO_BATCH)
    )
    how = "row by row" if runtime.single else f"in batches of {runtime.max_rows}"
    same = not any(alone.differs(other) for other in others)
    return same, f"stepped {how}, neighbours 30 times louder"


def _in_batches(
    runtime: CpuRuntime, rows: NDArray[np.float32], windows: NDArray[np.float32], size: int
) -> _Result:
    runtime.arena[:] = rows
    slots = np.arange(len(rows))
    parts = [
        runtime.step(slots[start : start + size], windows[start : start + size])
        for start in range(0, len(rows), size)
    ]
    outputs = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return _Result(runtime.arena.copy(), outputs)


_CHECKS: dict[str, _Check] = {
    "outputs": _outputs_fit,
    "inputs": _inputs_are_consumed,
    "states": _states_are_told_apart,
    "state": _state_round_trips,
    "batch": _batches,
    "alone = batched": _alone_is_batched,
}
