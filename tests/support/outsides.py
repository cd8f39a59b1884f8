"""What learners open by name in tests, whatever it is called: a teacher that is near the policy, and stored samples."""

import torch

from rlfusion.diffusion.policy import Policy, frozen_copy
from rlfusion.rollout.outside import Stored


class Beside:
    """An ``Outside``, whose teacher has the weights of ``policy`` as it is now and a little noise; its samples of a
    ``shape`` are of the first two prompts.
    """

    def __init__(self, policy: Policy, shape: tuple[int, ...] = ()) -> None:
        self.shape = shape
        self.held, draw = frozen_copy(policy), torch.Generator().manual_seed(7)
        for p in self.held.parameters():
            p.data.add_(0.1 * torch.randn(p.shape, generator=draw).to(p))

    def teacher(self, model: str, guidance: float | None) -> Policy:
        return self.held

    def stored(self, data: str) -> Stored:
        draw = torch.Generator().manual_seed(8)
        x = torch.randn(60, *self.shape, generator=draw)
        return Stored(x, torch.arange(60) % 2, x.flatten(1).mean(1).double())
