"""R(x, c) = sum_k w_k R_k(x, c): named rewards as one, with each term at hand for the log.

With ``base`` each R_k is first brought to the scale of what it is of a base model's samples (``calibration``).
"""

import math
from collections.abc import Mapping

from torch import Tensor, nn

from rlfusion.common.errors import ConfigError
from rlfusion.common.tensors import Cond
from rlfusion.rewards.base import Reward, score
from rlfusion.rewards.calibration import Moments


class WeightedSum(nn.Module):
    """The weighted sum of named rewards; those that are modules are in its state dict.

    A term of weight 0 is evaluated and logged and counts for nothing: a held-out reward to watch.
    """

    def __init__(self, rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> None:
        """
        Raises:
            ConfigError: no reward, names that differ, a weight that is not finite, or all weights 0.
        """
        super().__init__()
        if set(rewards) != set(weights) or not rewards:
            raise ConfigError(f"weights for {sorted(weights)}: expected one for each of the rewards {sorted(rewards)}")
        for name, weight in weights.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
                raise ConfigError(f"weight of reward {name!r} = {weight!r}: expected a finite number")
        if not any(weights.values()):
            raise ConfigError(f"every weight of {sorted(weights)} is 0: expected one that is not")
        self.rewards, self.weights = dict(rewards), {name: float(weights[name]) for name in rewards}
        self.base: dict[str, Moments] = {}
        owned = {name.replace(".", "/"): r for name, r in rewards.items() if isinstance(r, nn.Module)}
        self.modules_by_name = nn.ModuleDict(owned)

    def terms(self, samples: Tensor, cond: Cond, masked: bool = False) -> dict[str, Tensor]:
        """Each reward's checked result, before its weight, (B,) each; NaN where it failed, if ``masked``.

        Raises:
            RewardError: as ``score``.
        """
        return {name: score(reward, samples, cond, name, masked) for name, reward in self.rewards.items()}

    def combine(self, terms: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum (B,) of what ``terms`` answered, each first on the scale of ``base``, if that is set."""
        if self.base:
            terms = {
                name: self.base[name].on_scale(terms[name]) if self.weights[name] else terms[name] for name in terms
            }
        return sum(weight * terms[name] for name, weight in self.weights.items())

    def forward(self, samples: Tensor, cond: Cond) -> Tensor:
        """samples (B, C, H, W) in [0, 1] -> (B,)."""
        return self.combine(self.terms(samples, cond))
