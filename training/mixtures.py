"""Streams of single words, mixed from clips and noise as a microphone might bring them.

Words follow each other at any distance, from any speaker, behind any silence, in other rooms and
over other lines; some streams hold no word at all. A stream is made of the engine's own features.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import fft, signal
from torch import Tensor
from torch.utils.data import Dataset

from engine import features
from engine.model_file import ModelSpec
from training import recordings

Sound = NDArray[np.float32]

SETS = ("commands", "digits")
LABELS = (
    "", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
    "down", "go", "left", "right", "up",
)  # fmt: skip
RATE_HZ = recordings.RATE_HZ
SECONDS = 2.0  # of one stream; most go on where another ended
# Held back from training, to count false words on: one recording of minutes, and of the short
# ones those whose name says so.
_HELD_NOISE = "exercise_bike"
_HELD_INITIALS = "0123"

_NO_WORDS = 0.15  # share of streams
_MAX_WORDS = 4
_REVERSED = 0.06  # share of the sounds that are words backwards, and so none
_FADE = 80  # samples; 5 ms
_QUIET_DB = 28.0  # below a clip's loudest 20 ms, all that is before and after is not the word
_MARGIN = 480  # samples that the word may last beyond


class Clip(NamedTuple):
    """One word, spoken alone."""

    samples: NDArray[np.int16]
    label: int  # index into LABELS; 0 for a sound that is no word
    start: int  # sample at which the word seems to begin
    end: int


class Sources(NamedTuple):
    """What streams are mixed from."""

    clips: Sequence[Clip]
    noises: Sequence[NDArray[np.int16]]


class Batch(NamedTuple):
    """Streams side by side."""

    x: Tensor  # (rows, frames, bins) log-mel
    targets: Tensor  # (words,) int64, those of the rows one after the other
    counts: Tensor  # (rows,) int64, words of each row
    allowed: Tensor  # (rows, outputs, labels) bool: where a label may be told
    heard: Tensor  # (rows, outputs) int64: the word that is or has just been spoken, or 0


def read(folder: Path, split: str) -> Sources:
    """Read all clips and noises of a split.

    Parameters
    ----------
    folder : Path
        Holds ``commands``, ``digits`` and ``noise``.
    split : {"train", "valid"}
    """
    clips = []
    for utterance in recordings.manifest(folder, SETS, split):
        samples = recordings.audio(folder, utterance)
        clips.append(Clip(samples, LABELS.index(utterance.text), *_extent(samples)))
    noises = [
        recordings.audio(folder, utterance)
        for utterance in recordings.manifest(folder, ("noise",), "train")
        if _held(Path(utterance.name).stem) == (split == "valid")
    ]
    return Sources(clips, noises)


def count(folder: Path, name: str, split: str) -> int:
    """Return how many clips of a split are of one set; those of the last set come last."""
    return len(recordings.manifest(folder, (name,), split))


def _held(stem: str) -> bool:
    return stem == _HELD_NOISE or stem[0] in _HELD_INITIALS


def _extent(samples: NDArray[np.int16]) -> tuple[int, int]:
    """Return where the sound of a clip begins and ends."""
    size = 320
    whole = len(samples) // size * size
    energy = np.square(samples[:whole].astype(np.float32)).reshape(-1, size).mean(1) + 1.0
    loud = np.flatnonzero(energy > energy.max() * 10 ** (-_QUIET_DB / 10))
    start, end = int(loud[0]) * size - _MARGIN, int(loud[-1] + 1) * size + _MARGIN
    return max(0, start), min(len(samples), end)


class Streams(Dataset[Batch]):
    """One epoch of batches; the same seed gives the same one.

    Parameters
    ----------
    sources : Sources
    spec : ModelSpec
        For the features, and for the look-ahead: a word is told within so many samples of its
        end, or not at all.
    stride : int
        Samples of one output of the network.
    rows, batches : int
    seed : sequence of int
    disturbed : bool
        False leaves rooms, lines and noises out, for a look at how it goes.
    """

    def __init__(
        self,
        sources: Sources,
        spec: ModelSpec,
        stride: int,
        rows: int,
        batches: int,
        seed: Sequence[int],
        disturbed: bool = True,
    ) -> None:
        self.sources, self.spec, self.stride = sources, spec, stride
        self.rows, self.batches, self.seed = rows, batches, seed
        self.disturbed = disturbed
        self.by_label = [
            [number for number, clip in enumerate(sources.clips) if clip.label == label]
            for label in range(len(LABELS))
        ]
        self.samples = round(SECONDS * RATE_HZ) // spec.hop_samples * spec.hop_samples

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> Batch:
        rng = np.random.default_rng((*self.seed, index))
        sounds = np.zeros((self.rows, self.samples), np.float32)
        outputs = self.samples // self.stride
        allowed = np.zeros((self.rows, outputs, len(LABELS)), bool)
        allowed[:, :, 0] = True
        heard = np.zeros((self.rows, outputs), np.int64)
        targets: list[int] = []
        counts = []
        for row in range(self.rows):
            sounds[row], words = self._stream(rng)
            for label, start, end in words:
                last = (end + self.spec.look_ahead_samples) // self.stride
                allowed[row, start // self.stride : last, label] = True
                heard[row, (start + end) // 2 // self.stride : last] = label
                targets.append(label)
            counts.append(len(words))
        x = to_features(self.spec, sounds)
        if self.disturbed:
            _another_voice(x, rng)
            _mask(x, rng)
        return Batch(
            torch.from_numpy(x),
            torch.tensor(targets, dtype=torch.int64),
            torch.tensor(counts, dtype=torch.int64),
            torch.from_numpy(allowed),
            torch.from_numpy(heard),
        )

    def _stream(self, rng: np.random.Generator) -> tuple[Sound, list[tuple[int, int, int]]]:
        """Return the samples of one stream, and its words: label, first and last sample."""
        out = np.zeros(self.samples, np.float32)
        words: list[tuple[int, int, int]] = []
        wanted = 0 if rng.random() < _NO_WORDS else int(rng.integers(1, _MAX_WORDS + 1))
        place = 0 if rng.random() < 0.4 else int(rng.uniform(0, 0.8) * RATE_HZ)
        end = place
        power = 0.0
        for number in range(wanted):
            sound, clip = self._sound(rng)
            room = self.samples - self.spec.look_ahead_samples - len(sound)
            if number == 0:
                place = end = max(0, min(place, room))
            if place > room:
                break
            out[place : place + len(sound)] += sound
            end = max(end, place + len(sound))
            if clip.label:
                words.append((clip.label, place + clip.start, place + clip.end))
                power = max(power, float(np.square(sound[clip.start : clip.end]).mean()))
            place += max(clip.end, len(sound) - int(rng.integers(0, 3000))) + _pause(rng)
        if self.disturbed:
            self._disturb(out, power, rng)
        if words and rng.random() < 0.35:  # the engine repeats the last value to flush a stream
            out[end:] = out[end - 1]
        return out, words

    def _sound(self, rng: np.random.Generator) -> tuple[Sound, Clip]:
        label = int(rng.integers(1, len(LABELS)))
        if rng.random() < 0.5 or not self.by_label[label]:
            number = int(rng.integers(len(self.sources.clips)))
        else:
            number = self.by_label[label][int(rng.integers(len(self.by_label[label])))]
        clip = self.sources.clips[number]
        if rng.random() < 0.4:  # cut close
            cut = slice(max(0, clip.start - 320), clip.end + 320)
            length = clip.end - clip.start
            start = clip.start - cut.start
            clip = Clip(clip.samples[cut], clip.label, start, start + length)
        sound = clip.samples.astype(np.float32) / 32768
        if not self.disturbed:
            return sound, clip
        if rng.random() < _REVERSED:
            sound, clip = sound[::-1], clip._replace(label=0)
        if rng.random() < 0.2:
            sound = _with_another_melody(sound, rng)
        if rng.random() < 0.7:
            up = int(rng.integers(16, 26))  # twentieths
            sound = signal.resample_poly(sound, up, 20, window=_resampling(up))
            clip = clip._replace(start=clip.start * up // 20, end=clip.end * up // 20)
        if rng.random() < 0.12:
            sound = _in_a_room(sound, rng)
        fade = min(_FADE, len(sound) // 4)
        sound = sound.copy()
        if rng.random() < 0.5:
            sound[:fade] *= np.linspace(0, 1, fade, dtype=np.float32)
            sound[-fade:] *= np.linspace(1, 0, fade, dtype=np.float32)
        return sound * np.float32(_decibels(rng.uniform(-9, 6))), clip

    def _disturb(self, out: Sound, power: float, rng: np.random.Generator) -> None:
        """Add noise, pass the stream over a line, and change its gain, in place."""
        if power == 0.0 or rng.random() < 0.6:
            noise = self._noise(rng)
            loudness = float(np.square(noise).mean()) + 1e-12
            wanted = _decibels(rng.uniform(-75, -10)) ** 2
            if power:
                wanted = power * _decibels(-rng.uniform(3, 40)) ** 2
            out += noise * np.float32(np.sqrt(wanted / loudness))
        if rng.random() < 0.08:
            top = rng.uniform(3200, 3900)
            kind, corners = ("bandpass", (300, top)) if rng.random() < 0.6 else ("lowpass", top)
            line = signal.butter(4, corners, kind, fs=RATE_HZ, output="sos")
            out[:] = signal.sosfilt(line, out)
            if rng.random() < 0.5:
                out[:] = _companded(out)
        if rng.random() < 0.2:
            out += np.float32(_decibels(rng.uniform(-95, -60))) * rng.standard_normal(
                len(out), dtype=np.float32
            )
        out *= np.float32(_decibels(rng.uniform(-20, 6 if rng.random() < 0.95 else 25)))
        np.clip(out, -1, 1, out=out)

    def _noise(self, rng: np.random.Generator) -> Sound:
        """Return a stream of recorded or made noise, or of both."""
        if rng.random() < 0.3:
            return _coloured(self.samples, rng)
        parts: list[Sound] = []
        length = 0
        while length < self.samples:
            noise = self.sources.noises[int(rng.integers(len(self.sources.noises)))]
            start = int(rng.integers(max(1, len(noise) - self.samples)))
            part = noise[start : start + self.samples].astype(np.float32) / 32768
            parts.append(part)
            length += len(part)
        noise_out: Sound = np.concatenate(parts)[: self.samples]
        if rng.random() < 0.2:
            loudness = float(np.sqrt(np.square(noise_out).mean()))
            noise_out = noise_out + np.float32(loudness) * _coloured(self.samples, rng)
        return noise_out


def to_features(spec: ModelSpec, sounds: Sound) -> Sound:
    """Return what the engine would give a network, (rows, frames, bins) of (rows, samples).

    The samples are whole hops, and silence was before them.
    """
    lead = spec.window_samples - spec.hop_samples
    windows = np.pad(sounds, ((0, 0), (lead, 0)))[:, :, None]
    return features.extract(spec.stages[0].features, windows, spec.input.rate_hz)


def _pause(rng: np.random.Generator) -> int:
    """Return the samples between two words."""
    return int(rng.uniform(0, rng.choice((0.1, 0.5))) * RATE_HZ)


def _decibels(value: float) -> float:
    return float(10.0 ** (value / 20))


@lru_cache(maxsize=16)
def _resampling(up: int) -> NDArray[np.float64]:
    """Return the low-pass of a change of rate by up / 20."""
    widest = max(up, 20)
    taps: NDArray[np.float64] = signal.firwin(12 * widest + 1, 1 / widest, window=("kaiser", 5.0))
    return taps.astype(np.float32)


def _with_another_melody(sound: Sound, rng: np.random.Generator) -> Sound:
    """Play a sound of unchanged length now faster, now slower, by up to a tenth or so."""
    steps = np.interp(np.arange(len(sound)), np.linspace(0, len(sound), 5), rng.normal(0, 0.08, 5))
    place = np.cumsum(np.exp2(steps))
    place *= (len(sound) - 1) / place[-1]
    bent: Sound = np.interp(place, np.arange(len(sound)), sound).astype(np.float32)
    return bent


def _in_a_room(sound: Sound, rng: np.random.Generator) -> Sound:
    """Add echoes: noise that falls off by 60 dB in 0.1 to 0.6 s."""
    fall_s = rng.uniform(0.1, 0.6)
    length = int(0.6 * fall_s * RATE_HZ)
    echoes = rng.standard_normal(length, dtype=np.float32)
    echoes *= np.exp(-6.9 * np.arange(length, dtype=np.float32) / np.float32(fall_s * RATE_HZ))
    echoes[: int(rng.integers(16, 200))] = 0.0
    echoes *= np.float32(_decibels(rng.uniform(-15, 0)) / (np.linalg.norm(echoes) + 1e-9))
    echoes[0] = 1.0
    heard: Sound = signal.oaconvolve(sound, echoes)[: len(sound)].astype(np.float32)
    return heard


def _companded(sound: Sound) -> Sound:
    """Return what 8 bits of mu-law leave."""
    strength = np.float32(255.0)
    loud = np.sign(sound) * np.log1p(strength * np.abs(np.clip(sound, -1, 1))) / np.log1p(strength)
    coarse = np.round(loud * 127) / 127
    return np.sign(coarse) * np.expm1(np.abs(coarse) * np.log1p(strength)) / strength


def _coloured(samples: int, rng: np.random.Generator) -> Sound:
    """Return noise of power 1 whose spectrum falls off, from white to brown, or is a band."""
    spectrum = fft.rfft(rng.standard_normal(samples, dtype=np.float32))
    hz = np.linspace(0, RATE_HZ / 2, len(spectrum), dtype=np.float32)
    spectrum *= np.maximum(hz, 20.0) ** np.float32(-rng.uniform(0, 1.2))
    if rng.random() < 0.25:
        low = rng.uniform(50, 3000)
        spectrum *= (hz > low) & (hz < low * rng.uniform(1.2, 6))
    noise: Sound = fft.irfft(spectrum, samples)
    if rng.random() < 0.25:  # it comes and goes
        turns = 2 * np.pi * rng.uniform(0.3, 6) / RATE_HZ * np.arange(samples)
        noise *= 1 + np.sin(turns, dtype=np.float32)
    noise /= np.sqrt(np.square(noise).mean()) + np.float32(1e-12)
    return noise


def _another_voice(x: Sound, rng: np.random.Generator) -> None:
    """Move each row's formants, each by its own share of an octave, smooth and tilt, in place.

    Vocal tract length perturbation (Jaitly & Hinton 2013), here on the mel axis and by another
    factor for low and high formants, so that few speakers sound like many.
    """
    bins = x.shape[2]
    hz = features.mel_centres(bins, RATE_HZ)
    octave, knots = np.log2(hz / hz[0]), np.log2(np.array([200, 700, 1800, 4000]) / hz[0])
    for row in x:
        if rng.random() < 0.3:
            for _ in range(int(rng.integers(1, 5))):  # pitch and its harmonics go first
                row[:, 1:-1] = row[:, 1:-1] / 2 + (row[:, :-2] + row[:, 2:]) / 4
        moved = rng.uniform(-0.22, 0.22) + rng.normal(0, 0.06, len(knots))
        place = np.interp(octave + np.interp(octave, knots, moved), octave, np.arange(bins))
        low = np.minimum(place.astype(np.int64), bins - 2)
        share = (place - low).astype(np.float32)
        row[:] = row[:, low] * (1 - share) + row[:, low + 1] * share
        tilt = np.interp(np.linspace(0, 5, bins), np.arange(6), rng.normal(0, 0.4, 6))  # 1.7 dB
        row += tilt.astype(np.float32)


def _mask(x: Sound, rng: np.random.Generator) -> None:
    """Hide a few bands and moments, in place (SpecAugment, Park et al. 2019)."""
    rows, frames, bins = x.shape
    for row in range(rows):
        middle = x[row].mean()
        for _ in range(int(rng.integers(0, 3))):
            width, first = int(rng.integers(1, 13)), int(rng.integers(bins - 12))
            x[row, :, first : first + width] = middle
        for _ in range(int(rng.integers(0, 3))):
            width, start = int(rng.integers(1, 5)), int(rng.integers(frames - 5))
            x[row, start : start + width] = middle
