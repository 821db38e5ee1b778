"""How good beats and alerts are, through a real server and over its sockets.

Annotated records are sent as fast as credit allows (:mod:`engine.ward`), and what the server tells
is compared with their annotations; what the figures mean stands in :mod:`engine.ec57`. Nothing
is learnt from a record before it is sent, and nothing is left out unless a figure says so.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from engine import annotated, ec57, keys, messages, model_file
from engine.annotated import Record
from engine.child import running
from engine.client import Client
from engine.ec57 import LABELS, Alarms, Beats, Reference, Samples, Stretches, Table, Transition
from engine.errors import MurmurError
from engine.progress import Bar
from engine.ward import Patient, Plan, Signal, watch

Report = dict[str, Any]
Rows = list[Report]  # one a line of a file

PACED = frozenset({"102", "104", "107", "217"})  # of MIT-BIH; EC57 scores no beat classes there
_HEARD_S = 1.0  # around an annotated beat must have been sent, for it to be of the heard part
# Where beats are counted: from which second, and whether without ventricular fibrillation.
_PARTS = {
    "full": (0.0, False),
    "full_without_vf": (0.0, True),
    "from_5min": (ec57.LEARNING_S, False),
    "bxb": (ec57.LEARNING_S, True),
}
_WINDOWS = {"150ms": ec57.MATCH_S, "50ms": ec57.STRICT_S}


class Told(NamedTuple):
    """What a server told of a record."""

    beats: Beats
    decided_at: Samples  # (beats,)
    heart_rates: NDArray[np.float64]  # (beats,) bpm; not a number where none was told
    alerts: list[messages.Alert]
    seconds: float
    missing: list[tuple[int, int]]  # stretches that were not sent


class Score(NamedTuple):
    """One annotated record's counts."""

    name: str
    hours: float
    tables: dict[tuple[str, str], Table]  # by part and window
    heard: dict[str, Table]  # by part; of the heard part
    errors_s: NDArray[np.float64]  # found less annotated, of each pair
    delays_s: NDArray[np.float64]  # from the annotated beat to its decision, of each pair
    rate_errors_bpm: NDArray[np.float64]
    told_rate_errors_bpm: NDArray[np.float64]
    alarms: dict[str, Alarms]
    alarms_without_vf: dict[str, Alarms]
    other_alerts: Counter[str]  # rules that no annotation speaks of
    resolved_unheard: int
    missing_s: float


class Evaluation(NamedTuple):
    """What came of all records, in the order of their names."""

    report: Report
    beats: Rows
    alerts: Rows


# --- one record ------------------------------------------------------------------------------


def told(patient: Patient) -> Told:
    """Put together what was told of a record; beats behind its end are left away."""
    beats = [
        one
        for one in patient.told
        if isinstance(one, messages.Beat) and 0 <= one.index < patient.length
    ]
    beats.sort(key=lambda one: one.index)
    rates = [one.heart_rate_bpm for one in beats]
    return Told(
        Beats(
            np.array([one.index for one in beats], np.int64),
            np.array([LABELS.index(one.label) for one in beats], np.int64),
        ),
        np.array([one.decided_at for one in beats], np.int64),
        np.array([np.nan if rate is None else rate for rate in rates], np.float64),
        [one for one in patient.told if isinstance(one, messages.Alert)],
        patient.seconds,
        patient.missing,
    )


def score(name: str, reference: Reference, found: Told) -> Score:
    """Compare what was told of a record with what is annotated there."""
    rate_hz, annotations, flutter = reference.rate_hz, reference.beats, reference.flutter
    partner = ec57.match(annotations.samples, found.beats.samples, round(ec57.MATCH_S * rate_hz))
    pair = partner >= 0
    at, of = annotations.samples[pair], partner[pair]
    unheard = ec57.widened(found.missing, round(_HEARD_S * rate_hz))
    changes = [Transition(one.rule, one.state, one.index, one.decided_at) for one in found.alerts]
    return Score(
        name,
        reference.length / rate_hz / 3600,
        {
            (part, window): _table(reference, found.beats, part, width_s)
            for part in _PARTS
            for window, width_s in _WINDOWS.items()
        },
        {
            part: _table(reference, found.beats, part, ec57.MATCH_S, unheard)
            for part in ("full", "bxb")
        },
        (found.beats.samples[of] - at) / rate_hz,
        (found.decided_at[of] - at) / rate_hz,
        ec57.rate_errors(annotations.samples, found.beats.samples, rate_hz, flutter),
        ec57.told_rate_errors(annotations.samples, partner, found.heart_rates, rate_hz),
        {rule: ec57.alarms(rule, reference, changes) for rule in ec57.DEFINITIONS},
        {rule: ec57.alarms(rule, reference, changes, flutter) for rule in ec57.DEFINITIONS},
        Counter(
            one.rule
            for one in changes
            if one.state == "active" and one.rule not in ec57.DEFINITIONS
        ),
        ec57.resolved_unheard(changes, found.missing),
        sum(end - start for start, end in found.missing) / rate_hz,
    )


def _table(
    reference: Reference, found: Beats, part: str, width_s: float, unheard: Stretches = ()
) -> Table:
    begin_s, without_vf = _PARTS[part]
    left_out = [*unheard, *(reference.flutter if without_vf else ())]
    window = round(width_s * reference.rate_hz)
    begin = round(begin_s * reference.rate_hz)
    return ec57.compare(reference.beats, found, window, begin, left_out)


def beat_rows(name: str, found: Told) -> Rows:
    """Return the lines of ``--beats``."""
    columns = (found.beats.samples, found.beats.labels, found.decided_at)
    return [
        {"record": name, "sample": sample, "class": LABELS[label], "decided_at_sample": decided}
        for sample, label, decided in zip(*(one.tolist() for one in columns), strict=True)
    ]


def alert_rows(name: str, found: Told) -> Rows:
    """Return the lines of ``--alerts``: each transition of a record's alerts."""
    return [
        {
            "record": name,
            "rule": one.rule,
            "state": one.state,
            "priority": one.priority,
            "sample": one.index,
            "decided_at_sample": one.decided_at,
            "value": one.value,
        }
        for one in found.alerts
    ]


# --- all of them -----------------------------------------------------------------------------


def evaluate(
    folder: Path,
    plan: Plan,
    console: Console,
    chosen: list[str] | None = None,
    address: str | None = None,
    timeout_s: float = 30.0,
) -> Evaluation:
    """Send annotated records to a server and compare what it tells with their annotations.

    Parameters
    ----------
    folder : Path
        Of WFDB records; of those without ``.atr`` beats and alerts are told, and no scores.
    plan : Plan
        Its model's file, or bundled name, says how many leads of a record are sent.
    console : Console
        For progress: not standard output.
    chosen : list of str, optional
        Names of records; default: all.
    address : str, optional
        Of a running server; default: one is started.
    timeout_s : float
        How long the server may say nothing.

    Raises
    ------
    MurmurError
        If there are no records, no such model or no server.
    """
    plan.check()
    names = annotated.names(folder, chosen)
    leads = model_file.load(plan.model).spec.input.channels
    records: dict[str, Record] = {}  # under way, without their samples
    faults: list[str] = []

    def signals() -> Iterator[Signal]:
        for name in names:
            try:
                record = annotated.read(folder, name, leads)
            except MurmurError as error:
                faults.append(str(error))
                continue
            records[name] = record._replace(samples=record.samples[:0])
            yield Signal(name, record.samples, record.rate_hz, record.unit)

    scores: dict[str, Score] = {}
    beats: dict[str, Rows] = {}
    alerts: dict[str, Rows] = {}
    signal_s = 0.0
    bar = Bar(console, sum(annotated.length_s(folder, name) for name in names), "evaluating")
    limits = {"credit_s": max(2.0, 4 * plan.chunk_s)}  # a chunk is at most a quarter of it
    with (
        running(plan.model, address, **limits) as (found_at, server),
        Client(found_at, timeout_s, keys.ours(address)) as client,
        bar,
    ):
        before, began = server and server.counts(), time.monotonic()
        for patient in watch(client, signals(), plan, bar.move):
            found, reference = told(patient), records[patient.name].reference
            beats[patient.name] = beat_rows(patient.name, found)
            alerts[patient.name] = alert_rows(patient.name, found)
            if reference is not None:
                scores[patient.name] = score(patient.name, reference, found)
            faults += [patient.fault] if patient.fault else []
            signal_s += patient.seconds
            bar.over(patient.seconds)
        wall_s = time.monotonic() - began
        cpu_s = server.counts().since(before).cpu_seconds if server and before else None
    ordered = [scores[name] for name in names if name in scores]
    report = {
        **summary(ordered, plan),
        "model": plan.model,
        "leads": {name: list(record.leads) for name, record in records.items()},
        "beats_told": sum(map(len, beats.values())),
        "alerts_told": sum(map(len, alerts.values())),
        "signal_s": signal_s,
        "wall_s": wall_s,
        "server_cpu_s": cpu_s,
        "faults": faults,
    }
    return Evaluation(
        report,
        [row for name in names for row in beats.get(name, [])],
        [row for name in names for row in alerts.get(name, [])],
    )


def summary(scores: Sequence[Score], plan: Plan) -> Report:
    """Return the figures of all records together and of each; none if none is annotated."""
    if not scores:
        return {"figure": None, "what": "no record has annotations", "records": 0}
    unpaced = [one for one in scores if one.name not in PACED]
    full = ec57.gross(one.tables["full", "150ms"] for one in scores)
    bxb = ec57.gross(one.tables["bxb", "150ms"] for one in scores)
    classes = ec57.gross(one.tables["full", "150ms"] for one in unpaced)
    whole, without_vf = _alarms(scores), _alarms(scores, without_vf=True)
    return {
        "figure": _percent(full.f1),
        "what": "F1 of beats within 150 ms, whole records, nothing left out, %",
        "qrs_f1_full": _percent(full.f1),
        "qrs_f1_bxb": _percent(bxb.f1),
        "veb_f1": _percent(classes.of("V").f1),
        "sveb_f1": _percent(classes.of("S").f1),
        "false_per_hour": whole["rate_rules"]["false_per_hour"],
        "records": len(scores),
        "hours": sum(one.hours for one in scores),
        "qrs": {
            part: {window: _qrs(scores, part, window) for window in _WINDOWS} for part in _PARTS
        },
        "timing_ms": _timing(np.concatenate([one.errors_s for one in scores])),
        "decision_ms": _delay(np.concatenate([one.delays_s for one in scores])),
        "heart_rate": _heart_rate(scores),
        "classes": {
            part: {
                "all": _classes([one.tables[part, "150ms"] for one in scores]),
                "unpaced": _classes([one.tables[part, "150ms"] for one in unpaced]),
            }
            for part in ("full", "bxb")
        },
        "alerts": whole,
        "alerts_without_vf": without_vf,
        "other_alerts": dict(sum((one.other_alerts for one in scores), Counter[str]())),
        "loss": _loss(scores, plan),
        "per_record": [_row(one) for one in scores],
    }


def _qrs(scores: Sequence[Score], part: str, window: str) -> Report:
    tables = [one.tables[part, window] for one in scores]
    total = ec57.gross(tables)
    return {
        "sensitivity": _percent(total.sensitivity),
        "predictivity": _percent(total.predictivity),
        "f1": _percent(total.f1),
        "annotated": total.hits + total.missed,
        "missed": total.missed,
        "false": total.false,
        "average_sensitivity": _mean(one.sensitivity for one in tables),
        "average_predictivity": _mean(one.predictivity for one in tables),
        "average_f1": _mean(one.f1 for one in tables),
    }


def _classes(tables: Sequence[Table]) -> Report:
    """Return the table of classes, and the figures of S and V.

    They are gross, and the mean of the records that have annotated beats of the class.
    """
    total = ec57.gross(tables)
    report: Report = {"labels": [*LABELS, "none"], "table": total.counts.tolist()}
    for label in "SV":
        one = total.of(label)
        row = LABELS.index(label)
        each = [table.of(label) for table in tables if table.counts[row].any()]
        report[label] = {
            "sensitivity": _percent(one.sensitivity),
            "predictivity": _percent(one.predictivity),
            "false_positive_rate": _percent(one.false_positive_rate),
            "f1": _percent(one.f1),
            "f1_strict": _percent(one.f1_strict),
            "average_sensitivity": _mean(figures.sensitivity for figures in each),
            "average_predictivity": _mean(figures.predictivity for figures in each),
            "average_f1": _mean(figures.f1 for figures in each),
        }
    return report


def _timing(errors_s: NDArray[np.float64]) -> Report:
    errors_ms = 1000 * errors_s
    return {
        "median": _of(np.median, errors_ms),
        "median_absolute": _of(np.median, np.abs(errors_ms)),
        "rms": _of(_rms, errors_ms),
        "pairs": len(errors_ms),
    }


def _delay(delays_s: NDArray[np.float64]) -> Report:
    delays_ms = 1000 * delays_s
    return {
        "median": _of(np.median, delays_ms),
        "p99": _of(lambda values: np.percentile(values, 99), delays_ms),
        "max": _of(np.max, delays_ms),
    }


def _heart_rate(scores: Sequence[Score]) -> Report:
    """Return the errors of beats per window, and of what was told with each beat."""
    windows = np.concatenate([one.rate_errors_bpm for one in scores])
    with_beats = np.concatenate([one.told_rate_errors_bpm for one in scores])
    return {
        "rms_bpm": _of(_rms, windows),
        "windows": len(windows),
        "told_rms_bpm": _of(_rms, with_beats),
        "told": len(with_beats),
    }


def _alarms(scores: Sequence[Score], without_vf: bool = False) -> Report:
    """Return the figures of each rule, and of asystole, bradycardia and tachycardia together."""
    hours = sum(one.hours for one in scores)
    totals = {rule: Alarms() for rule in ec57.DEFINITIONS}
    for one in scores:
        for rule, alarms in (one.alarms_without_vf if without_vf else one.alarms).items():
            totals[rule] = totals[rule].plus(alarms)
    together = Alarms()
    for rule in ec57.RATE_RULES:
        together = together.plus(totals[rule])
    return {
        "rate_rules": _rule(together, hours),
        **{
            rule: {"is": ec57.DEFINITIONS[rule].says, **_rule(alarms, hours)}
            for rule, alarms in totals.items()
        },
    }


def _rule(alarms: Alarms, hours: float) -> Report:
    return {
        "episodes": alarms.episodes,
        "found": alarms.found,
        "still_active": alarms.still_active,
        "sensitivity": _percent(alarms.sensitivity),
        "alerts": alarms.alerts,
        "false": alarms.false,
        "false_per_hour": alarms.false / hours if hours else None,
        "resolved_early": alarms.resolved_early,
        "latency_s": _latency(alarms.latencies_s),
        "delay_s": _latency(alarms.delays_s),
    }


def _latency(times_s: Sequence[float]) -> Report | None:
    if not times_s:
        return None
    median, p95, longest = np.percentile(times_s, [50, 95, 100]).tolist()
    return {"median": median, "p95": p95, "max": longest}


def _loss(scores: Sequence[Score], plan: Plan) -> Report | None:
    """Return what lost samples did; None if all was sent."""
    missing_s = sum(one.missing_s for one in scores)
    if not missing_s:
        return None
    heard = {part: ec57.gross(one.heard[part] for one in scores) for part in ("full", "bxb")}
    return {
        "asked_for": plan.lose,
        "burst_s": plan.burst_s,
        "missing_s": missing_s,
        "share": missing_s / 3600 / sum(one.hours for one in scores),
        "heard_beats": heard["full"].hits + heard["full"].missed,
        "heard_f1_full": _percent(heard["full"].f1),
        "heard_f1_bxb": _percent(heard["bxb"].f1),
        "resolved_unheard": sum(one.resolved_unheard for one in scores),
    }


def _row(one: Score) -> Report:
    """Return a record's line of the table."""
    full, bxb = one.tables["full", "150ms"], one.tables["bxb", "150ms"]
    strict = one.tables["full", "50ms"]
    veb, sveb = full.of("V"), full.of("S")
    rate_rules = [one.alarms[rule] for rule in ec57.RATE_RULES]
    return {
        "record": one.name,
        "annotated": full.hits + full.missed,
        "missed": full.missed,
        "false": full.false,
        "sensitivity": _percent(full.sensitivity),
        "predictivity": _percent(full.predictivity),
        "f1_full": _percent(full.f1),
        "f1_bxb": _percent(bxb.f1),
        "f1_50ms": _percent(strict.f1),
        **{
            f"{label}_{key}": _percent(value)
            for label, figures in (("veb", veb), ("sveb", sveb))
            for key, value in (
                ("sensitivity", figures.sensitivity),
                ("predictivity", figures.predictivity),
                ("f1", figures.f1),
            )
        },
        "table": full.counts.tolist(),
        "timing_ms": _timing(one.errors_s),
        "decision_ms": _delay(one.delays_s),
        "heart_rate_rms_bpm": _of(_rms, one.rate_errors_bpm),
        "episodes": sum(alarms.episodes for alarms in rate_rules),
        "episodes_found": sum(alarms.found + alarms.still_active for alarms in rate_rules),
        "false_alerts": sum(alarms.false for alarms in rate_rules),
        "alerts": {
            rule: {
                "episodes": alarms.episodes,
                "found": alarms.found,
                "still_active": alarms.still_active,
                "alerts": alarms.alerts,
                "false": alarms.false,
            }
            for rule, alarms in one.alarms.items()
            if alarms.episodes or alarms.alerts
        },
        "missing_s": one.missing_s,
        "heard_f1_full": _percent(one.heard["full"].f1),
    }


def _rms(values: NDArray[np.float64]) -> np.float64:
    return np.float64(np.sqrt(np.mean(np.square(values))))


def _of(figure: Callable[[NDArray[np.float64]], Any], values: NDArray[np.float64]) -> float | None:
    return float(figure(values)) if len(values) else None


def _percent(share: float) -> float | None:
    return 100 * share if np.isfinite(share) else None


def _mean(shares: Iterator[float]) -> float | None:
    """Return the mean in percent of those records that have a figure."""
    values = [share for share in shares if np.isfinite(share)]
    return 100 * sum(values) / len(values) if values else None


def write(rows: Rows, file: Path) -> None:
    """Write one JSON object a line."""
    file.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))


# --- for a person ----------------------------------------------------------------------------


def lines(report: Report) -> Iterator[str]:
    """Yield a report's lines."""
    if report["records"]:
        yield from _record_lines(report["per_record"])
        yield from _qrs_lines(report)
        yield from _class_lines(report["classes"])
        yield from _alert_lines(report)
    else:
        yield _line(report["what"], f"{report['beats_told']} beats", "no scores")
    if report.get("loss"):
        yield from _loss_lines(report["loss"])
    speed = report["signal_s"] / max(1e-9, report["wall_s"])
    signal = f"{report['signal_s'] / 3600:.2f} h of signal in {report['wall_s']:.1f} s"
    yield _line("\nspeed", f"{speed:.0f} x real time", signal)
    yield from (f"FAULT {fault}" for fault in report["faults"])


def _record_lines(rows: Rows) -> Iterator[str]:
    columns = {
        "beats": "annotated", "missed": "missed", "false": "false", "Se": "sensitivity",
        "+P": "predictivity", "F1": "f1_full", "bxb": "f1_bxb", "50 ms": "f1_50ms",
        "V Se": "veb_sensitivity", "V +P": "veb_predictivity", "V F1": "veb_f1",
        "S Se": "sveb_sensitivity", "S +P": "sveb_predictivity", "S F1": "sveb_f1",
    }  # fmt: skip
    yield f"{'record':>8} " + " ".join(f"{name:>6}" for name in columns) + "  alerts found false"
    for row in rows:
        alerts = f"{row['episodes']:8d} {row['episodes_found']:5d} {row['false_alerts']:5d}"
        yield (
            f"{row['record'][-8:]:>8} "
            + " ".join(_cell(row[key]) for key in columns.values())
            + alerts
        )
    yield f"{'':8} alerts: episodes of {', '.join(ec57.RATE_RULES)}"


def _qrs_lines(report: Report) -> Iterator[str]:
    yield f"\n{'QRS':20} {'Se':>7} {'+P':>7} {'F1':>7} {'missed':>7} {'false':>6}   average F1"
    for part, windows in report["qrs"].items():
        for window, one in windows.items():
            figures = [one[key] for key in ("sensitivity", "predictivity", "f1")]
            counts = f"{one['missed']:7d} {one['false']:6d}"
            shown = " ".join(_cell(figure, 7) for figure in figures)
            yield f"{part + ' ' + window:20} {shown} {counts} {_cell(one['average_f1'], 12)}"
    timing, decision, rate = report["timing_ms"], report["decision_ms"], report["heart_rate"]
    if timing["pairs"]:
        yield _line(
            "timing error",
            f"median {timing['median']:.1f} ms",
            f"median absolute {timing['median_absolute']:.1f} ms",
            f"RMS {timing['rms']:.1f} ms",
        )
        yield _line(
            "decision after R",
            *(f"{key} {decision[key]:.0f} ms" for key in ("median", "p99", "max")),
        )
    if rate["rms_bpm"] is not None:
        yield _line("heart rate, 10 s", f"RMS error {rate['rms_bpm']:.2f} bpm")
    if rate["told_rms_bpm"] is not None:
        yield _line("heart rate as told", f"RMS error {rate['told_rms_bpm']:.2f} bpm")


def _class_lines(classes: Report) -> Iterator[str]:
    full = classes["full"]["all"]
    yield f"\n{'annotated x found':20} " + " ".join(f"{label:>7}" for label in full["labels"])
    for label, row in zip(full["labels"], full["table"], strict=True):
        yield f"{label:>20} " + " ".join(f"{count:7d}" for count in row)
    yield f"\n{'class':24} {'Se':>7} {'+P':>7} {'FPR':>7} {'F1':>7} {'strict':>7}   average F1"
    keys = ("sensitivity", "predictivity", "false_positive_rate", "f1", "f1_strict")
    for part, kinds in classes.items():
        for kind, one in kinds.items():
            for label in "VS":
                shown = " ".join(_cell(one[label][key], 7) for key in keys)
                average = _cell(one[label]["average_f1"], 12)
                yield f"{label + ' ' + part + ' ' + kind:24} {shown} {average}"


def _alert_lines(report: Report) -> Iterator[str]:
    for key, title in (("alerts", "alerts"), ("alerts_without_vf", "alerts, VF left out")):
        head = f"{'episodes':>8} {'found':>6} {'on':>4} {'alerts':>7} {'false':>6} {'per h':>7}"
        yield f"\n{title:36} {head}   latency s: median p95 max; after the rule is met"
        for rule, one in report[key].items():
            if not one["episodes"] and not one["alerts"]:
                continue
            counts = f"{one['episodes']:8d} {one['found']:6d} {one['still_active']:4d}"
            false = f"{one['alerts']:7d} {one['false']:6d} {one['false_per_hour']:7.2f}"
            yield f"{rule:36} {counts} {false}   {_times(one)}"
    others = report["other_alerts"]
    if others:
        yield _line("other alerts", *(f"{rule} {count}" for rule, count in others.items()))


def _times(one: Report) -> str:
    if one["latency_s"] is None:
        return ""
    return "; ".join(
        " ".join(f"{one[key][which]:.2f}" for which in ("median", "p95", "max"))
        for key in ("latency_s", "delay_s")
    )


def _loss_lines(loss: Report) -> Iterator[str]:
    yield _line("\nlost", f"{100 * loss['share']:.2f} %", f"{loss['missing_s']:.0f} s")
    figures = (f"F1 {_cell(loss[key]).strip()} %" for key in ("heard_f1_full", "heard_f1_bxb"))
    yield _line("heard part", f"{loss['heard_beats']} beats", *figures)
    yield _line("resolved unheard", f"{loss['resolved_unheard']} alerts")


def _cell(figure: float | None, width: int = 6) -> str:
    if figure is None:
        return f"{'-':>{width}}"
    return f"{figure:{width}d}" if isinstance(figure, int) else f"{figure:{width}.2f}"


def _line(what: str, *parts: str) -> str:
    return f"{what:22} {'; '.join(parts)}"
