"""Dropout that rollout and learner agree on: one keyed mask of a layer's input features for a whole iteration.

    (1)  y = B A (m * x) / (1 - p),     m_j ~ Bernoulli(1 - p) for each input feature j of the layer,
         drawn from the stream (seed, "dropout", n, name of the layer) in iteration n

m is the same in every sample, step, token, epoch and worker of iteration n: it drops columns of A (as Lin et al. 2024
do), so that the iteration acts and learns with one sub-network. The importance ratio at the acting weights is then 1,
however calls are batched, and the gradient of log p is that of the policy that acted. Masks drawn afresh in each call
would make the ratio a random number. Outside of ``dropped`` nothing is dropped: evaluation, sampling and what is saved
are of the whole network, and E[m] / (1 - p) = 1 keeps its mean.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor, nn

from rlfusion.common.seeding import Key, stream


class Acting:
    """Which masks act, if any; shared by a network's layers and by its copies."""

    def __init__(self) -> None:
        self.key: tuple[Key, ...] | None = None

    def __deepcopy__(self, memo: dict) -> Self:
        return self


class Dropout(nn.Module):
    """Eq. (1)'s m * x / (1 - p) within ``dropped``; outside, x itself."""

    def __init__(self, p: float, features: int, name: str, spatial: int, acting: Acting) -> None:
        """``name`` keys the mask; inputs are (..., features, *) with ``spatial`` dimensions after the features."""
        super().__init__()
        self.p, self.features, self.name, self.spatial, self.acting = p, features, name, spatial, acting
        self.held: tuple[tuple[Key, ...], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        key = self.acting.key
        return x if key is None else x * self._factor(key, x)

    def _factor(self, key: tuple[Key, ...], x: Tensor) -> Tensor:
        """m / (1 - p), shaped for ``x``; made once for each key."""
        if self.held is None or self.held[0] != key or self.held[1].device != x.device:
            kept = stream(*key, self.name).random(self.features) >= self.p
            factor = torch.from_numpy(kept).to(x.device, torch.float32) / (1 - self.p)
            self.held = key, factor.reshape(-1, *[1] * self.spatial)
        return self.held[1].to(x.dtype)


@contextmanager
def dropped(module: nn.Module, seed: int, iteration: int) -> Iterator[None]:
    """Within the context the masks of an iteration act in the layers of ``module`` and of its copies."""
    acting = {id(m.acting): m.acting for m in module.modules() if isinstance(m, Dropout)}
    before = {at: one.key for at, one in acting.items()}
    for one in acting.values():
        one.key = (seed, "dropout", iteration)
    try:
        yield
    finally:
        for at, one in acting.items():
            one.key = before[at]
