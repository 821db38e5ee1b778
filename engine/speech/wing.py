"""The speech wing: a step's scores in; partials and finals out.

Each stream has utterances, one after the other. While one lasts its letters (or words) are read
off the scores and told as partials. When it is over, its final is what a second recogniser makes
of the whole utterance's samples, if the model has one, and else what the partials ended as. The
second pass runs beside the loop and begins in the first short pause, so that most often it is
through when the pause has become an endpoint; what it made of a pause that did not last is shown
as a better partial. A final depends on the samples of its utterance alone, never on such timing.
"""

import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.errors import ModelFileError, fault
from engine.gate import VOICE
from engine.messages import Final, Gapped, Message, Open, Partial, Speech, Word
from engine.model_file import Model
from engine.speech import ngram
from engine.speech.alignment import align
from engine.speech.beam import BeamDecoder
from engine.speech.ctc import BLANK, SEPARATOR, GreedyDecoder, Spoken
from engine.speech.endpoint import LATE_LETTER_S, Endpoint, Endpointer, Reason
from engine.speech.language import LabelModel, WordModel
from engine.speech.second_pass import RATE_HZ, SecondPass, Transcript
from engine.wing import NO_RUNS, Outputs, Rows, Timeline

log = logging.getLogger(__name__)

# Of the samples before and after the voice, for the second pass: the detector is late at both ends.
_MARGIN_S = 0.3
# Without a gate it is voice where the blank is less probable than this.
_BLANK = 0.5
# Of silence behind a word's last letter: it gets no more.
_WORD_END_S = 0.1
# Words of a pause that did not last stay; those heard from this long before its end are new.
_SEAM_S = 0.1

Scores = NDArray[np.float32]  # (frames, labels), natural logarithms
_T = TypeVar("_T")


class _Placed(NamedTuple):
    """A word; positions in samples of the model."""

    text: str
    begin: int
    end: int
    confidence: float


class _Heard(NamedTuple):
    """What a step brought of one stream."""

    scores: Scores
    voice: NDArray[Any]  # (hops,), not 0 where there is some
    clock: int  # position that the first frame is about
    end: int  # where a flush's padding begins


class _Ended(NamedTuple):
    """An utterance that is over, and the words that are still to come."""

    final: Final  # without its words
    rate_hz: float  # the client's
    start: int  # position of the final's start: between the two clocks lies a straight line
    bounds: tuple[int, int]  # positions between which all words lie
    heard: list[_Placed]  # by the letters alone
    scores: Scores
    first: int  # position that the first frame is about
    attempt: Future[Transcript] | None


class _Stream:
    """What is remembered of one stream; positions in samples of the model."""

    def __init__(self, timeline: Timeline, rules: Speech, rate_hz: float) -> None:
        self.timeline, self.rules = timeline, rules
        self.endpointer = Endpointer(rules, rate_hz)
        self.utterance = 0
        self.position = 0  # after the last sample
        self.end = 0  # where a flush's padding begins, as of the last step
        self.audio: deque[NDArray[np.float32]] = deque()  # the last of them, for the second pass
        self.ended: deque[_Ended] = deque()
        self.shown = (0, "")  # the last partial's utterance and text
        self.spoken: tuple[Spoken, ...] | None = None  # what it was made of
        self.attempts: dict[int, Future[Transcript]] = {}  # by where their voice ends
        self.begin_anew(0)

    def begin_anew(self, cut: int) -> None:
        """Forget an utterance; what the next is made of lies behind a position."""
        self.earliest = cut
        self.first = 0  # position that the decoder's frame 0 is about
        self.scores: list[Scores] = []  # that the decoder has taken
        self.give_up()
        self.better: tuple[int, Transcript] | None = None  # the last attempt that is through

    def give_up(self) -> None:
        """Let go of attempts; those that have begun go on, and nobody looks at them."""
        for attempt in self.attempts.values():
            attempt.cancel()
        self.attempts = {}

    def remember(self, samples: NDArray[np.float32], oldest: int) -> None:
        """Keep samples, and of the former ones those from a position on."""
        self.audio.append(samples.copy())  # of the row alone, not of the whole batch
        first = self.position - sum(map(len, self.audio))
        while first + len(self.audio[0]) <= oldest:
            first += len(self.audio.popleft())

    def split(self, cut: int, frame: int) -> tuple[Scores, Scores]:
        """Return the scores of an utterance, and those that lie behind its cut."""
        scores = np.concatenate(self.scores)
        frames = (cut - self.first) // frame
        return scores[:frames], scores[frames:]

    def samples(self, begin: int, end: int) -> NDArray[np.float32]:
        """Return the samples between two positions, as far as they are kept."""
        kept = np.concatenate(self.audio)
        first = self.position - len(kept)
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

    runs = NO_RUNS

    def __init__(self, model: Model, num_slots: int, wake: Callable[[], None]) -> None:
        spec = model.spec
        self.failed: dict[int, str] = {}
        self._wake = wake
        self._rate_hz = spec.input.rate_hz
        self._min_confidence = spec.decoding.min_confidence
        self._late = round(LATE_LETTER_S * self._rate_hz)
        self._look_ahead = spec.look_ahead_samples
        self.delay = self._look_ahead + self._late
        # With a gate, voice is known further than the text.
        self._ahead = self._look_ahead if spec.gate else 0
        (output,) = (output for output in spec.outputs if output.meaning == "ctc")
        self._output = output.name
        letters = {text.lower(): label for label, text in enumerate(output.labels)}
        self._separator = [letters.pop(SEPARATOR)] if SEPARATOR in letters else []
        self._letters = letters
        self._decoder = _decoder(model, num_slots)
        self._streams: dict[int, _Stream] = {}
        self._waiting: set[int] = set()  # slots with finals to come
        self._trying: set[int] = set()  # and with attempts that nobody has looked at
        self._margin = round(_MARGIN_S * self._rate_hz)
        self._frame = 0  # samples; known with the first scores
        folder = spec.decoding.second_pass
        if folder and self._rate_hz != RATE_HZ:
            raise ModelFileError(
                f"decoding.second_pass: expected a model of {RATE_HZ} Hz, found {self._rate_hz:g}"
            )
        self._second = SecondPass(model.folder / folder) if folder else None
        # Then nothing but what the decoder says can change what is shown.
        self._only_words = not self._separator and self._second is None
        self._num_workers = len(os.sched_getaffinity(0))
        self._workers = ThreadPoolExecutor(self._num_workers, "second-pass")
        self._attempts: list[Future[Transcript]] = []  # that were running when one was begun
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

    def close(self, slot: int) -> None:
        """Let go of a stream and of the finals that are still to come."""
        stream = self._streams.pop(slot)
        stream.give_up()
        for ended in stream.ended:
            if ended.attempt is not None:
                ended.attempt.cancel()
        self._waiting.discard(slot)
        self._trying.discard(slot)

    def reset(self, slot: int) -> None:
        """Begin anew, after a flush; utterances count on."""
        stream = self._streams[slot]
        stream.endpointer.spans = []
        stream.audio.clear()
        stream.begin_anew(stream.position)
        self._decoder.reset(slot)

    def gap(self, slot: int, state: Gapped) -> None:
        """End what was being said: what is lost may have been a part of it."""
        stream = self._streams[slot]
        if stream.endpointer.speaking:
            reason: Reason = "gap" if self._says(slot, stream) else "nothing"
            last = stream.position
            self._end(slot, stream, stream.endpointer.at(last, last, reason), last, last)
        self.reset(slot)

    def take(self, slot: int) -> dict[str, Any]:
        """Return all that a stream carries, but what a second pass made of pauses so far.

        That is made again where it is wanted, of the same samples.
        """
        stream = self._streams[slot]
        return {
            "spans": stream.endpointer.spans,
            "utterance": stream.utterance,
            "position": stream.position,
            "end": stream.end,
            "audio": list(stream.audio),
            "shown": stream.shown,
            "earliest": stream.earliest,
            "first": stream.first,
            "scores": stream.scores,
            "frame": self._frame,
            "decoder": self._decoder.take(slot),
        }

    def put(self, slot: int, carried: dict[str, Any]) -> None:
        """Go on from what was taken, also after a way through MessagePack."""
        stream = self._streams[slot]
        stream.endpointer.spans = carried["spans"]
        stream.utterance, stream.position = carried["utterance"], carried["position"]
        stream.end, stream.audio = carried["end"], deque(carried["audio"])
        utterance, text = carried["shown"]
        stream.shown = utterance, text
        stream.earliest, stream.first = carried["earliest"], carried["first"]
        stream.scores = carried["scores"]
        self._frame = self._frame or carried["frame"]
        self._decoder.put(slot, carried["decoder"])

    def pending(self, slot: int) -> bool:
        """Return whether a final is still to come."""
        return slot in self._waiting

    # --- a step ----------------------------------------------------------------------------

    def push(self, rows: Rows, outputs: Outputs) -> list[tuple[int, Message]]:
        """Return the partials that a step brought; finals come from :meth:`collect`."""
        scores = outputs[self._output]
        voice: NDArray[Any] | None = outputs.get(VOICE)
        if voice is None:
            voice = scores[:, :, BLANK] < math.log(_BLANK)
        length = rows.samples.shape[1]
        self._frame = length // scores.shape[1]
        voiced = set(np.nonzero(voice)[0].tolist())
        starts, ends = rows.start.tolist(), rows.end.tolist()
        awake, undivided = [], []
        for row, slot in enumerate(rows.slots.tolist()):
            stream = self._streams[slot]
            stream.position, stream.end = starts[row] + length, ends[row]
            if self._second is not None:
                spans = stream.endpointer.spans
                oldest = spans[0][0] if spans else starts[row] - self._look_ahead
                stream.remember(rows.samples[row, :, 0], oldest - self._margin)
            if not (row in voiced or stream.endpointer.speaking):
                continue
            clock = starts[row] - self._look_ahead
            heard = _Heard(scores[row], voice[row], clock, ends[row])
            listened = self._contained(slot, self._listen, slot, stream, heard)
            if listened is None:
                continue
            awake.append(row)
            if listened:
                undivided.append(row)
        self._decoder.push(rows.slots[undivided], scores[undivided])
        told: list[tuple[int, Message]] = []
        for row in awake:
            slot = int(rows.slots[row])
            shown = self._contained(slot, self._show, slot, int(rows.end[row]))
            told += [(row, message) for message in shown or ()]
        return told

    def _contained(self, slot: int, work: Callable[..., _T], *arguments: Any) -> _T | None:
        """Do some work on one stream; whatever goes wrong with it is that stream's alone."""
        try:
            return work(*arguments)
        except Exception as error:  # noqa: BLE001 - see above
            self.failed[slot] = fault(f"stream {self._streams[slot].timeline.name}", error)
            return None

    def _listen(self, slot: int, stream: _Stream, heard: _Heard) -> bool:
        """Follow voice and text, hop by hop of the voice, and end what is over.

        Returns
        -------
        bool
            True: the decoder may take all frames at once, with other rows'. False: it has
            taken what there is to take.
        """
        scores, voice, clock, end = heard
        endpointer = stream.endpointer
        hop = len(scores) * self._frame // len(voice)
        taken = max(0, (stream.earliest - clock) // self._frame)
        over = clock + len(voice) * hop
        aligned = not self._ahead and stream.earliest <= clock
        if aligned and over < end and endpointer.goes_on(over):
            for number in np.flatnonzero(voice).tolist():
                endpointer.hear(clock + number * hop, clock + (number + 1) * hop)
            self._keep(stream, scores, clock)
            return True
        for number, is_voice in enumerate(voice.tolist(), 1):
            now, frames = clock + number * hop, number * hop // self._frame
            known = min(now + self._ahead, end)
            if is_voice:
                endpointer.hear(max(now + self._ahead - hop, stream.earliest), known)
            flushed = now >= end + self._late
            while endpointer.speaking and (flushed or endpointer.decide(now, known, True)):
                self._take(slot, stream, scores[taken:frames], clock + taken * self._frame)
                taken = max(taken, frames)
                says = self._says(slot, stream)
                endpoint = endpointer.decide(now, known, says)
                if flushed and endpoint is None:
                    endpoint = endpointer.at(now, known, "flush" if says else "nothing")
                if endpoint is None:
                    break
                self._end(slot, stream, endpoint, min(now + self._look_ahead, end), end)
            if not endpointer.speaking:
                taken = max(taken, frames)
        if not endpointer.speaking:
            return False
        if taken:
            self._take(slot, stream, scores[taken:], clock + taken * self._frame)
        else:
            self._keep(stream, scores, clock)
        return not taken

    def _take(self, slot: int, stream: _Stream, scores: Scores, position: int) -> None:
        if len(scores):
            self._keep(stream, scores, position)
            self._decoder.push(np.array([slot]), scores[None])

    def _keep(self, stream: _Stream, scores: Scores, position: int) -> None:
        """Remember what the decoder takes: for words' times, and for what lies behind a cut."""
        if not stream.scores:
            stream.first = position
        stream.scores.append(scores.copy())

    def _says(self, slot: int, stream: _Stream) -> bool:
        return bool(self._placed(stream, self._decoder.best(slot).words))

    def _placed(self, stream: _Stream, words: Sequence[Spoken]) -> list[_Placed]:
        """Return the words of which the decoder is sure enough."""
        return [
            _Placed(
                word.text,
                stream.first + word.first * self._frame,
                stream.first + word.last * self._frame,
                word.confidence,
            )
            for word in words
            if word.confidence >= self._min_confidence
        ]

    # --- partials --------------------------------------------------------------------------

    def _show(self, slot: int, end: int) -> list[Message]:
        """Return the partial that a step has brought, and let the second pass begin in a pause."""
        stream = self._streams[slot]
        known = min(stream.position, end)
        text, stable = "", 0
        if stream.endpointer.speaking:
            spoken = self._decoder.best(slot).words
            if spoken is stream.spoken and self._only_words:
                return []
            stream.spoken = spoken
            words = self._placed(stream, spoken)
            stable = len(self._placed(stream, spoken[: self._decoder.stable_words(slot)]))
            self._try(slot, stream, known, bool(words))
            if words and self._goes_on(slot, stream, words[-1]):
                words.pop()
            stable = min(stable, len(words))
            texts = [word.text for word in words]
            if stream.better is not None:
                seam, transcript = stream.better
                seam -= round(_SEAM_S * self._rate_hz)
                texts = [transcript.text, *(word.text for word in words if word.begin >= seam)]
                stable = len(transcript.words)
            text = " ".join(filter(None, texts))
        utterance, shown = stream.shown
        if text == (shown if utterance == stream.utterance else "") or not stream.rules.partials:
            return []
        stream.shown = stream.utterance, text
        index = _read(stream.timeline, known, end)
        return [Partial(stream.timeline.name, stream.utterance, text, index, stable)]

    def _goes_on(self, slot: int, stream: _Stream, word: _Placed) -> bool:
        """Return whether a word may get more letters: it was being said as the text ends.

        Such words are not shown. They are half of all that would change (training/LOG.md).
        """
        clock = stream.first + self._decoder.frames(slot) * self._frame
        return bool(self._separator) and word.end > clock - round(_WORD_END_S * self._rate_hz)

    def _try(self, slot: int, stream: _Stream, known: int, says_something: bool) -> None:
        """Let the second pass begin in a pause, and note what it has made of earlier ones."""
        for end, attempt in stream.attempts.items():
            if attempt.done() and attempt.exception() is None:
                stream.better = (end, attempt.result())
        start, end = stream.endpointer.spans[0][0], stream.endpointer.spans[-1][1]
        if self._second is None or not says_something or known < end + self._margin:
            return
        running = sum(not attempt.done() for attempt in self._attempts)
        if end not in stream.attempts and running < self._num_workers:
            stream.attempts[end] = self._attempt(stream, start, end + self._margin)
            self._trying.add(slot)

    def _attempt(self, stream: _Stream, start: int, end: int) -> Future[Transcript]:
        """Start the second pass over an utterance."""
        assert self._second is not None
        samples = stream.samples(max(stream.earliest, start - self._margin), end)
        draft = stream.better[1].tokens if stream.better else ()
        hotwords = stream.rules.hotwords
        attempt = self._workers.submit(self._second.transcribe, samples, draft, hotwords)
        attempt.add_done_callback(lambda _: self._wake())
        self._attempts = [one for one in self._attempts if not one.done()] + [attempt]
        return attempt

    # --- finals ----------------------------------------------------------------------------

    def _end(self, slot: int, stream: _Stream, endpoint: Endpoint, known: int, end: int) -> None:
        """Let the second pass say what an utterance was, and begin the next.

        Parameters
        ----------
        slot, stream, endpoint
        known : int
            The samples before this position sufficed to know that it is over.
        end : int
            And there are none from this one on.
        """
        if endpoint.reason == "length":
            endpoint = self._between_words(slot, stream, endpoint)
        rest, cut = None, endpoint.cut
        if endpoint.reason != "nothing":
            said, rest = stream.split(cut, self._frame)
            final = self._announced(slot, stream, endpoint, _read(stream.timeline, known, end))
            stream.ended.append(
                _Ended(
                    final=final,
                    rate_hz=stream.timeline.rate_hz,
                    start=endpoint.start,
                    bounds=(stream.earliest, known),
                    heard=self._before(cut, stream, self._decoder.best(slot, ended=True).words),
                    scores=said,
                    first=stream.first,
                    attempt=self._last_attempt(stream, endpoint),
                )
            )
            stream.utterance += 1
            self._waiting.add(slot)
        stream.endpointer.end(cut)
        stream.begin_anew(cut)
        self._decoder.reset(slot)
        if rest is not None:
            self._take(slot, stream, rest, cut)

    def _between_words(self, slot: int, stream: _Stream, endpoint: Endpoint) -> Endpoint:
        """Lay an endpoint that comes by length before the last word, which may go on."""
        words = self._placed(stream, self._decoder.best(slot).words)
        if len(words) < 2:
            return endpoint
        frames = ((words[-2].end + words[-1].begin) // 2 - stream.first) // self._frame
        cut = stream.first + frames * self._frame
        if cut <= endpoint.start:
            return endpoint
        return stream.endpointer.at(cut, endpoint.cut, "length")

    def _before(self, cut: int, stream: _Stream, words: Sequence[Spoken]) -> list[_Placed]:
        return [word for word in self._placed(stream, words) if word.begin < cut]

    def _announced(self, slot: int, stream: _Stream, endpoint: Endpoint, read: int) -> Final:
        """Return all of a final but its words; ``read`` is the client's index."""
        assert endpoint.reason != "nothing"
        timeline, count = stream.timeline, stream.rules.alternatives
        others = self._decoder.alternatives(slot, count) if count > 1 else []
        texts = [_text(self._before(endpoint.cut, stream, other.words)) for other in others]
        return Final(
            stream=timeline.name,
            utterance=stream.utterance,
            text="",
            start=timeline.index_at(endpoint.start),
            end=timeline.index_at(endpoint.end),
            endpoint=read,
            reason=endpoint.reason,
            words=(),
            alternatives=tuple(dict.fromkeys(texts)),
        )

    def _last_attempt(self, stream: _Stream, endpoint: Endpoint) -> Future[Transcript] | None:
        """Return the second pass over a whole utterance, which may be on its way or through."""
        if self._second is None:
            return None
        wanted = endpoint.end + self._margin
        if endpoint.quiet >= wanted and endpoint.end in stream.attempts:
            return stream.attempts.pop(endpoint.end)
        return self._attempt(stream, endpoint.start, min(wanted, endpoint.quiet))

    def collect(self) -> list[tuple[int, Message]]:
        """Return what the second pass has brought, as (slot, message), in order per stream.

        Finals, and better partials of utterances that go on.
        """
        told: list[tuple[int, Message]] = []
        for slot in sorted(self._waiting):
            ended = self._streams[slot].ended
            while ended and (ended[0].attempt is None or ended[0].attempt.done()):
                final = self._contained(slot, self._final, ended.popleft())
                told += [] if final is None else [(slot, final)]
            if not ended:
                self._waiting.discard(slot)
        for slot in sorted(self._trying):
            stream = self._streams[slot]
            if all(attempt.done() for attempt in stream.attempts.values()):
                self._trying.discard(slot)
                shown = self._contained(slot, self._show, slot, stream.end)
                told += [(slot, partial) for partial in shown or ()]
        return told

    def _final(self, over: _Ended) -> Final:
        words = over.heard
        if over.attempt is not None:
            failure = over.attempt.exception()
            if failure is None:
                words = self._timed(over, over.attempt.result())
            else:
                log.error("stream %s: the second pass failed: %r", over.final.stream, failure)
        text, others = _text(words), over.final.alternatives
        if others:
            others = (text, *(other for other in others if other != text))[: len(others)]
        told = tuple(
            Word(
                word.text,
                _seconds(over, word.begin, self._rate_hz),
                _seconds(over, word.end, self._rate_hz),
                round(word.confidence, 3),
            )
            for word in words
        )
        return msgspec.structs.replace(over.final, text=text, words=told, alternatives=others)

    def _timed(self, over: _Ended, transcript: Transcript) -> list[_Placed]:
        """Return a transcript's words at the positions at which the letters heard them."""
        labels: list[int] = []
        places = []
        for word in transcript.words:
            letters = [self._letters[x] for x in word.text.lower() if x in self._letters]
            labels += self._separator if letters and labels else []
            places.append(slice(len(labels), len(labels) + len(letters)))
            labels += letters
        frames = align(over.scores, labels)
        timed: list[_Placed] = []
        last = over.start
        for word, place in zip(transcript.words, places, strict=True):
            said = frames[place]
            begin = over.first + said[0][0] * self._frame if said else last
            last = over.first + said[-1][1] * self._frame if said else last
            timed.append(_Placed(word.text, begin, last, word.confidence))
        return timed

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


def _read(timeline: Timeline, known: int, end: int) -> int:
    """Return the client's index before which lies all that is known; none lies behind the end."""
    return min(timeline.needed_until(known), timeline.index_at(end))


def _text(words: Sequence[_Placed]) -> str:
    return " ".join(word.text for word in words)


def _seconds(over: _Ended, position: int, rate_hz: float) -> float:
    """Return the time of a position of the model in the client's stream."""
    low, high = over.bounds
    distance = (min(max(position, low), high) - over.start) / rate_hz
    return round(over.final.start / over.rate_hz + distance, 3)


def _decoder(model: Model, num_slots: int) -> GreedyDecoder | BeamDecoder:
    """Return what reads the model's scores, as its statement asks for."""
    decoding = model.spec.decoding
    (output,) = (output for output in model.spec.outputs if output.meaning == "ctc")
    if not decoding.beam:
        return GreedyDecoder(output.labels, num_slots)
    if not decoding.language_model:
        return BeamDecoder(output.labels, num_slots, None, decoding.beam)
    ngrams = ngram.load(model.folder / decoding.language_model)
    # Words may be single letters as well, but the space is none.
    labels = [ngram.SPACE if label == SEPARATOR else label for label in output.labels[1:]]
    of_labels = SEPARATOR not in output.labels or all(label in ngrams.ids for label in labels)
    language = (LabelModel if of_labels else WordModel)(
        ngrams, output.labels, decoding.language_weight, decoding.letter_bonus
    )
    return BeamDecoder(output.labels, num_slots, language, decoding.beam)
