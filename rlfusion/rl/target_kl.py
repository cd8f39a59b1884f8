"""The KL to the weights that walked, above which a rollout's remaining optimiser steps are left out.

(1)  E[r - 1 - log r] of a transition, in nats, r = p_theta / p_old: an estimate of KL(p_old || p_theta) without
     negative values (Schulman 2020), from the ratios that a step's gradient is made of
"""

import math

import torch
from torch import Tensor

from rlfusion.common.errors import ConfigError


def is_beyond(records: list[dict[str, Tensor]], limit: float | None) -> bool:
    """Whether Eq. (1), of some records of ``Transitions.accumulate``, is above ``limit``; of None it never is."""
    if limit is None:
        return False
    log_ratio = torch.cat([record["log_ratio"] for record in records])
    return (log_ratio.expm1() - log_ratio).mean().item() > limit


def require_limit(limit: float | None) -> None:
    """Raise ConfigError for a setting ``target_kl`` that is no KL."""
    if limit is not None and not 0 < limit < math.inf:
        raise ConfigError(f"target_kl = {limit}: expected a number of nats > 0, such as 0.003, or null for no limit")
