"""How well speech is recognised, through a real server and over its sockets.

Texts are compared by their spoken words (:mod:`engine.spoken`); what the figures mean stands in
:mod:`engine.scoring`, and where recordings and their texts come from in :mod:`engine.corpus`.
Recordings without a text are noise, in which every word is false.
"""

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from engine import spoken
from engine.child import running
from engine.client import Client
from engine.corpus import Clip
from engine.dictation import Plan, Take, Unheard, dictate, length_s
from engine.messages import Final, Partial
from engine.progress import Bar
from engine.scoring import (
    AVERAGE_LAGGING,
    Changes,
    Errors,
    average_lagging,
    changes,
    errors,
    first_shown,
    interval,
    matches,
    quantiles,
)

Report = dict[str, Any]

END_TIMES = (
    "a word's end is Word.end_s of its final: the recogniser's own, not a forced alignment's"
)


class Utterance(NamedTuple):
    """What was shown of an utterance, in spoken words, with the times of the clock."""

    partials: list[tuple[float, list[str]]]
    final: Final | None  # None: it came to nothing
    final_at: float
    words: list[str]  # of the final
    ends_s: list[float]  # of each, from the recording's beginning


class Score(NamedTuple):
    """One recording's figures."""

    clip: Clip
    hypothesis: str
    streaming: str  # what its partials ended as
    words: Errors
    letters: Errors
    streaming_words: Errors
    changes: Changes
    changes_by_place: Changes
    audio_s: float


class Lags(NamedTuple):
    """Of some recordings, how long after its cause each thing came, in seconds."""

    shown: list[float]  # from a right word's end to where it was first shown, partial or final
    in_partial: list[float]  # the same, of those right words that a partial showed
    final: list[float]  # to its final
    endpoint: list[float]  # from sending an endpoint's last sample to the final
    flush: list[float]  # from asking for the tail to the final
    average: list[float]  # average lagging of each recording


# --- one recording ---------------------------------------------------------------------------


def utterances(take: Take) -> list[Utterance]:
    """Put the partials of a recording to their finals."""
    partials: dict[int, list[tuple[float, list[str]]]] = defaultdict(list)
    finals: dict[int, tuple[float, Final]] = {}
    for at, message in take.told:
        if isinstance(message, Partial):
            partials[message.utterance].append((at, spoken.words(message.text)))
        elif isinstance(message, Final):
            finals[message.utterance] = (at, message)
    made = []
    for number in sorted({*partials, *finals}):
        at, final = finals.get(number, (take.closed_at, None))
        timed = list(_timed_words(final)) if final is not None else []
        words, ends_s = [word for word, _ in timed], [end_s for _, end_s in timed]
        made.append(Utterance(partials[number], final, at, words, ends_s))
    return made


def _timed_words(final: Final) -> Iterator[tuple[str, float]]:
    """Yield a final's spoken words with the end of each; those of "21st" end together."""
    for word in final.words:
        for one in spoken.words(word.text):
            yield one, word.end_s


def score(clip: Clip, take: Take) -> Score:
    """Compare what was recognised with what is said."""
    told = utterances(take)
    reference = spoken.words(clip.text)
    streaming = [one.partials[-1][1] for one in told if one.partials]
    texts = [one.final.text for one in told if one.final is not None]
    hypothesis = spoken.words(" ".join(texts))
    ended_as = [word for words in streaming for word in words]
    return Score(
        clip,
        " ".join(" ".join(texts).split()),
        " ".join(ended_as),
        errors(reference, hypothesis),
        errors(" ".join(reference), " ".join(hypothesis)),
        errors(reference, ended_as),
        _shown(told, by_place=False),
        _shown(told, by_place=True),
        take.seconds,
    )


def _shown(told: Sequence[Utterance], by_place: bool) -> Changes:
    total = Changes()
    for one in told:
        partials = [words for _, words in one.partials]
        final = spoken.words(one.final.text) if one.final is not None else []
        total = total.plus(changes(partials, final, by_place))
    return total


def unheard(clip: Clip) -> Score:
    """Count a recording that could not be read or sent: all of it is missing."""
    reference = spoken.words(clip.text)
    missing, letters = errors(reference, []), errors(" ".join(reference), "")
    return Score(clip, "", "", missing, letters, missing, Changes(), Changes(), 0.0)


def lags(heard: Iterable[tuple[Clip, Take]]) -> Lags:
    """Measure how soon things came, of recordings that were sent in real time."""
    made = Lags([], [], [], [], [], [])
    for clip, take in heard:
        told = utterances(take)
        _word_lags(clip, take, told, made)
        for one in told:
            if one.final is not None:
                _final_lag(take, one.final, one.final_at, made)
    return made


def _word_lags(clip: Clip, take: Take, told: Sequence[Utterance], made: Lags) -> None:
    """Note the lags of a recording's words."""
    reference = spoken.words(clip.text)
    right = {place for _, place in matches(reference, [w for one in told for w in one.words])}
    delays: list[float] = []
    place = 0
    for one in told:
        for first, end_s in zip(first_shown(one.partials, one.words), one.ends_s, strict=True):
            shown_at = one.final_at if first is None else first
            delays.append(shown_at - take.begin)
            if place in right:
                made.shown.append(shown_at - take.begin - end_s)
                made.final.append(one.final_at - take.begin - end_s)
                if first is not None:
                    made.in_partial.append(made.shown[-1])
            place += 1
    if delays and reference:
        made.average.append(average_lagging(delays, take.seconds, len(reference)))


def _final_lag(take: Take, final: Final, at: float, made: Lags) -> None:
    if final.reason == "flush":
        made.flush.append(at - take.flushed_at)
        return
    number = bisect_left([index for index, _ in take.sent], final.endpoint)
    if number < len(take.sent):
        made.endpoint.append(at - take.sent[number][1])


# --- all of them -----------------------------------------------------------------------------


class Evaluation(NamedTuple):
    """What came of all recordings, in the order of the manifest."""

    scores: list[Score]
    report: Report


def evaluate(
    clips: Sequence[Clip],
    plan: Plan,
    console: Console,
    timeout_s: float = 30.0,
) -> Evaluation:
    """Send recordings to a server of their own and compare what it says with what is said.

    Parameters
    ----------
    clips : sequence of Clip
    plan : Plan
        With a pace of 1 the lags are measured as well; without, the real-time factor.
    console : Console
        For progress: not standard output.
    timeout_s : float
        How long the server may say nothing.
    """
    by_path = {clip.path: clip for clip in clips}
    scores: dict[Path, Score] = {}
    faults: list[str] = []
    heard: list[tuple[Clip, Take]] = []
    bar = Bar(console, length_s(by_path), "evaluating")
    with (
        running(plan.model) as (address, server),
        Client(address, timeout_s) as client,
        bar,
    ):
        assert server is not None
        before, begin_at, end_at = server.counts(), float("inf"), 0.0
        for one in dictate(client, list(by_path), plan, bar.move):
            clip = by_path[one.path]
            if isinstance(one, Unheard):
                scores[one.path] = unheard(clip)
                faults.append(one.reason)
                continue
            scores[one.path] = score(clip, one)
            faults += one.faults
            begin_at, end_at = min(begin_at, one.begin), max(end_at, one.closed_at)
            if plan.pace:
                heard.append((clip, one))
            bar.over(one.seconds)
        cpu_s = server.counts().since(before).cpu_seconds
    ordered = [scores[clip.path] for clip in clips]
    wall_s = max(0.0, end_at - begin_at)
    report = {**accuracy(ordered), **cost(ordered, plan, wall_s, cpu_s), "faults": faults}
    if plan.pace:
        report["latency"] = latency(lags(heard))
    return Evaluation(ordered, report)


def accuracy(scores: Sequence[Score]) -> Report:
    """Return the figures of all texts together, of speakers, of lone words and of noise."""
    texts = [one for one in scores if one.words.reference]
    noise = [one for one in scores if not one.words.reference]
    words = _sum(one.words for one in texts)
    letters = _sum(one.letters for one in texts)
    streaming = _sum(one.streaming_words for one in texts)
    shown = _changes(one.changes for one in scores)
    by_place = _changes(one.changes_by_place for one in scores)
    report: Report = {
        "figure": _percent(words.rate),
        "what": "word error rate of the finals, %",
        "normalisation": spoken.NORMALISATION,
        "recordings": len(texts),
        "words": words.reference,
        "wer": _percent(words.rate),
        "wer_95": [100 * rate for rate in interval([one.words for one in texts])]
        if texts
        else None,
        "substitutions": words.substitutions,
        "deletions": words.deletions,
        "insertions": words.insertions,
        "cer": _percent(letters.rate),
        "streaming_wer": _percent(streaming.rate),
        "words_shown": shown.shown,
        "words_changed": shown.changed,
        "changed": _percent(shown.rate),
        "changed_by_place": _percent(by_place.rate),
        "speakers": _speakers(texts),
        "lone_words": _lone_words(texts),
        "noise": _false_words(noise),
    }
    if not texts and noise:
        report |= {"figure": report["noise"]["per_hour"], "what": "false words per hour of noise"}
    return report


def cost(scores: Sequence[Score], plan: Plan, wall_s: float, cpu_s: float) -> Report:
    """Return what it took."""
    audio_s = sum(one.audio_s for one in scores)
    return {
        "model": plan.model,
        "streams": plan.streams,
        "paced": bool(plan.pace),
        "silence_s": plan.silence_s,
        "audio_s": audio_s,
        "wall_s": wall_s,
        "real_time_factor": _over(wall_s, audio_s),
        "server_cpu_s": cpu_s,
        "server_cpu_s_per_audio_s": _over(cpu_s, audio_s),
    }


def latency(found: Lags) -> Report:
    """Return the lags as quantiles, with what they are counted from."""

    def told(times_s: Sequence[float]) -> Report | None:
        made = quantiles(times_s)
        return None if made is None else made._asdict()

    average = [value for value in found.average if math.isfinite(value)]
    return {
        "end_times": END_TIMES,
        "word_end_to_first_shown": told(found.shown),
        "word_end_to_partial": told(found.in_partial),
        "right_words_only_in_final": len(found.shown) - len(found.in_partial),
        "word_end_to_final": told(found.final),
        "endpoint_sent_to_final": told(found.endpoint),
        "flush_to_final": told(found.flush),
        "average_lagging_s": float(np.mean(average)) if average else None,
        "average_lagging": AVERAGE_LAGGING,
    }


def hypotheses(scores: Sequence[Score], streaming: bool = False) -> str:
    """Return one line ``id<TAB>text`` a recording: its finals, or what its partials ended as."""
    return "".join(
        f"{one.clip.id}\t{one.streaming if streaming else one.hypothesis}\n" for one in scores
    )


def _speakers(scores: Sequence[Score]) -> list[Report]:
    """Return each speaker's figures, the worst first."""
    by_speaker: dict[str, list[Score]] = defaultdict(list)
    for one in scores:
        by_speaker[one.clip.speaker].append(one)
    sums = {speaker: _sum(one.words for one in own) for speaker, own in by_speaker.items()}
    return [
        {
            "speaker": speaker,
            "recordings": len(by_speaker[speaker]),
            "words": words.reference,
            "errors": words.edits,
            "wer": _percent(words.rate),
        }
        for speaker, words in sorted(sums.items(), key=lambda one: (-one[1].rate, one[0]))
    ]


def _lone_words(scores: Sequence[Score]) -> Report | None:
    """Return how many clips of one word are not exactly that word."""
    lone = [one for one in scores if one.words.reference == 1]
    if not lone:
        return None
    wrong = sum(one.words.edits > 0 for one in lone)
    return {"clips": len(lone), "wrong": wrong, "error": _percent(wrong / len(lone))}


def _false_words(noise: Sequence[Score]) -> Report | None:
    if not noise:
        return None
    hours = sum(one.audio_s for one in noise) / 3600
    false = sum(one.words.insertions for one in noise)
    return {"hours": hours, "false_words": false, "per_hour": _over(false, hours)}


def _sum(counts: Iterable[Errors]) -> Errors:
    total = Errors()
    for one in counts:
        total = total.plus(one)
    return total


def _changes(counts: Iterable[Changes]) -> Changes:
    total = Changes()
    for one in counts:
        total = total.plus(one)
    return total


def _percent(rate: float) -> float | None:
    return 100 * rate if math.isfinite(rate) else None


def _over(part: float, whole: float) -> float | None:
    return part / whole if whole else None


# --- for a person ----------------------------------------------------------------------------

_WORST = 10  # speakers
# A second pass that begins in a pause is shown while the pause lasts, if it lasts in real time.
_FASTER = "what partials end as when sound comes faster than it is spoken; live: --paced"


def lines(report: Report) -> Iterator[str]:
    """Yield a report's lines."""
    if report["recordings"]:
        low, high = report["wer_95"]
        figure = f"{report['wer']:.2f} % (95 %: {low:.2f} to {high:.2f})"
        yield _line("word error rate", figure, _edits(report))
        yield _line("character error rate", f"{report['cer']:.2f} %")
        ended = "what partials end as" if report["paced"] else _FASTER
        yield _line("streaming pass", f"{report['streaming_wer']:.2f} %", ended)
        yield _line("normalisation", report["normalisation"])
    if report["words_shown"]:
        counts = f"{report['words_changed']} of {report['words_shown']} words after being shown"
        by_place = f"{report['changed_by_place']:.2f} % by place"
        yield _line("changed", f"{report['changed']:.2f} %", counts, by_place)
    if lone := report["lone_words"]:
        yield _line("lone words", f"{lone['error']:.2f} %", f"{lone['wrong']} of {lone['clips']}")
    if noise := report["noise"]:
        counts = f"{noise['false_words']} in {noise['hours']:.2f} h without text"
        yield _line("false words per hour", f"{noise['per_hour']:.2f}", counts)
    yield from _cost_lines(report)
    if "latency" in report:
        yield from _latency_lines(report["latency"])
    if len(report["speakers"]) > 1:
        yield from _speaker_lines(report["speakers"])
    yield from (f"FAULT {fault}" for fault in report["faults"])


def _edits(report: Report) -> str:
    counts = [f"{report[kind]} {kind}" for kind in ("substitutions", "deletions", "insertions")]
    return f"{report['words']} words in {report['recordings']} recordings: {', '.join(counts)}"


def _cost_lines(report: Report) -> Iterator[str]:
    factor, cpu = report["real_time_factor"], report["server_cpu_s_per_audio_s"]
    if factor is not None:
        sound = f"{report['audio_s']:.0f} s of sound in {report['wall_s']:.1f} s"
        how = f"{report['streams']} streams at once{', in real time' if report['paced'] else ''}"
        yield _line("real-time factor", f"{factor:.3f}", f"{sound}, {how}")
        yield _line("server's CPU", f"{cpu:.4f}", "s for each s of sound")


def _latency_lines(found: Report) -> Iterator[str]:
    for key, what in (
        ("word_end_to_first_shown", "word's end to shown"),
        ("word_end_to_partial", "  if by a partial"),
        ("word_end_to_final", "word's end to final"),
        ("endpoint_sent_to_final", "endpoint to final"),
        ("flush_to_final", "flush to final"),
    ):
        if told := found[key]:
            values = [f"p{p} {told[f'p{p}_s']:.3f} s" for p in (50, 90, 99)]
            yield _line(what, ", ".join(values), f"of {told['times']}")
    yield _line("only in the final", str(found["right_words_only_in_final"]), "right words")
    if found["average_lagging_s"] is not None:
        yield _line("average lagging", f"{found['average_lagging_s']:.3f} s")
        yield _line("", found["average_lagging"])
    yield _line("", found["end_times"])


def _speaker_lines(speakers: Sequence[Report]) -> Iterator[str]:
    yield f"\n{'speaker':24} {'WER %':>7} {'errors':>7} {'words':>7} {'recordings':>11}"
    for row in speakers[:_WORST]:
        counts = f"{row['errors']:7} {row['words']:7} {row['recordings']:11}"
        yield f"{row['speaker'][:24]:24} {row['wer']:7.2f} {counts}"
    if len(speakers) > _WORST:
        yield f"and {len(speakers) - _WORST} others, none worse"


def _line(what: str, *told: str) -> str:
    return f"{what:22} {'; '.join(told)}"
