"""PPO of Stable-Baselines3, as it is, on the denoising chain (pip install stable-baselines3).

python examples/stable_baselines.py

The environment is a plain one of Gymnasium. Its action is the noise that the model's sampler would inject, so that the
policy with which Stable-Baselines3 begins, a Gaussian of mean about 0 and deviation 1, is about the base sampler.
"""

import numpy as np
import torch
from torch import Tensor, nn

import rlfusion as rlf

ENVS, STEPS, SIDE, EPISODES = 16, 5, 4, 40


class Exact(nn.Module):
    """The denoiser of pixels that are N(0, 1/4) each, in closed form: x_t = (1 - t) x_0 + t eps -> E[x_0 | x_t]."""

    def __init__(self) -> None:
        super().__init__()
        self.variance = nn.Parameter(torch.tensor(0.25))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        t, v = t.view(-1, 1, 1, 1), self.variance
        return (1 - t) * v * x / ((1 - t) ** 2 * v + t**2)


def main() -> tuple[float, float]:
    """Train; the mean reward of an episode under the policy before and after."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    chain = {"steps": STEPS, "kernel": "FlowSDE(noise=0.7)"}
    model = rlf.Model.of(rlf.Denoiser(Exact(), rlf.Rectified(), "x0"), (1, SIDE, SIDE), chain=chain)
    chains = make_vec_env(lambda: rlf.make_env(model, "ink", action="noise"), ENVS, seed=0)
    learner = PPO(
        *("MultiInputPolicy", chains),
        **{"n_steps": 4 * STEPS, "batch_size": 80, "n_epochs": 4, "learning_rate": 1e-3, "gamma": 1.0, "seed": 0},
        device="cpu",
    )

    def score() -> float:
        rewards, _ = evaluate_policy(
            learner, chains, n_eval_episodes=64, deterministic=False, return_episode_rewards=True
        )
        return float(np.mean(rewards))

    before = score()
    learner.learn(ENVS * STEPS * EPISODES)
    after = score()
    print(f"reward {before:.3f} -> {after:.3f} after {ENVS * EPISODES} episodes")
    return before, after


if __name__ == "__main__":
    main()
