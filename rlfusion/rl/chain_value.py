"""A learned value function of the denoising chain: what the walks that pass a state will be worth.

    (1)  V(x_t, t, c) = m + s (h . net(x_t / sqrt(alpha^2 + sigma^2), t, c) + b)
         net is any of the house's networks, its answer read by one linear layer; c is the number of the prompt, so that
         any kind of condition will do; m and s are the mean and std of the first rewards seen, and stay
    (2)  loss = |V - G_k|^2 / s^2,  G_k the lambda-returns of stored walks under V as it was (``advantage``, Eq. 4)
    (3)  explained variance = 1 - Var(G - V) / Var(G), G the plain returns (lam = 1): before the fit, on walks that V
         has not seen. At most 1; below 0 the mean of the rewards would do better

For gamma = 1 the limit of V is E[R | x_t, c] under the policy that acts.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from rlfusion import models
from rlfusion.common import on_disk, shards
from rlfusion.common.errors import ConfigError, require_positive
from rlfusion.common.seeding import stream
from rlfusion.common.tensors import cast, moved
from rlfusion.common.weights import require_entries
from rlfusion.diffusion import rows
from rlfusion.diffusion.schedule import Level, Schedule, level
from rlfusion.rl.advantage import chain_advantages
from rlfusion.rollout import Task
from rlfusion.rollout.parted import at_steps
from rlfusion.rollout.trajectory import Trajectory
from rlfusion.training.devices import place_beside
from rlfusion.training.optimization import Optimization


@dataclass(frozen=True)
class Settings:
    """Settings of a value function.

    Attributes:
        value_net: its network, as of the model: ResidualMLP(width=..., depth=...), UNet(...), DiT(...).
        value_lr: learning rate of its own.
        value_epochs: passes over each rollout.
        value_batch: states in one of its optimiser steps.
        gamma: discount of each step on the way to the reward.
        lam: lambda of its targets and of the advantages: 1 is what the walk brought, 0 what V says of the next state.
    """

    value_net: str = "ResidualMLP(width=64, depth=2)"
    value_lr: float = 1e-3
    value_epochs: int = 4
    value_batch: int = 512
    gamma: float = 1.0
    lam: float = 0.95
    optimizer: str = "adamw"

    def __post_init__(self) -> None:
        require_positive(self, "value_lr", "value_epochs", "value_batch")
        if not 0 < self.gamma <= 1:
            raise ConfigError(f"gamma = {self.gamma}: expected 0 < gamma <= 1")
        if not 0 <= self.lam <= 1:
            raise ConfigError(f"lam = {self.lam}: expected 0 <= lam <= 1")


class Value(nn.Module):
    """Eq. (1): x (N, *), t () or (N,) float64 on the CPU, prompts (N,) -> (N,)."""

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, schedule: Schedule, size: int) -> None:
        super().__init__()
        self.net, self.head, self.schedule = net, nn.Linear(size, 1), schedule
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        own = x.to(self.head.weight)
        scale = cast(self._scale(t, own), own)
        answer = self.net(scale * own, cast(t.reshape(-1), own).expand(len(own)), prompt)
        return self.mean + self.std * self.head(answer.flatten(1)).squeeze(1)

    def _scale(self, t: Tensor, x: Tensor) -> Tensor:
        """The factor of x, float64; of rows of a chain, gathered from those of its steps."""
        if chain := rows.chain(t):
            return chain.gather(_scales(self.schedule, chain.grid)).reshape(-1, *[1] * (x.ndim - 1))
        return _inverse_size(level(self.schedule, t, x))


def _inverse_size(l: Level) -> Tensor:
    return (l.alpha.square() + l.sigma.square()).rsqrt()


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _scales(schedule: Schedule, grid: tuple[float, ...]) -> Tensor:
    """The factors (K,) of the states before the steps of a chain."""
    return _inverse_size(schedule(torch.tensor(grid[:-1], dtype=torch.float64)))


class ChainValue:
    """Eq. (1) to (3) on the chain of a task."""

    def __init__(self, task: Task, config: Settings, seed: int) -> None:
        """``seed`` keys the initial weights and the order of the states. Where the policy's network is split
        over ranks, so is V.

        Raises:
            ConfigError: no such network.
        """
        self.config, self.seed, self.times = config, seed, task.times
        with models.initial(seed), on_disk.parameters(bool(shards.roots(task.policy))):
            net = models.make_net(config.value_net, task.shape, task.prompts)
            self.value = Value(net, task.policy.schedule, math.prod(task.shape))
        place_beside(self.value, [net, self.value.head], task.policy, torch.device(task.device))
        self.optimization = Optimization(self.value, config.value_lr, optimizer=config.optimizer)

    @torch.no_grad()
    def see(self, reward: Tensor) -> None:
        """Take m and s from rewards (B,), unless they are known; s stays unknown, and V = m, while all are equal."""
        if not bool(self.value.std):
            self.value.mean.copy_(reward.double().mean())
            self.value.std.copy_(reward.double().std(correction=0))

    @torch.no_grad()
    def at(self, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        """V of states (N, *) at times (N,) and prompts (N,), (N,)."""
        parts = torch.arange(len(x)).split(4 * self.config.value_batch)
        return torch.cat([self.value(x[moved(r, x.device)], t[r], prompt[moved(r, prompt.device)]) for r in parts])

    @torch.no_grad()
    def along(self, batch: Trajectory) -> Tensor:
        """V of the states before each step of stored walks, (B, K)."""
        parts = zip(*(where.split(4 * self.config.value_batch) for where in self._states(batch)))
        return torch.cat([self._before(batch, walk, step) for walk, step in parts]).reshape(len(batch), -1)

    def _before(self, batch: Trajectory, walk: Tensor, step: Tensor) -> Tensor:
        """V of the states before some steps (N,) of stored walks, (N,)."""
        t, _ = rows.of_chain(self.times, step.cpu())
        return self.value(at_steps(batch.x, walk, step), t, batch.group[walk])

    def advantages(self, reward: Tensor, value: Tensor) -> Tensor:
        """A_k of walks with these rewards (B,) and values (B, K); ``advantage``, Eq. (4)."""
        return chain_advantages(reward.to(value), value, self.config.gamma, self.config.lam)

    def explained(self, reward: Tensor, value: Tensor) -> float:
        """Eq. (3)."""
        plain = chain_advantages(reward.to(value), value, self.config.gamma, 1.0).double()
        return 1 - (plain.var() / (plain + value).var().clamp(min=1e-12)).item()

    def fit(self, batch: Trajectory, returns: Tensor, iteration: int) -> dict[str, float]:
        """Eq. (2), in the passes of rollout ``iteration``: value_loss, the mean over them.

        Raises:
            NumericalError: a gradient is not finite.
        """
        walk, step = self._states(batch)
        returns, losses = returns.flatten(), []
        scale = self.value.std.clamp(min=1e-12)
        for epoch in range(self.config.value_epochs):
            order = stream(self.seed, "value", iteration, epoch).permutation(len(walk))
            for some in torch.from_numpy(order).split(self.config.value_batch):
                at = moved(some, walk.device)
                found = self._before(batch, walk[at], step[at])
                loss = ((found - returns[moved(some, returns.device)]) / scale).square().mean()
                loss.backward()
                self.optimization.step()
                losses.append(loss.detach())
        return {"value_loss": torch.stack(losses).mean().item()}

    def _states(self, batch: Trajectory) -> tuple[Tensor, Tensor]:
        """(walk, step) of every state before a step, walk by walk."""
        where = torch.arange(batch.steps * len(batch), device=batch.x.device)
        return where // batch.steps, where % batch.steps

    def state_dict(self) -> dict:
        return {"optimization": self.optimization.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        require_entries(state, self.state_dict(), "the value")
        self.optimization.load_state_dict(state["optimization"])
