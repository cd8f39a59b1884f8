"""A tracker in a thread of its own: training hands over what it has to say and goes on, however slow a server is."""

import queue
import threading
from collections.abc import Callable

from rlfusion.common.errors import UnavailableError
from rlfusion.common.user_code import described

FINISH_S = 60.0
"""How long the end of a run waits for what a tracker has not written yet."""

Call = Callable[[], object]


class Feed:
    """Calls in their order, in a thread. The first that raises is told, once; the others go on, and those lost are
    counted.

    Attributes:
        strict: each call is waited for, and one that raises is an error here.
        failed: the first error in words; "" for none.
        lost: calls that raised, or that came after the run could not be begun.
    """

    def __init__(self, name: str, say: Callable[[str], None], strict: bool = False) -> None:
        self.name, self.say, self.strict = name, say, strict
        self.failed, self.lost, self._begun = "", 0, False
        self._calls: queue.Queue[Call | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, call: Call) -> None:
        """Have it called; the first call begins the tracker's run.

        Raises:
            UnavailableError: with ``strict`` it raised.
        """
        self._calls.put(call)
        if self.strict:
            self._calls.join()
            if self.failed:
                raise UnavailableError(f"tracker {self.name!r} failed: {self.failed} (track_failures = stop)")

    def close(self, last: Call) -> None:
        """Call ``last``, and wait for all, ``FINISH_S`` at most; what was lost is told."""
        self._calls.put(last)
        self._calls.put(None)
        self._thread.join(FINISH_S)
        if self._thread.is_alive():
            self.say(f"tracker {self.name!r} is not done within {FINISH_S:.0f} s: what it has yet to write may be lost")
        elif self.lost > 1:
            self.say(f"tracker {self.name!r} lost {self.lost} entries; metrics.jsonl and TensorBoard have them")

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            self._try(call)
            self._calls.task_done()

    def _try(self, call: Call) -> None:
        if self.failed and not self._begun:  # there is no run to write to
            self.lost += 1
            return
        try:
            call()
            self._begun = True
        except Exception as error:  # of a library or a stranger's code: told, and training goes on
            self.lost += 1
            if not self.failed:
                self.failed = described(error)
                self.say(f"tracker {self.name!r} failed: {self.failed}; the training goes on without what it lost")
