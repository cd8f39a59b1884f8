"""PPO in the manner of CleanRL, one file of plain torch, on the denoising chain as a vector environment.

python examples/cleanrl_ppo.py

An episode is one walk of the chain; its action is the noise that the model's sampler would inject. So a policy that is
N(0, 1) is the base sampler, and PPO moves it to where the reward is, without touching the model.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Normal

import rlfusion as rlf

ENVS, STEPS, SIDE = 128, 5, 4
UPDATES, EPOCHS, MINIBATCHES = 25, 4, 4
CLIP, LR, GAE_LAMBDA, ENTROPY, VALUE = 0.2, 1e-3, 0.95, 0.0, 0.5


class Exact(nn.Module):
    """The denoiser of pixels that are N(0, 1/4) each, in closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.variance = nn.Parameter(torch.tensor(0.25))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        t, v = t.view(-1, 1, 1, 1), self.variance
        return (1 - t) * v * x / ((1 - t) ** 2 * v + t**2)


class Agent(nn.Module):
    """Actor and critic of the state (x, t). The actor begins as the base sampler: mean 0, deviation 1."""

    def __init__(self) -> None:
        super().__init__()
        d = SIDE**2
        self.actor = nn.Sequential(nn.Linear(d + 1, 64), nn.Tanh(), nn.Linear(64, d))
        self.critic = nn.Sequential(nn.Linear(d + 1, 64), nn.Tanh(), nn.Linear(64, 1))
        self.log_std = nn.Parameter(torch.zeros(d))
        nn.init.zeros_(self.actor[-1].weight)
        nn.init.zeros_(self.actor[-1].bias)

    def forward(self, state: Tensor) -> tuple[Normal, Tensor]:
        return Normal(self.actor(state), self.log_std.exp()), self.critic(state).squeeze(-1)


def state_of(obs: rlf.Observation) -> Tensor:
    """The observation as one row an environment: x_t, and the time that all chains have."""
    return torch.cat([obs.x.flatten(1), obs.t.float().expand(ENVS, 1)], 1)


@torch.no_grad()
def rollout(env: Any, agent: Agent, seed: int) -> dict[str, Tensor]:
    """One episode of every environment: (STEPS, ENVS, ...) each."""
    obs, _ = env.reset(seed=seed)
    held: dict[str, list[Tensor]] = {name: [] for name in ("state", "action", "log_prob", "value", "reward")}
    for _ in range(STEPS):
        state = state_of(obs)
        policy, value = agent(state)
        action = policy.sample()
        obs, reward, *_ = env.step(action.clamp(-5, 5).view(ENVS, 1, SIDE, SIDE))
        row = (state, action, policy.log_prob(action).sum(1), value, torch.as_tensor(reward))
        for name, part in zip(held, row):
            held[name].append(part)
    return {name: torch.stack(parts) for name, parts in held.items()}


def advantages(held: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates, and what the critic is to say; the episode ends with the last step."""
    values, last, found = held["value"], torch.zeros(ENVS), []
    for step in reversed(range(STEPS)):
        after = values[step + 1] if step + 1 < STEPS else torch.zeros(ENVS)
        last = held["reward"][step] + after - values[step] + GAE_LAMBDA * last
        found.append(last)
    advantage = torch.stack(found[::-1])
    return advantage, advantage + values


def update(agent: Agent, optimizer: torch.optim.Optimizer, held: dict[str, Tensor]) -> None:
    """Some passes over the rollout, in minibatches."""
    advantage, target = advantages(held)
    flat = {name: part.flatten(0, 1) for name, part in held.items()}
    advantage, target = advantage.flatten(), target.flatten()
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(target)).chunk(MINIBATCHES):
            policy, value = agent(flat["state"][rows])
            ratio = (policy.log_prob(flat["action"][rows]).sum(1) - flat["log_prob"][rows]).exp()
            a = advantage[rows]
            a = (a - a.mean()) / (a.std() + 1e-8)
            loss = -torch.minimum(ratio * a, ratio.clamp(1 - CLIP, 1 + CLIP) * a).mean()
            loss = loss + VALUE * (value - target[rows]).square().mean() - ENTROPY * policy.entropy().sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
            optimizer.step()


def main() -> tuple[float, float]:
    """Train; the mean reward of the first and of the last rollout."""
    torch.manual_seed(0)
    kernel = {"steps": STEPS, "kernel": "FlowSDE(noise=0.7)"}
    model = rlf.Model.of(rlf.Denoiser(Exact(), rlf.Rectified(), "x0"), (1, SIDE, SIDE), chain=kernel)
    env = rlf.make_env(model, "ink", ENVS, action="noise", backend="torch", autoreset_mode="Disabled")
    agent, rewards = Agent(), []
    optimizer = torch.optim.Adam(agent.parameters(), lr=LR, eps=1e-5)
    for number in range(UPDATES):
        held = rollout(env, agent, seed=number * ENVS)
        update(agent, optimizer, held)
        rewards.append(held["reward"][-1].mean().item())
        if number % 10 == 0 or number + 1 == UPDATES:
            print(f"update {number}: reward {rewards[-1]:.3f}")
    return rewards[0], rewards[-1]


if __name__ == "__main__":
    main()
