"""How the stages between beats and alerts do on recordings: the figures behind their limits.

Runs the bundled model and the whole heart wing over the MIT-BIH records and over CinC 2017 that
lie under ``--data``, and prints where atrial and ventricular fibrillation are suspected, what
the signal quality is, and what all of it costs a stream and second of signal. Nothing is chosen
here; ``python -m training.rhythm`` prints what training/LOG.md holds.
"""

import argparse
import csv
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import wfdb
from numpy.typing import NDArray

from engine import messages, model_file
from engine.heart.wing import HeartWing
from engine.model_file import Model
from engine.runtime import CpuRuntime
from engine.signal import Front, Resampler
from engine.wing import Rows

_BATCH = 32
_HOPS = 6
_SUSPECTED = 0.5


class Stream(NamedTuple):
    """A time axis that is the model's own."""

    name: str
    rate_hz: float

    def index_at(self, position: int) -> int:
        return position

    def needed_until(self, position: int) -> int:
        return position


class Heard(NamedTuple):
    """What was told of some recordings, and the time it took."""

    measures: list[list[messages.Measures]]
    wing_s: float
    model_s: float


def listen(model: Model, signals: Sequence[NDArray[np.float32]]) -> Heard:
    """Play recordings of one lead, in mV at the model's rate, side by side."""
    spec, count = model.spec, len(signals)
    step = _HOPS * spec.hop_samples
    length = -(-max(map(len, signals)) // step) * step
    samples = np.zeros((count, length, spec.input.channels), np.float32)  # other leads are off
    for slot, signal in enumerate(signals):
        samples[slot, :, 0] = np.pad(signal, (0, length - len(signal)), "edge")
    runtime, front = CpuRuntime(model, count), Front(spec, count)
    wing = HeartWing(spec, count)
    streams = [Stream(str(slot), spec.input.rate_hz) for slot in range(count)]
    for slot in range(count):
        runtime.reset(slot)
        front.reset(slot)
        wing.reset(slot)
    slots, begin = np.arange(count), np.zeros(count, np.int64)
    end = np.array([len(one) for one in signals])
    heard = Heard([[] for _ in signals], 0.0, 0.0)
    for position in range(0, length, step):
        piece = samples[:, position : position + step]
        t0 = time.thread_time()
        outputs = runtime.step(slots, front.push(slots, piece))
        t1 = time.thread_time()
        rows = Rows(slots, _HOPS, np.full(count, position), begin, end, streams, piece)
        told = wing.push(rows, outputs)
        t2 = time.thread_time()
        heard = heard._replace(wing_s=heard.wing_s + t2 - t1, model_s=heard.model_s + t1 - t0)
        for row, message in told:
            if isinstance(message, messages.Measures):
                heard.measures[row].append(message)
    return heard


def column(told: Sequence[messages.Measures], name: str) -> NDArray[np.float64]:
    """Return (index, value) of each telling of a measure, (tellings, 2)."""
    found = [(one.index, one.values[name]) for one in told if name in one.values]
    return np.array(found).reshape(-1, 2)


def episodes(folder: Path, name: str) -> list[tuple[int, int, str]]:
    """Return the annotated rhythms of a record as (start, end, rhythm)."""
    annotation = wfdb.rdann(str(folder / name), "atr")
    notes = zip(annotation.sample, annotation.aux_note, strict=True)
    marks = [(int(at), note.strip("\0")) for at, note in notes if note.startswith("(")]
    ends = [at for at, _ in marks[1:]] + [wfdb.rdheader(str(folder / name)).sig_len]
    return [(at, end, rhythm) for (at, rhythm), end in zip(marks, ends, strict=True)]


def noisy(folder: Path, name: str) -> list[tuple[int, int]]:
    """Return where the annotators called the first lead noisy or unreadable, (start, end)."""
    annotation = wfdb.rdann(str(folder / name), "atr")
    marks = [
        (int(at), subtype < 0 or subtype & 0x11 > 0)  # bits 0 and 4: of the first signal
        for at, symbol, subtype in zip(
            annotation.sample, annotation.symbol, annotation.subtype, strict=True
        )
        if symbol == "~"
    ]
    marks.append((wfdb.rdheader(str(folder / name)).sig_len, False))
    return [(at, end) for (at, bad), (end, _) in pairwise(marks) if bad]


def inside(at: NDArray[np.float64], stretches: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    """Return which of some places lie within one of some stretches."""
    found = np.zeros(len(at), bool)
    for start, end in stretches:
        found |= (at >= start) & (at < end)
    return found


def mitdb(model: Model, folder: Path) -> Iterator[str]:
    names = (folder / "RECORDS").read_text().split()
    signals = []
    for name in names:
        record = wfdb.rdrecord(str(folder / name))
        lead = record.sig_name.index("MLII") if "MLII" in record.sig_name else 0
        signals.append(record.p_signal[:, lead].astype(np.float32))
    heard = listen(model, signals)
    seconds = sum(map(len, signals)) / model.spec.input.rate_hz
    yield (
        f"us of CPU a stream and second: model and filters {1e6 * heard.model_s / seconds:.0f}"
        f", beats to measures {1e6 * heard.wing_s / seconds:.0f}"
    )
    yield "AF and VF suspected, second by second; quality: share good, poor, bad"
    verdicts: dict[bool, list[NDArray[np.float64]]] = {True: [], False: []}
    for name, told in zip(names, heard.measures, strict=True):
        rhythms = episodes(folder, name)
        af = [(start, end) for start, end, rhythm in rhythms if rhythm == "(AFIB"]
        flutter = [(start, end) for start, end, rhythm in rhythms if rhythm == "(AFL"]
        vf = [(start, end) for start, end, rhythm in rhythms if rhythm == "(VFL"]
        at, value = column(told, "af_suspected").T
        scored = ~inside(at, flutter)
        is_af, said = inside(at, af)[scored], value[scored] >= _SUSPECTED
        line = f"{name} AF Sp {1 - said[~is_af].mean():.4f} of {np.sum(~is_af)} s"
        if is_af.any():
            line += f", Se {said[is_af].mean():.4f} of {is_af.sum()} s"
        at, value = column(told, "fibrillation_suspected").T
        alarms = at[value >= _SUSPECTED]
        # A window of four seconds, and three more until its hit is forgotten.
        near = inside(alarms, [(start, end + 7 * 360) for start, end in vf])
        line += f"; VF s outside {np.sum(~near)}"
        if vf:
            found = [(alarms[(alarms >= a) & (alarms < b + 360 * 4)][:1] - a) / 360 for a, b in vf]
            line += ", after " + " ".join(f"{f[0]:.1f}" if len(f) else "never" for f in found)
        at, verdict = column(told, "quality").T
        line += "; quality " + shares(verdict)
        yield line
        noise = inside(at, noisy(folder, name))
        for annotated in (True, False):
            verdicts[annotated].append(verdict[noise == annotated])
    for annotated, found in verdicts.items():
        every = np.concatenate(found)
        yield f"annotated as {'noisy' if annotated else 'clean'}: {shares(every)} of {len(every)} s"


def cinc(model: Model, folder: Path) -> Iterator[str]:
    with (folder / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    rows.sort(key=lambda row: wfdb.rdheader(str(folder / row["record"])).sig_len)
    af: dict[tuple[str, str], list[float]] = {}
    quality: dict[str, list[NDArray[np.float64]]] = {}
    vf: dict[str, list[float]] = {}
    for begin in range(0, len(rows), _BATCH):
        part = rows[begin : begin + _BATCH]
        heard = listen(model, [_at_model_rate(folder / row["record"]) for row in part])
        for row, told in zip(part, heard.measures, strict=True):
            label = row["label"]
            value = column(told, "af_suspected")[:, 1]
            af.setdefault((row["split"], label), []).append(value[-1] if len(value) else np.nan)
            quality.setdefault(label, []).append(column(told, "quality")[:, 1])
            vf.setdefault(label, []).append(
                float(np.any(column(told, "fibrillation_suspected")[:, 1] >= _SUSPECTED))
            )
    for (split, label), values in sorted(af.items()):
        known = np.array(values)[~np.isnan(values)]
        yield (
            f"{split} {label}: AF suspected at the end in {(known >= _SUSPECTED).mean():.3f} of "
            f"{len(known)}, not known in {len(values) - len(known)}"
        )
    for label, verdicts in sorted(quality.items()):
        means = np.array([np.mean(one == 2) for one in verdicts if len(one)])
        yield (
            f"{label}: seconds {shares(np.concatenate(verdicts))}; records with less than half "
            f"good {np.mean(means < 0.5):.3f}; with VF suspected {sum(vf[label]):.0f} of "
            f"{len(vf[label])}"
        )


def _at_model_rate(path: Path) -> NDArray[np.float32]:
    record = wfdb.rdrecord(str(path))
    resampler = Resampler(Fraction(360, int(record.fs)), 1)
    samples = record.p_signal.astype(np.float32)
    return np.concatenate([resampler.push(samples), resampler.flush()])[:, 0]


def shares(verdict: NDArray[np.float64]) -> str:
    return " ".join(f"{np.mean(verdict == value):.3f}" for value in (2, 1, 0))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--cinc", action="store_true", help="CinC 2017 as well: some minutes")
    parser.add_argument("--model", default="heart", help="a heart model, by name or file")
    options = parser.parse_args()
    model = model_file.load(model_file.find(options.model))
    for line in mitdb(model, options.data / "ecg" / "mitdb"):
        print(line)  # noqa: T201 - the result
    if options.cinc:
        for line in cinc(model, options.data / "ecg" / "cinc2017"):
            print(line)  # noqa: T201 - the result


if __name__ == "__main__":
    main()
