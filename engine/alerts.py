"""When a measure becomes an alert, and when the alert is over.

A pure function of event time: the same measures and requests in the same order give the same
transitions. No clock is read, no file, no socket. Rules come from ``engine/rules.py``; a
transition is the message ``Alert``. ``docs/alerts.md`` draws the states.

What is not heard is not known: a measure that is absent, and time between two readings that are
further apart than the rule's ``valid_s`` or have lost samples between them, neither bring an alert
nearer nor end one.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import msgspec

from engine.messages import Active, ActiveAlerts, Alert, AlertKind, AlertState, Priority
from engine.rules import Condition, Index, Rule, Rules, higher, holds

# Measures of what is missing, which a stream that is heard again shows to be over.
_HEARD = {"gap_s": 0.0, "silence_s": 0.0, "stream_lost": 0.0}
# Measures of the stream itself, not of what its model sees. Where in a chunk they are told among
# the others hangs on how the signal was cut, so the subject's time does not go on with them.
_OF_STREAM = frozenset(
    {
        *_HEARD,
        "drift_ppm",
        "rate_error_share",
        "clock_jump_s",
        "device_lead_off",
        "device_saturated",
        "device_paced",
        "at_limit_share",
        "pacing_pulses_per_minute",
    }
)
_JOINED_S = 3.0  # so long a value may be joined with others in a condition of several measures
_EXACT_S = 1e-6  # differences of times, and their sums, are no more exact than this
_IDLE = ("inactive", "resolved")
_TRUE = ("active", "acknowledged", "resolving")  # the condition is not known to be over
_MAX_LOST_SUBJECTS = 1000  # whose streams are all gone and that still have alerts; then the oldest
_URGENCY: dict[Priority, int] = {"high": 0, "medium": 1, "low": 2}


class Moment(NamedTuple):
    """A place in a stream: a sample's index and time, and the samples that sufficed to tell."""

    sample: int
    seconds: float
    decided_at: int


class Clock(msgspec.Struct):
    """How far a stream of a subject has been heard."""

    at: Moment  # the furthest
    ahead_s: float  # of the subject's time
    quality: float | None = None
    latest: dict[str, tuple[float, float]] = {}  # value and time, of measures that may be joined
    live: bool = True
    anew: bool = False  # opened again: its time axis may have moved


class Watch(msgspec.Struct):
    """A rule of a subject, while it is not inactive."""

    stream: str  # whose measures count
    at: Moment  # of the last reading
    priority: Priority
    limit: float
    value: float = 0.0
    state: AlertState = "inactive"
    hold: Literal["", "paused", "off"] = ""
    until_s: float = 0.0  # subject's time at which the hold ends
    onset: int = 0
    onset_s: float = 0.0
    since_s: float = 0.0  # subject's time at which it became active or acknowledged
    run_s: float = 0.0  # heard so far of the delay that is running
    heard_s: float | None = None  # stream's time of the last reading; None: none to count from
    acknowledged_by: str = ""

    @property
    def shown(self) -> AlertState:
        return self.hold or self.state


class Memory(msgspec.Struct):
    """All that is carried of a subject, as plain data."""

    now_s: float = 0.0  # the subject's time: that of its first stream, and it never goes back
    minute: int = 0
    told: int = 0  # transitions in this minute
    streams: dict[str, Clock] = {}
    watches: dict[str, Watch] = {}
    merged: dict[str, Alert] = {}  # by rule: what was too much for its minute, as one transition


class Subject:
    """The alerts of one subject; what its methods cause is left in ``told``."""

    def __init__(self, name: str, rules: Rules, index: Index, memory: Memory) -> None:
        self.name, self.memory = name, memory
        self._rules, self._most = rules.by_name, rules.transitions_per_minute
        self._index = index
        self.told: list[Alert] = []

    # --- what is heard -----------------------------------------------------------------------

    def hear(self, stream: str, at: Moment, values: Mapping[str, float]) -> None:
        """Take what is known at a moment of a stream; without values only its time goes on."""
        clock = self._advance(stream, at, goes_on=not values or not values.keys() <= _OF_STREAM)
        clock.quality = values.get("quality", clock.quality)
        for measure in self._index.joined:
            if measure in values:
                clock.latest[measure] = values[measure], at.seconds
        watches = self.memory.watches
        if watches:
            self._pass_time()
        places = self._index.raised_by(values)
        places.update(self._index.place[name] for name in watches)
        if not places:
            return
        known = _joined(clock, at.seconds, values)
        for place in sorted(places):
            rule = self._index.rules[place]
            watch = watches.get(rule.name)
            raised = _read(rule.raised, values, known)
            if watch is None:
                if not raised or self._blocked(stream, rule):
                    continue
                watch = watches[rule.name] = self._watch(stream, rule)
            cleared = _read(rule.cleared, values, known)
            if raised is None and cleared is None:
                continue
            if watch.state in _IDLE:
                watch.stream = stream
            if watch.stream != stream or watch.hold == "off":
                continue  # one stream raises an alert, and the same one ends it
            if self._blocked(stream, rule):
                watch.heard_s = None
                continue
            self._judge(rule, watch, at, raised, cleared, known)

    def unheard(self, stream: str) -> None:
        """Note that samples are missing: what comes next does not follow what was before."""
        for watch in self.memory.watches.values():
            if watch.stream == stream:
                watch.heard_s = None

    def _judge(
        self,
        rule: Rule,
        watch: Watch,
        at: Moment,
        raised: bool | None,
        cleared: bool | None,
        values: Mapping[str, float],
    ) -> None:
        """Take one reading of a rule's measures through the states."""
        if raised:
            cleared = False
        heard_s = at.seconds - watch.heard_s if watch.heard_s is not None else 0.0
        if heard_s > rule.valid_s:
            heard_s = 0.0
        awaited = raised if watch.state == "pending" else cleared
        watch.heard_s = None if awaited is None else at.seconds
        term = rule.cleared[0] if cleared or raised is None else rule.raised[0]
        value = values.get(term.measure, watch.value)
        watch.value, watch.limit = value if math.isfinite(value) else watch.value, term.limit
        watch.at = at
        match watch.state:
            case "pending" if raised:
                watch.run_s += heard_s
                if watch.run_s + _EXACT_S >= rule.for_s:
                    self._go(rule, watch, "active")
            case "pending" if raised is False:
                self._go(rule, watch, "inactive")
            case "active" | "acknowledged" if cleared:
                watch.run_s = 0.0
                self._go(rule, watch, "resolving" if rule.clear_for_s else self._over(rule, watch))
            case "acknowledged" if raised and self._due(watch, rule.realert_s):
                watch.acknowledged_by = ""
                self._go(rule, watch, "active", "still true")
            case "resolving" if cleared:
                watch.run_s += heard_s
                if watch.run_s + _EXACT_S >= rule.clear_for_s:
                    self._go(rule, watch, self._over(rule, watch))
            case "resolving" if cleared is False:
                self._go(rule, watch, "acknowledged" if watch.acknowledged_by else "active")
            case "inactive" | "resolved" | "latched" if raised:
                watch.onset, watch.onset_s, watch.run_s = at.sample, at.seconds, 0.0
                watch.priority, watch.acknowledged_by = rule.priority, ""
                # What is latched is still to be seen by somebody: it does not go back to pending.
                delayed = rule.for_s > 0 and watch.state != "latched"
                self._go(rule, watch, "pending" if delayed else "active")

    def _due(self, watch: Watch, after_s: float | None) -> bool:
        """Return whether a state has lasted for so long; never, if that is None."""
        return after_s is not None and self.memory.now_s - watch.since_s >= after_s

    def _over(self, rule: Rule, watch: Watch) -> AlertState:
        """Return where an alert goes whose condition is over."""
        latching = watch.priority == "high" if rule.latching is None else rule.latching
        return "latched" if latching and not watch.acknowledged_by else "resolved"

    def _blocked(self, stream: str, rule: Rule) -> bool:
        """Return whether a technical alert of this stream keeps a rule from being monitored."""
        return any(
            watch.state in _TRUE
            and watch.stream == stream
            and watch.hold != "off"
            and rule.name in self._rules[name].inhibits
            for name, watch in self.memory.watches.items()
        )

    # --- time --------------------------------------------------------------------------------

    def _advance(self, stream: str, at: Moment, goes_on: bool) -> Clock:
        """Return a stream's clock, moved with the subject's if it goes on; neither goes back."""
        memory = self.memory
        clock = memory.streams.get(stream)
        if clock is None:
            if not memory.streams:
                memory.now_s = at.seconds
                memory.minute = int(at.seconds // 60)
            clock = memory.streams[stream] = Clock(at, at.seconds - memory.now_s)
        elif clock.anew:
            clock.at, clock.ahead_s, clock.anew = at, at.seconds - memory.now_s, False
            clock.latest = {}
        elif goes_on and at.seconds >= clock.at.seconds:
            clock.at = at
        elif goes_on and at.decided_at > clock.at.decided_at:
            clock.at = clock.at._replace(decided_at=at.decided_at)  # of a beat, told late
        memory.now_s = max(memory.now_s, clock.at.seconds - clock.ahead_s)
        minute = int(memory.now_s // 60)
        if minute != memory.minute:
            memory.minute, memory.told = minute, 0
            self.tell_merged()
        return clock

    def _pass_time(self) -> None:
        """Do what is due by now: end holds, escalate."""
        memory = self.memory
        for name, watch in list(memory.watches.items()):
            rule = self._rules[name]
            if watch.hold:
                if memory.now_s >= watch.until_s:
                    self._release(rule, watch, "expired")
            elif (
                watch.state == "active"
                and watch.priority != "high"
                and self._due(watch, rule.escalate_s)
            ):
                watch.priority = higher(watch.priority)
                self._go(rule, watch, "active", "escalated")

    # --- what is asked for -------------------------------------------------------------------

    def acknowledge(self, names: Iterable[str], by: str) -> bool:
        """Return whether there was anything to acknowledge, or it had been already."""
        found = False
        for name in names:
            watch = self.memory.watches.get(name)
            if watch is None or watch.state not in (*_TRUE, "latched"):
                continue
            found = True
            if watch.acknowledged_by:
                continue
            watch.acknowledged_by = by
            after: AlertState = "acknowledged"
            if watch.state != "active":
                after = "resolved" if watch.state == "latched" else watch.state
            self._go(self._rules[name], watch, after, "acknowledged", by)
        return found

    def pause(self, names: Iterable[str], seconds: float, by: str, off: bool) -> None:
        """Hold rules back: paused ones are followed in silence, those that are off are not."""
        for name in names:
            rule = self._rules[name]
            watch = self.memory.watches.get(name)
            if watch is None:
                stream = next(reversed(self.memory.streams))
                watch = self.memory.watches[name] = self._watch(stream, rule)
            before = watch.shown
            if off:
                watch.state = "inactive"
            watch.hold = "off" if off else "paused"
            watch.until_s = self.memory.now_s + seconds
            self._tell(rule, watch, before, actor=by)

    def resume(self, names: Iterable[str], by: str) -> bool:
        """End holds; return whether there was one."""
        held = [name for name in names if (w := self.memory.watches.get(name)) and w.hold]
        for name in held:
            self._release(self._rules[name], self.memory.watches[name], "resumed", by)
        return bool(held)

    def _release(self, rule: Rule, watch: Watch, reason: str, by: str = "") -> None:
        """End a hold: the alert is shown as it has become meanwhile."""
        before, watch.hold = watch.shown, ""
        watch.since_s = self.memory.now_s
        self._tell(rule, watch, before, reason, by)
        self._forget_if_idle(rule, watch)

    def end(self, streams: Iterable[str], reason: str) -> None:
        """End the alerts of some streams, which will tell no more."""
        for stream in streams:
            for name, watch in list(self.memory.watches.items()):
                if watch.stream == stream:
                    before, watch.hold, watch.state = watch.shown, "", "inactive"
                    self._tell(self._rules[name], watch, before, reason)
                    del self.memory.watches[name]

    # --- out ---------------------------------------------------------------------------------

    def active(self) -> ActiveAlerts:
        """Return all that is not inactive, the most urgent first."""
        memory = self.memory
        found = [
            Active(
                name,
                watch.shown,
                watch.priority,
                self._rules[name].kind,
                watch.stream,
                watch.value,
                watch.limit,
                watch.onset,
                watch.onset_s,
                watch.acknowledged_by,
                max(0.0, watch.until_s - memory.now_s) if watch.hold else None,
            )
            for name, watch in memory.watches.items()
        ]
        found.sort(key=lambda one: (_URGENCY[one.priority], one.onset_s, one.rule))
        blocked = {rule for name, w in memory.watches.items() for rule in self._blocks(name, w)}
        return ActiveAlerts(self.name, memory.now_s, tuple(found), tuple(sorted(blocked)))

    def tell_merged(self) -> None:
        """Tell in one transition for each rule what was too much for its minute."""
        for merged in self.memory.merged.values():
            self.told.append(msgspec.structs.replace(merged, reason="merged"))
        self.memory.told += len(self.memory.merged)
        self.memory.merged.clear()

    def _watch(self, stream: str, rule: Rule) -> Watch:
        at = self.memory.streams[stream].at
        return Watch(stream, at, rule.priority, rule.raised[0].limit)

    def _blocks(self, name: str, watch: Watch) -> tuple[str, ...]:
        on = watch.state in _TRUE and watch.hold != "off"
        return self._rules[name].inhibits if on else ()

    def _go(
        self, rule: Rule, watch: Watch, state: AlertState, reason: str = "", actor: str = ""
    ) -> None:
        """Take an alert to a state, and tell it unless it is held back."""
        before, watch.state = watch.shown, state
        if state in ("active", "acknowledged"):
            watch.since_s = self.memory.now_s
        if not watch.hold or actor:
            self._tell(rule, watch, before, reason, actor)
        self._forget_if_idle(rule, watch)

    def _forget_if_idle(self, rule: Rule, watch: Watch) -> None:
        if watch.state in _IDLE and not watch.hold:
            del self.memory.watches[rule.name]

    def _tell(
        self, rule: Rule, watch: Watch, before: AlertState, reason: str = "", actor: str = ""
    ) -> None:
        """Tell a transition, or merge it with others if this minute has had too many.

        What raises an alert of high priority, and what the signal alone did not do, is told in
        any case.
        """
        memory = self.memory
        alert = self._alert(rule.name, rule.kind, watch, before, reason, actor)
        merged = memory.merged.pop(rule.name, None)
        if merged is not None:
            count = merged.transitions + 1
            alert = msgspec.structs.replace(alert, from_state=merged.from_state, transitions=count)
        urgent = alert.state == "active" and alert.priority == "high"
        if memory.told < self._most or urgent or actor or reason:
            memory.told += 1
            self.told.append(alert)
        else:
            memory.merged[rule.name] = alert

    def _alert(
        self,
        name: str,
        kind: AlertKind,
        watch: Watch,
        before: AlertState,
        reason: str,
        actor: str = "",
    ) -> Alert:
        clock = self.memory.streams[watch.stream]
        # What the time or somebody did lies where the stream is; the rest where it was read.
        at = clock.at if reason or actor else watch.at
        return Alert(
            watch.stream,
            name,
            watch.shown,
            watch.priority,
            watch.value,
            watch.limit,
            at.sample,
            at.seconds,
            at.decided_at,
            subject=self.name,
            from_state=before,
            kind=kind,
            onset=watch.onset,
            actor=actor,
            reason=reason,
            cannot_monitor=self._blocks(name, watch),
            quality=clock.quality,
        )

    def end_unknown(self) -> None:
        """End the alerts of rules that there are no more."""
        watches, merged = self.memory.watches, self.memory.merged
        for name in [name for name in watches if name not in self._rules]:
            watch = watches.pop(name)
            before, watch.hold, watch.state = watch.shown, "", "inactive"
            alert = self._alert(name, "physiological", watch, before, "rule removed")
            self.told.append(alert)
        self.memory.merged = {name: merged[name] for name in merged if name in self._rules}


def _joined(clock: Clock, now_s: float, values: Mapping[str, float]) -> Mapping[str, float]:
    """Return the values with those of a moment before, for conditions of several measures."""
    fresh = {m: v for m, (v, at_s) in clock.latest.items() if abs(now_s - at_s) <= _JOINED_S}
    return {**fresh, **values}


def _read(
    condition: Condition, values: Mapping[str, float], known: Mapping[str, float]
) -> bool | None:
    """Return whether a condition holds; None if it is not known, or nothing was told of it now."""
    if len(condition) == 1:
        return holds(condition, values)
    if not any(term.measure in values for term in condition):
        return None
    return holds(condition, known)


class Alerts:
    """The alerts of all subjects.

    Every method that may change something returns the transitions that came of it.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules, self._index = rules, Index(rules)
        measures = {measure for rule in rules.by_name.values() for measure in rule.measures}
        # Outputs of models that a rule looks at: "scores.<output>", its largest value.
        self.outputs = {m.removeprefix("scores.") for m in measures if m.startswith("scores.")}
        self._subjects: dict[str, Subject] = {}
        self._lost: dict[str, None] = {}  # subjects without a stream, the longest first

    def update(
        self, subject: str, stream: str, at: Moment, values: Mapping[str, float]
    ) -> list[Alert]:
        """Take what a stream says at a moment; without values only its time goes on."""
        one = self._subjects.get(subject)
        if one is None:
            one = self._subjects[subject] = Subject(subject, self.rules, self._index, Memory())
        if values and one.memory.watches:
            values = _HEARD | dict(values)
        one.hear(stream, at, values)
        return self._told(one)

    def gap(self, subject: str, stream: str) -> None:
        """Take that samples are missing before what comes next."""
        if self.knows(subject, stream):
            self._subjects[subject].unheard(stream)

    def missing(self, subject: str, stream: str, values: Mapping[str, float]) -> list[Alert]:
        """Take what is known of a stream that says nothing, at the moment it said the last."""
        if not self.knows(subject, stream):
            return []
        one = self._subjects[subject]
        clock = one.memory.streams[stream]
        one.hear(stream, clock.at, values)
        return self._told(one)

    def knows(self, subject: str, stream: str) -> bool:
        return subject in self._subjects and stream in self._subjects[subject].memory.streams

    def opened(self, subject: str, stream: str, at: Moment) -> None:
        """Begin with a stream; or go on with one that was lost, whose time axis may have moved."""
        self._lost.pop(subject, None)
        if not self.knows(subject, stream):
            self.update(subject, stream, at, {})
            return
        clock = self._subjects[subject].memory.streams[stream]
        clock.anew = clock.live = True
        self._subjects[subject].unheard(stream)

    def closed(self, subject: str, stream: str) -> list[Alert]:
        """End the alerts of a stream whose monitoring was ended on purpose."""
        if not self.knows(subject, stream):
            return []
        one = self._subjects[subject]
        one.tell_merged()
        one.end([stream], "closed")
        del one.memory.streams[stream]
        return self._told(one) + self._settle(one)

    def lost(self, subject: str, stream: str, tell: bool) -> list[Alert]:
        """Keep the alerts of a stream that is gone without having been closed."""
        if not self.knows(subject, stream):
            return []
        told = self.missing(subject, stream, {"stream_lost": 1.0}) if tell else []
        one = self._subjects[subject]
        one.memory.streams[stream].live = False
        one.unheard(stream)
        return told + self._settle(one)

    def _settle(self, one: Subject) -> list[Alert]:
        """Forget a subject of whom no stream and no alert is left; bound those with alerts."""
        if any(clock.live for clock in one.memory.streams.values()):
            return []
        self._lost[one.name] = None
        if not one.memory.watches:
            self._forget(one)
        if len(self._lost) <= _MAX_LOST_SUBJECTS:
            return []
        oldest = self._subjects[next(iter(self._lost))]
        oldest.end(oldest.memory.streams, "too many lost subjects")
        self._forget(oldest)
        return self._told(oldest)

    def acknowledge(self, subject: str, rule: str, by: str) -> list[Alert] | None:
        """Take that somebody has seen an alert, or all with an empty rule; None: there is none."""
        one = self._subjects.get(subject)
        found = one is not None and one.acknowledge(self._those(rule), by)
        return self._told(one) if one is not None and found else None

    def pause(
        self, subject: str, rule: str, seconds: float, by: str, off: bool = False
    ) -> list[Alert] | None:
        """Hold a rule back for a time, or all with an empty rule; None: no such subject or rule."""
        one, names = self._subjects.get(subject), self._those(rule)
        if one is None or not names:
            return None
        one.pause(names, seconds, by, off)
        return self._told(one)

    def resume(self, subject: str, rule: str, by: str) -> list[Alert] | None:
        """End a pause or an off, or all with an empty rule; None: there is none."""
        one = self._subjects.get(subject)
        found = one is not None and one.resume(self._those(rule), by)
        return self._told(one) if one is not None and found else None

    def active(self, subject: str = "") -> list[ActiveAlerts]:
        """Return what is active of a subject, or of all who have anything."""
        if subject:
            return [self._subjects[subject].active()] if subject in self._subjects else []
        return [one.active() for one in self._subjects.values() if one.memory.watches]

    def memory(self, subject: str) -> Memory | None:
        """Return what is carried of a subject, not a copy; None: nothing is."""
        one = self._subjects.get(subject)
        return None if one is None else one.memory

    def take_out(self, subject: str) -> dict[str, Any] | None:
        """Return all that is carried of a subject as plain data; None: nothing is."""
        one = self._subjects.get(subject)
        return None if one is None else msgspec.to_builtins(one.memory)

    def put_back(self, subject: str, state: object, live: bool) -> list[Alert]:
        """Restore what :meth:`take_out` returned; alerts whose rule is gone end, and it is told.

        Parameters
        ----------
        subject : str
        state : plain data
        live : bool
            Whether its streams go on at once; else they are lost until they are opened again.

        Raises
        ------
        msgspec.ValidationError
            If it is not what `take_out` returned.
        """
        memory = msgspec.convert(state, Memory)
        one = Subject(subject, self.rules, self._index, memory)
        self._subjects[subject] = one
        one.end_unknown()
        told = self._told(one)
        for stream in [] if live else list(one.memory.streams):
            told += self.lost(subject, stream, tell=False)
        return told

    def _those(self, rule: str) -> list[str]:
        known = self.rules.by_name
        return list(known) if not rule else [rule] if rule in known else []

    def _forget(self, one: Subject) -> None:
        del self._subjects[one.name], self._lost[one.name]

    def _told(self, one: Subject) -> list[Alert]:
        told, one.told = one.told, []
        return told
