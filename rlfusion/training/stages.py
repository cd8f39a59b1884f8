"""Where the seconds of training go, stage by stage. A stage within another one is not counted in that.

    rollout      walks are drawn in this process
    idle         walks that others draw are waited for
    reward       they are scored, in this process
    learn        the learner updates, with what its ranks tell each other
    publish      weights go to those that act
    checkpoint   the state is copied, and the checkpoint before is waited for

Reading a clock changes no bit. Work that a GPU is still doing is counted where it is waited for.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

ROLLOUT, IDLE, REWARD, LEARN, PUBLISH, CHECKPOINT = "rollout", "idle", "reward", "learn", "publish", "checkpoint"


class Stages:
    """The seconds of each stage since they were last ``taken``; ``clock`` gives the time in seconds."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What happens within the context is of this stage; the one around it goes on afterwards."""
        self._turn()
        self._open.append(name)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def _turn(self) -> None:
        """Give the time since the last turn to the stage that is open."""
        now = self.clock()
        if self._open:
            name = self._open[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now

    def taken(self) -> dict[str, float]:
        """The seconds by stage, which begin anew."""
        self._turn()
        held, self._seconds = self._seconds, {}
        return held


_current: ContextVar[Stages | None] = ContextVar("stages", default=None)


@contextmanager
def counting(stages: Stages) -> Iterator[Stages]:
    """Within the context, in this thread, ``stage`` counts into ``stages``."""
    token = _current.set(stages)
    try:
        yield stages
    finally:
        _current.reset(token)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """What happens within the context is of this stage, where stages are counted."""
    stages = _current.get()
    if stages is None:
        yield
        return
    with stages.stage(name):
        yield
