"""Named actors that are there again after they die or hang: Ray starts one anew that dies, and a watch one that hangs.

Who asks an actor asks it by its name, and looks the name up again where the one that it knew is gone.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError

RESTARTS = 3
"""Times that an actor is started anew where it died, and as many where it hung."""
BESIDE = "beside"
"""The concurrency group in which an actor answers that it lives, whatever it works at."""
LOOK_S, AGAIN_S, POLL_S = 1.0, 10.0, 0.2
_log = logging.getLogger(__name__)


class Named:
    """A running actor, by its name."""

    def __init__(self, name: str, timeout_s: float) -> None:
        self.name, self.timeout_s, self._actor = name, timeout_s, _found(name)

    def call(self, method: str, *given: Any) -> Any:
        """The answer of a method; where the actor was started anew meanwhile, that of the new one.

        Raises:
            RayError: it is gone, or raised.
            GetTimeoutError: it is late.
        """
        while True:
            try:
                return ray.get(getattr(self._actor, method).remote(*given), timeout=self.timeout_s)
            except ActorDiedError:
                another = _found(self.name, self._actor)
                if another is None:
                    raise
                self._actor = another


def _found(name: str, gone: Any = None) -> Any:
    """The actor of that name, waited for where it is just started anew; another than ``gone``, None where none comes.

    Raises:
        ValueError: there was none to be ``gone``, and none comes.
    """
    deadline = time.monotonic() + AGAIN_S
    while True:
        try:
            actor = ray.get_actor(name)
            if gone is None or actor._actor_id != gone._actor_id:
                return actor
        except ValueError:
            if gone is None and time.monotonic() > deadline:
                raise
        if time.monotonic() > deadline:
            return None
        time.sleep(POLL_S)


class _Watched:
    """An actor, and when it last answered; None before it did."""

    def __init__(self, name: str, start: Callable[[], Any]) -> None:
        self.name, self.start, self.left = name, start, RESTARTS
        self.actor = start()
        self.answered: float | None = None
        self.asked: Any = None

    def look(self, hung_s: float) -> None:
        """Ask whether it lives; start another where it has not answered for so long."""
        now = time.monotonic()
        if self.asked is None:
            self.asked = self.actor.alive.options(concurrency_group=BESIDE).remote()
        elif ray.wait([self.asked], timeout=0)[0]:
            self.answered = self._answer(now)
        elif self.answered is not None and now - self.answered > hung_s and self.left:
            self._anew(hung_s)

    def _answer(self, now: float) -> float | None:
        answer, self.asked = self.asked, None
        try:
            ray.get(answer)
        except RayError:  # Ray starts it anew, or not, where it has died too often
            return None
        return now

    def _anew(self, hung_s: float) -> None:
        self.left -= 1
        _log.warning("%s has not answered for %.3g s and is started anew; left: %d", self.name, hung_s, self.left)
        ray.kill(self.actor, no_restart=True)
        self.asked = self.answered = None
        deadline = time.monotonic() + AGAIN_S
        while True:
            try:
                self.actor = self.start()
                return
            except ValueError:  # its name is not free yet
                if time.monotonic() > deadline:
                    raise
                time.sleep(POLL_S)


@contextmanager
def kept(actors: Sequence[tuple[str, Callable[[], Any]]], hung_s: float) -> Iterator[None]:
    """Actors by name, each with what starts it: within the context they run, and each that has not answered for
    ``hung_s`` seconds is killed and started anew.
    """
    watched, over = [_Watched(name, start) for name, start in actors], threading.Event()

    def watch() -> None:
        while not over.wait(LOOK_S):
            for one in watched:
                one.look(hung_s)

    thread = threading.Thread(target=watch, name="rlfusion-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        for one in watched:
            ray.kill(one.actor)
