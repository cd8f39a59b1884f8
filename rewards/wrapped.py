"""Wrappers for a reward that is slow or may hang: a deadline, and a cache. Neither changes a value.

    (1)  Timed: a call that takes longer than ``timeout_s`` is a RewardFailure of all its samples, and names the reward
    (2)  Cached: the values of a batch that was scored before are remembered under
             SHA-256(identity of the reward, samples, cond),  each tensor with its dtype, shape and bytes

The key is that of the whole batch. A network's last bits depend on the batch that a sample is scored in, so values kept
by sample would make results depend on what was asked before. Kept by batch, a repeatable reward gives the same bits
with and without a cache; and a batch that is asked again (a question tried twice, a rollout repeated) is found.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor, nn

from rlfusion.common.beside import Beside
from rlfusion.common.errors import ConfigError, require_not_negative
from rlfusion.common.nested import flatten
from rlfusion.common.tensors import Cond
from rlfusion.common.weights import pack
from rlfusion.rewards.base import Reward, RewardFailure

HANGING = 3
"""Calls of one reward that may hang at once; a thread cannot be killed."""


@dataclass(frozen=True)
class CallOptions:
    """How rewards are called.

    Attributes:
        timeout_s: for one batch; 0 for no limit.
        cache: samples whose values are remembered, of the batches last used; 0 for none.
    """

    timeout_s: float = 0.0
    cache: int = 0

    def __post_init__(self) -> None:
        require_not_negative(self, "timeout_s", "cache")

    def around(self, reward: Reward, name: str, identity: str) -> Reward:
        """The reward, wrapped as these settings say."""
        if self.timeout_s:
            reward = Timed(reward, name, self.timeout_s)
        return Cached(reward, identity, self.cache) if self.cache else reward


class Wrapped(nn.Module):
    """A reward around another one, ``reward``; a module inside is in its state dict."""

    def __init__(self, reward: Reward) -> None:
        super().__init__()
        self.reward = reward


class Timed(Wrapped):
    """Eq. (1). The reward runs in a thread of its own; gradients pass."""

    def __init__(self, reward: Reward, name: str, timeout_s: float) -> None:
        super().__init__(reward)
        self.name, self.timeout_s = name, timeout_s
        self._hanging: list[Beside[Tensor]] = []

    def forward(self, samples: Tensor, cond: Cond) -> Tensor:
        """samples (B, C, H, W) in [0, 1] -> (B,).

        Raises:
            RewardFailure: the reward was not done in time, or too many calls of it hang already.
        """
        self._hanging = [thread for thread in self._hanging if thread.is_alive()]
        if len(self._hanging) >= HANGING:
            raise RewardFailure.of_all(self.name, len(samples), f"{HANGING} earlier calls of it hang")
        call = Beside("reward", lambda: self.reward(samples, cond))
        call.join(self.timeout_s)
        if call.is_alive():
            self._hanging.append(call)
            raise RewardFailure.of_all(
                self.name, len(samples), f"not done within timeout_s = {self.timeout_s:g} for {len(samples)} samples"
            )
        return call.result()


class Cached(Wrapped):
    """Eq. (2), of the last batches of ``size`` samples in all. What needs a gradient, or failed, is not remembered.

    Attributes:
        found: samples so far whose values were remembered, of
        asked: all samples so far.
    """

    def __init__(self, reward: Reward, identity: str, size: int) -> None:
        super().__init__(reward)
        if size < 1:
            raise ConfigError(f"cache = {size}: expected at least 1 sample")
        self.identity, self.size = identity, size
        self.found = self.asked = 0
        self._values: OrderedDict[bytes, Tensor] = OrderedDict()

    def forward(self, samples: Tensor, cond: Cond) -> Tensor:
        """samples (B, C, H, W) in [0, 1] -> (B,)."""
        if samples.requires_grad and torch.is_grad_enabled():
            return self.reward(samples, cond)
        self.asked += len(samples)
        key = self._key(samples, cond)
        if key in self._values:
            self.found += len(samples)
            self._values.move_to_end(key)
            return self._values[key].to(samples.device, copy=True)
        values = self.reward(samples, cond)
        if isinstance(values, Tensor) and values.shape == samples.shape[:1] and bool(values.isfinite().all()):
            self._remember(key, values)
        return values

    def _key(self, samples: Tensor, cond: Cond) -> bytes:
        tensors: dict[str, Tensor] = {}
        record = flatten({"samples": samples, "cond": cond}, "", tensors)
        return sha256(f"{self.identity}\n{record}\n".encode() + pack(tensors)).digest()

    def _remember(self, key: bytes, values: Tensor) -> None:
        self._values[key] = values.detach().to("cpu", copy=True)
        while sum(map(len, self._values.values())) > self.size:
            self._values.popitem(last=False)


def bare(reward: Reward) -> Reward:
    """The reward inside of what is around it."""
    while isinstance(reward, Wrapped):
        reward = reward.reward
    return reward


def caches(reward: object) -> Iterator[Cached]:
    """Every cache in a reward."""
    inside = reward.modules() if isinstance(reward, nn.Module) else ()
    return (module for module in inside if isinstance(module, Cached))
