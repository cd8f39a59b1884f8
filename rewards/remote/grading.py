"""The values of a batch where any sample may fail: each that does has a reason, and costs no other its value."""

import logging
import math
from typing import NamedTuple

import torch
from torch import Tensor

from rlfusion.common.errors import UserCodeError
from rlfusion.common.tensors import Cond, map_cond
from rlfusion.common.user_code import described, running
from rlfusion.rewards.base import Reward, RewardError, RewardFailure, well_formed
from rlfusion.rewards.grouped import needs_groups

_log = logging.getLogger(__name__)


class Graded(NamedTuple):
    """Values (B,), NaN for those that failed; why each of these did, by item; and where the user's own code raised."""

    values: Tensor
    errors: dict[int, str]
    raised: frozenset[int] = frozenset()


@torch.no_grad()
def graded(reward: Reward, samples: Tensor, cond: Cond, log: bool = True) -> Graded:
    """The values of samples; what the user's own code raises is logged with its frames."""
    raised: frozenset[int] = frozenset()
    try:
        with running("it"):
            values, reasons = well_formed(reward(samples, cond), samples, "it"), {}
    except RewardFailure as failure:
        values, reasons = failure.values, failure.reasons
        raised = frozenset(reasons if isinstance(failure, UserCodeError) else ())
    except Exception as error:  # whatever a user's reward raises is told to the asker, item by item
        if isinstance(error, UserCodeError) and log:
            _log.warning("%s\n%s", error, error.frames)
        if len(samples) == 1 or isinstance(error, RewardError) or needs_groups(reward):
            failed = torch.full((len(samples),), torch.nan, device=samples.device)
            reasons = dict.fromkeys(range(len(samples)), described(error))
            return Graded(failed, reasons, frozenset(reasons if isinstance(error, UserCodeError) else ()))
        return _one_by_one(reward, samples, cond)
    odd = {i: f"answered {values[i].item()}" for i in (~values.isfinite()).nonzero().flatten().tolist()}
    values = values.masked_fill(~values.isfinite(), math.nan)
    return Graded(values, odd | reasons, raised)


def _one_by_one(reward: Reward, samples: Tensor, cond: Cond) -> Graded:
    values, reasons, raised = [], {}, set()
    for i in range(len(samples)):
        one = graded(reward, samples[i : i + 1], map_cond(lambda c, i=i: c[i : i + 1], cond), log=False)
        values.append(one.values)
        if one.errors:
            reasons[i] = one.errors[0]
        if one.raised:
            raised.add(i)
    return Graded(torch.cat(values), reasons, frozenset(raised))
