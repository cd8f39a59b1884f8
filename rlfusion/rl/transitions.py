"""The stochastic transitions of a rollout under one policy, in micro-batches: what policy gradients share.

    (1)  log r_t = log p_theta(x_s | x_t, c) - log p_old(x_s | x_t, c), the log-probabilities summed over features
    (2)  KL(p_theta(. | x_t) || p_ref(. | x_t)) of a step, analytic: both are Gaussians of one std
    (3)  sum_t [ log p_old - log p_ref ](x_s | x_t): the KL of the walks, sampled
    (4)  S_t / (mean of S over the stochastic steps): the weight of a step in the loss, where steps are weighed by their
         noise. d log p / d mean is z / S with z ~ N(0, 1), and the sample owes S z to the step: with equal weights the
         steps of the least noise have the largest gradients, and tell the least (He et al. 2025, TempFlow-GRPO)

States and actions are constants. A step without noise (to clean data) has no density: it is left out of all three.
"""

import copy
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlfusion.common.errors import NumericalError
from rlfusion.common.tensors import moved
from rlfusion.diffusion.gaussian import Gaussian
from rlfusion.diffusion.policy import Policy, frozen_copy, require_stochastic
from rlfusion.rollout.graphed import Graphed
from rlfusion.rollout.parted import at_steps, moves_like
from rlfusion.rollout.trajectory import Trajectory
from rlfusion.training.optimization import average
from rlfusion.training.ranks import current


class Terms(NamedTuple):
    """Eq. (1) of N transitions, which walk and step each is, (N,) each, and the policy's distributions."""

    log_prob: Tensor
    log_ratio: Tensor
    walk: Tensor
    step: Tensor
    distribution: Gaussian


Weighing = Literal["none", "noise"]

Objective = Callable[[Terms], Tensor | dict[str, Tensor]]
"""The loss (N,) of transitions; or a record of it, ``loss``, and of what else is told of them, (N,) each."""


class Reference(NamedTuple):
    """The reference policy on a batch: its mean at every transition (B, K, *), and Eq. (3) of every walk (B,)."""

    mean: Tensor
    log_ratio: Tensor


def _acted(batch: Trajectory) -> Tensor:
    """The log-probabilities (B, K) of the weights that walked; whole walks have them."""
    assert batch.log_prob is not None
    return batch.log_prob


class Transitions:
    """The transitions of walks of one policy and time grid, network calls of ``micro_batch`` rows."""

    def __init__(
        self, policy: Policy, times: Tensor, micro_batch: int, reference: bool, weighing: Weighing = "none"
    ) -> None:
        """``reference`` keeps a frozen copy of the policy as it is now; ``weighing`` is that of ``step_weights``.

        Raises:
            ConfigError: no step of the chain is stochastic.
        """
        self.policy, self.micro_batch = policy, micro_batch
        self.steps = require_stochastic(policy, times).nonzero().flatten()
        self.stds = policy.stds(times)
        self.weight = step_weights(policy, times, weighing)
        self.reference = frozen_copy(policy) if reference else None

    def within(self, steps: Tensor) -> "Transitions":
        """The same, of walks that take noise in these steps alone."""
        one = copy.copy(self)
        one.steps = steps
        return one

    def all(self, walks: Tensor) -> tuple[Tensor, Tensor]:
        """(walk, step) of every stochastic transition of ``walks``, walk by walk."""
        return walks[:, None].expand(-1, len(self.steps)).flatten(), self.steps.expand(len(walks), -1).flatten()

    def some(self, walks: Tensor, count: int, draw: np.random.Generator) -> tuple[Tensor, Tensor]:
        """(walk, step) of ``count`` stochastic steps of each walk, drawn for each by ``draw``."""
        chosen = draw.permuted(self.steps.numpy()[None].repeat(len(walks), 0), axis=1)[:, :count]
        return walks.repeat_interleave(count), torch.from_numpy(chosen.copy()).flatten()

    def accumulate(
        self,
        batch: Trajectory,
        walk: Tensor,
        step: Tensor,
        objective: Objective,
        reference: Reference | None = None,
        kl: float = 0.0,
        summed: int | None = None,
    ) -> list[dict[str, Tensor]]:
        """Accumulate the gradient of ``objective`` + ``kl`` * Eq. (2) over the transitions (walk[i], step[i]).

        The loss is the mean over walks of the sum over ``summed`` steps: all stochastic ones by default, for which any
        random subset of them then stands. Of walks that kept their graph it goes backwards once, without a pass of the
        network, and whatever ``micro_batch`` is.

        Returns:
            Detached records of (rows,) tensors: loss, what else ``objective`` tells, log_ratio and, with a reference,
            kl.
        """
        scale = (summed or len(self.steps)) / max(1, len(walk))  # none where walks whose rewards failed are left out

        kept = batch.mean if isinstance(batch, Graphed) else None

        def part(rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            distribution, terms = self._terms(batch, walk[rows], step[rows], kept)
            told = objective(terms)
            record = {**(told if isinstance(told, dict) else {"loss": told}), "log_ratio": terms.log_ratio}
            if reference is not None:
                mean = at_steps(reference.mean, terms.walk, terms.step)
                record["kl"] = distribution.kl(Gaussian(mean, distribution.std))
                record["loss"] = record["loss"] + kl * record["kl"]
            if self.weight is not None:
                record["loss"] = record["loss"] * moved(self.weight[step[rows]], terms.log_ratio.device)
            return record["loss"].sum() * scale, record

        ranks = current()
        rows = self.micro_batch if kept is None else max(1, len(walk))
        return ranks.accumulate(self.policy, ranks.share(walk, len(batch)), rows, part)

    def log_ratio(self, batch: Trajectory, walk: Tensor, step: Tensor) -> Tensor:
        """Eq. (1) of the transitions, (N,)."""
        return self._looked(
            self.policy, batch, walk, lambda rows: self._terms(batch, walk[rows], step[rows])[1].log_ratio
        )

    def _looked(self, policy: Policy, batch: Trajectory, walk: Tensor, body: Callable[[Tensor], Tensor]) -> Tensor:
        """What ``body``, which calls ``policy``, gives for the transitions of walks (N,): (N,), on every rank."""
        ranks = current()
        if not len(walk):
            return torch.empty(0)
        share = ranks.share(walk, len(batch))
        found = ranks.look(policy, share, self.micro_batch, lambda rows: {"value": body(rows), "rows": rows})
        records = ranks.gather(found)
        values = torch.cat([record["value"] for record in records])
        return values[torch.cat([record["rows"] for record in records]).to(values.device).argsort()]

    def _terms(
        self, batch: Trajectory, walk: Tensor, step: Tensor, mean: Tensor | None = None
    ) -> tuple[Gaussian, Terms]:
        """Of the policy as it is now, or of the ``mean`` (B, K, *) that it had, with its graph, as it walked."""
        obs, action = batch.transitions(walk, step)
        at, k = moved(walk, action.device), moved(step, action.device)
        distribution = self.policy(obs) if mean is None else self._kept(mean[at, k], step)
        log_prob, acted = distribution.log_prob(action), _acted(batch)
        return distribution, Terms(log_prob, log_prob - acted[at, k], at, k, distribution)

    def _kept(self, mean: Tensor, step: Tensor) -> Gaussian:
        """The transitions of these steps (N,), whose means (N, *) were kept."""
        std = moved(self.stds[step.cpu()].to(mean.dtype), mean.device)
        return Gaussian(mean, std.reshape(-1, *[1] * (mean.ndim - 1)))

    @torch.no_grad()
    def refer(self, batch: Trajectory, policy: Policy | None = None, walks: Tensor | None = None) -> Reference:
        """The reference, or another policy, on a batch; on some of its ``walks``, and 0 elsewhere."""
        acting, acted = self.reference if policy is None else policy, _acted(batch)
        assert acting is not None  # there is a reference, or another policy is given
        means, ratio = moves_like(batch.x), torch.zeros_like(acted)
        walk, step = self.all(torch.arange(len(batch)) if walks is None else walks)

        def part(rows: Tensor) -> Tensor:
            at, k = moved(walk[rows], means.device), moved(step[rows], means.device)
            obs, action = batch.transitions(walk[rows], step[rows])
            distribution = acting(obs)
            if not current().idle:
                means[at, k] = distribution.mean
            return acted[at, k] - distribution.log_prob(action)

        found = self._looked(acting, batch, walk, part)
        ratio[walk.to(ratio.device), step.to(ratio.device)] = found.to(ratio)
        return Reference(means, ratio.sum(1).to(batch.reward))

    @torch.no_grad()
    def staleness(self, batch: Trajectory) -> Tensor:
        """log p_theta - log p_old of every transition, (B, K), of the present weights; 0 where there is no density."""
        walk, step = self.all(torch.arange(len(batch)))
        ratio = torch.zeros_like(_acted(batch))
        ratio[walk.to(ratio.device), step.to(ratio.device)] = self.log_ratio(batch, walk, step).to(ratio)
        return ratio

    @torch.no_grad()
    def require_on_policy(self, batch: Trajectory, clip: float, features: int = 1) -> dict[str, float]:
        """{"log_ratio_max": the largest |Eq. (1)| / features} of a batch of the present weights.

        Raises:
            NumericalError: it is not below a tenth of the clip range: rollout and learner disagree about the policy.
        """
        gap = self.log_ratio(batch, *self.all(torch.arange(len(batch)))).abs().max().item() / features
        if not gap < clip / 10:
            raise NumericalError(
                f"the importance ratio is not 1 before the first update: max |log ratio| = {gap:.3g}, expected below a "
                f"tenth of the clip range, {clip / 10:.3g}. Rollout and learner must run one network in one precision "
                "and guidance (no dropout or batch norm in training mode); or the smallest noise of the chain is too "
                "small"
            )
        return {"log_ratio_max": gap}

    def summary(self, records: list[dict[str, Tensor]], clip: float, features: int = 1) -> dict[str, float]:
        """``ratio_summary``, of kl over walks: a walk's is the sum over its steps."""
        steps = len(self.steps)
        return ratio_summary([r | {"kl": steps * r["kl"]} if "kl" in r else r for r in records], clip, features)


def ratio_summary(records: list[dict[str, Tensor]], clip: float, features: int = 1) -> dict[str, float]:
    """Means over what has a ratio r, ``log_ratio`` of some records, and of what else they say; and the tail of r:

    clip_fraction, the share with |r^(1/features) - 1| > clip, unless the records say it themselves; log_ratio_max, the
    largest |log r|; approx_kl, the mean of r - 1 - log r; ess, the effective share (sum r)^2 / (N sum r^2) under
    importance weights.
    """
    joined = {name: torch.cat([r[name] for r in records]) for name in records[0]}
    log_ratio = joined.pop("log_ratio")
    joined.setdefault("clip_fraction", outside(log_ratio / features, clip))
    joined["approx_kl"] = log_ratio.expm1() - log_ratio
    weight = (log_ratio - log_ratio.max()).exp()
    means = {name: value.mean() for name, value in joined.items()}
    means["ess"] = weight.mean().square() / weight.square().mean()
    return average([means]) | {"log_ratio_max": log_ratio.abs().max().item()}


def outside(log_ratio: Tensor, clip: float) -> Tensor:
    """1 where |r - 1| > clip, else 0, float (N,)."""
    return (log_ratio.detach().expm1().abs() > clip).float()


def step_weights(policy: Policy, times: Tensor, weighing: Weighing) -> Tensor | None:
    """Eq. (4), float32 (K,), or None for 1 everywhere."""
    if weighing == "none":
        return None
    stds = policy.stds(times)
    return (stds / stds[stds > 0].mean()).float()


def largest_log_ratio(records: list[dict[str, Tensor]]) -> float:
    """The largest |Eq. (1)| of some records of ``accumulate``."""
    return torch.stack([record["log_ratio"].abs().max() for record in records]).max().item()


def require_finite(reward: Tensor) -> None:
    """Raise NumericalError, naming the walks, unless every reward (B,) is finite."""
    if not bool(reward.isfinite().all()):
        raise NumericalError(f"rewards {(~reward.isfinite()).nonzero().flatten().tolist()[:10]} are not finite")
