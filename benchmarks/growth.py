"""How a rollout grows with its walks and its steps: CPU time a query, and memory beyond the trajectory.

    (1)  walks   so many walks of 20 steps in items of 64: CPU microseconds a walk and step
    (2)  steps   64 walks of so many steps: the same
    (3)  memory  beyond: the most that torch's tensors take at once while a rollout is collected, less those of its
         trajectory; over the most that a rollout of one item takes

on the network of the default run with random weights, decoded and scored as usual. The time is this process's, and the
rows are measured in turn, round after round, so that others on the machine change little. ``tests/rollout/
test_growth.py`` counts operations and holds the memory.

    python benchmarks/growth.py [--rounds 5] [--json NAME]
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from learner_overhead import digits
from overhead import RESULTS
from timing import machine, seconds

from rlfusion.common.weights import Live
from rlfusion.diffusion.chain import Chain
from rlfusion.rewards import ink
from rlfusion.rollout import Local, Task, plan
from rlfusion.rollout.trajectory import Trajectory, concatenate

sys.path.append(str(Path(__file__).parent.parent / "tests" / "support"))
from counted import Memory

ITEM, WALKS, STEPS, PROMPTS = 64, (64, 256, 1024, 4096), (10, 20, 50, 100), 10


def rollout(steps: int, walks: int) -> Callable[[], Trajectory]:
    """A rollout of so many walks, again and again."""
    torch.manual_seed(0)
    denoiser, shape, decode, _ = digits()
    chain = Chain(steps=steps, kernel="DDIM(eta=1.0)")
    policy = chain.policy(denoiser, [str(i) for i in range(PROMPTS)])
    task = Task(policy, chain.grid(denoiser), shape, torch.arange(PROMPTS), decode, ink, "ink")
    items, local, live = plan(0, 0, 1, walks, ITEM, PROMPTS, 0), Local(task), Live(policy, 0)
    return lambda: concatenate(local.collect(items, live))


def beyond_mb(call: Callable[[], Trajectory]) -> tuple[float, float]:
    """The tensors of a rollout's trajectory, and the most that there was beside them."""
    with Memory() as held:
        walks = call()
        own = sum(v.nbytes for v in vars(walks).values() if isinstance(v, torch.Tensor))
    return own / 2**20, (held.peak - own) / 2**20


def measured(rounds: int) -> list[dict[str, Any]]:
    """A row for each number of walks and of steps."""
    sizes = [(20, walks) for walks in WALKS] + [(steps, ITEM) for steps in STEPS if steps != 20]
    calls = {size: rollout(*size) for size in sizes}
    spent: dict[tuple[int, int], list[float]] = {size: [] for size in sizes}
    for number in range(rounds + 1):
        for size, call in calls.items():
            cost = seconds(call, "cpu", time.process_time)
            spent[size] += [1e6 * cost / (size[0] * size[1])] if number else []
    one = {steps: beyond_mb(calls.get((steps, ITEM)) or rollout(steps, ITEM)) for steps, _ in sizes}
    rows = []
    for (steps, walks), found in spent.items():
        own, beyond = beyond_mb(calls[steps, walks])
        row = {
            "steps": steps,
            "walks": walks,
            "us": statistics.median(found),
            "trajectory_mb": own,
            "beyond_mb": beyond,
        }
        rows.append(row | {"of_one_item": beyond / sum(one[steps])})
    return rows


def main() -> None:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="NAME", help="also write benchmarks/results/NAME.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = measured(args.rounds)
    print("| steps | walks | CPU us a walk and step | trajectory, MB | beyond, MB | beyond / one item |")
    print("|---" * 6 + "|")
    for row in rows:
        cells = [f"{row['us']:.1f}", *(f"{row[n]:.2f}" for n in ("trajectory_mb", "beyond_mb", "of_one_item"))]
        print("| " + " | ".join(map(str, [row["steps"], row["walks"], *cells])) + " |")
    if args.json:
        held = {"machine": machine("cpu"), "rounds": args.rounds, "rows": rows}
        (RESULTS / f"{args.json}.json").write_text(json.dumps(held, indent=1) + "\n")


if __name__ == "__main__":
    main()
