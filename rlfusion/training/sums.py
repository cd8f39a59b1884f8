"""The gradients of the micro-batches of a share, and their sums over shares."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import reduce

import torch
from torch import Tensor, nn

from rlfusion.common import shards

Record = dict[str, Tensor]
Body = Callable[[Tensor], tuple[Tensor, Record]]
"""The work of a micro-batch: rows -> the loss whose gradient is accumulated, and what is to be known of it."""

Alike = Callable[[], AbstractContextManager[None]]
"""A context in which what is not finite on one rank is an error on all."""

IDLE = torch.zeros(1, dtype=torch.int64)
"""The row of a call that is made for nothing."""
BUCKET = 2**24
"""Elements of gradients that are reduced at a time."""


def calls_of(share: Tensor, shares: int, micro_batch: int) -> list[list[Tensor]]:
    """The micro-batches of each share, of rows whose ``share`` (N,) is given."""
    if shares == 1:
        rows = [torch.arange(len(share))]
    else:
        rows = [(share.cpu() == v).nonzero().flatten() for v in range(shares)]
    return [list(some.split(micro_batch)) if len(some) else [] for some in rows]


def backward(rows: Tensor, body: Body) -> Record:
    """A micro-batch, backwards; its detached record."""
    loss, record = body(rows)
    loss.backward()
    return {name: value.detach() for name, value in record.items()}


class Round:
    """The micro-batches of one share on each rank, of a network that is split.

    FSDP2 averages gradients over N ranks, which the losses, N times as large, make a sum. Within ``exact`` a share is
    summed on its rank before it meets the others: the gradient stays there, whole, until the last micro-batch takes it
    along. That is so only where it calls each part of the network once; else one more call, of no weight, does. So it
    is where parts are ``shards.kept``: derivatives of derivatives come to a parameter more than once.
    """

    def __init__(
        self, module: nn.Module, body: Body, count: int, exact: bool, alike: Alike, idle: Tensor = IDLE
    ) -> None:
        """``idle``: a row that this rank can compute."""
        self.module, self.body, self.exact, self.alike, self.idle = module, body, exact, alike, idle
        self.weight = 1 if exact else count
        self.kept, self.waits = shards.are_kept(module), False

    def __call__(self, rows: Tensor | None, last: bool) -> Record:
        """A micro-batch, backwards; its detached record. One without rows is of no weight."""
        with shards.summed(), self._apart(self.kept), shards.calls(self.module) as calls, self.alike():
            loss, record = self.body(self.idle if rows is None else rows)  # which may take derivatives, too
        once = last and max(calls.values(), default=1) == 1
        self.waits = self.kept or (self.exact and not once)
        weight = 0 if rows is None else self.weight
        with shards.summed(), self._apart(self.waits):
            (loss if weight == 1 else loss * weight).backward()
        return {name: value.detach() for name, value in record.items()}

    def _apart(self, here: bool) -> AbstractContextManager[None]:
        """Where gradients are to stay on their rank."""
        return shards.unreduced(self.module) if here else nullcontext()

    def finish(self) -> None:
        """Let what waits be summed."""
        if self.waits:
            self.exact = self.kept = False
            self(None, last=True)


class Sums:
    """The gradients of some parameters, summed over shares; what they had before is put back."""

    def __init__(self, parameters: list[nn.Parameter], exact: bool) -> None:
        self.parameters, self.exact = parameters, exact
        self.before = [p.grad for p in parameters]
        self.levels: list[list[Tensor | None] | None] = []
        self._clear()

    def _clear(self) -> None:
        for p in self.parameters:
            p.grad = None

    def end_of_share(self) -> None:
        """Take the share's gradients into the tree, where there is one: as a binary counter that carries."""
        if not self.exact:
            return
        carried: list[Tensor | None] = [p.grad for p in self.parameters]
        self._clear()
        for i, level in enumerate(self.levels):
            if level is None:
                self.levels[i] = carried
                return
            carried, self.levels[i] = [_plus(a, b) for a, b in zip(level, carried)], None
        self.levels.append(carried)

    def totals(self) -> list[Tensor | None]:
        """The sums; the gradients are not touched any more."""
        if not self.exact:
            return self.final
        return reduce(lambda low, high: [_plus(a, b) for a, b in zip(high, low)], filter(None, self.levels))

    def put_back(self) -> None:
        """Give the parameters the gradients that they had."""
        self.final: list[Tensor | None] = [p.grad for p in self.parameters]
        for p, grad in zip(self.parameters, self.before):
            p.grad = grad


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, up to ``BUCKET`` elements at a time."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or sum(t.numel() for t in bucket) + tensor.numel() > BUCKET):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
