"""Recordings of speech and their texts, from manifests outside the repository.

``manifest.tsv`` has a line a recording: path, speaker, split, seconds, text. Audio is 16 kHz.
"""

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
from numpy.typing import NDArray

RATE_HZ = 16000
# What a letter recogniser spells; the blank comes first, then the mark between words.
LETTERS = ("", " ", "'", *"abcdefghijklmnopqrstuvwxyz")
_SHORT = {"mr": "mister", "mrs": "missus", "dr": "doctor", "st": "saint"}


class Utterance(NamedTuple):
    """One line of a manifest."""

    name: str  # path below the folder of all sets
    speaker: str
    split: str
    seconds: float
    text: str


def manifest(folder: Path, sets: Sequence[str], split: str) -> list[Utterance]:
    """Return the utterances of some sets that belong to a split, in the order of the files."""
    found = []
    for name in sets:
        with (folder / name / "manifest.tsv").open(encoding="utf-8") as lines:
            for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
                if row["split"] == split:
                    path = f"{name}/{row['path']}"
                    text = row["text"] or ""
                    found.append(
                        Utterance(path, row["speaker"], split, float(row["seconds"]), text)
                    )
    return found


def audio(folder: Path, utterance: Utterance) -> NDArray[np.int16]:
    """Return an utterance's samples, mono, 16 kHz."""
    samples, rate_hz = soundfile.read(folder / utterance.name, dtype="int16")
    if rate_hz != RATE_HZ or samples.ndim != 1:
        raise ValueError(f"{utterance.name}: expected mono at {RATE_HZ} Hz, found {rate_hz} Hz")
    return samples


def spelling(text: str) -> str | None:
    """Return a text in the letters of :data:`LETTERS`; None if it holds what they cannot say."""
    words = re.sub(r"[-\u2014]", " ", text.lower().replace("\u2019", "'")).split()
    words = [re.sub(r"[^a-z0-9']", "", word).strip("'") for word in words]
    words = [_SHORT.get(word, word) for word in words if word]
    spelt = " ".join(words)
    return spelt if spelt and not re.search(r"\d", spelt) else None


def numbers(text: str) -> list[int]:
    """Return the places of a spelt text's letters in :data:`LETTERS`."""
    return [LETTERS.index(letter) for letter in text]
