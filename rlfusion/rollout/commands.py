"""What the scheduler of items tells its caller to do, and the errors that end its work."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from rlfusion.common.errors import RlfusionError, UnavailableError


@dataclass(frozen=True)
class Start:
    """Start the new worker ``worker``."""

    worker: int


@dataclass(frozen=True)
class Assign:
    """Give ``item`` to the idle worker ``worker``: a twin, where others are ``slow`` with it."""

    worker: int
    item: int
    slow: tuple[int, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Kill:
    """Kill ``worker``; nothing that it still says matters."""

    worker: int


@dataclass(frozen=True)
class GiveUp:
    """``item`` is poisonous: it will not be tried again. ``failed`` says how it failed on each worker."""

    item: int
    name: str
    failed: Mapping[int, str]


Command = Start | Assign | Kill | GiveUp


class RolloutError(UnavailableError):
    """Workers cannot be had, or were lost more often than the limits allow."""


class TwinsDiffer(RlfusionError):
    """Two workers of one kind gave different answers to one item."""

    exit_code = 4
