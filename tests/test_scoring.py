"""Figures of text agree with what a slow, plain reckoning says."""

import math
from collections import Counter
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.scoring import (
    Changes,
    Errors,
    average_lagging,
    changes,
    errors,
    first_shown,
    interval,
    matches,
    quantiles,
)

TEXT = st.lists(st.sampled_from("abc"), max_size=7)


def fewest_edits(one: tuple[str, ...], other: tuple[str, ...]) -> int:
    @cache
    def edits(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        same = one[i - 1] == other[j - 1]
        return min(edits(i - 1, j) + 1, edits(i, j - 1) + 1, edits(i - 1, j - 1) + (not same))

    return edits(len(one), len(other))


@given(TEXT, TEXT)
def test_errors_are_the_fewest_edits_and_add_up_to_the_lengths(
    reference: list[str], hypothesis: list[str]
) -> None:
    found = errors(reference, hypothesis)
    assert found.edits == fewest_edits(tuple(reference), tuple(hypothesis))
    assert found.reference == len(reference)
    assert len(hypothesis) - len(reference) == found.insertions - found.deletions


@given(TEXT, TEXT)
def test_matches_are_equal_words_in_order_and_as_many_as_are_right(
    reference: list[str], hypothesis: list[str]
) -> None:
    found = matches(reference, hypothesis)
    assert all(reference[i] == hypothesis[j] for i, j in found)
    assert found == sorted(found)
    assert len({i for i, _ in found}) == len({j for _, j in found}) == len(found)
    wrong = errors(reference, hypothesis)
    assert len(found) == len(reference) - wrong.substitutions - wrong.deletions


def test_each_kind_of_error_is_counted_as_its_kind() -> None:
    found = errors(list("tcsotm"), list("atcsim"))
    assert found == Errors(substitutions=1, deletions=1, insertions=1, reference=6)
    assert found.rate == 0.5
    assert errors("abc", "abd") == Errors(1, 0, 0, 3)
    assert found.plus(Errors(1, 2, 3, 4)) == Errors(2, 3, 4, 10)
    assert math.isnan(errors([], ["a"]).rate)


def test_the_interval_narrows_as_the_root_of_the_recordings() -> None:
    """Half of the recordings have 2 errors of 10, half none: a rate of 0.1 +- 1.96 * 0.1 / root."""
    for count in (100, 1600):
        low, high = interval([Errors(2 * (k % 2), 0, 0, 10) for k in range(count)])
        half = 1.96 * 0.1 / math.sqrt(count)
        assert (low, high) == pytest.approx((0.1 - half, 0.1 + half), abs=0.2 * half)


@pytest.mark.parametrize(
    ("partials", "final", "expected"),
    [
        (["a", "a b", "a b c"], "a b c d", (3, 0)),
        (["a", "a", "a"], "a", (1, 0)),  # repeated, not shown anew
        (["a", "b"], "c", (2, 2)),
        (["a b c"], "a", (3, 2)),  # taken back
        (["a b"], "x a b", (2, 0)),  # moved by one place
        (["a", "b", "a"], "a", (3, 2)),
        ([], "a b", (0, 0)),
        (["a"], "", (1, 1)),
    ],
)
def test_a_word_that_was_shown_is_changed_at_most_once(
    partials: list[str], final: str, expected: tuple[int, int]
) -> None:
    assert changes([text.split() for text in partials], final.split()) == Changes(*expected)


def test_by_place_a_word_that_moves_has_changed() -> None:
    partials = [["a", "b"], ["x", "a", "b"]]
    assert changes(partials, ["x", "a", "b"]) == Changes(3, 0)
    assert changes(partials, ["x", "a", "b"], by_place=True) == Changes(5, 2)


@given(st.lists(TEXT, max_size=5), TEXT)
def test_what_was_shown_and_not_changed_is_in_the_final(
    partials: list[list[str]], final: list[str]
) -> None:
    found = changes(partials, final)
    last = partials[-1] if partials else []
    assert 0 <= found.changed <= found.shown
    common = sum((Counter(last) & Counter(final)).values())
    assert found.shown - found.changed <= common
    if final[: len(last)] == last:
        assert found.shown - found.changed == len(last)


@pytest.mark.parametrize(
    ("partials", "final", "expected"),
    [
        (["a", "a b", "a b c"], "a b c", [0, 1, 2]),
        (["a", "a c", "a b c"], "a b c", [0, 2, 1]),  # c was there before b
        (["the"], "the cat the mat", [0, None, None, None]),
        (["b"], "a b", [None, 0]),
        (["x", "x y"], "a b", [None, None]),
        (["a", "b", "a"], "a", [0]),
        ([], "a", [None]),
        (["", "a"], "", []),
    ],
)
def test_a_word_first_appears_at_its_place(
    partials: list[str], final: str, expected: list[int | None]
) -> None:
    timed = [(float(at), text.split()) for at, text in enumerate(partials)]
    assert first_shown(timed, final.split()) == expected


def test_average_lagging_of_a_writer_who_is_always_as_far_behind() -> None:
    """Four words in 8 s: the ideal shows them at 0, 2, 4 and 6 s."""
    assert average_lagging([1.5, 3.5, 5.5, 7.5], 8.0, 4) == pytest.approx(1.5)
    # Behind the end, only the first word counts.
    assert average_lagging([1.0, 8.5, 8.5, 8.5], 8.0, 4) == pytest.approx((1.0 + 6.5) / 2)
    assert average_lagging([9.0, 9.0], 8.0, 4) == 9.0
    assert math.isnan(average_lagging([], 8.0, 4))


def test_quantiles_of_times() -> None:
    found = quantiles([k / 100 for k in range(101)])
    assert found is not None
    assert found == pytest.approx((0.5, 0.9, 0.99, 101))
    assert quantiles([]) is None
