"""Trajectories for the learner, step by step, from a backend that may run ahead of it."""

from collections.abc import Iterator

import torch
from torch import nn

from rlfusion.common.weights import Live, Weights
from rlfusion.jobs.parts import Collecting, RewardSpec
from rlfusion.jobs.scoring import scored
from rlfusion.rollout import Backend, Pending, plan, version_for
from rlfusion.rollout.trajectory import Trajectory, concatenate
from rlfusion.training.stages import IDLE, PUBLISH, ROLLOUT, stage


class Collector:
    """Trajectories in order of their step, collected up to ``lag`` steps ahead of the learner.

    ``publish`` gives it the weights after n updates; it sends out every step that acts under that version.
    ``metrics`` are those of the last batch, to be logged.
    """

    def __init__(
        self, backend: Backend, spec: Collecting, rewards: RewardSpec, prompts: int, start: int, device: torch.device
    ) -> None:
        self.backend, self.spec, self.rewards = backend, spec, rewards
        self.prompts, self.start, self.device = prompts, start, device
        self.pending: dict[int, Pending] = {}
        self.published: dict[int, Weights] = {}
        self.metrics: dict[str, float] = {}

    def acting(self, policy: nn.Module, version: int) -> Weights:
        """The learner's weights, for walks to come. In this process, and not ahead of the learner, all that act under
        them are collected before they change again: they need not be packed.
        """
        here = not self.spec.rollout.workers and not self.spec.rollout.lag
        return Live(policy, version) if here else Weights.of(policy, version)

    def publish(self, weights: Weights) -> None:
        """Send out the steps whose version these weights are."""
        with stage(PUBLISH):
            self._send(weights)

    def _send(self, weights: Weights) -> None:
        self.published[weights.version] = weights
        last = min(weights.version + self.spec.rollout.lag, self.spec.updates - 1)
        for step in range(max(self.start, weights.version), last + 1):
            if self.version(step) == weights.version:
                self.pending[step] = self.backend.submit(self.items(step, weights.version), weights)
        for old in [v for v in self.published if v < weights.version - self.spec.rollout.lag]:
            del self.published[old]

    def version(self, step: int) -> int:
        """The version that acts in a step."""
        return min(step, max(self.spec.least, version_for(step, self.spec.rollout.lag, self.spec.checkpoint_every)))

    def items(self, step: int, version: int) -> list:
        """The work items of a step."""
        r = self.spec.rollout
        return plan(self.spec.seed, step, r.prompts, r.samples_per_prompt, r.item, self.prompts, version)

    def batches(self) -> Iterator[Trajectory]:
        """The trajectory of each step from the start on."""
        for step in range(self.start, self.spec.updates):
            yield self.batch(step)

    def batch(self, step: int) -> Trajectory:
        """The trajectory of a step; where that fails, it may be asked for again."""
        with stage(IDLE if self.spec.rollout.workers else ROLLOUT):
            collected = concatenate(self.pending[step]())
        batch, self.metrics = scored(collected.to(self.device), self.rewards)
        del self.pending[step]
        return batch

    def still_needed(self, done: int) -> dict[int, Weights]:
        """The older versions that steps after ``done`` act under, those of a longer run too: empty at a regular
        checkpoint.
        """
        ahead = range(done, done + self.spec.rollout.lag)
        wanted = {self.version(step) for step in ahead} - {done}
        return {v: w for v, w in self.published.items() if v in wanted}
