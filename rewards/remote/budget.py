"""Room for so many bytes, shared by all questions that a server holds, and given in the order in which it is asked for.

    (1)  sum over the holders of what each took  <=  most
    (2)  who asks waits while (1) would not hold, or while others who asked before still wait

Its methods run in one event loop; they need no lock.
"""

import asyncio
from collections import deque
from typing import NamedTuple


class _Waiting(NamedTuple):
    count: int
    turn: asyncio.Future


class Budget:
    """``most`` bytes of room, of which ``free`` are free."""

    def __init__(self, most: int) -> None:
        self.most = self.free = most
        self._queue: deque[_Waiting] = deque()

    async def take(self, count: int) -> None:
        """Hold ``count`` <= ``most`` bytes, once there is room, until ``give``; cancelled, it holds nothing."""
        waiting = _Waiting(count, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._serve()
        try:
            await waiting.turn
        except asyncio.CancelledError:
            if waiting.turn.cancelled():
                self._queue.remove(waiting)
                self._serve()  # a smaller one behind it may fit
            else:  # its turn came as it was cancelled
                self.give(count)
            raise

    def give(self, count: int) -> None:
        """Hold ``count`` bytes no more."""
        self.free += count
        self._serve()

    def _serve(self) -> None:
        while self._queue and self._queue[0].count <= self.free and not self._queue[0].turn.cancelled():
            count, turn = self._queue.popleft()
            self.free -= count
            turn.set_result(None)
