"""Scores of found beats and alerts against annotated ones, in the manner of AAMI EC57.

Pure: arrays in, counts out; no files, no sockets. The standard's text was not at hand. What is
done here follows the page on MIT-BIH in PhysioNet's guides and the reading of it in WFDB's
``bxb`` and ``epicmp`` (G. Moody), and says where it goes its own way:

Beats
    An annotated and a found beat within 150 ms are a pair, one to one, by ``bxb``'s walk along
    both lists. Whole records are paired first; then a pair belongs to where its annotated beat
    lies, so that the border at 5:00, of ventricular fibrillation or of lost samples, makes no
    error of its own. A found beat without partner inside of what is left out is not counted.
Classes
    N, S, V, F, Q of AAMI, with missed and false beats as a sixth column and row. Of a class: a
    true positive is an annotated beat that was found with its class; a false negative is any
    other annotated beat of the class, missed ones included; a false positive is a beat of another
    class, or none, that was found as this one. By EC57 it counts against V neither that a fusion
    or unknown beat (F, Q), nor against S that an unknown one (Q), is called so. A true negative
    is every other pair, and every false beat, that is not called by the class. The false positive
    rate is false positives over them and the true negatives. ``f1_strict`` counts those pardoned
    too, as papers with a plain table do.
    Escape beats (e, j) are N, as in de Chazal et al. 2004; ``bxb`` counts them to S.
Alerts
    Episodes come from rules applied to the annotated beats (:data:`DEFINITIONS`). One is found if
    an alert of its rule becomes active between its beginning and 10 s after its end (EC13's time
    for an alarm), or is still active from before. An alert is false if it neither finds an
    episode nor overlaps one.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.int64]
Stretches = Sequence[tuple[int, int]]  # first sample and the one after the last, of each

LABELS = ("N", "S", "V", "F", "Q")
_SYMBOLS = {"N": "NLRejB", "S": "AaJSn", "V": "VEr", "F": "F", "Q": "/fQ?"}
# A beat annotation of WFDB to the number of its class.
CLASS_OF = {symbol: LABELS.index(label) for label, text in _SYMBOLS.items() for symbol in text}

MATCH_S = 0.15
STRICT_S = 0.05  # a fiducial as a person would place it
LEARNING_S = 300.0  # bxb scores from here on
_NONE = len(LABELS)  # the row of false beats, the column of missed ones
_PARDONED = {"V": "FQ", "S": "Q"}  # called so, they are no false positives


class Beats(NamedTuple):
    """Beats of a record, in the order of time."""

    samples: Samples  # (beats,)
    labels: Samples  # (beats,) index into LABELS


class Figures(NamedTuple):
    """Of one class of beats; not a number where nothing is counted."""

    true_positives: int
    false_negatives: int
    false_positives: int
    true_negatives: int
    pardoned: int

    @property
    def sensitivity(self) -> float:
        return _ratio(self.true_positives, self.true_positives + self.false_negatives)

    @property
    def predictivity(self) -> float:
        return _ratio(self.true_positives, self.true_positives + self.false_positives)

    @property
    def false_positive_rate(self) -> float:
        return _ratio(self.false_positives, self.false_positives + self.true_negatives)

    @property
    def f1(self) -> float:
        return self._f1(self.false_positives)

    @property
    def f1_strict(self) -> float:
        """Of a plain table: nothing is pardoned."""
        return self._f1(self.false_positives + self.pardoned)

    def _f1(self, false: int) -> float:
        hits = 2 * self.true_positives
        return _ratio(hits, hits + false + self.false_negatives)


class Table(NamedTuple):
    """Counts of one or of several records.

    ``counts[annotated, found]`` has a sixth row and column: false and missed beats.
    """

    counts: NDArray[np.int64]  # (labels + 1, labels + 1)

    @property
    def hits(self) -> int:
        return int(self.counts[:_NONE, :_NONE].sum())

    @property
    def missed(self) -> int:
        return int(self.counts[:_NONE, _NONE].sum())

    @property
    def false(self) -> int:
        return int(self.counts[_NONE, :_NONE].sum())

    @property
    def sensitivity(self) -> float:
        """Of beats, whatever their class; so are the next two."""
        return _ratio(self.hits, self.hits + self.missed)

    @property
    def predictivity(self) -> float:
        return _ratio(self.hits, self.hits + self.false)

    @property
    def f1(self) -> float:
        return _ratio(2 * self.hits, 2 * self.hits + self.missed + self.false)

    def of(self, label: str) -> Figures:
        """Return the figures of one class."""
        index = LABELS.index(label)
        hits = int(self.counts[index, index])
        annotated, called = int(self.counts[index].sum()), int(self.counts[:, index].sum())
        pardoned = sum(
            int(self.counts[LABELS.index(other), index]) for other in _PARDONED.get(label, "")
        )
        others = int(self.counts.sum() - self.counts[:, _NONE].sum())  # pairs and false beats
        others -= annotated - int(self.counts[index, _NONE]) + called - hits
        return Figures(hits, annotated - hits, called - hits - pardoned, others, pardoned)


def match(annotated: Samples, found: Samples, window: int) -> Samples:
    """Pair found beats with annotated ones, one to one, as ``bxb`` does.

    Of the two next beats the earlier is paired with the later if they are near enough, and if
    the beat that follows the earlier one in its own list is not nearer still; otherwise it stays
    without partner.

    Parameters
    ----------
    annotated, found : (beats,) int64
        Samples, in order.
    window : int
        So many samples apart is still a match.

    Returns
    -------
    (beats,) int64
        Of each annotated beat the place in `found`, or -1.
    """
    partner = np.full(len(annotated), -1, np.int64)
    beats, others = annotated.tolist(), found.tolist()
    place = other = 0
    while place < len(beats) and other < len(others):
        beat, candidate = beats[place], others[other]
        if candidate < beat:
            follower = others[other + 1] if other + 1 < len(others) else None
        else:
            follower = beats[place + 1] if place + 1 < len(beats) else None
        later, distance = max(beat, candidate), abs(beat - candidate)
        if distance <= window and (follower is None or distance < abs(later - follower)):
            partner[place] = other
            place, other = place + 1, other + 1
        elif candidate < beat:
            other += 1
        else:
            place += 1
    return partner


def compare(
    annotated: Beats,
    found: Beats,
    window: int,
    begin: int = 0,
    left_out: Stretches = (),
) -> Table:
    """Count what became of a record's beats.

    Parameters
    ----------
    annotated, found : Beats
    window : int
        Samples, of :func:`match`.
    begin : int
        What lies before this sample is not counted.
    left_out : sequence of (int, int)
        Nor what lies in these.
    """
    partner = match(annotated.samples, found.samples, window)
    alone = np.setdiff1d(np.arange(len(found.samples)), partner)
    counted = _counted(annotated.samples, begin, left_out)
    alone = alone[_counted(found.samples[alone], begin, left_out)]
    # A missed beat's partner is -1, which takes the _NONE put behind the classes.
    answers = np.append(found.labels, _NONE)[partner[counted]]
    rows = np.append(annotated.labels[counted], np.full(len(alone), _NONE))
    columns = np.append(answers, found.labels[alone])
    cells = np.bincount(rows * (_NONE + 1) + columns, minlength=(_NONE + 1) ** 2)
    return Table(cells.reshape(_NONE + 1, _NONE + 1).astype(np.int64))


def gross(tables: Iterable[Table]) -> Table:
    """Add up the counts of several records."""
    total = np.zeros((_NONE + 1, _NONE + 1), np.int64)
    for table in tables:
        total += table.counts
    return Table(total)


def widened(stretches: Stretches, margin: int) -> list[tuple[int, int]]:
    """Return stretches with so many samples more on either side."""
    return [(start - margin, end + margin) for start, end in stretches]


def _counted(samples: Samples, begin: int, left_out: Stretches) -> NDArray[np.bool_]:
    counted = samples >= begin
    for start, end in left_out:
        counted &= (samples < start) | (samples >= end)
    return counted


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


# --- heart rate ------------------------------------------------------------------------------

_WINDOW_S = 10.0
_INTERVALS = 8


def rate_errors(
    annotated: Samples, found: Samples, rate_hz: float, left_out: Stretches = ()
) -> NDArray[np.float64]:
    """Return found less annotated heart rate, in bpm, of each window of 10 s.

    The rate of a window is that of the mean interval between its beats, of which it must have
    two in both lists; windows that touch what is left out are not compared.
    """
    errors = []
    window = round(_WINDOW_S * rate_hz)
    for begin in range(0, int(annotated.max(initial=0)) + 1, window):
        if _touches((begin, begin + window), left_out):
            continue
        one, other = (_rate_in(beats, begin, begin + window) for beats in (annotated, found))
        if one is not None and other is not None:
            errors.append(60 * rate_hz * (other - one))
    return np.array(errors, np.float64)


def _rate_in(beats: Samples, begin: int, end: int) -> float | None:
    """Return the beats per sample of a stretch."""
    first, last = np.searchsorted(beats, [begin, end])
    if last - first < 2:
        return None
    return float((last - first - 1) / (beats[last - 1] - beats[first]))


def told_rate_errors(
    annotated: Samples, partner: Samples, told: NDArray[np.float64], rate_hz: float
) -> NDArray[np.float64]:
    """Return the heart rate told with each found beat less that of the annotated ones, in bpm.

    That of the annotated ones is of the median of the last eight intervals, two at least.

    Parameters
    ----------
    annotated, partner : (beats,) int64
        As of :func:`match`.
    told : (found beats,) float64
        In bpm; not a number where none was told.
    """
    errors = []
    for place in np.flatnonzero(partner >= 0).tolist():
        intervals = np.diff(annotated[max(0, place - _INTERVALS) : place + 1])
        rate = told[partner[place]]
        if len(intervals) >= 2 and np.isfinite(rate):
            errors.append(rate - 60 * rate_hz / float(np.median(intervals)))
    return np.array(errors, np.float64)


# --- episodes and alerts ---------------------------------------------------------------------


class Reference(NamedTuple):
    """What is annotated in a record."""

    rate_hz: float
    length: int  # samples
    beats: Beats
    flutter: Stretches  # ventricular flutter or fibrillation, from [ to ]; it has no beats
    rhythms: Sequence[tuple[str, int, int]] = ()  # WFDB's name such as "(AFIB", start, end


class Episode(NamedTuple):
    """Something that an alert should tell, in samples."""

    begin: int
    met: int  # where the rule is first kept: what comes later is the detector's delay
    end: int


class Definition(NamedTuple):
    """What a rule's alerts are compared with."""

    says: str
    find: Callable[[Reference], list[Episode]]
    in_flutter: bool = False  # it is about fibrillation itself, which is never left out


class Transition(NamedTuple):
    """An alert's rule came to another state."""

    rule: str
    state: str
    sample: int
    decided_at: int


class Alarms(NamedTuple):
    """Counts of one rule, of one or of several records."""

    episodes: int = 0
    found: int = 0  # an alert became active in time
    still_active: int = 0  # none did, but one was active already
    alerts: int = 0
    false: int = 0
    resolved_early: int = 0  # while the episode went on
    latencies_s: tuple[float, ...] = ()  # from the beginnings of found episodes
    delays_s: tuple[float, ...] = ()  # from where the rule was first kept

    @property
    def sensitivity(self) -> float:
        return _ratio(self.found + self.still_active, self.episodes)

    def plus(self, other: "Alarms") -> "Alarms":
        return Alarms(
            self.episodes + other.episodes,
            self.found + other.found,
            self.still_active + other.still_active,
            self.alerts + other.alerts,
            self.false + other.false,
            self.resolved_early + other.resolved_early,
            self.latencies_s + other.latencies_s,
            self.delays_s + other.delays_s,
        )


def pauses(reference: Reference) -> list[Episode]:
    """Return where no beat came for 4 s: from the last beat to the next, or to the end."""
    longest = round(4 * reference.rate_hz)
    beats = [*reference.beats.samples.tolist(), reference.length]
    return [
        Episode(one, one + longest, other)
        for one, other in pairwise(beats)
        if other - one >= longest
    ]


def slow_beats(reference: Reference) -> list[Episode]:
    """Return runs of 5 beats or more, each over 60/40 s after the one before."""
    return _runs(reference, np.diff(reference.beats.samples) > 60 / 40 * reference.rate_hz, 5)


def fast_beats(reference: Reference) -> list[Episode]:
    """Return runs of 17 beats or more, each under 60/140 s after the one before."""
    return _runs(reference, np.diff(reference.beats.samples) < 60 / 140 * reference.rate_hz, 17)


def ventricular_run(reference: Reference, beats: int, above_bpm: float = 0.0) -> list[Episode]:
    """Return runs of so many V beats or more, whose mean rate is over a limit."""
    runs = _runs(reference, reference.beats.labels == LABELS.index("V"), beats, first=0)
    samples = reference.beats.samples
    kept = []
    for run in runs:
        first, last = np.searchsorted(samples, [run.begin, run.end])
        if (last - first) * 60 * reference.rate_hz > above_bpm * (run.end - run.begin):
            kept.append(run)
    return kept


def frequent_ventricular(reference: Reference, count: int = 6) -> list[Episode]:
    """Return where that many V beats lay in the last minute."""
    samples = reference.beats.samples[reference.beats.labels == LABELS.index("V")].tolist()
    minute = round(60 * reference.rate_hz)
    episodes: list[Episode] = []
    for first, last in zip(samples, samples[count - 1 :], strict=False):
        if last - first > minute:
            continue
        end = min(first + minute, reference.length)  # then the first of them is a minute old
        if episodes and last <= episodes[-1].end:
            episodes[-1] = episodes[-1]._replace(end=end)
        else:
            episodes.append(Episode(last, last, end))
    return episodes


def fibrillation(reference: Reference) -> list[Episode]:
    """Return ventricular flutter and fibrillation of 4 s or more."""
    least = round(4 * reference.rate_hz)
    return [
        Episode(start, start + least, end)
        for start, end in reference.flutter
        if end - start >= least
    ]


def rhythm(reference: Reference, *names: str) -> list[Episode]:
    """Return the stretches that are annotated as a rhythm of one of these names."""
    return [Episode(start, start, end) for name, start, end in reference.rhythms if name in names]


def _runs(
    reference: Reference, kept: NDArray[np.bool_], least: int, first: int = 1
) -> list[Episode]:
    """Return runs of beats that keep a rule; `first` is the place of the beat of ``kept[0]``."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], kept, [False]]).astype(np.int8)))
    samples = reference.beats.samples
    return [
        Episode(
            int(samples[begin + first]),
            int(samples[begin + first + least - 1]),
            int(samples[end + first - 1]),
        )
        for begin, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
        if end - begin >= least
    ]


# By the names of engine/alerts.toml. The limits of the first three, and of ventricular
# tachycardia, are those of the PhysioNet/CinC challenge of 2015.
DEFINITIONS = {
    "asystole": Definition("no beat for 4 s", pauses),
    "bradycardia": Definition("5 beats in a row below 40 bpm", slow_beats),
    "tachycardia": Definition("17 beats in a row above 140 bpm", fast_beats),
    "ventricular_tachycardia": Definition(
        "5 V beats in a row above 100 bpm", lambda one: ventricular_run(one, 5, 100)
    ),
    "ventricular_run": Definition("5 V beats in a row", lambda one: ventricular_run(one, 5)),
    "ventricular_run_short": Definition("3 V beats in a row", lambda one: ventricular_run(one, 3)),
    "frequent_ventricular_beats": Definition("6 V beats in a minute", frequent_ventricular),
    "ventricular_fibrillation_suspected": Definition(
        "flutter or fibrillation annotated for 4 s", fibrillation, in_flutter=True
    ),
    "atrial_fibrillation_suspected": Definition(
        "atrial fibrillation or flutter annotated", lambda one: rhythm(one, "(AFIB", "(AFL")
    ),
    "bigeminy": Definition("annotated", lambda one: rhythm(one, "(B")),
}
RATE_RULES = ("asystole", "bradycardia", "tachycardia")

_IN_TIME_S = 10.0
# From these states an alert is raised anew; "resolving" may still go back.
_OVER = frozenset({"latched", "resolved", "inactive", "paused", "off"})
_RESOLVED = frozenset({"latched", "resolved"})  # which say that the condition is gone


class _Span(NamedTuple):
    """An alert from when it was known to when it was known to be over."""

    begin: int
    end: int
    resolved: int | None  # the sample that resolved it, if one did


def alarms(
    rule: str,
    reference: Reference,
    transitions: Iterable[Transition],
    left_out: Stretches = (),
) -> Alarms:
    """Compare a rule's alerts in a record with its episodes there.

    Parameters
    ----------
    rule : str
        One of :data:`DEFINITIONS`.
    reference : Reference
    transitions : iterable of Transition
        Of the record, in the order of time; those of other rules are passed over.
    left_out : sequence of (int, int)
        Episodes and false alerts that touch these are not counted.
    """
    definition, rate_hz = DEFINITIONS[rule], reference.rate_hz
    if definition.in_flutter:
        left_out = ()
    spans = _spans([one for one in transitions if one.rule == rule], reference.length)
    in_time = round(_IN_TIME_S * rate_hz)
    total = Alarms()
    used: set[_Span] = set()
    for episode in definition.find(reference):
        if _touches((episode.begin, episode.end), left_out):
            continue
        timely = [one for one in spans if episode.begin <= one.begin <= episode.end + in_time]
        over = [one for one in spans if one.begin <= episode.end and one.end >= episode.begin]
        used |= {*timely, *over}
        total = total.plus(_became_of(episode, timely, over, rate_hz))
    false = [one for one in spans if one not in used and not _touches(one[:2], left_out)]
    return total.plus(Alarms(alerts=len(spans), false=len(false)))


def _became_of(
    episode: Episode, timely: Sequence[_Span], over: Sequence[_Span], rate_hz: float
) -> Alarms:
    slack = round(MATCH_S * rate_hz)  # a beat may be found so much before it is annotated
    early = sum(
        one.resolved is not None and episode.met <= one.resolved < episode.end - slack
        for one in over
    )
    if not timely:
        return Alarms(episodes=1, still_active=int(bool(over)), resolved_early=early)
    known = timely[0].begin
    return Alarms(
        episodes=1,
        found=1,
        resolved_early=early,
        latencies_s=((known - episode.begin) / rate_hz,),
        delays_s=((known - episode.met) / rate_hz,),
    )


def _spans(transitions: Sequence[Transition], length: int) -> list[_Span]:
    spans: list[_Span] = []
    begin: int | None = None
    for one in transitions:
        if one.state == "active" and begin is None:
            begin = one.decided_at
        elif one.state in _OVER and begin is not None:
            resolved = one.sample if one.state in _RESOLVED else None
            spans.append(_Span(begin, one.decided_at, resolved))
            begin = None
    if begin is not None:
        spans.append(_Span(begin, max(begin, length), None))
    return spans


def resolved_unheard(transitions: Iterable[Transition], missing: Stretches) -> int:
    """Count the alerts that were told to be over about, or upon, samples that never came."""
    return sum(
        one.state in _RESOLVED
        and any(
            start <= one.sample < end or start < one.decided_at <= end for start, end in missing
        )
        for one in transitions
    )


def _touches(stretch: tuple[int, int], others: Stretches) -> bool:
    return any(stretch[0] < end and stretch[1] >= start for start, end in others)
