"""A Gaussian in one dimension, float64: its exact denoiser, its flow, draws of it, and a student of affine rows."""

import torch
from by_answer import ByAnswer
from torch import nn

from rlfusion.diffusion.schedule import level
from rlfusion.pretrain import Draw

M, LAM = 0.7, 0.25
DOUBLE = torch.float64


class Gaussian(ByAnswer):
    """E[x0 | x_t] of N(M, LAM), x (B, 1, 1, 1), as a network that predicts x0 or v."""

    def __init__(self, schedule, kind="v") -> None:
        super().__init__(nn.Linear(1, 1), schedule, kind)

    def answer(self, x, t, cond=None):
        l = level(self.schedule, t, x)
        gap = (x - l.alpha * M) / (l.alpha**2 * LAM + l.sigma**2)
        x0, eps = M + l.alpha * LAM * gap, l.sigma * gap
        return x0 if self.kind == "x0" else l.alpha * eps - l.sigma * x0


def flow(x, t, s):
    """The probability-flow map of N(M, LAM) from level t to s."""
    var = [l.alpha**2 * LAM + l.sigma**2 for l in (t, s)]
    return s.alpha * M + (var[1] / var[0]).sqrt() * (x - t.alpha * M)


def points(n=200, seed=0):
    return torch.randn(n, 1, 1, 1, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def times(*t, n=200):
    return [torch.full((n,), value, dtype=DOUBLE) for value in t]


def draw_of(n=200, step=0, total=1, seed=0):
    u = (torch.arange(n, dtype=DOUBLE) + 0.5) / n
    x0 = M + LAM**0.5 * points(n, seed)
    label = torch.zeros(n, dtype=torch.int64)
    return Draw(x0, label, points(n, seed + 1), u, step, total, (0, "test", step), x0, label, 1, label)


class Table(nn.Module):
    """k(t) x + b(t), a row for each of N + 1 even times; (1, 0) at t = 0."""

    def __init__(self, intervals: int) -> None:
        super().__init__()
        self.intervals = intervals
        self.k, self.b = (nn.Parameter(torch.full((intervals,), v, dtype=DOUBLE)) for v in (0.5, 0.2))

    def forward(self, x, t, cond):
        n = (t * self.intervals).round().long().reshape(-1)
        one, zero = torch.ones(1, dtype=DOUBLE), torch.zeros(1, dtype=DOUBLE)
        k, b = torch.cat([one, self.k])[n], torch.cat([zero, self.b])[n]
        return k[:, None, None, None] * x + b[:, None, None, None]
