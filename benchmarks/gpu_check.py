"""What only a GPU can show: parity with the CPU, state on the device, CUDA graphs, throughput.

::

    python benchmarks/gpu_check.py --out benchmarks/results/gpu.json [--device cuda] [MODEL ...]

Prints a line for each finding and writes all of them as one JSON object; exits with 1 if a
parity check fails. ``--device cpu`` rehearses everything but the CUDA graphs on any machine.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from engine import model_file
from engine.device import BUCKETS, DeviceRuntime
from engine.model_file import Model
from engine.runtime import CpuRuntime, Runtime, random_rows

# float32 on CUDA sums in another order than on the CPU; states feed that back for 200 steps.
TOLERANCE = 1e-4
STEPS = 200
SLOTS = 4096


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["heart"])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.device == "cuda":
        import torch  # noqa: F401 - brings the cuDNN that onnxruntime-gpu loads
    report: dict[str, Any] = {"machine": machine(), "device": arguments.device, "models": {}}
    for name in arguments.models:
        report["models"][name] = check(model_file.load(name), arguments.device)
    text = json.dumps(report)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    print(text)  # noqa: T201
    passed = [
        finding["passed"]
        for model in report["models"].values()
        for finding in model.values()
        if "passed" in finding
    ]
    return 0 if all(passed) else 1


def machine() -> dict[str, str]:
    """Say where and with what the figures were measured."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        gpu = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        gpu = "none"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": gpu,
        "python": platform.python_version(),
        "onnxruntime": ort.__version__,
    }


def check(model: Model, device: str) -> dict[str, dict[str, Any]]:
    """Run every check of one model; a failing one does not stop the rest."""
    graphs = device == "cuda"
    findings: dict[str, dict[str, Any]] = {}
    checks = {
        "parity": lambda: parity(model, device, graphs=False),
        "others_unchanged": lambda: others_unchanged(model, device, graphs=False),
        "throughput": lambda: throughput(model, device, graphs=False),
    }
    if graphs:
        checks["graph_parity"] = lambda: parity(model, device, graphs=True)
        checks["graph_others_unchanged"] = lambda: others_unchanged(model, device, graphs=True)
        checks["graph_throughput"] = lambda: throughput(model, device, graphs=True)
    for name, run in checks.items():
        try:
            findings[name] = run()
        except Exception as error:  # noqa: BLE001 - one broken check must not hide the others
            findings[name] = {"passed": False, "error": f"{type(error).__name__}: {error}"}
        print(f"{model.spec.name} {name}: {findings[name]}", file=sys.stderr)  # noqa: T201
    return findings


def parity(model: Model, device: str, graphs: bool) -> dict[str, Any]:
    """Step random batches on both; compare outputs at each step, and the rows at the end."""
    rng = np.random.default_rng(0)
    count = 64
    runtimes: list[Runtime] = [
        CpuRuntime(model, count),
        DeviceRuntime(model, count, device, graphs, buckets=(1, 4, 16, 32)),
    ]
    for runtime in runtimes:
        for slot in range(count):
            runtime.reset(slot)
    worst = 0.0
    for number in range(STEPS):
        size = int(rng.integers(1, 33))
        slots = rng.permutation(count)[:size]
        _, windows = random_rows(model, size, rng)
        expected, found = (runtime.step(slots, windows) for runtime in runtimes)
        worst = max(worst, *(largest(expected[name], found[name]) for name in expected))
        if number == STEPS // 2:
            for runtime in runtimes:
                runtime.reset(7)
    rows = max(largest(runtimes[0].take(s), runtimes[1].take(s)) for s in range(count))
    return {
        "passed": max(worst, rows) <= TOLERANCE,
        "outputs": worst,
        "state": rows,
        "tolerance": TOLERANCE,
    }


def others_unchanged(model: Model, device: str, graphs: bool) -> dict[str, Any]:
    """Step some rows; the others must keep their bits."""
    rng = np.random.default_rng(1)
    runtime = DeviceRuntime(model, 40, device, graphs, buckets=(4, 16))
    state, _ = random_rows(model, 40, rng)
    for slot in range(40):
        runtime.put(slot, state[slot])
    for _ in range(10):
        _, windows = random_rows(model, 13, rng)
        runtime.step(rng.permutation(20)[:13], windows)
    same = all(np.array_equal(runtime.take(slot), state[slot]) for slot in range(20, 40))
    moved = not any(np.array_equal(runtime.take(slot), state[slot]) for slot in range(13))
    return {"passed": same and moved}


def throughput(model: Model, device: str, graphs: bool) -> dict[str, Any]:
    """Return step time and streams at real time for each bucket, the copies included."""
    buckets = BUCKETS if device == "cuda" else BUCKETS[:5]
    runtime = DeviceRuntime(model, SLOTS, device, graphs, buckets)
    rng = np.random.default_rng(2)
    hop_s = model.spec.hop_samples / model.spec.input.rate_hz
    figures = {}
    for size in buckets:
        _, windows = random_rows(model, size, rng)
        slots = rng.permutation(SLOTS)[:size]
        seconds = timed(runtime, slots, windows)
        figures[str(size)] = {
            "step_ms_p50": float(np.median(seconds) * 1e3),
            "step_ms_p99": float(np.percentile(seconds, 99) * 1e3),
            "streams_at_real_time": float(size / np.median(seconds) * hop_s),
        }
    return {"buckets": figures}


def timed(
    runtime: Runtime, slots: NDArray[np.intp], windows: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Return the wall seconds of each of many steps."""
    seconds = []
    for _ in range(STEPS):
        begin = time.perf_counter()
        runtime.step(slots, windows)
        seconds.append(time.perf_counter() - begin)
    return np.array(seconds)


def largest(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    return float(np.abs(one - other).max())


if __name__ == "__main__":
    sys.exit(main())
