"""Words and phrases that one stream expects: by how much they raise a beam's scores.

An automaton (Aho & Corasick 1975) follows all phrases at once. Every letter of a phrase adds the
phrase's boost as soon as it is spelt, so that the beam does not lose it; what was added is taken
back when the text goes on otherwise. Phrases are whole words: where labels are letters, each
begins and ends at a separator.
"""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice

from engine.errors import Refused
from engine.messages import Hotword
from engine.speech.ctc import SEPARATOR

_ROOT = 0


class Hotwords:
    """A :class:`~engine.speech.language.Language` that knows only some phrases.

    Its state is a node: the longest end of the text that begins a phrase.

    Parameters
    ----------
    labels : sequence of str
    hotwords : sequence of Hotword
        Letters that several phrases begin with are lent the greatest of their boosts. Where a
        phrase begins with a whole other one, it adds only the rest.

    Raises
    ------
    Refused
        If a phrase cannot be spelt with the labels.
    """

    def __init__(self, labels: Sequence[str], hotwords: Sequence[Hotword]) -> None:
        self._labels = labels
        self._separator = labels.index(SEPARATOR) if SEPARATOR in labels else None
        self._children: list[dict[int, int]] = [{}]
        gains, complete = [0.0], {_ROOT: 0.0}
        spelt = [(self._spell(hotword.phrase), hotword.boost) for hotword in hotwords]
        for phrase, boost in sorted(spelt, key=lambda one: len(one[0])):
            node, worth = _ROOT, 0.0
            for label in phrase:
                worth = self._gain(label, boost) + (0.0 if node in complete else worth)
                if label not in self._children[node]:
                    self._children[node][label] = len(gains)
                    self._children.append({})
                    gains.append(-math.inf)
                node = self._children[node][label]
                gains[node] = max(gains[node], self._gain(label, boost))
            complete[node] = max(complete.get(node, worth), worth)
        self._shorter = [_ROOT] * len(gains)  # the longest end of a node that is a node too
        self._lent = [0.0] * len(gains)  # added on the way to a node, and taken back from there
        self._kept = [0.0] * len(gains)  # added for good at a node
        self._fill(gains, complete)

    def begin(self) -> int:
        return _ROOT if self._separator is None else self.advance(_ROOT, self._separator)

    def advance(self, state: int, label: int) -> int:
        while state and label not in self._children[state]:
            state = self._shorter[state]
        return self._children[state].get(label, _ROOT)

    def score(self, state: int, label: int) -> float:
        after = self.advance(state, label)
        return self._lent[after] + self._kept[after] - self._lent[state]

    def end(self, state: int, inside: bool) -> float:
        """Return what the end of the text adds: there, a phrase is complete or abandoned."""
        if self._separator is None or not inside:
            return -self._lent[state]
        after = self.advance(state, self._separator)
        return self._kept[after] - self._lent[state]

    def _spell(self, phrase: str) -> list[int]:
        """Return a phrase's labels, between separators if there are any."""
        words = phrase.split()
        parts = words if self._separator is None else list(" ".join(words))
        known = {label: number for number, label in enumerate(self._labels) if label}
        spelt = [known.get(part, known.get(part.lower(), 0)) for part in parts]
        if not all(spelt):
            missing = sorted({part for part, label in zip(parts, spelt, strict=True) if not label})
            raise Refused(
                "bad_hotword", f"hotword {phrase!r}: expected {_listed(known)}, found {missing}"
            )
        if not spelt:
            raise Refused("bad_hotword", f"expected a word or phrase, found {phrase!r}")
        ends = [] if self._separator is None else [self._separator]
        return [*ends, *spelt, *ends]

    def _gain(self, label: int, boost: float) -> float:
        return 0.0 if label == self._separator else boost * len(self._labels[label])

    def _fill(self, gains: list[float], complete: dict[int, float]) -> None:
        """Go through the nodes, the shorter before the longer."""
        waiting = deque([_ROOT])
        while waiting:
            parent = waiting.popleft()
            for label, node in self._children[parent].items():
                shorter = self.advance(self._shorter[parent], label) if parent else _ROOT
                self._shorter[node], self._kept[node] = shorter, self._kept[shorter]
                if node in complete:
                    self._kept[node] = complete[node]
                else:
                    self._lent[node] = self._lent[parent] + gains[node]
                waiting.append(node)


def _listed(labels: Iterable[str]) -> str:
    """Return the first labels, and whether there are more."""
    first = [repr(label) for label in islice(labels, 33)]
    return " ".join(first[:32]) + (" and more" if len(first) > 32 else "")
