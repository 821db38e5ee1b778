"""Heart streams written down as WFDB records, which any viewer of electrocardiograms opens.

A :class:`Record` is three files: ``.hea`` says what there is, ``.dat`` holds the calibrated
samples (format 16), ``.atr`` what was found: beats, alerts, gaps. :class:`Recorder` fills records
in a thread of its own. The engine only hands things over, and never waits: what finds the queue
full is counted, and missing samples are marked as such in the record. After every flush the
three files agree with each other, so a server that is killed leaves records that can be read.

The formats are those of https://wfdb.mit.edu: header(5), signal(5), annot(5).
"""

import logging
import math
import os
import queue
import re
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from heapq import heappop, heappush
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.messages import NOTICE, Alert, Beat, Bridged, Gap, Message, Open

log = logging.getLogger(__name__)

INVALID = -32768  # of format 16: no sample
_MOST = 32767
# Steps in a unit, where a stream has none of its own: 1 uV of a stream in mV.
_STEPS = 1000.0
# Results come behind the signal; so long an annotation waits for one that lies before it.
_SETTLED_S = 10.0
_LONGEST_GAP_S = 3600.0  # filled with invalid samples; a longer one begins another record
_MAX_QUEUED = 20_000  # chunks and results
RECORDED = (Beat, Gap, Bridged, Alert)
_BLOCK = 65_536  # samples of a gap written at once

# Codes of annot(5). AAMI's classes as the least special of the types that they stand for.
_BEATS = {"N": 1, "S": 9, "V": 5, "F": 6, "Q": 13}
_NOTE, _RHYTHM = 22, 28
_SKIP, _AUX = 59, 63
_MAX_AUX = 254  # bytes
# Rules that name a rhythm, as `+` annotations do.
_RHYTHMS = {
    "atrial_fibrillation_suspected": "(AFIB",
    "bigeminy": "(B",
    "ventricular_fibrillation_suspected": "(VFL",
    "ventricular_tachycardia": "(VT",
}
_RHYTHM_OVER = "(U"  # unclassified: nobody said that what follows is normal


class Scale(NamedTuple):
    """How a channel's values become integers: round(value * steps) + baseline."""

    steps: float  # in a unit
    baseline: int


class Signal(NamedTuple):
    """What samples are."""

    unit: str
    steps: list[tuple[float, float]]  # each channel's gain and offset in that unit


class Note(NamedTuple):
    """One annotation of a record."""

    code: int
    text: str = ""


class Record:
    """One stream's files.

    Parameters
    ----------
    folder : Path
    name : str
        Letters, digits, ``_`` and ``-``; no file of that name is overwritten.
    opened : Open
    signal : Signal
    first : int
        The stream's index of the record's first sample.
    comments : list of str
        For people, in the header.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        opened: Open,
        signal: Signal,
        first: int,
        comments: list[str],
    ) -> None:
        self.name, self.first, self.end = name, first, first
        self._folder, self._opened, self._of = folder, opened, signal
        self._comments = comments
        self._start = datetime.now(UTC)
        self._scales: list[Scale] = []
        self._checksum = np.zeros(opened.channels, np.int64)
        self._initial = np.full(opened.channels, INVALID)
        self._settled_samples = round(_SETTLED_S * opened.rate_hz)
        self._waiting: list[tuple[int, int, Note]] = []  # by index, then in the order of arrival
        self._noted = 0
        self._last = 0  # sample of the last annotation that was written
        self._clipped = False
        self._signal: BinaryIO = (folder / f"{name}.dat").open("xb")
        self._annotations: BinaryIO = (folder / f"{name}.atr").open("xb")
        self.bytes = 0

    def samples(self, index: int, values: NDArray[np.float32]) -> None:
        """Take (samples, channels) that begin at an index, behind those before."""
        if not self._scales:
            self._scales = _scales(self._opened, self._of, values[0])
        lost = index - self.end
        for begin in range(0, lost, _BLOCK):
            count = min(_BLOCK, lost - begin)
            self._write(np.full((count, self._opened.channels), INVALID, "<i2"))
        steps, baselines = np.array(self._scales).T
        wanted = np.rint(values * steps) + baselines
        # The least number of 16 bits means that there is no sample.
        clipped = bool((np.abs(wanted) > _MOST).any())
        if clipped and not self._clipped:
            self.note(index, Note(_NOTE, "beyond what 16 bits hold"))
        self._clipped = clipped
        self._write(np.clip(wanted, -_MOST, _MOST).astype("<i2"))
        self.end = index + len(values)

    def note(self, index: int, note: Note) -> None:
        """Take an annotation; it is written once no other is expected to lie before it."""
        # A note at sample 0 is taken by the wfdb package for one that defines labels.
        least = self.first + (note.code == _NOTE)
        heappush(self._waiting, (max(index, least), self._noted, note))
        self._noted += 1

    def flush(self) -> None:
        """Make what has come so far readable."""
        self._signal.flush()
        self._write_notes(self.end - self._settled_samples)
        self._annotations.flush()
        self._write_header()

    def close(self) -> None:
        """Write all that waits, and the end."""
        self._write_notes(math.inf)
        self._write_header()
        self._signal.close()
        self._annotations.close()

    def _write(self, values: NDArray[np.int16]) -> None:
        if (self._initial == INVALID).all() and len(values):
            self._initial = values[0]
        self._checksum += values.sum(axis=0, dtype=np.int64)
        self.bytes += self._signal.write(values.tobytes())

    def _write_notes(self, until: float) -> None:
        while self._waiting and self._waiting[0][0] < until:
            index, _, note = heappop(self._waiting)
            # One that comes too late for its place stands where the file is.
            sample = max(self._last, index - self.first)
            self._annotations.write(_annotation(sample - self._last, note))
            self._last = sample
        self.bytes += 2
        self._annotations.write(bytes(2))  # the end; the next annotation replaces it
        self._annotations.flush()
        self._annotations.seek(-2, os.SEEK_END)

    def _write_header(self) -> None:
        """Put a new header in the place of the old one, as a whole."""
        opened = self._opened
        count = self.end - self.first
        begin = (
            f"{self._start:%H:%M:%S}.{self._start.microsecond // 1000:03} {self._start:%d/%m/%Y}"
        )
        lines = [f"{self.name} {opened.channels} {opened.rate_hz:.10g} {count} {begin}"]
        for number, scale in enumerate(self._scales):
            gain = f"{scale.steps!r}({scale.baseline})/{self._of.unit}"
            checksum = (int(self._checksum[number]) + 2**15) % 2**16 - 2**15
            channel = _channel_name(opened, number)
            lines.append(
                f"{self.name}.dat 16 {gain} 16 0 {self._initial[number]} {checksum} 0 {channel}"
            )
        lines += [f"# {comment}" for comment in self._comments]
        path = self._folder / f"{self.name}.hea"
        new = path.with_suffix(".hea.new")
        new.write_text("\n".join(lines) + "\n", encoding="ascii", errors="replace")
        new.replace(path)


class Recorder:
    """Records of any number of streams, filled by a thread.

    Parameters
    ----------
    folder : Path
        Is made if it is not there.
    max_mb : float
        MiB that all files in the folder may take; then recording ends, which is logged.
    flush_s : float
        After so long what has come can be read.

    Attributes
    ----------
    lost : int
        Chunks and results that found the queue full.
    """

    def __init__(self, folder: Path, max_mb: float, flush_s: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._flush_s = folder, flush_s
        taken = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        self._left = max_mb * 2**20 - taken
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(_MAX_QUEUED)
        self._streams: dict[str, _Stream] = {}  # of the thread
        self.lost = 0
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()

    # --- of the engine: hands over, and returns at once ------------------------------------

    def open(
        self, opened: Open, signal: Signal, model: str
    ) -> Callable[[int, NDArray[np.float32]], None]:
        """Begin a stream; return what takes the samples of each chunk, in the signal's unit."""
        name = opened.stream
        self._put(lambda: self._begin(opened, signal, model))
        return lambda index, values: self._put(lambda: self._samples(name, index, values))

    def note(self, stream: str, message: Message) -> None:
        """Take what was told of a stream."""
        self._put(lambda: self._note(stream, message))

    def close(self, stream: str) -> None:
        """End a stream's record."""
        self._put(lambda: self._end(stream))

    def stop(self) -> None:
        """Write all that was handed over, close all records, and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _put(self, task: Callable[[], None]) -> None:
        try:
            self._queue.put_nowait(task)
        except queue.Full:
            self.lost += 1

    # --- of the thread ---------------------------------------------------------------------

    def _run(self) -> None:
        flush_at = time.monotonic() + self._flush_s
        while True:
            try:
                task = self._queue.get(timeout=max(0.0, flush_at - time.monotonic()))
            except queue.Empty:
                task = _nothing
            if task is None:
                break
            self._guard(task)
            if time.monotonic() >= flush_at:
                self._guard(self._flush)
                flush_at = time.monotonic() + self._flush_s
        for stream in list(self._streams):
            self._guard(partial(self._end, stream))

    def _guard(self, task: Callable[[], None]) -> None:
        """Run a task; what the disk refuses ends recording, and nothing else."""
        try:
            task()
        except OSError as error:
            log.error("recording ends: %s", error)
            self._left = -math.inf
            self._streams.clear()

    def _begin(self, opened: Open, signal: Signal, model: str) -> None:
        if self._left > 0:
            self._streams[opened.stream] = _Stream(opened, signal, model)

    def _samples(self, name: str, index: int, values: NDArray[np.float32]) -> None:
        stream = self._streams.get(name)
        if stream is None:
            return
        record = stream.record
        if record is not None and index - record.end > _LONGEST_GAP_S * stream.opened.rate_hz:
            self._close(stream)
            record = None
        if record is None:
            record = stream.record = self._new_record(stream, index)
        before = record.bytes
        record.samples(index, values)
        self._spend(record.bytes - before)

    def _note(self, name: str, message: Message) -> None:
        stream = self._streams.get(name)
        if stream is not None and stream.record is not None:
            for index, note in _notes(message):
                stream.record.note(index, note)

    def _flush(self) -> None:
        for stream in self._streams.values():
            if stream.record is not None:
                before = stream.record.bytes
                stream.record.flush()
                self._left -= stream.record.bytes - before

    def _end(self, name: str) -> None:
        stream = self._streams.pop(name, None)
        if stream is not None:
            self._close(stream)

    def _close(self, stream: "_Stream") -> None:
        if stream.record is not None:
            stream.record.close()
            stream.record = None

    def _spend(self, count: int) -> None:
        self._left -= count
        if self._left <= 0:
            log.warning("recording ends: %s is full, see record.max_mb", self._folder.name)
            for name in list(self._streams):
                self._end(name)

    def _new_record(self, stream: "_Stream", first: int) -> Record:
        opened = stream.opened
        stem = re.sub(r"[^A-Za-z0-9_-]", "_", opened.stream)
        stem += f"_{datetime.now(UTC):%Y%m%dT%H%M%S}"
        number = 1
        while (self._folder / f"{stem}_{number}.dat").exists():
            number += 1
        comments = [
            f"stream {opened.stream}, first sample {first}, model {stream.model}",
            f"subject {opened.subject or opened.stream}",
            NOTICE,
        ]
        if opened.device is not None:
            made = opened.device
            said = " ".join(filter(None, (made.make, made.model, made.serial)))
            comments.insert(2, f"device {said}")
        name = f"{stem}_{number}"
        return Record(self._folder, name, opened, stream.signal, first, comments)


class _Stream:
    """A stream that is recorded, and its record once samples have come."""

    def __init__(self, opened: Open, signal: Signal, model: str) -> None:
        self.opened, self.signal, self.model = opened, signal, model
        self.record: Record | None = None


def _nothing() -> None:
    """Nothing has come; it is time to flush."""


def _notes(message: Message) -> list[tuple[int, Note]]:
    """Return the annotations of what was told, each with its index."""
    match message:
        case Beat():
            return [(message.index, Note(_BEATS[message.label]))]
        case Gap():
            text = f"gap of {message.end - message.start} samples, state: {message.state}"
            return [(message.start, Note(_NOTE, text))]
        case Bridged():
            text = f"bridged {message.end - message.start} samples"
            return [(message.start, Note(_NOTE, text))]
        case Alert():
            text = f"alert {message.rule} {message.state}, {message.priority} priority"
            told = [(message.index, Note(_NOTE, text))]
            rhythm = _RHYTHMS.get(message.rule)
            if rhythm is not None and message.state == "active":
                told.append((message.index, Note(_RHYTHM, rhythm)))
            elif rhythm is not None and _is_over(message):
                told.append((message.index, Note(_RHYTHM, _RHYTHM_OVER)))
            return told
        case _:
            return []


def _is_over(alert: Alert) -> bool:
    """Return whether what had been active is not any more."""
    over = ("resolved", "inactive")
    return alert.state in over and alert.from_state not in (*over, "pending")


def _annotation(interval: int, note: Note) -> bytes:
    """Return an annotation that lies so many samples behind the one before."""
    head = b""
    if interval > 1023:  # does not fit beside the code: a long number, its high half first
        head = (_SKIP << 10).to_bytes(2, "little")
        head += (interval >> 16).to_bytes(2, "little") + (interval & 0xFFFF).to_bytes(2, "little")
        interval = 0
    word = (note.code << 10 | interval).to_bytes(2, "little")
    text = note.text.encode("ascii", "replace")[:_MAX_AUX]
    if not text:
        return head + word
    aux = (_AUX << 10 | len(text)).to_bytes(2, "little") + text + bytes(len(text) % 2)
    return head + word + aux


def _scales(opened: Open, signal: Signal, first: NDArray[np.float32]) -> list[Scale]:
    """Return each channel's scale: the stream's own steps, or steps around its first value."""
    if opened.dtype == "i2":
        return [Scale(1 / abs(step), -round(offset / abs(step))) for step, offset in signal.steps]
    return [Scale(_STEPS, -round(value * _STEPS)) for value in first.tolist()]


def _channel_name(opened: Open, number: int) -> str:
    stated = opened.channel_info[number].name if opened.channel_info else ""
    return " ".join(stated.split()) or f"channel {number}"
