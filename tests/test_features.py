"""Recipes against the definition of the discrete Fourier transform."""

import numpy as np
from numpy.typing import NDArray

from engine import features

WINDOW = 16


def dft(x: NDArray[np.float32]) -> NDArray[np.complex128]:
    """Transform (rows, window, channels) along the window by its defining sum."""
    n = np.arange(WINDOW)
    basis = np.exp(-2j * np.pi * np.outer(np.arange(WINDOW // 2 + 1), n) / WINDOW)
    return np.einsum("kn,rnc->rkc", basis, x)


def windows(rng: np.random.Generator) -> NDArray[np.float32]:
    return rng.standard_normal((4, WINDOW, 2)).astype(np.float32)


def test_raw_is_the_window_itself(rng: np.random.Generator) -> None:
    x = windows(rng)
    np.testing.assert_array_equal(features.extract("raw", x), x)


def test_magnitude_is_that_of_the_transform(rng: np.random.Generator) -> None:
    x = windows(rng)
    found = features.extract("magnitude", x)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.abs(dft(x)), atol=1e-5)


def test_a_mask_scales_each_frequency_and_keeps_its_phase(rng: np.random.Generator) -> None:
    x = windows(rng)
    mask = rng.uniform(0, 2, (4, WINDOW // 2 + 1, 2)).astype(np.float32)
    found = features.apply_mask(x, mask)
    assert found.dtype == np.float32
    np.testing.assert_allclose(dft(found), dft(x) * mask, atol=1e-5)


def test_a_row_does_not_depend_on_its_neighbours(rng: np.random.Generator) -> None:
    x = windows(rng)
    mask = rng.uniform(0, 2, (4, WINDOW // 2 + 1, 2)).astype(np.float32)
    for row in range(4):
        one = slice(row, row + 1)
        np.testing.assert_array_equal(
            features.extract("magnitude", x[one]), features.extract("magnitude", x)[one]
        )
        np.testing.assert_array_equal(
            features.apply_mask(x[one], mask[one]), features.apply_mask(x, mask)[one]
        )
