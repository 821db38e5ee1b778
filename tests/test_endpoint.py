"""When an utterance is over, on a clock of a thousand samples a second."""

from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.messages import Speech
from engine.speech.endpoint import Endpoint, Endpointer

RATE_HZ = 1000.0
HOP = 10


class Talk:
    """A stream whose voice is known so much further than its text."""

    def __init__(self, ahead: int = 0, says: bool = True, **rules: float) -> None:
        self.endpointer = Endpointer(Speech(**rules), RATE_HZ)  # type: ignore[arg-type]
        self.ahead, self.says = ahead, says

    def endpoints(self, voice: Iterable[tuple[int, int]], until: int) -> list[tuple[int, Endpoint]]:
        """Return what ends, and what the clock reads then, hop by hop."""
        spans = list(voice)
        found = []
        for clock in range(-self.ahead, until, HOP):
            heard = clock + self.ahead
            if any(begin < heard + HOP and heard < end for begin, end in spans):
                self.endpointer.hear(heard, heard + HOP)
            now = clock + HOP
            endpoint = self.endpointer.decide(now, now + self.ahead, self.says)
            if endpoint is not None:
                found.append((now, endpoint))
                self.endpointer.end(endpoint.cut)
        return found


def test_silence_after_words_is_an_endpoint_and_shorter_silence_is_none() -> None:
    found = Talk(silence_s=0.5).endpoints([(100, 300), (790, 900)], 3000)
    assert found == [(1400, Endpoint(100, 900, 1400, 1400, "silence"))]
    two = Talk(silence_s=0.5).endpoints([(100, 300), (810, 900)], 3000)
    assert [(one.start, one.end) for _, one in two] == [(100, 300), (810, 900)]


def test_with_a_look_ahead_silence_is_told_earlier_by_the_texts_clock() -> None:
    found = Talk(ahead=200, silence_s=0.5).endpoints([(100, 300)], 3000)
    assert found == [(600, Endpoint(100, 300, 600, 800, "silence"))]


def test_text_is_read_on_for_a_late_letter_however_far_voice_is_known() -> None:
    found = Talk(ahead=700, silence_s=0.5).endpoints([(100, 300)], 3000)
    assert found == [(460, Endpoint(100, 300, 460, 1160, "silence"))]


def test_a_pause_that_is_known_to_end_soon_is_cut_before_the_next_voice() -> None:
    found = Talk(ahead=700, silence_s=0.2).endpoints([(100, 300), (520, 600)], 1000)
    assert found[0] == (410, Endpoint(100, 300, 410, 520, "silence"))
    assert found[1][1].start == 520


def test_silence_after_no_words_is_the_end_of_nothing_and_comes_later() -> None:
    found = Talk(says=False, silence_s=0.5, empty_silence_s=1.5).endpoints([(100, 300)], 5000)
    assert found == [(1800, Endpoint(100, 300, 1800, 1800, "nothing"))]


@pytest.mark.parametrize(("says", "reason"), [(True, "length"), (False, "nothing")])
def test_voice_without_a_pause_ends_by_length_and_goes_on(says: bool, reason: str) -> None:
    found = Talk(says=says, max_utterance_s=2.0).endpoints([(100, 9000)], 5000)
    assert found == [
        (2100, Endpoint(100, 2100, 2100, 2100, reason)),
        (4100, Endpoint(2100, 4100, 4100, 4100, reason)),
    ]


def test_towards_the_longest_utterance_a_shorter_pause_will_do() -> None:
    def end(begin: int, pause: int) -> list[str]:
        """Let somebody speak until there, pause, and speak on."""
        talk = Talk(silence_s=0.8, max_utterance_s=10.0)
        return [one.reason for _, one in talk.endpoints([(0, begin), (begin + pause, 9990)], 9990)]

    assert end(5000, 700) == []
    assert end(7600, 400) == ["silence"]  # at 8 s half of it
    assert end(7600, 380) == []
    assert end(9700, 170) == ["silence"]
    assert end(9700, 150) == []  # shorter ones are inside words


@given(
    parts=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 200)), max_size=30),
    ahead=st.integers(0, 60),
    says=st.booleans(),
)
def test_utterances_follow_each_other_and_hold_all_voice(
    parts: list[tuple[int, int]], ahead: int, says: bool
) -> None:
    """Parts are hops without voice, and with it."""
    spans, place = [], 0
    for quiet, loud in parts:
        spans.append(((place + quiet) * HOP, (place + quiet + loud) * HOP))
        place += quiet + loud
    talk = Talk(ahead * HOP, says, silence_s=0.3, empty_silence_s=0.3, max_utterance_s=1.0)
    found = [one for _, one in talk.endpoints(spans, place * HOP + 1000)]
    assert not talk.endpointer.speaking
    for one, following in pairwise(found):
        assert one.start < one.end <= one.quiet
        assert one.end <= one.cut <= following.start
    voiced = {t for begin, end in spans for t in range(begin, end, HOP)}
    told = {t for one in found for t in range(one.start, one.end, HOP)}
    assert voiced <= told
    assert all(one.end - one.start <= 1000 for one in found)


@given(
    before=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=4),
    quiet=st.integers(0, 60),
    step=st.lists(st.booleans(), min_size=1, max_size=30),
    silence_s=st.floats(0.1, 0.6),
    longest_s=st.floats(1.0, 4.0),
)
def test_where_it_goes_on_no_endpoint_comes_whatever_is_heard(
    before: list[tuple[int, int]],
    quiet: int,
    step: list[bool],
    silence_s: float,
    longest_s: float,
) -> None:
    talk = Endpointer(Speech(silence_s=silence_s, max_utterance_s=longest_s), RATE_HZ)
    now = 0
    for voiced, pause in before:
        talk.hear(now, now + voiced * HOP)
        now += (voiced + pause) * HOP
    now += (quiet - before[-1][1]) * HOP
    goes_on = talk.goes_on(now + len(step) * HOP)
    came = []
    for is_voice in step:
        if is_voice:
            talk.hear(now, now + HOP)
        now += HOP
        came.append(talk.decide(now, now, True))
    assert not goes_on or came == [None] * len(step)


def test_it_goes_on_in_the_middle_of_talk_and_not_for_ever() -> None:
    talk = Endpointer(Speech(silence_s=0.5), RATE_HZ)
    assert not talk.goes_on(1000)
    talk.hear(1000, 2000)
    assert talk.goes_on(2400)
    assert not talk.goes_on(2500)
