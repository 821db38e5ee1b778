"""When a measured value becomes an alert, and when the alert is over.

Pure and driven by events: the same values give the same alerts. A rule has a limit to raise and
a lower one to clear, so that a value at the limit does not flicker.
"""

from typing import Literal, NamedTuple

Priority = Literal["low", "medium", "high"]


class Rule(NamedTuple):
    """Active from ``raise_at`` on, until the value is below ``clear_below``."""

    name: str
    measure: str
    raise_at: float
    clear_below: float
    priority: Priority


class Change(NamedTuple):
    """A rule that became active or was resolved, and the value that did it."""

    rule: Rule
    state: Literal["active", "resolved"]
    value: float


class AlertMachine:
    """The rules of one stream."""

    def __init__(self, rules: tuple[Rule, ...]) -> None:
        self._rules = rules
        self._active: set[str] = set()

    def update(self, values: dict[str, float]) -> list[Change]:
        """Take new values of some measures, return what changed, in the order of the rules."""
        changes = []
        for rule in self._rules:
            value = values.get(rule.measure)
            if value is None:
                continue
            if rule.name not in self._active and value >= rule.raise_at:
                self._active.add(rule.name)
                changes.append(Change(rule, "active", value))
            elif rule.name in self._active and value < rule.clear_below:
                self._active.remove(rule.name)
                changes.append(Change(rule, "resolved", value))
        return changes
