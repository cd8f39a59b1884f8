"""The deadlines and budgets of the items and workers of rollouts, as settings."""

from dataclasses import dataclass

from rlfusion.common.errors import ConfigError, require_not_negative, require_positive

FEWEST_CRASHES = 2


@dataclass(frozen=True)
class Limits:
    """Deadlines in seconds, and the two budgets: of an item's own failures, and of lost workers.

    Attributes:
        item_s: within which a worker finishes one item while no item has been done, else it is taken to hang and
            killed. Once items have been done, the time is a multiple of what they took.
        item_times: that multiple, of the 99th percentile of the seconds a sample of the last 200 items.
        item_floor_s: its least value, at most ``item_s``; more than a reward may have to wait for a server of its own.
        twin_times: an item that runs for longer than this multiple of the median seconds a sample is also given to a
            worker that has nothing else to do; the first answer counts, and a second one that differs is an error. 0
            gives no twins, for rewards that are not the same twice.
        start_s: within which a new worker is placed and has built its task, and a rank that learns is placed. A worker
            that finds no room waits for longer while others work.
        crashes: how often one item may fail, each time on another worker, before it ends the run: by its own error,
            with the process that it runs in, or past its time (the next one has twice the time, then four times).
        preemptions: workers that may be lost, with their node or alone, as a multiple of the workers, before an item is
            done again.

    Raises:
        ConfigError: a number that is not above 0, ``item_times`` or ``twin_times`` below 1, one ``crashes``, or a floor
            above ``item_s``.
    """

    item_s: float = 1800.0
    item_times: float = 10.0
    item_floor_s: float = 150.0
    twin_times: float = 3.0
    start_s: float = 300.0
    crashes: int = 3
    preemptions: int = 3

    def __post_init__(self) -> None:
        require_positive(self, "item_s", "item_times", "item_floor_s", "start_s", "crashes", "preemptions")
        require_not_negative(self, "twin_times")
        if not self.item_times >= 1:
            raise ConfigError(f"item_times = {self.item_times:g}: expected a number >= 1, as items vary")
        if 0 < self.twin_times < 1:
            raise ConfigError(f"twin_times = {self.twin_times:g}: expected a number >= 1, or 0 for no twins")
        if self.crashes < FEWEST_CRASHES:
            raise ConfigError(
                f"crashes = {self.crashes}: expected at least {FEWEST_CRASHES}, so that an item that fails is tried on "
                "another worker"
            )
        if self.item_floor_s > self.item_s:
            raise ConfigError(
                f"item_floor_s = {self.item_floor_s:g}: expected at most item_s = {self.item_s:g}, the time of the "
                "first items"
            )
