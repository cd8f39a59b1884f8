"""AWM's ratio with old and new losses at one noise, and at two: the spread of the gradient at equal network calls.

    (1)  log r = l_old(t, eps) - l_theta(t, eps)            noise in common
    (2)  log r = l_old(t', eps') - l_theta(t, eps)          drawn anew

One rollout of the base model of digits; theta is what a rollout's updates made of it. Over many draws of the noise: the
standard deviation of log r, the share of ratios that are clipped, and the noise of the gradient, tr Cov / |mean|^2.

    python benchmarks/common_noise.py benchmarks/learners/ink.yaml [--draws 64] [--root runs/learners]
"""

import argparse
import copy
from pathlib import Path

import torch

from rlfusion import models
from rlfusion.agents.awm import Config, Learner
from rlfusion.cli.arguments import settings_of
from rlfusion.common.progress import Progress
from rlfusion.common.stops import Signals
from rlfusion.config import Compare
from rlfusion.data import load, to_pixels
from rlfusion.jobs.measure import make_reward
from rlfusion.jobs.pretrain import base_model
from rlfusion.rl.advantage import relative
from rlfusion.rollout import Task, plan, run_item
from rlfusion.training.devices import set_numerics

PROMPTS, EACH = 10, 16


def measured(config: Compare, per: str, draws: int) -> None:
    """Print a line for each way to draw, with the ratio of a feature or of a sample."""
    root = Path(config.root)
    denoiser, card = models.load(base_model(config.pretrain, root, torch.device("cpu"), Signals(), Progress()))
    policy, data = config.chain.policy(denoiser, card.names), load(config.pretrain.data, config.pretrain.size)
    reward = make_reward(config.rewards[0], {}, data, root)
    settings = Config(per=per)
    task = Task(
        policy, config.chain.grid(denoiser), card.shape, torch.arange(PROMPTS), to_pixels, reward, config.rewards[0],
        rollout_spec=settings.rollout_spec(config.chain.steps),
    )  # fmt: skip
    learner = Learner(policy, task.times, settings)
    batch = run_item(task, plan(0, 0, PROMPTS, EACH, PROMPTS * EACH, PROMPTS, 0)[0])
    old = Learner(copy.deepcopy(policy), task.times, settings)
    learner.update(batch)
    walks = torch.arange(len(batch))
    advantage = relative(batch.reward, batch.group, settings.baseline, settings.std, settings.advantage_clip)
    for name, key in (("in common", "one"), ("drawn anew", "other")):
        gradients, ratios = [], []
        for i in range(draws):
            policy.zero_grad()
            before = old.losses(batch, walks, (i, key))
            records = learner.accumulate(batch, advantage, walks, (i, "one"), before)
            gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
            ratios.append(torch.cat([record["log_ratio"] for record in records]))
        g, log_ratio = torch.stack(gradients).double(), torch.cat(ratios)
        spread = (g.var(0).sum() / (g.mean(0).square().sum() - g.var(0).sum() / draws)).item()
        clipped = ((log_ratio.exp() - 1).abs() > settings.clip_high).double().mean().item()
        told = f"log r {log_ratio.std():.3g}, clipped {clipped:.1%}, tr Cov / |mean|^2 {spread:.3g}"
        print(f"per {per}, noise {name}: {told}", flush=True)


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file of rlfusion compare")
    parser.add_argument("--draws", type=int, default=64)
    parser.add_argument("--root", default="runs/learners")
    args = parser.parse_args()
    set_numerics(1, torch.device("cpu"))
    config = settings_of("compare", ["--config", args.config, "--root", args.root])
    for per in ("feature", "sample"):
        measured(config, per, args.draws)


if __name__ == "__main__":
    main()
