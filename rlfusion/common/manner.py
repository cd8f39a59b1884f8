"""How much a command says of its work."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple


class Manner(NamedTuple):
    """All; with ``quiet`` errors and the last line alone; with ``json`` on standard output the summary alone, as one
    line of JSON, beside what stderr shows.
    """

    quiet: bool = False
    json: bool = False


_manner: ContextVar[Manner | None] = ContextVar("manner", default=None)


def manner() -> Manner:
    """That of the command at work."""
    return _manner.get() or Manner()


@contextmanager
def speaking(how: Manner) -> Iterator[None]:
    """Within the context commands say so much."""
    token = _manner.set(how)
    try:
        yield
    finally:
        _manner.reset(token)
