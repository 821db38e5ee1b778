"""What the engine must equal, computed the plain way: one stream, the whole record, no batching."""

import math
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from scipy.signal import resample_poly

Results = dict[str, NDArray[np.float32]]


def loop(path: Path, windows: NDArray[np.float32], copies: int = 1) -> list[Results]:
    """Run a tiny model on one stream, (hops, window, 1), as anybody would without an engine.

    ``copies`` is the number of equal rows in a call: ONNX Runtime's vanilla RNN rounds a lone
    row in another way than two.
    """
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    states = {
        node.name: np.zeros((copies, *node.shape[1:]), np.float32)
        for node in session.get_inputs()
        if node.name != "x"
    }
    names = [node.name for node in session.get_outputs()]
    results = []
    for window in windows:
        feed = {"x": np.repeat(window[None], copies, axis=0), **states}
        out = dict(zip(names, session.run(names, feed), strict=True))
        states = {name: out[f"{name}_next"] for name in states}
        results.append({name: value[0] for name, value in out.items()})
    return results


def cut(signal: NDArray[np.float32], hop: int, window: int) -> NDArray[np.float32]:
    """Return every whole window of a record, (hops, window, 1), with silence before its start."""
    padded = np.concatenate([np.zeros(window - hop, np.float32), signal])
    starts = range(0, len(padded) - window + 1, hop)
    return np.array([padded[t : t + window] for t in starts], np.float32).reshape(-1, window, 1)


def tail_padded(signal: NDArray[np.float32], hop: int, delay: int = 0) -> NDArray[np.float32]:
    """Append the last value up to a whole hop, and until the delay has passed."""
    wanted = -(-(len(signal) + delay) // hop) * hop
    return np.pad(signal, (0, wanted - len(signal)), mode="edge")


def resampled(signal: NDArray[np.float32], up: int, down: int) -> NDArray[np.float32]:
    """Resample a whole record, (samples, ...), whose first and last value go on for ever."""
    edge = 100 * down // math.gcd(up, down)  # whole periods, and more than the kernel's half
    widths = [(edge, edge)] + [(0, 0)] * (signal.ndim - 1)
    padded = np.pad(signal.astype(np.float64), widths, mode="edge")
    whole = resample_poly(padded, up, down, window=("kaiser", 5.0))
    cut: NDArray[np.float32] = whole[edge * up // down : -edge * up // down].astype(np.float32)
    return cut


def overlap_add(windows: list[NDArray[np.float32]], hop: int) -> NDArray[np.float32]:
    """Add windows where they overlap, oldest first; the first starts at sample 0."""
    total = np.zeros(hop * (len(windows) - 1) + len(windows[0]), np.float32)
    for place, window in enumerate(windows):
        total[place * hop : place * hop + len(window)] += window
    return total


def peaks(
    p: NDArray[np.float32], place: NDArray[np.int64], refractory: int
) -> list[tuple[int, int]]:
    """Search a whole record for beats: (frame of the maximum, frame that decided it).

    From each opening on, the maximum moves to the next higher frame until the probability has
    fallen under 0.25 or the refractory time has passed.
    """
    found: list[tuple[int, int]] = []
    frames = np.arange(len(p))
    begin = 0
    while True:
        free = place[found[-1][0]] + refractory if found else place[0]
        openings = np.flatnonzero((p >= 0.5) & (place >= free) & (frames >= begin))
        if not len(openings):
            return found
        peak = openings[0]
        while True:
            after = frames[peak + 1 :]
            closings = after[(p[after] < 0.25) | (place[after] - place[peak] >= refractory)]
            until = closings[0] if len(closings) else len(p)
            higher = [i for i in range(peak + 1, until) if p[i] > p[peak]]
            if not higher:
                break
            peak = higher[0]
        if not len(closings):
            return found
        begin = until
        found.append((int(peak), int(until)))
