"""What an item costs beside its own work: items of nothing (a tiny network, one step, one walk) on Ray workers over the
same items in this process.

    (1)  wall an item = (t_workers - t_here) / items
    (2)  CPU an item  = (c_workers - c_here) / items,  c of this process and all that it started

One rollout of each is timed in turn, after one that is not counted; the table gives medians and quartiles over rounds.

    python benchmarks/items.py [--workers 1] [--items 200] [--rounds 9] [--walks 1] [--json NAME]
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import machine
from torch import Tensor

from rlfusion.common.tensors import Cond
from rlfusion.common.weights import Weights
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.kernel import DDIM
from rlfusion.diffusion.policy import Policy
from rlfusion.diffusion.schedule import Cosine
from rlfusion.nets.mlp import ResidualMLP
from rlfusion.rollout import Settings, Task, make_backend, plan
from rlfusion.rollout.task import Recipe

RESULTS = Path(__file__).parent / "results"
SHAPE = (1, 2, 2)
TICKS = os.sysconf("SC_CLK_TCK")


def build(config: dict[str, Any], blobs: Mapping[str, bytes]) -> Task:
    """The task of nothing: ``config`` says the steps and the width of the network."""

    def reward(samples: Tensor, cond: Cond) -> Tensor:
        return samples.flatten(1).mean(1)

    torch.manual_seed(0)
    net = ResidualMLP(SHAPE, 1, width=config["width"], depth=1)
    return Task(
        Policy(Denoiser(net, Cosine(), "v"), DDIM(1.0)),
        TimeGrid(config["steps"]),
        SHAPE,
        torch.zeros(1, dtype=torch.int64),
        lambda x: (x + 1) / 2,
        reward,
        "mean",
    )


def cpu_seconds() -> float:
    """Of this process and its descendants that live."""
    parents, used = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        parents[int(stat.parent.name)], used[int(stat.parent.name)] = int(fields[1]), int(fields[11]) + int(fields[12])
    ours = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return sum(used[pid] for pid in ours) / TICKS


def measured(collect: Callable[[], object]) -> tuple[float, float]:
    """The seconds on the wall and of all CPUs that a call takes."""
    cpu, wall = cpu_seconds(), time.perf_counter()
    collect()
    return time.perf_counter() - wall, cpu_seconds() - cpu


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The milliseconds an item of each round, and their quartiles."""
    recipe = Recipe("items:build", {"steps": args.steps, "width": args.width})
    weights = Weights.of(recipe.build().policy, 0)
    rounds: dict[str, list[float]] = {"wall": [], "cpu": [], "here": []}
    with make_backend(recipe, Settings()) as here, make_backend(recipe, Settings(workers=args.workers)) as workers:
        for n in range(args.rounds + 1):
            work = plan(0, n, args.items, args.walks, args.walks, 1, 0)
            own, theirs = (measured(partial(b.collect, work, weights)) for b in (here, workers))
            if n:
                each = [1e3 * (t - o) / args.items for t, o in zip(theirs, own)]
                rounds["wall"].append(each[0])
                rounds["cpu"].append(each[1])
                rounds["here"].append(1e3 * own[0] / args.items)
    return {f"{name}_ms": quartiles(ms) for name, ms in rounds.items()}


def quartiles(values: list[float]) -> dict[str, float]:
    """By name."""
    return dict(zip(("q1", "median", "q3"), statistics.quantiles(values, n=4)))


def main() -> None:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"workers": 1, "items": 200, "rounds": 9, "walks": 1, "steps": 1, "width": 8}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", metavar="NAME", help="also write benchmarks/results/NAME.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(args)
    for name, ms in found.items():
        print(f"{name:8} {ms['median']:8.2f} ms an item   {ms['q1']:.2f} .. {ms['q3']:.2f}")
    if args.json:
        held = {"machine": machine("cpu"), "settings": {name: getattr(args, name) for name in defaults}, **found}
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{args.json}.json").write_text(json.dumps(held, indent=1) + "\n")


if __name__ == "__main__":
    main()
