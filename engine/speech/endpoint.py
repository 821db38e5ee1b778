"""Where an utterance begins and where it is over. Pure: voice in, decisions out.

Voice is known a little further than the text, by the model's look-ahead: whether somebody speaks
is heard in every hop of the detector, what is said comes out of the model later. Both clocks
count samples. An endpoint is decided on the later one, the text's, so that no letter is late.
"""

from typing import Literal, NamedTuple

from engine.messages import Speech

# Towards the longest utterance an ever shorter pause will do for an endpoint, from here on.
_IMPATIENT_S = 4.0
_SHORTEST_PAUSE_S = 0.16
# A letter may be recognised so long after its sound: the text is read on until then.
_LATE_LETTER_S = 0.16


Reason = Literal["silence", "length", "flush", "gap", "nothing"]


class Endpoint(NamedTuple):
    """An utterance is over; positions in samples of the model."""

    start: int  # where voice began
    end: int  # after its last
    cut: int  # what the text's clock reads: letters from here on are the next utterance's
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
        self._late = round(_LATE_LETTER_S * rate_hz)
        self.spans: list[list[int]] = []

    @property
    def speaking(self) -> bool:
        """Whether an utterance has begun and is not over."""
        return bool(self.spans)

    def hear(self, begin: int, end: int, voice: bool) -> None:
        """Note whether there is voice in the samples from one position to another."""
        if not voice:
            return
        if self.spans and self.spans[-1][1] == begin:
            self.spans[-1][1] = end
        else:
            self.spans.append([begin, end])

    def pause(self, known: int) -> int:
        """Return for how long there has been no voice, when voice is known up to a position."""
        return known - self.spans[-1][1] if self.spans else 0

    def decide(self, clock: int, known: int, says_something: bool) -> Endpoint | None:
        """Return the endpoint that has come, if one has.

        Parameters
        ----------
        clock : int
            Text is known up to this position.
        known : int
            Voice is known up to this one, which is not before `clock`.
        says_something : bool
            Whether the utterance has any text by now.
        """
        begun = [number for number, span in enumerate(self.spans) if span[0] < clock]
        if not begun:
            return None
        start, last = self.spans[0][0], begun[-1]
        end = self.spans[last][1]
        if clock - start >= self._longest:
            return Endpoint(start, min(end, clock), clock, "length")
        resumed = self.spans[last + 1][0] if last + 1 < len(self.spans) else known
        pause = resumed - end
        if clock < end + min(self._late, pause // 2):
            return None
        if not says_something:
            silent = resumed == known and pause >= self._empty
            return Endpoint(start, end, clock, "nothing") if silent else None
        if pause >= self._wanted(clock - start):
            return Endpoint(start, end, clock, "silence")
        return None

    def _wanted(self, length: int) -> int:
        """Return how long a pause ends an utterance of that length."""
        over = length - self._impatient
        if over <= 0:
            return self._silence
        left = 1 - over / (self._longest - self._impatient)
        return max(self._shortest, round(left * self._silence))

    def end(self, endpoint: Endpoint) -> None:
        """Forget what lies before an endpoint."""
        cut = endpoint.cut
        self.spans = [[max(begin, cut), end] for begin, end in self.spans if end > cut]
