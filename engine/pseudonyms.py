"""Whether a subject is named by a pseudonym, or in the clear.

No rule can tell every name; these catch what is typed by mistake: a name, a date of birth, a
hospital number. A random pseudonym of 16 hexadecimal digits is refused about once in a thousand
times; draw another.
"""

import re

_SEPARATOR = "[-_.:]?"
_YEAR, _MONTH, _DAY = "(19|20)[0-9]{2}", "(0[1-9]|1[0-2])", "(0[1-9]|[12][0-9]|3[01])"
_DATES = [
    _SEPARATOR.join(parts)
    for parts in ((_YEAR, _MONTH, _DAY), (_DAY, _MONTH, _YEAR), (_MONTH, _DAY, _YEAR))
]
# What a subject in the clear looks like, and what to call it.
_SUSPICIONS = (
    (re.compile(r"[^0-9]*\Z"), "a name: it has no digit"),
    (re.compile(r"[A-Za-z]{0,4}[-_.:]?[0-9]+\Z"), "a hospital number"),
    (re.compile(r"[A-Za-z]{3,}([-_.:][A-Za-z]+)*[-_.:]?[0-9]{1,4}\Z"), "a name with a number"),
    (re.compile(".*(" + "|".join(_DATES) + ")"), "something with a date in it"),
)


def fault(subject: str, pattern: str) -> str | None:
    """Return what is wrong with a subject as a pseudonym, without naming it; None: nothing.

    Parameters
    ----------
    subject : str
    pattern : str
        Regular expression that a pseudonym matches as a whole.
    """
    if re.fullmatch(pattern, subject) is None:
        return f"one that matches {pattern}"
    for looks, name in _SUSPICIONS:
        if looks.match(subject):
            return f"one that does not look like {name}"
    return None
