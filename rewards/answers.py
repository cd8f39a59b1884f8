"""Turns the answers of other libraries' scorers into one number a sample.

    scores, (scores, info), {name: scores}, ({name: scores}, info)

with scores a tensor, an array or a list, (B,) or (B, 1), of any real kind and on any device; info is left aside.
"""

from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlfusion.rewards.base import RewardError, answered, as_tensor


def scores(answer: Any, count: int, name: str, weights: Mapping[str, float]) -> Tensor:
    """The scores (B,) of ``count`` samples; of named ones the sum by ``weights``.

    Raises:
        RewardError: they are not one real number a sample, or nothing says how several are combined.
    """
    held = _without_info(answer, count, name)
    if not isinstance(held, Mapping):
        if weights:
            raise RewardError(f"reward {name!r}: scores {list(weights)} are asked for, it answered {answered(held)}")
        return _column(held, count, name)
    named = list(held)
    if not weights and len(named) == 1:
        return _column(held[named[0]], count, name)
    if not weights or not set(weights) <= set(named):
        raise RewardError(
            f"reward {name!r} answered the scores {named}: expected the option {{adapter: {{scores: {{NAME: 1}}}}}}"
            f" (which count){f', got {list(weights)}' if weights else ''}"
        )
    return sum(weight * _column(held[key], count, name) for key, weight in weights.items())


def one_score(answer: Any, name: str, weights: Mapping[str, float]) -> Tensor:
    """The score () of one sample: a number, or one in a tensor, an array or a list."""
    held = _without_info(answer, 1, name)
    if isinstance(held, Mapping):
        return scores({key: _one(value, name) for key, value in held.items()}, 1, name, weights)[0]
    return scores(_one(held, name), 1, name, weights)[0]


def _one(held: Any, name: str) -> Any:
    if isinstance(held, Tensor):
        return as_tensor(held, name).reshape(-1)
    if isinstance(held, np.ndarray | np.generic):
        return torch.as_tensor(held).reshape(-1)
    return [held] if isinstance(held, Real) else held


def _without_info(answer: Any, count: int, name: str) -> Any:
    """The scores of a pair (scores, info)."""
    if not isinstance(answer, tuple) or all(isinstance(part, Real) for part in answer):
        return answer
    if len(answer) == 2 and (answer[1] is None or isinstance(answer[1], Mapping)):
        return answer[0]
    if len(answer) == count and all(isinstance(part, Tensor) and part.numel() == 1 for part in answer):
        return list(answer)
    raise RewardError(
        f"reward {name!r} answered {answered(answer)}: expected scores ({count},), or (scores, info), info a mapping"
    )


def _column(held: Any, count: int, name: str) -> Tensor:
    """One number a sample, (count,)."""
    found = as_tensor(held, name)
    if found.shape == (count, 1):
        found = found[:, 0]
    if found.shape != (count,):
        raise RewardError(f"reward {name!r} answered {answered(held)}: expected ({count},)")
    if found.is_complex():
        raise RewardError(f"reward {name!r} answered {answered(held)}: expected real numbers")
    return found
