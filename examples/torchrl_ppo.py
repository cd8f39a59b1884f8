"""TorchRL's PPO on the denoising chain: its wrapper, its estimator of advantages, its loss (pip install torchrl).

python examples/torchrl_ppo.py

The environment is a plain one of Gymnasium. Its action is the noise that the model's sampler would inject, and the
policy begins as N(0, 1): as the base sampler.
"""

from typing import Any

import torch
from torch import Tensor, nn

import rlfusion as rlf

ENVS, STEPS, SIDE = 8, 5, 4
UPDATES, EPOCHS, EPISODES, MINIBATCHES = 12, 4, 4, 8
D = SIDE**2


class Exact(nn.Module):
    """The denoiser of pixels that are N(0, 1/4) each, in closed form: x_t = (1 - t) x_0 + t eps -> E[x_0 | x_t]."""

    def __init__(self) -> None:
        super().__init__()
        self.variance = nn.Parameter(torch.tensor(0.25))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        t, v = t.view(-1, 1, 1, 1), self.variance
        return (1 - t) * v * x / ((1 - t) ** 2 * v + t**2)


class Heads(nn.Module):
    """What the state (x (..., 1, SIDE, SIDE), t (...)) is mapped to, by a small network that ends in zeros."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(D + 1, 64), nn.Tanh(), nn.Linear(64, outputs))
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        state = torch.cat([x.flatten(-3), t.reshape(*x.shape[:-3], 1).to(x)], -1)
        return self.layers(state)


class Actor(nn.Module):
    """Mean and deviation of the noise, (..., 1, SIDE, SIDE) each."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_std = Heads(D), nn.Parameter(torch.zeros(1, SIDE, SIDE))

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        loc = self.mean(x, t).unflatten(-1, (1, SIDE, SIDE))
        return loc, self.log_std.exp().expand_as(loc)


def parts() -> tuple[Any, Any, Any, Any]:
    """The environments, the actor, the loss and the estimator of advantages."""
    from tensordict.nn import InteractionType, TensorDictModule
    from torch.distributions import Independent, Normal
    from torchrl.envs import GymWrapper, SerialEnv
    from torchrl.modules import ProbabilisticActor, ValueOperator
    from torchrl.objectives import ClipPPOLoss
    from torchrl.objectives.value import GAE

    def density(loc: Tensor, scale: Tensor) -> Independent:
        return Independent(Normal(loc, scale), 3)

    chain = {"steps": STEPS, "kernel": "FlowSDE(noise=0.7)"}
    model = rlf.Model.of(rlf.Denoiser(Exact(), rlf.Rectified(), "x0"), (1, SIDE, SIDE), chain=chain)
    envs = SerialEnv(ENVS, lambda: GymWrapper(rlf.make_env(model, "ink", action="noise")))
    seen = ["x", "t"]
    heads = TensorDictModule(Actor(), in_keys=seen, out_keys=["loc", "scale"])
    drawn = {"return_log_prob": True, "default_interaction_type": InteractionType.RANDOM}
    actor = ProbabilisticActor(heads, in_keys=["loc", "scale"], distribution_class=density, **drawn)
    critic = ValueOperator(Heads(1), in_keys=seen)
    loss = ClipPPOLoss(actor, critic, clip_epsilon=0.2, entropy_bonus=False, critic_coeff=0.5)
    return envs, actor, loss, GAE(gamma=1.0, lmbda=0.95, value_network=critic, average_gae=True)


def main() -> tuple[float, float]:
    """Train; the mean reward of an episode in the first and in the last rollout."""
    torch.manual_seed(0)
    envs, actor, loss, advantages = parts()
    envs.set_seed(0)
    optimizer, rewards = torch.optim.Adam(loss.parameters(), lr=3e-3, eps=1e-5), []
    for number in range(UPDATES):
        with torch.no_grad():
            walks = envs.rollout(EPISODES * STEPS, actor, break_when_any_done=False)
        rewards.append(walks["next", "reward"].sum().item() / (ENVS * EPISODES))
        for _ in range(EPOCHS):
            with torch.no_grad():
                advantages(walks)
            flat = walks.flatten()
            for rows in torch.randperm(len(flat)).chunk(MINIBATCHES):
                terms = loss(flat[rows])
                optimizer.zero_grad()
                (terms["loss_objective"] + terms["loss_critic"]).backward()
                nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
                optimizer.step()
        if number % 5 == 0 or number + 1 == UPDATES:
            print(f"update {number}: reward {rewards[-1]:.3f}")
    return rewards[0], rewards[-1]


if __name__ == "__main__":
    main()
