"""The variational bound on log p(x_0) of a sampling chain, in bits per dimension (Ho et al. 2020; handbook 2.2.2).

    (1)  -log p(x_0) <= L = KL(q(x_1 | x_0) || p(x_1)) + sum_k KL(q(x_s | x_t, x_0) || p(x_s | x_t)) + L_0
    (2)  q(x_t | x_0) = N(alpha x_0, sigma^2),  p(x_1) = N(0, sigma(1)^2),  t = t_k > s = t_{k+1} with sigma_s > 0
    (3)  p(x_s | x_t) is the kernel with the denoiser's (x0, eps), q(x_s | x_t, x_0) the same with the true pair, which
         has the marginals (2) where A = alpha_s and B^2 + S^2 = sigma_s^2: DDPM, DDIM(eta > 0), CPS, re-noise.
         For the large variance of DDPM, q is the posterior with the small one.
    (4)  L_0 = -log P(x_0 | x_t) at the last noisy time: the mass that N(x0_hat, (sigma / alpha)^2) gives to the bin of
         each value; the first and the last bin reach to infinity (Ho et al. 2020, Eq. 13, in general form)

Bits per dimension are L / (d log 2). The bound belongs to the chain: few steps make it loose. Each KL is taken at one
draw of x_t, in closed form; so L is unbiased.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from rlfusion.common.errors import ConfigError
from rlfusion.common.seeding import Key, normal
from rlfusion.common.tensors import Cond, cast, sum_features
from rlfusion.data import Dataset
from rlfusion.diffusion.gaussian import Gaussian
from rlfusion.diffusion.kernel import DDPM, Kernel, transition
from rlfusion.diffusion.parameterization import Prediction
from rlfusion.diffusion.policy import Policy
from rlfusion.diffusion.schedule import Schedule, diffused, level
from rlfusion.diffusion.space import Pixels

CHUNK = 500


class Bound(NamedTuple):
    """The parts of Eq. (1) of each sample, nats, (B,) float64."""

    prior: Tensor
    steps: Tensor
    decoder: Tensor

    @property
    def total(self) -> Tensor:
        """L."""
        return self.prior + self.steps + self.decoder


@torch.no_grad()
def bound(policy: Policy, x0: Tensor, cond: Cond, times: Tensor, noise: Tensor, levels: int) -> Bound:
    """Eq. (1) of samples x0 (B, *), whose values lie on ``levels`` even steps from -1 to 1.

    ``times`` (K+1,) fall; ``noise`` (B, K, *) or more columns is standard normal: column k makes x at times[k].
    The kernel must be one that ``require_bound`` lets pass.
    """
    schedule, kernel = policy.schedule, policy.kernel
    inference = _inference(kernel)
    noisy = times[schedule(times).sigma > 0]
    steps = torch.zeros(len(x0), dtype=torch.float64, device=x0.device)
    for k, t in enumerate(noisy):
        l = level(schedule, t, x0)
        eps = noise[:, k]
        found = policy.denoiser(diffused(x0, eps, l), t, cond)
        truth, guess = Prediction(x0.double(), eps.double()), Prediction(*(p.double() for p in found))
        if k + 1 < len(noisy):
            to, dt = level(schedule, noisy[k + 1], x0), noisy[k + 1] - t
            steps += transition(inference, truth, l, to, dt).kl(transition(kernel, guess, l, to, dt))
    return Bound(_prior(schedule, times[0], x0), steps, _decoder(guess.x0, x0.double(), l.sigma / l.alpha, levels))


def bits_per_dim(policy: Policy, times: Tensor, data: Dataset, *key: Key) -> dict[str, float]:
    """The mean bound over ``data`` in bits per dimension, with its standard error and its three parts, by name.

    Raises:
        ConfigError: as ``require_bound``.
    """
    levels = require_bound(policy, times, data)
    device = next(policy.parameters()).device
    parts = []
    for rows in torch.arange(len(data)).split(CHUNK):
        noise = normal((*key, "likelihood"), rows.tolist(), (len(times), *data.shape)).to(device)
        parts.append(bound(policy, data.x[rows].to(device), data.label[rows].to(device), times, noise, levels))
    found = Bound(*(torch.cat(column) / (math.log(2) * data.x[0].numel()) for column in zip(*parts)))
    return {
        "bits_per_dim": found.total.mean().item(),
        "bits_per_dim_error": found.total.std().item() / math.sqrt(len(data)),
        **{f"bits_per_dim_{name}": part.mean().item() for name, part in found._asdict().items()},
    }


def require_bound(policy: Policy, times: Tensor, data: Dataset) -> int:
    """Refuse a chain or data for which Eq. (1) is not defined. Returns the number of values of a feature.

    Raises:
        ConfigError: fewer than two samples, or data without known levels (float images, latents); a kernel without
            noise at some step, or whose steps do not keep the schedule's marginals, Eq. (3).
    """
    if not isinstance(policy.space, Pixels):
        raise ConfigError(
            "bits_per_dim = True: the model works in latents, whose density is not that of images; expected false"
        )
    if data.levels is None:
        raise ConfigError("bits_per_dim = True: the data are continuous, expected images of known grey levels")
    if len(data) < 2:
        raise ConfigError(
            f"bits_per_dim = True: {len(data)} samples are held out, expected at least 2 (held_out is a share of each "
            "class or caption)"
        )
    noisy = times[policy.schedule(times).sigma > 0]
    t, s = policy.schedule(noisy[:-1]), policy.schedule(noisy[1:])
    c = _inference(policy.kernel).coefficients(t, s, noisy[1:] - noisy[:-1])
    kept = torch.isclose(c.x0, s.alpha) & torch.isclose(c.eps.square() + c.std.square(), s.sigma.square())
    if not bool((kept & (c.std > 0) & (noisy[1:] < noisy[:-1])).all()):
        raise ConfigError(
            f"bits_per_dim = True: with kernel {policy.kernel} the bound is not defined: expected falling times and "
            "DDPM(), DDIM(eta=...) with eta > 0, CPS(eta=...) with eta > 0 or Renoise()"
        )
    return data.levels


def _inference(kernel: Kernel) -> Kernel:
    """The kernel of q, Eq. (3)."""
    return replace(kernel, variance="small") if isinstance(kernel, DDPM) else kernel


def _prior(schedule: Schedule, t: Tensor, x0: Tensor) -> Tensor:
    """KL(q(x_1 | x_0) || p(x_1)), (B,)."""
    l = level(schedule, t, x0)
    mean, std = cast(l.alpha, x0.double()) * x0.double(), cast(l.sigma, x0.double())
    return Gaussian(mean, std).kl(Gaussian(torch.zeros_like(mean), std))


def _decoder(mean: Tensor, x0: Tensor, std: Tensor, levels: int) -> Tensor:
    """Eq. (4), (B,), float64: mean and x0 (B, *), std ()."""
    half, std = 1 / (levels - 1), cast(std, mean)
    low = torch.where(x0 <= -1 + half, -math.inf, (x0 - half - mean) / std)
    high = torch.where(x0 >= 1 - half, math.inf, (x0 + half - mean) / std)
    return -sum_features(_log_mass(low, high))


def _log_mass(low: Tensor, high: Tensor) -> Tensor:
    """log (Phi(high) - Phi(low)), in the tail where neither is near 1, so that nothing cancels."""
    mirrored = low > -high
    low, high = torch.where(mirrored, -high, low), torch.where(mirrored, -low, high)
    top = torch.special.log_ndtr(high)
    return top + torch.log1p(-(torch.special.log_ndtr(low) - top).exp())
