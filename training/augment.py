"""What happens to an electrocardiogram outside the laboratory: other gains, noise, mains, wander.

One call changes a whole recording, so that what is carried through it sees one electrode and
one disturbance, not a new one every few seconds. Amplitudes are in millivolts; a QRS complex
has about 1 mV.
"""

import numpy as np
from numpy.typing import NDArray

from training.data import Recording

Signal = NDArray[np.float32]

_MAX_OFFSET_MV = 2.0  # an electrode's half-cell potential, left over after the amplifier
_MAX_WANDER_MV = 0.5
_MAX_MAINS_MV = 0.1
_MAX_NOISE_MV = 0.08
_BURST_S = 5.0
_AS_IT_IS = 0.5  # how often two leads are seen as they are
_ONE_LEAD = 0.5  # how often only one is there


def disturb(signal: Signal, rate_hz: float, rng: np.random.Generator) -> Signal:
    """Return (samples, 2), each lead that is on with a gain and disturbances of its own."""
    leads = [_disturb(lead, rate_hz, rng) if lead.any() else lead for lead in signal.T]
    return np.stack(leads, axis=1)


def _disturb(signal: Signal, rate_hz: float, rng: np.random.Generator) -> Signal:
    """Return (samples,) with a random gain and random disturbances, at random strengths."""
    gain = 2.0 ** rng.uniform(-2.3, 1)  # hand-held electrodes give a third of a millivolt
    if rng.random() < 0.2:  # electrodes exchanged
        gain = -gain
    out = gain * signal + rng.uniform(-_MAX_OFFSET_MV, _MAX_OFFSET_MV)
    if rng.random() < 0.5:
        out += _wander(len(signal), rate_hz, rng)
    if rng.random() < 0.3:
        out += _mains(len(signal), rate_hz, rng)
    if rng.random() < 0.5:
        out += _noise(len(signal), rate_hz, rng)
    disturbed: Signal = out.astype(np.float32)
    return disturbed


def place(signal: Signal, rng: np.random.Generator) -> Signal:
    """Return (samples, 2) of (samples, leads): electrodes placed elsewhere, exchanged, or one off.

    A weighted sum of two leads is the heart seen from a direction between them. It gives few
    patients more shapes of beat. A lead that is off is 0, as the engine fills it in.
    """
    pair = np.zeros((len(signal), 2), np.float32)
    pair[:, : signal.shape[1]] = signal[:, :2]
    if signal.shape[1] > 1 and rng.random() >= _AS_IT_IS:
        angle = rng.uniform(-np.pi, np.pi)
        cosine, sine = np.cos(angle), np.sin(angle)
        pair = pair @ np.array([[cosine, -sine], [sine, cosine]], np.float32)
    if rng.random() < _ONE_LEAD:
        pair[:, 1] = 0.0
    return pair


def stretch(recording: Recording, factor: float) -> Recording:
    """Return a recording that lasts `factor` times as long: a slower or a faster heart."""
    old = np.arange(len(recording.signal))
    new = np.arange(int(len(old) * factor)) / factor
    signal = np.stack([np.interp(new, old, lead) for lead in recording.signal.T], axis=1)
    return recording._replace(
        signal=signal.astype(np.float32),
        beats=np.round(recording.beats * factor).astype(np.int64),
        unscored=np.round(recording.unscored * factor).astype(np.int64),
    )


def _wander(samples: int, rate_hz: float, rng: np.random.Generator) -> Signal:
    """Breathing and slow movement: a few sines from 0.05 to 0.5 Hz."""
    seconds = np.arange(samples, dtype=np.float32) / np.float32(rate_hz)
    out = np.zeros(samples, np.float32)
    for _ in range(3):
        hz, phase = rng.uniform(0.05, 0.5), rng.uniform(0, 2 * np.pi)
        amplitude = rng.uniform(0, _MAX_WANDER_MV)
        out += amplitude * np.sin(2 * np.pi * hz * seconds + phase, dtype=np.float32)
    return out


def _mains(samples: int, rate_hz: float, rng: np.random.Generator) -> Signal:
    seconds = np.arange(samples, dtype=np.float32) / np.float32(rate_hz)
    hz = rng.choice((50.0, 60.0)) + rng.uniform(-0.2, 0.2)
    wave: Signal = np.sin(2 * np.pi * hz * seconds, dtype=np.float32)
    return rng.uniform(0, _MAX_MAINS_MV) * wave


def _noise(samples: int, rate_hz: float, rng: np.random.Generator) -> Signal:
    """Muscle noise: white, louder in some stretches of a few seconds than in others."""
    bursts = rng.exponential(1.0, -(-samples // int(_BURST_S * rate_hz)))
    loudness = np.repeat(bursts, int(_BURST_S * rate_hz))[:samples].astype(np.float32)
    scale = rng.uniform(0, _MAX_NOISE_MV) / 2
    return scale * loudness * rng.standard_normal(samples, dtype=np.float32)
