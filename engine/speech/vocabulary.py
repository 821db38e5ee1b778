"""Text to tokens and back: byte-pair encoding as SentencePiece does it.

Numbers 0 to 2 are marks, the next 256 are bytes, then come the pieces in the order in which pairs
are put together: the pair of the lowest number first. Checked against nothing but itself: what is
encoded is spelt again as it was.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

BEGIN, END = 1, 2
_FIRST_BYTE, _FIRST_PIECE = 3, 259
_SPACE = "\u2581"


class Word(NamedTuple):
    """A word with its punctuation."""

    text: str
    confidence: float  # geometric mean of its tokens' probabilities


class Vocabulary:
    """The tokens of a recogniser.

    Parameters
    ----------
    pieces : list of bytes
        Of each token, in the order of their numbers.
    """

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces
        self._numbers: dict[bytes, int] = {}
        for number, piece in enumerate(pieces[_FIRST_PIECE:], _FIRST_PIECE):
            self._numbers.setdefault(piece, number)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text; a space goes before it."""
        spelt = _SPACE + _SPACE.join(text.split())
        parts = [letter.encode() for letter in spelt]
        while len(parts) > 1:
            numbers = [self._numbers.get(one + other, math.inf) for one, other in pairwise(parts)]
            lowest = min(numbers)
            if lowest == math.inf:
                break
            place = numbers.index(lowest)
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        return [token for part in parts for token in self._tokens(part)]

    def _tokens(self, part: bytes) -> list[int]:
        if part in self._numbers:
            return [self._numbers[part]]
        return [_FIRST_BYTE + byte for byte in part]

    def words(self, tokens: Sequence[int], log_probs: Sequence[float]) -> list[Word]:
        """Return the words that tokens spell, with what their probabilities say."""
        spelt: list[bytes] = []
        scores: list[list[float]] = []
        for token, score in zip(tokens, log_probs, strict=True):
            # The embedding has more rows than the vocabulary has pieces.
            piece = self._pieces[token] if _FIRST_BYTE <= token < len(self._pieces) else b""
            if not spelt or piece.startswith(_SPACE.encode()):
                spelt.append(b"")
                scores.append([])
            spelt[-1] += piece
            scores[-1].append(score)
        texts = [part.decode("utf-8", "replace").replace(_SPACE, " ").strip() for part in spelt]
        return [
            Word(text, math.exp(sum(each) / len(each)))
            for text, each in zip(texts, scores, strict=True)
            if text
        ]
