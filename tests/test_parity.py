"""``murmur models``: a model that does not keep what it states is found, and the fault named."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from typer.testing import CliRunner, Result

from engine import model_file
from engine.cli import app
from tests import tiny


def murmur_models(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["models", *map(str, arguments)])


def node_of(made: onnx.ModelProto, output: str) -> onnx.NodeProto:
    (node,) = [node for node in made.graph.node if output in node.output]
    return node


def faults(path: Path) -> dict[str, str]:
    """Return what the command finds wrong, by the check that failed."""
    result = murmur_models("check", path, "--json")
    report = json.loads(result.stdout.splitlines()[-1])
    found = {f["name"]: f["detail"] for f in report["findings"] if not f["passed"]}
    assert report["figure"] == len(found)
    assert result.exit_code == (1 if found else 0)
    return found


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_a_sound_model_passes_every_check(models: Callable[..., Path], cell: str) -> None:
    assert faults(models(cell.lower(), cell)) == {}


def test_a_model_whose_rows_change_each_other_passes_and_is_said_to_be_stepped_row_by_row(
    tmp_path: Path,
) -> None:
    result = murmur_models("check", tiny.write_mixing(tmp_path))
    assert result.exit_code == 0, result.output
    assert "stepped row by row" in result.output


def c_begins_as_h(folder: Path) -> Path:
    """Wire both states to one input, as exports of equal sample tensors do."""
    made = tiny.graph()
    node_of(made, "Y").input[6] = "h_in"
    return tiny.write(folder, made=made)


def c_ends_as_h(folder: Path) -> Path:
    made = tiny.graph()
    node_of(made, "c0_next").input[0] = "h_out"
    return tiny.write(folder, made=made)


def silent(folder: Path) -> Path:
    made = tiny.graph()
    made.graph.initializer.append(numpy_helper.from_array(np.array(0, np.float32), "zero"))
    made.graph.node[0].input[0] = "silence"
    made.graph.node.insert(0, helper.make_node("Mul", ["x", "zero"], ["silence"]))
    return tiny.write(folder, made=made)


def infinite(folder: Path) -> Path:
    made = tiny.graph()
    node_of(made, "beat").output[0] = "chance"
    made.graph.initializer.append(numpy_helper.from_array(np.array(0, np.float32), "zero"))
    made.graph.node.append(helper.make_node("Div", ["chance", "zero"], ["beat"]))
    return tiny.write(folder, made=made)


def forgetful(folder: Path) -> Path:
    """Give the initial state after every step."""
    made = tiny.graph("GRU")
    node_of(made, "h0_next").output[0] = "h_end"
    made.graph.initializer.append(numpy_helper.from_array(np.array(0, np.float32), "zero"))
    made.graph.node.append(helper.make_node("Mul", ["h_end", "zero"], ["h0_next"]))
    return tiny.write(folder, tiny.spec(cell="GRU"), made=made)


@pytest.mark.parametrize(
    ("write", "check", "named"),
    [
        (c_begins_as_h, "inputs", "not consumed: ['c0']"),
        (c_ends_as_h, "states", "one value for ['h0 and c0']"),
        (silent, "inputs", "not consumed: ['the signal']"),
        (infinite, "outputs", "beat is not finite"),
        (forgetful, "state", "not kept"),
        (tiny.write_one_row_only, "batch", "cannot be run"),
        (tiny.write_mean_of_rows, "batch", "2 rows in, mean has 1"),
    ],
)
def test_a_fault_is_found_and_named(
    tmp_path: Path, write: Callable[[Path], Path], check: str, named: str
) -> None:
    assert named in faults(write(tmp_path))[check]


def test_a_fault_is_told_in_words_too(tmp_path: Path) -> None:
    result = murmur_models("check", c_begins_as_h(tmp_path))
    assert result.exit_code == 1
    assert "FAIL inputs: not consumed: ['c0']" in result.stdout.splitlines()
    assert "ok   outputs: a row gives" in result.stdout


def test_a_file_that_is_no_model_is_told_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"not a graph")
    result = murmur_models("check", path)
    assert result.exit_code == 1
    assert f"murmur: {path}: expected an ONNX model" in result.stderr


def test_the_models_of_the_package_are_listed_and_one_that_is_broken_is_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write(tmp_path, tiny.spec("sound"))
    (tmp_path / "broken.onnx").write_bytes(b"not a graph")
    monkeypatch.setattr(model_file, "BUNDLED", tmp_path)
    broken, sound = json.loads(murmur_models("list", "--json").stdout)["models"]
    assert broken["name"] == "broken"
    assert "expected an ONNX model" in broken["error"]
    assert (sound["name"], sound["rate_hz"], sound["unit"]) == ("sound", 100.0, "mV")
    assert sound["state_bytes"] == 4 * 2 * tiny.HIDDEN
    listed = murmur_models("list")
    assert listed.exit_code == 0
    assert "sound" in listed.stdout


def test_every_model_of_the_package_passes() -> None:
    for path in model_file.BUNDLED.glob("*.onnx"):
        assert faults(path) == {}, path.name
