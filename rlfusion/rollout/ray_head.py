"""Watches what a run's process needs of Ray, and ends the process where that is gone: the raylet that it is connected
to, and the head of the cluster.

Ray itself ends such a process without a word, with the exit code of what was not foreseen: at its next call where the
raylet is gone, and after a minute, in which calls wait, where the head is. What is saved is whole whenever a process
ends, and ``rlfusion supervise`` resumes the run once there is a head again.
"""

import logging
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import ray

from rlfusion.common.stops import end_now
from rlfusion.rollout.commands import RolloutError
from rlfusion.rollout.ray_address import CLIENT, host_and_port

LOOK_S = 1.0
GONE_S = 20.0
"""Seconds for which nothing may listen at the head's address; Ray itself waits for 60."""
_log = logging.getLogger(__name__)


class Needed(NamedTuple):
    """What a process needs of Ray: host and port of the head, and the socket of the store of its own node's raylet, ""
    where it has none, as a client of Ray's client server.
    """

    head: tuple[str, int]
    store: str


def needed(address: str = "") -> Needed:
    """What this process, which is connected by this ``ray.address``, needs."""
    client = address.startswith(CLIENT)
    head = host_and_port(address if client else ray.get_runtime_context().gcs_address)
    assert head is not None  # Ray is connected to it
    node: Any = ray._private.worker.global_worker.node
    return Needed(head, "" if client else node.plasma_store_socket_name)


@contextmanager
def watched(needed: Needed, gone: Callable[[str], None] | None = None) -> Iterator[None]:
    """Within the context, once what is ``needed`` is gone, ``gone`` is told what, once, from a thread; by default that
    ends the process, with this line and the exit code of what is unavailable.
    """
    with ExitStack() as stack:
        over, end = (stack.enter_context(one) for one in socket.socketpair())
        sockets = [end]
        if needed.store:
            store = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            store.connect(needed.store)
            sockets.append(store)
        thread = threading.Thread(
            target=_watch, args=(needed, sockets, gone or _end), name="rlfusion-head", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            over.close()
            thread.join()


def _watch(needed: Needed, sockets: list[socket.socket], gone: Callable[[str], None]) -> None:
    answered = time.monotonic()
    while True:
        ready, _, _ = select.select(sockets, [], [], LOOK_S)
        if sockets[0] in ready:
            return
        if ready:  # it says nothing by itself: the other end is closed
            gone("the Ray node of this process is gone: its raylet has ended")
            return
        if listens(needed.head):
            answered = time.monotonic()
        elif time.monotonic() - answered >= GONE_S:
            host, port = needed.head
            gone(f"the head of the Ray cluster is gone: nothing listens at {host}:{port} for {GONE_S:g} s")
            return


def listens(head: tuple[str, int]) -> bool:
    """Whether something accepts a connection there."""
    try:
        socket.create_connection(head, timeout=GONE_S / 4).close()
    except OSError:
        return False
    return True


def _end(why: str) -> None:
    if not end_now(f"{RolloutError.kind}: {why}", RolloutError.exit_code):
        _log.error(why)  # the program is not ours: Ray ends it
