"""A model file serves, or is refused with one error that says what was expected and found."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest

from engine import model_file
from engine.errors import ModelFileError
from engine.features import LogMel
from engine.model_file import Filter, Input, Output, Stage, State
from tests import tiny

STATES = tiny.spec().stages[0].states


def refusal(folder: Path, **changes: Any) -> str:
    """Write the tiny model with a changed statement and return why it is refused."""
    path = tiny.write(folder, tiny.spec(**changes))
    with pytest.raises(ModelFileError) as caught:
        model_file.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


def stage(**changes: Any) -> dict[str, Any]:
    fields = {"input": "x", "input_shape": (tiny.HOP, 1), "states": STATES} | changes
    return {"stages": (Stage(**fields),)}


def mel_stage(frames: int, bins: int = 8) -> dict[str, Any]:
    """A stage that reads frames of 10 samples, 5 apart."""
    recipe = LogMel(shift_samples=5, bins=bins, frame_samples=10)
    return stage(features=recipe, input_shape=(frames, bins))


def test_a_statement_comes_back_from_its_file(tmp_path: Path) -> None:
    statement = tiny.spec(
        pipeline="heart",
        input=Input(250.0, "uV", filters=(Filter("bandpass", (0.5, 40.0), 3),)),
        look_ahead_samples=7,
        gap="hold",
        latency_ms=50.0,
        priority=1,
    )
    loaded = model_file.load(tiny.write(tmp_path, statement))
    assert loaded.spec == statement
    assert loaded.spec.state_size == 2 * tiny.HIDDEN
    assert loaded.batchable


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": 2}, "format: expected 1, found 2"),
        ({"name": "Heart 1"}, "$.name"),
        ({"pipeline": "motion"}, "'motion' - at `$.pipeline`"),
        ({"input": Input(0.0, "mV")}, "$.input.rate_hz"),
        ({"input": Input(float("inf"), "mV")}, "$.input.rate_hz"),
        ({"input": Input(100.0, "mV", channels=0)}, "$.input.channels"),
        ({"hop_samples": 0}, "$.hop_samples"),
        ({"stages": ()}, "$.stages"),
        ({"outputs": ()}, "$.outputs"),
        ({"pipeline": "speech"}, "the pipeline 'speech' expects one that means 'ctc'"),
        (
            {"outputs": (Output("beat_class", "ctc", tiny.LABELS),)},
            "output beat_class: expected labels whose first is the blank '', found ['N', 'S', 'V']",
        ),
        (
            {"outputs": (Output("beat_class", "ctc", ("",)),)},
            "expected labels whose first is the blank '', found ['']",
        ),
        ({"look_ahead_samples": -1}, "$.look_ahead_samples"),
        ({"gap": "mask"}, "$.gap"),
        ({"latency_ms": 0.0}, "$.latency_ms"),
        ({"priority": 10}, "$.priority"),
        ({"window_samples": 19}, "window_samples: expected at least hop_samples (20), found 19"),
        ({"window_samples": 40}, "stages[0].input_shape: expected 40 values"),
        ({"input": Input(100.0, "mV", channels=2)}, "expected 40 values"),
        (
            {"window_samples": 24, **mel_stage(4)},
            "one frame for every 5 samples of hop_samples (20), found 3 frames in 24",
        ),
        ({"window_samples": 25, **mel_stage(3)}, "stages[0].input_shape: expected 32 values"),
        ({"input": Input(100.0, "mV", channels=2), **mel_stage(4)}, "log_mel expects 1, found 2"),
        (stage(features=LogMel(0)), "$.stages[0].features.shift_samples"),
        (stage(passes="beat"), "stages[0].passes: expected nothing in the last stage"),
        (stage(input="y"), "the graph has ['c0', 'h0', 'x'], the statement names"),
        (stage(states=STATES[:1]), "the graph has ['c0', 'h0', 'x'], the statement names"),
        (stage(constants={"sr": 100}), "['c0', 'h0', 'sr', 'x']"),
        (stage(input_shape=(20,)), "x: expected shape ['batch', 20], found ['batch', 20, 1]"),
        (stage(states=(State("h0", "lost", (8,)), STATES[1])), "outputs: expected ['lost']"),
        (
            stage(states=(State("h0", "h0_next", (9,)), STATES[1])),
            "h0: expected shape ['batch', 9], found ['batch', 8]",
        ),
        (
            stage(states=(State("h0", "h0_next", (8,), batch_axis=1), STATES[1])),
            "h0: expected shape [8, 'batch'], found ['batch', 8]",
        ),
        (stage(states=(State("h0", "h0_next", (8,), batch_axis=2), STATES[1])), "batch_axis 2"),
        (
            stage(states=(State("h0", "h0_next", (8,)), State("c0", "h0_next", (8,)))),
            "states: expected an output of its own each, found ['h0_next', 'h0_next']",
        ),
        ({"outputs": (Output("speech", "scores"),)}, "outputs: expected 'speech'"),
        (
            {"outputs": (Output("beat_class", "beat_class", ("N", "V")),)},
            "output beat_class: expected 2 values for its labels, found 5",
        ),
        (
            {"pipeline": "heart", "outputs": (Output("beat", "beat"),)},
            "the pipeline 'heart' expects one that means 'beat_class'",
        ),
        (
            {
                "pipeline": "heart",
                "outputs": (Output("beat", "beat"), Output("beat_class", "beat_class")),
            },
            "output beat_class: expected labels",
        ),
        ({"pipeline": "audio"}, "the pipeline 'audio' expects one that means 'samples'"),
        (
            {"pipeline": "audio", "outputs": (Output("beat", "samples"),), "look_ahead_samples": 5},
            "look_ahead_samples: expected window less hop (0) for the pipeline 'audio', found 5",
        ),
        (
            {"pipeline": "audio", "outputs": (Output("beat", "samples"),)},
            "output beat: expected 20 values (the window), found [5]",
        ),
    ],
)
def test_a_fault_in_the_statement_is_named(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    assert said in refusal(tmp_path, **changes)


@pytest.mark.parametrize(
    ("kind", "hz"),
    [
        ("highpass", (0.5, 40.0)),
        ("bandpass", (0.5,)),
        ("bandpass", (40.0, 0.5)),
        ("notch", (50.0, 2.0)),
        ("lowpass", (49.0, 50.0)),
        ("lowpass", (50.0,)),
    ],
)
def test_a_filter_needs_its_frequencies_below_half_the_rate(
    tmp_path: Path, kind: Any, hz: tuple[float, ...]
) -> None:
    said = refusal(tmp_path, input=Input(100.0, "mV", filters=(Filter(kind, hz),)))
    assert f"input.filters: {kind} expects" in said
    assert "below 50 Hz, the lower first, found" in said


def test_an_unknown_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text("format = 1\nhop = 20\n")
    with pytest.raises(ModelFileError, match="hop"):
        model_file.load(path)


@pytest.mark.parametrize("content", [b"", b"\x00\xff" * 100, b"format = "])
@pytest.mark.parametrize("suffix", [".onnx", ".toml"])
def test_a_file_that_is_none_is_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=str(path)):
        model_file.load(path)


def test_a_graph_without_a_statement_is_sent_to_the_documents(tmp_path: Path) -> None:
    onnx.save(tiny.graph(), tmp_path / "bare.onnx")
    with pytest.raises(ModelFileError, match=r"expected metadata key 'murmur', found \[\]; write"):
        model_file.load(tmp_path / "bare.onnx")


def test_a_name_that_is_no_file_tells_the_bundled_ones() -> None:
    with pytest.raises(ModelFileError, match=r"expected a \.onnx or \.toml file, .*silero-vad"):
        model_file.load("no-such-model")


def test_a_fixed_batch_above_one_cannot_be_served(tmp_path: Path) -> None:
    made = tiny.graph()
    for tensor in [*made.graph.input, *made.graph.output]:
        tensor.type.tensor_type.shape.dim[0].dim_value = 4
    (tmp_path / "fixed.toml").write_text(foreign_text(["fixed.onnx"]))
    onnx.save(made, tmp_path / "fixed.onnx")
    with pytest.raises(ModelFileError, match=r"x: expected shape .*, found \[4, 20, 1\]"):
        model_file.load(tmp_path / "fixed.toml")


def test_a_constant_must_have_the_graphs_type(tmp_path: Path) -> None:
    onnx.save(with_constant(onnx.TensorProto.DOUBLE), tmp_path / "model.onnx")
    text = foreign_text(["model.onnx"]).replace('input = "x"', 'input = "x"\nconstants = {k = 3}')
    (tmp_path / "model.toml").write_text(text)
    with pytest.raises(
        ModelFileError,
        match=r"constant k: expected a scalar tensor\(int64\), found tensor\(double\)",
    ):
        model_file.load(tmp_path / "model.toml")


def test_every_stage_is_checked_even_after_one_with_a_fixed_batch(tmp_path: Path) -> None:
    first = tiny.graph()
    for tensor in [*first.graph.input, *first.graph.output]:
        tensor.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(first, tmp_path / "first.onnx")
    onnx.save(with_constant(onnx.TensorProto.INT64), tmp_path / "second.onnx")
    (tmp_path / "two.toml").write_text(foreign_text(["first.onnx", "second.onnx"]))
    with pytest.raises(ModelFileError, match=r"the graph has \['c0', 'h0', 'k', 'x'\]"):
        model_file.load(tmp_path / "two.toml")


@pytest.mark.parametrize("file", ["absent.onnx", "no_such_package:a.onnx", "no_such.part:a.onnx"])
def test_a_stage_whose_file_is_absent_is_named(tmp_path: Path, file: str) -> None:
    (tmp_path / "model.toml").write_text(foreign_text([file]))
    with pytest.raises(ModelFileError, match=file.partition(":")[0]):
        model_file.load(tmp_path / "model.toml")


def test_a_toml_file_beside_a_graph_says_the_same_as_metadata(tmp_path: Path) -> None:
    onnx.save(tiny.graph(), tmp_path / "graph.onnx")
    (tmp_path / "foreign.toml").write_text(foreign_text(["graph.onnx"]))
    foreign = model_file.load(tmp_path / "foreign.toml")
    own = model_file.load(tiny.write(tmp_path))
    (stage,) = foreign.spec.stages
    assert msgspec.structs.replace(stage, file="") == own.spec.stages[0]
    assert foreign.sha256 != own.sha256


def test_the_digest_of_a_foreign_model_covers_its_graphs(tmp_path: Path) -> None:
    (tmp_path / "foreign.toml").write_text(foreign_text(["graph.onnx"]))
    digests = set()
    for seed in (0, 1):
        onnx.save(tiny.graph(seed=seed), tmp_path / "graph.onnx")
        digests.add(model_file.load(tmp_path / "foreign.toml").sha256)
    assert len(digests) == 2


@pytest.mark.parametrize("name", [file.stem for file in model_file.bundled_files()])
def test_a_bundled_model_is_served_by_its_name(name: str) -> None:
    model = model_file.load(name)
    assert model.spec.name == name
    assert model.spec.licence
    assert model.spec.provenance


def test_an_unknown_provider_is_refused(tiny_path: Path) -> None:
    with pytest.raises(ModelFileError, match="provider: expected cpu or cuda, found 'tpu'"):
        model_file.load(tiny_path, "tpu")


@pytest.mark.skipif(
    "CUDAExecutionProvider" in ort.get_available_providers(), reason="this onnxruntime has CUDA"
)
def test_a_provider_that_is_not_there_names_the_extra(tiny_path: Path) -> None:
    with pytest.raises(ModelFileError, match="install the extra 'gpu'"):
        model_file.load(tiny_path, "cuda")


def foreign_text(files: list[str]) -> str:
    """State the tiny model in TOML, once for each file, each stage reading the one before."""
    stages = "".join(
        f'[[stages]]\nfile = "{file}"\ninput = "x"\ninput_shape = [{tiny.HOP}, 1]\n'
        f'passes = "{"beat" if file != files[-1] else ""}"\n'
        'states = [{ input = "h0", output = "h0_next", shape = [8] },'
        '          { input = "c0", output = "c0_next", shape = [8] }]\n'
        for file in files
    )
    return (
        'format = 1\nname = "foreign"\npipeline = "scores"\nhop_samples = 20\n'
        'window_samples = 20\nlicence = "CC0-1.0"\nprovenance = "random weights"\n'
        'input = { rate_hz = 100, unit = "mV" }\n'
        f'{stages}[[outputs]]\nname = "beat"\nmeaning = "beat"\n'
    )


def with_constant(kind: int) -> onnx.ModelProto:
    """Return the tiny graph with one more input ``k``, a scalar that is added to the signal."""
    made = tiny.graph()
    made.graph.input.append(onnx.helper.make_tensor_value_info("k", kind, []))
    cast = onnx.helper.make_node("Cast", ["k"], ["k_float"], to=onnx.TensorProto.FLOAT)
    add = onnx.helper.make_node("Add", ["x", "k_float"], ["x_k"])
    made.graph.node[0].input[0] = "x_k"
    made.graph.node.insert(0, cast)
    made.graph.node.insert(1, add)
    return made


def test_constants_reach_the_graph(tmp_path: Path, rng: np.random.Generator) -> None:
    from engine.runtime import CpuRuntime

    onnx.save(with_constant(onnx.TensorProto.INT64), tmp_path / "model.onnx")
    text = foreign_text(["model.onnx"]).replace('input = "x"', 'input = "x"\nconstants = {k = 3}')
    (tmp_path / "model.toml").write_text(text)
    runtime = CpuRuntime(model_file.load(tmp_path / "model.toml"), 1)
    plain = CpuRuntime(model_file.load(tiny.write(tmp_path)), 1)
    windows = rng.standard_normal((1, tiny.HOP, 1)).astype(np.float32)
    slots = np.array([0])
    for each in (runtime, plain):
        each.reset(0)
    shifted = plain.step(slots, windows + np.float32(3))["beat"]
    np.testing.assert_array_equal(runtime.step(slots, windows)["beat"], shifted)
