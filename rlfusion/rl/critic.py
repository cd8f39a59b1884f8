"""Learning a critic: the value of noised samples, by regression on the rewards of the samples that they came from.

    (1)  mean:  q = E[R | x_t, c],                       the minimiser of E (R - q)^2
    (2)  soft:  q = log E[exp(beta R) | x_t, c] / beta,  the minimiser of E 2 (e^u - u - 1) / beta^2,  u = beta (R - q)
         (LINEX; Garg et al. 2023, Eq. 9). beta -> 0 is Eq. (1), and for every beta q = R where x_t tells R
    (3)  explained variance  1 - Var(R - q) / Var(R):  0 for a constant, and at most what x_t tells of R, which at high
         noise is little

Targets are the rewards themselves, never the critic's own answers: nothing bootstraps, so there is no target network.
"""

import copy
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from rlfusion import models
from rlfusion.common import on_disk, shards
from rlfusion.common.errors import ConfigError, require_positive
from rlfusion.common.seeding import Key, integer, stream
from rlfusion.common.tensors import Cond, map_cond, moved
from rlfusion.common.weights import require_entries
from rlfusion.diffusion.consistency import LCM
from rlfusion.diffusion.denoiser import Denoiser, Denoising, Embedded, Guided
from rlfusion.models import lora
from rlfusion.nets.critic import Critic
from rlfusion.objectives.renoise import renoise
from rlfusion.objectives.times import Times
from rlfusion.rl.replay import Replay
from rlfusion.rollout import Task
from rlfusion.rollout.trajectory import Trajectory
from rlfusion.training.devices import place_beside
from rlfusion.training.optimization import Optimization
from rlfusion.training.ranks import current

COPY = "Copy()"


class Value(Protocol):
    """A frozen dataclass: the loss (N,) of answers q (N,) for rewards R (N,), which says what q becomes."""

    def __call__(self, q: Tensor, reward: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Mean:
    """Eq. (1)."""

    def __call__(self, q: Tensor, reward: Tensor) -> Tensor:
        return (reward - q).square()


@dataclass(frozen=True)
class Soft:
    """Eq. (2)."""

    beta: float

    def __post_init__(self) -> None:
        require_positive(self, "beta")

    def __call__(self, q: Tensor, reward: Tensor) -> Tensor:
        u = self.beta * (reward - q)
        return 2 * (u.expm1() - u) / self.beta**2


def explained_variance(q: Tensor, reward: Tensor) -> float:
    """Eq. (3) of (N,) answers and rewards; 0 where all rewards are equal."""
    total = reward.var(correction=0)
    return (1 - (reward - q).var(correction=0) / total).item() if total > 0 else 0.0


class Regression:
    """A critic that learns from the newest ``memory`` samples, each noised afresh whenever it is drawn."""

    def __init__(
        self, optimization: Optimization, value: Value, times: Times, updates: int, batch: int, memory: int, seed: int
    ) -> None:
        """``optimization`` is that of a ``Critic``; ``value`` says what is learned, ``times`` how t is drawn; a ``fit``
        makes ``updates`` steps on ``batch`` rows each; ``seed`` keys all draws.
        """
        self.critic = cast(Critic, optimization.module)
        self.value, self.times, self.seed = value, times, seed
        self.updates, self.batch, self.replay = updates, batch, Replay(memory)
        self.optimization = optimization

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """q (B,)."""
        return self.critic(x, t, cond)

    def fit(self, new: Trajectory, iteration: int) -> dict[str, float]:
        """Take in the samples and rewards of a rollout and make the updates.

        Returns:
            explained_variance: of the new rewards, one noising each, before anything is learned from them.
            critic_loss: the mean over the updates.

        Raises:
            NumericalError: a gradient is not finite.
        """
        explained, held = self._explained(new, iteration), self.replay.add(new)
        losses = [self._update(held, (self.seed, "critic", iteration, k)) for k in range(self.updates)]
        return {"explained_variance": explained, "critic_loss": torch.stack(losses).mean().item()}

    @torch.no_grad()
    def _explained(self, new: Trajectory, iteration: int) -> float:
        noise = renoise(new.x[:, -1], self.critic.schedule, self.times, (self.seed, "critic look", iteration))
        return explained_variance(self.critic(noise.x, noise.t, new.cond), new.scored)

    def _update(self, held: Trajectory, key: tuple[Key, ...]) -> Tensor:
        rows = torch.from_numpy(stream(*key).integers(0, len(held), self.batch))
        at, cond = moved(rows, held.x.device), map_cond(lambda c: c[moved(rows, c.device)], held.cond)
        noise = renoise(held.x[at, -1], self.critic.schedule, self.times, (*key, "noise"))
        reward = held.scored[moved(rows, held.scored.device)]
        loss = self.value(self.critic(noise.x, noise.t, cond), reward).mean()
        loss.backward()
        self.optimization.step()
        return loss.detach()

    def state_dict(self) -> dict:
        return {"optimization": self.optimization.state_dict(), "replay": self.replay.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        require_entries(state, self.state_dict(), "the critic")
        self.optimization.load_state_dict(state["optimization"])
        self.replay.load_state_dict(state["replay"], self.critic.head.weight.device)


def make_critic(text: str, task: Task, seed: int) -> Critic:
    """A critic of the noised samples of ``task``: COPY copies the denoiser's network, weights included; any other text
    is a network as of ``models.Config.net``, with initial weights keyed by ``seed``. Where the denoiser's network is
    split over ranks, so is the critic.

    Raises:
        ConfigError: an unknown network or setting, or a new network where conditions are no classes.
    """
    like, weight = bare(task.policy.denoiser)
    first = next(like.parameters())
    with models.initial(integer(seed, "critic")):
        net = _copy(like) if text == COPY else _new(text, task)
        own = Denoiser(net, like.schedule, like.kind, like.precision)
        critic = Critic(own if text != COPY or weight is None else Embedded(own, weight), task.shape)
    critic.to(dtype=first.dtype).requires_grad_()
    place_beside(critic, [critic.head] if text == COPY else [net, critic.head], like, first.device)
    return critic


def _copy(like: Denoiser) -> nn.Module:
    """A copy of the denoiser's network, its adapters merged into its weights; split, where it is."""
    return lora.split_copy(like.net, current().exact) if shards.roots(like) else copy.deepcopy(lora.merged(like).net)


def _new(text: str, task: Task) -> nn.Module:
    if task.conditions is None or task.conditions.ndim != 1 or task.conditions.dtype != torch.int64:
        raise ConfigError(f"critic = {text!r}: the conditions are no classes, expected {COPY!r}")
    with on_disk.parameters(bool(shards.roots(task.policy))):
        return models.make_net(text, task.shape, task.prompts)


def bare(denoiser: Denoising) -> tuple[Denoiser, float | None]:
    """The denoiser within its wrappers, and the guidance weight that one of them gives it to read, if one does."""
    weight = None
    while isinstance(denoiser, Guided | LCM | Embedded):
        weight = denoiser.weight if isinstance(denoiser, Embedded) else weight
        denoiser = denoiser.denoiser
    return cast(Denoiser, denoiser), weight
