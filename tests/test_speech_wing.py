"""Speech through the engine: what is said, when, in any cutting, beside anybody, after anything.

The models say what the signal says (see ``tests/tiny.py``), so that a test decides what is heard
and knows the answer without a recogniser.
"""

import gc
import itertools
import signal
import threading
import tracemalloc
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine import messages as m
from engine import server as server_module
from engine.config import Config, Limits
from engine.errors import ModelFileError
from engine.messages import Hotword, Speech
from engine.model_file import Decoding, Gate
from engine.server import Server
from engine.speech import wing as speech_wing
from tests import tiny
from tests.drive import Driven, chunks

Signal = NDArray[np.float32]
RATE, HOP, FRAME, VOICE_HOP = round(tiny.RATE_HZ), tiny.HOP, tiny.FRAME, tiny.VOICE_HOP
LOOK_AHEAD = 12
SILENCE, LATE, MARGIN = 80, 16, 30  # samples: 0.8 s, 0.16 s, 0.3 s
LABEL = {letter: number for number, letter in enumerate(tiny.ALPHABET) if letter}
# A letter lasts two frames; another one, or the next word, follows at once.
LETTER = 2 * FRAME
KINDS = ("prompt", "late", "gated", "searched")
Folder = Callable[..., Path]


def quiet(samples: int) -> Signal:
    return np.zeros(samples, np.float32)


def said(text: str) -> Signal:
    """Return a signal that says a text; equal letters in a row have a frame between them."""
    parts = [quiet(0)]
    for before, letter in itertools.pairwise(" " + text):
        parts += [quiet(FRAME)] if before == letter else []
        parts += [np.full(LETTER, LABEL[letter], np.float32)]
    return np.concatenate(parts)


def murmured(samples: int) -> Signal:
    """Return a signal in which there is voice, but no word."""
    return np.full(samples, -1.0, np.float32)


def joined(*parts: Signal) -> Signal:
    return np.concatenate(parts)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models that say a letter at once; 12 samples behind; with a gate before them; by a beam."""
    folder = tmp_path_factory.mktemp("speech")
    tiny.write_detector(folder)
    gate = Gate("detector.onnx", hold_s=2.0)
    return {
        "prompt": tiny.write_talker(folder, "prompt", 0),
        "late": tiny.write_talker(folder, "late", LOOK_AHEAD),
        "gated": tiny.write_talker(folder, "gated", LOOK_AHEAD, gate=gate),
        "searched": tiny.write_talker(folder, "searched", decoding=Decoding(beam=8)),
        "twice": tiny.write_talker(
            folder, "twice", LOOK_AHEAD, gate=gate, decoding=Decoding(second_pass="second")
        ),
        "both": tiny.write_talker(
            folder, "both", 0, decoding=Decoding(beam=8, second_pass="second")
        ),
    }


def opened(driven: Driven, model: str, name: str = "s", peer: str = "a", **rules: Any) -> None:
    driven.open(peer, name, model, unit="1", speech=Speech(**rules))


def deliver(driven: Driven, requests: Iterable[m.Message], eager: bool = True) -> None:
    """Send messages, and let the engine run after each or only after all."""
    for request in requests:
        driven.say("a", request)
        if eager:
            driven.run()
    driven.settle()


def hear(path: Path, signal: Signal, *after: m.Message, **rules: Any) -> Driven:
    """Return an engine to which a stream has said a whole signal at once."""
    driven = Driven(path, credit_s=100.0)
    opened(driven, path.stem, **rules)
    deliver(driven, [*chunks("s", signal), *after])
    return driven


def texts(driven: Driven, name: str = "s", peer: str = "a") -> list[str]:
    return [final.text for final in driven.told(peer, m.Final, name)]


class Utterance(NamedTuple):
    """What was said, and from where on."""

    text: str
    begin: int


def expected(kind: str, utterances: Sequence[Utterance]) -> list[m.Final]:
    """Return the finals of utterances with long silence behind each."""
    finals = []
    grid = VOICE_HOP if kind == "gated" else FRAME
    for number, (text, begin) in enumerate(utterances):
        end = begin + len(said(text))
        start, end_of_voice = begin // grid * grid, -(-end // grid) * grid
        words, place = [], begin
        for word in text.split():
            last = place + len(said(word))
            words.append(m.Word(word, place / RATE, last / RATE, 1.0))
            place = last + LETTER
        # The prompt model needs nothing beyond the silence, the others what they look ahead; the
        # gate knows of the silence while the text lags behind.
        needed = {"prompt": 0, "gated": 0}.get(kind, LOOK_AHEAD)
        endpoint = end_of_voice + SILENCE + needed
        finals.append(
            m.Final("s", number, text, start, end_of_voice, endpoint, "silence", tuple(words))
        )
    return finals


def sure(final: m.Final) -> m.Final:
    """Return a final without what its words leave to doubt, which is next to nothing."""
    assert all(word.confidence > 0.99 for word in final.words)
    words = tuple(msgspec.structs.replace(word, confidence=1.0) for word in final.words)
    return msgspec.structs.replace(final, words=words)


letters = st.text("abcd", min_size=1, max_size=4)
phrases = st.lists(letters, min_size=1, max_size=3).map(" ".join)
cuts = st.lists(st.integers(0, 1500), max_size=12)


# --- any cutting is the whole --------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20)
@given(
    parts=st.lists(st.tuples(phrases, st.integers(24, 60)), min_size=1, max_size=4),
    lead=st.integers(0, 40),
    places=cuts,
    eager=st.booleans(),
)
def test_any_cutting_gives_the_utterances_that_were_said(
    paths: dict[str, Path],
    kind: str,
    parts: list[tuple[str, int]],
    lead: int,
    places: list[int],
    eager: bool,
) -> None:
    """Phrases with 0.96 to 2.4 s of silence behind them."""
    signal, utterances = quiet(lead * FRAME), []
    for text, pause in parts:
        utterances.append(Utterance(text, len(signal)))
        signal = joined(signal, said(text), quiet(pause * FRAME))
    driven = Driven(paths[kind], credit_s=100.0)
    opened(driven, kind)
    # Not whole hops: the silence of the last may want a flush, which changes nothing else.
    deliver(
        driven, [*chunks("s", signal, places), *chunks("s", quiet(2 * HOP), (), 99, len(signal))]
    )
    assert [sure(final) for final in driven.told("a", m.Final)] == expected(kind, utterances)
    for partial in driven.told("a", m.Partial):
        assert utterances[partial.utterance].text.startswith(partial.text)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20)
@given(
    parts=st.lists(
        st.tuples(phrases, st.integers(0, 30), st.sampled_from(["", "", "lose", "flush"])),
        min_size=1,
        max_size=5,
    ),
    places=cuts,
    eager=st.booleans(),
)
def test_any_cutting_gives_the_same_finals_with_gaps_and_flushes_anywhere(
    paths: dict[str, Path],
    kind: str,
    parts: list[tuple[str, int, str]],
    places: list[int],
    eager: bool,
) -> None:
    """Compare with every part sent as one chunk, after the one before is through."""
    told = []
    for cut_at, wait in (([], True), (places, eager)):
        driven = Driven(paths[kind], credit_s=100.0)
        opened(driven, kind, silence_s=0.4)
        seq = index = 0
        for number, (text, pause, then) in enumerate(parts):
            sent = chunks("s", joined(said(text), quiet(pause * FRAME)), cut_at, seq, index)
            seq, index = sent[-1].seq + 1, sent[-1].index + len(sent[-1].data) // 4
            deliver(driven, sent, wait)
            if then == "lose":
                index += 44
            if then == "flush":
                deliver(driven, [m.Flush("s", number)], wait)
        driven.settle()
        told.append(driven)
    whole, cut = told
    assert cut.told("a", m.Final) == whole.told("a", m.Final)
    for one, other in zip(cut.told("a", m.Final), whole.told("a", m.Final), strict=True):
        assert (one.start, one.end, one.words) == (other.start, other.end, other.words)
    assert cut.told("a", m.Flushed) == whole.told("a", m.Flushed)
    assert cut.told("a", m.Gap) == whole.told("a", m.Gap)


@pytest.mark.parametrize("kind", ["late", "gated"])
@settings(max_examples=20)
@given(places=st.lists(st.integers(0, 4000), max_size=12))
def test_any_cutting_at_another_rate_gives_the_same_bits(
    paths: dict[str, Path], kind: str, places: list[int]
) -> None:
    signal = joined(quiet(40), said("ab cd"), quiet(120), said("dad"), quiet(40))
    signal = np.repeat(signal, 4)
    told = []
    for cut_at in ([], places):
        driven = Driven(paths[kind], credit_s=100.0)
        driven.open("a", "s", kind, unit="1", rate_hz=400.0)
        deliver(driven, [*chunks("s", signal, cut_at), m.Flush("s", 1)])
        told.append(driven.told("a", m.Final))
    assert [final.text for final in told[0]] == ["ab cd", "dad"]
    assert told[0] == told[1]
    for final in told[0]:
        assert final.start < final.end <= final.endpoint <= len(signal)
        assert final.start / 400 - 0.05 <= final.words[0].start_s <= final.start / 400 + 0.2


def test_several_hops_at_once_are_tried(paths: dict[str, Path]) -> None:
    """The promise above is of no worth if every step takes one hop."""
    driven = hear(paths["late"], joined(said("abc"), quiet(400)))
    assert max(hops for runs in driven.metrics.runs.values() for _, hops in runs) > 1


# --- alone is batched ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20)
@given(
    actions=st.lists(
        st.tuples(
            st.sampled_from(["send", "send", "turn", "speak", "rest", "open", "close", "flush"]),
            st.integers(0, 2),
            st.integers(1, 90),
        ),
        max_size=50,
    )
)
def test_a_streams_finals_do_not_depend_on_its_neighbours(
    paths: dict[str, Path], kind: str, actions: list[tuple[str, int, int]]
) -> None:
    signal = joined(
        quiet(24), said("ab c"), quiet(120), said("dad"), quiet(52), said("b"), quiet(140)
    )
    driven = Driven(paths[kind], credit_s=100.0)
    opened(driven, kind)
    heads: dict[str, list[int]] = {}  # of the neighbours: number and index of the next chunk
    sent = seq = 0
    for what, who, count in [*actions, ("send", 0, len(signal))]:
        name = f"n{who}"
        if what == "turn":
            driven.turn()
        elif what == "send" and sent < len(signal):
            part = signal[sent : sent + count]
            driven.say("a", *chunks("s", part, (), seq, sent))
            sent, seq = sent + len(part), seq + 1
        elif what == "open":
            opened(driven, kind, name, "b")
            heads[name] = [0, 0]
        elif what in ("close", "flush") and name in heads:
            driven.say("b", m.Close(name) if what == "close" else m.Flush(name))
            if what == "close":
                del heads[name]
        elif what in ("speak", "rest") and name in heads:
            part = joined(said("bad"), quiet(count)) if what == "speak" else quiet(count)
            driven.say("b", *chunks(name, part, (), *heads[name]))
            heads[name] = [heads[name][0] + 1, heads[name][1] + len(part)]
    driven.settle()
    alone = hear(paths[kind], signal)
    assert driven.told("a", m.Final) == alone.told("a", m.Final)
    assert texts(alone) == ["ab c", "dadb"]


# --- endpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20)
@given(
    pieces=st.lists(st.text("abcd", min_size=1, max_size=5), min_size=12, max_size=30),
    places=cuts,
)
def test_an_utterance_that_is_too_long_is_cut_between_words(
    paths: dict[str, Path], kind: str, pieces: list[str], places: list[int]
) -> None:
    """Somebody who never pauses: no word is lost, doubled or cut in two, in any cutting."""
    text = " ".join(pieces)
    driven = Driven(paths[kind], credit_s=100.0)
    opened(driven, kind, max_utterance_s=1.5)
    deliver(driven, [*chunks("s", said(text), places), m.Flush("s", 1)])
    finals = driven.told("a", m.Final)
    assert " ".join(final.text for final in finals) == text
    assert [final.reason for final in finals[:-1]] == ["length"] * (len(finals) - 1)
    assert len(finals) > 1
    for final, following in itertools.pairwise(finals):
        assert final.end - final.start <= 150
        assert final.end <= following.start
        assert final.words[-1].end_s <= following.words[0].start_s
    words = [(word.start_s, word.end_s) for final in finals for word in final.words]
    begin = 0
    for piece, (start_s, end_s) in zip(pieces, words, strict=True):
        length = len(said(piece))
        assert (start_s, end_s) == (begin / RATE, (begin + length) / RATE)
        begin += length + LETTER


@pytest.mark.parametrize("kind", ["gated", "twice"])
@pytest.mark.parametrize(
    "signal",
    [
        quiet(1200),
        joined(murmured(80), quiet(500)),
        murmured(1200),  # longer than an utterance may be
        joined(murmured(40), quiet(100), murmured(40), quiet(500)),
    ],
    ids=["silence", "murmur", "long murmur", "murmurs"],
)
def test_where_nothing_is_said_nothing_is_told(
    paths: dict[str, Path], second: "Echo", kind: str, signal: Signal
) -> None:
    driven = Driven(paths[kind], credit_s=100.0)
    second.heard.clear()  # of how long it takes
    opened(driven, kind, max_utterance_s=3.0)
    deliver(driven, [*chunks("s", signal), m.Flush("s", 1)])
    assert not driven.told("a", m.Final)
    assert not driven.told("a", m.Partial)
    assert not second.heard
    assert driven.told("a", m.Flushed)


def test_what_was_said_after_a_murmur_is_an_utterance_of_its_own(paths: dict[str, Path]) -> None:
    signal = joined(murmured(40), quiet(300), said("ab"), quiet(120))
    (final,) = hear(paths["gated"], signal).told("a", m.Final)
    assert (final.utterance, final.text, final.start) == (0, "ab", 340)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [8, 9, 20, 24, 40, 41, 55])
def test_a_flush_tells_the_last_words_first(paths: dict[str, Path], kind: str, length: int) -> None:
    """Whatever is left in the queue: nothing, a part of a hop, or more than the look-ahead."""
    signal = joined(said("ab"), quiet(60), said("c"), quiet(40))[: 16 + 60 + length]
    driven = hear(paths[kind], signal, m.Flush("s", 7))
    flushed = m.Flushed("s", 7, len(signal))
    (final,) = driven.told("a", m.Final)
    told = [one for one in driven.heard("a") if not isinstance(one, m.Partial | m.Ack)]
    assert told[-2:] == [final, flushed]
    assert (final.text, final.reason) == ("abc", "flush")
    assert final.start < final.end <= final.endpoint <= len(signal)
    assert final.words[-1].end_s <= len(signal) / RATE


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_flush_all_begins_anew_and_utterances_count_on(
    paths: dict[str, Path], kind: str
) -> None:
    driven = Driven(paths[kind], credit_s=100.0)
    opened(driven, kind)
    first, second = joined(quiet(16), said("ab")), joined(quiet(16), said("cd"))
    after = chunks("s", second, (), 1, len(first))
    deliver(driven, [*chunks("s", first), m.Flush("s", 1), *after, m.Flush("s", 2)])
    finals = driven.told("a", m.Final)
    assert [(final.utterance, final.text) for final in finals] == [(0, "ab"), (1, "cd")]
    assert finals[1].words[0].start_s == (len(first) + 16) / RATE
    assert finals[1].start >= len(first)


@pytest.mark.parametrize("policy", ["reset", "hold"])
@pytest.mark.parametrize("kind", ["prompt", "late", "gated"])
def test_a_gap_ends_what_was_being_said(tmp_path: Path, kind: str, policy: str) -> None:
    tiny.write_detector(tmp_path)
    changes: dict[str, Any] = {"gate": Gate("detector.onnx")} if kind == "gated" else {}
    look_ahead = 0 if kind == "prompt" else LOOK_AHEAD
    path = tiny.write_talker(tmp_path, kind, look_ahead, gap=policy, **changes)
    before = joined(said("ab"), quiet(64))
    gone = len(before) + 500
    after = joined(said("cd"), quiet(160))
    driven = Driven(path, credit_s=100.0)
    opened(driven, kind)
    deliver(driven, [*chunks("s", before), *chunks("s", after, (), 1, gone)])
    finals = driven.told("a", m.Final)
    assert [(final.text, final.reason) for final in finals] == [("ab", "gap"), ("cd", "silence")]
    assert finals[0].end <= finals[0].endpoint <= len(before)
    assert finals[1].start == gone
    assert finals[1].words[0].start_s == gone / RATE
    assert driven.told("a", m.Gap) == [m.Gap("s", len(before), gone, policy)]


@pytest.mark.parametrize("kind", ["late", "gated"])
def test_letters_of_before_a_gap_are_not_taken_for_words_behind_it(
    tmp_path: Path, kind: str
) -> None:
    """A state that is held still brings what was said last before the gap."""
    tiny.write_detector(tmp_path)
    gate = Gate("detector.onnx") if kind == "gated" else None
    path = tiny.write_talker(tmp_path, kind, LOOK_AHEAD, gap="hold", gate=gate)
    before, after = joined(quiet(24), said("ab")), joined(said("cd"), quiet(160))
    driven = Driven(path, credit_s=100.0)
    opened(driven, kind)
    deliver(driven, [*chunks("s", before), *chunks("s", after, (), 1, 500)])
    first, second = driven.told("a", m.Final)
    assert (first.text, first.end) == ("a", 40 if kind == "gated" else 28)
    assert (second.text, second.start, second.words[0].start_s) == ("cd", 500, 5.0)


@pytest.mark.parametrize("cut_at", [range(HOP, 340, HOP), [HOP]], ids=["hops", "whole"])
def test_a_word_that_loses_its_certainty_is_taken_back(
    tmp_path: Path, cut_at: Iterable[int]
) -> None:
    """The geometric mean of a sure letter and an unsure one is too low for a word."""
    path = tiny.write_talker(tmp_path, "unsure", 0, decoding=Decoding(min_confidence=0.8))
    unsure = np.full(LETTER, LABEL["b"] + 0.5, np.float32)
    driven = Driven(path, credit_s=100.0)
    opened(driven, "unsure", empty_silence_s=0.5)
    deliver(driven, chunks("s", joined(said("a"), quiet(24), unsure, quiet(300)), cut_at))
    assert [partial.text for partial in driven.told("a", m.Partial)] == ["a", ""]
    assert not driven.told("a", m.Final)


def test_a_pause_in_which_the_model_rests_keeps_the_times_of_what_follows(
    paths: dict[str, Path],
) -> None:
    """Longer than the gate holds; a neighbour speaks all the time, or nobody does."""
    signal = joined(said("ab "), quiet(336), said("cd"), quiet(40))
    told = []
    for neighbour in (quiet(400), np.tile(said("d "), 25)):
        driven = Driven(paths["gated"], credit_s=100.0)
        opened(driven, "gated", silence_s=5.0)
        opened(driven, "gated", "t", "b")
        for first in range(0, 400, HOP):
            for peer, name, samples in (("a", "s", signal), ("b", "t", neighbour)):
                part = samples[first : first + HOP]
                driven.say(peer, *chunks(name, part, (), first // HOP, first))
            driven.run()
        driven.say("a", m.Flush("s", 1))
        driven.settle()
        told.append(driven.told("a", m.Final))
    assert told[0] == told[1]
    (final,) = told[0]
    assert [(word.text, word.start_s) for word in final.words] == [("ab", 0.0), ("cd", 3.6)]


# --- what a stream asks for ----------------------------------------------------------------------


def test_a_word_is_shown_when_it_gets_no_more_letters(paths: dict[str, Path]) -> None:
    signal = joined(said("ab cad"), quiet(200))
    driven = Driven(paths["prompt"], credit_s=100.0)
    opened(driven, "prompt")
    deliver(driven, chunks("s", signal, range(HOP, 248, HOP)))
    shown = [(partial.text, partial.index) for partial in driven.told("a", m.Partial)]
    # The first word ends at 0.16 s with a space behind it, the last at 0.48 s with 0.1 s of none.
    assert shown == [("ab", 40), ("ab cad", 60)]
    assert texts(driven) == ["ab cad"]


def test_without_partials_there_are_finals_only(paths: dict[str, Path]) -> None:
    driven = hear(paths["late"], joined(said("ab"), quiet(200)), partials=False)
    assert texts(driven) == ["ab"]
    assert not driven.told("a", m.Partial)


@pytest.mark.parametrize("kind", ["searched", "both"])
def test_as_many_alternatives_as_were_asked_for_are_told(
    paths: dict[str, Path], second: "Echo", kind: str
) -> None:
    unsure = np.full(LETTER, LABEL["b"] - 0.49, np.float32)  # b, or else a
    signal = joined(said("c"), unsure, said("d"), quiet(300))
    (final,) = hear(paths[kind], signal, alternatives=2).told("a", m.Final)
    assert final.alternatives[0] == final.text
    assert len(set(final.alternatives)) == 2
    assert final.text == ("cbd" if kind == "searched" else "CBD")
    assert "cbd" in final.alternatives
    (plain,) = hear(paths[kind], signal).told("a", m.Final)
    assert plain.alternatives == ()


def test_a_hotword_wins_where_letters_are_nearly_alike(paths: dict[str, Path]) -> None:
    unsure = np.full(LETTER, LABEL["b"] - 0.45, np.float32)
    signal = joined(said("c"), unsure, said("d"), quiet(300))
    assert texts(hear(paths["searched"], signal)) == ["cbd"]
    assert texts(hear(paths["searched"], signal, hotwords=(Hotword("CAD", 4.0),))) == ["cad"]


def arpa(path: Path, unigrams: dict[str, float]) -> None:
    """Write a language model of single words, or letters, with these log10 probabilities."""
    lines = [f"{value}\t{word}" for word, value in unigrams.items()]
    path.write_text(
        "\n".join(
            ["\\data\\", f"ngram 1={len(lines)}", "", "\\1-grams:", *lines, "", "\\end\\", ""]
        )
    )


@pytest.mark.parametrize(
    "unigrams",
    [
        {"|": -1.0, "a": -0.2, "b": -3.0, "c": -1.0, "d": -1.0},
        # Words, of which some are single letters: every label but the space is one.
        {"a": -2.0, "b": -2.0, "c": -2.0, "d": -2.0, "cad": -0.5, "cbd": -4.0},
    ],
    ids=["letters", "words"],
)
def test_a_language_model_decides_between_letters_that_are_nearly_alike(
    tmp_path: Path, unigrams: dict[str, float]
) -> None:
    arpa(tmp_path / "some.arpa", unigrams)
    decoding = Decoding(beam=8, language_model="some.arpa", language_weight=1.0, letter_bonus=0.0)
    path = tiny.write_talker(tmp_path, "fluent", decoding=decoding)
    unsure = np.full(LETTER, LABEL["b"] - 0.45, np.float32)
    assert texts(hear(path, joined(said("c"), unsure, said("d"), quiet(300)))) == ["cad"]


def test_a_language_model_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    decoding = Decoding(beam=8, language_model="nowhere.arpa")
    with pytest.raises(ModelFileError, match=r"nowhere\.arpa: expected a readable language model"):
        Driven(tiny.write_talker(tmp_path, "fluent", decoding=decoding))


def test_a_hotword_that_cannot_be_spelt_is_refused_and_takes_no_row(
    paths: dict[str, Path],
) -> None:
    driven = Driven(paths["searched"], max_streams=1, credit_s=100.0)
    opened(driven, "searched", hotwords=(Hotword("bad"), Hotword("sheep")))
    (error,) = driven.told("a", m.Error)
    assert (error.code, error.stream) == ("bad_hotword", "s")
    assert "'sheep'" in error.reason
    assert "['e', 'h', 'p', 's']" in error.reason
    assert not driven.told("a", m.Opened)
    assert driven.metrics.streams_open == 0
    opened(driven, "searched", hotwords=(Hotword("bad"),))
    deliver(driven, chunks("s", joined(said("bad"), quiet(200))))
    assert texts(driven) == ["bad"]


def test_each_result_is_published_once_under_its_stream(paths: dict[str, Path]) -> None:
    driven = hear(paths["gated"], joined(said("ab"), quiet(120), said("cd"), quiet(120)))
    published = [(topic, m.decode_replies(body)) for topic, body in driven.engine.published]
    told = [one for one in driven.heard("a") if isinstance(one, m.Partial | m.Final)]
    assert [one for _, (one,) in published] == told
    assert {topic for topic, _ in published} == {b"partial/s", b"final/s"}
    assert [type(one) for one in told].count(m.Final) == 2


def test_streams_beyond_the_memory_for_their_state_are_refused(tmp_path: Path) -> None:
    rows = 3  # of 0.25 MiB
    path = tiny.write_talker(tmp_path, "large", 2**16, gap="reset")
    driven = Driven(path, max_state_mb=1, max_streams=16, credit_s=1.0)
    for number in range(rows + 2):
        opened(driven, "large", f"s{number}")
    assert [one.stream for one in driven.told("a", m.Opened)] == ["s0", "s1", "s2", "s3"]
    (error,) = driven.told("a", m.Error)
    assert (error.code, error.reason) == ("full", "limits.max_state_mb suffices for 4 streams")


@pytest.mark.parametrize(
    "minute",
    [quiet(60 * RATE), np.tile(joined(murmured(100), quiet(20)), 50)],
    ids=["silence", "murmur"],
)
@pytest.mark.parametrize("kind", ["late", "gated", "twice"])
def test_what_a_stream_remembers_does_not_grow_with_its_length(
    paths: dict[str, Path], second: "Echo", kind: str, minute: Signal
) -> None:
    driven = Driven(paths[kind], credit_s=100.0)
    opened(driven, kind)
    held = []
    tracemalloc.start()
    try:
        for number in range(10):
            driven.say("a", *chunks("s", minute, (), number, number * len(minute)))
            driven.run()
            driven.heard("a").clear()
            driven.engine.published.clear()
            gc.collect()  # Python keeps some thousands of small objects for use again
            held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    # Some growth is of histograms and caches; a minute of samples alone has 24,000 bytes.
    assert min(held[-3:]) - min(held[2:5]) < 24_000


# --- the second pass -----------------------------------------------------------------------------


class Said(NamedTuple):
    text: str
    confidence: float


class Transcript(NamedTuple):
    text: str
    words: tuple[Said, ...]
    tokens: tuple[int, ...]


class Echo:
    """A second recogniser: says in capitals what it reads off the samples, frames or no frames."""

    def __init__(self) -> None:
        self.heard: list[Signal] = []
        self.drafts: list[Sequence[int]] = []
        self.hotwords: list[Any] = []
        self.fails = False

    def transcribe(
        self, samples: Signal, draft: Sequence[int] = (), hotwords: Sequence[Hotword] = ()
    ) -> Transcript:
        self.heard.append(samples)
        self.drafts.append(draft)
        self.hotwords.append(hotwords)
        if self.fails:
            raise ValueError("no more")
        numbers = [int(number) for number, _ in itertools.groupby(np.rint(samples))]
        read = "".join(tiny.ALPHABET[number] for number in numbers if 0 < number < 6).upper()
        words = tuple(Said(word, 0.5) for word in read.split())
        return Transcript(" ".join(read.split()), words, tuple(map(ord, read.strip())))


class Desk:
    """Workers who begin when the test says so."""

    def __init__(self, *_: object) -> None:
        self.jobs: deque[tuple[Future[Any], Callable[[], Any]]] = deque()

    def submit(self, work: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        self.jobs.append((future, lambda: work(*arguments)))
        return future

    def work(self, last: bool = False) -> None:
        """Do the oldest job, or the last one."""
        future, work = self.jobs.pop() if last else self.jobs.popleft()
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(work())
        except ValueError as error:
            future.set_exception(error)

    def waiting(self) -> int:
        return sum(not future.cancelled() for future, _ in self.jobs)


@pytest.fixture(autouse=True, scope="module")
def second() -> Iterable[Echo]:
    """The double that stands for the second recogniser of every model that wants one."""
    echo = Echo()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speech_wing, "SecondPass", lambda _: echo)
        patch.setattr(speech_wing, "RATE_HZ", RATE)
        yield echo


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Desk:
    """Workers of the engine that is made next, on four cores."""
    made = Desk()
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(speech_wing, "ThreadPoolExecutor", lambda *_: made)
    return made


def about(driven: Driven, *kinds: type[m.Message]) -> list[Any]:
    return [one for one in driven.heard("a") if isinstance(one, kinds)]


@pytest.mark.parametrize("kind", ["twice", "both"])
@settings(max_examples=20)
@given(
    parts=st.lists(st.tuples(phrases, st.integers(4, 40)), min_size=1, max_size=4),
    places=cuts,
    eager=st.booleans(),
    length=st.sampled_from([1.5, 20.0]),
)
def test_any_cutting_and_any_timing_gives_the_finals_of_the_utterances_samples(
    paths: dict[str, Path],
    second: Echo,
    kind: str,
    parts: list[tuple[str, int]],
    places: list[int],
    eager: bool,
    length: float,
) -> None:
    signal = joined(*(joined(said(text + " "), quiet(pause * FRAME)) for text, pause in parts))
    told = []
    for cut_at, wait in (([], True), (places, eager)):
        driven = Driven(paths[kind], credit_s=100.0)
        opened(driven, kind, silence_s=0.6, max_utterance_s=length)
        deliver(driven, [*chunks("s", signal, cut_at), m.Flush("s", 1)], wait)
        told.append(driven.told("a", m.Final))
    assert told[0] == told[1]
    everything = " ".join(text for text, _ in parts)
    assert " ".join(final.text for final in told[0]) == everything.upper()
    for final in told[0]:
        assert final.text == " ".join(word.text for word in final.words)
        assert all(word.start_s < word.end_s for word in final.words)


def test_words_have_the_times_at_which_the_letters_heard_them(
    paths: dict[str, Path], second: Echo
) -> None:
    signal = joined(quiet(40), said("ab dad"), quiet(160))
    (final,) = hear(paths["twice"], signal).told("a", m.Final)
    assert final.words == (m.Word("AB", 0.4, 0.56, 0.5), m.Word("DAD", 0.64, 0.88, 0.5))


def test_a_second_pass_of_another_rate_is_refused(
    paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speech_wing, "RATE_HZ", 16_000)
    with pytest.raises(ModelFileError, match="expected a model of 16000 Hz, found 100"):
        Driven(paths["twice"])


def test_the_second_pass_begins_in_the_first_pause_and_is_not_repeated(
    paths: dict[str, Path], second: Echo, desk: Desk
) -> None:
    driven = Driven(paths["twice"], credit_s=100.0)
    opened(driven, "twice", hotwords=(Hotword("AB"),))
    signal = joined(quiet(80), said("ab"), quiet(44))
    deliver_none = chunks("s", signal)
    driven.say("a", *deliver_none)
    driven.run()
    second.heard.clear()
    second.hotwords.clear()
    desk.work()
    (samples,) = second.heard
    np.testing.assert_array_equal(samples, signal[50:130])  # 0.3 s on each side
    driven.say("a", *chunks("s", quiet(100), (), 1, len(signal)))
    driven.run()
    assert texts(driven) == ["AB"]
    assert len(second.heard) == 1
    assert second.hotwords == [(Hotword("AB"),)]


def test_a_pause_that_does_not_last_gives_a_better_partial_and_a_draft(
    paths: dict[str, Path], second: Echo, desk: Desk
) -> None:
    driven = Driven(paths["twice"], credit_s=100.0)
    opened(driven, "twice")
    first = joined(said("ab "), quiet(56))
    driven.say("a", *chunks("s", first))
    driven.run()
    second.drafts.clear()
    desk.work()
    driven.run()
    last = driven.told("a", m.Partial)[-1]
    assert (last.text, last.stable_words) == ("AB", 1)  # at once
    driven.say("a", *chunks("s", joined(said("cd"), quiet(28)), (), 1, len(first)))
    driven.run()
    last = driven.told("a", m.Partial)[-1]
    assert (last.text, last.stable_words) == ("AB cd", 1)
    driven.say("a", *chunks("s", quiet(100), (), 2, len(first) + 44))
    driven.run()
    desk.work(last=True)
    driven.run()
    assert texts(driven) == ["AB CD"]
    assert second.drafts == [(), (65, 66)]


def test_without_partials_the_second_pass_begins_as_early(
    paths: dict[str, Path], second: Echo, desk: Desk
) -> None:
    driven = Driven(paths["twice"], credit_s=100.0)
    opened(driven, "twice", partials=False)
    driven.say("a", *chunks("s", joined(said("ab"), quiet(60))))
    driven.run()
    assert desk.waiting() == 1


def pending(paths: dict[str, Path], *after: m.Message) -> Driven:
    """Return an engine in which a final of stream s waits for the second pass."""
    driven = Driven(paths["twice"], credit_s=100.0, max_streams=1)
    opened(driven, "twice")
    driven.say("a", *chunks("s", joined(said("ab"), quiet(124))), *after)
    driven.run()
    assert not driven.told("a", m.Final)
    return driven


def all_work(driven: Driven, desk: Desk) -> None:
    while desk.jobs:
        desk.work()
    driven.run()


def test_an_ack_waits_for_the_final_of_what_it_names(paths: dict[str, Path], desk: Desk) -> None:
    driven = pending(paths)
    assert not driven.told("a", m.Ack)
    driven.say("a", *chunks("s", quiet(100), (), 1, 140))
    driven.run()
    assert not driven.told("a", m.Ack)
    all_work(driven, desk)
    final, ack = about(driven, m.Final, m.Ack)
    assert (final.text, ack) == ("AB", m.Ack("s", 1, 240))


def test_a_stream_that_is_ahead_of_its_finals_has_no_more_credit(
    paths: dict[str, Path], desk: Desk
) -> None:
    driven = Driven(paths["twice"], credit_s=4.0)
    opened(driven, "twice")
    (credit,) = [one.credit for one in driven.told("a", m.Opened)]
    signal = joined(said("ab"), quiet(84))
    for number in range(10):
        driven.say("a", *chunks("s", signal, (), number, number * len(signal)))
        driven.run()
    errors = driven.told("a", m.Error)
    assert {error.code for error in errors} == {"over_credit"}
    assert len(errors) == 10 - credit // len(signal)
    assert desk.waiting() <= credit // len(signal) + 1


def test_a_close_waits_for_a_final(paths: dict[str, Path], desk: Desk) -> None:
    driven = pending(paths, *chunks("s", quiet(5), (), 1, 140), m.Close("s"))
    assert not driven.told("a", m.Closed)
    all_work(driven, desk)
    final, *rest = about(driven, m.Final, m.Ack, m.Closed)
    assert final.text == "AB"
    assert rest == [m.Ack("s", 1, 145), m.Closed("s", "closed", 2, 145, 0, 0, 0)]


def test_two_finals_come_before_the_close_that_waits_for_them(
    paths: dict[str, Path], desk: Desk
) -> None:
    more = chunks("s", joined(said("cd"), quiet(104)), (), 1, 140)
    driven = pending(paths, *more, m.Close("s"))
    desk.work(last=True)  # the later one is through first
    driven.run()
    assert not driven.told("a", m.Final)
    all_work(driven, desk)
    kinds = [type(one).__name__ for one in about(driven, m.Final, m.Ack, m.Closed)]
    assert texts(driven) == ["AB", "CD"]
    assert kinds == ["Final", "Final", "Ack", "Closed"]


def test_two_flushes_wait_for_a_final_and_come_in_order(paths: dict[str, Path], desk: Desk) -> None:
    more = chunks("s", said("cd"), (), 1, 140)
    driven = pending(paths, *more, m.Flush("s", 1), m.Flush("s", 2))
    assert not driven.told("a", m.Flushed)
    all_work(driven, desk)
    all_work(driven, desk)
    ab, cd, one, two = about(driven, m.Final, m.Flushed)
    assert (ab.text, cd.text, cd.reason) == ("AB", "CD", "flush")
    assert (one, two) == (m.Flushed("s", 1, 156), m.Flushed("s", 2, 156))


def test_what_is_said_behind_a_flush_that_waits_is_heard_when_it_is_through(
    paths: dict[str, Path], desk: Desk
) -> None:
    more = chunks("s", joined(said("cd"), quiet(124)), (), 1, 140)
    driven = pending(paths, m.Flush("s", 1), *more)
    all_work(driven, desk)
    all_work(driven, desk)
    ab, flushed, cd = about(driven, m.Final, m.Flushed)
    assert (ab.text, flushed, cd.text) == ("AB", m.Flushed("s", 1, 140), "CD")
    assert (cd.utterance, cd.start, cd.words[0].start_s) == (1, 140, 1.4)


def test_a_gap_while_a_final_is_to_come_is_told_behind_it(
    paths: dict[str, Path], desk: Desk
) -> None:
    driven = pending(paths, *chunks("s", joined(said("cd"), quiet(124)), (), 1, 500))
    all_work(driven, desk)
    all_work(driven, desk)
    ab, gap, cd = about(driven, m.Final, m.Gap)
    assert (ab.text, gap, cd.text) == ("AB", m.Gap("s", 140, 500, "reset"), "CD")
    assert (ab.start, cd.start, cd.words[0].start_s) == (0, 500, 5.0)


def test_a_gap_in_the_middle_of_words_gives_their_final(paths: dict[str, Path], desk: Desk) -> None:
    driven = Driven(paths["twice"], credit_s=100.0)
    opened(driven, "twice")
    driven.say("a", *chunks("s", joined(said("ab"), quiet(24))))
    driven.say("a", *chunks("s", quiet(40), (), 1, 500))
    driven.run()
    all_work(driven, desk)
    before, gap, final, after = about(driven, m.Final, m.Gap, m.Ack)
    assert (final.text, final.reason, gap.end) == ("AB", "gap", 500)
    assert (before, after) == (m.Ack("s", 0, 40), m.Ack("s", 1, 540))


def end_by_dropping(driven: Driven) -> None:
    driven.engine.drop(b"a", "gone")


def end_by_reopening(driven: Driven) -> None:
    opened(driven, "twice")
    driven.say("a", m.Close("s"))


def end_by_a_fault(driven: Driven) -> None:
    driven.say("a", *chunks("s", np.full(5, np.nan, np.float32), (), 1, 140))


def end_by_idling(driven: Driven) -> None:
    driven.now += 1e6
    driven.engine.tick(driven.now)


ENDS = [end_by_dropping, end_by_reopening, end_by_a_fault, end_by_idling]


@pytest.mark.parametrize("when", ["before", "while", "never"])
@pytest.mark.parametrize("end", ENDS)
def test_a_new_tenant_gets_nothing_of_one_who_is_gone(
    paths: dict[str, Path], desk: Desk, end: Callable[[Driven], None], when: str
) -> None:
    """The second pass of the old one ends before the new one comes, after it, or not at all."""
    driven = pending(paths)
    job = desk.jobs[0][0]
    if when == "while":
        assert job.set_running_or_notify_cancel()
        desk.jobs.clear()
    if when == "before":
        desk.work()
    end(driven)
    assert job.cancelled() == (when == "never")
    driven.run()
    opened(driven, "twice", "t", "b")
    assert driven.told("b", m.Opened)
    if when == "while":
        job.set_result(Transcript("OLD", (Said("OLD", 1.0),), ()))
    driven.run()
    driven.say("b", *chunks("t", joined(said("cd"), quiet(120))), m.Flush("t", 1))
    driven.run()
    all_work(driven, desk)
    (final,) = driven.told("b", m.Final)
    assert (final.text, final.utterance) == ("CD", 0)
    assert "OLD" not in [final.text for final in driven.told("a", m.Final)]
    assert driven.told("b", m.Flushed)


def test_draining_waits_for_finals(paths: dict[str, Path], desk: Desk) -> None:
    driven = pending(paths)
    assert not driven.engine.drain()
    all_work(driven, desk)
    assert driven.engine.drain()
    final, ack, closed = about(driven, m.Final, m.Ack, m.Closed)
    assert (final.text, ack.index, closed.reason) == ("AB", 140, "draining")


def test_draining_at_once_gives_up_what_is_not_through(paths: dict[str, Path], desk: Desk) -> None:
    driven = pending(paths)
    assert driven.engine.drain(at_once=True)
    assert not desk.waiting()
    assert driven.told("a", m.Closed)


@pytest.mark.parametrize("pause", [60, 140], ids=["in a pause", "at the end"])
def test_a_second_pass_that_fails_harms_nobody_and_letters_are_told(
    paths: dict[str, Path],
    second: Echo,
    desk: Desk,
    caplog: pytest.LogCaptureFixture,
    pause: int,
) -> None:
    driven = Driven(paths["twice"], credit_s=100.0)
    opened(driven, "twice")
    opened(driven, "twice", "t", "b")
    driven.say("a", *chunks("s", joined(said("ab cd"), quiet(pause))))
    driven.run()
    second.fails = True
    all_work(driven, desk)
    second.fails = False
    driven.say("a", *chunks("s", quiet(140 - pause), (), 1, 40 + pause))
    driven.say("b", *chunks("t", joined(said("bad"), quiet(140))))
    driven.run()
    all_work(driven, desk)
    (final,) = driven.told("a", m.Final)
    assert (final.text, [word.text for word in final.words]) == ("ab cd", ["ab", "cd"])
    assert texts(driven, "t", "b") == ["BAD"]
    (lost,) = [one.getMessage() for one in caplog.records if one.levelname == "ERROR"]
    assert lost == "stream s: the second pass failed: ValueError('no more')"


def test_finals_come_from_other_threads_too(paths: dict[str, Path], second: Echo) -> None:
    """With the real workers, many streams at once."""
    driven = Driven(paths["twice"], credit_s=100.0)
    names = [f"s{number}" for number in range(12)]
    for name in names:
        opened(driven, "twice", name)
        driven.say("a", *chunks(name, joined(said("ab"), quiet(120), said("cd"))), m.Flush(name))
    driven.settle()
    for name in names:
        assert texts(driven, name) == ["AB", "CD"]
    assert threading.active_count() > 1


# --- real sockets --------------------------------------------------------------------------------


class Caller:
    """A client with a socket of its own, in a thread beside the server's."""

    def __init__(self, one: zmq.Socket, address: str) -> None:
        self._socket = one
        one.connect(address)
        self.tell(m.Hello(m.VERSION))
        self.tell(m.Open("s", "twice", tiny.RATE_HZ, "1"))
        self.until(m.Opened)

    def tell(self, *requests: m.Message) -> None:
        self._socket.send(m.body([m.encode(request) for request in requests]))

    def until(self, kind: type[m.Message]) -> list[m.Message]:
        """Return what comes, the first of a kind included."""
        told: list[m.Message] = []
        while not any(isinstance(one, kind) for one in told):
            assert self._socket.poll(20_000), f"no {kind.__name__}"
            told += m.decode_replies(self._socket.recv())
        return told


class Slow(Echo):
    """A second recogniser who waits for leave, but for its first two calls."""

    def __init__(self) -> None:
        super().__init__()
        self.leave = threading.Event()

    def transcribe(self, *arguments: Any) -> Transcript:
        assert len(self.heard) < 2 or self.leave.wait(20.0)
        return super().transcribe(*arguments)


Act = Callable[[Caller, Server, Slow], None]


@pytest.fixture
def beside(
    paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch, sockets: Callable[[int], zmq.Socket]
) -> Iterable[Callable[..., None]]:
    """Return what runs a server that has no clock to wake it, and a client in another thread."""
    monkeypatch.setattr(server_module, "_TICK_S", 1e6)
    slow = Slow()
    monkeypatch.setattr(speech_wing, "SecondPass", lambda _: slow)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def run(act: Act, **limits: float) -> None:
        config = Config(
            bind="tcp://127.0.0.1:0",
            publish="tcp://127.0.0.1:0",
            models=(str(paths["twice"]),),
            limits=Limits(max_load=1e9, **limits),
        )
        server = Server(config)

        def client() -> None:
            try:
                act(Caller(sockets(zmq.DEALER), server.endpoints.bind), server, slow)
            finally:
                slow.leave.set()
                stop(server)

        with ThreadPoolExecutor(1) as pool:
            acting = pool.submit(client)
            server.run()
        acting.result()

    yield run
    slow.leave.set()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def stop(server: Server) -> None:
    """Do what a signal does."""
    server.stop()
    server._wake()


def speak_and_flush(caller: Caller) -> None:
    """Come back when the server has nothing left to do but to wait for the second pass."""
    signal = joined(said("ab"), quiet(124))
    caller.tell(*chunks("s", signal), m.Flush("s", 5))
    for _ in range(len(signal) // HOP + 5):  # a step for each turn, and the flush's
        caller.tell(m.Ping(1))
        caller.until(m.Pong)


def test_a_final_wakes_a_server_that_sleeps(beside: Callable[..., None]) -> None:
    def act(caller: Caller, server: Server, slow: Slow) -> None:
        speak_and_flush(caller)
        slow.leave.set()
        told = [type(one) for one in caller.until(m.Flushed)]
        assert told.index(m.Final) < told.index(m.Ack) < told.index(m.Flushed)

    beside(act)


def test_a_server_that_stops_waits_for_finals(beside: Callable[..., None]) -> None:
    def act(caller: Caller, server: Server, slow: Slow) -> None:
        speak_and_flush(caller)
        stop(server)
        caller.tell(m.Ping(2))
        caller.until(m.Pong)  # by now it knows that it is to stop
        slow.leave.set()
        told = caller.until(m.Closed)
        assert [one.text for one in told if isinstance(one, m.Final)] == ["AB"]
        assert [one.reason for one in told if isinstance(one, m.Closed)] == ["draining"]

    beside(act)


def test_a_server_that_stops_does_not_wait_for_ever(beside: Callable[..., None]) -> None:
    def act(caller: Caller, server: Server, slow: Slow) -> None:
        speak_and_flush(caller)
        stop(server)
        told = caller.until(m.Closed)  # although there was no leave
        assert not [one for one in told if isinstance(one, m.Final)]

    beside(act, drain_s=0.3)
