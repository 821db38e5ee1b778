"""Estimation of n-grams, against the formulas written out word by word."""

import lzma
import math
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from engine.speech import ngram
from engine.speech.ngram import BEGIN, END, UNKNOWN, Ngrams
from training import language_model
from training.language_model import Sentence, Smoothing, kneser_ney, witten_bell

ORDER = 3
Gram = tuple[str, ...]


@pytest.fixture(scope="module")
def sentences() -> list[Sentence]:
    rng = np.random.default_rng(4)
    words = ["a", "b", "c", "d", "e", "f"]
    chances = np.array([8, 5, 3, 2, 1, 1]) / 20
    return [
        Sentence(f"1-1-{number}", rng.choice(words, rng.integers(1, 7), p=chances).tolist())
        for number in range(60)
    ]


def made(sentences: list[Sentence], smoothing: Smoothing, prune: float = 0.0) -> Ngrams:
    corpus = language_model.words_of(sentences, min_count=1)
    levels = language_model.smooth(
        language_model.count(corpus, ORDER), corpus.vocabulary, smoothing
    )
    base = len(corpus.vocabulary)
    return language_model.finish(
        language_model.prune(levels, prune, base) if prune else levels, corpus.vocabulary
    )


def grams(sentences: list[Sentence], length: int) -> Counter[Gram]:
    texts = [[BEGIN, *sentence.words, END] for sentence in sentences]
    return Counter(
        tuple(text[place : place + length])
        for text in texts
        for place in range(len(text) - length + 1)
    )


class Plain:
    """Interpolated smoothing, one probability at a time."""

    def __init__(self, sentences: list[Sentence], kneser_ney: bool) -> None:
        self.counts = {length: grams(sentences, length) for length in range(1, ORDER + 1)}
        del self.counts[1][(BEGIN,)]
        self.kneser_ney = kneser_ney
        if kneser_ney:
            for length in range(1, ORDER):
                before: defaultdict[Gram, set[str]] = defaultdict(set)
                for longer in self.counts[length + 1]:
                    before[longer[1:]].add(longer[0])
                for gram in self.counts[length]:
                    if gram[0] != BEGIN:
                        self.counts[length][gram] = len(before[gram])

    def discount(self, length: int, count: int) -> float:
        times = Counter(self.counts[length].values())
        y = max(1, times[1]) / (max(1, times[1]) + 2 * max(1, times[2]))
        at = min(count, 3)
        formula = at - (at + 1) * y * max(1, times[at + 1]) / max(1, times[at])
        return max(0.1, formula)

    def prob(self, gram: Gram) -> float:
        if not gram:
            return 0.0
        length, context = len(gram), gram[:-1]
        after = {g: c for g, c in self.counts[length].items() if g[:-1] == context}
        lower = float(gram == (UNKNOWN,)) if length == 1 else self.prob(gram[1:])
        if not after:
            return lower
        total, count = sum(after.values()), after.get(gram, 0)
        if not self.kneser_ney:
            return (count + len(after) * lower) / (total + len(after))
        taken = sum(self.discount(length, c) for c in after.values())
        own = count - self.discount(length, count) if count else 0.0
        return (own + taken * lower) / total


@pytest.mark.parametrize("smoothing", [kneser_ney, witten_bell])
def test_probabilities_are_those_of_the_formula(
    sentences: list[Sentence], smoothing: Smoothing
) -> None:
    model = made(sentences, smoothing)
    plain = Plain(sentences, smoothing is kneser_ney)
    for context in [("a", "b"), (BEGIN, "a"), ("f", "e"), ("b",), (BEGIN,), (), ("e", "e")]:
        state = ngram.NOTHING
        for word in context:
            state = model.advance(state, model.ids[word])
        for word in (*"abcdef", END, UNKNOWN):
            expected = plain.prob((*context, word))
            found = math.exp(model.log_prob(state, model.ids[word]))
            assert found == pytest.approx(expected, rel=1e-4), (context, word)


@pytest.mark.parametrize("prune", [0.0, 1e-4, 1e-2])
@pytest.mark.parametrize("smoothing", [kneser_ney, witten_bell])
def test_after_any_context_probabilities_add_up_to_one(
    sentences: list[Sentence], smoothing: Smoothing, prune: float
) -> None:
    model = made(sentences, smoothing, prune)
    contexts = {gram[:-1] for length in (1, 2, 3) for gram in grams(sentences, length)}
    for context in contexts:
        state = ngram.NOTHING
        for word in context:
            state = model.advance(state, model.ids[word])
        log_probs = [model.log_prob(state, word) for word in range(len(model.vocabulary))]
        assert np.exp(log_probs).sum() == pytest.approx(1.0, abs=1e-4)


def test_pruning_leaves_out_what_matters_least(sentences: list[Sentence]) -> None:
    whole = made(sentences, witten_bell)
    seen = grams(sentences, 3)
    contexts = grams(sentences, 2)
    total = sum(grams(sentences, 1).values()) - len(sentences)
    plain = Plain(sentences, kneser_ney=False)
    losses = {}
    for gram in seen:
        context = gram[:-1]
        kept = [other for other in seen if other[:-1] == context and other != gram]
        probs = {word: plain.prob((*context, word)) for word in (*"abcdef", END, UNKNOWN)}
        lower = {word: plain.prob((context[1], word)) for word in probs}
        mine = {other[-1] for other in kept}
        left = 1 - sum(probs[word] for word in mine)
        weight = left / (1 - sum(lower[word] for word in mine))
        without = {word: probs[word] if word in mine else weight * lower[word] for word in probs}
        loss = sum(p * math.log(p / without[word]) for word, p in probs.items() if p)
        losses[gram] = math.expm1(contexts[context] / total * loss)
    ranked = sorted(losses, key=losses.__getitem__)
    cut = max(range(30, 80), key=lambda rank: losses[ranked[rank]] / losses[ranked[rank - 1]])
    threshold = (losses[ranked[cut - 1]] + losses[ranked[cut]]) / 2
    pruned = made(sentences, witten_bell, threshold)
    assert whole.sizes[2] == len(ranked)
    assert pruned.sizes[2] == len(ranked) - cut


def test_rare_words_become_unknown(sentences: list[Sentence]) -> None:
    rare = [*sentences, Sentence("1-1-99", ["a", "once", "b"])]
    corpus = language_model.words_of(rare, min_count=2)
    assert "once" not in corpus.vocabulary
    assert (corpus.tokens == corpus.vocabulary.index(UNKNOWN)).sum() == 1


@pytest.fixture
def data(tmp_path: Path, sentences: list[Sentence]) -> Path:
    """Return a folder like the real one; reader 2's third sentence is heard in validation."""
    lines = [f"{s.name} {' '.join(s.words).upper()}" for s in sentences]
    lines += [f"2-7-{number} A B FACE {word}" for number, word in enumerate(["C", "D", "F'", "E"])]
    lines.append("3-1-0 A B FACE F'")  # the same words by another reader
    (tmp_path / "text").mkdir()
    with lzma.open(tmp_path / language_model.TEXT, "wt") as file:
        file.write("\n".join(lines))
    (tmp_path / language_model.READINGS).mkdir(parents=True)
    manifest = "path\tspeaker\tsplit\tseconds\ttext\n1/1-1-0.opus\t1\ttrain\t1.0\tA\n"
    manifest += "2/2-7-2.opus\t2\tvalid\t1.0\tA B FACE F'\n"
    (tmp_path / language_model.READINGS / "manifest.tsv").write_text(manifest)
    return tmp_path


def test_what_validation_hears_is_not_learnt(data: Path, sentences: list[Sentence]) -> None:
    learnt, unseen = language_model.read_sentences(data)
    assert [sentence.words for sentence in unseen] == [["a", "b", "face", "f'"]]
    assert {s.name for s in learnt} == {s.name for s in sentences} | {"2-7-0", "2-7-1", "2-7-3"}
    learnt, _ = language_model.read_sentences(data, by_reader=True)
    assert {s.name for s in learnt} == {s.name for s in sentences}


def test_the_command_writes_both_forms_of_both_models(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "lm"
    options = ["--data", str(data), "--out", str(out), "--letters", "4", "--words", "2"]
    monkeypatch.setattr(sys, "argv", ["language_model", *options])
    language_model.main()
    assert "perplexity" in capsys.readouterr().out
    for name in ("letters", "words"):
        compact, text = (ngram.load(out / f"{name}{end}") for end in (".npz", ".arpa.gz"))
        assert compact.vocabulary == text.vocabulary
        assert compact.words.tolist() == text.words.tolist()
        np.testing.assert_allclose(compact.log_probs, text.log_probs, atol=0.3)
    assert compact.vocabulary[:3] == (UNKNOWN, BEGIN, END)
