"""Our weights in sherpa-onnx: the same log-probabilities, and the same tokens of the same sound."""

from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("torch", reason="needs the extra 'export'")

import torch

from benchmarks import peers
from engine import model_file
from engine.errors import MurmurError
from engine.features import LogMel
from engine.model_file import Model
from exporters import sherpa

Sound = NDArray[np.float32]


@pytest.fixture(scope="module")
def sound() -> Sound:
    """Noise whose loudness and colour change all the time, 20 s."""
    rng = np.random.default_rng(5)
    loudness = np.repeat(10 ** rng.uniform(-3, -0.7, 200), 1600)
    colour = np.repeat(rng.uniform(0, 0.9, 200), 1600)
    white = rng.standard_normal(320_001)
    return (loudness * (white[1:] - colour * white[:-1])).astype(np.float32)


@pytest.fixture(scope="module")
def model(sound: Sound, tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("peers") / "random.onnx"
    peers.random_model(sound, path, layers=2, hidden=24)
    return model_file.load(path)


def test_the_wrapped_graph_computes_what_the_model_does(model: Model) -> None:
    rng = np.random.default_rng(0)
    stage = model.spec.stages[0]
    frames = rng.standard_normal((3, *stage.input_shape)).astype(np.float32)
    states = {s.input: rng.uniform(-1, 1, (3, *s.shape)).astype(np.float32) for s in stage.states}
    (session,) = model.sessions
    scores, *after = session.run(None, {stage.input: frames, **states})
    packed = np.concatenate([value.reshape(3, -1) for value in states.values()], axis=1)
    wrapped = model_file.open_session(sherpa.wrap(model).model.SerializeToString())
    feed = {
        "audio_signal": frames.transpose(0, 2, 1),
        "length": np.full(3, frames.shape[1]),
        "cache_last_channel": packed[:, None, None],
        "cache_last_time": np.zeros((3, 1, 1, 1), np.float32),
        "cache_last_channel_len": np.zeros(3, np.int64),
    }
    names = [node.name for node in wrapped.get_outputs()]
    told = dict(zip(names, wrapped.run(names, feed), strict=True))
    np.testing.assert_array_equal(told["logprobs"][:, :, -1], scores[:, :, 0])
    np.testing.assert_array_equal(told["logprobs"][:, :, :-1], scores[:, :, 1:])
    np.testing.assert_array_equal(
        told["cache_last_channel_next"][:, 0, 0],
        np.concatenate([value.reshape(3, -1) for value in after], axis=1),
    )
    assert told["encoded_lengths"].tolist() == [scores.shape[1]] * 3


@pytest.fixture
def _flushing_afterwards() -> Iterator[None]:
    """Flush denormals again: sherpa-onnx brings an ONNX Runtime of its own, which ends that."""
    yield
    torch.set_flush_denormal(True)


@pytest.mark.usefixtures("_flushing_afterwards")
@pytest.mark.parametrize("recipe", [LogMel(), LogMel(shift_samples=320, gain=8.0)])
def test_sherpa_onnx_says_the_same_tokens(model: Model, sound: Sound, recipe: LogMel) -> None:
    pytest.importorskip("sherpa_onnx", reason="needs the extra 'peers'")
    row = peers.compare(listening(model, recipe), sound, streams=3, threads=1, turns=2, hops=15)
    assert row.identical == 3
    assert row.tokens > 5
    assert row.ours > 0
    assert row.ratio > 0


def test_other_sound_gives_other_tokens(model: Model, sound: Sound) -> None:
    """Else the test above would show nothing."""
    ours = peers.Ours(model, np.stack([sound, sound[::-1]]), 1)
    for number in range(30):
        ours.push(number)
    assert ours.text(0) != ours.text(1)


def test_what_sherpa_onnx_has_no_place_for_is_refused(model: Model) -> None:
    for recipe, found in ((LogMel(bins=40), "expected 80 bins"), ("raw", "expected log-mel")):
        with pytest.raises(MurmurError, match=found):
            sherpa.wrap(listening(model, recipe))
    with pytest.raises(MurmurError, match="expected one graph with one output"):
        sherpa.wrap(model_file.load("heart"))


def listening(model: Model, recipe: LogMel | str) -> Model:
    """Return a model with other features; its net takes any number of frames."""
    (stage,) = model.spec.stages
    if isinstance(recipe, LogMel):
        shape = (model.spec.hop_samples // recipe.shift_samples, recipe.bins)
        stage = msgspec.structs.replace(stage, input_shape=shape)
    stage = msgspec.structs.replace(stage, features=recipe)
    return model._replace(spec=msgspec.structs.replace(model.spec, stages=(stage,)))
