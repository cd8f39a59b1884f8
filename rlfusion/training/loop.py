"""The one training loop.

    for step, metrics in train(learner, batches, ...): ...           the caller logs, draws, stops

Work is saved every so many steps and when a signal asks to stop; what resumes continues bit for bit.
"""

import signal
from collections.abc import Callable, Iterator
from typing import Any

from rlfusion.common.stops import Signals, StopRequested
from rlfusion.training.optimization import Learner
from rlfusion.training.ranks import current
from rlfusion.training.stages import CHECKPOINT, LEARN, stage


def asked(signals: Signals) -> bool:
    """Whether the first of the ranks has heard a signal to stop."""
    return bool(current().of_first(bool(signals.requested)))


def stop_if_asked(signals: Signals) -> None:
    """Raise StopRequested on all ranks if the first of them has heard a signal."""
    if asked(signals):
        signals.check()
        raise StopRequested(signal.SIGTERM, signals.saved)  # only the first has heard of it yet


def train(
    learner: Learner[Any],
    batches: Iterator[Any],
    start: int,
    total: int,
    every: int,
    save: Callable[[int], None],
    signals: Signals,
) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield (step, metrics) for step = start..total-1, ``batches`` giving one batch a step.

    ``save(n)`` is called with n steps done: every ``every`` steps, at the end, and before stopping for a signal.

    Raises:
        StopRequested: a signal came; all updates that were done are saved.
    """
    unsaved = False

    def keep(done: int) -> None:
        nonlocal unsaved
        with stage(CHECKPOINT):
            save(done)
        unsaved, signals.saved = False, True
        signals.hold(False)

    stop_if_asked(signals)
    try:
        for step, batch in zip(range(start, total), batches):
            try:
                with stage(LEARN):
                    metrics = learner.update(batch)
            except StopRequested as stop:  # within Signals.prompt: the learner is as it was after the update before
                if unsaved:
                    keep(step)
                raise StopRequested(stop.number, signals.saved) from stop  # of the ranks, the others may be in wait
            unsaved = True
            signals.hold(True)
            yield step, metrics
            done = step + 1
            if done % every == 0 or done == total or asked(signals):
                keep(done)
                stop_if_asked(signals)
    finally:
        signals.hold(False)
