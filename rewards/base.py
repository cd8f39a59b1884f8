"""What a reward is, and the check that every result of one passes.

A reward is a callable ``(samples, cond) -> (B,)``: samples (B, C, H, W) are decoded pixels in [0, 1], ``cond`` is the
condition that they were drawn for, and the answer is one finite number a sample, more is better. It is differentiable
if autograd passes through it. A result that is missing, short or not finite is an error, never a zero.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rlfusion.errors import NumericalError
from rlfusion.tensors import Cond

NAMED = 10
"""How many offending items an error names."""


class Reward(Protocol):
    """``reward(samples (B, C, H, W) in [0, 1], cond) -> (B,)``."""

    def __call__(self, samples: Tensor, cond: Cond) -> Tensor: ...


class Learned(nn.Module, ABC):
    """A reward with weights of its own. They travel to the workers as its state dict, in the bytes of the recipe."""

    @abstractmethod
    def blank(self) -> dict[str, Any]:
        """Options, plain data, that make the same reward without reading a file; its state dict then completes it."""

    @abstractmethod
    def forward(self, samples: Tensor, cond: Cond) -> Tensor:
        """samples (B, C, H, W) in [0, 1] -> (B,)."""


class RewardError(NumericalError):
    """A reward's result is not one finite number a sample."""


def score(reward: Reward, samples: Tensor, cond: Cond, name: str, masked: bool = False) -> Tensor:
    """The checked result of a reward, (B,), on the device of ``samples``, in float32 (float64 for float64 samples).

    With ``masked`` a NaN says that the reward failed for that sample, and passes; who asked for that drops the sample.

    Gradients pass. An exception inside the reward propagates with a note that names the reward.

    Raises:
        RewardError: the result is not a tensor, not (B,), not real numbers, or not finite; it names reward and items.
    """
    try:
        result = reward(samples, cond)
    except Exception as error:  # whatever a user's reward raises, re-raised
        error.add_note(f"raised by the reward {name!r} on samples {tuple(samples.shape)}")
        raise
    if not isinstance(result, Tensor):
        raise RewardError(
            f"reward {name!r} answered {type(result).__name__}: expected a tensor of shape ({len(samples)},)"
        )
    if result.shape != samples.shape[:1]:
        raise RewardError(f"reward {name!r} answered shape {tuple(result.shape)}: expected ({len(samples)},)")
    if result.is_complex():
        raise RewardError(f"reward {name!r} answered {result.dtype}: expected real numbers")
    result = result.to(samples.device, torch.promote_types(samples.dtype, torch.float32))
    checked = result.detach()
    _require_finite(checked.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf) if masked else checked, name)
    return result


def _require_finite(result: Tensor, name: str) -> None:
    if bool(result.isfinite().all()):
        return
    items = (~result.isfinite()).nonzero().flatten().tolist()
    listed = ", ".join(f"item {i} = {result[i].item()}" for i in items[:NAMED])
    more = f", and {len(items) - NAMED} more" if len(items) > NAMED else ""
    raise RewardError(f"reward {name!r} is not finite for {len(items)} of {len(result)} samples: {listed}{more}")
