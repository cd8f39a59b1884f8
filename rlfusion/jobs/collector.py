"""Trajectories for the learner, step by step, from a backend that may run ahead of it."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from rlfusion.common.weights import Weights
from rlfusion.jobs.balance import Balance
from rlfusion.jobs.parts import Collecting, RewardSpec
from rlfusion.jobs.scoring import scored
from rlfusion.rl.guard import Config as Guards
from rlfusion.rollout import Backend, Pending, plan, version_for
from rlfusion.rollout.item import lag_at
from rlfusion.rollout.trajectory import Trajectory, concatenate
from rlfusion.training import publishing
from rlfusion.training.stages import IDLE, PUBLISH, ROLLOUT, stage

NOWHERE = Path()
LAGS = 100
"""Rollouts whose lags the histogram shows."""


class Collector:
    """Trajectories in order of their step, collected up to ``lag`` steps ahead of the learner.

    ``publish`` gives it the weights after n updates; it sends out every step that acts under that version.
    ``metrics`` are those of the last batch, to be logged, and ``scores`` its rewards, None where nobody has asked yet.
    ``balance`` weighs several rewards, and ``constraints`` are the figures of each constraint in the last batch.
    ``slowed`` has the versions from which on the lag is one less; it is a part of what a run that resumes needs.
    ``left`` are the rewards that rollouts from ``start`` on may ask for, None for any number: the last rollout is cut
    to the whole prompts that are left.
    """

    def __init__(
        self,
        backend: Backend,
        spec: Collecting,
        rewards: RewardSpec,
        prompts: int,
        start: int,
        device: torch.device,
        folder: Path = NOWHERE,
    ) -> None:
        """``folder`` is the run's, for weights that go to workers in files."""
        self.folder, self.backend, self.spec, self.rewards = folder, backend, spec, rewards
        self.prompts, self.start, self.device = prompts, start, device
        self.pending: dict[int, Pending] = {}
        self.published: dict[int, Weights] = {}
        self.metrics: dict[str, float] = {}
        self.scores: Tensor | None = None
        self.balance = Balance(rewards)
        self.constraints: dict[str, float] = {}
        self.slowed: list[int] = []
        self.left: int | None = None

    def acting(self, policy: nn.Module, version: int) -> Weights:
        """The learner's weights, for walks to come."""
        rollout = self.spec.rollout
        return publishing.acting(policy, version, bool(rollout.workers), rollout.lag, self.folder)

    def publish(self, weights: Weights) -> None:
        """Send out the steps whose version these weights are."""
        with stage(PUBLISH):
            self._send(weights)

    def _send(self, weights: Weights) -> None:
        self.published[weights.version] = weights
        ahead = lag_at(weights.version, self.spec.rollout.lag, self._slowed())
        last = min(weights.version + ahead, self.spec.updates - 1)
        for step in range(max(self.start, weights.version), last + 1):
            if self.version(step) == weights.version and self.prompts_of(step):
                self.pending[step] = self.backend.submit(self.items(step, weights.version), weights)
        for old in [v for v in self.published if v < weights.version - self.spec.rollout.lag]:
            publishing.discard(self.published.pop(old))

    def version(self, step: int) -> int:
        """The version that acts in a step."""
        lag, every = self.spec.rollout.lag, self.spec.checkpoint_every
        return min(step, max(self.spec.least, version_for(step, lag, every, self._slowed())))

    def _slowed(self) -> list[int]:
        """The lag's own reductions: those from before its setting was changed are over."""
        return [since for since in self.slowed if since > self.spec.least]

    def heed(self, done: int, metrics: Mapping[str, float], limits: Guards) -> str:
        """Shorten the lag of the versions from ``done`` on where too few of the walks of older weights counted in the
        last update; the line about it, or "".
        """
        share, ahead = metrics.get("behaviour_ess", 1.0), lag_at(done, self.spec.rollout.lag, self._slowed())
        if share >= limits.ess_warn:
            return ""
        counted = f"update {done}: {share:.3g} of the walks of older weights count"
        if share >= limits.ess_slow or not ahead:
            return f"warning: {counted}, below guard.ess_warn = {limits.ess_warn:g}"
        self.slowed.append(done)
        return f"warning: {counted}, below guard.ess_slow = {limits.ess_slow:g}: the lag is {ahead - 1} from here on"

    def lags(self, step: int) -> list[int]:
        """By how many updates the weights of each of the last rollouts up to ``step`` were old."""
        return [n - self.version(n) for n in range(max(0, step + 1 - LAGS), step + 1)]

    def prompts_of(self, step: int) -> int:
        """The prompts of the rollout of a step: fewer than usual where no more may be asked for, 0 for none."""
        r = self.spec.rollout
        if self.left is None or step < self.start:
            return r.prompts
        left = self.left // r.samples_per_prompt - (step - self.start) * r.prompts
        return max(0, min(r.prompts, left))

    def items(self, step: int, version: int) -> list:
        """The work items of a step."""
        r = self.spec.rollout
        return plan(self.spec.seed, step, self.prompts_of(step), r.samples_per_prompt, r.item, self.prompts, version)

    def batches(self) -> Iterator[Trajectory]:
        """The trajectory of each step from the start on."""
        for step in range(self.start, self.spec.updates):
            yield self.batch(step)

    def batch(self, step: int) -> Trajectory:
        """The trajectory of a step; where that fails, it may be asked for again."""
        with stage(IDLE if self.spec.rollout.workers else ROLLOUT):
            collected = concatenate(self.pending[step]())
        batch, self.metrics = scored(collected.to(self.device), self.rewards, self.balance, step)
        self.scores = batch.reward
        if batch.terms is not None and self.balance.base:
            self.constraints = self.balance.ascend(batch.terms, step)
        if self.spec.rollout.lag:
            self.metrics["lag"] = float(step - batch.version)
        del self.pending[step]
        return batch

    @property
    def plain(self) -> dict[str, float]:
        """The mean and spread of the last batch's rewards, where it is learned from with multipliers beside them."""
        return {name: self.metrics[name] for name in ("reward", "reward_std")} if self.constraints else {}

    def still_needed(self, done: int) -> dict[int, Weights]:
        """The older versions that steps after ``done`` act under, those of a longer run too: empty at a regular
        checkpoint.
        """
        ahead = range(done, done + self.spec.rollout.lag)
        wanted = {self.version(step) for step in ahead} - {done}
        return {v: w for v, w in self.published.items() if v in wanted}
