"""How well rhythms are told apart, through a real server: normal, fibrillation, other, noise.

In the manner of the PhysioNet/CinC challenge of 2017: a folder of short records with a table
``labels.csv`` of the columns ``record,label[,split]``, and of each class F1 = 2 x (records that are
it and are called it) / (records that are it + records that are called it). What a server says of a
record is the likeliest of the measures ``rhythm_n``, ``rhythm_a``, ``rhythm_o`` and
``rhythm_noise`` as they were told last.
"""

import csv
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from engine import annotated, keys, model_file
from engine.child import running
from engine.client import Client
from engine.errors import MurmurError
from engine.messages import Measures, Message
from engine.progress import Bar
from engine.ward import Plan, Signal, watch

Report = dict[str, Any]

LABELS = ("N", "A", "O", "~")
MEASURES = ("rhythm_n", "rhythm_a", "rhythm_o", "rhythm_noise")
_KEYS = ("f1_n", "f1_a", "f1_o", "f1_noise")
_NONE = len(LABELS)  # the column of records of which nothing was said
_TABLE = "labels.csv"


class Entry(NamedTuple):
    """A line of the table."""

    record: str
    label: str


class Evaluation(NamedTuple):
    """What came of all records, and what was said of each: ``record``, ``label``, ``told``."""

    report: Report
    answers: list[Report]


def read(folder: Path, split: str | None = None, limit: int | None = None) -> list[Entry]:
    """Read which record has which rhythm.

    Parameters
    ----------
    folder : Path
    split : str, optional
        Only these lines.
    limit : int, optional
        Only so many, evenly spread over the whole.

    Raises
    ------
    MurmurError
        If there is no such table, or a label is none of N, A, O and ~.
    """
    file = folder / _TABLE
    if not file.is_file():
        raise MurmurError(f"{folder}: expected a table {_TABLE}, found none")
    with file.open(encoding="utf-8", newline="") as opened:
        rows = list(csv.DictReader(opened))
    wanted = {"record", "label"} | ({"split"} if split is not None else set())
    if not rows or wanted - rows[0].keys():
        raise MurmurError(f"{file}: expected lines with the columns {', '.join(sorted(wanted))}")
    entries = [
        Entry(row["record"], row["label"]) for row in rows if split in (None, row.get("split"))
    ]
    strange = sorted({entry.label for entry in entries} - {*LABELS})
    if strange:
        raise MurmurError(f"{file}: expected labels among {', '.join(LABELS)}, found {strange}")
    if not entries:
        raise MurmurError(f"{file}: there are no lines of the split {split!r}")
    if limit is not None and limit < len(entries):
        entries = [entries[k * len(entries) // limit] for k in range(limit)]
    return entries


def answer(told: Sequence[Message]) -> str | None:
    """Return the rhythm that was told last; None if none was."""
    values: dict[str, float] = {}
    for message in told:
        if isinstance(message, Measures):
            values |= {name: message.values[name] for name in MEASURES if name in message.values}
    if not values:
        return None
    likeliest = max(MEASURES, key=lambda name: values.get(name, -np.inf))
    return LABELS[MEASURES.index(likeliest)]


def score(labels: Sequence[str], answers: Sequence[str | None]) -> Report:
    """Return F1 of each class in percent, and the mean of N, A and O as the figure.

    A record of which nothing was said counts as one of its class that was not called so.
    """
    counts = np.zeros((_NONE, _NONE + 1), np.int64)
    for label, told in zip(labels, answers, strict=True):
        counts[LABELS.index(label), _NONE if told is None else LABELS.index(told)] += 1
    f1 = [_f1(counts, place) for place in range(_NONE)]
    known = [one for one in f1[:3] if one is not None]
    return {
        "figure": sum(known) / len(known) if len(known) == 3 else None,
        "what": "mean F1 of N, A and O, %",
        **dict(zip(_KEYS, f1, strict=True)),
        "records": len(labels),
        "silent": int(counts[:, _NONE].sum()),
        "labels": [*LABELS, "none"],
        "table": counts.tolist(),
    }


def _f1(counts: NDArray[np.int64], place: int) -> float | None:
    whole = int(counts[place].sum() + counts[:, place].sum())
    return 200 * int(counts[place, place]) / whole if whole else None


def evaluate(
    folder: Path,
    entries: Sequence[Entry],
    plan: Plan,
    console: Console,
    address: str | None = None,
    timeout_s: float = 30.0,
) -> Evaluation:
    """Send records to a server and compare what it says of their rhythm with their labels.

    Parameters
    ----------
    folder : Path
    entries : sequence of Entry
    plan : Plan
    console : Console
        For progress: not standard output.
    address : str, optional
        Of a running server; default: one is started.
    timeout_s : float
        How long the server may say nothing.

    Raises
    ------
    MurmurError
        If there is no such model or no server, or it says nothing of the rhythm of any record.
    """
    plan.check()
    leads = model_file.load(plan.model).spec.input.channels
    faults: list[str] = []

    def signals() -> Iterator[Signal]:
        for entry in entries:
            try:
                record = annotated.read(folder, entry.record, leads)
            except MurmurError as error:
                faults.append(str(error))
                continue
            yield Signal(entry.record, record.samples, record.rate_hz, record.unit)

    answers: dict[str, str | None] = {}
    signal_s = 0.0
    length_s = sum(annotated.length_s(folder, entry.record) for entry in entries)
    bar = Bar(console, length_s, "evaluating")
    with (
        running(plan.model, address) as (found_at, _),
        Client(found_at, timeout_s, keys.ours(address)) as client,
        bar,
    ):
        began = time.monotonic()
        for patient in watch(client, signals(), plan, bar.move):
            answers[patient.name] = answer(patient.told)
            faults += [patient.fault] if patient.fault else []
            signal_s += patient.seconds
            bar.over(patient.seconds)
        wall_s = time.monotonic() - began
    if not faults and not any(answers.values()):
        raise MurmurError(
            f"model {plan.model}: expected measures {', '.join(MEASURES)}, none was told"
        )
    told = [answers.get(entry.record) for entry in entries]
    report = {
        **score([entry.label for entry in entries], told),
        "model": plan.model,
        "signal_s": signal_s,
        "wall_s": wall_s,
        "faults": faults,
    }
    rows = [
        {"record": entry.record, "label": entry.label, "told": one}
        for entry, one in zip(entries, told, strict=True)
    ]
    return Evaluation(report, rows)


def lines(report: Report) -> Iterator[str]:
    """Yield a report's lines."""
    yield f"{'labelled x told':20} " + " ".join(f"{label:>6}" for label in report["labels"])
    for label, row in zip(LABELS, report["table"], strict=True):
        yield f"{label:>20} " + " ".join(f"{count:6d}" for count in row)
    for label, key in zip(LABELS, _KEYS, strict=True):
        yield f"{'F1 of ' + label:20} {_percent(report[key])}"
    yield f"{'mean of N, A, O':20} {_percent(report['figure'])}"
    if report["silent"]:
        yield f"{'nothing said of':20} {report['silent']} of {report['records']}"
    speed = report["signal_s"] / max(1e-9, report["wall_s"])
    yield f"{'speed':20} {speed:.0f} x real time"
    yield from (f"FAULT {fault}" for fault in report["faults"])


def _percent(figure: float | None) -> str:
    return "-" if figure is None else f"{figure:.2f} %"
