"""Advantages: pure functions of rewards and groups.

(1)  A_i = (R_i - mean of its group) / (std of its group + eps)                                    population std
(2)  several rewards: sum_k w_k (R_k - mean_k) / (std_k + eps), each normalised by itself before its weight, so that
     none rules by its scale alone
(3)  running form (Black et al. 2023, section 5.4): mean and std over the last ``window`` rewards of the same prompt
(4)  along a chain of states k = 0..K-1 whose reward R comes with its last step (Schulman et al. 2016), V_K = 0:
     d_k = R [k = K-1] + gamma V_{k+1} - V_k,     A_k = sum_l (gamma lam)^l d_{k+l},     lambda-return G_k = A_k + V_k
     lam = 1: G_k = gamma^(K-1-k) R;     lam = 0: G_k = gamma V_{k+1}, and R at the last step
(5)  weights of a regression on good samples: w = min(exp(beta A), w_max), perhaps divided by their mean
(6)  A_i = clip((R_i - b_i) / s_i, -c, c)
     b_i, ``Baseline``: the mean of its group of n, or, "leave_one_out", of the n - 1 others: n / (n - 1) (R_i - mean),
     whose expected gradient lacks no factor (n - 1) / n           (RLOO: Kool et al. 2019; Ahmadian et al. 2024)
     s_i, ``Scale``: the std of the group, of all rewards, or 1, "none", so that a group of nearly equal rewards counts
     as little as it tells                                         (Dr. GRPO: Liu et al. 2025)
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlfusion.common.errors import NumericalError, StateError
from rlfusion.common.weights import require_entries

Baseline = Literal["mean", "leave_one_out"]
Scale = Literal["group", "batch", "none"]


def normalize(reward: Tensor, mean: Tensor, std: Tensor, eps: float = 1e-6) -> Tensor:
    """(reward - mean) / (std + eps), all (B,)."""
    return (reward - mean) / (std + eps)


def group_moments(reward: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population std of each sample's group, (B,) each, in float64.

    Raises:
        ValueError: reward and group are not both (B,).
    """
    if reward.ndim != 1 or reward.shape != group.shape:
        raise ValueError(f"reward and group are (B,): got {tuple(reward.shape)} and {tuple(group.shape)}")
    _, inverse, count = group.unique(return_inverse=True, return_counts=True)
    total = torch.zeros(len(count), dtype=torch.float64, device=reward.device)
    mean = (total.index_add(0, inverse, reward.double()) / count)[inverse]
    var = (total.index_add(0, inverse, (reward.double() - mean).square()) / count)[inverse]
    return mean, var.sqrt()


def group_relative(reward: Tensor, group: Tensor) -> Tensor:
    """Eq. (1), (B,), in the dtype of ``reward``. A group of one, or of equal rewards, gets 0."""
    mean, std = group_moments(reward, group)
    return normalize(reward.double(), mean, std).to(reward)


def relative(reward: Tensor, group: Tensor, baseline: Baseline, scale: Scale, limit: float) -> Tensor:
    """Eq. (6), (B,), in the dtype of ``reward``. A group of one, or of equal rewards, gets 0."""
    mean, std = group_moments(reward, group)
    if scale == "batch":
        std = reward.double().std(correction=0).expand_as(std)
    advantage = normalize(reward.double(), mean, std) if scale != "none" else reward.double() - mean
    if baseline == "leave_one_out":
        _, inverse, count = group.unique(return_inverse=True, return_counts=True)
        advantage = advantage * (count / (count - 1).clamp(min=1))[inverse]
    return advantage.clamp(-limit, limit).to(reward)


def normalized(reward: Tensor, group: Tensor, rule: str) -> Tensor:
    """Eq. (1) over each "group", or the whole "batch", or nothing ("none"); all (B,)."""
    if rule == "none":
        return reward
    return group_relative(reward, group if rule == "group" else torch.zeros_like(group))


def normalized_sum(terms: Tensor, weights: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. (2) over the groups (B,) of terms (B, R) with weights (R,): (B,) and each term's share (R,) of what it adds,
    mean |w_k A_k| over the sum of these.
    """
    parts = torch.stack([w * group_relative(term, group) for term, w in zip(terms.unbind(1), weights)], 1)
    share = parts.abs().mean(0)
    return parts.sum(1), share / share.sum().clamp(min=1e-12)


def chain_advantages(reward: Tensor, value: Tensor, gamma: float, lam: float) -> Tensor:
    """A_k of Eq. (4), (B, K), of rewards (B,) and the values (B, K) of the states before each step.

    Raises:
        ValueError: the shapes are others.
    """
    if value.ndim != 2 or reward.shape != value.shape[:1]:
        raise ValueError(f"reward (B,), value (B, K): got {tuple(reward.shape)} and {tuple(value.shape)}")
    error = gamma * torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], 1) - value
    error[:, -1] += reward
    *before, last = error.unbind(1)
    advantages = [last]
    for each in reversed(before):
        advantages.append(each + gamma * lam * advantages[-1])
    return torch.stack(advantages[::-1], 1)


def exponential_weights(advantage: Tensor, beta: float, w_max: float | None, mean_one: bool) -> Tensor:
    """Eq. (5) of any shape, the clip first; ``w_max`` None is no clip, ``mean_one`` divides by the mean of all.

    Raises:
        NumericalError: a weight is not finite; with ``mean_one`` only where an advantage is not.
    """
    log = beta * advantage.double()
    if w_max is not None:
        log = log.clamp(max=math.log(w_max))
    if mean_one:
        log = log - log.flatten().logsumexp(0) + math.log(log.numel())
    weight = log.exp().to(advantage)
    if not bool(weight.isfinite().all()):
        top = (beta * advantage).max().item()
        raise NumericalError(f"a weight exp({top:.4g}) is not finite: expected w_max, mean_one, or a smaller beta")
    return weight


def pair(reward: Tensor, group: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """(winner, loser) indices (P,) each: in every group the k-th best with the k-th worst, k up to ``share`` of it,
    where their rewards differ.
    """
    _, inverse, count = group.unique(return_inverse=True, return_counts=True)
    best = reward.argsort(descending=True, stable=True)
    order = best[inverse[best].argsort(stable=True)]  # group by group, the best of each first
    of, first = inverse[order], count.cumsum(0) - count
    place = torch.arange(len(order), device=order.device) - first[of]
    taken = place < (share * count.double()).long()[of]
    winner, loser = order[taken], order[((first + count - 1)[of] - place)[taken]]
    differ = reward[winner] > reward[loser]
    return winner[differ], loser[differ]


@dataclass
class RunningAdvantage:
    """Eq. (3): normalises by the recent rewards of the same group; its state is saved with the learner.

    Attributes:
        window: how many of its last rewards each group keeps.
        min_count: a group with fewer is normalised by all rewards of the batch instead.
    """

    window: int = 256
    min_count: int = 8

    def __post_init__(self) -> None:
        self.history: dict[int, Tensor] = {}

    def __call__(self, reward: Tensor, group: Tensor) -> Tensor:
        """Take in the rewards (B,) of a batch, then answer its advantages (B,)."""
        rewards, groups = reward.detach().double().cpu(), group.cpu()
        for g in groups.unique().tolist():
            kept = torch.cat([self.history.get(g, rewards[:0]), rewards[groups == g]])
            self.history[g] = kept[-self.window :]
        fallback = torch.stack([rewards.mean(), rewards.std(correction=0)])
        moments = {
            g: torch.stack([h.mean(), h.std(correction=0)]) if len(h) >= self.min_count else fallback
            for g, h in self.history.items()
        }
        mean, std = torch.stack([moments[g] for g in groups.tolist()]).unbind(1)
        return normalize(rewards, mean, std).to(reward)

    def state_dict(self) -> dict:
        return {"history": {str(g): h for g, h in self.history.items()}}

    def load_state_dict(self, state: dict) -> None:
        require_entries(state, self.state_dict(), "the running rewards")
        for group, held in state["history"].items():
            kept = isinstance(held, Tensor) and held.dtype == torch.float64 and held.ndim == 1
            if not (isinstance(group, str) and group.isdecimal() and kept and 0 < len(held) <= self.window):
                raise StateError(f"the running rewards: 'history' of {group!r} holds no rewards of a prompt")
        self.history = {int(g): h for g, h in state["history"].items()}
