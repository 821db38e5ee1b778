"""N-gram language models with backoff: what they say of the next word, and their files.

A *word* here is whatever the model counts: words of a text, or its letters. Files are ARPA text
(as SRILM, KenLM and PocketSphinx write it; plain, ``.gz`` or ``.xz``) or our compact ``.npz``.
Estimating is training's part (``training.language_model``), weighing against the sound is
:mod:`engine.speech.language`'s.
"""

import gzip
import lzma
import math
import zipfile
import zlib
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.errors import ModelFileError

UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"
SPACE = "|"  # the space in a model of letters: ARPA's own separator is white space
_FORMAT = 1
_FIELDS = {
    *("format", "vocabulary", "sizes", "words", "continuations"),
    *("log_prob_codes", "log_prob_values", "backoff_codes", "backoff_values"),
}
_LN10 = math.log(10.0)
_NEVER = -99.0  # log10, what ARPA files say of what cannot be, like <s> as a next word

NOTHING = -1  # the context of no words
_UNSEEN = -2


class Order(NamedTuple):
    """The n-grams of one length. Only unigrams that are all there, in order, need no sorting."""

    words: NDArray[np.int64]  # (n-grams, n) indices into the vocabulary
    log_probs: NDArray[np.float32]  # (n-grams,) natural log of the last word's, given the others
    backoffs: NDArray[np.float32]  # (n-grams,) natural log of the weight of a shorter context


class Ngrams:
    """A backoff model (Katz 1987) as a trie, one array a field.

    An n-gram is a number: unigrams come first and in the vocabulary's order, then bigrams, and
    so on; those that continue the same n-gram stand together, sorted by their last word.

    Parameters
    ----------
    vocabulary : sequence of str
    sizes : sequence of int
        How many n-grams of each order; as many unigrams as words.
    words : (n-grams,) int
        Last word of each.
    log_probs, backoffs : (n-grams,) float32
        Natural logarithms.
    first : (n-grams + 1,) int
        Where the continuations of each begin, which is where those of the one before end.
    """

    def __init__(
        self,
        vocabulary: Sequence[str],
        sizes: Sequence[int],
        words: NDArray[np.integer],
        log_probs: NDArray[np.float32],
        backoffs: NDArray[np.float32],
        first: NDArray[np.integer],
    ) -> None:
        self.vocabulary = tuple(vocabulary)
        self.ids = {word: number for number, word in enumerate(self.vocabulary)}
        self.sizes = tuple(sizes)
        self.words, self.first = words, first
        self.log_probs, self.backoffs = log_probs, backoffs
        # A memoryview gives a Python number in a quarter of the time that an array takes.
        self._words, self._first = memoryview(words.data), memoryview(first.data)
        self._log_probs, self._backoffs = memoryview(log_probs.data), memoryview(backoffs.data)
        self._shorter_of = array("i", [_UNSEEN]) * len(words)  # found as they are met

    @property
    def order(self) -> int:
        return len(self.sizes)

    def begin(self) -> int:
        """Return the context of a text's beginning: after ``<s>``, if the model knows it."""
        return self.advance(NOTHING, self.ids[BEGIN]) if BEGIN in self.ids else NOTHING

    def advance(self, state: int, word: int) -> int:
        """Return the longest context after a word that changes any probability.

        Parameters
        ----------
        state : int
            The n-gram that came before, or :data:`NOTHING`.
        word : int
        """
        while state != NOTHING:
            child = self._child(state, word)
            if child >= 0 and self._matters(child):
                return child
            state = self._shorter(state)
        return word if self._matters(word) else NOTHING

    def log_prob(self, state: int, word: int) -> float:
        """Return the natural log of a word's probability after a context."""
        weight = 0.0
        while state != NOTHING:
            child = self._child(state, word)
            if child >= 0:
                return weight + self._log_probs[child]
            weight += self._backoffs[state]
            state = self._shorter(state)
        return weight + self._log_probs[word]

    def _child(self, node: int, word: int) -> int:
        """Return the n-gram that continues another by a word, or -1."""
        words, end = self._words, self._first[node + 1]
        place = bisect_left(words, word, self._first[node], end)
        return place if place < end and words[place] == word else -1

    def _matters(self, node: int) -> bool:
        first = self._first
        return first[node] < first[node + 1] or self._backoffs[node] != 0.0

    def _shorter(self, node: int) -> int:
        """Return the longest context that an n-gram ends with, itself left out."""
        shorter = self._shorter_of[node]
        if shorter == _UNSEEN:
            shorter = NOTHING
            if node >= len(self.vocabulary):
                continued = bisect_right(self._first, node) - 1
                shorter = self.advance(self._shorter(continued), self._words[node])
            self._shorter_of[node] = shorter
        return shorter


def build(vocabulary: Sequence[str], orders: Sequence[Order]) -> Ngrams:
    """Sort n-grams into a trie.

    Parameters
    ----------
    vocabulary : sequence of str
    orders : sequence of Order
        From unigrams on; every word has a unigram, and whatever an n-gram continues is there.

    Raises
    ------
    ModelFileError
        If an n-gram comes twice, or what it continues is missing.
    """
    count = len(vocabulary)
    keys: list[NDArray[np.int64]] = []  # of each order: what it continues * words + last word
    arranged: list[Order] = []
    for order in orders:
        key = _continued(vocabulary, order.words, keys) * count + order.words[:, -1]
        by_key = np.argsort(key)
        key = key[by_key]
        twice = np.flatnonzero(key[1:] == key[:-1])
        if len(twice):
            found = _spelt(vocabulary, order.words[by_key[twice[0]]])
            raise ModelFileError(f"expected each n-gram once, found {found} again")
        keys.append(key)
        arranged.append(Order(order.words[by_key], order.log_probs[by_key], order.backoffs[by_key]))
    arranged[-1].backoffs[:] = 0.0  # the longest n-grams are no context
    sizes = [len(key) for key in keys]
    first = np.full(sum(sizes) + 1, sum(sizes), np.int32)
    begin, end = 0, 0
    for size, longer in zip(sizes, keys[1:], strict=False):
        begin, end = end, end + size
        first[begin:end] = end + np.searchsorted(longer // count, np.arange(size))
    return Ngrams(
        vocabulary,
        sizes,
        np.concatenate([order.words[:, -1] for order in arranged]).astype(np.int32),
        np.concatenate([order.log_probs for order in arranged]).astype(np.float32),
        np.concatenate([order.backoffs for order in arranged]).astype(np.float32),
        first,
    )


def _continued(
    vocabulary: Sequence[str], words: NDArray[np.int64], keys: list[NDArray[np.int64]]
) -> NDArray[np.int64]:
    """Return where, in the order below, that lies which each n-gram continues."""
    place = np.zeros(len(words), np.int64)
    for length, key in enumerate(keys[: words.shape[1] - 1], 1):
        wanted = place * len(vocabulary) + words[:, length - 1]
        place = np.searchsorted(key, wanted)
        missing = np.flatnonzero(np.append(key, -1)[place] != wanted)
        if len(missing):
            ngram = words[missing[0]]
            beginning, whole = _spelt(vocabulary, ngram[:length]), _spelt(vocabulary, ngram)
            raise ModelFileError(f"expected the n-gram {beginning}, since {whole} continues it")
    return place


def _spelt(vocabulary: Sequence[str], words: NDArray[np.int64]) -> str:
    return repr(" ".join(vocabulary[word] for word in words))


def load(path: Path | str) -> Ngrams:
    """Read a language model: a compact ``.npz``, or else ARPA text.

    Raises
    ------
    ModelFileError
        If the file is not what it must be; the message says where, what was expected and found.
    """
    path = Path(path)
    try:
        if path.suffix == ".npz":
            return _read_compact(path)
        with _open(path) as file:
            return _parse(_ArpaText(file))
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from None
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error) as error:
        raise ModelFileError(f"{path}: expected a readable language model: {error}") from None


def save_arpa(ngrams: Ngrams, path: Path) -> None:
    """Write ARPA text, compressed if the name ends in ``.gz`` or ``.xz``."""
    with _open(path, "wt") as file:
        file.write("\\data\\\n")
        for length, size in enumerate(ngrams.sizes, 1):
            file.write(f"ngram {length}={size}\n")
        texts, begin = [""], 0
        for length, size in enumerate(ngrams.sizes, 1):
            end = begin + size
            texts = _continuations(ngrams, texts, begin, end)
            file.write(f"\n\\{length}-grams:\n")
            for number, text in enumerate(texts, begin):
                log_prob = float(ngrams.log_probs[number]) / _LN10
                backoff = float(ngrams.backoffs[number]) / _LN10
                tail = "" if length == ngrams.order else f"\t{backoff:.6g}"
                file.write(f"{log_prob:.6g}\t{text}{tail}\n")
            begin = end
        file.write("\n\\end\\\n")


def _continuations(ngrams: Ngrams, texts: list[str], begin: int, end: int) -> list[str]:
    """Return the texts of an order from those of the one below."""
    if begin == 0:
        return list(ngrams.vocabulary)
    children = np.diff(ngrams.first[begin - len(texts) : begin + 1])
    parents = np.repeat(np.arange(len(texts)), children).tolist()
    words = ngrams.words[begin:end].tolist()
    return [
        f"{texts[parent]} {ngrams.vocabulary[word]}"
        for parent, word in zip(parents, words, strict=True)
    ]


def _open(path: Path, mode: str = "rt") -> IO[str]:
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    file: IO[str] = opener(path, mode, encoding="utf-8")
    return file


class _ArpaText:
    """The lines of an ARPA file that are not blank, and where the last of them stood."""

    def __init__(self, file: IO[str]) -> None:
        self._lines = enumerate(file, 1)
        self._line = 0

    def next(self, expected: str) -> str:
        for line, text in self._lines:
            self._line = line
            if stripped := text.strip():
                return stripped
        raise ModelFileError(f"line {self._line + 1}: expected {expected}, found the end")

    def expect(self, expected: str) -> None:
        found = self.next(expected)
        if found != expected:
            raise self.fault(expected, found)

    def number(self, text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if math.isnan(value):
            raise self.fault("a number", text)
        return value

    def fault(self, expected: str, found: str) -> ModelFileError:
        return ModelFileError(f"line {self._line}: expected {expected}, found {found[:80]!r}")


def _parse(text: _ArpaText) -> Ngrams:
    while text.next("\\data\\") != "\\data\\":
        pass  # what stands before is a comment
    counts: list[int] = []
    while (line := text.next("\\1-grams:")).startswith("ngram "):
        order, _, stated = line.removeprefix("ngram ").partition("=")
        if order.strip() != str(len(counts) + 1) or not stated.strip().isdecimal():
            raise text.fault(f"ngram {len(counts) + 1}=COUNT", line)
        counts.append(int(stated))
    if not counts or line != "\\1-grams:":
        raise text.fault("\\1-grams:" if counts else "ngram 1=COUNT", line)
    ids: dict[str, int] = {}
    orders = [_parse_order(text, 1, counts[0], ids)]
    for length, count in enumerate(counts[1:], 2):
        text.expect(f"\\{length}-grams:")
        orders.append(_parse_order(text, length, count, ids))
    text.expect("\\end\\")
    return build(list(ids), orders)


def _parse_order(text: _ArpaText, length: int, count: int, ids: dict[str, int]) -> Order:
    """Read the n-grams of one length; unigrams fill the vocabulary, in which others look."""
    words, numbers = array("q"), array("d")
    for row in range(1, count + 1):
        expected = f"{length}-gram {row} of {count}: a number, {length} words, maybe a number"
        line = text.next(expected)
        first, *ngram = line.split()
        if len(ngram) not in (length, length + 1) or first.startswith("\\"):
            raise text.fault(expected, line)
        log_prob = text.number(first)
        if log_prob > 0.0:
            raise text.fault("a log10 probability of at most 0", first)
        numbers.append(log_prob)
        numbers.append(text.number(ngram.pop()) if len(ngram) > length else 0.0)
        if length == 1 and ids.setdefault(ngram[0], row - 1) != row - 1:
            raise text.fault("each word once", ngram[0])
        for word in ngram:
            if word not in ids:
                raise text.fault("words that have a unigram", word)
            words.append(ids[word])
    log10s = np.reshape(numbers, (-1, 2)).clip(_NEVER, -_NEVER)
    log_probs, backoffs = (log10s * _LN10).astype(np.float32).T
    return Order(np.reshape(words, (-1, length)), log_probs, backoffs)


def save(ngrams: Ngrams, path: Path, bits: int = 8) -> None:
    """Write the compact form, which keeps 2**bits different numbers an order.

    Parameters
    ----------
    ngrams : Ngrams
    path : Path
        Ends in ``.npz``.
    bits : int
        At most 8. Values are sorted into as many bins of equal count, and become their middle,
        which one value that is far from all others does not move.
    """
    splits = np.cumsum(ngrams.sizes)[:-1]
    log_probs = [_quantised(part, bits) for part in np.split(ngrams.log_probs, splits)]
    backoffs = [_quantised(part, bits) for part in np.split(ngrams.backoffs, splits)]
    np.savez_compressed(
        path,
        format=np.array(_FORMAT),
        vocabulary=np.frombuffer("\n".join(ngrams.vocabulary).encode(), np.uint8),
        sizes=np.array(ngrams.sizes, np.int64),
        words=_narrow(ngrams.words),
        continuations=_narrow(np.diff(ngrams.first)),
        log_prob_codes=np.concatenate([codes for codes, _ in log_probs]),
        log_prob_values=np.stack([values for _, values in log_probs]),
        backoff_codes=np.concatenate([codes for codes, _ in backoffs]),
        backoff_values=np.stack([values for _, values in backoffs]),
    )


def _quantised(
    values: NDArray[np.float32], bits: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Return each value's code, and (256,) what the codes stand for."""
    distinct, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    codes = np.arange(len(distinct))
    if len(distinct) > 2**bits:
        codes = ((ends - counts / 2) * 2**bits / len(values)).astype(np.int64)
    used, begins = np.unique(codes, return_index=True)
    edges = np.append((ends - counts)[begins], len(values))
    stood_for = np.zeros(256, np.float32)
    stood_for[used] = distinct[np.searchsorted(ends, (edges[:-1] + edges[1:]) // 2, "right")]
    return codes[places].astype(np.uint8), stood_for


def _narrow(values: NDArray[np.integer]) -> NDArray[np.integer]:
    """Return the same whole numbers in the narrowest unsigned type."""
    return values.astype(np.min_scalar_type(int(values.max(initial=0))))


def _read_compact(path: Path) -> Ngrams:
    try:
        with np.load(path, allow_pickle=False) as file:
            fields = {name: file[name] for name in file.files}
    except (ValueError, zipfile.BadZipFile) as error:
        raise ModelFileError(f"expected an .npz file, found: {error}") from None
    missing = sorted(_FIELDS - set(fields))
    if missing:
        raise ModelFileError(f"expected the arrays {sorted(_FIELDS)}, found no {missing}")
    found = fields["format"].tolist()
    if found != _FORMAT:
        raise ModelFileError(f"format: expected {_FORMAT}, found {found!r}")
    sizes = fields["sizes"].tolist()
    vocabulary = fields["vocabulary"].tobytes().decode().split("\n")
    total, continuations = sum(sizes), fields["continuations"]
    for name in ("words", "continuations", "log_prob_codes", "backoff_codes"):
        if fields[name].shape != (total,):
            raise ModelFileError(f"{name}: expected {total} values, found {fields[name].shape}")
    if sizes[:1] != [len(vocabulary)] or fields["words"].max(initial=0) >= len(vocabulary):
        raise ModelFileError(f"sizes: expected as many unigrams as words, found {sizes}")
    if continuations.sum() != total - sizes[0]:
        raise ModelFileError(f"continuations: expected {total - sizes[0]} in all")
    order = np.repeat(np.arange(len(sizes)), sizes)
    first = np.concatenate([[sizes[0]], sizes[0] + np.cumsum(continuations, dtype=np.int64)])
    return Ngrams(
        vocabulary,
        sizes,
        fields["words"].astype(np.int32),
        fields["log_prob_values"][order, fields["log_prob_codes"]].astype(np.float32),
        fields["backoff_values"][order, fields["backoff_codes"]].astype(np.float32),
        first.astype(np.int32),
    )
