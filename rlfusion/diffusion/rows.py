"""What is made of the times of rows, and kept as long as the tensor of times lives.

(1)  ``of_chain``: rows whose times are among the few of a chain. Coefficients are then those of the chain's times, each
     made once in a process, as in a rollout, and gathered
(2)  ``kept``: of any other times, what has been made of the same tensor. A learner asks two or three networks at one

What is kept is of a tensor as it was: one that has been written to since is a new one. Of one that gradients flow
through, or of inference mode, which does not tell when it is written to, everything is made afresh.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Made = TypeVar("Made")


class Chain(NamedTuple):
    """Row i has time ``grid[step[i] + ahead]``; ``step`` (N,) int64 on the CPU."""

    grid: tuple[float, ...]
    step: Tensor
    ahead: int

    def gather(self, table: Tensor) -> Tensor:
        """The rows (N, ...) of a table (K, ...) of the steps of the chain, on the table's device."""
        return table.index_select(0, self.step.to(table.device, non_blocking=True))


class Kept(NamedTuple):
    """What is kept of a tensor, and its version, which each write to it changes."""

    version: int
    chain: Chain | None
    made: dict[tuple[object, ...], Any]


_kept: WeakIdKeyDictionary = WeakIdKeyDictionary()


def of_chain(times: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """The times (N,) before and after the steps (N,) int64 of a chain of ``times`` (K+1,) float64, all on the CPU."""
    t, s, grid = times.index_select(0, step), times.index_select(0, step + 1), tuple(times.tolist())
    for one, ahead in ((t, 0), (s, 1)):
        if not one.is_inference():
            _kept[one] = Kept(one._version, Chain(grid, step, ahead), {})
    return t, s


def _of(t: Tensor) -> Kept | None:
    """What is kept of ``t`` as it is now, to be added to; None where nothing may be."""
    if t.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(t) or t.is_inference():
        return None
    held: Kept | None = _kept.get(t)
    if held is None or held.version != t._version:
        held = _kept[t] = Kept(t._version, None, {})
    return held


def _chain(t: Tensor) -> Chain | None:
    return held.chain if (held := _of(t)) else None


def chain(t: Tensor) -> Chain | None:
    """Where the times (N,) before a step are of a chain, which."""
    found = _chain(t)
    return found if found is not None and not found.ahead else None


def steps(t: Tensor, s: Tensor) -> Chain | None:
    """Where the times ``t`` and ``s`` (N,) are those before and after steps of one chain, which."""
    before, after = _chain(t), _chain(s)
    if before is None or after is None or (before.ahead, after.ahead) != (0, 1):
        return None
    return before if before.step is after.step and before.grid == after.grid else None


def kept(t: Tensor, key: tuple[object, ...], make: Callable[[], Made]) -> Made:
    """What ``make`` makes of the times ``t`` (N,) for a ``key``, or made before."""
    held = _of(t)
    if held is None:
        return make()
    if key not in held.made:
        with torch.inference_mode(False):
            held.made[key] = make()
    found: Made = held.made[key]
    return found
