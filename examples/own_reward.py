"""A reward of your own on a model of your own, in one file and some seconds, without a folder.

python examples/own_reward.py

The command takes the same function: rlfusion finetune --reward examples/own_reward.py:left_heavy
"""

import torch
from torch import Tensor, nn

import rlfusion as rlf


def left_heavy(samples: Tensor, cond: Tensor) -> Tensor:
    """Samples (B, C, H, W) in [0, 1], the class asked for (B,) -> (B,): how much brighter the left half is."""
    half = samples.shape[-1] // 2
    return samples[..., :half].mean((1, 2, 3)) - samples[..., half:].mean((1, 2, 3))


class Net(nn.Module):
    """x (B, C, H, W), t (B,), cond (B,) -> the clean image (B, C, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(17, 64), nn.SiLU(), nn.Linear(64, 16))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return self.layers(torch.cat([x.flatten(1), t[:, None]], 1)).view_as(x)


def main() -> tuple[float, float]:
    """Train; the mean reward before and after."""
    torch.manual_seed(0)
    model = rlf.Model.of(rlf.Denoiser(Net(), rlf.Cosine(), "x0"), (1, 4, 4), chain={"steps": 5, "last_noise": 0.1})
    before = rlf.evaluate(model, left_heavy, samples=200)["reward"]
    run = rlf.finetune(model, reward=left_heavy, agent="grpo", updates=20)
    for metrics in run:  # one rollout and its update
        print(f"update {run.updates}: reward {metrics['reward']:.3f}")
    after = rlf.evaluate(run.model, left_heavy, samples=200)["reward"]
    print(f"reward {before:.3f} -> {after:.3f}")
    return before, after


if __name__ == "__main__":
    main()
