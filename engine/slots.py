"""Which row of the state arrays belongs to which stream: acquire, release, generations."""

import numpy as np
from numpy.typing import NDArray


class Slots:
    """Rows handed out one stream at a time.

    Parameters
    ----------
    count : int

    Attributes
    ----------
    generation : (count,) int64
        How many tenants a row has had. A result computed for an older generation than the
        row's present one belongs to a stream that is gone.
    """

    def __init__(self, count: int) -> None:
        self.generation: NDArray[np.int64] = np.zeros(count, np.int64)
        self._free = list(range(count - 1, -1, -1))  # the lowest free row is handed out first
        self._taken: set[int] = set()

    def __len__(self) -> int:
        """Return how many rows are taken."""
        return len(self._taken)

    @property
    def full(self) -> bool:
        return not self._free

    def acquire(self) -> int:
        """Take a free row; what it carries must be reset by the caller."""
        slot = self._free.pop()
        self._taken.add(slot)
        self.generation[slot] += 1
        return slot

    def release(self, slot: int) -> None:
        self._taken.remove(slot)
        self._free.append(slot)
