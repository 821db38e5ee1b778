"""Train the model that names beats: ``python -m training.beats``, then see LOG.md.

A recurrent network steps once a beat (:mod:`exporters.beat_net`). It learns the class of a beat
from MIT-BIH, whose every beat was named by two cardiologists, and the rhythm from CinC 2017, whose
records are named as a whole. The beats of a normal record and of one in atrial fibrillation are
taken for normal, so that a thousand patients say what is *not* an early beat. Ectopic beats are
rare and of few patients: more are made in the records of both (:mod:`training.ectopy`), and what
all beats of a row have of their electrodes is changed.

``--fold K`` leaves out a part of the patients and says how well the rest teaches to name them.
"""

import argparse
import csv
import datetime
import json
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import wfdb
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from scipy import signal as filters
from torch import Tensor
from torch.nn import functional

from engine import ec57, model_file
from engine.heart.classes import cut_windows
from engine.model_file import Beats, Input, ModelSpec, Output, Stage, State
from exporters.beat_net import (
    BEFORE,
    INPUTS,
    LEADS,
    POINTS,
    POINTS_HZ,
    BeatNet,
    BeatNetConfig,
)
from exporters.to_onnx import export
from training import data
from training.ectopy import RATE_HZ, Signal, Strip, disorder, donors
from training.evaluate import stream

CUT = Beats("heart-beats", LEADS, POINTS, BEFORE, round(RATE_HZ / POINTS_HZ))
RHYTHMS = ("n", "a", "o", "noise")  # of CinC 2017: normal, atrial fibrillation, other, noise
RHYTHM_OF = {"N": 0, "A": 1, "O": 2, "~": 3}
_RHYTHM_OF_MITDB = {"(N": 0, "(AFIB": 1, "(AFL": 1}  # and all others are other

# Patients whose beats are named by a network that has not seen them, so that each fold has some
# with supraventricular beats, with ventricular ones, and without any.
FOLDS = (
    ("209", "106", "119", "203", "112", "115"),
    ("201", "118", "223", "109", "230"),
    ("207", "124", "208", "101", "122", "116"),
    ("220", "114", "205", "215", "108"),
)
_IRREGULAR = ("201", "203")  # in atrial fibrillation: no beat there is early

ROWS, BEATS = 14, 192  # of a batch of MIT-BIH
RECORDS, MOST_BEATS, LEAST_BEATS = 64, 72, 5  # of a batch of CinC 2017
DISORDERED, ENOUGH_BEATS = 10, 12  # records of it in which ectopic beats are made
SHARES = (0.015, 0.03, 0.09)  # of the beats of a row with which something ectopic begins
STEPS = 60  # an epoch
RATE = 2e-3
CLIP = 1.0  # gradient norm
CLASS_WEIGHTS = torch.tensor([1.0, 4.0, 2.0, 1.5, 1.0])  # N S V F Q
# Where the atria fibrillate no beat is early: what an S loses by it, natural logarithm.
AGAINST = torch.tensor([[0.0] * 5, [0.0, 3.0, 0.0, 0.0, 0.0], [0.0] * 5, [0.0] * 5])
RHYTHM_WEIGHTS = torch.tensor([1.0, 1.6, 1.4, 2.0])
_WARM_UP = 60  # steps
_SETTLING = 16  # beats, before which the rhythm of MIT-BIH is not asked for
_SURE_AFTER = 20.0  # beats, until which the rhythm of a record counts less
_TAPS = np.array([0.5, 0.8, 1.0, 0.6, 1.0, 0.8, 0.5])  # of a random filter, how far from none
_ODD = 2.5  # loss at which a beat of a normal record is taken for the exception that it may be


class Short(NamedTuple):
    """A record of CinC 2017."""

    strip: Strip  # its beats are taken for normal
    x: Signal  # (beats, INPUTS)
    rhythm: int


class Figures(NamedTuple):
    """What a network does on patients that it has not seen."""

    classes: NDArray[np.int64]  # annotated x named
    records: dict[str, NDArray[np.int64]]
    rhythms: NDArray[np.int64]  # annotated x told


# --- recordings --------------------------------------------------------------------------------


def read(folder: Path, name: str) -> Strip:
    """Read a record of MIT-BIH."""
    recording = data.read(folder, name)
    notes = wfdb.rdann(str(folder / name), "atr")
    rhythm = np.zeros(len(recording.signal), np.int64)
    for sample, note in zip(notes.sample, notes.aux_note, strict=True):
        if note.startswith("("):
            rhythm[sample:] = _RHYTHM_OF_MITDB.get(note.strip("\x00"), 2)
    return Strip(
        name,
        recording.signal[:, :LEADS],
        recording.beats,
        recording.classes,
        rhythm[recording.beats],
    )


def read_cinc(folder: Path, kept: Path, split: str) -> list[Short]:
    """Read the records of a split of CinC 2017, with the beats that the bundled model finds."""
    with (folder / "labels.csv").open(encoding="utf-8") as lines:
        rows = [row for row in csv.DictReader(lines) if row["split"] == split]
    signals = []
    for row in rows:
        record = wfdb.rdrecord(str(folder / row["record"]), return_res=32)
        at_rate = filters.resample_poly(record.p_signal[:, 0], round(RATE_HZ), round(record.fs))
        signals.append(at_rate.astype(np.float32))
    beats = _find(kept / f"cinc2017-{split}.npz", [row["record"] for row in rows], signals)
    return [
        one_lead(row["record"], signal, found, RHYTHM_OF[row["label"]])
        for row, signal, found in zip(rows, signals, beats, strict=True)
    ]


def one_lead(name: str, signal: Signal, beats: NDArray[np.int64], rhythm: int) -> Short:
    """Return a record of one lead, (samples,)."""
    leads = np.stack([signal, np.zeros_like(signal)], axis=1)
    normal = np.zeros(len(beats), np.int64)
    strip = Strip(name, leads, beats, normal, np.full(len(beats), rhythm))
    return Short(strip, inputs(leads, beats), rhythm)


def _find(path: Path, names: Sequence[str], signals: Sequence[Signal]) -> list[NDArray[np.int64]]:
    """Return the beats of one-lead signals, found once and kept on disk."""
    if not path.exists():
        model = model_file.load("heart")
        found: dict[str, NDArray[np.int64]] = {}
        order = np.argsort([len(signal) for signal in signals])
        for group in track(np.array_split(order, -(-len(order) // 32)), "beats"):
            longest = max(len(signals[place]) for place in group)
            padded = [
                np.pad(signals[place], (0, longest - len(signals[place])), mode="edge")
                for place in group
            ]
            side_by_side = np.zeros((len(group), longest, model.spec.input.channels), np.float32)
            side_by_side[:, :, 0] = padded
            for place, beats in zip(group, stream(model, side_by_side), strict=True):
                inside = [b.position for b in beats if 0 <= b.position < len(signals[place])]
                found[names[place]] = np.array(inside, np.int64)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, **found)
    with np.load(path) as kept:
        return [kept[name] for name in names]


def inputs(signal: Signal, beats: NDArray[np.int64]) -> Signal:
    """Return what the engine gives the network for each beat, (beats, INPUTS)."""
    edge = POINTS * CUT.factor
    padded = np.pad(signal, ((edge, edge), (0, 0)), mode="edge")[None]
    places = beats + edge - CUT.before * CUT.factor
    windows = cut_windows(padded, np.zeros(len(beats), np.intp), places, CUT)
    seconds = np.diff(beats, prepend=beats[:1]) / RATE_HZ
    return np.concatenate([windows, seconds[:, None].astype(np.float32)], axis=1)


# --- other electrodes --------------------------------------------------------------------------


def refilter(x: Tensor, share: float, stretched: float, rng: np.random.Generator) -> Tensor:
    """Return (rows, beats, INPUTS) as through other filters, and beats wider or narrower.

    Parameters
    ----------
    x : Tensor
    share, stretched : float
        Of the leads that are filtered, of the rows whose beats are stretched: each alike for all
        beats of its row.
    rng : np.random.Generator
    """
    rows, beats, _ = x.shape
    windows = x[:, :, :-1].reshape(rows, beats, LEADS, POINTS).clone()
    for row in windows:
        if rng.random() < stretched:
            places = (np.arange(POINTS) - BEFORE) / rng.uniform(0.9, 1.12) + BEFORE
            places = places.clip(0, POINTS - 1.001)
            left = torch.from_numpy(places.astype(np.int64))
            rest = torch.from_numpy((places % 1).astype(np.float32))
            row[:] = row[..., left] * (1 - rest) + row[..., left + 1] * rest
        for lead in range(LEADS):
            if rng.random() < share:
                taps = rng.normal(0, 0.28, len(_TAPS)) * _TAPS
                taps[len(_TAPS) // 2] += 1
                kernel = torch.from_numpy(taps.astype(np.float32))[None, None]
                edge = len(_TAPS) // 2
                padded = functional.pad(row[:, lead, None], (edge, edge), mode="replicate")
                row[:, lead] = functional.conv1d(padded, kernel)[:, 0]
    return torch.cat([windows.flatten(2), x[:, :, -1:]], 2)


def disturb(x: Tensor, one_lead: bool, rng: np.random.Generator) -> Tensor:
    """Return (rows, beats, INPUTS) of other electrodes, gains and noise, and of other rates."""
    rows, beats, _ = x.shape
    windows = x[:, :, :-1].reshape(rows, beats, LEADS, POINTS).clone()
    if one_lead:  # sometimes twice, or the records of one lead would be known by that
        windows[:, :, 1] = windows[:, :, 0] * torch.from_numpy(rng.random((rows, 1, 1)) < 0.4)
    else:
        _place(windows, rng)
    on = (windows.abs().amax((1, 3), keepdim=True) > 0).float()

    def each(draw: NDArray[np.float64]) -> Tensor:
        return torch.from_numpy(draw.astype(np.float32)).reshape(rows, 1, LEADS, 1)

    def sometimes(share: float, most: float) -> Tensor:
        there = rng.random((rows, LEADS)) < share
        return each(np.where(there, rng.uniform(0, most, (rows, LEADS)), 0.0))

    seconds = torch.arange(POINTS) / POINTS_HZ
    gain = 2.0 ** rng.uniform(-1, 1, (rows, LEADS))
    windows *= each(gain * np.where(rng.random((rows, LEADS)) < 0.08, -1.0, 1.0))
    bursts = torch.from_numpy(rng.exponential(1.0, (rows, beats, LEADS, 1)).astype(np.float32))
    windows += on * sometimes(0.5, 0.06) * bursts * torch.randn(windows.shape)
    phase = 2 * math.pi * torch.rand(rows, beats, 1, 1)
    mains = torch.sin(2 * math.pi * float(rng.choice((50.0, 60.0))) * seconds + phase)
    windows += on * sometimes(0.2, 0.08) * mains
    slope = torch.randn(rows, beats, LEADS, 1)
    windows += on * sometimes(0.5, 0.5) * slope * (seconds - BEFORE / POINTS_HZ)
    faster = torch.from_numpy(rng.uniform(0.85, 1.18, (rows, 1, 1)).astype(np.float32))
    return torch.cat([windows.flatten(2), x[:, :, -1:] * faster], 2)


def _place(windows: Tensor, rng: np.random.Generator) -> None:
    """Turn, exchange or take off electrodes, row by row."""
    for pair in windows:
        chance = rng.random()
        if chance < 0.3:
            angle = rng.uniform(-math.pi / 2, math.pi / 2)
            one, other = pair[:, 0].clone(), pair[:, 1].clone()
            pair[:, 0] = math.cos(angle) * one + math.sin(angle) * other
            pair[:, 1] = math.cos(angle) * other - math.sin(angle) * one
        elif chance < 0.4:
            pair[:] = pair.flip(1).clone()
        chance = rng.random()
        if chance < 0.05:
            pair[:, 0] = pair[:, 1]
        if chance < 0.35:
            pair[:, 1] = 0.0


# --- learning ----------------------------------------------------------------------------------


def batches(strips: Sequence[Strip], rng: np.random.Generator) -> Iterator[tuple[Tensor, ...]]:
    """Yield beats in a row of random places, (ROWS, BEATS, ...): inputs, classes, rhythms."""
    given = donors(strips)
    while True:
        rows = [_stretch(strips[rng.integers(len(strips))], given, rng) for _ in range(ROWS)]
        x, classes, rhythm = (np.stack(field) for field in zip(*rows, strict=True))
        yield (
            disturb(refilter(torch.from_numpy(x), 0.5, 0.3, rng), False, rng),
            torch.from_numpy(classes),
            torch.from_numpy(rhythm),
        )


def _stretch(
    strip: Strip, given: Sequence[Signal], rng: np.random.Generator
) -> tuple[NDArray[Any], ...]:
    first = int(rng.integers(max(1, len(strip.beats) - BEATS)))
    part = slice(first, first + BEATS)
    begin = max(0, int(strip.beats[first]) - 400)
    end = int(strip.beats[part][-1]) + 400
    cut = Strip(
        strip.name,
        strip.signal[begin:end],
        strip.beats[part] - begin,
        strip.classes[part],
        strip.rhythm[part],
    )
    if strip.name not in _IRREGULAR and rng.random() < 0.6:
        cut = disorder(cut, float(rng.choice(SHARES)), given, rng)
    return _found(cut, rng), cut.classes, cut.rhythm


def _found(strip: Strip, rng: np.random.Generator) -> Signal:
    """Return inputs for beats as the finder places them, within a frame of 11 ms."""
    beats = strip.beats + np.round(rng.normal(0, 2.5, len(strip.beats))).astype(np.int64)
    x = inputs(strip.signal, beats.clip(0, len(strip.signal) - 1))
    x[0, -1] = 0.0
    return x


def short_batches(
    records: Sequence[Short], given: Sequence[Signal], rng: np.random.Generator
) -> Iterator[tuple[Tensor, ...]]:
    """Yield records of CinC 2017 side by side, (RECORDS, MOST_BEATS, ...).

    Inputs, classes of the beats, their weights, rhythms, and whether a record is as it was: in
    the first DISORDERED there may be ectopic beats that were made.
    """
    calm = [
        record
        for record in records
        if RHYTHMS[record.rhythm] in ("n", "a") and len(record.x) >= ENOUGH_BEATS
    ]
    while True:
        x = np.zeros((RECORDS, MOST_BEATS, INPUTS), np.float32)
        weight = np.zeros((RECORDS, MOST_BEATS), np.float32)
        classes = np.zeros((RECORDS, MOST_BEATS), np.int64)
        rhythm = np.zeros(RECORDS, np.int64)
        for row in range(RECORDS):
            chosen = calm if row < DISORDERED else records
            record = chosen[rng.integers(len(chosen))]
            whole, named = record.x, record.strip.classes
            if row < DISORDERED:
                normal = RHYTHMS[record.rhythm] == "n"
                share = float(rng.choice(SHARES)) if normal else 0.0
                strip = disorder(record.strip, share, given, rng)
                whole, named = _found(strip, rng), strip.classes
            spare = len(whole) - MOST_BEATS
            first = int(rng.integers(spare + 1)) if spare > 0 else 0
            part = whole[first : first + MOST_BEATS]
            x[row, : len(part)] = part
            classes[row, : len(part)] = named[first : first + MOST_BEATS]
            weight[row, : len(part)] = np.clip(np.arange(len(part)) / _SURE_AFTER, 0, 1) ** 2
            rhythm[row] = record.rhythm
        x[:, 0, -1] = 0.0
        yield (
            disturb(refilter(torch.from_numpy(x), 0.15, 0.15, rng), True, rng),
            torch.from_numpy(classes),
            torch.from_numpy(weight),
            torch.from_numpy(rhythm),
            torch.from_numpy(~classes.any(1)),
        )


def loss_of(net: BeatNet, named: tuple[Tensor, ...], short: tuple[Tensor, ...]) -> Tensor:
    """Return the loss of a batch of each kind."""
    x, classes, rhythm = named
    beat_class, told, _ = net.logits(x, *net.initial_states(len(x)))
    loss = functional.cross_entropy(beat_class.flatten(0, 1), classes.flatten(), CLASS_WEIGHTS)
    settled = slice(_SETTLING, None)
    loss = loss + 0.1 * functional.cross_entropy(
        told[:, settled].flatten(0, 1), rhythm[:, settled].flatten()
    )
    x, classes, weight, rhythm, as_it_was = short
    beat_class, told, _ = net.logits(x, *net.initial_states(len(x)))
    each = functional.cross_entropy(
        told.flatten(0, 1),
        rhythm[:, None].expand(-1, x.shape[1]).flatten(),
        RHYTHM_WEIGHTS,
        reduction="none",
    ).view_as(weight)
    counted = weight * as_it_was[:, None]
    loss = loss + (each * counted).sum() / counted.sum()
    # Where the atria fibrillate no beat is early, however irregular.
    fibrillating = (rhythm == RHYTHMS.index("a")).float()[:, None] * (weight > 0)
    normal = (rhythm == RHYTHMS.index("n")).float()[:, None] * (weight > 0)
    each = functional.cross_entropy(
        beat_class.flatten(0, 1), classes.flatten(), CLASS_WEIGHTS, reduction="none"
    ).view_as(weight)
    each = torch.where((normal > 0) & (classes == 0), each.clamp(max=_ODD), each)
    known = normal + fibrillating
    return loss + (each * known).sum() / known.sum().clamp(min=1.0)


def train(
    strips: Sequence[Strip], records: Sequence[Short], path: Path, epochs: int, seed: int
) -> BeatNet:
    """Return a trained network; it is kept at `path` after each epoch, and goes on from there."""
    torch.manual_seed(seed)
    net = BeatNet(BeatNetConfig(), CLASS_WEIGHTS, AGAINST)
    optimiser = torch.optim.AdamW(net.parameters(), RATE, weight_decay=1e-2)
    done = 0
    if path.exists():
        whole = torch.load(path, weights_only=True)
        net.load_state_dict(whole["net"])
        optimiser.load_state_dict(whole["optimiser"])
        done = whole["epochs"]
    records = [record for record in records if len(record.x) >= LEAST_BEATS]
    for epoch in track(range(done, epochs), path.stem):
        rng = np.random.default_rng((seed, epoch))
        torch.manual_seed(seed + epoch)
        named, others = batches(strips, rng), short_batches(records, donors(strips), rng)
        for step in range(epoch * STEPS, (epoch + 1) * STEPS):
            falling = (1 + math.cos(math.pi * step / (epochs * STEPS))) / 2
            for group in optimiser.param_groups:
                group["lr"] = RATE * min(1.0, (step + 1) / _WARM_UP) * falling
            loss = loss_of(net, next(named), next(others))
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
            optimiser.step()
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = {"net": net.state_dict(), "optimiser": optimiser.state_dict(), "epochs": epoch + 1}
        torch.save(whole, path)
    return net.eval()


def judge(
    nets: Sequence[BeatNet], strips: Sequence[Strip], records: Sequence[Short], leads: int = LEADS
) -> Figures:
    """Name the beats of unseen patients at their annotated places, and the rhythms of records."""
    confusions = {}
    for strip in strips:
        x = inputs(strip.signal, strip.beats)
        x[:, leads * POINTS : -1] = 0.0
        beat_class, _ = _run(nets, x)
        counts = np.zeros((len(data.LABELS),) * 2, np.int64)
        np.add.at(counts, (strip.classes, beat_class.argmax(1)), 1)
        confusions[strip.name] = counts
    rhythms = np.zeros((len(RHYTHMS),) * 2, np.int64)
    for record in records:
        told = _run(nets, record.x)[1][-1].argmax() if len(record.x) else RHYTHMS.index("noise")
        rhythms[record.rhythm, told] += 1
    total = np.zeros_like(rhythms, shape=(len(data.LABELS),) * 2)
    return Figures(sum(confusions.values(), total), confusions, rhythms)


def _run(nets: Sequence[BeatNet], x: Signal) -> tuple[Signal, Signal]:
    with torch.no_grad():
        told = [net(torch.from_numpy(x)[None], *net.initial_states(1))[:2] for net in nets]
    classes, rhythms = (torch.stack(part).mean(0)[0].numpy() for part in zip(*told, strict=True))
    return classes, rhythms


def f1(confusion: NDArray[np.int64], label: int) -> float:
    """Return the F1 of one label in percent."""
    both = confusion[label].sum() + confusion[:, label].sum()
    return 200.0 * float(confusion[label, label]) / max(1.0, float(both))


def table(figures: Figures) -> str:
    """Return a line a record, with the F1 of V and S, and one for all; then the rhythms."""
    lines = ["| record | V F1 | S F1 | N | S | V | F | Q |", "| --- " * 8 + "|"]
    for name, counts in [*figures.records.items(), ("**gross**", figures.classes)]:
        told = " | ".join(str(row) for row in counts.sum(1).tolist())
        scored = ec57.Table(np.pad(counts, (0, 1)))  # no beat is missed, none is false
        both = " | ".join(f"{100 * scored.of(label).f1:.2f}" for label in "VS")
        lines.append(f"| {name} | {both} | {told} |")
    rhythms = [f1(figures.rhythms, label) for label in range(len(RHYTHMS))]
    told = ", ".join(f"{name} {one:.1f}" for name, one in zip(RHYTHMS, rhythms, strict=True))
    lines.append(f"CinC 2017: {told}; mean of n, a, o {np.mean(rhythms[:3]):.2f}")
    return "\n".join(lines)


# --- the model file ----------------------------------------------------------------------------


def statement(net: BeatNet, provenance: str) -> ModelSpec:
    """Return what the model file says of this network."""
    states = tuple(State(name, f"{name}_next", shape) for name, shape in net.state_shapes.items())
    return ModelSpec(
        format=model_file.FORMAT,
        name="heart-beats",
        pipeline="scores",
        input=Input(POINTS_HZ, "mV"),
        hop_samples=INPUTS,
        window_samples=INPUTS,
        stages=(Stage("x", (1, INPUTS), states=states),),
        outputs=(
            Output("beat_class", "beat_class", data.LABELS),
            Output("rhythm", "rhythm", RHYTHMS),
        ),
        licence="Apache-2.0; trained on MIT-BIH Arrhythmia, ODC-By 1.0, and CinC 2017, ODC-By 1.0",
        provenance=provenance,
        gap="hold",
    )


def provenance(seed: int, command: str) -> str:
    """Return where a model is from: data, records, seed, command, date and version."""
    return (
        "MIT-BIH Arrhythmia Database 1.0.0, all records of DS1, and the records of the split "
        "'train' of the PhysioNet/CinC Challenge 2017 (PhysioNet, ODC-By 1.0); "
        f"seed {seed}; {command}; {datetime.date.today().isoformat()}; torch {torch.__version__}"
    )


def main() -> None:
    arguments = _parse()
    console = Console()
    torch.set_num_threads(arguments.threads)
    names = sorted(data.TRAINING + data.VALIDATION)
    strips = [read(arguments.data / "mitdb", name) for name in track(names, "mitdb")]
    cinc, kept = arguments.data / "cinc2017", arguments.runs
    records, held = (read_cinc(cinc, kept, split) for split in ("train", "valid"))
    left_out = FOLDS[arguments.fold] if arguments.fold is not None else ()
    taught = [strip for strip in strips if strip.name not in left_out]
    run = "all" if arguments.fold is None else f"fold{arguments.fold}"
    path = arguments.runs / f"{run}-seed{arguments.seed}.pt"
    net = train(taught, records, path, arguments.epochs, arguments.seed)
    for leads in (LEADS, 1):
        unseen = [strip for strip in strips if strip.name in left_out]
        if unseen:
            figures = judge([net], unseen, held, leads)
            console.print(f"{leads} lead(s)", table(figures), sep="\n", markup=False)
            counts = {name: made.tolist() for name, made in figures.records.items()}
            path.with_suffix(f".{leads}.json").write_text(json.dumps(counts))
    if arguments.fold is None:
        command = "python -m training.beats " + shlex.join(sys.argv[1:])
        spec = statement(net, provenance(arguments.seed, command.strip()))
        export(net, spec, arguments.output, hop_by_hop=True)
        console.print(table(judge([net], [], held)), markup=False)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data/ecg"))
    parser.add_argument("--runs", type=Path, default=Path("runs/beats"), help="checkpoints")
    parser.add_argument("--output", type=Path, default=model_file.BUNDLED / "heart-beats.onnx")
    parser.add_argument("--fold", type=int, choices=range(len(FOLDS)), help="of patients, left out")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
