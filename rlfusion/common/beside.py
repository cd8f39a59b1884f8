"""A call in a thread of its own, beside the caller's."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Beside(threading.Thread, Generic[T]):
    """One call, under way; its thread is a daemon, so that one which hangs does not keep the process from ending."""

    def __init__(self, name: str, work: Callable[[], T]) -> None:
        super().__init__(name=name, daemon=True)
        self._work, self._grad = work, torch.is_grad_enabled()
        self._value: list[T] = []
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            with torch.set_grad_enabled(self._grad):  # a thread has a grad mode of its own
                self._value.append(self._work())
        except BaseException as error:  # raised again where the result is asked for
            self._error = error

    def result(self) -> T:
        """What the call returned, which is waited for; raises its error if it failed."""
        self.join()
        if self._error is not None:
            raise self._error
        return self._value[0]
