"""Prefix beam search over a CTC model's log-probabilities (Graves 2012; Hannun et al. 2014).

A prefix is a text that the frames so far may have said. Its probability is the sum over all
alignments, multiplied by what a language model and the stream's hotwords make of it; the most
probable prefixes are kept. Of those that no language model can tell apart from now on, since it
remembers only the last words, the best is kept: places in the beam are for open questions.
Probabilities are kept as they are, with a common factor taken out, so that a frame costs products
and sums and no logarithm.

Each row is searched by itself, in Python: per frame, time goes by the kept prefixes times the
labels that are probable there. A frame in which only the blank is probable costs nothing.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.messages import Speech
from engine.speech.ctc import BLANK, SEPARATOR, Emitted, Hypothesis, Transcript
from engine.speech.hotwords import Hotwords
from engine.speech.language import Both, Indifferent, Language, make_room

_TINY = 1e-100  # below which the best prefix's probability is brought to 1 again
_MAX_OPEN_WITH_RIVALS = 512
_MAX_OPEN = 96  # labels of a prefix; beyond, what all prefixes have in common becomes final
_KEPT_OPEN = 48  # labels that stay open where prefixes have no word in common
_MAX_STATES = 8192  # of a language model, whose factors are kept; some 0.3 KB each

Trace = tuple[tuple[int, int, float], ...]  # of each label: first and last frame, peak; see Emitted


class _Heard(NamedTuple):
    """A label that is probable in a frame."""

    label: int
    p: float
    log_p: float


class _Prefix:
    """A text that a row may have said, and how probable it is. One character a label.

    ``blank`` and ``token`` are the probabilities of all alignments that end in the blank and in
    the last label, ``best_blank`` and ``best_token`` those of the best alignment, whose
    frames are the trace; ``total``, ``best`` and ``trace`` are of both.
    """

    __slots__ = (
        *("text", "last", "state", "known", "blank", "token", "best_blank", "best_token"),
        *("trace_blank", "trace_token", "total", "best", "trace", "rivals"),
    )

    def __init__(self, text: str, last: int, state: Any, known: "_Known") -> None:
        self.text, self.last = text, last
        self.state, self.known = state, known
        self.blank = self.best_blank = 0.0
        self.token = self.best_token = 0.0
        self.trace_blank: Trace = ()
        self.trace_token: Trace = ()
        self.total = self.best = 0.0
        self.trace: Trace = ()
        self.rivals: tuple[_Rival, ...] = ()

    def rest(self) -> None:
        """Pass a frame in which only the blank is probable."""
        self.blank, self.token = self.total, 0.0
        self.best_blank, self.best_token = self.best, 0.0
        self.trace_blank = self.trace

    def stay(self, frame: int, blank: float, heard: _Heard | None, separates: bool) -> None:
        """Pass a frame without growing: by the blank, or by saying the last label again.

        A separator after a separator, even after a blank, adds nothing.
        """
        if heard is None:
            self.token = self.best_token = 0.0
        elif separates:
            self.token, self.best_token = self.total * heard.p, self.best * heard.p
            self.trace_token = self.trace
        else:
            self.token *= heard.p
            self.best_token *= heard.p
            if self.trace_token:
                *before, (first, _, peak) = self.trace_token
                peak = max(peak, heard.log_p)
                self.trace_token = (*before, (first, frame + 1, peak))
        self.blank, self.best_blank = self.total * blank, self.best * blank
        self.trace_blank = self.trace

    def enter(self, p: float, best: float, trace: Trace) -> None:
        """Add what comes from the prefix that is shorter by one label."""
        self.token += p
        if best > self.best_token:
            self.best_token, self.trace_token = best, trace

    def sum_up(self) -> None:
        self.total = self.blank + self.token
        if self.best_blank >= self.best_token:
            self.best, self.trace = self.best_blank, self.trace_blank
        else:
            self.best, self.trace = self.best_token, self.trace_token

    def scale(self, factor: float) -> None:
        self.blank *= factor
        self.token *= factor
        self.best_blank *= factor
        self.best_token *= factor
        self.sum_up()

    def beat(self, rivals: Iterable["_Rival"], limit: int) -> None:
        """Remember the likeliest of what came to the same state of the language model."""
        likeliest: dict[str, _Rival] = {}
        for rival in (*self.rivals, *rivals):
            likeliest[rival.text] = max(rival, likeliest.get(rival.text, rival))
        self.rivals = tuple(sorted(likeliest.values(), reverse=True)[:limit])

    def shorten(self, count: int) -> None:
        """Let go of labels at the beginning, and of rivals that have others there."""
        self.rivals = tuple(
            rival._replace(
                text=rival.text[count:], trace=rival.trace[count:], since=rival.since - count
            )
            for rival in self.rivals
            if rival.since >= count and rival.text[:count] == self.text[:count]
        )
        self.text, self.trace = self.text[count:], self.trace[count:]
        self.trace_blank, self.trace_token = self.trace_blank[count:], self.trace_token[count:]


class _Rival(NamedTuple):
    """Another text that led to the same state of the language model as a prefix.

    Whatever the prefix says afterwards, its rival would say too.
    """

    part: float  # how probable it is, as a part of the prefix
    text: str
    trace: Trace
    since: int  # labels of the prefix for which the rival has its own


class _Known(NamedTuple):
    """What a language model said of a state, filled as labels are heard."""

    factors: dict[int, float]  # by which a next label multiplies: exp of its score
    after: dict[int, Any]  # the state after it


# A prefix that becomes longer: its probability, the best alignment's and that one's trace so far,
# then the prefix and the label.
_Move = tuple[float, float, Trace, _Prefix, _Heard]


class _Settings(NamedTuple):
    """What is the same for all rows; see :class:`BeamDecoder`."""

    labels: tuple[str, ...]
    separator: int  # BLANK if labels are whole words
    beam: int
    worst: float  # how probable a prefix must be, as a part of the best one


class _Spelling(NamedTuple):
    """A language model, and what it said of the states met last."""

    language: Language[Any]
    known: dict[Any, _Known]

    def look(self, state: Any) -> _Known:
        known = self.known.get(state)
        if known is None:
            make_room(self.known, _MAX_STATES)
            known = self.known[state] = _Known({}, {})
        return known


class _Search:
    """The search of one row, from one reset to the next."""

    def __init__(self, settings: _Settings, spelling: _Spelling, alternatives: int) -> None:
        self._settings, self._spelling, self._language = settings, spelling, spelling.language
        self._num_rivals = alternatives - 1
        # Texts that are settled have no rivals any more.
        self._max_open = _MAX_OPEN_WITH_RIVALS if self._num_rivals else _MAX_OPEN
        self.frames = 0
        self._log_scale = 0.0  # natural log of the common factor
        self._settled = Transcript(settings.labels)  # what is no longer in the prefixes
        state = self._language.begin()
        empty = _Prefix("", settings.separator, state, spelling.look(state))
        empty.blank = empty.best_blank = 1.0
        empty.sum_up()
        self._beam = [empty]  # the best first
        self._resting = True  # whether the last frame said nothing

    def rest(self, log_blank: float) -> None:
        """Pass a frame in which no label is probable."""
        if not self._resting:
            for prefix in self._beam:
                prefix.rest()
            self._resting = True
        self._log_scale += log_blank
        self.frames += 1

    def step(self, log_blank: float, heard: list[_Heard]) -> None:
        """Pass a frame in which some labels are probable."""
        blank = math.exp(log_blank)
        likely = max(blank, *(one.p for one in heard))
        grown, entering = self._grow(heard, self._beam[0].total * likely * self._settings.worst)
        by_label = {one.label: one for one in heard}
        separator = self._settings.separator
        for prefix in self._beam:
            last = prefix.last
            prefix.stay(self.frames, blank, by_label.get(last), last == separator)
        for prefix, (p, best, trace, _, one) in entering:
            prefix.enter(p, best, self._longer(trace, one))
        for prefix in self._beam:
            prefix.sum_up()
        self._keep(grown)
        self._resting = False
        self.frames += 1

    def _grow(
        self, heard: list[_Heard], floor: float
    ) -> tuple[list[_Move], list[tuple[_Prefix, _Move]]]:
        """Return the moves to new prefixes, and those to prefixes that there are already."""
        separator = self._settings.separator
        present = {prefix.text: prefix for prefix in self._beam}
        grown: list[_Move] = []
        entering: list[tuple[_Prefix, _Move]] = []
        for prefix in self._beam:
            total, last, text = prefix.total, prefix.last, prefix.text
            factors = prefix.known.factors
            for one in heard:
                label, factor, _ = one
                weight = factors.get(label)
                if weight is None:
                    weight = math.exp(self._language.score(prefix.state, label))
                    factors[label] = weight
                factor *= weight
                if label != last:
                    p, best, trace = total * factor, prefix.best * factor, prefix.trace
                elif label != separator:  # said anew only after a blank
                    p, best = prefix.blank * factor, prefix.best_blank * factor
                    trace = prefix.trace_blank
                else:
                    continue
                if p > floor:
                    target = present.get(text + chr(label))
                    if target is None:
                        grown.append((p, best, trace, prefix, one))
                    else:
                        entering.append((target, (p, best, trace, prefix, one)))
        return grown, entering

    def _keep(self, grown: list[_Move]) -> None:
        """Make the most probable of old and new prefixes the beam, one for each state."""
        pool: list[tuple[float, _Prefix | _Move]] = [(old.total, old) for old in self._beam]
        pool += [(move[0], move) for move in grown]
        pool.sort(key=itemgetter(0), reverse=True)
        best = pool[0][0]
        cut = best * self._settings.worst
        chosen: dict[tuple[Any, int], _Prefix] = {}
        for p, item in pool:
            if p < cut:
                break
            if isinstance(item, _Prefix):
                key = item.state, item.last
            else:
                key = self._after(item[3], item[4].label), item[4].label
            winner = chosen.get(key)
            if winner is not None:
                if self._num_rivals:
                    winner.beat(self._rivals(item, p, winner), self._num_rivals)
            elif len(chosen) < self._settings.beam:
                chosen[key] = item if isinstance(item, _Prefix) else self._child(item, key[0])
            else:
                break
        self._beam = list(chosen.values())
        if 0.0 < best < _TINY:
            for prefix in self._beam:
                prefix.scale(1.0 / best)
            self._log_scale += math.log(best)
        if len(self._beam[0].text) > self._max_open:
            self._settle()

    def _after(self, prefix: _Prefix, label: int) -> Any:
        after = prefix.known.after
        if label not in after:
            after[label] = self._language.advance(prefix.state, label)
        return after[label]

    def _child(self, move: _Move, state: Any) -> _Prefix:
        p, best, trace, parent, heard = move
        text = parent.text + chr(heard.label)
        child = _Prefix(text, heard.label, state, self._spelling.look(state))
        child.enter(p, best, self._longer(trace, heard))
        child.sum_up()
        child.rivals = parent.rivals
        return child

    def _rivals(self, item: _Prefix | _Move, p: float, winner: _Prefix) -> Iterator[_Rival]:
        """Yield a text that another has beaten, and those that it had beaten itself."""
        if isinstance(item, _Prefix):
            text, trace, beaten = item.text, item.trace, item.rivals
        else:
            _, _, before, parent, heard = item
            text, trace = parent.text + chr(heard.label), self._longer(before, heard)
            beaten = parent.rivals
        part, since = p / winner.total, len(winner.text)
        yield _Rival(part, text, trace, since)
        for rival in beaten:
            longer = rival.text + text[rival.since :], rival.trace + trace[rival.since :]
            yield _Rival(part * rival.part, *longer, since)

    def _longer(self, trace: Trace, heard: _Heard) -> Trace:
        return (*trace, (self.frames, self.frames + 1, heard.log_p))

    def _settle(self) -> None:
        """Let go of words that all prefixes share, or else of those that disagree with the best."""
        count = self._complete(self._agreed())
        if not count:
            text = self._beam[0].text[:-_KEPT_OPEN]
            count = self._complete(text) or len(text)
            self._beam = [old for old in self._beam if old.text.startswith(text[:count])]
        best = self._beam[0]
        _add(self._settled, best.text[:count], best.trace)
        for prefix in self._beam:
            prefix.shorten(count)

    def _agreed(self) -> str:
        """Return what all prefixes begin with."""
        texts = [prefix.text for prefix in self._beam]
        first, last = min(texts), max(texts)  # all others lie between them
        for place, (one, other) in enumerate(zip(first, last, strict=False)):
            if one != other:
                return first[:place]
        return first

    def _complete(self, text: str) -> int:
        """Return how many labels at the beginning cannot change by what is said next."""
        if self._settings.separator == BLANK:
            return max(0, len(text) - 1)  # the last word's frames may go on
        return text.rfind(chr(self._settings.separator)) + 1

    def alternatives(self, count: int, ended: bool) -> list[Hypothesis]:
        """Return the best hypotheses of distinct texts."""
        separator = chr(self._settings.separator)
        sums: dict[str, float] = {}
        texts: dict[str, tuple[str, Trace]] = {}
        for p, text, trace in self._weighed(ended):
            name = text.removesuffix(separator)
            sums[name] = sums.get(name, 0.0) + p
            texts.setdefault(name, (text, trace))
        chosen = sorted(sums, key=sums.__getitem__, reverse=True)[:count]
        return [self._hypothesis(*texts[name], sums[name]) for name in chosen]

    def _weighed(self, ended: bool) -> Iterator[tuple[float, str, Trace]]:
        """Yield probabilities, texts and traces: of prefixes, then of their rivals."""
        weights = [prefix.total for prefix in self._beam]
        if ended:
            separator = self._settings.separator
            for place, prefix in enumerate(self._beam):
                inside = prefix.last != separator
                weights[place] *= math.exp(self._language.end(prefix.state, inside))
        for p, prefix in zip(weights, self._beam, strict=True):
            yield p, prefix.text, prefix.trace
        for p, prefix in zip(weights, self._beam, strict=True):
            for rival in prefix.rivals:
                text = rival.text + prefix.text[rival.since :]
                yield p * rival.part, text, rival.trace + prefix.trace[rival.since :]

    def _hypothesis(self, text: str, trace: Trace, p: float) -> Hypothesis:
        transcript = self._settled.copy()
        _add(transcript, text, trace)
        score = self._log_scale + (math.log(p) if p > 0.0 else -math.inf)
        return Hypothesis(transcript.spoken(), score)

    def stable_words(self) -> int:
        transcript = self._settled.copy()
        _add(transcript, self._agreed(), self._beam[0].trace)
        return transcript.num_complete

    def take(self) -> tuple[Any, ...]:
        prefixes = [[getattr(prefix, name) for name in _CARRIED] for prefix in self._beam]
        settled = self._settled.words[:], self._settled.open[:]
        return self.frames, self._log_scale, self._resting, *settled, prefixes

    def put(self, carried: Sequence[Any]) -> None:
        self.frames, self._log_scale, self._resting = carried[:3]
        words, last_word, prefixes = carried[3:]
        self._settled = Transcript(self._settings.labels, words, last_word)
        self._beam = []
        for fields in prefixes:
            named = dict(zip(_CARRIED, map(_frozen, fields), strict=True))
            state = named["state"]
            prefix = _Prefix(named["text"], named["last"], state, self._spelling.look(state))
            for name, value in named.items():
                setattr(prefix, name, value)
            prefix.rivals = tuple(_Rival(*rival) for rival in prefix.rivals)
            prefix.sum_up()
            self._beam.append(prefix)


_CARRIED = (
    *("text", "last", "state", "blank", "token", "best_blank", "best_token"),
    *("trace_blank", "trace_token", "rivals"),
)


def _add(transcript: Transcript, text: str, trace: Trace) -> None:
    for symbol, frames in zip(text, trace, strict=False):
        transcript.add(Emitted(ord(symbol), *frames))


def _frozen(value: Any) -> Any:
    """Return lists as tuples: a way through bytes makes the one of the other."""
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


class BeamDecoder:
    """The most probable texts of each row.

    Parameters
    ----------
    labels : tuple of str
        The first is the blank.
    num_slots : int
    language : Language, optional
        Over the same labels; by default all texts are alike.
    beam : int
        How many prefixes are kept.
    margin : float
        Natural log by which a prefix may be less probable than the best.
    floor : float
        Natural log; labels less probable than this take no part in a frame.
    """

    def __init__(
        self,
        labels: tuple[str, ...],
        num_slots: int,
        language: Language[Any] | None = None,
        beam: int = 24,
        margin: float = 12.0,
        floor: float = -7.0,
    ) -> None:
        separator = labels.index(SEPARATOR) if SEPARATOR in labels else BLANK
        self._settings = _Settings(labels, separator, beam, math.exp(-margin))
        self._floor = floor
        self._spelling = _Spelling(language or Indifferent(), {})
        self._spellings = [self._spelling] * num_slots
        self._options = [Speech()] * num_slots
        self._rows = [_Search(self._settings, self._spelling, 1) for _ in range(num_slots)]

    def open(self, slot: int, speech: Speech) -> None:
        """Begin anew with a stream's hotwords, and its wish for alternatives.

        Raises
        ------
        Refused
            If one cannot be spelt with the labels; the row is as it was.
        """
        spelling = self._spelling
        if speech.hotwords:
            hotwords = Hotwords(self._settings.labels, speech.hotwords)
            spelling = _Spelling(Both(spelling.language, hotwords), {})
        self._spellings[slot], self._options[slot] = spelling, speech
        self.reset(slot)

    def reset(self, slot: int) -> None:
        """Forget the utterance and count frames from 0; options stay."""
        alternatives = self._options[slot].alternatives
        self._rows[slot] = _Search(self._settings, self._spellings[slot], alternatives)

    def push(self, slots: NDArray[np.intp], log_probs: NDArray[np.float32]) -> None:
        """Take the next frames of some rows.

        Parameters
        ----------
        slots : (rows,) intp
            Distinct.
        log_probs : (rows, frames, labels) float32
            Natural logarithms.
        """
        heard = log_probs > self._floor
        heard[:, :, BLANK] = False
        blanks = log_probs[:, :, BLANK].tolist()
        places = [axis.tolist() for axis in np.nonzero(heard)]
        said: list[list[list[_Heard]]] = [[[] for _ in row] for row in blanks]
        for row, frame, label, log_p in zip(*places, log_probs[heard].tolist(), strict=True):
            said[row][frame].append(_Heard(label, math.exp(log_p), log_p))
        for slot, row_blanks, row_said in zip(slots.tolist(), blanks, said, strict=True):
            search = self._rows[slot]
            for log_blank, frame_said in zip(row_blanks, row_said, strict=True):
                if frame_said:
                    search.step(log_blank, frame_said)
                else:
                    search.rest(log_blank)

    def best(self, slot: int, ended: bool = False) -> Hypothesis:
        """Return the most probable text; once the utterance has ended, its last word is whole."""
        return self._rows[slot].alternatives(1, ended)[0]

    def alternatives(self, slot: int, count: int, ended: bool = True) -> list[Hypothesis]:
        """Return some of the most probable texts, the best first, no two alike.

        There are more than a few only if the stream was opened with so many alternatives.
        """
        return self._rows[slot].alternatives(count, ended)

    def frames(self, slot: int) -> int:
        """Return the frames since the last reset."""
        return self._rows[slot].frames

    def stable_words(self, slot: int) -> int:
        """Return how many words at the beginning are complete and the same in all prefixes."""
        return self._rows[slot].stable_words()

    def take(self, slot: int) -> tuple[Any, ...]:
        """Return everything that the row carries, in numbers, texts, bytes and tuples."""
        return msgspec.to_builtins(self._options[slot]), self._rows[slot].take()

    def put(self, slot: int, carried: Sequence[Any]) -> None:
        """Go on from what was taken, also after a way through MessagePack."""
        options, search = carried
        self.open(slot, msgspec.convert(options, Speech))
        self._rows[slot].put(search)
