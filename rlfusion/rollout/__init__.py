"""Rollouts: work items, and the backends that run them.

with make_backend(Recipe("package.module:build", config, blobs), Settings(workers=2)) as backend:
    trajectories = backend.collect(plan(...), Weights.of(policy, version))
"""

from rlfusion.rollout.backend import Backend, Pending, Settings
from rlfusion.rollout.bundle import Keep
from rlfusion.rollout.commands import RolloutError
from rlfusion.rollout.item import WorkItem, plan, rollout_noise, version_for
from rlfusion.rollout.limits import Limits
from rlfusion.rollout.local import Local
from rlfusion.rollout.rollout_spec import RolloutSpec, Start, Trained, Window, prefix, samples, transitions
from rlfusion.rollout.task import Recipe, Task, run_item

__all__ = [
    "Backend",
    "Keep",
    "Limits",
    "Local",
    "Pending",
    "Recipe",
    "RolloutError",
    "RolloutSpec",
    "Settings",
    "Start",
    "Task",
    "Trained",
    "Window",
    "WorkItem",
    "make_backend",
    "plan",
    "prefix",
    "rollout_noise",
    "run_item",
    "samples",
    "transitions",
    "version_for",
]


def make_backend(recipe: Recipe, settings: Settings, keep: Keep | None = None) -> Backend:
    """The backend of ``settings``: in this process for 0 workers, else Ray, which only then is imported. ``keep`` says
    where items that fail on every worker are kept.
    """
    if settings.workers == 0:
        return Local(recipe.build(), settings.overlap)
    from rlfusion.rollout.ray_backend import RayBackend

    return RayBackend(recipe, settings, keep)
