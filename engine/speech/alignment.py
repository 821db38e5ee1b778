"""When each label of a known text was said: forced alignment to a CTC model's scores."""

import numpy as np
from numpy.typing import NDArray

from engine.speech.ctc import BLANK


def align(log_probs: NDArray[np.float32], labels: list[int]) -> list[tuple[int, int]]:
    """Return the frames of each label on the most probable path that says them all.

    Parameters
    ----------
    log_probs : (frames, labels) float32
        Natural logarithms.
    labels : list of int
        Without blanks. More of them than fit into the frames give an empty answer.

    Returns
    -------
    list of (first, last)
        Frames in which a label is said, the last one exclusive.

    Notes
    -----
    The Viterbi algorithm over labels with blanks between (Graves et al. 2006, section 4).
    """
    frames, count = len(log_probs), len(labels)
    if not frames or not count:
        return []
    states = np.full(2 * count + 1, BLANK)
    states[1::2] = labels
    emitted = log_probs[:, states].astype(np.float64)
    barred = np.full(len(states), -np.inf)  # from being entered from two states back
    barred[3::2] = np.where(states[3::2] != states[1:-2:2], 0.0, -np.inf)
    scores = np.full(len(states) + 2, -np.inf)  # two of them before the first
    scores[2:4] = emitted[0, :2]
    back = np.zeros((frames, len(states)), np.int8)
    for frame in range(1, frames):
        stay, step, skip = scores[2:], scores[1:-1], scores[:-2] + barred
        best = np.maximum(stay, step)
        back[frame] = step > stay
        back[frame, skip > best] = 2
        scores[2:] = np.maximum(best, skip) + emitted[frame]
    last_label, last_blank = scores[-2:]
    if max(last_label, last_blank) == -np.inf:
        return []
    state = len(states) - 1 - int(last_label > last_blank)
    path = np.empty(frames, np.intp)
    for frame in range(frames - 1, -1, -1):
        path[frame] = state
        state -= int(back[frame, state])
    said = 2 * np.arange(count) + 1
    first, last = np.searchsorted(path, said), np.searchsorted(path, said, "right")
    return list(zip(first.tolist(), last.tolist(), strict=True))
