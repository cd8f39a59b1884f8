"""What is made of the times of rows, and kept as long as the tensor of times lives.

(1)  ``of_chain``: rows whose times are among the few of a chain. Coefficients are then those of the chain's times, each
     made once in a process, as in a rollout, and gathered
(2)  ``kept``: of any other times, what has been made of the same tensor. A learner asks two or three networks at one

Times are data: no one writes to a tensor of them, and one that gradients flow through is made anything of afresh.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

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


_chains: WeakIdKeyDictionary = WeakIdKeyDictionary()
_made: WeakIdKeyDictionary = WeakIdKeyDictionary()


def of_chain(times: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """The times (N,) before and after the steps (N,) int64 of a chain of ``times`` (K+1,) float64, all on the CPU."""
    t, s, grid = times[step], times[step + 1], tuple(times.tolist())
    _chains[t], _chains[s] = Chain(grid, step, 0), Chain(grid, step, 1)
    return t, s


def chain(t: Tensor) -> Chain | None:
    """Where the times (N,) before a step are of a chain, which."""
    found: Chain | None = _chains.get(t)
    return found if found is not None and not found.ahead else None


def steps(t: Tensor, s: Tensor) -> Chain | None:
    """Where the times ``t`` and ``s`` (N,) are those before and after steps of one chain, which."""
    before, after = _chains.get(t), _chains.get(s)
    one = before is not None and after is not None and before.step is after.step and before.grid == after.grid
    return before if one and (before.ahead, after.ahead) == (0, 1) else None


def kept(t: Tensor, key: tuple[object, ...], make: Callable[[], Made]) -> Made:
    """What ``make`` makes of the times ``t`` (N,) for a ``key``, or made before."""
    if t.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(t):
        return make()
    held = _made.get(t)
    if held is None:
        held = _made[t] = {}
    if key not in held:
        with torch.inference_mode(False):
            held[key] = make()
    found: Made = held[key]
    return found
