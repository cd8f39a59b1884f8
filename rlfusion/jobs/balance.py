"""How several rewards are weighed against each other beyond their weights: by the base model's own, and by constraints.

The base model's samples are drawn once, before any update, on seeds of their own; what is found of each reward is a
part of the checkpoint and of the run's ``calibration.json``. Multipliers follow from the rollouts in their order, so
that a run that resumes has the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlfusion.common.compiled import plain
from rlfusion.common.errors import ConfigError, StateError
from rlfusion.diffusion.policy import Policy
from rlfusion.jobs.measure import draw
from rlfusion.jobs.parts import RewardSpec
from rlfusion.rewards import Reward, WeightedSum, labels, needs_groups, valid
from rlfusion.rewards.calibration import Moments, require_spread, stacked
from rlfusion.rl.advantage import normalized_sum
from rlfusion.rl.constraints import Constraint, ascended, tags
from rlfusion.training.asking import asked

FILE = "calibration.json"
SUM = "weighted sum"
"""The name of the sum of all rewards by their weights, among what is found of the base."""


@dataclass
class Balance:
    """What is found of the base, and the multipliers of each constraint, in their order, before the newest rollout's
    update and after it.
    """

    spec: RewardSpec
    base: dict[str, Moments] = field(default_factory=dict)
    multipliers: dict[int, tuple[float, ...]] = field(default_factory=dict)

    @property
    def needed(self) -> bool:
        """Whether the settings ask for it at all."""
        return self.spec.normalize == "calibrated" or bool(self.spec.constraints)

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """Those of the settings."""
        return self.spec.constraints

    def begin(self, base: Mapping[str, Moments], step: int = 0, multipliers: tuple[float, ...] | None = None) -> None:
        """Take up what was found of the base, and the multipliers of a step; by default 0.

        Raises:
            ConfigError: rewards of the base that have no scale.
        """
        self.base = dict(base)
        self.multipliers = {step: (0.0,) * len(self.constraints) if multipliers is None else multipliers}
        if self.spec.normalize == "calibrated":
            require_spread({name: self.base[name] for name, weight in self._weights.items() if weight})
        for one in self.constraints:
            self._unit(one)

    @property
    def _weights(self) -> dict[str, float]:
        """The weight of each reward, and of those that are constrained at least a nominal one: it needs a scale."""
        reward = self.spec.reward
        weights = dict(reward) if isinstance(reward, dict) else {}
        return weights | {one.name: 1.0 for one in self.constraints}

    def terms(self, terms: Tensor) -> Tensor:
        """Terms (B, R) on the scale on which they are added: the base's where that is calibrated, else their own."""
        if self.spec.normalize != "calibrated" or not self.base:
            return terms
        found = [self.base[name].on_scale(term) if self._scaled(name) else term for name, term in self._named(terms)]
        return torch.stack(found, 1)

    def _scaled(self, name: str) -> bool:
        """Whether a reward is brought to the base's scale: one that counts."""
        return bool(self._weights[name])

    def _named(self, terms: Tensor) -> list[tuple[str, Tensor]]:
        assert isinstance(self.spec.reward, dict)
        return list(zip(self.spec.reward, terms.unbind(1)))

    def total(self, terms: Tensor, group: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """What the walks (B,) of a step are learned from, of their terms (B, R) and groups (B,); and each term's share
        of it, where they are brought to one scale.
        """
        assert isinstance(self.spec.reward, dict)
        held, weights = self.terms(terms), dict(self.spec.reward)
        offset, names = 0.0, list(weights)
        for one, multiplier in zip(self.constraints, self.multipliers.get(step, ())):
            weights[one.name] += multiplier * one.sign
            bound = torch.full((1, len(names)), self.bound(one), dtype=torch.float64)
            offset += multiplier * one.sign * self.terms(bound)[0, names.index(one.name)].item()
        tensor = torch.tensor(list(weights.values()), dtype=terms.dtype, device=terms.device)
        if self.spec.normalize in ("group", "batch"):
            by = group if self.spec.normalize == "group" else torch.zeros_like(group)
            return normalized_sum(terms, tensor, by)
        total = sum(weight * term for weight, term in zip(weights.values(), held.double().unbind(1))) - offset
        if self.spec.normalize == "none":
            return total.to(terms), None
        share = ((held - held.mean(0)) * tensor).abs().mean(0)
        return total.to(terms), share / share.sum().clamp(min=1e-12)

    def bound(self, one: Constraint) -> float:
        """b_c, in the reward's own unit."""
        return self.base[one.name].mean if one.bound is None else one.bound

    def _unit(self, one: Constraint) -> float:
        """u_c: that of a multiplier.

        Raises:
            ConfigError: the base's rewards are all equal, so that there is none.
        """
        for name in (one.name, SUM) if self.spec.normalize == "none" else (one.name,):
            if not self.base[name].std > 0:
                what = "the sum of the rewards" if name == SUM else f"reward {name!r}"
                raise ConfigError(
                    f"constraint = {str(one)!r}: {what} is {self.base[name].mean:g} for all {self.base[name].count} "
                    "samples of the base model, which is no scale for a multiplier: expected another reward, or a "
                    "larger base_samples"
                )
        return self.base[SUM].std / self.base[one.name].std if self.spec.normalize == "none" else 1.0

    def plain(self, terms: Tensor) -> Tensor:
        """The weighted sum (B,) of terms (B, R) without any multiplier."""
        assert isinstance(self.spec.reward, dict)
        held = self.terms(terms).double().unbind(1)
        return sum(weight * term for weight, term in zip(self.spec.reward.values(), held)).to(terms)

    def ascend(self, terms: Tensor, step: int) -> dict[str, float]:
        """Make the multipliers of the step after ``step``, of the terms (B, R) of its walks; what to log of each
        constraint: the mean, the bound, and the multiplier that this step was learned with.
        """
        assert isinstance(self.spec.reward, dict)
        means = dict(zip(self.spec.reward, terms.double().mean(0).tolist()))
        now, after, log = self.multipliers[step], [], {}
        for one, multiplier, tag in zip(self.constraints, now, tags(self.constraints, labels(list(means)))):
            value, bound = means[one.name], self.bound(one)
            missed = one.sign * (bound - value)
            after.append(ascended(multiplier, self.spec.rate, self._unit(one), missed, self.base[one.name].std))
            log |= {f"{tag}/multiplier": multiplier, f"{tag}/value": value, f"{tag}/bound": bound}
        self.multipliers = {step: now, step + 1: tuple(after)}
        return log

    def state_dict(self, step: int) -> dict[str, Any]:
        """What a checkpoint has after ``step`` updates."""
        held = dict(zip(map(str, self.constraints), self.multipliers.get(step, ())))
        return {"base": {name: found._asdict() for name, found in self.base.items()}, "multipliers": held}

    def load(self, state: Mapping[str, Any], step: int) -> None:
        """Take up a checkpoint's state after ``step`` updates; multipliers that it does not have are 0.

        Raises:
            StateError: it is not that of these rewards.
        """
        if not self.needed:
            return
        base = {name: Moments.read(found, name) for name, found in state["base"].items()}
        if base.keys() != {*self._weights, SUM}:
            raise StateError(
                f"the calibration is of {', '.join(base) or 'nothing'}, expected {', '.join(self._weights)}"
            )
        held = state["multipliers"]
        if any(type(value) is not float or value < 0 for value in held.values()):
            raise StateError("the multipliers of the constraints hold other things than numbers >= 0")
        self.begin(base, step, tuple(held.get(str(one), 0.0) for one in self.constraints))


def prompts_of(count: int, prompts: int, each: int) -> Tensor:
    """The prompts (N,) of ``count`` samples, ``each`` neighbours of one: over all in turn, or evenly over some."""
    groups = -(-count // each)
    order = torch.arange(groups)
    return (order * prompts // groups if groups < prompts else order % prompts).repeat_interleave(each)


@torch.no_grad()
def found_of(
    policy: Policy, times: Tensor, prompts: int, shape: tuple[int, ...], reward: Reward, spec: RewardSpec, seed: int
) -> dict[str, Moments]:
    """What each of several rewards, and their weighted sum, are of the policy's samples on fixed seeds.

    Raises:
        RewardError: one fails, more often than it may.
    """
    assert isinstance(reward, WeightedSum)
    each = spec.together if needs_groups(reward) else 1
    label = prompts_of(spec.base_samples, prompts, each).to(next(policy.parameters()).device)
    with plain(policy):
        samples = draw(policy, times, label, shape, seed, "calibration")
    terms = asked(lambda: stacked(reward.terms(samples, label, spec.masked))).double()
    if spec.masked:
        fine, _ = valid(terms.sum(1), spec.name, spec.max_failed)
        terms = terms[fine]
    weights = torch.tensor(list(reward.weights.values()), dtype=torch.float64, device=terms.device)
    moments = {name: Moments.of(term) for name, term in zip(reward.rewards, terms.unbind(1))}
    return moments | {SUM: Moments.of(terms @ weights)}
