"""Which of several equal servers to ask, and when: a state machine without I/O, as the caller has clock and sockets.

    (1)  a replica that failed n times in a row rests for min(first_s 2^(n-1), longest_s)
    (2)  the next to ask is the one that is, or first will be, rested; among equals, the next around from the one that
         the question begins with
    (3)  the caller gives a question up when each replica has been tried and its patience would be over at the next try

The answer to a question does not depend on who gives it, so neither failures nor their order reach a result.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

DOUBLINGS = 30


@dataclass
class _State:
    failures: int = 0
    rested: float = -float("inf")
    reason: str = ""


class Replicas:
    """The servers of one reward. Its methods may be called by several threads."""

    def __init__(self, urls: Sequence[str], first_s: float = 0.25, longest_s: float = 8.0) -> None:
        self.urls, self.first_s, self.longest_s = list(urls), first_s, longest_s
        self._states = {url: _State() for url in self.urls}
        self._lock = threading.Lock()

    def next(self, first: int, now: float) -> tuple[str, float]:
        """Eq. (2): who to ask for a question that begins with replica ``first``, and the seconds to wait before."""
        count = len(self.urls)
        around = [self.urls[(first + i) % count] for i in range(count)]
        with self._lock:
            url = min(around, key=lambda u: max(now, self._states[u].rested))  # min takes the first of equals
            return url, max(0.0, self._states[url].rested - now)

    def failed(self, url: str, reason: str, now: float) -> None:
        """``url`` did not answer, or not as it should; Eq. (1)."""
        with self._lock:
            state = self._states[url]
            state.failures += 1
            state.reason = reason
            state.rested = now + min(self.first_s * 2 ** min(state.failures - 1, DOUBLINGS), self.longest_s)

    def answered(self, url: str) -> None:
        """``url`` answered well."""
        with self._lock:
            self._states[url] = _State()

    def failing(self, url: str) -> bool:
        """Whether the last thing heard of ``url`` is a failure."""
        return self._states[url].failures > 0

    @property
    def reasons(self) -> str:
        """Why each failing replica last failed."""
        return "; ".join(f"{url}: {state.reason}" for url, state in self._states.items() if state.failures)
