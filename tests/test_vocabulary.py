"""Text to tokens and back."""

import math

from hypothesis import given
from hypothesis import strategies as st

from engine.speech.vocabulary import Vocabulary

MARKS = [b"<unk>", b"<s>", b"</s>", *(bytes([byte]) for byte in range(256))]
# In the order in which pairs are put together, as SentencePiece numbers them; letters come last.
MERGED = ["he", "in", "▁t", "▁the", "▁a", "▁in"]
LETTERS = list("▁abehint,")
PIECES = [*MARKS, *(piece.encode() for piece in MERGED + LETTERS)]


def number(piece: str) -> int:
    return len(MARKS) + (MERGED + LETTERS).index(piece)


def test_pairs_of_the_lowest_number_come_first() -> None:
    # "in" (1) before "▁t" (2), "he" (0) before both, then "▁t"+"he" (3).
    assert Vocabulary(PIECES).encode("the in") == [number("▁the"), number("▁in")]
    assert Vocabulary(PIECES).encode("thin") == [number("▁t"), number("h"), number("in")]


def test_what_has_no_piece_is_spelt_in_bytes() -> None:
    assert Vocabulary(PIECES).encode("aé") == [number("▁a"), 3 + 0xC3, 3 + 0xA9]


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=40))
def test_what_is_encoded_is_spelt_again(text: str) -> None:
    vocabulary = Vocabulary(PIECES)
    tokens = vocabulary.encode(text)
    words = vocabulary.words(tokens, [0.0] * len(tokens))
    assert [word.text for word in words] == text.split()


def test_a_word_s_confidence_is_the_geometric_mean_of_its_tokens() -> None:
    tokens = [number("▁t"), number("h"), number("in"), number("▁a"), number(",")]
    log_probs = [math.log(p) for p in (0.5, 0.8, 0.9, 0.6, 0.7)]
    first, second = Vocabulary(PIECES).words(tokens, log_probs)
    assert (first.text, second.text) == ("thin", "a,")
    assert math.isclose(first.confidence, (0.5 * 0.8 * 0.9) ** (1 / 3))
    assert math.isclose(second.confidence, (0.6 * 0.7) ** 0.5)


def test_tokens_beyond_the_vocabulary_spell_nothing() -> None:
    assert Vocabulary(PIECES).words([len(PIECES) + 5], [0.0]) == []
