"""Forced alignment against a search through every path there is."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine.speech.alignment import align

LABELS = 4  # the blank and three others


def log_probs(frames: int, seed: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return np.log(rng.dirichlet(np.full(LABELS, 0.5), frames)).astype(np.float32)


def said(path: tuple[int, ...]) -> list[int]:
    """Return what a path says: repetitions once, without blanks."""
    return [label for label, _ in itertools.groupby(path) if label]


def score(path: tuple[int, ...], scores: NDArray[np.float32]) -> float:
    return math.fsum(float(scores[frame, label]) for frame, label in enumerate(path))


def path_of(spans: list[tuple[int, int]], labels: list[int], frames: int) -> tuple[int, ...]:
    path = [0] * frames
    for (first, last), label in zip(spans, labels, strict=True):
        path[first:last] = [label] * (last - first)
    return tuple(path)


@given(
    frames=st.integers(1, 6),
    labels=st.lists(st.integers(1, LABELS - 1), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
def test_the_labels_lie_on_the_most_probable_of_all_paths(
    frames: int, labels: list[int], seed: int
) -> None:
    scores = log_probs(frames, seed)
    paths = itertools.product(range(LABELS), repeat=frames)
    best = max((score(path, scores) for path in paths if said(path) == labels), default=None)
    spans = align(scores, labels)
    if best is None:  # they do not fit
        assert spans == []
        return
    path = path_of(spans, labels, frames)
    assert said(path) == labels
    assert all(first < last for first, last in spans)
    assert score(path, scores) == pytest.approx(best, abs=1e-5)


def test_a_label_that_is_impossible_everywhere_is_not_aligned() -> None:
    scores = log_probs(5, 0)
    scores[:, 2] = -np.inf
    assert align(scores, [1, 2]) == []
    assert align(scores, [1, 3]) != []


@pytest.mark.parametrize(("frames", "labels"), [(0, [1]), (3, []), (0, [])])
def test_nothing_is_aligned_with_nothing(frames: int, labels: list[int]) -> None:
    assert align(log_probs(frames, 0), labels) == []


def test_equal_labels_need_a_blank_between_them() -> None:
    sure = np.full((5, LABELS), -20.0, np.float32)
    sure[[0, 1, 3, 4], 1] = 0.0
    sure[2, 0] = -1.0
    assert align(sure, [1, 1]) == [(0, 2), (3, 5)]
    assert align(sure[:2], [1, 1]) == []
