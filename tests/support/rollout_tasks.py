"""Tasks that the rollout tests build in their own process and, by name, in Ray workers; equality of what they give."""

import os
import signal
import time
from dataclasses import fields
from pathlib import Path

import torch

from rlfusion.data import to_pixels
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.kernel import DDIM
from rlfusion.diffusion.policy import Policy
from rlfusion.diffusion.schedule import Cosine
from rlfusion.jobs.tasks import from_actors
from rlfusion.nets.mlp import ResidualMLP
from rlfusion.rewards import task_info
from rlfusion.rollout import Recipe, Task
from rlfusion.rollout.trajectory import Trajectory

SHAPE, CLASSES = (1, 4, 4), 3


def make_policy(seed: int = 0) -> Policy:
    """A small random policy whose output depends on all of its weights."""
    torch.manual_seed(seed)
    net = ResidualMLP(SHAPE, CLASSES, width=16, depth=1)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return Policy(Denoiser(net, Cosine(), "v"), DDIM(1.0))


def make_recipe(fault: str = "", marker: Path | None = None, actors: dict[str, list[str]] | None = None) -> Recipe:
    """``actors``: the names of the running actors of one reward, by its name, that is to be asked."""
    return Recipe("rollout_tasks:build", {"fault": fault, "marker": str(marker), "actors": actors or {}})


def build(config, blobs) -> Task:
    def reward(samples, cond):
        odd = misbehave(config["fault"], Path(config["marker"]))
        return samples.flatten(1).mean(1) + (torch.nan if config["fault"] == "nan" else odd)

    asked = from_actors(config["actors"], task_info(("a", "b", "c"), SHAPE), 60.0)
    name = config["marker"] if config["fault"] == "named" else "brightness"
    if config["fault"] == "build":
        raise FileNotFoundError("no such model: base.safetensors")
    return Task(
        make_policy(seed=1),
        TimeGrid(4),
        SHAPE,
        torch.arange(CLASSES),
        to_pixels,
        [*asked.values(), reward][0],
        name,
        device="cpu",
    )


def misbehave(fault: str, marker: Path) -> float:
    """Die always ("die"), say who works and wait ("slow", "slower"); or in the first process that comes here hang
    ("stop"), raise ("once"), wait until the marker is gone ("wait"), and give another reward ("differ") by what is
    returned.
    """
    if fault == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault in ("slow", "slower"):
        marker.with_name(f"{marker.name}.{os.getpid()}").touch()
        time.sleep(0.2 if fault == "slow" else 1.0)
    if fault in ("stop", "once", "wait", "differ") and _first(marker):
        if fault == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if fault == "once":
            raise ValueError("this machine is broken")
        while marker.exists():
            time.sleep(0.05)
        return 1.0 if fault == "differ" else 0.0
    return 0.0


def _first(marker: Path) -> bool:
    """Whether this is the first call of all that ever were, in any process; the marker then has its number."""
    try:
        marker.with_suffix(".began").touch(exist_ok=False)
    except FileExistsError:
        return False
    marker.write_text(str(os.getpid()))
    return True


def assert_identical(a: Trajectory, b: Trajectory) -> None:
    for field in fields(Trajectory):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, torch.Tensor):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
        else:
            assert x == y
