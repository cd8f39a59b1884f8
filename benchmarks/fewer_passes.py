"""What fewer passes of the network save, and how soon a training then comes to a reward.

    (1)  factor  CPU seconds of a rollout and its one update, with a second forward pass over those without
                 (``agent.fused``), and the most that either holds beside the weights (tensors, MB)
    (2)  climb   CPU seconds of the training, and rewards asked for, until a rollout's mean reward is so many standard
                 deviations above the first one's; KL to the base there, in nats a walk

"digits" and "pipeline" of (1) are the cases of ``learner_overhead.py``; those of (2) are the base model of the default
run on ``ink``, and the tiny Stable Diffusion of ``peers.py`` on red above blue.

    python benchmarks/fewer_passes.py factor [--rounds 9]
    python benchmarks/fewer_passes.py climb [--case digits] [--seeds 0,1,2] [--seconds 60] [--only fused]
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from learner_overhead import CASES
from timing import compare

import rlfusion as rlf
from rlfusion.agents import AGENTS
from rlfusion.diffusion.chain import Chain
from rlfusion.finetuning import Run
from rlfusion.rewards import ink
from rlfusion.rollout import Task, plan, run_item
from rlfusion.rollout.trajectory import concatenate

sys.path.append(str(Path(__file__).parent.parent / "tests" / "support"))
from counted import Memory

ONE = {"epochs": 1, "updates_per_epoch": 1}
STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "all steps": ("ddpo", {"kl_loss": 0.0}),
    "all steps, KL": ("ddpo", {"kl_loss": 0.2}),
    "half of the steps": ("ddpo", {"kl_loss": 0.0, "step_fraction": 0.5}),
    "a window of 2 steps": ("grpo", {"kl_loss": 0.0, "window": 2}),
}


def iteration(case: str, agent: str, settings: dict[str, Any]) -> Callable[[], None]:
    """A rollout and its update, again and again."""
    held = CASES[case]
    torch.manual_seed(0)
    denoiser, shape, decode, _ = held.make()
    chain = Chain(steps=held.steps, kernel="DDIM(eta=1.0)", spacing=held.spacing)
    policy = chain.policy(denoiser, [str(i) for i in range(held.prompts)])
    config = AGENTS[agent](lr=1e-7, micro_batch=held.micro_batch, **settings)
    spec, conditions = config.rollout_spec(held.steps), torch.arange(held.prompts)
    task = Task(policy, chain.grid(denoiser), shape, conditions, decode, ink, "ink", "cpu", spec)
    learner = config.learner(task, None, 0)
    size = min(held.micro_batch, held.walks)
    items = plan(0, 0, held.prompts, held.walks // held.prompts, size, held.prompts, 0)

    def once() -> None:
        batch = concatenate([run_item(task, item) for item in items])
        learner.update(replace(batch, version=learner.iteration))

    return once


def peak_mb(call: Callable[[], None]) -> float:
    """The most memory of tensors that a call holds at once."""
    with Memory() as held:
        call()
    return held.peak / 2**20


def factor(rounds: int, only: str) -> None:
    """Print how much sooner a rollout and its update are done in one pass than in two."""
    print(f"{'case':10}{'learns from':22}{'fused ms':>9}{'factor':>8}   quartiles      held MB, with two passes")
    for case in CASES:
        for name, (agent, settings) in STEPS.items():
            if only not in name:
                continue
            ours, two = (iteration(case, agent, ONE | settings | {"fused": fused}) for fused in (True, False))
            m = compare(two, ours, rounds, "cpu", time.process_time)
            held = [peak_mb(call) for call in (ours, two)]
            print(
                f"{case:10}{name:22}{m['floor_ms']:9.1f}{m['ratio']:8.2f}   {m['q1']:.2f} .. {m['q3']:.2f}"
                f"{held[0]:14.1f}{held[1]:8.1f}",
                flush=True,
            )


def warm(samples: torch.Tensor, cond: Any) -> torch.Tensor:
    """Red above blue, of images (B, 3, H, W)."""
    return 100 * (samples[:, 0] - samples[:, 2]).mean((1, 2))


CLIMBS: dict[str, tuple[tuple[float, ...], dict[str, dict[str, Any]]]] = {
    "digits": (
        (1.0, 2.0),
        {
            "ddpo": {"kl_loss": 0.1},
            "target_kl .003": {"kl_loss": 0.1, "target_kl": 0.003},
            "half of the steps": {"kl_loss": 0.1, "step_fraction": 0.5},
            "4 passes": {"kl_loss": 0.1, "epochs": 4, "updates_per_epoch": 1, "clip": 0.5},
            "4 passes, KL .01": {"kl_loss": 0.1, "epochs": 4, "updates_per_epoch": 1, "clip": 0.5, "target_kl": 0.01},
            "1 update, 3e-3": ONE | {"kl_loss": 0.1, "lr": 3e-3},
            "fused, 1e-3": {"kl_loss": 0.1, "fused": True},
            "fused, 3e-3": {"kl_loss": 0.1, "fused": True, "lr": 3e-3},
        },
    ),
    "pipeline": (
        (0.5, 1.0, 2.0),
        {
            "ddpo": {},
            "half of the steps": {"step_fraction": 0.5},
            "1 update, 3e-4": ONE | {"pace": None, "lr": 3e-4},
            "fused, 1e-4": {"fused": True, "lr": 1e-4},
            "fused, 3e-4": {"fused": True, "lr": 3e-4},
            "fused, 1e-3": {"fused": True, "lr": 1e-3},
        },
    ),
}
"""The gains of each case, and the agents: settings of ``ddpo``."""


def begun(case: str, agent: dict[str, Any], seed: int, root: Path) -> Run:
    """A training that goes on until it is left."""
    settings = {"agent": {"name": "ddpo"} | agent, "updates": 10**6, "seed": seed, "device": "cpu", "root": str(root)}
    if case == "digits":
        of_base = {"train": {"label_noise": 0.0}, "model": {"kind": "v"}}
        return rlf.finetune(reward="ink", pretrain=of_base, chain={"guidance": 1.0}, **settings)
    chain = {"steps": 5, "guidance_scale": 5.0}
    given = {"pipeline": {"prompts": str(root / "prompts.txt")}, "chain": chain}
    return rlf.finetune(str(root / "model"), warm, **given, **settings)


def climb(case: str, agent: dict[str, Any], seed: int, root: Path, most_s: float) -> dict[float, tuple[float, ...]]:
    """CPU seconds, rewards and KL at the first rollout of each gain; those of the last at infinity."""
    run, found = begun(case, agent, seed, root), {}
    start: dict[str, float] = {}
    begin = time.process_time()
    for metrics in run:
        spent = time.process_time() - begin
        start = start or metrics
        gain = (metrics["reward"] - start["reward"]) / start["reward_std"]
        at = (spent, metrics["queries"], metrics.get("kl", float("nan")), gain)
        found |= {goal: at for goal in CLIMBS[case][0] if gain >= goal and goal not in found}
        found[float("inf")] = at
        if spent > most_s or len(found) > len(CLIMBS[case][0]):
            return found
    return found


def climbs(case: str, seeds: list[int], most_s: float, only: str) -> None:
    """Print after how many CPU seconds and rewards each setting has the gains of the table."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        if case == "pipeline":
            from peers import PROMPTS, base

            base(root / "model", "tiny")
            (root / "prompts.txt").write_text("\n".join(PROMPTS))
        goals = CLIMBS[case][0]
        print(
            f"{case:10}{'agent':22}seed   CPU s, rewards, KL at gain {', '.join(map(str, goals))}; the end", flush=True
        )
        for name, agent in CLIMBS[case][1].items():
            for seed in seeds if only in name else []:
                found = climb(case, agent, seed, root, most_s)
                cells = [
                    "{:6.1f} {:5.0f} {:6.2f}".format(*found[goal][:3]) if goal in found else f"{'-':>20}"
                    for goal in goals
                ]
                spent, asked, _, gain = found[float("inf")]
                end = f"{spent:.1f} s, {asked:.0f}, gain {gain:.2f}"
                print(f"{case:10}{name:22}{seed:4}   {'  |'.join(cells)}  | {end}", flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("factor", "climb"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--case", choices=sorted(CLIMBS), action="append", help="default: both")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--seconds", type=float, default=60.0, help="CPU seconds of a run at most")
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.what == "factor":
        factor(args.rounds, args.only)
        return
    for case in args.case or sorted(CLIMBS):
        climbs(case, [int(seed) for seed in args.seeds.split(",")], args.seconds, args.only)


if __name__ == "__main__":
    main()
