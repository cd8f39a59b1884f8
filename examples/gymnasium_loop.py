"""The denoising chain by hand, as any other environment of Gymnasium.

python examples/gymnasium_loop.py

An agent that plays the noise of the model's own sampler is that sampler: the loop below draws the same samples.
"""

import numpy as np
import torch
from torch import Tensor, nn

import rlfusion as rlf


class Exact(nn.Module):
    """The denoiser of pixels that are N(0, 1/4) each, in closed form: x_t = (1 - t) x_0 + t eps -> E[x_0 | x_t]."""

    def __init__(self) -> None:
        super().__init__()
        self.variance = nn.Parameter(torch.tensor(0.25))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        t, v = t.view(-1, 1, 1, 1), self.variance
        return (1 - t) * v * x / ((1 - t) ** 2 * v + t**2)


def main() -> tuple[float, float]:
    """Play 60 episodes; the mean and the standard deviation of the pixels of their samples, in [-1, 1]."""
    kernel = {"steps": 20, "kernel": "FlowSDE(noise=0.7)"}
    model = rlf.Model.of(rlf.Denoiser(Exact(), rlf.Rectified(), "x0"), (1, 4, 4), chain=kernel)
    env = rlf.make_env(model, reward="ink", action="noise")
    noise, pixels, rewards = np.random.default_rng(0), [], []
    for episode in range(60):
        env.reset(seed=episode)  # gives obs, {"x": x_t, "t": ..., "s": ..., "cond": ...}, and info
        over = False
        while not over:
            action = noise.standard_normal(env.action_space.shape).astype(np.float32)
            _, reward, terminated, truncated, info = env.step(action)  # a policy of yours would look at the first, obs
            over = terminated or truncated
        pixels.append(torch.as_tensor(info["sample"]))
        rewards.append(float(reward))
    samples = 2 * torch.stack(pixels) - 1
    print(f"mean reward {np.mean(rewards):.3f}; pixels {samples.mean():.3f} +- {samples.std():.3f}")
    return samples.mean().item(), samples.std().item()


if __name__ == "__main__":
    main()
