"""Walking the chain: one generator that every sampler, rollout and grid uses."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rlfusion.common.seeding import Key, normal
from rlfusion.common.tensors import Cond
from rlfusion.diffusion.gaussian import Gaussian
from rlfusion.diffusion.policy import Observation, Policy


class Step(NamedTuple):
    """One denoising step: the observation, the transition, and the latent drawn from it."""

    obs: Observation
    transition: Gaussian
    x: Tensor


def walk(policy: Policy, noise: Tensor, times: Tensor, cond: Cond = None) -> Iterator[Step]:
    """Yield the K steps of a chain, lazily; the caller may log, draw or stop.

    ``noise`` (B, K+1, ...) is standard normal: column 0 is where the chain begins (scaled by sigma(t_0)), column k + 1
    the noise of step k. ``times`` (K+1,) fall. Gradients flow unless the caller forbids them.

    Raises:
        ValueError: as many noise columns as times are needed.
    """
    if noise.ndim < 3 or noise.shape[1] != len(times):
        raise ValueError(f"noise is (B, {len(times)}, ...) for {len(times)} times: got {tuple(noise.shape)}")
    x = noise[:, 0] * policy.prior_std(times)
    for k in range(len(times) - 1):
        obs = Observation(x, times[k], times[k + 1], cond)
        distribution = policy(obs)
        x = distribution.sample(noise[:, k + 1])
        yield Step(obs, distribution, x)


def chain_noise(key: tuple[Key, ...], items: Iterable[int], steps: int, shape: tuple[int, ...]) -> Tensor:
    """The noise (B, K+1, ...) of ``walk`` for the samples ``items`` of one key; row i depends on items[i] alone."""
    return normal((*key, "chain"), items, (steps + 1, *shape))


@torch.no_grad()
def sample(policy: Policy, noise: Tensor, times: Tensor, cond: Cond = None) -> Tensor:
    """The end x_0 (B, ...) of the chain, without gradients."""
    x = noise[:, 0]
    for step in walk(policy, noise, times, cond):
        x = step.x
    return x
