"""Annotated WFDB records of a folder: leads in their unit, beats, rhythms.

Needs the extra ``ecg``. Whatever the rate and the number of leads, of any database that keeps
its beats in ``.atr`` files; a record without one has no reference.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.ec57 import CLASS_OF, Beats, Reference
from engine.errors import MurmurError
from engine.recordings import extra, unit_of
from engine.signal import unit_factor

ANNOTATOR = "atr"
_FIRST_LEAD = "MLII"  # what models are trained on, where a record has it


class Record(NamedTuple):
    """One record."""

    name: str
    leads: tuple[str, ...]
    samples: NDArray[np.float32]  # (samples, leads) in `unit`; NaN where one is missing
    rate_hz: float
    unit: str
    reference: Reference | None


def names(folder: Path, chosen: list[str] | None = None) -> list[str]:
    """Return the records of a folder: those of its file ``RECORDS``, or all with a header.

    Raises
    ------
    MurmurError
        If there is none, or one of the chosen is not there.
    """
    if not folder.is_dir():
        raise MurmurError(f"{folder}: expected a folder of WFDB records")
    listing = folder / "RECORDS"
    if listing.is_file():
        listed = listing.read_text(encoding="utf-8").split()
        there = [name for name in listed if _header(folder, name).is_file()]
    else:
        headers = sorted(folder.rglob("*.hea"))
        there = [path.relative_to(folder).with_suffix("").as_posix() for path in headers]
    missing = [name for name in chosen or () if not _header(folder, name).is_file()]
    if missing:
        raise MurmurError(f"{folder}: there is no record {', '.join(missing)}")
    if not there and not chosen:
        raise MurmurError(f"{folder}: expected WFDB records (.hea), found none")
    return list(dict.fromkeys(chosen or there))


def length_s(folder: Path, name: str) -> float:
    """Return the seconds of a record, as its header states them; 0 if it states none."""
    try:
        header = extra("wfdb").rdheader(str((folder / name).absolute()))
    except (OSError, ValueError, IndexError, KeyError):  # told when its turn comes
        return 0.0
    return float(header.sig_len or 0) / float(header.fs)


def read(folder: Path, name: str, leads: int) -> Record:
    """Read a record and its annotations.

    Parameters
    ----------
    folder : Path
    name : str
    leads : int
        At most so many of them, MLII first where there is one.

    Raises
    ------
    MurmurError
        If it cannot be read.
    """
    wfdb, stem = extra("wfdb"), str((folder / name).absolute())
    try:
        record = wfdb.rdrecord(stem, return_res=32)
        has_beats = _header(folder, name).with_suffix(f".{ANNOTATOR}").is_file()
        annotation = wfdb.rdann(stem, ANNOTATOR) if has_beats else None
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise MurmurError(f"cannot read {folder / name}: {error}") from error
    if record.p_signal is None or not record.n_sig:
        raise MurmurError(f"{folder / name}: expected a signal, found none")
    order = sorted(range(record.n_sig), key=lambda lead: record.sig_name[lead] != _FIRST_LEAD)
    order = order[:leads]
    unit = unit_of(record.units[order[0]]) or "mV"  # WFDB's own, where a header states none
    samples = np.stack([_lead(record, lead, unit, folder / name) for lead in order], axis=1)
    rate_hz = float(record.fs)
    return Record(
        name,
        tuple(record.sig_name[lead] for lead in order),
        samples,
        rate_hz,
        unit,
        None if annotation is None else _reference(annotation, rate_hz, len(samples)),
    )


def _header(folder: Path, name: str) -> Path:
    return folder / f"{name}.hea"


def _lead(record: Any, lead: int, unit: str, path: Path) -> NDArray[np.float32]:
    """Return a lead in the unit of the first."""
    own = unit_of(record.units[lead]) or unit
    try:
        factor = unit_factor(own, unit)
    except ValueError as error:
        raise MurmurError(f"{path}, lead {record.sig_name[lead]}: {error}") from None
    samples: NDArray[np.float32] = (record.p_signal[:, lead] * factor).astype(np.float32)
    samples[~np.isfinite(samples)] = np.nan
    return samples


def _reference(annotation: Any, rate_hz: float, length: int) -> Reference:
    samples = np.asarray(annotation.sample, np.int64)
    symbols = np.array(annotation.symbol, dtype="U2")
    is_beat = np.isin(symbols, list(CLASS_OF)) & (samples >= 0) & (samples < length)
    labels = np.array([CLASS_OF[str(symbol)] for symbol in symbols[is_beat]], np.int64)
    return Reference(
        rate_hz,
        length,
        Beats(samples[is_beat], labels),
        _flutter(samples, symbols, length),
        _rhythms(annotation, length),
    )


def _flutter(
    samples: NDArray[np.int64], symbols: NDArray[np.str_], length: int
) -> list[tuple[int, int]]:
    """Return the stretches from [ to ], or to the record's end."""
    stretches = []
    start: int | None = None
    for sample, symbol in zip(samples.tolist(), symbols.tolist(), strict=True):
        if symbol == "[" and start is None:
            start = sample
        elif symbol == "]" and start is not None:
            stretches.append((start, sample))
            start = None
    if start is not None:
        stretches.append((start, length))
    return stretches


def _rhythms(annotation: Any, length: int) -> list[tuple[str, int, int]]:
    """Return each annotated rhythm and where it lasts: until the next one, or the end."""
    changes = [
        (note.strip("\x00 "), int(sample))
        for note, sample in zip(annotation.aux_note, annotation.sample, strict=True)
        if note.startswith("(")
    ]
    behind = [*changes, ("", length)]
    return [(name, start, end) for (name, start), (_, end) in pairwise(behind)]
