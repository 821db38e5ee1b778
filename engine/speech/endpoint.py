"""Where an utterance begins and where it is over. Pure: voice in, decisions out.

Voice is known a little further than the text, by the model's look-ahead: whether somebody speaks
is heard in every hop of the detector, what is said comes out of the model later. Both clocks
count samples. An endpoint is decided on the later one, the text's, so that no letter is late.
"""

from bisect import bisect_left
from typing import Literal, NamedTuple

from engine.messages import Speech

# A letter may be recognised so long after its sound: the text is read on until then.
LATE_LETTER_S = 0.16
# Towards the longest utterance an ever shorter pause will do for an endpoint, from here on.
_IMPATIENT_S = 4.0
_SHORTEST_PAUSE_S = 0.16


Reason = Literal["silence", "length", "flush", "gap", "nothing"]


class Endpoint(NamedTuple):
    """An utterance is over; positions in samples of the model."""

    start: int  # where voice began
    end: int  # after its last
    cut: int  # letters from here on are the next utterance's
    quiet: int  # from the end to here there is no voice
    reason: Reason


class Endpointer:
    """One stream's voice, and the rules that apply to it.

    Parameters
    ----------
    rules : Speech
        What the stream asks for.
    rate_hz : float

    Attributes
    ----------
    spans : list of [int, int]
        Where voice was heard since the last endpoint, begin and end.
    """

    def __init__(self, rules: Speech, rate_hz: float) -> None:
        self._silence = round(rules.silence_s * rate_hz)
        self._empty = round(rules.empty_silence_s * rate_hz)
        self._longest = round(rules.max_utterance_s * rate_hz)
        self._impatient = self._longest - round(
            min(_IMPATIENT_S, rules.max_utterance_s / 2) * rate_hz
        )
        self._shortest = min(self._silence, round(_SHORTEST_PAUSE_S * rate_hz))
        self._late = round(LATE_LETTER_S * rate_hz)
        self.spans: list[list[int]] = []

    @property
    def speaking(self) -> bool:
        """Whether an utterance has begun and is not over."""
        return bool(self.spans)

    def hear(self, begin: int, end: int) -> None:
        """Note voice, behind all that was noted before; an empty stretch is none."""
        if begin >= end:
            return
        if self.spans and self.spans[-1][1] == begin:
            self.spans[-1][1] = end
        else:
            self.spans.append([begin, end])

    def goes_on(self, known: int) -> bool:
        """Return whether no endpoint can come up to a position, whatever is heard until then.

        Text and voice are known up to the same position; most steps have only this to ask.
        """
        if not self.spans:
            return False
        length, pause = known - self.spans[0][0], known - self.spans[-1][1]
        return length < self._longest and pause < self._wanted(length)

    def decide(self, clock: int, known: int, says_something: bool) -> Endpoint | None:
        """Return the endpoint that has come, if one has.

        Parameters
        ----------
        clock : int
            Text is known up to this position.
        known : int
            And voice up to this one.
        says_something : bool
            Whether the utterance has any text by now.
        """
        if not self.spans or self.spans[0][0] >= clock:
            return None
        found = self.at(clock, known, "silence" if says_something else "nothing")
        length, pause = clock - found.start, found.quiet - found.end
        if length >= self._longest:
            return found._replace(reason="length") if says_something else found
        if clock < found.end + min(self._late, pause // 2):
            return None
        wanted = self._wanted(length) if says_something else self._empty
        return found if pause >= wanted else None

    def at(self, cut: int, known: int, reason: Reason) -> Endpoint:
        """Return the endpoint at a place behind the utterance's beginning.

        Parameters
        ----------
        cut : int
        known : int
            Voice is known up to this position.
        reason : str
        """
        begun = bisect_left(self.spans, [cut])
        start, end = self.spans[0][0], self.spans[begun - 1][1]
        if end >= cut:
            return Endpoint(start, cut, cut, cut, reason)
        quiet = self.spans[begun][0] if begun < len(self.spans) else known
        return Endpoint(start, end, cut, quiet, reason)

    def _wanted(self, length: int) -> int:
        """Return how long a pause ends an utterance of that length."""
        over = length - self._impatient
        if over <= 0:
            return self._silence
        left = 1 - over / (self._longest - self._impatient)
        return max(self._shortest, round(left * self._silence))

    def end(self, cut: int) -> None:
        """Forget what lies before an endpoint."""
        self.spans = [[max(begin, cut), end] for begin, end in self.spans if end > cut]
