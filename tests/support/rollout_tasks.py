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
from rlfusion.nets.mlp import ResidualMLP
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


def make_recipe(fault: str = "", marker: Path | None = None) -> Recipe:
    return Recipe("rollout_tasks:build", {"fault": fault, "marker": str(marker)})


def build(config, blobs) -> Task:
    def reward(samples, cond):
        misbehave(config["fault"], Path(config["marker"]))
        return samples.flatten(1).mean(1) + (torch.nan if config["fault"] == "nan" else 0)

    if config["fault"] == "build":
        raise FileNotFoundError("no such model: base.safetensors")
    return Task(
        make_policy(seed=1), TimeGrid(4), SHAPE, torch.arange(CLASSES), to_pixels, reward, "brightness", device="cpu"
    )


def misbehave(fault: str, marker: Path) -> None:
    """Die always ("die"), hang in the first process that comes here ("stop"), or say who works and wait ("slow")."""
    if fault == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "slow":
        marker.with_name(f"{marker.name}.{os.getpid()}").touch()
        time.sleep(0.2)
    if fault == "stop":
        try:
            marker.touch(exist_ok=False)
        except FileExistsError:
            return
        marker.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)


def assert_identical(a: Trajectory, b: Trajectory) -> None:
    for field in fields(Trajectory):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, torch.Tensor):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
        else:
            assert x == y
