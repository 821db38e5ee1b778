"""The speech wing: a step's scores in; partials and finals out.

Each stream has utterances, one after the other. While one lasts its letters (or words) are read
off the scores and told as partials. When it is over, its final is what a second recogniser makes
of the whole utterance's samples, if the model has one, and else what the partials ended as. The
second pass runs beside the loop and begins in the first short pause, so that most often it is
through when the pause has become an endpoint; what it made of a pause that did not last is shown
as a better partial. A final depends on the samples of its utterance alone, never on such timing.
"""

import logging
import os
import re
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.gate import VOICE
from engine.messages import Final, Gapped, Message, Open, Partial, Speech, Word
from engine.model_file import Model
from engine.speech import ngram
from engine.speech.alignment import align
from engine.speech.beam import BeamDecoder
from engine.speech.ctc import BLANK, SEPARATOR, GreedyDecoder
from engine.speech.endpoint import Endpoint, Endpointer, Reason
from engine.speech.language import LabelModel, WordModel
from engine.wing import Outputs, Rows, Timeline

if TYPE_CHECKING:
    from engine.speech.second_pass import Transcript
else:
    Transcript = Any

log = logging.getLogger(__name__)

# Of the samples before and after the voice, for the second pass: the detector is late at both ends.
_MARGIN_S = 0.3
# Without a gate it is voice where the blank is less probable than this.
_BLANK = 0.5
# Words of a pause that did not last stay; those heard from this long before its end are new.
_SEAM_S = 0.1

Words = list[tuple[str, int, int, float]]  # text, first and last position, confidence


class _Ended(NamedTuple):
    """An utterance that is over, and the words that are still to come."""

    final: Final  # without its text
    begin: int  # position of `first`: between the two clocks lies a straight line
    first: int  # the client's index
    rate_hz: float  # the client's
    heard: Words  # by the letters alone
    words: Future[Words] | None


class _Stream:
    """What is remembered of one stream; positions in samples of the model."""

    def __init__(self, timeline: Timeline, rules: Speech, rate_hz: float) -> None:
        self.timeline, self.rules = timeline, rules
        self.endpointer = Endpointer(rules, rate_hz)
        self.utterance = 0
        self.audio: deque[NDArray[np.float32]] = deque()
        self.audio_end = 0
        self.ended: deque[_Ended] = deque()
        self.begin_anew(0)

    def begin_anew(self, cut: int) -> None:
        """Forget an utterance; what the next is made of lies behind a position."""
        self.earliest = cut
        self.first = 0  # position of the decoder's frame 0
        self.scores: list[NDArray[np.float32]] = []  # of the decoder's frames
        self.attempts: dict[int, Future[Transcript]] = {}  # by where their voice ends
        self.better: tuple[int, Transcript] | None = None  # the last one that is through
        self.shown = ""

    def samples(self, begin: int, end: int) -> NDArray[np.float32]:
        """Return the samples between two positions, as far as they are kept."""
        kept = np.concatenate(self.audio)
        first = self.audio_end - len(kept)
        return kept[max(0, begin - first) : max(0, end - first)]


class SpeechWing:
    """Utterances of all streams of a speech model.

    Parameters
    ----------
    model : Model
    num_slots : int
    wake : callable
        Called from another thread when there may be something to :meth:`collect`.
    """

    def __init__(self, model: Model, num_slots: int, wake: Callable[[], None]) -> None:
        spec = model.spec
        self._wake = wake
        self._rate_hz = spec.input.rate_hz
        self._min_confidence = spec.decoding.min_confidence
        self.delay = spec.look_ahead_samples
        # With a gate, voice is known further than the text.
        self._ahead = spec.look_ahead_samples if spec.gate else 0
        (output,) = (output for output in spec.outputs if output.meaning == "ctc")
        self._output, self._labels = output.name, output.labels
        self._decoder = _decoder(model, num_slots)
        self._streams: dict[int, _Stream] = {}
        self._waiting: set[int] = set()  # slots with finals to come
        self._margin = round(_MARGIN_S * self._rate_hz)
        self._frame = 0  # samples; known with the first scores
        folder = spec.decoding.second_pass
        self._second = _second(model.folder / folder) if folder else None
        self._num_workers = len(os.sched_getaffinity(0))
        self._workers = ThreadPoolExecutor(self._num_workers, "second-pass")
        self._running = 0  # attempts of the second pass
        self.share = self._measure() / self._num_workers

    # --- one stream ------------------------------------------------------------------------

    def open(self, slot: int, timeline: Timeline, request: Open) -> None:
        """Begin a stream with what it asks for.

        Raises
        ------
        Refused
            If a hotword cannot be spelt.
        """
        rules = request.speech or Speech()
        self._decoder.open(slot, rules)
        self._streams[slot] = _Stream(timeline, rules, self._rate_hz)
        self._waiting.discard(slot)

    def reset(self, slot: int) -> None:
        """Begin anew, after a flush; utterances count on."""
        old = self._streams[slot]
        self._streams[slot] = new = _Stream(old.timeline, old.rules, self._rate_hz)
        new.utterance, new.ended = old.utterance, old.ended
        new.begin_anew(old.audio_end)
        self._decoder.reset(slot)

    def gap(self, slot: int, state: Gapped) -> None:
        """End what was being said: what is lost may have been a part of it."""
        stream = self._streams[slot]
        self._stop(slot, stream, stream.audio_end, "gap")
        self.reset(slot)

    def pending(self, slot: int) -> bool:
        """Return whether a final is still to come."""
        return slot in self._waiting

    # --- a step ----------------------------------------------------------------------------

    def push(self, rows: Rows, outputs: Outputs) -> list[tuple[int, Message]]:
        """Return the partials that a step brought; finals come from :meth:`collect`."""
        scores = outputs[self._output]
        length, frames = rows.samples.shape[1], scores.shape[1]
        self._frame = length // frames
        voice = np.asarray(outputs.get(VOICE, scores[:, :, BLANK] < np.log(_BLANK)), bool)
        clocks = (rows.start - self.delay).tolist()
        told: list[tuple[int, Message]] = []
        undivided = []
        for row, slot in enumerate(rows.slots.tolist()):
            stream = self._streams[slot]
            self._hear(stream, rows, row, voice[row], clocks[row] + self._ahead)
            if not stream.endpointer.speaking:
                continue
            if self._divide(slot, stream, scores[row], clocks[row], len(voice[row])):
                undivided.append(row)
        self._decoder.push(rows.slots[undivided], scores[undivided])
        for row, slot in enumerate(rows.slots.tolist()):
            stream = self._streams[slot]
            if not stream.endpointer.speaking:
                continue
            clock = clocks[row] + length
            if clock >= rows.end[row]:
                self._stop(slot, stream, int(rows.end[row]), "flush")
            else:
                self._try(stream, clock + self._ahead)
                told += [(row, each) for each in self._partial(slot, stream, clock + self._ahead)]
        return told

    def _hear(
        self, stream: _Stream, rows: Rows, row: int, voice: NDArray[np.bool_], first: int
    ) -> None:
        """Note a step's samples, and in which parts of it there is voice, from a position on."""
        samples = rows.samples[row, :, 0]
        hop = len(samples) // len(voice)
        low, high = int(rows.begin[row]), int(rows.end[row])
        for number in np.flatnonzero(voice).tolist():
            begin = max(first + number * hop, low)
            end = min(first + (number + 1) * hop, high)
            if begin < end:
                stream.endpointer.hear(begin, end, True)
        stream.audio_end = int(rows.start[row]) + len(samples)
        if self._second is None:
            return
        stream.audio.append(samples)
        spans = stream.endpointer.spans
        oldest = (spans[0][0] if spans else stream.audio_end - self.delay) - 2 * self._margin
        total = sum(map(len, stream.audio))
        while stream.audio_end - total + len(stream.audio[0]) <= oldest:
            total -= len(stream.audio.popleft())

    def _divide(
        self, slot: int, stream: _Stream, scores: NDArray[np.float32], clock: int, hops: int
    ) -> bool:
        """Look for endpoints, hop by hop of the voice.

        Returns
        -------
        bool
            True: there is none, and the decoder may take all frames at once, with other rows'.
            False: it has taken them.
        """
        hop = len(scores) * self._frame // hops
        taken = 0
        for number in range(1, hops + 1):
            now = clock + number * hop
            if stream.endpointer.decide(now, now + self._ahead, True) is None:
                continue
            until = number * hop // self._frame
            self._take(slot, stream, scores[taken:until], clock + taken * self._frame)
            taken = until
            says = bool(self._words(slot, stream))
            endpoint = stream.endpointer.decide(now, now + self._ahead, says)
            if endpoint is not None:
                self._end(slot, stream, endpoint, now + self._ahead)
        if not taken:
            self._keep(stream, scores, clock)
            return True
        if stream.endpointer.speaking:
            self._take(slot, stream, scores[taken:], clock + taken * self._frame)
        return False

    def _take(self, slot: int, stream: _Stream, scores: NDArray[np.float32], position: int) -> None:
        self._keep(stream, scores, position)
        self._decoder.push(np.array([slot]), scores[None])

    def _keep(self, stream: _Stream, scores: NDArray[np.float32], position: int) -> None:
        """Remember the scores that the decoder takes, for the times of a final's words."""
        if not stream.scores:
            stream.first = position
        stream.scores.append(scores)

    def _words(self, slot: int, stream: _Stream, ended: bool = False) -> Words:
        """Return what the decoder has read."""
        return [
            (
                word.text,
                stream.first + word.first * self._frame,
                stream.first + word.last * self._frame,
                word.confidence,
            )
            for word in self._decoder.best(slot, ended).words
            if word.confidence >= self._min_confidence
        ]

    # --- partials --------------------------------------------------------------------------

    def _partial(self, slot: int, stream: _Stream, known: int) -> list[Message]:
        if not stream.rules.partials:
            return []
        words = self._words(slot, stream)
        text, stable = "", self._decoder.stable_words(slot)
        if stream.better is not None:
            seam, transcript = stream.better
            text = transcript.text + " "
            stable = len(transcript.words)
            words = [word for word in words if word[1] >= seam - _SEAM_S * self._rate_hz]
        text = (text + " ".join(word[0] for word in words)).strip()
        if text == stream.shown:
            return []
        stream.shown = text
        timeline = stream.timeline
        return [
            Partial(timeline.name, stream.utterance, text, timeline.needed_until(known), stable)
        ]

    def _try(self, stream: _Stream, known: int) -> None:
        """Let the second pass begin in a pause, and note what it has made of earlier ones."""
        for end, attempt in stream.attempts.items():
            if attempt.done() and attempt.exception() is None:
                stream.better = (end, attempt.result())
        spans = stream.endpointer.spans
        if self._second is None or not stream.shown or known - spans[-1][1] < self._margin:
            return
        end = spans[-1][1]
        if end not in stream.attempts and self._running < self._num_workers:
            stream.attempts[end] = self._attempt(stream, spans[0][0], end, end + self._margin)

    def _attempt(self, stream: _Stream, start: int, end: int, last: int) -> Future[Transcript]:
        """Start the second pass over the samples of an utterance."""
        assert self._second is not None
        samples = stream.samples(max(stream.earliest, start - self._margin), last)
        draft = stream.better[1].tokens if stream.better else ()
        self._running += 1
        attempt = self._workers.submit(
            self._second.transcribe, samples, draft, stream.rules.hotwords
        )
        attempt.add_done_callback(self._attempted)
        return attempt

    def _attempted(self, _: Future[Transcript]) -> None:
        self._running -= 1

    # --- finals ----------------------------------------------------------------------------

    def _stop(self, slot: int, stream: _Stream, cut: int, reason: Reason) -> None:
        """End an utterance where its stream ends or breaks off."""
        if stream.endpointer.speaking:
            says = bool(self._words(slot, stream))
            start, end = stream.endpointer.spans[0][0], stream.endpointer.spans[-1][1]
            endpoint = Endpoint(start, min(end, cut), cut, reason if says else "nothing")
            self._end(slot, stream, endpoint, cut)

    def _end(self, slot: int, stream: _Stream, endpoint: Endpoint, known: int) -> None:
        """Let the second pass say what an utterance was, and begin the next."""
        if endpoint.reason != "nothing":
            stream.ended.append(self._over(slot, stream, endpoint, known))
            stream.utterance += 1
            self._waiting.add(slot)
        stream.endpointer.end(endpoint)
        stream.begin_anew(endpoint.cut)
        self._decoder.reset(slot)

    def _over(self, slot: int, stream: _Stream, endpoint: Endpoint, known: int) -> _Ended:
        start, end, cut, reason = endpoint
        assert reason != "nothing"
        timeline, count = stream.timeline, stream.rules.alternatives
        others = self._decoder.alternatives(slot, count) if count > 1 else []
        index = timeline.index_at(start)
        final = Final(
            stream=timeline.name,
            utterance=stream.utterance,
            text="",
            start=index,
            end=timeline.index_at(end),
            endpoint=timeline.needed_until(known),
            reason=reason,
            words=(),
            alternatives=tuple(hypothesis.text for hypothesis in others),
        )
        heard = self._words(slot, stream, ended=True)
        words = None
        if self._second is not None:
            last = min(end + self._margin, cut) if reason != "gap" else cut
            attempt = stream.attempts.get(end) if last == end + self._margin else None
            attempt = attempt or self._attempt(stream, start, end, last)
            scores = np.concatenate(stream.scores)
            words = self._workers.submit(self._timed, attempt, scores, stream.first, (start, end))
            words.add_done_callback(lambda _: self._wake())
        return _Ended(final, start, index, timeline.rate_hz, heard, words)

    def _timed(
        self,
        attempt: Future[Transcript],
        scores: NDArray[np.float32],
        first: int,
        span: tuple[int, int],
    ) -> Words:
        """Return a transcript's words with the positions at which the letters heard them."""
        words = attempt.result().words
        spelt = [re.sub("[^a-z']", "", word.text.lower()) for word in words]
        letters = [self._labels.index(letter) for letter in " ".join(filter(None, spelt))]
        frames = align(scores, letters)
        timed: Words = []
        place = 0
        for word, spelling in zip(words, spelt, strict=True):
            begin = timed[-1][2] if timed else span[0]
            end = begin
            if spelling and frames:
                begin = first + frames[place][0] * self._frame
                place += len(spelling) + 1
                end = first + frames[place - 2][1] * self._frame
            timed.append((word.text, begin, end, word.confidence))
        return timed

    def collect(self) -> list[tuple[int, Message]]:
        """Return the finals whose words have come, as (slot, message), in order per stream."""
        told: list[tuple[int, Message]] = []
        for slot in sorted(self._waiting):
            ended = self._streams[slot].ended
            while ended and (ended[0].words is None or ended[0].words.done()):
                told.append((slot, self._final(ended.popleft())))
            if not ended:
                self._waiting.discard(slot)
        return told

    def _final(self, over: _Ended) -> Final:
        words = over.heard
        if over.words is not None:
            failure = over.words.exception()
            if failure is None:
                words = over.words.result()
            else:
                log.error("stream %s: the second pass failed: %s", over.final.stream, failure)

        def seconds(position: int) -> float:
            index = over.first + (position - over.begin) * over.rate_hz / self._rate_hz
            return round(index / over.rate_hz, 3)

        text = " ".join(word[0] for word in words)
        told = tuple(
            Word(text, seconds(begin), seconds(end), round(confidence, 3))
            for text, begin, end, confidence in words
        )
        alternatives = over.final.alternatives
        if alternatives:
            alternatives = (text, *(other for other in alternatives if other != text))
        final = msgspec.structs.replace(over.final, text=text, words=told)
        return msgspec.structs.replace(
            final, alternatives=alternatives[: len(over.final.alternatives)]
        )

    def _measure(self) -> float:
        """Return the second pass's seconds of work for a second of voice."""
        if self._second is None:
            return 0.0
        seconds = 4
        noise = np.random.default_rng(0).normal(0, 0.05, round(seconds * self._rate_hz))
        self._second.transcribe(noise.astype(np.float32))
        begin = time.perf_counter()
        self._second.transcribe(noise.astype(np.float32))
        return (time.perf_counter() - begin) / seconds


def _second(folder):
    from engine.speech.second_pass import SecondPass

    return SecondPass(folder)


def _decoder(model: Model, num_slots: int) -> GreedyDecoder | BeamDecoder:
    """Return what reads the model's scores, as its statement asks for."""
    decoding = model.spec.decoding
    (output,) = (output for output in model.spec.outputs if output.meaning == "ctc")
    if not decoding.beam:
        return GreedyDecoder(output.labels, num_slots)
    if not decoding.language_model:
        return BeamDecoder(output.labels, num_slots, None, decoding.beam)
    ngrams = ngram.load(model.folder / decoding.language_model)
    of_labels = all(label in ngrams.ids for label in output.labels[1:] if label != SEPARATOR)
    language = (LabelModel if of_labels else WordModel)(
        ngrams, output.labels, decoding.language_weight, decoding.letter_bonus
    )
    return BeamDecoder(output.labels, num_slots, language, decoding.beam)
