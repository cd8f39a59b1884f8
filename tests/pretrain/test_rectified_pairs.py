"""Rectified flow on pairs (handbook Eq. 28, 29, 35): the same loss, whose noise belongs to its sample.

On N(m, s^2) data the probability flow takes eps to m + s eps, and 2-RF, trained on such pairs, is exactly straight.
"""

import pytest
import torch
from torch import nn

from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.schedule import DDPM, Rectified
from rlfusion.diffusion.solvers import end, euler
from rlfusion.pretrain import Draw
from rlfusion.pretrain.losses import make

M, S = 0.7, 0.4


class Straight(nn.Module):
    """u(y) = c (y1 - y0) with y1 = m + s y0 the end of the straight line through y: y = share y1 + (1 - share) y0."""

    def __init__(self, sign: float, share) -> None:
        super().__init__()
        self.sign, self.share = sign, share

    def forward(self, y, t, cond):
        share = self.share(t.double()).reshape(-1, 1).to(y)
        noise = (y - share * M) / (share * S + 1 - share)
        return self.sign * (M + S * noise - noise)


def draw(paired: bool) -> Draw:
    g = torch.Generator().manual_seed(0)
    eps = torch.randn(4000, 1, generator=g, dtype=torch.float64)
    other = torch.randn(4000, 1, generator=g, dtype=torch.float64)
    x0 = M + S * (eps if paired else other)
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    cond = torch.zeros(4000, dtype=torch.int64)
    return Draw(x0, cond, eps, u, 0, 1, (0, "pairs", 0), x0, cond, 1, torch.arange(4000))


MODELS = {
    "Eq. 29": lambda: Denoiser(
        Straight(-1.0, lambda t: 1 - t), Rectified(), "flow"
    ),  # flow is d/dt, from data to noise
    "Eq. 35": lambda: Denoiser(Straight(1.0, lambda r: 1 - r), DDPM(), "InstaFlow()"),  # its time is 1 - gamma
}


@pytest.mark.parametrize("equation", MODELS)
def test_on_pairs_the_straight_velocity_has_no_loss_and_on_others_it_has(equation):
    loss, denoiser = make("Denoising()"), MODELS[equation]()
    assert loss(denoiser, denoiser, draw(paired=True)).max() < 1e-20
    assert loss(denoiser, denoiser, draw(paired=False)).mean() > 0.1


@pytest.mark.parametrize("steps", [1, 7])
def test_a_straight_flow_needs_one_step(steps):
    noise = torch.randn(20, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    torch.testing.assert_close(end(euler, MODELS["Eq. 29"](), noise, times), M + S * noise)


def test_one_step_of_the_first_flow_is_the_mean():
    """1-RF: v = E[eps - x0 | y], at pure noise eps - m; so that one step gives E[x0] for any noise."""

    class First(nn.Module):
        def forward(self, y, t, cond):
            t = t.reshape(-1, 1).to(y)
            total = (1 - t) ** 2 * S**2 + t**2
            r = y - (1 - t) * M
            return t / total * r - (M + (1 - t) * S**2 / total * r)

    noise = torch.randn(5, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = end(euler, Denoiser(First(), Rectified(), "flow"), noise, torch.tensor([1.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(found, torch.full_like(found, M))
