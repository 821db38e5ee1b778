"""How good a heart model is, streamed as the engine streams it: beats found, and their classes.

``python -m training.evaluate engine/models/heart.onnx`` prints a table. A found beat is right
within 150 ms of an annotated one (AAMI EC57); each counts once. Whole records are scored, with
no learning period left out. With ``--served`` the recordings go through a real server, over its
socket, and the table is the same.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from wfdb.processing import compare_annotations

from engine import messages, model_file
from engine.child import serving
from engine.client import Client
from engine.heart.beats import Beat, BeatFinder
from engine.model_file import Model, ModelSpec
from engine.runtime import CpuRuntime
from engine.signal import Front
from training import data
from training.data import LABELS, Recording

MATCH_S = 0.15
_CHUNK = 181  # samples; no multiple of a hop
_NONE = len(LABELS)  # the row of beats found where none was, the column of beats missed


class Score(NamedTuple):
    """Counts of one or of several records.

    ``confusion[annotated, found]`` has a sixth row and column: false and missed beats.
    """

    confusion: NDArray[np.int64]  # (labels + 1, labels + 1)

    @property
    def sensitivity(self) -> float:
        return _ratio(self._hits, self.confusion[:_NONE].sum())

    @property
    def predictivity(self) -> float:
        return _ratio(self._hits, self.confusion[:, :_NONE].sum())

    @property
    def f1(self) -> float:
        """Of beats, whatever their class."""
        return _ratio(2 * self._hits, self.confusion.sum() + self._hits)

    def class_f1(self, label: str) -> float:
        """Of one class; a missed beat and a false one are errors of class too."""
        index = LABELS.index(label)
        hits = self.confusion[index, index]
        return _ratio(2 * hits, self.confusion[index].sum() + self.confusion[:, index].sum())

    @property
    def _hits(self) -> int:
        return int(self.confusion[:_NONE, :_NONE].sum())


def score(recording: Recording, beats: Sequence[Beat], rate_hz: float) -> Score:
    """Compare found beats with a recording's annotations."""
    inside = [beat for beat in beats if 0 <= beat.position < len(recording.signal)]
    found = np.array([beat.position for beat in inside], np.int64)
    classes = np.array([LABELS.index(beat.label) for beat in inside], np.int64)
    partner = match(recording.beats, found, round(MATCH_S * rate_hz))
    false = np.setdiff1d(np.arange(len(found)), partner)
    # A missed beat's partner is -1, which takes the _NONE put behind the classes.
    annotated = np.append(recording.classes, np.full(len(false), _NONE))
    answered = np.append(np.append(classes, _NONE)[partner], classes[false])
    cells = np.bincount(annotated * (_NONE + 1) + answered, minlength=(_NONE + 1) ** 2)
    return Score(cells.reshape(_NONE + 1, _NONE + 1))


def match(
    annotated: NDArray[np.int64], found: NDArray[np.int64], tolerance: int
) -> NDArray[np.int64]:
    """Return each annotated beat's index in `found`, or -1, one to one.

    Both are in order. `tolerance` samples apart is still a match.
    """
    if not len(found) or not len(annotated):
        return np.full(len(annotated), -1)
    # wfdb counts a difference below its window, not one that equals it.
    partner: NDArray[np.int64] = compare_annotations(
        annotated, found, tolerance + 1
    ).matching_sample_nums
    return partner


def gross(scores: Sequence[Score]) -> Score:
    """Add up the counts of several records."""
    return Score(np.sum([score.confusion for score in scores], axis=0))


def stream(model: Model, signals: NDArray[np.float32]) -> list[list[Beat]]:
    """Run recordings through a model hop by hop, with the state carried from end to end.

    Parameters
    ----------
    model : Model
    signals : (recordings, samples, leads) float32
        Side by side, in the model's unit and at its rate.

    Returns
    -------
    list of list of Beat
        One list a recording.
    """
    spec, rows = model.spec, len(signals)
    hop = spec.hop_samples
    # The last value goes on until every beat of the recording is decided.
    tail = -signals.shape[1] % hop + 4 * hop
    signals = np.pad(signals, ((0, 0), (0, tail), (0, 0)), mode="edge")
    slots = np.arange(rows)
    front, finder = Front(spec, rows), BeatFinder(spec, rows)
    runtime = CpuRuntime(model, rows)
    for slot in range(rows):
        runtime.reset(slot)
    beats: list[list[Beat]] = [[] for _ in range(rows)]
    for start in range(0, signals.shape[1], hop):
        windows = front.push(slots, signals[:, start : start + hop])
        outputs = runtime.step(slots, windows)
        for row, beat in finder.push(slots, outputs, np.full(rows, start)):
            beats[row].append(beat)
    return beats


def serve(model: str, signals: NDArray[np.float32]) -> list[list[Beat]]:
    """Send recordings to a real server, a stream each, and return the beats that it tells.

    Parameters
    ----------
    model : str
        A model file, or the name of a bundled model.
    signals : (recordings, samples, leads) float32
        In the model's unit and at its rate.

    Returns
    -------
    list of list of Beat
        One list a recording.
    """
    spec = model_file.load(model).spec
    beats: list[list[Beat]] = [[] for _ in signals]
    with serving(model) as server, Client(server.address) as client:

        def take() -> None:
            for told in client.events():
                if isinstance(told, messages.Beat):
                    beat = Beat(told.index, told.label, told.probability, told.decided_at)
                    beats[int(told.stream)].append(beat)

        streams = [
            client.open(
                str(number),
                spec.name,
                spec.input.rate_hz,
                spec.input.unit,
                channels=signals.shape[2],
            )
            for number in range(len(signals))
        ]
        for start in range(0, signals.shape[1], _CHUNK):
            for one, signal in zip(streams, signals, strict=True):
                one.send(signal[start : start + _CHUNK])
            take()
        for one in streams:
            one.flush()
        take()
    return beats


def table(names: Sequence[str], scores: Sequence[Score]) -> str:
    """Return one line a record and one for all, in percent."""
    lines = [f"{'record':>8} {'Se':>7} {'+P':>7} {'F1':>7} {'V F1':>7} {'S F1':>7}"]
    for name, one in zip([*names, "gross"], [*scores, gross(scores)], strict=True):
        figures = (
            one.sensitivity, one.predictivity, one.f1, one.class_f1("V"), one.class_f1("S")
        )  # fmt: skip
        lines.append(f"{name:>8} " + " ".join(f"{100 * figure:7.2f}" for figure in figures))
    return "\n".join(lines)


def evaluate(model: Model, recordings: Sequence[Recording]) -> list[Score]:
    """Score a model on recordings of one length."""
    found = stream(model, leads(recordings, model.spec))
    rate_hz = model.spec.input.rate_hz
    return [score(r, beats, rate_hz) for r, beats in zip(recordings, found, strict=True)]


def leads(recordings: Sequence[Recording], spec: ModelSpec) -> NDArray[np.float32]:
    """Return as many leads as a model takes, (recordings, samples, leads)."""
    return np.stack([recording.signal[:, : spec.input.channels] for recording in recordings])


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a model file, or the name of a bundled model")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/ecg/mitdb"))
    parser.add_argument("--records", nargs="+", default=data.VALIDATION)
    parser.add_argument("--served", action="store_true", help="by a real server, over its socket")
    parser.add_argument("--json", action="store_true", help="one object, in its figure QRS F1")
    arguments = parser.parse_args()
    recordings = [data.read(arguments.data, name) for name in arguments.records]
    model = model_file.load(arguments.model)
    if arguments.served:
        found = serve(arguments.model, leads(recordings, model.spec))
        rate_hz = model.spec.input.rate_hz
        scores = [score(r, beats, rate_hz) for r, beats in zip(recordings, found, strict=True)]
    else:
        scores = evaluate(model, recordings)
    total = gross(scores)
    if arguments.json:
        classes = {f"{label.lower()}_f1": 100 * total.class_f1(label) for label in "VS"}
        print(json.dumps({"figure": 100 * total.f1, **classes}))  # noqa: T201 - the result
        return
    print(table(arguments.records, scores))  # noqa: T201 - the table is the command's result
    print(f"annotated x found, {' '.join(LABELS)} none:\n{total.confusion}")  # noqa: T201


if __name__ == "__main__":
    main()
