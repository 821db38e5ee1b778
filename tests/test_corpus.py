"""Recordings and their texts are found in each of the layouts, and faults are named."""

import re
from pathlib import Path

import pytest

from engine import corpus
from engine.corpus import Clip
from engine.errors import MurmurError

SPEECH = Path(__file__).parent.parent.parent / "shared" / "data" / "speech"

TABLE = """path\tspeaker\tsplit\tseconds\ttext
a/one.opus\tann\ttrain\t1.0\tSay "one", please
b/two.opus\tbob\tvalid\t1.0\t
b/three.opus\tbob\tvalid\t1.0\tthree
"""


def test_a_manifest_names_recordings_from_its_own_folder(tmp_path: Path) -> None:
    path = tmp_path / "manifest.tsv"
    path.write_text(TABLE)
    expected = [
        Clip("a/one.opus", tmp_path / "a/one.opus", "ann", 'Say "one", please'),
        Clip("b/two.opus", tmp_path / "b/two.opus", "bob", ""),
        Clip("b/three.opus", tmp_path / "b/three.opus", "bob", "three"),
    ]
    assert corpus.read(path) == corpus.read(tmp_path) == expected
    assert corpus.read(path, "valid") == expected[1:]
    with pytest.raises(MurmurError, match="recordings of the split 'test', found none"):
        corpus.read(path, "test")


def test_librispeech_s_own_layout(tmp_path: Path) -> None:
    for chapter, names in (("84-121", ("0000", "0001")), ("7-9", ("0000",))):
        speaker, number = chapter.split("-")
        folder = tmp_path / speaker / number
        folder.mkdir(parents=True)
        lines = [f"{chapter}-{name} TEXT OF {name}\n" for name in names]
        (folder / f"{chapter}.trans.txt").write_text("".join(lines))
        for name in names:
            (folder / f"{chapter}-{name}.flac").touch()
    found = corpus.read(tmp_path)
    assert [(one.id, one.speaker, one.text) for one in found] == [
        ("7-9-0000", "7", "TEXT OF 0000"),
        ("84-121-0000", "84", "TEXT OF 0000"),
        ("84-121-0001", "84", "TEXT OF 0001"),
    ]
    assert found[1].path == tmp_path / "84" / "121" / "84-121-0000.flac"
    found[1].path.unlink()
    with pytest.raises(MurmurError, match="no recording 84-121-0000 beside it"):
        corpus.read(tmp_path)


def test_a_folder_of_recordings_without_texts_is_noise(tmp_path: Path) -> None:
    (tmp_path / "kitchen").mkdir()
    for name in ("b.wav", "kitchen/a.MP3", "notes.txt"):
        (tmp_path / name).touch()
    found = [(one.id, one.text) for one in corpus.read(tmp_path)]
    assert found == [("b.wav", ""), ("kitchen/a.MP3", "")]
    with pytest.raises(MurmurError, match="has no split 'valid'"):
        corpus.read(tmp_path, "valid")


@pytest.mark.parametrize(("limit", "expected"), [(1, [0]), (4, [0, 2, 5, 7]), (99, [*range(10)])])
def test_a_limit_takes_recordings_from_all_over(
    tmp_path: Path, limit: int, expected: list[int]
) -> None:
    for number in range(10):
        (tmp_path / f"{number}.wav").touch()
    assert [int(one.id[0]) for one in corpus.read(tmp_path, limit=limit)] == expected


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no such file or folder"),
        ("path\ttext\na.wav\tone\n", "found no speaker, split"),
        ("", "expected a first line"),
    ],
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: str | None, said: str) -> None:
    path = tmp_path / "list.tsv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(MurmurError, match=re.escape(str(path)) + f".*{said}"):
        corpus.read(path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MurmurError, match="expected recordings, found none"):
        corpus.read(tmp_path)


def test_the_manifests_of_the_project_s_data_are_read() -> None:
    if not SPEECH.is_dir():
        pytest.skip("needs ../shared/data/speech")
    valid = corpus.read(SPEECH / "librispeech", "valid")
    assert all(one.path.is_file() and one.text for one in valid)
    assert all(not one.text for one in corpus.read(SPEECH / "noise"))
