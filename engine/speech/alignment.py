"""When each word of a known text was said: forced alignment to a CTC model's scores."""

import numpy as np
from numpy.typing import NDArray

BLANK = 0


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
    states = np.zeros(2 * count + 1, np.intp)
    states[1::2] = labels
    doubled = np.zeros(len(states), bool)  # may be entered from two states back
    doubled[3::2] = states[3::2] != states[1:-2:2]
    scores = np.full(len(states) + 2, -np.inf)  # two of them before the first
    scores[2:4] = log_probs[0, states[:2]] if frames else -np.inf
    back = np.zeros((frames, len(states)), np.int8)
    for frame in range(1, frames):
        ways = np.stack([scores[2:], scores[1:-1], np.where(doubled, scores[:-2], -np.inf)])
        back[frame] = ways.argmax(axis=0)
        scores[2:] = ways.max(axis=0) + log_probs[frame, states]
    final = scores[-2:] if count else scores[2:]
    if not count or not np.isfinite(final).any():
        return []
    state = len(states) - 1 - int(scores[-2] > scores[-1])
    spans = [[frames, 0] for _ in labels]
    for frame in range(frames - 1, -1, -1):
        if state % 2:
            spans[state // 2][0] = frame
            spans[state // 2][1] = max(spans[state // 2][1], frame + 1)
        state -= int(back[frame, state])
    return [(first, last) for first, last in spans]
