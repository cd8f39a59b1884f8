"""What learners do to students of few steps, on a line: two modes at -1 and 1, each of std .1.

The student is the map of the probability-flow ODE from x_t to its end, as a consistency function or a distilled
generator has it, learned by regression on the exact ODE. It samples in K steps, each to the end and noised again. The
reward prefers the upper mode: R = tanh(3 x). Told are the mean reward before and after, and the share of samples that
are in neither mode, |x| < .5, which a blur raises: the ODE's own is about 1 %.

    python benchmarks/few_steps.py [--rollouts 40] [--seeds 3]
"""

import argparse
import copy
import math
from dataclasses import replace
from statistics import mean

import torch
from torch import Tensor, nn

from rlfusion.agents import AGENTS
from rlfusion.common import spec
from rlfusion.common.errors import RlfusionError
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.kernel import Renoise
from rlfusion.diffusion.policy import Policy
from rlfusion.diffusion.schedule import Rectified
from rlfusion.rollout import Task, plan, run_item
from rlfusion.training.devices import set_numerics

VAR, WALKS, PROMPTS = 0.01, 256, 2
STEPS = (1, 2, 4)
LEARNERS = {
    "ddpo": "ddpo(lr=0.0003, kl_loss=0.0)",
    "grpo": "grpo(lr=0.0003, kl_loss=0.0)",
    "awm": "awm(lr=0.0003)",
    "awm, Chain()": "awm(lr=0.0003, times='Chain()')",
    "nft": "nft(lr=0.0003)",
    "dpo": "dpo(lr=0.0003)",
    "drwr, noised": "drwr(lr=0.0003, on='noised')",
    "drwr, chain": "drwr(lr=0.0003, on='chain')",
    "draft": "draft(lr=0.0003)",
}


class Student(nn.Module):
    """x0 (B, 1) of x_t (B, 1) and t (B,)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, x: Tensor, t: Tensor, cond: object) -> Tensor:
        return self.layers(torch.cat([x, t.reshape(-1, 1).to(x)], 1))


def denoised(x: Tensor, t: Tensor) -> Tensor:
    """E[x0 | x_t] of the two modes under x_t = (1 - t) x0 + t eps."""
    a = 1 - t
    spread = a**2 * VAR + t**2
    return torch.tanh(a * x / spread) * (1 - a**2 * VAR / spread) + a * VAR / spread * x


def ends(x: Tensor, t: Tensor, steps: int = 100) -> Tensor:
    """The end of the probability-flow ODE from x at t, by Heun's rule."""
    for k in range(steps):
        now, to = t * (1 - k / steps), t * (1 - (k + 1) / steps)
        slope = (x - denoised(x, now)) / now
        if k < steps - 1:
            guess = x + (to - now) * slope
            slope = (slope + (guess - denoised(guess, to)) / to) / 2
        x = x + (to - now) * slope
    return x


def student(seed: int, updates: int = 1500) -> Student:
    """One that was taught by regression."""
    torch.manual_seed(seed)
    net, draw = Student(), torch.Generator().manual_seed(seed)
    t = torch.rand(20_000, 1, generator=draw).clamp(min=0.02)
    x0 = torch.randn(len(t), 1, generator=draw) * math.sqrt(VAR) + 2 * torch.randint(2, t.shape, generator=draw) - 1
    x = (1 - t) * x0 + t * torch.randn(t.shape, generator=draw)
    x, t = torch.cat([x, torch.randn(10_000, 1, generator=draw)]), torch.cat([t, torch.ones(10_000, 1)])
    goal, optimizer = ends(x, t), torch.optim.Adam(net.parameters(), 3e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        rows = torch.randint(len(x), (512,), generator=draw)
        (net(x[rows], t[rows, 0], None) - goal[rows]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
    return net


def reward(x: Tensor, cond: object) -> Tensor:
    """Of points on the line: the mode above 0 is the better one."""
    return torch.tanh(3 * x).flatten()


def tried(text: str, net: Student, steps: int, rollouts: int, seed: int) -> tuple[float, float, float, float]:
    """(reward, share between the modes) before and after."""
    config = spec.parse(text, AGENTS, AGENTS.what)
    policy = Policy(Denoiser(copy.deepcopy(net), Rectified(), "x0"), Renoise())
    task = Task(policy, TimeGrid(steps), (1,), torch.arange(PROMPTS), lambda x: x, reward, "upper")
    learner = config.learner(replace(task, rollout_spec=config.rollout_spec(steps)), None, seed)
    looks = []
    for i in range(rollouts + 1):
        acting = replace(task, policy=learner.policy)
        if i in (0, rollouts):
            seen = run_item(acting, plan(seed, 10**6, PROMPTS, 2000, 4000, PROMPTS, i)[0])
            looks += [seen.reward.mean().item(), (seen.x[:, -1].abs() < 0.5).float().mean().item()]
        item = plan(seed, i, PROMPTS, WALKS // PROMPTS, WALKS, PROMPTS, i)[0]
        learner.update(run_item(replace(acting, rollout_spec=config.rollout_spec(steps)), item))
    return looks[0], looks[1], looks[2], looks[3]


def main() -> None:
    """Read the arguments, teach, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    set_numerics(1, torch.device("cpu"))
    nets = [student(seed) for seed in range(args.seeds)]
    print("| learner | " + " | ".join(f"{k} step(s): reward | in neither mode" for k in STEPS) + " |")
    print("|---" * (1 + 2 * len(STEPS)) + "|")
    for name, text in LEARNERS.items():
        cells = []
        for steps in STEPS:
            try:
                found = [tried(text, net, steps, args.rollouts, seed) for seed, net in enumerate(nets)]
            except RlfusionError as error:
                cells += [f"refused: {str(error)[:60]}", "-"]
                continue
            before, blur, after, blurred = (mean(one) for one in zip(*found))
            cells += [f"{before:.2f} to {after:.2f}", f"{blur:.1%} to {blurred:.1%}"]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
