"""A diffusion model as a policy: an observation in, a Gaussian over the next latent out."""

import copy
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rlfusion.common import compiled, shards
from rlfusion.common.errors import ConfigError
from rlfusion.common.tensors import Cond, cast
from rlfusion.diffusion import rows
from rlfusion.diffusion.denoiser import Denoising
from rlfusion.diffusion.gaussian import Gaussian
from rlfusion.diffusion.kernel import Coefficients, Kernel, applied, transition
from rlfusion.diffusion.schedule import Schedule, level, prior_std
from rlfusion.diffusion.space import Space


class Observation(NamedTuple):
    """The state: x = x_t (B, ...), its time t, the next time s < t (() or (B,), float64), the condition."""

    x: Tensor
    t: Tensor
    s: Tensor
    cond: Cond = None


class Policy(nn.Module):
    """Denoiser + kernel. ``denoiser`` is a ``Denoiser`` or a wrapper with its call, ``schedule`` and ``space``."""

    def __init__(self, denoiser: Denoising, kernel: Kernel) -> None:
        super().__init__()
        self.denoiser: Denoising = denoiser
        self.kernel: Kernel = kernel

    @property
    def schedule(self) -> Schedule:
        """What a time means."""
        return self.denoiser.schedule

    @property
    def space(self) -> Space:
        """What x is a latent of."""
        return self.denoiser.space

    def forward(self, obs: Observation) -> Gaussian:
        x, t, s, cond = obs
        denoiser, kernel = self.denoiser, self.kernel
        prediction, schedule = denoiser(x, t, cond), denoiser.schedule
        if t.ndim == 0:
            like = prediction.x0
            return applied(_step(kernel, schedule, t.item(), s.item(), like.dtype, like.device), prediction)
        if chain := rows.steps(t, s):
            return applied(_gathered(kernel, schedule, chain, prediction.x0), prediction)
        dt = (s - t).reshape(-1, *[1] * (x.ndim - 1))
        return transition(kernel, prediction, level(schedule, t, x), level(schedule, s, x), dt)

    def stds(self, times: Tensor) -> Tensor:
        """S of each of the K steps of ``times`` (K+1,), float64 (K,): 0 marks a step without a log-probability."""
        t, s = times[:-1], times[1:]
        return self.kernel.coefficients(self.schedule(t), self.schedule(s), s - t).std.expand(len(t))

    def prior_std(self, times: Tensor) -> float:
        """The standard deviation of the noise where the chain begins."""
        return prior_std(self.schedule, times)


def frozen_copy(policy: Policy) -> Policy:
    """The policy as it is now, without gradients; it shares the parameters that are not trained, and is compiled where
    the policy is.
    """
    shared = {id(p): p for p in policy.parameters() if not p.requires_grad}
    copied = copy.deepcopy(policy, shared | shards.memo(policy)).requires_grad_(False)
    if compiled.compiled(policy):
        compiled.follow(copied, policy)
    return copied


@lru_cache(maxsize=4096)
@torch.inference_mode(False)
def _step(
    kernel: Kernel, schedule: Schedule, t: float, s: float, dtype: torch.dtype, device: torch.device
) -> Coefficients:
    """The coefficients of a step that a whole batch takes, cast: the same few in every rollout."""
    at, to = torch.tensor([t, s], dtype=torch.float64)
    like = torch.empty(0, dtype=dtype, device=device)
    return Coefficients(*(cast(c, like) for c in kernel.coefficients(schedule(at), schedule(to), to - at)))


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _table(
    kernel: Kernel, schedule: Schedule, grid: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The coefficients (K, 3) of the steps of a chain."""
    return torch.stack([torch.stack(_step(kernel, schedule, t, s, dtype, device)) for t, s in pairwise(grid)])


def _gathered(kernel: Kernel, schedule: Schedule, chain: rows.Chain, like: Tensor) -> Coefficients:
    """The coefficients of the steps of rows of a chain, shaped and cast for ``like`` (N, *)."""
    each = chain.gather(_table(kernel, schedule, chain.grid, like.dtype, like.device))
    return Coefficients(*each.reshape(*each.shape, *[1] * (like.ndim - 1)).unbind(1))


def require_stochastic(policy: Policy, times: Tensor) -> Tensor:
    """The steps that have a log-probability, bool (K,).

    Raises:
        ConfigError: none has: a policy gradient cannot train such a chain.
    """
    mask = policy.stds(times) > 0
    if not bool(torch.any(mask)):
        raise ConfigError(
            f"{policy.kernel} has no noise at any of the {len(mask)} steps, so no log-probability: "
            "a policy gradient needs eta > 0 (or noise > 0), or chain.last_noise > 0"
        )
    return mask
