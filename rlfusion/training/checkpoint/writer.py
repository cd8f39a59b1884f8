"""Checkpoints written while training goes on: one at a time, in a thread, from a copy of the state.

The copy is taken in memory that is kept from one checkpoint to the next. The next one, a stop and the end of training
wait for the one that is being written; what failed in the thread is raised there.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlfusion.common import shards, storage
from rlfusion.common.errors import RlfusionError
from rlfusion.common.stops import StopRequested, leaving
from rlfusion.training.checkpoint.keep import Keep
from rlfusion.training.checkpoint.manifest import CheckpointError, Owner, Snapshot, snapshot
from rlfusion.training.checkpoint.saving import Commit, commit
from rlfusion.training.ranks import current

LEAVING_S = 60.0
"""For which a process that ends at once waits for the checkpoint that it is writing."""


class Writer:
    """Writes the checkpoints of a run into ``folder``, one at a time, of which those stay that ``keep`` says.

    Attributes:
        keep: with ``keep.background`` false each is written before ``begin`` returns.
        size: the bytes of tensors of the last checkpoint.
    """

    def __init__(self, folder: Path, keep: Keep) -> None:
        self.folder, self.keep = folder, keep
        self.size = 0
        self._thread = ThreadPoolExecutor(1, "rlfusion-checkpoint")
        self._going: Future[None] | None = None
        self._kept: Snapshot | None = None

    def begin(
        self,
        step: int,
        state: Mapping[str, Any],
        owner: Owner,
        metrics: Mapping[str, float],
        written: Callable[[], None],
    ) -> None:
        """Begin to write ``state`` as the checkpoint of ``step``, once the one before is written. ``written`` is called
        when it is, in the thread.

        Raises:
            StorageError, CheckpointError: the one before, or without ``keep.background`` this one, was not written.
            TypeError: as ``checkpoint.save``.
        """
        metric = self.keep.metric(metrics)
        if step < 0:
            raise CheckpointError(f"step = {step}: expected step >= 0")
        if not (storage.writes() or shards.active()):
            return
        self.settle()
        held = snapshot(state, self._kept)
        if not held.is_for_here:
            return
        self._kept = held if self.keep.background else None
        copied = [t for of in (held.shards, held.split) for shard in of.values() for t in shard.values()]
        self.size = sum(t.numel() * t.element_size() for t in copied)
        about = Commit(step, owner, self.keep, metric, current())
        if any(held.split.values()):
            about.ranks.meet_beside()

        def write() -> None:
            commit(self.folder, about, held)
            written()

        self._going = self._thread.submit(write)
        if not self.keep.background:
            self.settle()

    def settle(self) -> None:
        """Wait until what was begun is written.

        Raises:
            StorageError, CheckpointError: it was not written.
        """
        going, self._going = self._going, None
        if going is not None:
            going.result()

    @contextmanager
    def open(self) -> Iterator["Writer"]:
        """What is begun within the context is written when it ends, also by a stop. An error that ends it is raised
        after the wait, before one of the writing.

        Raises:
            StorageError, CheckpointError: what was begun last was not written.
        """
        try:
            with leaving(self._left):
                yield self
        except StopRequested:
            self.settle()
            raise
        except BaseException as error:
            try:
                self.settle()
            except RlfusionError as unwritten:
                error.add_note(f"and the last checkpoint was not written: {unwritten}")
            raise
        self.settle()

    def _left(self, saved: bool) -> str:
        """The process ends at once: wait for what is being written. It has nothing to say of it."""
        if self._going is not None:
            wait_for([self._going], LEAVING_S)
        return ""
