"""The training of one network on data, in a folder: from the newest checkpoint on, with a bar and logged figures.

The learners of ``pretrain``, ``pretrain-autoencoder`` and ``train-clip`` take the number of the step for a batch, and
draw what it stands for by seed; those of ``distill`` what ``batches`` gives. So a run that goes on makes the same
weights as one that was never stopped.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from rlfusion.common.progress import Progress
from rlfusion.common.stops import Signals
from rlfusion.training import checkpoint
from rlfusion.training.identity import Run
from rlfusion.training.loop import train
from rlfusion.training.optimization import Learner
from rlfusion.training.ranks import current
from rlfusion.training.stages import Stages, counting
from rlfusion.training.timing import Stopwatch
from rlfusion.training.trackers.beside import Beside
from rlfusion.training.tracking import Tracker

LOG_EVERY = 20


class Shown(NamedTuple):
    """What the bar of a training is called, the tag of its logged metrics, the metric beside the bar, and the trackers
    that follow it.
    """

    bar: str
    tag: str
    metric: str = "loss"
    beside: Beside | None = None


def fit(
    learner: Learner[Any],
    run: Run,
    total: int,
    every: int,
    signals: Signals,
    progress: Progress,
    shown: Shown,
    batches: Callable[[int], Iterator[Any]] | None = None,
) -> Tracker:
    """Train ``learner`` in the folder of ``run`` up to step ``total``, from its newest checkpoint on, and save one each
    ``every`` steps; its tracker.

    Args:
        shown: how it is shown and logged.
        batches: what the updates from a step on get; the numbers of their steps by default.

    Raises:
        CheckpointError: no checkpoint is left of those that were saved, or the newest does not fit ``learner``.
        NumericalError: a gradient is not finite; the last checkpoint stands.
        StopRequested: a signal came; all work is saved.
    """
    for note in run.notes:
        progress.say(note)
    start = _taken_up(learner, run, total)
    tracker = Tracker(run.folder, start, shown.beside)
    if tracker.damaged:
        progress.say(f"{tracker.file}: {tracker.damaged} damaged line(s) are left out")
    given = batches(start) if batches else iter(range(start, total))
    stopwatch = Stopwatch(run.folder, start)
    last: dict[str, float] = {}
    with run.writing() as begin, counting(Stages()) as stages, progress.bar(shown.bar, total, start) as drawn:

        def save(step: int) -> None:
            begin(step, learner.state_dict(), last)

        for step, metrics in train(learner, given, start, total, every, save, signals):
            if step == start:
                run.writer.keep.require(metrics)
            last = metrics
            drawn.advance(**{shown.metric: metrics[shown.metric]})
            if (step + 1) % LOG_EVERY == 0 or step + 1 == total:
                tracker.scalars(step + 1, shown.tag, metrics)
                tracker.timing(step + 1, stopwatch.lap(step + 1, 0, stages.taken()))
    return tracker


def _taken_up(learner: Learner[Any], run: Run, total: int) -> int:
    """The step of the run's newest checkpoint, whose state the learner takes up; 0 for none."""
    with current().in_turn():
        found = run.newest(total)
    if found is None:
        return 0
    state = checkpoint.load(found.path)
    with checkpoint.loading(found.path):
        learner.load_state_dict(state)
    return found.step
