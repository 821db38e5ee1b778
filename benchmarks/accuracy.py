"""Word error rates on the same recordings, side by side: this engine and its anchors.

::

    python -m benchmarks.accuracy MANIFEST [--split valid] [--model english] [--json]

``murmur``: what ``murmur evaluate speech`` measures through a real server, finals and streaming
pass. ``moonshine``: the offline recogniser that our second pass is, given each recording as a
whole: the ceiling. ``pocketsphinx``: the recogniser and models of its wheel, with the whole of
each recording for its means. All texts are compared under the same normalisation.
"""

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from engine import corpus, model_file, spoken
from engine.audio import Sound
from engine.corpus import Clip
from engine.dictation import Plan
from engine.errors import MurmurError
from engine.evaluate import evaluate
from engine.scoring import Errors, errors, interval
from engine.speech.second_pass import LONGEST_S, SecondPass

RATE_HZ = 16_000
Recogniser = Callable[[NDArray[np.float32]], str]
Row = dict[str, Any]


def moonshine(model: str) -> Recogniser:
    """Return the second pass of a model, alone."""
    loaded = model_file.load(model)
    folder = loaded.spec.decoding.second_pass
    if not folder:
        raise MurmurError(f"{model}: it has no second pass")
    second = SecondPass(loaded.folder / folder)

    def recognise(samples: NDArray[np.float32]) -> str:
        parts = np.array_split(samples, -(-len(samples) // round(LONGEST_S * RATE_HZ)))
        return " ".join(second.transcribe(part).text for part in parts)

    return recognise


def pocketsphinx() -> Recogniser:
    """Return PocketSphinx as its wheel comes."""
    try:
        module = importlib.import_module("pocketsphinx")
    except ImportError as error:
        raise MurmurError(f"{error}: pip install 'murmur-engine[peers]'") from None
    decoder = module.Decoder(samprate=RATE_HZ, loglevel="FATAL")

    def recognise(samples: NDArray[np.float32]) -> str:
        pcm = np.clip(samples * 32768, -32768, 32767).astype("<i2")
        decoder.start_utt()
        decoder.process_raw(pcm.tobytes(), full_utt=True)
        decoder.end_utt()
        found = decoder.hyp()
        return found.hypstr if found else ""

    return recognise


def offline(name: str, clips: Sequence[Clip], recognise: Recogniser, console: Console) -> Row:
    """Give each recording as a whole to a recogniser, on one thread of this process."""
    made: list[Errors] = []
    sound_s = cpu_s = 0.0
    for number, clip in enumerate(clips):
        console.print(f"{name}: {number} of {len(clips)}", end="\r")
        with Sound(clip.path) as sound:
            if sound.rate_hz != RATE_HZ:
                raise MurmurError(f"{clip.path}: expected {RATE_HZ} Hz, found {sound.rate_hz:g}")
            samples = np.concatenate(list(sound.blocks(60.0)))
        sound_s += len(samples) / RATE_HZ
        before = time.process_time()
        text = recognise(samples)
        cpu_s += time.process_time() - before
        made.append(errors(spoken.words(clip.text), spoken.words(text)))
    return {"name": name, **_rates(made), "cpu_s_per_s": cpu_s / sound_s}


def ours(clips: Sequence[Clip], model: str, console: Console) -> Iterator[Row]:
    """Yield the rows of the finals and of the streaming pass."""
    made = evaluate(clips, Plan(model, 8, silence_s=1.5), console)
    if made.report["faults"]:
        raise MurmurError(made.report["faults"][0])
    cpu = {"cpu_s_per_s": made.report["server_cpu_s_per_audio_s"]}
    yield {"name": "murmur", **_rates([one.words for one in made.scores]), **cpu}
    yield {"name": "murmur, streaming pass alone"} | _rates(
        [one.streaming_words for one in made.scores]
    )


def _rates(made: Sequence[Errors]) -> Row:
    total = Errors()
    for one in made:
        total = total.plus(one)
    low, high = interval(made)
    return {
        "wer": 100 * total.rate,
        "wer_95": [100 * low, 100 * high],
        "errors": total.edits,
        "words": total.reference,
    }


def compare(clips: Sequence[Clip], model: str, console: Console) -> list[Row]:
    """Return the rows of all; of a rival that is not to be had, why."""
    rows = list(ours(clips, model, console))
    rivals = {"moonshine, offline": lambda: moonshine(model), "pocketsphinx": pocketsphinx}
    for name, rival in rivals.items():
        try:
            rows.append(offline(name, clips, rival(), console))
        except MurmurError as error:
            rows.append({"name": name, "why": str(error)})
    return rows


def line(row: Row) -> str:
    """Return a row for a person."""
    if "why" in row:
        return f"{row['name']:28} {row['why']}"
    low, high = row["wer_95"]
    cpu = f"{row['cpu_s_per_s']:.3f}" if "cpu_s_per_s" in row else ""
    return f"{row['name']:28} {row['wer']:6.2f}  {low:5.2f} to {high:5.2f}  {cpu:>8}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("manifest", type=Path, help="as of 'murmur evaluate speech'")
    parser.add_argument("--split", help="of the manifest, such as valid")
    parser.add_argument("--limit", type=int, help="only so many recordings, evenly spread")
    parser.add_argument("--model", default="english", help="model file or name")
    parser.add_argument("--json", action="store_true", help="print one object on the last line")
    arguments = parser.parse_args()
    try:
        clips = corpus.read(arguments.manifest, arguments.split, arguments.limit)
        rows = compare(clips, arguments.model, Console(stderr=True))
    except MurmurError as error:
        print(f"accuracy: {error}", file=sys.stderr)  # noqa: T201
        return 1
    if arguments.json:
        what = "word error rate of our finals, %"
        print(json.dumps({"figure": rows[0]["wer"], "what": what, "rows": rows}))  # noqa: T201
    else:
        head = f"{'':28} {'WER %':>6}  {'95 %':14}  CPU s/s; {rows[0]['words']} words"
        print("\n".join([f"{head}, {spoken.NORMALISATION}", *map(line, rows)]))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
