"""Trackers beside TensorBoard, ``--track wandb,mlflow``: what each must do, those that are built in, and one at work.

base          what a tracker is, and what it is told of a run
to_wandb, to_trackio, to_mlflow
feed          a tracker in a thread of its own, so that training never waits for it
beside        all trackers of a run, and which of their runs it goes on in
"""

from collections.abc import Sequence

from rlfusion.common import spec
from rlfusion.common.errors import ConfigError, RlfusionError
from rlfusion.common.registry import Registry
from rlfusion.common.user_code import described
from rlfusion.training.trackers.base import At, Followed, Opened, RunTracker

__all__ = ["TRACKERS", "At", "Followed", "Opened", "RunTracker", "make_tracker", "require_trackers", "require_usable"]

TRACKERS = Registry(
    "tracker",
    "rlfusion.trackers",
    {
        "wandb": "rlfusion.training.trackers.to_wandb:Wandb",
        "trackio": "rlfusion.training.trackers.to_trackio:Trackio",
        "mlflow": "rlfusion.training.trackers.to_mlflow:Mlflow",
    },
    RunTracker,
)


def make_tracker(text: str) -> RunTracker:
    """The tracker that a text writes.

    Raises:
        ConfigError: no such tracker or setting.
    """
    return spec.parse(text, TRACKERS, "tracker")


def require_trackers(texts: Sequence[str]) -> None:
    """
    Raises:
        ConfigError: a text is no tracker, or is there twice.
    """
    for text in texts:
        make_tracker(text)
    if len(set(texts)) < len(texts):
        raise ConfigError(f"track = {list(texts)}: expected each once")


def require_usable(texts: Sequence[str]) -> None:
    """
    Raises:
        ConfigError: one of these trackers cannot work here: its package or its account is missing.
    """
    for text in texts:
        try:
            make_tracker(text).check()
        except RlfusionError:
            raise
        except Exception as error:  # whatever another library, or a stranger's tracker, says of itself
            raise ConfigError(f"track = {text}: {described(error)}") from error
