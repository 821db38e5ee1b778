"""Language models over labels: what whole texts are worth, computed word by word."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ModelFileError
from engine.speech import ngram
from engine.speech.beam import BeamDecoder
from engine.speech.language import Both, LabelModel, Language, WordModel
from engine.speech.ngram import Ngrams, Order

LABELS = ("", " ", "a", "b", "c", "'")
LN10 = math.log(10)
WORDS = """\\data\\
ngram 1=7
ngram 2=3
\\1-grams:
-99 <s> -0.5
-1.0 </s>
-2.0 <unk> -0.1
-0.5 ab -0.25
-0.9 ABBA -0.125
-0.7 b
-3.0 x2
\\2-grams:
-0.2 <s> ab
-0.3 ab b
-0.4 <unk> b
\\end\\
"""
UNIGRAMS = {"ab": -0.5, "abba": -0.9, "b": -0.7}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Ngrams:
    path: Path = tmp_path_factory.mktemp("words") / "words.arpa"
    path.write_text(WORDS)
    return ngram.load(path)


@pytest.fixture(scope="module")
def letters() -> Ngrams:
    rng = np.random.default_rng(5)
    vocabulary = ["|", "'", "c", "b", "a"]
    unigrams = np.arange(5)[:, None]
    bigrams = np.array([(one, other) for one in range(5) for other in range(5)])[::2]
    return ngram.build(
        vocabulary,
        [
            Order(order, np.float32(-rng.random(len(order))), np.float32(-rng.random(len(order))))
            for order in (unigrams, bigrams)
        ],
    )


def worth(language: Language[Any], text: str, ended: bool = False) -> float:
    """Return the sum of what a text's labels add."""
    state, total = language.begin(), 0.0
    for letter in text:
        label = LABELS.index(letter)
        total += language.score(state, label)
        state = language.advance(state, label)
    inside = bool(text) and not text.endswith(" ")
    return total + (language.end(state, inside) if ended else 0.0)


def spelt(letters: Ngrams, text: str) -> float:
    """Return the natural log of a text's probability, letter after letter, after a space."""
    total, state = 0.0, letters.advance(ngram.NOTHING, letters.ids["|"])
    for letter in text.replace(" ", "|"):
        total += letters.log_prob(state, letters.ids[letter])
        state = letters.advance(state, letters.ids[letter])
    return total


def test_letters_are_worth_their_weighted_log_probabilities(letters: Ngrams) -> None:
    model = LabelModel(letters, LABELS, alpha=0.5, beta=0.75)
    text = "ab c'a b"
    assert worth(model, text) == pytest.approx(0.5 * spelt(letters, text) + 0.75 * len(text))
    whole = worth(model, text + " ")
    assert worth(model, text, ended=True) == pytest.approx(whole)
    assert worth(model, text + " ", ended=True) == pytest.approx(whole)


@pytest.mark.parametrize(
    ("text", "log10"),
    [
        ("ab", -0.2),
        ("ab b", -0.2 - 0.3),
        ("ab ab", -0.2 - 0.25 - 0.5),
        ("abba", -0.5 - 0.9),
        ("b b abba b", -0.5 - 0.7 - 0.7 - 0.9 - 0.125 - 0.7),
    ],
)
def test_known_words_are_worth_their_ngrams(
    words: Ngrams, letters: Ngrams, text: str, log10: float
) -> None:
    count = len(text.split())
    for fallback in (None, letters):
        model = WordModel(words, LABELS, 0.5, 0.75, letters=fallback)
        expected = pytest.approx(0.5 * log10 * LN10 + 0.75 * count)
        assert worth(model, f"{text} ") == expected
        assert worth(model, text, ended=True) == expected


def test_unknown_words_are_worth_their_letters(words: Ngrams, letters: Ngrams) -> None:
    model = WordModel(words, LABELS, 0.5, 0.75, unknown=-2.0, letters=letters)
    unknown = -2.0 + spelt(letters, "abc ")
    expected = 0.5 * ((-0.2 - 0.25 - 2.0 - 0.4) * LN10 + unknown) + 3 * 0.75
    assert worth(model, "ab abc b ") == pytest.approx(expected)
    flat = WordModel(words, LABELS, 0.5, 0.75, unknown=-2.0)
    expected = 0.5 * ((-0.5 - 2.0) * LN10 - 2.0 - 2 * math.log(5)) + 0.75
    assert worth(flat, "c ") == pytest.approx(expected)


@pytest.mark.parametrize("text", ["a", "ab", "abb", "b", "abc", "c"])
def test_the_beginning_of_a_word_is_worth_the_best_word_that_begins_so(
    words: Ngrams, letters: Ngrams, text: str
) -> None:
    model = WordModel(words, LABELS, 2.0, 0.75, unknown=-2.0, letters=letters)
    known = [UNIGRAMS[word] * LN10 for word in UNIGRAMS if word.startswith(text)]
    best = max(known) if known else -2.0 * LN10 - 2.0 + spelt(letters, text)
    assert worth(model, text) == pytest.approx(2.0 * best)


def test_both_add_up(words: Ngrams, letters: Ngrams) -> None:
    one, other = LabelModel(letters, LABELS, 0.5, 0.25), WordModel(words, LABELS, 0.5, 0.75)
    both = Both(one, other)
    for text in ("ab b abba c", "ab", "c c ", "ab b"):
        for ended in (False, True):
            expected = worth(one, text, ended) + worth(other, text, ended)
            assert worth(both, text, ended) == pytest.approx(expected)


@given(texts=st.lists(st.text("ab c", max_size=8), max_size=4))
def test_a_text_is_worth_the_same_whatever_was_asked_before(
    words: Ngrams, letters: Ngrams, texts: list[str]
) -> None:
    used = WordModel(words, LABELS, 1.0, 0.0, letters=letters)
    for text in texts:
        joined = " ".join(text.split())
        fresh = WordModel(words, LABELS, 1.0, 0.0, letters=letters)
        assert worth(used, joined) == worth(fresh, joined)


def test_a_beam_writes_what_its_language_prefers(words: Ngrams) -> None:
    values = np.full((1, 4, len(LABELS)), -9.0, np.float32)
    for frame, letter in enumerate("ac"):
        values[0, 2 * frame, [LABELS.index(letter), 3]] = np.log([0.6, 0.3])
        values[0, 2 * frame + 1, 0] = -0.1
    texts = []
    for language in (None, WordModel(words, LABELS, 1.0, 0.0)):
        decoder = BeamDecoder(LABELS, 1, language)
        decoder.push(np.array([0]), values)
        texts.append(decoder.best(0, ended=True).text)
    assert texts == ["ac", "ab"]


def test_a_model_of_other_labels_is_refused(words: Ngrams, letters: Ngrams) -> None:
    with pytest.raises(ModelFileError, match=r"expected all labels, found no \['d'\]"):
        LabelModel(letters, (*LABELS, "d"), 1.0, 0.0)
    with pytest.raises(ModelFileError, match="expected words spelt with the labels"):
        WordModel(words, ("", " ", "e", "f"), 1.0, 0.0)
