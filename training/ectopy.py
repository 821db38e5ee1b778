"""Ectopic beats in records that had none: early ones, runs, and ventricular ones of others.

Ectopic beats are rare, and of few patients; a network that has seen a score of them names the beats
of one more by what those had in common by chance. So normal beats of anyone are brought
forward, P wave and all, one or up to a minute of them, and are supraventricular; or a
ventricular beat of somebody else, turned and stretched, is put in their place.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Signal = NDArray[np.float32]

RATE_HZ = 360.0
_N, _S, _V = 0, 1, 2  # places in training.data.LABELS

_BEFORE, _AFTER = 54, 150  # samples of a ventricular beat that are taken along
_FADES = 18, 40  # samples at its two ends over which it gives way to the other signal
_RUNS = ((0.6, 1, 2), (0.26, 2, 6), (0.091, 6, 18), (0.049, 18, 70))  # share, beats from, below
_NEAR = 6  # of a donor's beats, which are likely to be alike


class Strip(NamedTuple):
    """Beats of one recording, as a network is to see and name them."""

    name: str
    signal: Signal  # (samples, leads) in mV at RATE_HZ
    beats: NDArray[np.int64]
    classes: NDArray[np.int64]  # of each beat
    rhythm: NDArray[np.int64]  # at each beat


class _Look(NamedTuple):
    """How a donor's beats are changed, alike for all of a recording."""

    angle: float  # of the leads, as if the heart were turned
    gain: float
    stretch: float  # of time


# --- supraventricular --------------------------------------------------------------------------


def bring_forward(strip: Strip, share: float, rng: np.random.Generator) -> Strip:
    """Return a recording in which some normal beats come early, and so are supraventricular.

    Signal is taken out between the T wave before and the P wave, which is changed in height or
    turned over, and a pause that compensates in part or not at all may follow.

    Parameters
    ----------
    strip : Strip
    share : float
        Of the normal beats, those with which something early begins: one beat, or a run.
    rng : np.random.Generator
    """
    usual = float(np.median(np.diff(strip.beats)))
    beats, classes = strip.beats.copy(), strip.classes.copy()
    pieces: list[Signal] = []
    taken, number = 0, 2
    while number < len(beats) - 2:
        if rng.random() >= share or not _is_normal(strip, number, usual):
            number += 1
            continue
        cut_s = 0.2 + rng.uniform(-0.02, 0.02)  # before the beat: in front of the P wave
        earlier = rng.uniform(0.15, 0.55)
        removed = 0
        for place in range(number, min(number + _run(rng), len(beats) - 2)):
            interval = int(strip.beats[place] - strip.beats[place - 1])
            cut = int(strip.beats[place] - cut_s * RATE_HZ)
            removed = int(interval * earlier)
            if (
                strip.classes[place]
                or interval - removed < 0.28 * RATE_HZ
                or cut - removed <= strip.beats[place - 1] + 30
            ):
                break
            pieces.append(strip.signal[taken : cut - removed])
            taken = int(strip.beats[place]) + 100
            pieces.append(_another_p_wave(strip.signal, cut, removed, taken, rng))
            beats[place:] -= removed
            classes[place] = _S
            number = place + 1
        pause = int(rng.choice((0.0, 0.5, 1.0)) * removed)
        cut = int(strip.beats[number] - 0.25 * RATE_HZ)
        if pause and cut > taken:
            pieces += [strip.signal[taken:cut], np.repeat(strip.signal[cut : cut + 1], pause, 0)]
            taken = cut
            beats[number:] += pause
        number += 4
    pieces.append(strip.signal[taken:])
    return strip._replace(signal=np.concatenate(pieces), beats=beats, classes=classes)


def _run(rng: np.random.Generator) -> int:
    """Return how many early beats follow each other."""
    _, first, end = _RUNS[rng.choice(len(_RUNS), p=[share for share, _, _ in _RUNS])]
    return int(rng.integers(first, end))


def _is_normal(strip: Strip, number: int, usual: float) -> bool:
    interval = strip.beats[number] - strip.beats[number - 1]
    near = strip.classes[number - 1 : number + 2]
    return bool(interval > 0.5 * RATE_HZ and abs(interval - usual) < usual / 4 and not near.any())


def _another_p_wave(
    signal: Signal, cut: int, removed: int, end: int, rng: np.random.Generator
) -> Signal:
    """Return the signal from a cut on, joined to what is now before it, its P wave changed."""
    piece = signal[cut:end].copy()
    fading = min(len(piece), 60)
    step = signal[cut - removed - 1] - signal[cut]
    piece[:fading] += step * np.linspace(1, 0, fading, dtype=np.float32)[:, None]
    first, last = 4, len(piece) - 100 - 26  # the QRS complex begins some 0.07 s before the beat
    base = np.linspace(piece[first], piece[last], last - first)
    height = rng.uniform(-0.7, 1.0)
    piece[first:last] = base + (piece[first:last] - base) * height
    return piece


# --- ventricular -------------------------------------------------------------------------------


def donors(strips: Sequence[Strip]) -> list[Signal]:
    """Return the ventricular beats of each recording that has some, (beats, samples, leads).

    They begin and end at zero, in units of the amplitude of the recording's normal beats.
    """
    given = []
    for strip in strips:
        inside = (strip.beats > 300) & (strip.beats < len(strip.signal) - 300)
        beats = strip.beats[inside & (strip.classes == _V)]
        if len(beats):
            size = _amplitude(strip.signal, strip.beats[strip.classes == _N])
            cut = [strip.signal[beat - _BEFORE : beat + _AFTER] / size for beat in beats]
            given.append(np.stack([part - _line(part) for part in cut]))
    return given


def transplant(
    strip: Strip, beats: NDArray[np.intp], given: Sequence[Signal], rng: np.random.Generator
) -> Strip:
    """Return a recording with ventricular beats of another in place of some of its own.

    Parameters
    ----------
    strip : Strip
    beats : (chosen,) intp
        Numbers of the beats that are replaced.
    given : sequence of (beats, samples, leads)
        Of :func:`donors`; those of one are taken, in one or two shapes.
    rng : np.random.Generator
    """
    signal, classes = strip.signal.copy(), strip.classes.copy()
    size = _amplitude(signal, strip.beats) * signal.any(0)  # what is off stays so
    donor = given[rng.integers(len(given))]
    first = int(rng.integers(len(donor)))
    looks = [_look(rng) for _ in range(1 if rng.random() < 0.8 else 2)]
    for number in beats.tolist():
        near = rng.random() < 0.7
        chosen = first + rng.integers(_NEAR) if near else rng.integers(len(donor))
        beat = _seen(donor[min(len(donor) - 1, int(chosen))], looks[rng.integers(len(looks))])
        begin = int(strip.beats[number]) - round(_BEFORE * len(beat) / (_BEFORE + _AFTER))
        if begin >= 0 and begin + len(beat) <= len(signal):
            _put(signal[begin : begin + len(beat)], beat * size)
            classes[number] = _V
    return strip._replace(signal=signal, classes=classes)


def _amplitude(signal: Signal, beats: NDArray[np.int64]) -> Signal:
    """Return the root mean square of the QRS complexes of up to 200 beats, lead by lead."""
    inside = beats[(beats > 60) & (beats < len(signal) - 60)][:200]
    if not len(inside):
        return np.ones(signal.shape[1], np.float32)
    around = np.stack([signal[beat - 36 : beat + 36] for beat in inside])
    around = around - around.mean(1, keepdims=True)
    size: Signal = np.sqrt((around**2).mean(1)).mean(0) + 1e-3
    return size


def _look(rng: np.random.Generator) -> _Look:
    angle = rng.uniform(-math.pi, math.pi) if rng.random() < 0.6 else 0.0
    sign = 1.0 if rng.random() < 0.5 else -1.0
    return _Look(angle, sign * 2.0 ** rng.uniform(-0.7, 0.7), rng.uniform(0.85, 1.2))


def _seen(beat: Signal, look: _Look) -> Signal:
    turn = np.array(
        [
            [math.cos(look.angle), -math.sin(look.angle)],
            [math.sin(look.angle), math.cos(look.angle)],
        ]
    )
    turned = look.gain * beat @ turn
    places = np.linspace(0, len(beat) - 1, int(len(beat) * look.stretch))
    leads = [np.interp(places, np.arange(len(beat)), lead) for lead in turned.T]
    return np.stack(leads, 1).astype(np.float32)


def _put(old: Signal, beat: Signal) -> None:
    """Write a beat over another, upon the line between the ends of what was there."""
    weight = np.ones((len(beat), 1), np.float32)
    rising, falling = (
        (0.5 - 0.5 * np.cos(np.pi * np.arange(samples) / samples))[:, None] for samples in _FADES
    )
    weight[: len(rising)] = rising
    weight[-len(falling) :] = 1 - falling
    old[:] = old * (1 - weight) + (_line(old) + beat) * weight


def _line(part: Signal) -> Signal:
    """Return the straight line between the ends of a stretch."""
    share = np.linspace(0, 1, len(part), dtype=np.float32)[:, None]
    line: Signal = part[:1] * (1 - share) + part[-1:] * share
    return line


# --- both --------------------------------------------------------------------------------------


def disorder(
    strip: Strip, share: float, given: Sequence[Signal], rng: np.random.Generator
) -> Strip:
    """Return a recording with early beats, of which some, all or none are ventricular.

    Parameters
    ----------
    strip : Strip
    share : float
        As for :func:`bring_forward`.
    given : sequence of (beats, samples, leads)
        Of :func:`donors`; without any, nothing becomes ventricular.
    rng : np.random.Generator
    """
    made = bring_forward(strip, share, rng) if share else strip
    if not given or rng.random() < 0.5:
        return made
    early = np.flatnonzero((made.classes == _S) & (strip.classes == _N))
    if rng.random() < 0.5:
        early = early[rng.random(len(early)) < 0.5]
    in_time = np.flatnonzero(made.classes == _N)
    in_time = in_time[rng.random(len(in_time)) < (0.02 if rng.random() < 0.3 else 0.0)]
    return transplant(made, np.concatenate([early, in_time]), given, rng)
