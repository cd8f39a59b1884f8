"""The interface of rewards, and the check of every result.

A reward is a callable ``(samples, cond) -> (B,)``: samples (B, C, H, W) are decoded pixels in [0, 1], ``cond`` is the
condition that they were drawn for, and the answer is one finite number a sample, more is better. It is differentiable
if autograd passes through it. A result that is missing, short or not finite is an error, never a zero.
"""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from rlfusion.common.errors import ConfigError, NumericalError, UnavailableError, UserCodeError
from rlfusion.common.tensors import Cond, all_finite
from rlfusion.common.user_code import called, running

NAMED = 10
"""How many offending items an error names."""
FEWEST = 2
NO_NUMBERS = (str, bytes, bytearray, memoryview)
"""Sequences whose items look like numbers, and are none."""
_log = logging.getLogger(__name__)


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

    kind = "reward failure"


class RewardFailure(RewardError):
    """A reward could not score some of its samples, and says which and why; the others' values are good.

    Attributes:
        name: the reward.
        values: (B,), NaN where it failed.
        reasons: why, by the number of the sample.
    """

    def __init__(self, name: str, values: Tensor, reasons: Mapping[int, str]) -> None:
        super().__init__(name, values, dict(reasons))
        self.name, self.values, self.reasons = name, values, dict(reasons)

    def __str__(self) -> str:
        whole = len(self.reasons) == len(self.values) and len(set(self.reasons.values())) == 1
        reasons = [f"item {i}: {reason}" for i, reason in self.reasons.items()]
        reasons = [*self.reasons.values()][:1] if whole else reasons
        more = f"; and {len(reasons) - NAMED} more" if len(reasons) > NAMED else ""
        listed = "; ".join(reasons[:NAMED])
        return f"reward {self.name!r} failed for {len(self.reasons)} of {len(self.values)} samples: {listed}{more}"

    @classmethod
    def of_all(cls, name: str, count: int, reason: str) -> Self:
        """One reason why none of ``count`` samples was scored."""
        return cls(name, torch.full((count,), torch.nan), dict.fromkeys(range(count), reason))


class RewardUnavailable(RewardFailure, UnavailableError):
    """A failure for want of a server that answers: nothing is wrong with the samples, or with what was scored."""

    exit_code = UnavailableError.exit_code
    kind = UnavailableError.kind


class RewardRaised(RewardFailure, UserCodeError):
    """A failure because the user's own code raised in another process: a server, or an actor of its own."""

    exit_code = UserCodeError.exit_code
    kind = UserCodeError.kind


def score(reward: Reward, samples: Tensor, cond: Cond, name: str, masked: bool = False) -> Tensor:
    """The checked result of a reward, (B,), on the device of ``samples``, in float32 (float64 for float64 samples).

    With ``masked`` a NaN says that the reward failed for that sample, and passes; who asked for that drops the sample.
    So do the samples of a ``RewardFailure``, whose reasons are logged.

    Gradients pass.

    Raises:
        RewardError: the result is not a tensor, not (B,), not real numbers, or not finite; it names reward and items.
        RewardFailure: the reward says which samples it could not score, and not ``masked``.
        UserCodeError: the reward is the user's own code, which raised.
    """
    try:
        with running(f"reward {name!r} on samples {tuple(samples.shape)}"), unchanged(name, samples, cond):
            given = samples.contiguous()  # as a served one gets them: sums in another order differ
            with called(f"reward {name!r}"):
                result = reward(given, cond)
    except RewardFailure as failure:
        if not masked:
            raise
        _log.warning("%s", failure)
        result = failure.values
    result = well_formed(result, samples, name)
    checked = result.detach()
    _require_finite(checked.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf) if masked else checked, name)
    return result


@contextmanager
def unchanged(name: str, *held: object) -> Iterator[None]:
    """Within the context a reward works: torch's threads, dtype, device and gradient mode are afterwards as before, and
    so are the tensors ``held``, which others read after it.

    Raises:
        RewardError: it changed one of them in place.
    """
    threads, dtype, device = torch.get_num_threads(), torch.get_default_dtype(), torch.get_default_device()
    grad, versions = torch.is_grad_enabled(), [_version(part) for part in held]
    try:
        yield
    finally:
        torch.set_grad_enabled(grad)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if torch.get_default_dtype() != dtype:
            torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(device)  # of torch 2.6, None would leave a device that cannot be read
    if versions != [_version(part) for part in held]:
        raise RewardError(f"reward {name!r} changed its samples or conditions in place: expected it to work on a copy")


def _version(held: object) -> int:
    """How often a tensor has been written into."""
    return held._version if isinstance(held, Tensor) and not held.is_inference() else 0


def well_formed(result: object, samples: Tensor, name: str) -> Tensor:
    """The values (B,) that a reward answers, on the device of ``samples``, in float32 (float64 for float64 samples).

    Raises:
        RewardError: it is not a tensor, not (B,), or not real numbers.
    """
    if not isinstance(result, Tensor | list | np.ndarray):
        raise RewardError(
            f"reward {name!r} answered {type(result).__name__}: expected a tensor of shape ({len(samples)},)"
        )
    result = as_tensor(result, name)
    if result.shape != samples.shape[:1]:
        raise RewardError(f"reward {name!r} answered shape {tuple(result.shape)}: expected ({len(samples)},)")
    if result.is_complex():
        raise RewardError(f"reward {name!r} answered {result.dtype}: expected real numbers")
    return result.to(samples.device, torch.promote_types(samples.dtype, torch.float32))


def _form(held: Tensor) -> str:
    """What is not plain about a tensor."""
    return "quantized" if held.is_quantized else "meta" if held.is_meta else str(held.layout).removeprefix("torch.")


def as_tensor(held: Any, name: str) -> Tensor:
    """The numbers that a reward answered in a tensor, an array or a list.

    Raises:
        RewardError: they are not such.
    """
    if isinstance(held, Tensor):
        if held.layout != torch.strided or held.is_quantized or held.is_meta:
            raise RewardError(f"reward {name!r} answered a {_form(held)} tensor: expected a plain one of numbers")
        return held
    try:
        if isinstance(held, np.ndarray | np.generic):
            if np.ma.is_masked(held):
                raise RewardError(f"reward {name!r} answered an array with a mask: expected NaN where it has no score")
            return torch.from_numpy(np.ascontiguousarray(held).reshape(np.shape(held)))
        if isinstance(held, Sequence) and not isinstance(held, NO_NUMBERS):
            if held and all(isinstance(part, Tensor) for part in held):
                return torch.stack([part.reshape(()) for part in held])
            wrong = [i for i, part in enumerate(held) if not _is_number(part)]
            if wrong:
                raise RewardError(
                    f"reward {name!r} answered {answered(held[wrong[0]])} for item {wrong[0]}: expected a number"
                )
            return torch.as_tensor(np.asarray([np.asarray(part).reshape(()) for part in held], dtype=np.float64))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise RewardError(
            f"reward {name!r} answered {answered(held)}: expected one number a sample ({error})"
        ) from error
    raise RewardError(f"reward {name!r} answered {answered(held)}: expected a tensor, an array or a list of numbers")


def _is_number(part: Any) -> bool:
    """Whether an item of a list may be a score: a real number, alone or in a tensor or an array."""
    if isinstance(part, Tensor):
        return not part.is_complex()
    if isinstance(part, np.ndarray | np.generic):
        return part.dtype.kind in "biuf" and not np.ma.is_masked(part)
    return isinstance(part, Real)


def answered(held: Any) -> str:
    """An answer in words, for errors."""
    if isinstance(held, Tensor | np.ndarray):
        return f"{held.dtype} of shape {tuple(held.shape)}"
    if isinstance(held, tuple):
        return f"({', '.join(type(part).__name__ for part in held[:5])})"
    return f"{type(held).__name__} of {len(held)}" if isinstance(held, Sequence) else type(held).__name__


def valid(values: Tensor, name: str, most: float) -> tuple[Tensor, float]:
    """Where ``values`` (B,) are numbers, and the share of those that failed.

    Raises:
        RewardError: more than the share ``most`` of them failed, or all but one.
    """
    fine = ~values.isnan()
    failed = 1 - fine.double().mean().item()
    if failed > most or int(fine.sum()) < min(FEWEST, len(values)):
        raise RewardError(
            f"reward {name!r} failed for {failed:.0%} of {len(values)} samples: expected at most max_failed = {most:g}"
        )
    return fine, failed


def _require_finite(result: Tensor, name: str) -> None:
    if all_finite(result):
        return
    items = (~result.isfinite()).nonzero().flatten().tolist()
    listed = ", ".join(f"item {i} = {result[i].item()}" for i in items[:NAMED])
    more = f", and {len(items) - NAMED} more" if len(items) > NAMED else ""
    raise RewardError(f"reward {name!r} is not finite for {len(items)} of {len(result)} samples: {listed}{more}")


def require_labels(cond: Cond, count: int, classes: int, name: str) -> Tensor:
    """The condition, where it is one label in 0..classes-1 for each of ``count`` samples, (count,) int64.

    Raises:
        ConfigError: it is not ("no class" among the labels is classes).
    """
    if not isinstance(cond, Tensor) or cond.is_floating_point() or cond.shape != (count,):
        raise ConfigError(f"{name} needs a label ({count},) int64 as condition: got {_described(cond)}")
    if len(cond) and not 0 <= int(cond.min()) <= int(cond.max()) < classes:
        raise ConfigError(f"{name} knows the labels 0..{classes - 1}: got {cond.min()}..{cond.max()}")
    return cond


def _described(cond: Cond) -> str:
    return f"{cond.dtype} {tuple(cond.shape)}" if isinstance(cond, Tensor) else type(cond).__name__
