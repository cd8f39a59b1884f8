"""What learners open by name in tests: a teacher that is near the policy, whatever it is called."""

import torch

from rlfusion.diffusion.policy import Policy, frozen_copy


class Beside:
    """An ``Outside``, whose teacher has the weights of ``policy`` as it is now and a little noise."""

    def __init__(self, policy: Policy) -> None:
        self.held, draw = frozen_copy(policy), torch.Generator().manual_seed(7)
        for p in self.held.parameters():
            p.data.add_(0.1 * torch.randn(p.shape, generator=draw).to(p))

    def teacher(self, model: str, guidance: float | None) -> Policy:
        return self.held
