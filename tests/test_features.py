"""Recipes against the definition of the discrete Fourier transform."""

import numpy as np
import pytest
from numpy.typing import NDArray

from engine import features
from engine.features import LogMel

WINDOW = 16
RATE_HZ = 16000.0


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


# Log-mel


def sound(rng: np.random.Generator, rows: int, samples: int) -> NDArray[np.float32]:
    """Return noise that grows from near silence to loud, (rows, samples, 1)."""
    loudness = np.geomspace(1e-5, 0.3, samples)[:, None]
    noise = rng.standard_normal((rows, samples, 1)) * loudness
    return noise.astype(np.float32)


def hz_of(mel: float) -> float:
    """Slaney's scale: 15 equal steps to 1 kHz, then 27 equal ratios to 6.4 kHz."""
    return mel * 1000 / 15 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)


def log_mel_of(frame: NDArray[np.float32], bins: int) -> list[float]:
    """Compute one frame's features from their definition, in float64 and without an FFT."""
    size = len(frame)
    sharp = [frame[0] * 0.03, *(frame[n] - 0.97 * frame[n - 1] for n in range(1, size))]
    n = np.arange(size)
    tapered = np.array(sharp) * (0.5 - 0.5 * np.cos(2 * np.pi * n / size))
    power = [
        abs(np.sum(tapered * np.exp(-2j * np.pi * k * n / 512))) ** 2 for k in range(512 // 2 + 1)
    ]
    # 8 kHz is 15 + 27 log(8) / log(6.4) on the scale.
    edges = [hz_of(m) for m in np.linspace(0, 15 + 27 * np.log(8) / np.log(6.4), bins + 2)]
    found = []
    for low, centre, high in zip(edges, edges[1:], edges[2:], strict=False):
        total = 0.0
        for k, value in enumerate(power):
            hz = k * RATE_HZ / 512
            if low < hz < high:
                share = (
                    (hz - low) / (centre - low) if hz < centre else (high - hz) / (high - centre)
                )
                total += value * share * 2 / (high - low)
        found.append(np.log(max(total, np.finfo(np.float32).eps)))
    return found


def test_log_mel_is_what_its_definition_says(rng: np.random.Generator) -> None:
    x = sound(rng, 1, 1200)
    found = features.extract(LogMel(320, bins=40), x, RATE_HZ)
    assert found.shape == (1, 3, 40)
    assert found.dtype == np.float32
    for frame in range(3):
        samples = x[0, 320 * frame : 320 * frame + 400, 0]
        np.testing.assert_allclose(found[0, frame], log_mel_of(samples, 40), atol=2e-4)


@pytest.mark.parametrize(("shift", "every", "gain"), [(160, 1, 1.0), (320, 2, 1.0), (320, 2, 32.0)])
def test_log_mel_is_that_of_kaldi_native_fbank(
    rng: np.random.Generator, shift: int, every: int, gain: float
) -> None:
    knf = pytest.importorskip("kaldi_native_fbank", reason="needs the extra 'peers'")
    options = knf.FbankOptions()
    options.frame_opts.samp_freq = RATE_HZ
    options.frame_opts.dither = 0.0
    options.frame_opts.window_type = "hann"
    options.frame_opts.preemph_coeff = 0.97
    options.frame_opts.remove_dc_offset = False
    options.frame_opts.snip_edges = False
    options.mel_opts.num_bins = 80
    options.mel_opts.low_freq = options.mel_opts.high_freq = 0
    options.mel_opts.is_librosa = True
    theirs = knf.OnlineFbank(options)
    x = sound(rng, 1, 8000)
    theirs.accept_waveform(RATE_HZ, gain * x[0, :, 0])
    wanted = np.stack([theirs.get_frame(t) for t in range(theirs.num_frames_ready)])
    # Their frame t begins at 160 t - 120; what lies before the beginning they mirror, so skip 0.
    lead = np.zeros((1, 120, 1), np.float32)
    found = features.extract(LogMel(shift, gain=gain), np.concatenate([lead, x], axis=1), RATE_HZ)[
        0
    ]
    wanted = wanted[::every][1 : len(found)]
    assert len(wanted) >= 8000 // shift - 3
    np.testing.assert_allclose(found[1 : len(wanted) + 1], wanted, atol=1e-4)


def test_log_mel_of_a_row_does_not_depend_on_its_neighbours(rng: np.random.Generator) -> None:
    x = sound(rng, 37, 3320)
    x[::3] *= 30.0
    recipe = LogMel(320)
    together = features.extract(recipe, x, RATE_HZ)
    for size in (1, 2, 5, 16):
        for start in range(0, 37 - size, size):
            group = slice(start, start + size)
            alone = features.extract(recipe, x[group].copy(), RATE_HZ)
            np.testing.assert_array_equal(alone, together[group])


def test_digital_silence_has_the_least_energy_that_is_told() -> None:
    found = features.extract(LogMel(), np.zeros((1, 560, 1), np.float32), RATE_HZ)
    np.testing.assert_array_equal(found, np.log(np.finfo(np.float32).eps))
