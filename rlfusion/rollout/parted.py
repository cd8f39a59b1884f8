"""The walks of a rollout on one of several ranks: a tensor of all of them, of which each rank has those of its shares.

Within what a rank computes by itself (``Ranks.accumulate``, ``Ranks.look``) the rows of its own shares are there, and
no others. Anywhere else, where all ranks do the same, any use of it brings all rows to all ranks, once. So a learner
needs no code for it: what it touches outside of its micro-batches is what each rank has to hold.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from rlfusion.training.ranks import Ranks

ABOUT = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.element_size, Tensor.is_floating_point),
}
"""What is known of it without any row."""


class Parted(Tensor):
    """``count`` rows (count, ...), of which ``held`` are those that ``Ranks.dealt`` gives this rank, in that order."""

    held: Tensor
    ranks: Ranks
    network_split: bool
    own: list[Tensor]

    @staticmethod
    def __new__(cls, held: Tensor, count: int, ranks: Ranks, split: bool) -> "Parted":
        make: Any = Tensor._make_wrapper_subclass
        made: Parted = make(cls, (count, *held.shape[1:]), dtype=held.dtype, device=held.device)
        made.held, made.ranks, made.network_split, made.own = held, ranks, split, ranks.dealt(count, split)
        made._all, made._place = None, torch.full((count,), len(held), device=held.device)
        made._place[made.own[ranks.rank].to(held.device)] = torch.arange(len(held), device=held.device)
        return made

    _all: Tensor | None
    _place: Tensor

    def like(self, held: Tensor) -> "Parted":
        """The same rows of something else."""
        return Parted(held, len(self), self.ranks, self.network_split)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func is Tensor.to and isinstance(args[0], Parted):
            return args[0].like(args[0].held.to(*args[1:], **(kwargs or {})))
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], Parted) and args[0].ranks.apart:
            return func(args[0]._rows(), args[0]._mine(args[1]), *args[2:])
        whole, named = tree_map(lambda v: v.whole() if isinstance(v, Parted) else v, (tuple(args), kwargs or {}))
        return func(*whole, **named)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{func} got walks that lie on several ranks: expected what torch's own functions take")

    def _mine(self, index: Any) -> tuple[Any, ...]:
        """Where the rows of an index are in ``held``. A row that is another rank's is out of range; in a call for
        nothing any row will do.
        """
        rows, *rest = index if isinstance(index, tuple) else (index,)
        if not isinstance(rows, Tensor) or rows.dtype != torch.int64:
            raise TypeError(f"walks {rows!r}: expected their numbers, int64 (N,), where a rank computes its own shares")
        place = self._place[rows]
        return (torch.zeros_like(place) if self.ranks.idle else place, *rest)

    def _rows(self) -> Tensor:
        """``held``; in a call for nothing there is a row always."""
        return self.held if len(self.held) or not self.ranks.idle else self.held.new_zeros(1, *self.held.shape[1:])

    def whole(self) -> Tensor:
        """All rows, on every rank; all ranks ask for them at the same time.

        Raises:
            RuntimeError: a rank does, in what it computes by itself.
        """
        if self._all is None:
            if self.ranks.apart:
                raise RuntimeError("all walks are wanted where a rank computes its own shares: expected rows of those")
            every = [torch.arange(len(self))] * self.ranks.count
            self._all = self.ranks.deal(self.held.cpu(), self.own, every).to(self.held.device)
        return self._all

    def taken(self, walks: Tensor) -> Tensor:
        """The rows of a mask or of indices alone, which are a rollout again: cut into shares anew."""
        if self._all is not None or self.ranks.apart:
            return self._all[walks.to(self.device)] if self._all is not None else self[walks]
        kept = torch.arange(len(self))[walks.cpu()]
        wanted = [kept[rows] for rows in self.ranks.dealt(len(kept), self.network_split)]
        held = self.ranks.deal(self.held.cpu(), self.own, wanted).to(self.held.device)
        return Parted(held, len(kept), self.ranks, self.network_split)


def taken(x: Tensor, walks: Tensor) -> Tensor:
    """The walks of a mask or of indices alone."""
    return x.taken(walks) if isinstance(x, Parted) else x[walks.to(x.device)]


def moves_like(x: Tensor) -> Tensor:
    """Zeros for each step of walks x (B, K+1, ...), (B, K, ...); of a rank, for its own walks."""
    return x.like(torch.zeros_like(x.held[:, 1:])) if isinstance(x, Parted) else torch.zeros_like(x[:, 1:])


def at_steps(x: Tensor, walk: Tensor, step: Tensor) -> Tensor:
    """x[walk, step] (N, ...) of x (B, K, ...) and numbers (N,) that are there, on its device: one row each, which are
    copied in a third of the time of an index of two.
    """
    if isinstance(x, Parted) or not x.is_contiguous():
        return x[walk, step]
    return x.flatten(0, 1).index_select(0, walk * x.shape[1] + step)
