"""What an alert is raised for and when it is over: rules, read from a TOML file and checked.

``docs/alerts.md`` tells what each key means. A condition is written as it is said,
``"ventricular_in_a_row >= 5 and ventricular_run_bpm > 100"``: comparisons of a measure with a
number, all of which must hold. Nothing here knows of streams or time; that is ``engine/alerts.py``.
"""

import operator
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import msgspec
from msgspec import Meta

from engine.errors import ConfigError
from engine.messages import AlertKind, Name, Priority

BUNDLED = Path(__file__).with_name("alerts.toml")
_SIGNS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_TERM = re.compile(r"\s*([a-z][\w.]*)\s*(>=|<=|>|<)\s*([-+]?[0-9.]+(?:e[-+]?[0-9]+)?)\s*")
_PRIORITIES: tuple[Priority, ...] = get_args(Priority)
Seconds = Annotated[float, Meta(ge=0, le=86_400)]


class Term(NamedTuple):
    """A comparison of a measure with a limit."""

    measure: str
    sign: str
    limit: float
    compare: Callable[[float, float], bool]


Condition = tuple[Term, ...]


def holds(condition: Condition, values: Mapping[str, float]) -> bool | None:
    """Return whether all terms hold; None where that hangs on a measure that is not known."""
    known = True
    for measure, _, limit, compare in condition:
        value = values.get(measure)
        if value is None or value != value:  # nan says nothing
            known = False
        elif not compare(value, limit):
            return False
    return True if known else None


class Rule(NamedTuple):
    """One kind of alert. Times are seconds of the stream."""

    name: str
    raised: Condition
    cleared: Condition
    priority: Priority
    kind: AlertKind
    for_s: float  # for which `raised` must have been heard before the alert is active
    clear_for_s: float  # for which `cleared` must have been heard before it is over
    valid_s: float  # a value older than this is not known any more
    latching: bool | None  # stays until acknowledged; None: while its priority is high
    escalate_s: float | None  # unacknowledged for so long: one priority higher
    realert_s: float | None  # acknowledged and still true for so long: active again
    inhibits: tuple[str, ...]  # rules that cannot be monitored meanwhile

    @property
    def measures(self) -> set[str]:
        return {term.measure for term in (*self.raised, *self.cleared)}


class Rules(NamedTuple):
    """A file of rules."""

    by_name: Mapping[str, Rule]  # technical ones first, since they inhibit the others
    transitions_per_minute: int  # of a subject; what goes beyond is merged


class Index:
    """Rules by what can raise them, to be found at once among measures that raise nothing.

    Attributes
    ----------
    rules : tuple of Rule
        In their order.
    place : mapping of str to int
        Of each rule among them, by its name.
    joined : frozenset of str
        Measures that stand in a condition beside others.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules = tuple(rules.by_name.values())
        self.place = {rule.name: place for place, rule in enumerate(self.rules)}
        self.joined = frozenset(
            term.measure
            for rule in self.rules
            for condition in (rule.raised, rule.cleared)
            if len(condition) > 1
            for term in condition
        )
        # Each rule under the measure of each term: one that is told and holds, or it is not raised.
        self._terms: dict[str, list[tuple[int, float, Callable[[float, float], bool]]]] = {}
        for place, rule in enumerate(self.rules):
            for measure, _, limit, compare in rule.raised:
                self._terms.setdefault(measure, []).append((place, limit, compare))

    def raised_by(self, values: Mapping[str, float]) -> set[int]:
        """Return the places of the rules that these values may raise, perhaps with older ones.

        As most often there is none: values are told anew, and not so that they could.
        """
        found = set()
        for measure, value in values.items():
            for place, limit, compare in self._terms.get(measure, ()):
                if compare(value, limit):
                    found.add(place)
        return found


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A rule as it is written."""

    name: Name
    raised: str = msgspec.field(name="raise")
    clear: str
    priority: Priority
    kind: AlertKind = "physiological"
    for_s: Seconds = 0.0
    clear_for_s: Seconds = 0.0
    valid_s: Annotated[float, Meta(gt=0, le=86_400)] = 3.0
    latching: bool | None = None
    escalate_s: Annotated[float, Meta(gt=0, le=86_400)] | None = None
    realert_s: Annotated[float, Meta(gt=0, le=86_400)] | None = None
    inhibits: tuple[Name, ...] | Literal["physiological"] = ()


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    transitions_per_minute: Annotated[int, Meta(ge=1, le=10_000)] = 30
    rule: tuple[_Entry, ...] = ()


def load(path: Path | None = None) -> Rules:
    """Read a file of rules; None reads those that come along.

    Raises
    ------
    ConfigError
        Naming the file, the rule, and what was expected and found.
    """
    path = path or BUNDLED
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        raise ConfigError(f"{path}: {error}") from None


def parse(text: str) -> Rules:
    """Read rules as :func:`load` does, from the text of a file."""
    try:
        file = msgspec.toml.decode(text, type=_File)
    except msgspec.MsgspecError as error:
        raise ConfigError(str(error)) from None
    names = [entry.name for entry in file.rule]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ConfigError(f"expected each rule's name once, found {sorted(twice)} more than once")
    kinds = {entry.name: entry.kind for entry in file.rule}
    rules = [_rule(entry, kinds) for entry in file.rule]
    rules.sort(key=lambda rule: rule.kind != "technical")
    return Rules({rule.name: rule for rule in rules}, file.transitions_per_minute)


def written(rule: Rule) -> dict[str, Any]:
    """Return a rule as plain data, its conditions as they are written."""
    keys = rule._asdict()
    return {"raise": spelt(keys.pop("raised")), "clear": spelt(keys.pop("cleared")), **keys}


def line(rule: Rule) -> str:
    """Return a rule in a line for a person."""
    after = f" for {rule.for_s:g} s" if rule.for_s else ""
    until = f" for {rule.clear_for_s:g} s" if rule.clear_for_s else ""
    text = f"{rule.name:36} {rule.priority:6} {rule.kind:13} {spelt(rule.raised)}{after}"
    text += f"; clear {spelt(rule.cleared)}{until}"
    if rule.inhibits:
        text += f"; inhibits {', '.join(rule.inhibits)}"
    return text


def spelt(condition: Condition) -> str:
    """Return a condition as it is written."""
    return " and ".join(f"{term.measure} {term.sign} {term.limit:g}" for term in condition)


def higher(priority: Priority) -> Priority:
    """Return the next higher priority, or the highest."""
    return _PRIORITIES[min(_PRIORITIES.index(priority) + 1, len(_PRIORITIES) - 1)]


def _rule(entry: _Entry, kinds: Mapping[str, AlertKind]) -> Rule:
    raised, cleared = _condition(entry, entry.raised), _condition(entry, entry.clear)
    if len(raised) == len(cleared) == 1 and raised[0].measure == cleared[0].measure:
        _check_apart(entry.name, raised[0], cleared[0])
    if entry.escalate_s is not None and entry.priority == "high":
        raise ConfigError(f"rule {entry.name}: escalate_s: expected a priority below high")
    return Rule(
        entry.name,
        raised,
        cleared,
        entry.priority,
        entry.kind,
        entry.for_s,
        entry.clear_for_s,
        entry.valid_s,
        entry.latching,
        entry.escalate_s,
        entry.realert_s,
        _inhibited(entry, kinds),
    )


def _condition(entry: _Entry, text: str) -> Condition:
    terms = []
    for part in text.split(" and "):
        match = _TERM.fullmatch(part)
        if match is None:
            raise ConfigError(
                f"rule {entry.name}: expected 'measure >= number', more of them joined by 'and', "
                f"found {text!r}"
            )
        measure, sign, limit = match.groups()
        try:
            terms.append(Term(measure, sign, float(limit), _SIGNS[sign]))
        except ValueError:
            raise ConfigError(
                f"rule {entry.name}: expected a number, found {limit!r} in {text!r}"
            ) from None
    return tuple(terms)


def _check_apart(name: str, raised: Term, cleared: Term) -> None:
    """Refuse two conditions on one measure that can hold at the same time."""
    upwards = raised.sign[0] == ">"
    opposite = upwards == (cleared.sign[0] == "<")
    distance = raised.limit - cleared.limit if upwards else cleared.limit - raised.limit
    both_inclusive = raised.sign[1:] == cleared.sign[1:] == "="
    if not opposite or distance < 0 or (distance == 0 and both_inclusive):
        raise ConfigError(
            f"rule {name}: expected raise and clear never to hold at once, found "
            f"'{raised.measure} {raised.sign} {raised.limit:g}' and "
            f"'{cleared.measure} {cleared.sign} {cleared.limit:g}'"
        )


def _inhibited(entry: _Entry, kinds: Mapping[str, AlertKind]) -> tuple[str, ...]:
    physiological = tuple(name for name, kind in kinds.items() if kind == "physiological")
    names = physiological if entry.inhibits == "physiological" else tuple(entry.inhibits)
    if names and entry.kind != "technical":
        raise ConfigError(f"rule {entry.name}: inhibits: expected a rule of the kind technical")
    wrong = [name for name in names if name not in physiological]
    if wrong:
        raise ConfigError(
            f"rule {entry.name}: inhibits: expected names of physiological rules, found {wrong}"
        )
    return names
