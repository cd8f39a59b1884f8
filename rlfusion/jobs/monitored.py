"""What the monitor of a run looks at: samples of the policy on fixed seeds, beside its base model."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rlfusion.common.compiled import plain
from rlfusion.diffusion.policy import Policy, frozen_copy
from rlfusion.jobs.measure import Judged, Unjudged, draw, draw_beside
from rlfusion.jobs.parts import RewardSpec
from rlfusion.rewards import Reward
from rlfusion.rl.monitor import Config, Monitor


@dataclass
class Monitored:
    """A policy, which is the base model when this is made, with its judge, its reward and those that are held out."""

    settings: Config
    policy: Policy
    times: Tensor
    judged: Judged | Unjudged
    reward: Reward
    rewards: RewardSpec
    root: Path
    seed: int

    def __post_init__(self) -> None:
        noisy = bool((self.policy.stds(self.times) > 0).any())
        with plain(self.policy):
            self.base = frozen_copy(self.policy) if self.settings.every and noisy else None

    def monitor(self, samples: Tensor) -> Monitor:
        """The monitor that compares with the base model's ``samples``."""
        label, r = self._label, self.rewards
        names = self.settings.held_out
        held_out = {name: self.judged.reward(name, r.options_of(name), self.root, r.call_options) for name in names}
        for reward in held_out.values():
            if isinstance(reward, nn.Module):
                reward.to(label.device)
        rewards = {"reward": self.reward, **held_out}
        return Monitor(self.settings, self.judged.judge, rewards, samples.to(label.device), label, r.may_fail)

    def draw(self) -> Tensor:
        """The policy's samples."""
        return draw(self.policy, self.times, self._label, self.judged.shape, self.seed, "monitor")

    def look(self) -> tuple[Tensor, float | None]:
        """The samples of ``draw``, and the KL of their walks to the base model; one walk gives both."""
        if self.base is None:
            return self.draw(), None
        about = (self.times, self._label, self.judged.shape, self.seed, "monitor")
        samples, kl = draw_beside(self.policy, self.base, *about)
        return samples, kl.mean().item()

    @property
    def _label(self) -> Tensor:
        device = next(self.policy.parameters()).device
        return torch.arange(self.settings.samples, device=device) % self.judged.classes
