"""What is refused as a subject in the clear, and what is not."""

import numpy as np
import pytest

from engine.pseudonyms import fault

ANY = "[A-Za-z0-9_.:-]+"
PATTERN = "[a-z0-9]{8,64}"


@pytest.mark.parametrize(
    ("subject", "what"),
    [
        ("john.smith", "a name"),
        ("Ursula_von-Amsel", "a name"),
        ("johnsmith1950", "a name with a number"),
        ("smith-7", "a name with a number"),
        ("0012345678", "a hospital number"),
        ("MRN-0012345678", "a hospital number"),
        ("x19500214y7", "a date"),
        ("p7-1950-02-14", "a date"),
        ("q14.02.1950", "a date"),
        ("b02-28-2001z", "a date"),
    ],
)
def test_a_subject_in_the_clear_is_refused_without_repeating_it(subject: str, what: str) -> None:
    found = fault(subject, ANY)
    assert found is not None
    assert what in found
    assert subject not in found


@pytest.mark.parametrize("subject", ["k3v9", "K3V9X7Q2M4", "k3v9x7q2-m4"])
def test_a_pseudonym_matches_the_pattern_as_a_whole(subject: str) -> None:
    assert fault(subject, PATTERN) == f"one that matches {PATTERN}"


def test_random_pseudonyms_are_hardly_ever_refused(rng: np.random.Generator) -> None:
    drawn = [rng.bytes(8).hex() for _ in range(20_000)]
    assert sum(fault(subject, PATTERN) is not None for subject in drawn) < 60
