"""Prefix beam search and hotwords, against sums over all alignments of a few frames."""

import math
import re
from collections import defaultdict
from itertools import groupby, product
from typing import NamedTuple

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import log_softmax

from engine.errors import Refused
from engine.messages import Hotword, Speech
from engine.speech.beam import BeamDecoder
from engine.speech.ctc import Hypothesis
from engine.speech.hotwords import Hotwords

LETTERS = ("", " ", "a", "b")
WORDS = ("", "yes", "no", "yes sir")  # no word has a separator in the decoder's sense
SLOT = np.array([0])


def endless(labels: tuple[str, ...], whim: "Whim | None" = None) -> BeamDecoder:
    return BeamDecoder(labels, 1, whim, beam=10**6, margin=math.inf, floor=-math.inf)


def log_probs(seed: int, frames: int, labels: int = 4, peak: float = 1.0) -> NDArray[np.float32]:
    """Return one row's, (1, frames, labels)."""
    scores = np.random.default_rng(seed).normal(size=(1, frames, labels)) * peak
    return log_softmax(scores, axis=2).astype(np.float32)


class Whim:
    """A language model without rhyme or reason that looks at the whole text."""

    def begin(self) -> str:
        return "^"

    def advance(self, state: str, label: int) -> str:
        return state + str(label)

    def score(self, state: str, label: int) -> float:
        return float(np.random.default_rng([label, *state.encode()]).normal())

    def end(self, state: str, inside: bool) -> float:
        return self.score(state, 1) if inside else 0.25

    def of(self, labels: list[int], ended: bool, separator: int) -> float:
        """Return the score of a whole text."""
        steps = ["^" + "".join(map(str, labels[:place])) for place in range(len(labels) + 1)]
        total = sum(self.score(step, label) for step, label in zip(steps, labels, strict=False))
        inside = bool(labels) and labels[-1] != separator
        return total + (self.end(steps[-1], inside) if ended else 0.0)


class Forgetful(Whim):
    """A language model that remembers only the last label."""

    def advance(self, state: str, label: int) -> str:
        return str(label)


class Found(NamedTuple):
    score: float
    alignment: tuple[int, ...]  # the best one


def collapse(alignment: tuple[int, ...], separator: int) -> list[int]:
    said = [label for label, _ in groupby(alignment) if label]
    joined: list[int] = []
    for label in said:
        if label == separator and (not joined or joined[-1] == separator):
            continue
        joined.append(label)
    return joined


def all_texts(
    values: NDArray[np.float32], labels: tuple[str, ...], ended: bool, whim: Whim | None
) -> dict[str, Found]:
    """Return every text that the frames can say, by adding up all alignments."""
    separator = labels.index(" ") if " " in labels else 0
    sums: defaultdict[tuple[int, ...], list[tuple[float, tuple[int, ...]]]] = defaultdict(list)
    for alignment in product(range(len(labels)), repeat=len(values)):
        p = math.prod(math.exp(values[t, label]) for t, label in enumerate(alignment))
        sums[tuple(collapse(alignment, separator))].append((p, alignment))
    texts: defaultdict[str, list[tuple[float, tuple[int, ...]]]] = defaultdict(list)
    for text, found in sums.items():
        weight = math.exp(whim.of(list(text), ended, separator)) if whim else 1.0
        words = [labels[label] for label in text]
        name = "".join(words).strip() if separator else " ".join(words)
        texts[name].append((sum(p for p, _ in found) * weight, max(found)[1]))
    return {
        name: Found(math.log(sum(p for p, _ in found)), max(found)[1])
        for name, found in texts.items()
    }


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("labels", [LETTERS, WORDS[:3]])
@pytest.mark.parametrize("with_language", [False, True])
def test_an_endless_beam_sums_all_alignments(
    labels: tuple[str, ...], with_language: bool, ended: bool
) -> None:
    for seed in range(3):
        values = log_probs(seed, 5, len(labels))
        whim = Whim() if with_language else None
        expected = all_texts(values[0], labels, ended, whim)
        decoder = endless(labels, whim)
        decoder.push(SLOT, values)
        found = decoder.alternatives(0, 10**6, ended)
        assert {one.text: one.score for one in found} == pytest.approx(
            {text: one.score for text, one in expected.items()}, abs=1e-5
        )
        assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
        assert found[0] == decoder.best(0, ended)


@given(seed=st.integers(0, 10**6), labels=st.sampled_from([LETTERS, WORDS[:3]]))
def test_words_have_the_frames_and_peaks_of_their_best_alignment(
    seed: int, labels: tuple[str, ...]
) -> None:
    values = log_probs(seed, 5, len(labels))
    decoder = endless(labels)
    decoder.push(SLOT, values)
    expected = all_texts(values[0], labels, False, None)
    for one in decoder.alternatives(0, 6, ended=False):
        alignment = expected[one.text].alignment
        runs = [
            (label, [t for t, _ in at])
            for label, at in groupby(enumerate(alignment), key=lambda step: step[1])
        ]
        said = [(labels[label], at) for label, at in runs if label]
        words = [list(word) for space, word in groupby(said, lambda s: s[0] == " ") if not space]
        if " " not in labels:
            words = [[label] for label in said]
        assert len(one.words) == len(words)
        for word, letters in zip(one.words, words, strict=True):
            assert (word.first, word.last) == (letters[0][1][0], letters[-1][1][-1] + 1)
            peaks = [max(values[0, t, labels.index(label)] for t in at) for label, at in letters]
            assert word.confidence == pytest.approx(math.exp(sum(peaks) / len(peaks)))


LANGUAGES = {"Whim": Whim, "Forgetful": Forgetful}
PHRASES = (Hotword("ab", 1.5), Hotword("b a", 0.5))


@given(
    seed=st.integers(0, 10**6),
    cuts=st.lists(st.integers(0, 40), max_size=5),
    hotwords=st.sampled_from([(), PHRASES]),
    language=st.sampled_from(["Whim", "Forgetful"]),
)
def test_any_split_and_any_batch_are_the_same_as_each_row_alone(
    seed: int, cuts: list[int], hotwords: tuple[Hotword, ...], language: str
) -> None:
    rows = [log_probs(seed + row, 40, peak=4.0) for row in range(3)]
    speech = [Speech(), Speech(hotwords=hotwords, alternatives=3), Speech(alternatives=2)]
    together = BeamDecoder(LETTERS, 6, LANGUAGES[language](), beam=4)
    slots = np.array([5, 0, 3])
    for slot, options in zip(slots, speech, strict=True):
        together.open(slot, options)
    for part in np.split(np.concatenate(rows), sorted(cuts), axis=1):
        together.push(slots, part)
    for slot, row, options in zip(slots, rows, speech, strict=True):
        alone = BeamDecoder(LETTERS, 1, LANGUAGES[language](), beam=4)
        alone.open(0, options)
        alone.push(SLOT, row)
        assert together.alternatives(slot, 9) == alone.alternatives(0, 9)
        assert together.take(slot) == alone.take(0)
    assert together.frames(1) == 0


def test_a_row_that_was_reset_or_opened_is_like_a_new_one() -> None:
    first, second = log_probs(1, 20, peak=3.0), log_probs(2, 20, peak=3.0)
    fresh = BeamDecoder(LETTERS, 1)
    fresh.push(SLOT, second)
    for again in (lambda used: used.reset(0), lambda used: used.open(0, Speech())):
        used = BeamDecoder(LETTERS, 1)
        used.push(SLOT, first)
        again(used)
        assert used.frames(0) == 0
        assert used.best(0) == Hypothesis((), 0.0)
        used.push(SLOT, second)
        assert used.take(0) == fresh.take(0)


@pytest.mark.parametrize("labels", [LETTERS, WORDS])
def test_what_was_taken_goes_on_in_another_row_after_a_way_through_bytes(
    labels: tuple[str, ...],
) -> None:
    values = log_probs(3, 30, peak=3.0)
    hotwords = (Hotword(labels[2]),)
    for cut in range(0, 31, 3):
        one = BeamDecoder(labels, 1, Forgetful(), beam=4)
        other = BeamDecoder(labels, 3, Forgetful(), beam=4)
        one.open(0, Speech(hotwords=hotwords, alternatives=5))
        one.push(SLOT, values[:, :cut])
        other.put(2, msgspec.msgpack.decode(msgspec.msgpack.encode(one.take(0))))
        for decoder, slot in ((one, 0), (other, 2)):
            decoder.push(np.array([slot]), values[:, cut:])
            decoder.reset(slot)
            decoder.push(np.array([slot]), values)
        assert other.alternatives(2, 9) == one.alternatives(0, 9)


def said(text: str, labels: tuple[str, ...], rival: float = -4.0) -> NDArray[np.float32]:
    """Return one row in which each character is followed by a blank; rivals are equally bad."""
    values = np.full((1, 2 * len(text), len(labels)), rival, np.float32)
    for place, letter in enumerate(text):
        values[0, 2 * place, labels.index(letter)] = -0.05
        values[0, 2 * place + 1, 0] = -0.01
    return values


def test_a_long_utterance_is_kept_whole_while_its_beginning_is_settled() -> None:
    text = " ".join(["ab"[: 1 + place % 2] * (1 + place % 7) for place in range(150)])
    values = said(text, LETTERS)
    decoder = BeamDecoder(LETTERS, 1)
    sizes = []
    for part in np.array_split(values, 60, axis=1):
        decoder.push(SLOT, part)
        words = decoder.best(0).words
        sizes.append(len(msgspec.msgpack.encode(decoder.take(0))) - 40 * len(words))
    assert decoder.best(0).text == text
    assert decoder.stable_words(0) > 130
    starts = [2 * match.start() for match in re.finditer(r"\S+", text)]
    assert [word.first for word in words] == starts
    assert max(sizes[30:]) < 1.2 * max(sizes[:30])


def test_a_word_without_end_is_kept_whole() -> None:
    decoder = BeamDecoder(LETTERS, 1)
    decoder.push(SLOT, said("ab" * 300, LETTERS, rival=-30.0))
    assert decoder.best(0).text == "ab" * 300
    assert decoder.stable_words(0) == 0
    decoder.push(SLOT, said(" a", LETTERS, rival=-30.0))
    assert decoder.stable_words(0) == 1


def test_stable_words_are_those_on_which_all_prefixes_agree() -> None:
    decoder = BeamDecoder(LETTERS, 1)
    doubtful = said("a b a ", LETTERS, rival=-30.0)
    doubtful[0, 4, [2, 3]] = np.log([0.5, 0.4])
    decoder.push(SLOT, doubtful)
    assert decoder.best(0).text == "a a a"
    assert decoder.stable_words(0) == 1


def test_alternatives_differ_also_where_the_language_model_has_forgotten() -> None:
    values = said("a a a b ", LETTERS, rival=-30.0)
    doubts = [(0, 0.55, 0.35), (4, 0.5, 0.4), (8, 0.6, 0.3)]
    for frame, a, b in doubts:
        values[0, frame, [2, 3]] = np.log([a, b])
    expected = {}
    whim = Forgetful()
    for letters in product((2, 3), repeat=3):
        text = [label for letter in letters for label in (letter, 1)] + [3, 1]
        states = ["^", *map(str, text)]
        score = sum(whim.score(state, label) for state, label in zip(states, text, strict=False))
        score += sum(math.log(p[letter - 1]) for p, letter in zip(doubts, letters, strict=True))
        expected[" ".join(LETTERS[letter] for letter in (*letters, 3))] = score
    ranked = sorted(expected, key=expected.__getitem__, reverse=True)
    decoder = BeamDecoder(LETTERS, 2, whim, beam=4)
    decoder.open(0, Speech(alternatives=8))
    decoder.push(np.array([0, 1]), np.repeat(values, 2, axis=0))
    found = decoder.alternatives(0, 8, ended=False)
    assert [one.text for one in found] == ranked
    gaps = np.diff([expected[text] for text in ranked])
    np.testing.assert_allclose(np.diff([one.score for one in found]), gaps, atol=1e-3)
    for one in found:
        assert [(word.first, word.last) for word in one.words] == [(0, 1), (4, 5), (8, 9), (12, 13)]
    assert decoder.best(1).text == ranked[0]
    assert len(decoder.alternatives(1, 8)) < 8


def test_silence_costs_no_prefix_and_moves_the_time() -> None:
    decoder = BeamDecoder(LETTERS, 1)
    silence = np.full((1, 50, 4), -9.0, np.float32)
    silence[:, :, 0] = -0.001
    for values in (silence, said("a", LETTERS), silence, said("a", LETTERS)):
        decoder.push(SLOT, values)
    (word,) = decoder.best(0).words
    assert (word.text, word.first, word.last) == ("aa", 50, 103)


SPELT = ("", " ", *"abcdefghijklmnopqrstuvwxyz")


def hot_score(hotwords: Hotwords, text: str, ended: bool) -> float:
    state, total = hotwords.begin(), 0.0
    for letter in text:
        label = SPELT.index(letter)
        total += hotwords.score(state, label)
        state = hotwords.advance(state, label)
    return total + (hotwords.end(state, inside=not text.endswith(" ")) if ended else 0.0)


@given(text=st.lists(st.sampled_from(["new", "york", "times", "newt", "old", "t"])))
def test_a_text_is_worth_its_hotwords_and_nothing_for_their_beginnings(text: list[str]) -> None:
    boosts = {"new york": 1.0, "york times": 0.25, "newt": 2.0, "t old new": 0.5}
    hotwords = Hotwords(SPELT, [Hotword(phrase, boost) for phrase, boost in boosts.items()])
    joined = " ".join(text)
    worth = sum(
        boost * len(phrase.replace(" ", ""))
        for phrase, boost in boosts.items()
        for _ in re.finditer(rf"(?=\b{phrase}\b)", joined)
    )
    assert hot_score(hotwords, joined, ended=True) == pytest.approx(worth)
    assert hot_score(hotwords, f"{joined} ", ended=True) == pytest.approx(worth if joined else 0.0)


def test_a_hotword_counts_letter_by_letter_before_it_is_complete() -> None:
    hotwords = Hotwords(SPELT, [Hotword("New  York", 1.0), Hotword("new", 0.5)])
    lent = [hot_score(hotwords, "new york"[:length], ended=False) for length in range(9)]
    assert lent == [0.0, 1.0, 2.0, 3.0, 1.5, 2.5, 3.5, 4.5, 5.5]  # "new" has its own boost
    assert hot_score(hotwords, "new yak", ended=False) == 1.5
    assert hot_score(hotwords, "newer", ended=False) == 0.0


def test_hotwords_change_the_text_of_their_stream_only() -> None:
    values = said("abba ba", LETTERS)
    values[0, 4, [2, 3]] = np.log([0.2, 0.75])  # the third letter might be an a
    decoder = BeamDecoder(LETTERS, 3)
    slots = np.array([0, 1, 2])
    decoder.open(1, Speech(hotwords=(Hotword("abaa", 1.0),)))
    decoder.open(2, Speech(hotwords=(Hotword("abaab", 1.0),)))
    decoder.push(slots, np.repeat(values, 3, axis=0))
    assert [decoder.best(slot, ended=True).text for slot in slots] == [
        "abba ba",
        "abaa ba",
        "abba ba",  # the boost was given back
    ]
    decoder.reset(1)
    decoder.push(slots[1:2], values)
    assert decoder.best(1).text == "abaa ba"
    decoder.open(1, Speech())
    decoder.push(slots[1:2], values)
    assert decoder.best(1).text == "abba ba"


def test_hotwords_of_whole_words() -> None:
    values = log_probs(5, 6)
    values[0, :, 1:3] = [[-1.0, -1.2]] * 6
    decoder = BeamDecoder(WORDS, 1)
    decoder.open(0, Speech(hotwords=(Hotword("no", 0.5),)))
    decoder.push(SLOT, values)
    assert "no" in decoder.best(0).text
    decoder.open(0, Speech(hotwords=(Hotword("no", -5.0),)))
    decoder.push(SLOT, values)
    assert "no" not in decoder.best(0).text


@pytest.mark.parametrize("phrase", ["", "  ", "abc", "a-b"])
def test_a_hotword_that_the_labels_cannot_spell_is_refused_and_the_row_goes_on(
    phrase: str,
) -> None:
    decoder = BeamDecoder(LETTERS, 1)
    decoder.push(SLOT, said("ab", LETTERS))
    with pytest.raises(Refused, match="expected") as refusal:
        decoder.open(0, Speech(hotwords=(Hotword(phrase),)))
    assert refusal.value.code == "bad_hotword"
    assert decoder.best(0).text == "ab"
