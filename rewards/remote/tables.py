"""What a server was told of the models that ask it: their prompts, metadata, sample shape and classes, once for each.

    a greeting carries a table;  each question names it by D, the digest of that greeting;  labels are rows of it

A server that does not know D (it was started anew, is another replica, or had to let the oldest table go) says so, and
is greeted again.
"""

import threading
from collections import OrderedDict
from typing import Any

from rlfusion.rewards.remote.frames import FrameError

MOST_TABLES, MOST_BYTES = 64, 2**30


class UnknownTable(FrameError):
    """A question that names a table of prompts which was not said here, or was let go."""


class Tables:
    """Task infos by the digests of their greetings: the last ``MOST_TABLES`` that were asked for, whose greetings are
    of ``most`` bytes in all; the newest in any case. For several threads.
    """

    def __init__(self, most: int = MOST_BYTES) -> None:
        self.most = most
        self._held: OrderedDict[str, tuple[dict[str, Any], int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._held)

    def take(self, digest: str, task_info: dict[str, Any], size: int) -> None:
        """Keep what a greeting of ``size`` bytes said."""
        with self._lock:
            self._held[digest] = task_info, size
            self._held.move_to_end(digest)
            while len(self._held) > 1 and (len(self._held) > MOST_TABLES or self._total() > self.most):
                self._held.popitem(last=False)

    def __getitem__(self, digest: str) -> dict[str, Any]:
        """The task info of a digest. Raises KeyError where it is not known."""
        with self._lock:
            task_info = self._held[digest][0]
            self._held.move_to_end(digest)
            return task_info

    def _total(self) -> int:
        return sum(size for _, size in self._held.values())
