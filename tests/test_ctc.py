"""Greedy decoding, against grouping frame by frame."""

import math
from itertools import groupby
from statistics import fmean

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import log_softmax

from engine.messages import Speech
from engine.speech.ctc import GreedyDecoder, Hypothesis, Spoken

LETTERS = ("", " ", "a", "b", "'")
WORDS = ("", "yes", "no", "stop")
FRAMES = 24


def log_probs(rng: np.random.Generator, rows: int, labels: tuple[str, ...]) -> NDArray[np.float32]:
    scores = rng.normal(size=(rows, FRAMES, len(labels))) * 3
    scores[:, 1:] += scores[:, :-1]  # so that labels last
    return log_softmax(scores, axis=2).astype(np.float32)


def plain(values: NDArray[np.float32], labels: tuple[str, ...]) -> tuple[Spoken, ...]:
    """Return one row's words."""
    runs = groupby(enumerate(values.argmax(axis=1)), key=lambda at: at[1])
    said = []  # label, frames, peak
    for label, frames in runs:
        at = [frame for frame, _ in frames]
        if label:
            said.append((labels[label], at[0], at[-1] + 1, float(values[at, label].max())))
    if " " in labels:
        parts = [list(part) for space, part in groupby(said, lambda s: s[0] == " ") if not space]
    else:
        parts = [[one] for one in said]
    return tuple(
        Spoken(
            "".join(letter for letter, *_ in part),
            part[0][1],
            part[-1][2],
            pytest.approx(math.exp(fmean(peak for *_, peak in part))),
        )
        for part in parts
    )


def parts(values: NDArray[np.float32], cuts: list[int]) -> list[NDArray[np.float32]]:
    return np.split(values, sorted(cuts), axis=1)


@given(
    seed=st.integers(0, 10**6),
    labels=st.sampled_from([LETTERS, WORDS]),
    cuts=st.lists(st.integers(0, FRAMES), max_size=6),
)
def test_any_split_and_any_batch_give_the_words_of_each_row_alone(
    seed: int, labels: tuple[str, ...], cuts: list[int]
) -> None:
    values = log_probs(np.random.default_rng(seed), 3, labels)
    decoder, whole = GreedyDecoder(labels, 5), GreedyDecoder(labels, 1)
    slots = np.array([4, 0, 2])
    for part in parts(values, cuts):
        decoder.push(slots, part)
    for row, slot in enumerate(slots):
        assert decoder.best(slot).words == plain(values[row], labels)
        whole.reset(0)
        whole.push(np.array([0]), values[row : row + 1])
        assert decoder.best(slot) == whole.best(0)
        assert decoder.frames(slot) == FRAMES
    assert decoder.best(1) == Hypothesis((), 0.0)


def test_the_score_is_the_probability_of_the_best_alignment(rng: np.random.Generator) -> None:
    values = log_probs(rng, 1, LETTERS)
    decoder = GreedyDecoder(LETTERS, 1)
    decoder.push(np.array([0]), values)
    assert decoder.best(0).score == pytest.approx(values.max(axis=2).sum(), rel=1e-5)
    assert decoder.alternatives(0, 3) == [decoder.best(0)]


def said(text: str, labels: tuple[str, ...]) -> NDArray[np.float32]:
    """Return one row in which each character is a frame's label; "-" is the blank."""
    values = np.full((1, len(text), len(labels)), -5.0, np.float32)
    for frame, letter in enumerate(text):
        values[0, frame, 0 if letter == "-" else labels.index(letter)] = -0.1
    return values


def test_a_word_is_complete_when_the_separator_follows() -> None:
    decoder = GreedyDecoder(LETTERS, 1)
    slot = np.array([0])
    for text, complete in [("  a-a", 0), ("b", 0), (" ", 1), (" a", 1), ("  ", 2)]:
        decoder.push(slot, said(text, LETTERS))
        assert decoder.stable_words(0) == complete
    assert decoder.best(0).text == "aab a"


def test_a_whole_word_is_complete_at_once() -> None:
    decoder = GreedyDecoder(("", "x", "y"), 1)
    decoder.push(np.array([0]), said("-xx-x", ("", "x", "y")))
    assert decoder.stable_words(0) == 2
    assert [word[:3] for word in decoder.best(0).words] == [("x", 1, 3), ("x", 4, 5)]


@pytest.mark.parametrize("labels", [LETTERS, WORDS])
def test_a_row_that_was_reset_or_opened_is_like_a_new_one(
    labels: tuple[str, ...], rng: np.random.Generator
) -> None:
    values = log_probs(rng, 2, labels)
    values[1, 0] = values[0, -1]  # so that a run would go on
    slot = np.array([0])
    fresh = GreedyDecoder(labels, 1)
    fresh.push(slot, values[1:])
    for again in (lambda used: used.reset(0), lambda used: used.open(0, Speech())):
        used = GreedyDecoder(labels, 1)
        used.push(slot, values[:1])
        again(used)
        assert used.frames(0) == 0
        used.push(slot, values[1:])
        assert used.best(0) == fresh.best(0)


@pytest.mark.parametrize("labels", [LETTERS, WORDS])
def test_what_was_taken_goes_on_in_another_row_after_a_way_through_bytes(
    labels: tuple[str, ...], rng: np.random.Generator
) -> None:
    values = log_probs(rng, 1, labels)
    for cut in range(FRAMES):
        one, other = GreedyDecoder(labels, 1), GreedyDecoder(labels, 3)
        one.push(np.array([0]), values[:, :cut])
        carried = msgspec.msgpack.encode(one.take(0))
        other.put(2, msgspec.msgpack.decode(carried))
        for decoder, slot in ((one, 0), (other, 2)):
            decoder.push(np.array([slot]), values[:, cut:])
        assert other.best(2) == one.best(0)
        assert other.frames(2) == FRAMES


def test_no_rows_and_no_frames_change_nothing() -> None:
    decoder = GreedyDecoder(WORDS, 2)
    decoder.push(np.empty(0, np.intp), np.empty((0, 4, 4), np.float32))
    decoder.push(np.array([1]), np.empty((1, 0, 4), np.float32))
    assert decoder.best(1) == Hypothesis((), 0.0)
