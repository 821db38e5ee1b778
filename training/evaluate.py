"""How good a heart model is, streamed as the engine streams it: beats found, and their classes.

``python -m training.evaluate engine/models/heart.onnx`` prints a table, scored by
:mod:`engine.ec57` over whole records. No server: ``murmur evaluate ecg`` sends the records
through one, and says the same and more.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine import ec57, model_file
from engine.ec57 import LABELS, Beats, Table
from engine.heart.beats import Beat, BeatFinder
from engine.model_file import Model
from engine.runtime import CpuRuntime
from engine.signal import Front
from training import data
from training.data import Recording


def score(recording: Recording, beats: Sequence[Beat], rate_hz: float) -> Table:
    """Compare found beats with a recording's annotations; nothing is left out."""
    inside = [beat for beat in beats if 0 <= beat.position < len(recording.signal)]
    found = Beats(
        np.array([beat.position for beat in inside], np.int64),
        np.array([LABELS.index(beat.label) for beat in inside], np.int64),
    )
    annotated = Beats(recording.beats, recording.classes)
    return ec57.compare(annotated, found, round(ec57.MATCH_S * rate_hz))


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


def table(names: Sequence[str], scores: Sequence[Table]) -> str:
    """Return one line a record and one for all, in percent."""
    lines = [f"{'record':>8} {'Se':>7} {'+P':>7} {'F1':>7} {'V F1':>7} {'S F1':>7}"]
    for name, one in zip([*names, "gross"], [*scores, ec57.gross(scores)], strict=True):
        figures = (
            one.sensitivity, one.predictivity, one.f1, one.of("V").f1, one.of("S").f1
        )  # fmt: skip
        lines.append(f"{name:>8} " + " ".join(f"{100 * figure:7.2f}" for figure in figures))
    return "\n".join(lines)


def evaluate(model: Model, recordings: Sequence[Recording]) -> list[Table]:
    """Score a model on recordings of one length."""
    channels = model.spec.input.channels
    leads = np.stack([recording.signal[:, :channels] for recording in recordings])
    found = stream(model, leads)
    rate_hz = model.spec.input.rate_hz
    return [score(r, beats, rate_hz) for r, beats in zip(recordings, found, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a model file, or the name of a bundled model")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/ecg/mitdb"))
    parser.add_argument("--records", nargs="+", default=data.VALIDATION)
    parser.add_argument("--json", action="store_true", help="one object, in its figure QRS F1")
    arguments = parser.parse_args()
    recordings = [data.read(arguments.data, name) for name in arguments.records]
    scores = evaluate(model_file.load(arguments.model), recordings)
    total = ec57.gross(scores)
    if arguments.json:
        classes = {f"{label.lower()}_f1": 100 * total.of(label).f1 for label in "VS"}
        print(json.dumps({"figure": 100 * total.f1, **classes}))  # noqa: T201 - the result
        return
    print(table(arguments.records, scores))  # noqa: T201 - the table is the command's result
    print(f"annotated x found, {' '.join(LABELS)} none:\n{total.counts}")  # noqa: T201


if __name__ == "__main__":
    main()
