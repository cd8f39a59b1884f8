"""What a reward costs in Frechet distance at best: the base model's own samples, tilted exactly.

    (1)  p_beta(x | c) = p(x | c) exp(beta R(x, c)) / Z_c:  of all policies with that mean reward the one whose samples
         have the least KL to the base's
    (2)  drawn from N samples of the base with weights exp(beta R) within each class; beta by bisection for each gain

It is no bound on the Frechet distance, which is not the KL: a learner may be below it. Few effective samples are a sign
that the base hardly ever draws such rewards.

    python benchmarks/tilted.py benchmarks/learners/ink.yaml [--samples 8000] [--root runs/learners]
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rlfusion import models
from rlfusion.cli.arguments import settings_of
from rlfusion.common.progress import Progress
from rlfusion.common.stops import Signals
from rlfusion.config import Compare
from rlfusion.data import load, to_pixels
from rlfusion.evaluation import features, frechet_distance
from rlfusion.jobs.measure import Judged, draw, make_reward
from rlfusion.jobs.pretrain import base_model
from rlfusion.rewards import score
from rlfusion.training.devices import set_numerics

GAINS = (0.0, 0.5, 1.0, 1.5, 2.0)
JUDGED = 1000
STRONGEST = 60.0


def weights(beta: float, reward: Tensor, label: Tensor) -> Tensor:
    """Eq. (2), (N,): the same total in each class."""
    w = torch.zeros_like(reward)
    for c in label.unique():
        rows = label == c
        w[rows] = (beta * reward[rows]).softmax(0)
    return w / w.sum()


def strength(gain: float, reward: Tensor, label: Tensor) -> float:
    """The beta with that mean of a standardised reward, by bisection, up to ``STRONGEST``."""
    low, high = 0.0, STRONGEST
    for _ in range(30):
        middle = (low + high) / 2
        below = (weights(middle, reward, label) * reward).sum() < gain
        low, high = (middle, high) if below else (low, middle)
    return low


def tilted(config: Compare, samples: int) -> None:
    """Print a line for each gain."""
    root, cpu = Path(config.root), torch.device("cpu")
    denoiser, card = models.load(base_model(config.pretrain, root, cpu, Signals(), Progress()))
    judged = Judged.of(load(config.pretrain.data, config.pretrain.size), config.pretrain.held_out, root, cpu)
    label = torch.arange(samples) % card.classes
    policy = config.chain.policy(denoiser, card.names)
    x = draw(policy, config.chain.times(denoiser), label, card.shape, 0, "tilted")
    ours, held_out = features(judged.judge, x), features(judged.judge, to_pixels(judged.held_out.x))
    for name in config.rewards:
        value = score(make_reward(name, {}, judged.train, root), x, label, name).detach().double()
        value = (value - value.mean()) / value.std()
        for gain in GAINS:
            w = weights(strength(gain, value, label), value, label)
            chosen = torch.multinomial(w, JUDGED, replacement=True, generator=torch.Generator().manual_seed(0))
            found = frechet_distance(ours[chosen], held_out)
            got, effective = (w * value).sum(), 1 / w.square().sum()
            print(f"{name}: gain {got:.2f}, effective samples {effective:.0f}, Frechet {found:.1f}", flush=True)


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file of rlfusion compare")
    parser.add_argument("--samples", type=int, default=8000)
    parser.add_argument("--root", default="runs/learners")
    args = parser.parse_args()
    set_numerics(1, torch.device("cpu"))
    tilted(replace(settings_of("compare", ["--config", args.config]), root=args.root), args.samples)


if __name__ == "__main__":
    main()
