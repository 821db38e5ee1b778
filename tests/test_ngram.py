"""N-gram models: ARPA text against backoff by hand, the compact form, and faults."""

import gzip
import lzma
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ModelFileError
from engine.speech import ngram
from engine.speech.ngram import Ngrams, Order

ARPA = """written by hand

\\data\\
ngram 1=5
ngram 2=4
ngram 3=2

\\1-grams:
-99\t<s>\t-0.3
-0.8 </s>
-0.5\tthe\t-0.2
-0.7\tcat\t-0.4
-0.9\tsat

\\2-grams:
-0.1\t<s> the\t-0.6
-0.4\tthe cat\t-0.25
-0.35\tthe sat
-0.45\tcat sat

\\3-grams:
-0.05\t<s> the cat
-0.15\tthe cat sat

\\end\\
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def writer(text: str) -> Path:
        path = tmp_path / "model.arpa"
        path.write_text(text)
        return path

    return writer


def after(model: Ngrams, text: str) -> int:
    state = ngram.NOTHING
    for word in text.split():
        state = model.advance(state, model.ids[word])
    return state


@pytest.mark.parametrize(
    ("text", "word", "log10"),
    [
        ("", "the", -0.5),
        ("<s>", "the", -0.1),
        ("<s> the", "cat", -0.05),
        ("the", "cat", -0.4),
        ("sat the", "cat", -0.4),  # the context "sat the" is not there: no weight
        ("<s> the", "sat", -0.6 - 0.35),
        ("<s> the", "</s>", -0.6 - 0.2 - 0.8),
        ("the cat", "sat", -0.15),
        ("the cat", "the", -0.25 - 0.4 - 0.5),
        ("<s> cat", "sat", -0.45),
        ("<s> the cat", "sat", -0.15),
        ("cat sat", "cat", -0.7),
        ("<s>", "sat", -0.3 - 0.9),
    ],
)
def test_backoff_as_computed_by_hand(
    write: Callable[[str], Path], text: str, word: str, log10: float
) -> None:
    model = ngram.load(write(ARPA))
    state = after(model, text)
    assert model.log_prob(state, model.ids[word]) == pytest.approx(log10 * math.log(10))


def test_a_text_begins_after_the_sign_of_beginning(write: Callable[[str], Path]) -> None:
    model = ngram.load(write(ARPA))
    assert model.begin() == after(model, "<s>")
    assert ngram.load(write(ARPA.replace("<s>", "then"))).begin() == ngram.NOTHING


def test_contexts_that_change_nothing_are_forgotten(write: Callable[[str], Path]) -> None:
    model = ngram.load(write(ARPA))
    assert after(model, "<s> the cat sat") == after(model, "sat") == ngram.NOTHING


def random_orders(rng: np.random.Generator, order: int, words: int) -> list[Order]:
    """Return all unigrams, and of what may continue each n-gram some, with random numbers."""
    orders = []
    kept = np.zeros((1, 0), np.int64)
    for _ in range(order):
        last = np.tile(np.arange(words), len(kept))
        kept = np.column_stack([np.repeat(kept, words, axis=0), last])
        if orders:
            kept = rng.permutation(kept)[: max(1, round(0.6 * len(kept)))]
        log_probs = np.float32(-rng.exponential(2.0, len(kept)))
        backoffs = np.float32(-rng.exponential(0.5, len(kept)) * (rng.random(len(kept)) < 0.8))
        orders.append(Order(kept, log_probs, backoffs))
    return orders


def random_model(rng: np.random.Generator, order: int, words: int) -> Ngrams:
    vocabulary = ["|", "<unk>", *"abcdefgh"][:words]
    return ngram.build(vocabulary, random_orders(rng, order, words))


@given(seed=st.integers(0, 10**6))
def test_backoff_as_its_definition_says(seed: int) -> None:
    rng = np.random.default_rng(seed)
    orders = random_orders(rng, order=4, words=4)
    known = {
        tuple(words): (float(log_prob), float(backoff))
        for order in orders
        for words, log_prob, backoff in zip(order.words.tolist(), *order[1:], strict=True)
    }

    def plain(context: tuple[int, ...], word: int) -> float:
        if (*context, word) in known:
            return known[*context, word][0]
        return known.get(context, (0.0, 0.0))[1] + plain(context[1:], word)

    model = ngram.build("abcd", orders)
    state, text = ngram.NOTHING, ()
    for word in rng.integers(0, 4, 40).tolist():
        for other in range(4):
            assert model.log_prob(state, other) == pytest.approx(plain(text, other))
        state, text = model.advance(state, word), (*text, word)[-3:]


@pytest.mark.parametrize("suffix", ["arpa", "arpa.gz", "arpa.xz", "npz"])
def test_a_written_model_reads_back(suffix: str, tmp_path: Path, rng: np.random.Generator) -> None:
    model = random_model(rng, order=3, words=6)
    path = tmp_path / f"model.{suffix}"
    (ngram.save if suffix == "npz" else ngram.save_arpa)(model, path)
    again = ngram.load(path)
    assert (again.vocabulary, again.sizes) == (model.vocabulary, model.sizes)
    assert again.words.tolist() == model.words.tolist()
    assert again.first.tolist() == model.first.tolist()
    np.testing.assert_allclose(again.log_probs, model.log_probs, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(again.backoffs, model.backoffs, rtol=1e-5, atol=1e-5)


def test_what_the_longest_ngrams_say_of_backoff_is_passed_over(
    write: Callable[[str], Path],
) -> None:
    model = ngram.load(write(ARPA.replace("the cat sat", "the cat sat\t-9")))
    assert after(model, "the cat sat") == ngram.NOTHING


def test_fewer_bits_move_numbers_little_and_outliers_not_at_all(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    count = 5000
    log_probs = np.float32(-rng.gamma(4.0, 2.0, count))
    log_probs[7] = -228.0
    backoffs = np.float32(-rng.random(count))
    backoffs[rng.random(count) < 0.6] = 0.0
    orders = [
        Order(np.arange(count)[:, None], log_probs, backoffs),
        Order(np.zeros((1, 2), np.int64), np.float32([-1.0]), np.float32([0.0])),
    ]
    model = ngram.build([f"w{number}" for number in range(count)], orders)
    ngram.save(model, tmp_path / "model.npz", bits=6)
    again = ngram.load(tmp_path / "model.npz")
    assert len(set(again.log_probs[:count].tolist())) <= 64
    error = np.delete(np.abs(again.log_probs[:count] - log_probs), 7)
    assert error.mean() < 0.15
    assert (again.backoffs[:count][backoffs == 0.0] == 0.0).all()
    assert np.abs(again.backoffs[:count] - backoffs).max() < 0.05


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        ("\\data\\", "", r"line \d+: expected \\data\\, found the end"),
        ("ngram 1=5", "", r"line 5: expected ngram 1=COUNT, found 'ngram 2=4'"),
        ("ngram 2=4", "ngram 2=x", r"line 5: expected ngram 2=COUNT, found 'ngram 2=x'"),
        ("ngram 2=4", "ngram 2=5", r"line 21: expected 2-gram 5 of 5: .* found '.*3-grams:'"),
        ("ngram 2=4", "ngram 2=3", r"line 19: expected \\3-grams:, found '-0.45.*sat'"),
        ("-0.7\tcat", "-O.7\tcat", r"line 12: expected a number, found '-O.7'"),
        ("-0.7\tcat", "nan\tcat", r"line 12: expected a number, found 'nan'"),
        ("-0.7\tcat", "0.7\tcat", r"line 12: expected a log10 probability of at most 0"),
        ("-0.7\tcat\t", "-0.7\tthe\t", r"line 12: expected each word once, found 'the'"),
        ("-0.05\t<s> the cat", "-0.05 <s>", r"line 22: expected 3-gram 1 of 2: .*3 words"),
        ("the cat\t", "the dog\t", r"line 17: expected words that have a unigram, found 'dog'"),
        ("the sat", "the cat", r"expected each n-gram once, found 'the cat' again"),
        ("<s> the cat", "<s> cat sat", r"expected the n-gram '<s> cat', since '<s> cat sat'"),
        ("\\end\\", "", r"line 26: expected \\end\\, found the end"),
    ],
)
def test_bad_arpa_says_where_what_was_expected_and_found(
    write: Callable[[str], Path], good: str, bad: str, message: str
) -> None:
    path = write(ARPA.replace(good, bad))
    with pytest.raises(ModelFileError, match=message) as error:
        ngram.load(path)
    assert str(path) in str(error.value)


def test_a_file_that_is_cut_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    whole = {
        "cut.arpa.gz": gzip.compress(ARPA.encode())[:-80],
        "cut.arpa.xz": lzma.compress(ARPA.encode())[:-80],
        "plain.arpa.gz": ARPA.encode(),
        "latin.arpa": ARPA.replace("cat", "caf\xe9").encode("latin-1"),
        "text.npz": ARPA.encode(),
    }
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    for name in (*whole, "missing.arpa"):
        with pytest.raises(ModelFileError, match=name):
            ngram.load(tmp_path / name)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format", 9, "format: expected 1, found 9"),
        ("sizes", [4, 16], "sizes: expected as many unigrams"),
        ("words", [0, 1], "words: expected"),
        ("continuations", None, "no .*continuations"),
    ],
)
def test_a_compact_file_that_contradicts_itself_is_refused(
    tmp_path: Path, rng: np.random.Generator, field: str, value: object, message: str
) -> None:
    path = tmp_path / "model.npz"
    ngram.save(random_model(rng, order=2, words=5), path)
    with np.load(path) as file:
        fields = {name: file[name] for name in file.files}
    if value is None:
        del fields[field]
    else:
        fields[field] = np.array(value)
    np.savez(path, **fields)
    with pytest.raises(ModelFileError, match=message):
        ngram.load(path)
