"""Recordings and what is said in them: manifests, LibriSpeech's own layout, folders of noise.

A manifest is a table of tab-separated columns ``path speaker split seconds text`` with these
names in its first line; paths start at its own folder.
"""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from engine.audio import SUFFIXES
from engine.errors import MurmurError

_COLUMNS = ("path", "speaker", "split", "text")


class Clip(NamedTuple):
    """One recording and what is said in it."""

    id: str
    path: Path
    speaker: str
    text: str  # empty: noise


def read(manifest: Path, split: str | None = None, limit: int | None = None) -> list[Clip]:
    """Read what is to be recognised.

    Parameters
    ----------
    manifest : Path
        A table of tab-separated columns ``path speaker split seconds text``, a folder that holds
        one by the name of ``manifest.tsv``, a folder in LibriSpeech's layout
        (``spk/chap/spk-chap-0000.flac``, ``spk-chap.trans.txt``), or a folder of noise.
    split : str, optional
        Only the manifest's lines of this split.
    limit : int, optional
        Only so many, evenly spread over the whole.

    Raises
    ------
    MurmurError
        If it is none of these, or nothing is in it.
    """
    if manifest.is_dir() and (manifest / "manifest.tsv").is_file():
        manifest = manifest / "manifest.tsv"
    if manifest.is_file():
        clips = _table(manifest, split)
    elif manifest.is_dir() and split is None:
        clips = list(_librispeech(manifest)) or list(_noise(manifest))
    elif manifest.is_dir():
        raise MurmurError(f"{manifest}: a folder without manifest.tsv has no split {split!r}")
    else:
        raise MurmurError(f"{manifest}: there is no such file or folder")
    if not clips:
        of_split = f" of the split {split!r}" if split is not None else ""
        raise MurmurError(f"{manifest}: expected recordings{of_split}, found none")
    if limit is not None and limit < len(clips):
        clips = [clips[k * len(clips) // limit] for k in range(limit)]
    return clips


def _table(manifest: Path, split: str | None) -> list[Clip]:
    with manifest.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        missing = [name for name in _COLUMNS if name not in (rows.fieldnames or ())]
        if missing:
            raise MurmurError(
                f"{manifest}: expected a first line of path speaker split seconds text, "
                f"found no {', '.join(missing)}"
            )
        return [
            Clip(row["path"], manifest.parent / row["path"], row["speaker"], row["text"] or "")
            for row in rows
            if split in (None, row["split"])
        ]


def _librispeech(folder: Path) -> Iterator[Clip]:
    for listing in sorted(folder.rglob("*.trans.txt")):
        for line in listing.read_text(encoding="utf-8").splitlines():
            name, _, text = line.partition(" ")
            found = sorted(listing.parent.glob(f"{name}.*"))
            if not found:
                raise MurmurError(f"{listing}: there is no recording {name} beside it")
            yield Clip(name, found[0], name.partition("-")[0], text)


def _noise(folder: Path) -> Iterator[Clip]:
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES:
            yield Clip(str(path.relative_to(folder)), path, "-", "")
