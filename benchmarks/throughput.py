"""What workers and ranks cost over one process at equal work, in CPU seconds: where cores are few, the clock on the
wall says nothing of many.

    (1)  workers:  c_here / c_workers of the same items; c of the driver and all that it started, Ray included
    (2)  ranks:    c_here / sum_r c_r of the same updates, each with its rollout, which the ranks walk; V = 2 shares;
                   c_r of the process of rank r

The work is that of a U-Net of 7e6 random weights on 16x16: rollouts of 4 items of 4 walks of 5 steps, DDPO updates with
a KL. One round of each is not counted. (1) alternates within a round; (2) is over the median of this process, before
and after.

    python benchmarks/throughput.py [--rounds 3] [--json NAME]
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from items import measured, quartiles
from timing import machine
from torch import Tensor, nn

from rlfusion.agents.ddpo import Config, Learner
from rlfusion.common.tensors import Cond
from rlfusion.common.weights import Live, Weights
from rlfusion.data import to_pixels
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.kernel import DDIM
from rlfusion.diffusion.policy import Policy, frozen_copy
from rlfusion.diffusion.schedule import Cosine
from rlfusion.nets.unet import UNet
from rlfusion.rollout import Local, Recipe, Settings, Task, make_backend, plan
from rlfusion.rollout.among_ranks import AmongRanks
from rlfusion.rollout.trajectory import concatenate
from rlfusion.training.ranks import Ranks, current, joined

RESULTS = Path(__file__).parent / "results"
SHAPE, CLASSES, STEPS, ITEM, WALKS, SHARES = (3, 16, 16), 4, 5, 4, 4, 2


def build(config: dict[str, Any], blobs: Mapping[str, bytes]) -> Task:
    """The task: a random network, and the mean of a picture as its reward."""

    def reward(samples: Tensor, cond: Cond) -> Tensor:
        return samples.flatten(1).mean(1)

    torch.manual_seed(0)
    net = UNet(SHAPE, CLASSES)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.02)
    policy = Policy(Denoiser(net, Cosine(), "v"), DDIM(1.0))
    return Task(policy, TimeGrid(STEPS), SHAPE, torch.arange(CLASSES), to_pixels, reward, "mean")


def items(iteration: int) -> list:
    """Those of a rollout."""
    return plan(0, iteration, CLASSES, WALKS, ITEM, CLASSES, iteration)


def learn(payload: dict[str, int], actor: Any) -> list[float]:
    """The CPU seconds of each of ``updates`` updates, of all ranks together; one before is not counted."""
    torch.set_num_threads(1)
    ranks, task = current(), build({}, {})
    learner = Learner(task.policy, task.times, Config(updates_per_epoch=1, epochs=1, micro_batch=20))
    local = Local(Task(**{**vars(build({}, {})), "policy": frozen_copy(task.policy)}))
    backend = AmongRanks(local, ranks, whole=False, split=False) if ranks.count > 1 else local
    found = []
    for n in range(payload["updates"] + 1):
        began = time.process_time()
        learner.update(concatenate(backend.collect(items(n), Live(learner.policy, n))))
        spent = ranks.exchange(json.dumps(time.process_time() - began).encode())
        found.append(sum(map(json.loads, spent)))
    return found[1:]


def of_workers(workers: int, rounds: int) -> list[float]:
    """Eq. (1) of each round."""
    recipe = Recipe("throughput:build", {})
    weights = [Weights.of(recipe.build().policy, n) for n in range(rounds + 1)]
    ratios = []
    with make_backend(recipe, Settings()) as here, make_backend(recipe, Settings(workers=workers)) as pool:
        for n, held in enumerate(weights):
            own, theirs = (measured(partial(b.collect, items(n), held))[1] for b in (here, pool))
            ratios.append(own / theirs)
    return ratios[1:]


def of_ranks(count: int, rounds: int) -> list[float]:
    """The CPU seconds of updates in a group of so many ranks."""
    from rlfusion.rollout.ray_cluster import cluster
    from rlfusion.rollout.ray_ranks import GroupSettings, run_in_group

    settings = GroupSettings(count, SHARES, False, cpus=1, gpus=0, threads=1, restarts=0, timeout_s=600, loopback=True)
    with cluster(Settings(), cpus=count):
        return run_in_group(settings, "throughput:learn", {"updates": rounds}, lambda event: None, lambda: 0)


def of_this(rounds: int) -> list[float]:
    """The same in this process."""
    with joined(Ranks(shares=SHARES)):
        return learn({"updates": rounds}, None)


def measure(rounds: int) -> dict[str, Any]:
    """The quartiles of each ratio."""
    found: dict[str, Any] = {f"workers {n}": quartiles(of_workers(n, rounds)) for n in (1, 2)}
    before = of_this(rounds)
    spent = {n: of_ranks(n, rounds) for n in (1, 2)}
    here = statistics.median([*before, *of_this(rounds)])
    return found | {f"ranks {n}": quartiles([here / seconds for seconds in spent[n]]) for n in spent}


def main() -> None:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="2 at least")
    parser.add_argument("--json", metavar="NAME", help="also write benchmarks/results/NAME.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[1]
    found = measure(args.rounds)
    for name, share in found.items():
        print(f"{name:10} {share['median']:.3f} of one process   {share['q1']:.3f} .. {share['q3']:.3f}")
    if args.json:
        held = {"machine": machine("cpu"), "load": round(load, 1), "rounds": args.rounds, "efficiency": found}
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{args.json}.json").write_text(json.dumps(held, indent=1) + "\n")


if __name__ == "__main__":
    main()
