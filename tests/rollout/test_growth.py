"""How rollouts grow: no more work a walk and a step than in small ones, and memory for the trajectory and one item."""

from collections import Counter
from dataclasses import replace

import torch
from counted import Memory, counting
from rollout_tasks import CLASSES, build, make_recipe

from rlfusion.common import seeding
from rlfusion.common.weights import Live
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.nets.mlp import ResidualMLP
from rlfusion.rollout import Local, Task, kept, plan
from rlfusion.rollout.trajectory import Trajectory, concatenate


def task_of(steps: int, side: int = 4) -> Task:
    task = build(make_recipe().config, {})
    net = ResidualMLP((1, side, side), CLASSES, width=8, depth=1)
    task.policy.denoiser.net = net
    return replace(task, grid=TimeGrid(steps), shape=(1, side, side))


def collected(task: Task, walks: int, item: int) -> Trajectory:
    items = plan(0, 0, 1, walks, item, CLASSES, 0)
    return concatenate(Local(task).collect(items, Live(task.policy, 0)))


def operations(steps: int, walks: int) -> Counter[str]:
    """Of a rollout in items of 64, after one that has filled what is made once."""
    task = task_of(steps)
    collected(task, 64, 64)
    with counting() as ops:
        collected(task, walks, 64)
    return ops


def test_the_work_of_a_step_does_not_grow_with_the_steps():
    few, more, many = (sum(operations(steps, 64).values()) for steps in (10, 20, 100))
    assert many - few == 9 * (more - few)


def test_the_work_of_an_item_does_not_grow_with_the_walks():
    one, two, many = (sum(operations(4, 64 * items).values()) for items in (2, 3, 10))
    assert many - one == 8 * (two - one)


def peak(task: Task, items: int) -> tuple[int, int]:
    """Bytes of the states of a rollout, and the most that there were while it was collected."""
    collected(task, 8, 8)
    with Memory() as memory:
        whole = collected(task, 8 * items, 8)
        assert memory.now >= whole.x.nbytes
    assert whole.x.shape == (8 * items, 81, 1, 8, 8)
    return whole.x.nbytes, memory.peak


def test_beside_the_trajectory_there_is_memory_for_one_item_at_most(monkeypatch):
    """Noise is numpy's, and is not counted: ``BLOCK`` bounds it, and ``AT_ONCE`` the steps that wait."""
    monkeypatch.setattr(seeding, "BLOCK", 1)
    monkeypatch.setattr(kept, "AT_ONCE", 1)
    task = task_of(80, side=8)
    (held, one), (whole, many) = peak(task, 1), peak(task, 6)
    assert one <= 1.3 * held
    assert many - whole <= 1.2 * one


def test_the_environment_of_an_item_is_made_once():
    task = task_of(4)
    items = {count: plan(0, 0, 1, count, count, 1, 0)[0] for count in (8, 3)}
    assert task._environment_of(items[8]) is task._environment_of(items[8])
    assert [task._environment_of(items[count]).num_envs for count in (8, 3, 8)] == [8, 3, 8]
    assert len(task._environments) == 1
    one, other = (collected(task, walks, 8) for walks in (8, 20))
    assert torch.equal(one.x, other.x[:8])
