"""How long items take: what leases and twins are measured by."""

import math
from bisect import bisect_left, insort
from collections import deque

WINDOW = 200
"""Items whose durations are remembered."""
QUANTILE = 0.99
FEWEST = 5
"""Durations of which a median says something."""


class Durations:
    """The seconds a sample that the last items took, from being given out to being answered.

    Attributes:
        p99: their 99th percentile; NaN before the first.
    """

    def __init__(self) -> None:
        self._last: deque[float] = deque()
        self._sorted: list[float] = []
        self.p99 = math.nan

    @property
    def usual(self) -> float:
        """Their median; NaN while there are fewer than ``FEWEST``."""
        return self._sorted[len(self._sorted) // 2] if len(self._sorted) >= FEWEST else math.nan

    def add(self, seconds: float, samples: int) -> None:
        """An item of so many samples took so long."""
        each = seconds / samples
        self._last.append(each)
        insort(self._sorted, each)
        if len(self._last) > WINDOW:
            del self._sorted[bisect_left(self._sorted, self._last.popleft())]
        self.p99 = self._sorted[math.ceil(QUANTILE * len(self._sorted)) - 1]
