"""What tests of consistency training share: functions as networks, a Gaussian, a mixture, learners of it."""

import math

import numpy as np
import torch
from oracles import Mixture
from torch import nn

from rlfusion.data import Dataset
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.schedule import Karras
from rlfusion.nets.mlp import ResidualMLP
from rlfusion.pretrain import Config, Learner

M, LAM = 0.7, 0.25
"""The Gaussian N(m, lam)."""

TWO = Mixture.scalar([0.4, 0.6], [-0.7, 0.6], [0.07, 0.1])
CM = ("CM(sigma_data=0.8)", Karras())
FIRST = torch.tensor(0.0, dtype=torch.float64)
UNLABELLED = (torch.zeros(1, dtype=torch.int64), 1, torch.zeros(1, dtype=torch.int64))  # label, no_class, index


class Net(nn.Module):
    """A function (x, t) as a network."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, t, cond):
        return self.function(x, t.reshape(-1, *[1] * (x.ndim - 1)))


def along(x0, z, a):
    """x, dx/da and the time t of TrigFlow's path at the angles a (B,)."""
    cos, sin = (f(a).reshape(-1, *[1] * (x0.ndim - 1)) for f in (torch.cos, torch.sin))
    return cos * x0 + sin * z, cos * z - sin * x0, a * 2 / math.pi


def fixed_point(sigma):
    """The slopes k_n that CT converges to on the grid ``sigma`` (N,), and the loss (N-1,) of each interval there:
    f_{n+1}(x) = E[f_n(x_n) | x_{n+1} = x] with Cov(x_n, x_{n+1}) = lam + t_n t_{n+1}."""
    share = (LAM + sigma[1:] * sigma[:-1]) / (LAM + sigma[1:] ** 2)
    k = np.concatenate([[1.0], np.cumprod(share)])
    return k, k[:-1] ** 2 * (LAM + sigma[:-1] ** 2 - share * (LAM + sigma[1:] * sigma[:-1]))


def toy(law, n, dimensions, seed=0):
    """A data set of n samples of a 1-D law in each of so many dimensions, all of one class."""
    rng = np.random.default_rng(seed)
    x = np.stack([law.sample(n, rng)[:, 0] for _ in range(dimensions)], 1).astype(np.float32)
    return Dataset(torch.from_numpy(x).reshape(n, 1, 1, dimensions), torch.zeros(n, dtype=torch.int64), ("all",))


def learner(loss, kind, schedule, law, frequency=8.0, **train):
    torch.manual_seed(0)
    net = ResidualMLP((1, 1, 2), 1, width=64, depth=2, frequency=frequency)
    settings = {"batch": 192, "label_dropout": 0.0, "ema": "Constant(decay=0.99)", "weight_decay": 0.0, **train}
    return Learner(Denoiser(net, schedule, kind), toy(law, 20_000, 2), Config(loss=loss, **settings))
