"""Estimate n-grams of letters and of words: ``python -m training.language_model``.

Reads the transcripts of LibriSpeech train-clean-100 without the sentences of the validation
readings, so that these stay unseen. Writes each model as ARPA text and in the compact form, and
prints how well it predicts the held-out sentences.
"""

import argparse
import lzma
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from engine.speech import ngram
from engine.speech.ngram import BEGIN, END, SPACE, UNKNOWN, Ngrams, Order

TEXT = "text/librispeech-train-clean-100.txt.xz"
READINGS = "speech/librispeech"
LETTERS = "abcdefghijklmnopqrstuvwxyz'"
_NEVER = -99.0 * math.log(10.0)  # of <s> as a next word


class Sentence(NamedTuple):
    """One transcript; the name begins with the reader's and the chapter's number."""

    name: str
    words: list[str]


class Level(NamedTuple):
    """The n-grams of one length, sorted.

    A key is the n-gram's words as the digits of a number whose base is the size of the
    vocabulary: without its last digit it is the context, without its first the shorter n-gram.
    """

    keys: NDArray[np.int64]
    counts: NDArray[np.int64]
    probs: NDArray[np.float64]  # of the last word, given the others
    weights: NDArray[np.float64]  # of the shorter context's probabilities, where this is one

    def kept(self, which: NDArray[np.bool_]) -> "Level":
        return Level(self.keys[which], self.counts[which], self.probs[which], self.weights[which])


class Corpus(NamedTuple):
    """Numbered words, one text after the other."""

    vocabulary: list[str]
    tokens: NDArray[np.int64]
    texts: NDArray[np.int64]  # which text each token belongs to; no n-gram spans two


def read_sentences(data: Path, by_reader: bool = False) -> tuple[list[Sentence], list[Sentence]]:
    """Return the sentences to learn from, and those of the validation readings.

    Parameters
    ----------
    data : Path
        The folder ``data``, see its README.
    by_reader : bool
        Whether to leave out everything that the validation readers read, not only what they
        are heard to read: their books and names are then unseen too.
    """
    manifest = (data / READINGS / "manifest.tsv").read_text()
    rows = [line.split("\t") for line in manifest.splitlines()]
    held = {Path(path).stem for path, _, split, *_ in rows if split == "valid"}
    readers = {name.split("-")[0] for name in held}
    with lzma.open(data / TEXT, "rt") as lines:
        parted = [line.strip().lower().partition(" ") for line in lines]
    sentences = [Sentence(name, text.split()) for name, _, text in parted]
    unseen = [sentence for sentence in sentences if sentence.name in held]
    texts = [sentence.words for sentence in unseen]
    learnt = [
        sentence
        for sentence in sentences
        if sentence.words not in texts
        and not (by_reader and sentence.name.split("-")[0] in readers)
    ]
    return learnt, unseen


def letters_of(sentences: Iterable[Sentence]) -> Corpus:
    """Return all sentences as one text of letters, a :data:`SPACE` before each word."""
    vocabulary = [SPACE, *LETTERS]
    numbers = {letter: number for number, letter in enumerate(vocabulary)}
    text = "".join(SPACE + word for sentence in sentences for word in sentence.words) + SPACE
    tokens = np.array([numbers[letter] for letter in text])
    return Corpus(vocabulary, tokens, np.zeros(len(tokens), np.int64))


def words_of(sentences: Sequence[Sentence], min_count: int) -> Corpus:
    """Return each sentence between its signs; words that are rarer become unknown."""
    seen, counts = np.unique(
        [word for sentence in sentences for word in sentence.words], return_counts=True
    )
    vocabulary = [UNKNOWN, BEGIN, END, *seen[counts >= min_count].tolist()]
    numbers = {word: number for number, word in enumerate(vocabulary)}
    tokens, texts = [], []
    for place, sentence in enumerate(sentences):
        tokens += [numbers[BEGIN], *(numbers.get(word, 0) for word in sentence.words), numbers[END]]
        texts += [place] * (len(sentence.words) + 2)
    return Corpus(vocabulary, np.array(tokens), np.array(texts))


def count(corpus: Corpus, order: int) -> list[Level]:
    """Count n-grams of every length; probabilities and weights are yet to come.

    Every word has a unigram, even if it is never seen; the sign of beginning is never predicted
    and counts as unseen.
    """
    base = len(corpus.vocabulary)
    if base**order > 2**63:
        raise SystemExit(f"expected {base} words to the power of the order below 2**63: {order}")
    levels = []
    keys = np.zeros(len(corpus.tokens), np.int64)
    for length in range(1, order + 1):
        fits = len(corpus.tokens) - length + 1
        keys = keys[:fits] * base + corpus.tokens[length - 1 :]
        whole = corpus.texts[:fits] == corpus.texts[length - 1 :]
        found, counts = np.unique(keys[whole], return_counts=True)
        if length == 1:
            counts = np.bincount(corpus.tokens, minlength=base)
            found = np.arange(base)
            if BEGIN in corpus.vocabulary:
                counts[corpus.vocabulary.index(BEGIN)] = 0
        levels.append(Level(found, counts, np.zeros(len(found)), np.ones(len(found))))
    return levels


def witten_bell(levels: Sequence[Level], length: int, base: int) -> NDArray[np.float64]:
    """Return how much of its context's probability each n-gram has of its own.

    As much is left for what was not seen as different words were seen (Witten & Bell 1991).
    """
    counts = levels[length - 1].counts
    context = _context(levels, length, base)
    in_all = np.bincount(context, counts)[context]
    kinds = np.bincount(context, counts > 0)[context]
    shares: NDArray[np.float64] = counts / (in_all + kinds)
    return shares


def kneser_ney(levels: Sequence[Level], length: int, base: int) -> NDArray[np.float64]:
    """Return the same by modified Kneser-Ney smoothing (Chen & Goodman 1998).

    An n-gram that is not of the greatest length counts as often as different words precede it,
    unless it begins a text, where none can.
    """
    counts = _preceding(levels, length, base)
    context = _context(levels, length, base)
    n = [max(1, int((counts == times).sum())) for times in range(1, 5)]
    y = n[0] / (n[0] + 2 * n[1])
    # Of letters, short n-grams that occur once may be missing, and the formula means nothing.
    discounts = [0.0, *(max(0.1, t - (t + 1) * y * n[t] / n[t - 1]) for t in (1, 2, 3))]
    discount = np.array(discounts)[np.minimum(counts, 3)]
    shares: NDArray[np.float64] = (counts - discount) / np.bincount(context, counts)[context]
    return shares


def _preceding(levels: Sequence[Level], length: int, base: int) -> NDArray[np.int64]:
    level = levels[length - 1]
    if length == len(levels):
        return level.counts
    shorter = np.searchsorted(level.keys, levels[length].keys % base**length)
    preceding = np.bincount(shorter, minlength=len(level.keys))
    return np.where(preceding > 0, preceding, level.counts)


def _context(levels: Sequence[Level], length: int, base: int) -> NDArray[np.int64]:
    """Return the place of each n-gram's context among the n-grams that are one shorter."""
    keys = levels[length - 1].keys
    if length == 1:
        return np.zeros(len(keys), np.int64)
    return np.searchsorted(levels[length - 2].keys, keys // base)


Smoothing = Callable[[Sequence[Level], int, int], NDArray[np.float64]]
SMOOTHINGS: dict[str, Smoothing] = {"kneser-ney": kneser_ney, "witten-bell": witten_bell}


def smooth(levels: list[Level], vocabulary: Sequence[str], smoothing: Smoothing) -> list[Level]:
    """Return the levels with interpolated probabilities.

    What the unigrams leave goes to the unknown word, or if there is none to all alike.
    """
    base = len(vocabulary)
    lower = np.full(base, 1 / base)
    if UNKNOWN in vocabulary:
        lower = np.eye(base)[vocabulary.index(UNKNOWN)]
    smoothed: list[Level] = []
    for length, level in enumerate(levels, 1):
        own, context = smoothing(levels, length, base), _context(levels, length, base)
        left = 1 - np.bincount(context, own)
        if length > 1:
            shorter = level.keys % base ** (length - 1)
            lower = smoothed[-1].probs[np.searchsorted(smoothed[-1].keys, shorter)]
        smoothed.append(level._replace(probs=own + left[context] * lower))
    return smoothed


def prune(levels: list[Level], threshold: float, base: int) -> list[Level]:
    """Leave out n-grams without which the perplexity grows by less than a part (Stolcke 1998).

    Contexts of n-grams that are kept are kept.
    """
    kept = list(levels)
    needed = np.empty(0, np.int64)
    for length in range(len(levels), 1, -1):
        level, shorter = levels[length - 1], levels[length - 2]
        context = _context(levels, length, base)
        lower = shorter.probs[np.searchsorted(shorter.keys, level.keys % base ** (length - 1))]
        left = _left(context, level.probs)[context]
        lower_left = _left(context, lower)[context]
        weight, weight_without = left / lower_left, (left + level.probs) / (lower_left + lower)
        change = level.probs * np.log(lower * weight_without / level.probs)
        change += left * np.log(weight_without / weight)
        loss = -change * shorter.counts[context] / levels[0].counts.sum()
        which = (np.expm1(loss) >= threshold) | np.isin(level.keys, needed)
        kept[length - 1] = level.kept(which)
        needed = np.unique(kept[length - 1].keys // base)
    return kept


def _left(context: NDArray[np.int64], probs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the probability that each context leaves to what is not listed."""
    return np.maximum(1 - np.bincount(context, probs), 1e-9)


def weigh(levels: list[Level], base: int) -> list[Level]:
    """Return the levels with the weights by which each context's probabilities add up to 1."""
    weighed = [level._replace(weights=np.ones(len(level.keys))) for level in levels]
    for length in range(2, len(levels) + 1):
        level, context = weighed[length - 1], _context(weighed, length, base)
        lower = _look_up(weighed, length - 1, level.keys % base ** (length - 1), base)
        left, lower_left = _left(context, level.probs), _left(context, lower)
        shorter = weighed[length - 2]
        weights = np.ones(len(shorter.keys))
        weights[: len(left)] = left / lower_left
        weights[np.bincount(context, minlength=len(weights)) == 0] = 1.0
        weighed[length - 2] = shorter._replace(weights=weights)
    return weighed


def _look_up(
    levels: list[Level], length: int, keys: NDArray[np.int64], base: int
) -> NDArray[np.float64]:
    """Return probabilities of n-grams, some of which may have been left out."""
    level = levels[length - 1]
    place = np.minimum(np.searchsorted(level.keys, keys), len(level.keys) - 1)
    probs = level.probs[place]
    missing = np.flatnonzero(level.keys[place] != keys)
    if len(missing):
        contexts, shorter = keys[missing] // base, levels[length - 2]
        place = np.minimum(np.searchsorted(shorter.keys, contexts), len(shorter.keys) - 1)
        weights = np.where(shorter.keys[place] == contexts, shorter.weights[place], 1.0)
        rest = _look_up(levels, length - 1, keys[missing] % base ** (length - 1), base)
        probs[missing] = weights * rest
    return probs


def finish(levels: list[Level], vocabulary: Sequence[str]) -> Ngrams:
    """Return the model that the engine reads."""
    base = len(vocabulary)
    orders = []
    for length, level in enumerate(weigh(levels, base), 1):
        digits = [level.keys // base**place % base for place in range(length - 1, -1, -1)]
        log_probs = np.log(np.maximum(level.probs, math.exp(_NEVER))).astype(np.float32)
        backoffs = np.log(level.weights).astype(np.float32)
        orders.append(Order(np.stack(digits, axis=1), log_probs, backoffs))
    return ngram.build(vocabulary, orders)


class Heldout(NamedTuple):
    """How a model predicts texts: those of its words that it knows."""

    perplexity: float  # per letter, or per word
    known: int
    unknown: int


def predict(model: Ngrams, texts: Iterable[Sequence[str]]) -> Heldout:
    """Let a model predict each text's words, all but the first."""
    nats, known, unknown = 0.0, 0, 0
    for text in texts:
        state = ngram.NOTHING
        for place, word in enumerate(text):
            number = model.ids.get(word, model.ids.get(UNKNOWN, -1))
            if place and word in model.ids:
                nats -= model.log_prob(state, number)
                known += 1
            elif place:
                unknown += 1
            state = model.advance(state, number)
    return Heldout(math.exp(nats / known), known, unknown)


class Recipe(NamedTuple):
    """How one of the two models is made."""

    name: str
    corpus: Corpus
    heldout: list[list[str]]
    order: int
    prune: float


def make(recipe: Recipe, smoothing: Smoothing, step: Callable[[str], None]) -> Ngrams:
    """Estimate a model, telling what is done next."""
    vocabulary = recipe.corpus.vocabulary
    step(f"{recipe.name}: count up to {recipe.order} in a row")
    levels = count(recipe.corpus, recipe.order)
    step(f"{recipe.name}: smooth {sum(len(level.keys) for level in levels):,} n-grams")
    levels = smooth(levels, vocabulary, smoothing)
    step(f"{recipe.name}: prune")
    levels = prune(levels, recipe.prune, len(vocabulary))
    step(f"{recipe.name}: weigh and sort")
    return finish(levels, vocabulary)


_STEPS = 5  # of a recipe: those of make, and writing


def main() -> None:
    args = _parse()
    args.out.mkdir(parents=True, exist_ok=True)
    learnt, unseen = read_sentences(args.data, args.by_reader)
    texts = [sentence.words for sentence in unseen]
    recipes = [
        Recipe(
            "letters",
            letters_of(learnt),
            [list(SPACE + SPACE.join(words) + SPACE) for words in texts],
            args.letters,
            args.prune_letters,
        ),
        Recipe(
            "words",
            words_of(learnt, args.min_count),
            [[BEGIN, *words, END] for words in texts],
            args.words,
            args.prune_words,
        ),
    ]
    table = Table("model", "n-grams of each order", "MB", "held out", "perplexity", "unknown")
    console = Console()
    with Progress(console=console) as progress:
        bar = progress.add_task("", total=_STEPS * len(recipes))
        for recipe in recipes:
            model = make(
                recipe,
                SMOOTHINGS[args.smoothing],
                lambda what: progress.update(bar, description=what, advance=1),
            )
            progress.update(bar, description=f"{recipe.name}: write", advance=1)
            compact = args.out / f"{recipe.name}.npz"
            ngram.save(model, compact, args.bits)
            ngram.save_arpa(model, args.out / f"{recipe.name}.arpa.gz")
            found = predict(ngram.load(compact), recipe.heldout)
            table.add_row(
                recipe.name,
                " ".join(map(str, model.sizes)),
                f"{compact.stat().st_size / 1e6:.2f}",
                str(found.known + found.unknown),
                f"{found.perplexity:.2f}",
                str(found.unknown),
            )
    console.print(table)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/lm"))
    parser.add_argument("--letters", type=int, default=10, help="order of the model of letters")
    parser.add_argument("--words", type=int, default=3, help="order of the model of words")
    parser.add_argument("--smoothing", choices=sorted(SMOOTHINGS), default="kneser-ney")
    parser.add_argument(
        "--prune-letters", type=float, default=3e-8, help="part by which perplexity may grow"
    )
    parser.add_argument("--prune-words", type=float, default=2e-8, help="the same")
    parser.add_argument("--min-count", type=int, default=1, help="of a word that is known")
    parser.add_argument("--bits", type=int, default=8, help="of a number in the compact form")
    parser.add_argument(
        "--by-reader",
        action="store_true",
        help="leave out all that the validation readers read, as for choosing among models",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
