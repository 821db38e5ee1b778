"""The alert machine, transition by transition; and against what must hold whatever happens."""

import json
import math
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from engine import alerts as machine
from engine import rules
from engine.alerts import Alerts, Moment
from engine.errors import ConfigError
from engine.messages import Alert

RATE_HZ = 100


def made(*entries: str, per_minute: int = 1000) -> Alerts:
    """Return alerts of some rules; each entry is a rule's keys in TOML, with defaults for some."""
    text = f"transitions_per_minute = {per_minute}\n"
    for entry in entries:
        text += "[[rule]]\n" + entry.replace("; ", "\n") + "\n"
        for key, value in {"name": "r", "raise": "x >= 10", "clear": "x < 5"}.items():
            text += "" if f"{key} =" in entry else f'{key} = "{value}"\n'
        text += "" if "priority =" in entry else 'priority = "medium"\n'
    return Alerts(rules.parse(text))


def moment(seconds: float) -> Moment:
    index = round(seconds * RATE_HZ)
    return Moment(index, seconds, index + 30)


class Bed:
    """One subject with one stream, told of a measure once a second."""

    def __init__(self, alerts: Alerts, subject: str = "p-1", stream: str = "s") -> None:
        self.alerts, self.subject, self.stream = alerts, subject, stream
        self.second = 0
        self.told: list[Alert] = []
        alerts.opened(subject, stream, moment(0))

    def tell(self, values: Mapping[str, float]) -> list[tuple[str, str]]:
        """Tell the measures of the next second, return (from, to) of what came of it."""
        self.second += 1
        return self.take(self.alerts.update(self.subject, self.stream, moment(self.second), values))

    def x(self, *values: float | None) -> list[tuple[str, str]]:
        """Tell x second by second; None: it is not known."""
        return [
            change for x in values for change in self.tell({} if x is None else {"x": float(x)})
        ]

    def take(self, told: Iterable[Alert] | None) -> list[tuple[str, str]]:
        assert told is not None
        told = list(told)
        self.told += told
        return [(alert.from_state, alert.state) for alert in told]

    def ack(self, rule: str = "r", by: str = "nurse") -> list[tuple[str, str]]:
        return self.take(self.alerts.acknowledge(self.subject, rule, by))

    def states(self) -> dict[str, str]:
        found = self.alerts.active(self.subject)
        return {one.rule: one.state for one in found[0].alerts} if found else {}


RAISED, OVER = [("inactive", "active")], [("active", "resolved")]


def test_an_alert_is_raised_once_and_not_cleared_at_its_own_limit() -> None:
    bed = Bed(made(""))
    assert bed.x(9.9) == []
    assert bed.x(10) == RAISED
    assert bed.x(11, 9, 5, 12) == []
    assert bed.x(4.9) == OVER
    assert bed.x(9) == []
    assert bed.x(10) == RAISED


def test_a_transition_says_what_when_and_why() -> None:
    bed = Bed(made('name = "fast"; priority = "low"; for_s = 2'))
    bed.tell({"x": 10.0, "quality": 1.0})
    bed.x(11, 12)
    pending, active = bed.told
    assert (pending.from_state, pending.state) == ("inactive", "pending")
    assert active == Alert(
        "s", "fast", "active", "low", 12.0, 10.0, 300, 3.0, 330,
        subject="p-1", from_state="pending", onset=100, quality=1.0,
    )  # fmt: skip


def test_a_condition_must_last_for_its_delay() -> None:
    bed = Bed(made("for_s = 3"))
    assert bed.x(10, 10, 10) == [("inactive", "pending")]
    assert bed.x(9.9) == [("pending", "inactive")]
    assert bed.x(10, 10, 10, 10) == [("inactive", "pending"), ("pending", "active")]


def test_the_end_of_a_condition_must_last_for_its_delay() -> None:
    bed = Bed(made("clear_for_s = 3"))
    bed.x(10)
    assert bed.x(4, 4, 4) == [("active", "resolving")]
    assert bed.x(5) == [("resolving", "active")]  # neither raised nor clear
    assert bed.x(4, 4, 4, 4) == [("active", "resolving"), ("resolving", "resolved")]


def test_time_in_which_the_measure_was_not_heard_counts_for_nothing() -> None:
    bed = Bed(made("for_s = 3; clear_for_s = 3"))
    bed.x(10, 10)
    assert bed.x(None, None, None, None, None, None) == []
    assert bed.x(10, 10) == []  # one second before, one after
    assert bed.x(10) == [("pending", "active")]
    assert bed.x(4, 4) == [("active", "resolving")]
    assert bed.x(None, None, None, None, None, None) == []
    assert bed.x(4, 4) == []
    assert bed.x(4) == [("resolving", "resolved")]


def test_time_over_a_gap_counts_for_nothing_however_short_it_is() -> None:
    bed = Bed(made("for_s = 1"))
    bed.x(10)
    bed.alerts.gap("p-1", "s")
    assert bed.x(10) == []
    assert bed.x(10) == [("pending", "active")]


@given(st.lists(st.sampled_from([None, "gap", "other", "nan", "silence"]), max_size=80))
def test_missing_data_never_resolves_an_alert(seconds: list[str | None]) -> None:
    bed = Bed(made("clear_for_s = 1", 'name = "q"; raise = "x <= 20"; clear = "x > 30"'))
    bed.x(10)
    bed.x(4)  # r is resolving, q is active
    del bed.told[:]
    for what in seconds:
        if what == "gap":
            bed.alerts.gap("p-1", "s")
            bed.second += 7
        elif what == "silence":
            bed.take(bed.alerts.missing("p-1", "s", {"silence_s": 99.0}))
        else:
            values = {"other": {"y": 0.0}, "nan": {"x": float("nan")}}
            bed.tell(values.get(what or "", {}))
    assert bed.told == []
    assert bed.states() == {"r": "resolving", "q": "active"}


def test_a_high_alert_stays_until_somebody_has_seen_it() -> None:
    bed = Bed(made('priority = "high"'))
    assert bed.x(10, 4) == [*RAISED, ("active", "latched")]
    assert bed.ack() == [("latched", "resolved")]
    assert bed.told[-1].actor == "nurse"
    assert bed.x(10) == RAISED
    assert bed.ack() == [("active", "acknowledged")]
    assert bed.x(4) == [("acknowledged", "resolved")]
    assert bed.x(10, 4, 4, 10) == [*RAISED, ("active", "latched"), ("latched", "active")]
    assert bed.told[-1].onset == 100 * bed.second  # an episode of its own


def test_what_is_latched_needs_no_delay_to_be_active_again() -> None:
    bed = Bed(made('priority = "high"; for_s = 2'))
    bed.x(10, 10, 10, 4)
    assert bed.x(10) == [("latched", "active")]


def test_latching_is_what_the_rule_says() -> None:
    assert Bed(made('priority = "high"; latching = false')).x(10, 4) == [*RAISED, *OVER]
    assert Bed(made('priority = "low"; latching = true')).x(10, 4)[1] == ("active", "latched")


def test_an_acknowledgement_while_it_resolves_is_kept() -> None:
    bed = Bed(made('priority = "high"; clear_for_s = 2'))
    bed.x(10, 4)
    assert bed.ack() == [("resolving", "resolving")]
    assert bed.x(6) == [("resolving", "acknowledged")]
    assert bed.x(4, 4, 4) == [("acknowledged", "resolving"), ("resolving", "resolved")]


def test_what_was_acknowledged_may_be_once_more_and_what_is_not_there_may_not() -> None:
    bed = Bed(made(""))
    assert bed.alerts.acknowledge("p-1", "r", "nurse") is None
    assert bed.alerts.acknowledge("p-2", "", "nurse") is None
    bed.x(10)
    assert bed.ack(by="one") == [("active", "acknowledged")]
    assert bed.ack(by="two") == []
    (active,) = bed.alerts.active()
    assert [one.acknowledged_by for one in active.alerts] == ["one"]


def test_an_alert_that_nobody_acknowledges_is_escalated() -> None:
    bed = Bed(made('priority = "low"; escalate_s = 5'))
    bed.x(10)
    assert bed.x(*[10] * 4) == []
    assert bed.x(10) == [("active", "active")]
    assert (bed.told[-1].priority, bed.told[-1].reason) == ("medium", "escalated")
    bed.x(*[None] * 5)  # time goes on, whatever is heard
    assert bed.told[-1].priority == "high"
    bed.x(*[10] * 20)
    assert len(bed.told) == 3
    other = Bed(made("escalate_s = 5"))
    other.x(10)
    other.ack()
    assert other.x(*[10] * 20) == []


def test_what_was_acknowledged_and_is_still_true_comes_again() -> None:
    bed = Bed(made("realert_s = 5"))
    bed.x(10)
    bed.ack()
    assert bed.x(*[None] * 7) == []  # it is not known to be true
    assert bed.x(7) == []
    assert bed.x(10) == [("acknowledged", "active")]
    assert bed.told[-1].reason == "still true"


def test_a_second_condition_must_hold_as_well() -> None:
    bed = Bed(made('raise = "x >= 5 and y > 100"; clear = "x < 1"'))
    assert bed.tell({"x": 7.0, "y": 100.0}) == []
    assert bed.tell({"x": 7.0}) == []  # y is not known
    assert bed.tell({"x": 7.0, "y": 101.0}) == RAISED
    assert bed.tell({"x": 7.0, "y": 90.0}) == []
    assert bed.tell({"x": 0.0}) == OVER


def test_conditions_join_what_was_told_a_moment_ago_but_not_what_is_old() -> None:
    entry = 'raise = "x >= 5 and y > 100"; clear = "x < 1"'
    bed = Bed(made(entry))
    bed.tell({"y": 101.0})
    bed.tell({"z": 1.0})
    assert bed.tell({"x": 7.0}) == RAISED
    bed = Bed(made(entry))
    bed.tell({"y": 101.0})
    bed.second += 5
    assert bed.tell({"x": 7.0}) == []


def test_time_in_which_a_part_of_the_condition_was_not_known_counts_for_nothing() -> None:
    bed = Bed(made('raise = "x >= 5 and y > 100"; clear = "x < 1"; for_s = 2; valid_s = 60'))
    assert bed.tell({"x": 7.0, "y": 101.0}) == [("inactive", "pending")]
    bed.second += 5
    assert bed.tell({"x": 7.0}) == []
    assert bed.tell({"x": 7.0, "y": 101.0}) == []
    assert bed.tell({"x": 7.0, "y": 101.0}) == []
    assert bed.tell({"x": 7.0, "y": 101.0}) == [("pending", "active")]


def test_what_is_still_raised_is_not_over_whatever_else_says_so() -> None:
    bed = Bed(made('clear = "y < 5"'))
    assert bed.tell({"x": 10.0, "y": 0.0}) == RAISED
    assert bed.tell({"x": 10.0, "y": 0.0}) == []
    assert bed.tell({"y": 0.0}) == OVER


def test_a_rule_may_look_downwards() -> None:
    bed = Bed(made('raise = "x < 90"; clear = "x >= 92"'))
    assert bed.x(90, 89.9, 91.9, 92) == [*RAISED, *OVER]


TECHNICAL = 'name = "lead_off"; kind = "technical"; raise = "off >= 1"; clear = "off < 1"'


def test_a_technical_alert_says_what_cannot_be_monitored_and_keeps_it_as_it_is() -> None:
    bed = Bed(made("", 'name = "other"; raise = "y > 1"; clear = "y < 1"',
                   TECHNICAL + '; inhibits = ["r"]'))  # fmt: skip
    bed.x(10)
    assert bed.tell({"off": 1.0, "x": 4.0, "y": 2.0}) == [*RAISED, *RAISED]
    lead_off = bed.told[1]
    assert (lead_off.rule, lead_off.kind) == ("lead_off", "technical")
    assert lead_off.cannot_monitor == ("r",)
    assert bed.alerts.active()[0].cannot_monitor == ("r",)
    assert bed.x(4, 4) == []  # r is not resolved by a lead that is off
    assert bed.states()["r"] == "active"
    assert bed.tell({"off": 0.0}) == OVER
    assert bed.told[-1].cannot_monitor == ()
    assert bed.x(4) == OVER


def test_what_is_inhibited_is_not_raised_even_by_the_same_measures() -> None:
    bed = Bed(made("", TECHNICAL + '; inhibits = "physiological"'))
    assert bed.tell({"x": 10.0, "off": 1.0}) == RAISED
    assert bed.told[0].rule == "lead_off"
    assert bed.tell({"x": 10.0, "off": 1.0}) == []
    assert bed.tell({"x": 10.0, "off": 0.0}) == [*OVER, *RAISED]


def test_time_in_which_a_rule_was_inhibited_counts_for_nothing() -> None:
    bed = Bed(made("for_s = 3", TECHNICAL + '; inhibits = ["r"]'))
    bed.x(10)
    bed.tell({"x": 10.0, "off": 1.0})
    assert bed.tell({"x": 10.0, "off": 0.0}) == OVER
    assert bed.x(10, 10) == []
    assert bed.x(10) == [("pending", "active")]


def test_a_stream_inhibits_only_itself() -> None:
    alerts = made("", TECHNICAL + '; inhibits = "physiological"')
    ecg, vitals = Bed(alerts, stream="ecg"), Bed(alerts, stream="vitals")
    ecg.tell({"off": 1.0})
    assert vitals.x(10) == RAISED


def test_two_streams_of_a_subject_raise_one_alert_and_the_first_ends_it() -> None:
    alerts = made("")
    one, other = Bed(alerts, stream="one"), Bed(alerts, stream="other")
    assert one.x(10) == RAISED
    assert other.x(10) == []
    assert other.x(4) == []
    assert one.x(4) == OVER
    assert other.x(10) == RAISED


def test_a_paused_alert_is_followed_in_silence_and_shown_as_it_has_become() -> None:
    bed = Bed(made('priority = "high"'))
    bed.x(10)
    assert bed.take(bed.alerts.pause("p-1", "r", 3.0, "me")) == [("active", "paused")]
    assert bed.x(4, 4) == []
    assert bed.x(4) == [("paused", "latched")]
    assert bed.told[-1].reason == "expired"
    bed.take(bed.alerts.pause("p-1", "r", 100.0, "me"))
    assert bed.take(bed.alerts.resume("p-1", "", "you")) == [("paused", "latched")]
    assert bed.told[-1].actor == "you"
    assert bed.alerts.resume("p-1", "", "you") is None


def test_a_pause_hides_no_alert_for_good() -> None:
    bed = Bed(made("", "name = 'q'"))
    assert bed.take(bed.alerts.pause("p-1", "", 3.0, "me")) == [("inactive", "paused")] * 2
    assert bed.x(10, 10) == []
    assert bed.x(10) == [("paused", "active")] * 2


def test_a_pause_ends_though_the_time_of_the_stream_began_anew() -> None:
    bed = Bed(made(""))
    bed.second = 100
    bed.x(10)
    bed.take(bed.alerts.pause("p-1", "r", 3.0, "me"))
    bed.alerts.lost("p-1", "s", tell=False)
    bed.alerts.opened("p-1", "s", moment(0))
    bed.second = 0
    assert bed.x(10, 10, 10) == []
    assert bed.x(10) == [("paused", "active")]


def test_what_the_session_says_of_the_stream_does_not_move_the_time() -> None:
    bed = Bed(made("escalate_s = 5"))
    bed.x(10)
    assert bed.alerts.update("p-1", "s", moment(60), {"drift_ppm": 1.0}) == []
    assert bed.x(10, 10, 10, 10) == []
    assert bed.x(10) == [("active", "active")]


def test_what_is_off_is_not_looked_at_and_comes_back() -> None:
    bed = Bed(made(""))
    bed.x(10)
    assert bed.take(bed.alerts.pause("p-1", "r", 3.0, "me", off=True)) == [("active", "off")]
    assert bed.x(10, 10) == []
    assert bed.x(10) == [("off", "inactive"), ("inactive", "active")]


def test_too_many_transitions_are_merged_and_said_to_be() -> None:
    bed = Bed(made("", per_minute=4))
    bed.second = 60  # a minute begins
    bed.x(*[10, 4] * 10)
    assert len(bed.told) == 4
    bed.x(*[7] * 39)
    del bed.told[:]
    assert bed.x(7) == [("inactive", "resolved")]
    assert (bed.told[0].transitions, bed.told[0].reason) == (16, "merged")


def test_an_alert_of_high_priority_is_raised_however_many_there_were() -> None:
    bed = Bed(made("", 'name = "grave"; raise = "y > 1"; clear = "y < 1"; priority = "high"',
                   per_minute=2))  # fmt: skip
    bed.second = 60
    bed.x(*[10, 4] * 5)
    del bed.told[:]
    assert bed.tell({"y": 2.0}) == RAISED
    assert bed.tell({"y": 0.0}) == []  # merged
    assert bed.ack("grave") == [("active", "resolved")]
    assert bed.told[-1].transitions == 2


def test_what_is_merged_is_told_when_the_stream_is_closed() -> None:
    bed = Bed(made("", per_minute=1))
    assert bed.x(10, 4) == RAISED
    assert bed.take(bed.alerts.closed("p-1", "s")) == [("active", "resolved")]


def test_a_stream_that_is_closed_ends_its_alerts_and_one_that_is_lost_does_not() -> None:
    lost_rule = (
        'name = "stream_lost"; kind = "technical"; raise = "stream_lost > 0"; '
        'clear = "stream_lost <= 0"'
    )
    bed = Bed(made("", lost_rule))
    bed.x(10)
    assert bed.take(bed.alerts.lost("p-1", "s", tell=True)) == RAISED
    assert bed.states() == {"r": "active", "stream_lost": "active"}
    bed.alerts.opened("p-1", "s", moment(0))
    bed.second = 0  # its time axis begins anew
    assert bed.x(10) == OVER  # it is heard again
    assert bed.take(bed.alerts.closed("p-1", "s")) == [("active", "inactive")]
    assert bed.told[-1].reason == "closed"
    assert bed.alerts.active() == []
    assert bed.alerts.take_out("p-1") is None


def test_subjects_that_are_gone_are_kept_in_a_bounded_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "_MAX_LOST_SUBJECTS", 2)
    alerts = made("")
    for number in range(3):
        bed = Bed(alerts, subject=f"p-{number}")
        bed.x(10)
        told = alerts.lost(bed.subject, "s", tell=False)
    assert [(one.subject, one.state, one.reason) for one in told] == [
        ("p-0", "inactive", "too many lost subjects")
    ]
    assert [one.subject for one in alerts.active()] == ["p-1", "p-2"]


def test_an_alert_goes_on_where_it_was_taken_out() -> None:
    first = Bed(made("for_s = 3"))
    first.x(10, 10)
    state = json.loads(json.dumps(first.alerts.take_out("p-1")))
    second = made("for_s = 3")
    assert second.put_back("p-1", state, live=True) == []
    first.x(10)
    told = second.update("p-1", "s", moment(3), {"x": 10.0})
    told += second.update("p-1", "s", moment(4), {"x": 10.0})
    first.x(10)
    assert told == [first.told[-1]]


def test_what_was_latched_or_acknowledged_survives_a_restart_and_a_rule_that_is_gone_is_told() -> (
    None
):
    old = Bed(made('name = "l"; priority = "high"', "name = 'a'", "name = 'gone'"))
    old.x(10)
    old.ack("a")
    old.tell({"x": 4.0})
    old.x(10)
    old.ack("a")
    state = old.alerts.take_out("p-1")
    new = Bed.__new__(Bed)
    new.alerts = made('name = "l"; priority = "high"', "name = 'a'")
    told = new.alerts.put_back("p-1", state, live=False)
    assert [(one.rule, one.state, one.reason) for one in told] == [
        ("gone", "inactive", "rule removed")
    ]
    (active,) = new.alerts.active()
    assert {one.rule: one.state for one in active.alerts} == {"l": "active", "a": "acknowledged"}
    assert {one.acknowledged_by for one in active.alerts if one.rule == "a"} == {"nurse"}


STEP = st.one_of(
    st.none(),
    st.just("gap"),
    st.dictionaries(st.sampled_from(["x", "off"]), st.sampled_from([0.0, 4.0, 7.0, 10.0])),
)
ENTRIES = (
    'priority = "high"; for_s = 2; clear_for_s = 2',
    'name = "q"; priority = "low"; escalate_s = 4; realert_s = 3',
    TECHNICAL + '; inhibits = ["r"]; for_s = 1',
)


@settings(max_examples=50)
@given(st.lists(STEP, max_size=60), st.integers(0, 60))
def test_the_same_samples_give_the_same_transitions_also_with_a_break_between(
    steps: list[Any], cut: int
) -> None:
    def run(break_at: int | None) -> list[Alert]:
        bed = Bed(made(*ENTRIES, per_minute=7))
        for number, step in enumerate(steps):
            if number == break_at:
                state = bed.alerts.take_out("p-1")
                bed.alerts = made(*ENTRIES, per_minute=7)
                bed.alerts.put_back("p-1", state, live=True)
            if step == "gap":
                bed.alerts.gap("p-1", "s")
                bed.second += 3
            else:
                bed.tell(step or {})
        return bed.told

    assert run(None) == run(None) == run(cut)


class Ward(RuleBasedStateMachine):
    """Whatever is told and asked, in any order: what the page about alerts promises holds."""

    per_minute = 1000

    def __init__(self) -> None:
        super().__init__()
        self.bed = Bed(self.new())
        self.shown: dict[str, str] = {}
        self.until: dict[str, float] = {}

    def new(self) -> Alerts:
        return made(*ENTRIES, per_minute=self.per_minute)

    def check(self, told: list[Alert], *, heard: Mapping[str, float], by: str = "") -> None:
        cleared = {"r": "x", "q": "x", "lead_off": "off"}
        for one in told:
            assert one.from_state == self.shown.get(one.rule, "inactive")
            self.shown[one.rule] = "inactive" if one.state == "resolved" else one.state
            assert one.actor == by or not one.actor
            silent = not by and one.reason not in ("merged", "expired", "escalated")
            if silent and one.state in ("resolved", "latched"):
                assert heard.get(cleared[one.rule], 99) < 5
            if one.state == "active" and one.from_state in ("inactive", "latched") and silent:
                assert heard.get(cleared[one.rule], 0) >= (1 if one.rule == "lead_off" else 10)
        if self.per_minute > 100 and self.shown.get("lead_off") in (
            "active",
            "acknowledged",
            "resolving",
        ):
            assert self.bed.alerts.active()[0].cannot_monitor == ("r",)

    @rule(step=STEP, seconds=st.integers(1, 4))
    def hear(self, step: Any, seconds: int) -> None:
        if step == "gap":
            self.bed.alerts.gap("p-1", "s")
        heard = step if isinstance(step, dict) else {}
        self.bed.second += seconds
        told = self.bed.alerts.update("p-1", "s", moment(self.bed.second), heard)
        self.check(told, heard=heard)

    @rule(name=st.sampled_from(["", "r", "q", "lead_off"]))
    def acknowledge(self, name: str) -> None:
        told = self.bed.alerts.acknowledge("p-1", name, "nurse") or []
        self.check(told, heard={}, by="nurse")
        assert all(one.actor == "nurse" for one in told)

    @rule(
        name=st.sampled_from(["r", "q", "lead_off"]), seconds=st.integers(1, 20), off=st.booleans()
    )
    def pause(self, name: str, seconds: int, off: bool) -> None:
        told = self.bed.alerts.pause("p-1", name, seconds, "me", off) or []
        self.check(told, heard={}, by="me")
        assert self.shown[name] == ("off" if off else "paused")
        self.until[name] = self.bed.second + seconds

    @rule(name=st.sampled_from(["r", "q", "lead_off"]))
    def resume(self, name: str) -> None:
        told = self.bed.alerts.resume("p-1", name, "me") or []
        self.check(told, heard={}, by="me")
        assert self.shown.get(name) not in ("off", "paused")

    @rule()
    def restart(self) -> None:
        state = json.loads(json.dumps(self.bed.alerts.take_out("p-1")))
        self.bed.alerts = self.new()
        self.check(self.bed.alerts.put_back("p-1", state, live=False), heard={})
        self.bed.alerts.opened("p-1", "s", moment(self.bed.second))

    @invariant()
    def holds_have_an_end(self) -> None:
        heard_s = self.bed.alerts.take_out("p-1")
        assert heard_s is not None
        for name, state in self.shown.items():
            if state in ("paused", "off"):
                assert heard_s["now_s"] < self.until[name]


class BusyWard(Ward):
    """The same, with so few transitions a minute that most are merged."""

    per_minute = 3


TestWard, TestBusyWard = Ward.TestCase, BusyWard.TestCase
TestWard.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestBusyWard.settings = TestWard.settings


def test_the_rules_that_come_along_are_those_that_were_asked_for() -> None:
    found = rules.load().by_name
    expected = {
        "asystole": ("pause_s >= 4", "high"),
        "bradycardia": ("slow_beats >= 5", "medium"),
        "tachycardia": ("fast_beats >= 17", "medium"),
        "ventricular_run": ("ventricular_in_a_row >= 5", "high"),
        "frequent_ventricular_beats": ("ventricular_per_minute >= 6", "medium"),
        "news2_urgent": ("news2 >= 5", "medium"),
        "news2_emergency": ("news2 >= 7", "high"),
        "rate_wrong": ("rate_error_share > 0.01", "low"),
    }
    for name, (condition, priority) in expected.items():
        (term,) = found[name].raised
        assert f"{term.measure} {term.sign} {term.limit:g}" == condition
        assert found[name].priority == priority
    assert found["asystole"].latching is None  # high: it latches
    assert [term.measure for term in found["ventricular_tachycardia"].raised] == [
        "ventricular_in_a_row",
        "ventricular_run_bpm",
    ]
    assert "asystole" in found["lead_off"].inhibits
    for name in ("flat_line", "poor_signal"):
        assert "asystole" not in found[name].inhibits  # that is what it looks like


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        ('raise = "x > 1 or y > 1"', "rule r: expected 'measure >= number'"),
        ('raise = "x = 1"', "rule r: expected 'measure >= number'"),
        ('raise = "x > 1.2.3"', "expected a number, found '1.2.3'"),
        ('raise = "x >= 5"; clear = "x <= 5"', "expected raise and clear never to hold at once"),
        ('raise = "x >= 5"; clear = "x < 6"', "found 'x >= 5' and 'x < 6'"),
        ('raise = "x >= 5"; clear = "x > 7"', "expected raise and clear never to hold at once"),
        ('priority = "urgent"', "urgent"),
        ("for_s = -1", "for_s"),
        ("for = 1", "for"),
        ('escalate_s = 5; priority = "high"', "escalate_s: expected a priority below high"),
        ('inhibits = ["r"]', "inhibits: expected a rule of the kind technical"),
        ('kind = "technical"; inhibits = ["q"]', "expected names of physiological rules, found"),
        ('kind = "technical"; inhibits = ["r"]', "expected names of physiological rules, found"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused_with_a_reason(entry: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault.replace("(", r"\(")):
        made(entry)


def test_a_name_that_stands_for_two_rules_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"each rule's name once, found \['r'\]"):
        made("", "")


def test_a_file_of_rules_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rules.toml"
    with pytest.raises(ConfigError, match=r"rules\.toml"):
        rules.load(path)
    path.write_text("[[rule]]\n")
    with pytest.raises(ConfigError, match=r"rules\.toml: .*name"):
        rules.load(path)


def test_the_index_passes_over_no_rule_that_values_raise() -> None:
    found = rules.load()
    index = rules.Index(found)
    terms = [term for rule in found.by_name.values() for term in rule.raised]
    draw = random.Random(0)
    for _ in range(2000):
        some = draw.sample(terms, draw.randint(1, 6))
        values = {
            term.measure: term.limit + draw.choice([-1.0, 0.0, 1.0, math.nan]) for term in some
        }
        raised = {name for name, rule in found.by_name.items() if rules.holds(rule.raised, values)}
        assert raised <= {index.rules[place].name for place in index.raised_by(values)}
    assert not index.raised_by({"heart_rate_bpm": 70.0, "quality": 2.0, "pause_s": 0.0})
