"""Why a student is as far from the data as it is: where in time it errs, and which step of its chain loses what.

For each folder of a distilled student:

    (1)  |f(x_t, t, c) - Phi_{t -> 0}(x_t, c)|, the root mean square a feature, by the noise-to-signal angle of t;
         x_t real samples noised, Phi the teacher's probability flow, 100 steps of DDIM(0). 0 is a perfect consistency
         function. Of a student that is to sample the same law by another map (dmd, add) it says nothing.
    (2)  the Frechet distance, precision and recall of x0_hat at every step of its chain of ``--steps``: what it would
         sample if it ended there; and of all these steps mixed, an even share of each.

    python benchmarks/distillation_reasons.py --root runs/distillation cd-1-2-4-8-seed0 [--steps 4] [--samples 1000]
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from rlfusion import models
from rlfusion.common.seeding import normal
from rlfusion.data import load
from rlfusion.diffusion.chain import Chain
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.policy import Policy
from rlfusion.diffusion.sampling import chain_noise, walk
from rlfusion.diffusion.schedule import diffused, level, time_of
from rlfusion.distill.ode import along
from rlfusion.distill.on_schedule import OnSchedule
from rlfusion.jobs.measure import Judged

ANGLES = (0.05, 0.15, 0.25, 0.375, 0.5, 0.75, 1.0)
"""atan(sigma / alpha) over pi / 2, where Eq. (1) is looked at: the time of Trig, and near that of Cosine."""

SOLVED = 100
"""The teacher's steps of Eq. (1)."""


@torch.no_grad()
def gaps(policy: Policy, teacher: nn.Module, judged: Judged) -> list[float]:
    """Eq. (1) at each of ``ANGLES``."""
    denoiser, held = policy.denoiser, judged.held_out
    eps = normal((0, "reasons"), range(len(held)), held.shape).to(held.x)
    return [_gap(denoiser, teacher, held.x, eps, held.label, a) for a in ANGLES]


def _gap(denoiser: nn.Module, teacher: nn.Module, x0: Tensor, eps: Tensor, label: Tensor, angle: float) -> float:
    a = torch.full((len(x0),), angle * math.pi / 2, dtype=torch.float64)
    t = time_of(denoiser.schedule, a.cos(), a.sin())
    x = diffused(x0, eps, level(denoiser.schedule, t, x0))
    there = along(teacher, x, [t * (1 - k / SOLVED) for k in range(SOLVED + 1)], label)
    return (denoiser(x, t, label).x0 - there).square().mean().sqrt().item()


@torch.no_grad()
def each_step(policy: Policy, times: Tensor, judged: Judged, samples: int) -> list[dict[str, float]]:
    """Eq. (2): the report of x0_hat at each step, then of the mixture."""
    label = torch.arange(samples) % judged.classes
    noise = chain_noise((0, "evaluation"), range(samples), len(times) - 1, judged.shape)
    seen = [policy.denoiser(step.obs.x, step.obs.t, label).x0 for step in walk(policy, noise, times, label)]
    turn = torch.arange(samples) // judged.classes % len(seen)
    seen.append(torch.stack(seen)[turn, torch.arange(samples)])
    return [judged.report(policy.space.decode(x), label) for x in seen]


def lines(folder: Path, teacher: Denoiser, judged: Judged, steps: int, samples: int) -> list[str]:
    """Both tables' rows of one student."""
    student, card = models.load(folder)
    chain = replace(Chain(**card.chain), steps=steps)
    policy = chain.policy(student, card.names)
    own = teacher if teacher.schedule == student.schedule else OnSchedule(teacher, student.schedule)
    errors = " | ".join(f"{e:.3f}" for e in gaps(policy, own, judged))
    reports = each_step(policy, chain.times(student), judged, samples)
    ends = [f"{r['frechet']:.2f} ({r['precision']:.2f}, {r['recall']:.2f})" for r in reports]
    return [f"| {folder.name} | {errors} |", f"| {folder.name} | {' | '.join(ends)} |"]


def main() -> None:
    """Print the rows of every student named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("students", nargs="+", help="folders below the root")
    parser.add_argument("--root", type=Path, default=Path("runs/distillation"), help="of benchmarks/distillation.py")
    parser.add_argument("--steps", type=int, default=4, help="of the chain of Eq. (2)")
    parser.add_argument("--samples", type=int, default=1000, help="of each report")
    given = parser.parse_args()
    torch.set_num_threads(1)
    judged = Judged.of(load("digits", 32), 0.25, given.root, torch.device("cpu"))
    teacher, _ = models.load(given.root / "teacher")
    print(f"Eq. (1) at {', '.join(map(str, ANGLES))}; then Eq. (2) as distance (precision, recall), the mixture last")
    for name in given.students:
        print("\n".join(lines(given.root / name, teacher, judged, given.steps, given.samples)), flush=True)


if __name__ == "__main__":
    main()
