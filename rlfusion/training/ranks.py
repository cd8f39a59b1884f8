"""The processes that learn together, and the one place that knows of them.

A rollout of B walks is cut into V fixed ``shares`` of neighbouring walks; of N ranks the r-th has V / N of them. Each
optimiser step takes walks of every share, so that the same walks meet in it on any number of ranks.

    (1)  g = sum_v g_v,  the gradient of a step; g_v is that of the rows of share v, in micro-batches of their own
    (2)  exact: the sum is a binary tree over v = 0..V-1. A rank's shares are a whole subtree, the ranks its top:
         the same bits for every N such that V / N is a power of two
    (3)  else a rank adds its shares up as they come, and the ranks' sums are all-reduced: equal to rounding

What a learner accumulates outside of ``accumulate`` is computed by every rank alike, and is not reduced: a learner that
knows nothing of ranks is right on any number of them, and no faster.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlfusion.common import shards
from rlfusion.common.errors import NumericalError, RlfusionError
from rlfusion.common.weights import pack, unpack
from rlfusion.training.dealing import Shelf, deal, parts_of
from rlfusion.training.sums import IDLE, Body, Record, Round, Sums, backward, buckets, calls_of

PATIENCE = timedelta(days=30)
"""For which ranks wait for the first to make what they then find: a base model, pairs of a teacher."""
FIRST, EVERY = 3, 50
"""Parameters are compared across the ranks after each of the first steps, and then every so many."""


class RanksDiffer(RlfusionError):
    """The ranks' parameters are not the same any more."""

    exit_code = 4


@dataclass
class Ranks:
    """This process, ``rank`` of ``count`` that learn together, and the ``shares`` of their work.

    Attributes:
        rank: 0..count-1.
        count: N. Where it is above 1, the default group of torch.distributed has N members.
        shares: V, a multiple of N.
        exact: Eq. (2).
        apart: whether it is computing for its own shares, and no other rank the same; ``idle`` there, for nothing.
        received: bytes of walks that came from other processes.
        shelf: of ranks that have a common store.
    """

    rank: int = 0
    count: int = 1
    shares: int = 1
    exact: bool = False

    def __post_init__(self) -> None:
        self.apart = self.idle = False
        self.received = 0
        self.shelf: Shelf | None = None
        self._sums: dict[nn.Parameter, list[Tensor | None]] = {}
        self._patient: Any = None
        self._beside: Any = None

    @property
    def mine(self) -> range:
        """The shares of this rank."""
        each = self.shares // self.count
        return range(self.rank * each, (self.rank + 1) * each)

    def share(self, walk: Tensor, walks: int) -> Tensor:
        """The share (N,) of walks (N,) of a rollout of so many."""
        if self.shares == 1:
            return torch.zeros(len(walk), dtype=torch.int64)
        parts = torch.arange(walks).tensor_split(self.shares)
        return torch.repeat_interleave(torch.arange(self.shares), torch.tensor([len(p) for p in parts]))[walk.cpu()]

    def dealt(self, walks: int, split: bool) -> list[Tensor]:
        """The walks, of a rollout of so many, that each rank learns from; ``split`` says whether its network is."""
        parts, each = torch.arange(walks).tensor_split(self.shares), self.shares // self.count
        whose = [slice(r, None, self.count) if split else slice(r * each, (r + 1) * each) for r in range(self.count)]
        return [torch.cat(parts[some]) for some in whose]

    def deal(self, rows: Tensor, at: Sequence[Tensor], to: Sequence[Tensor]) -> Tensor:
        """Bring rows to the ranks that want them. All ranks do so together.

        Args:
            rows: those that are here, on the CPU: ``at[rank]`` has their numbers.
            at: the numbers of the rows that each rank has; each row is on one rank.
            to: the numbers of those that each rank wants.

        Returns:
            The rows ``to[rank]``.
        """
        found, received = deal(self.rank, rows, at, to)
        self.received += received
        return found

    def passes(self, draw: np.random.Generator, walks: int, steps: int, taken: int | None = None) -> list[Tensor]:
        """The walks of each of ``steps`` optimiser steps of a pass over ``taken`` of ``walks`` walks (all, by default),
        drawn without replacement within each share. The steps are as large as each other, to one walk.
        """
        wanted = torch.arange(walks if taken is None else taken).tensor_split(self.shares)
        held = torch.arange(walks).tensor_split(self.shares)
        orders = [own[torch.from_numpy(draw.permutation(len(own)))][: len(some)] for own, some in zip(held, wanted)]
        return [torch.cat(parts) for parts in zip(*parts_of(orders, steps))]

    def accumulate(self, module: nn.Module, share: Tensor, micro_batch: int, body: Body) -> list[Record]:
        """Accumulate the gradient of all rows in ``module``, those of this rank here; ``share`` (N,) is each row's.

        Returns:
            The records of all rows, in the order of the shares, on every rank.

        Raises:
            NumericalError: ``body`` did, on this rank or another.
        """
        calls, split = calls_of(share, self.shares, micro_batch), bool(shards.roots(module))
        if self.shares == 1 and not split:
            return [backward(rows, body) for rows in calls[0]]
        records: dict[tuple[int, int], Record] = {}
        with self._apart(module) as own, self.alike(), self._by_itself():
            for v, found in self._in_step(module, calls, body) if split else self._by_share(calls, body):
                records |= {(v, i): record for i, record in enumerate(found)}
                own.end_of_share()
        return self.gather(records)

    def _by_share(self, calls: list[list[Tensor]], body: Body) -> Iterator[tuple[int, list[Record]]]:
        """The shares of this rank, each of micro-batches ``calls[v]``, backwards; and their records."""
        for v in self.mine:
            yield v, [backward(some, body) for some in calls[v]]

    def _in_step(self, module: nn.Module, calls: list[list[Tensor]], body: Body) -> Iterator[tuple[int, list[Record]]]:
        """The same of a network that is split: neighbouring shares at the same time, one a rank, whose gradients FSDP2
        adds up. A rank that has fewer micro-batches than another idles: one row of its own, of no weight.
        """
        for first in range(0, self.shares, self.count):
            v, most = first + self.rank, max(map(len, calls[first : first + self.count]))
            mine = Round(module, body, self.count, self.exact, self.alike, calls[v][0][:1] if calls[v] else IDLE)
            found = []
            for i, some in enumerate([*calls[v], *[None] * most][:most]):
                self.idle = some is None
                found.append(mine(some, last=i == most - 1))
            self.idle = True
            mine.finish()
            self.idle = False
            yield v, found[: len(calls[v])]

    @contextmanager
    def _by_itself(self) -> Iterator[None]:
        """Within the context this rank computes for its own shares."""
        self.apart = self.count > 1
        try:
            yield
        finally:
            self.apart = self.idle = False

    @torch.no_grad()
    def look(
        self, module: nn.Module, share: Tensor, micro_batch: int, body: Callable[[Tensor], Record]
    ) -> dict[tuple[int, int], Record]:
        """What ``body`` says of the rows of this rank, in the micro-batches of ``accumulate``, by share and number:
        ``gather`` gives those of all ranks. Of a network that is split, all ranks call it equally often.
        """
        calls, split = calls_of(share, self.shares, micro_batch), bool(shards.roots(module))
        found: dict[tuple[int, int], Record] = {}
        with self._by_itself():
            for n, v in enumerate(range(self.rank, self.shares, self.count) if split else self.mine):
                found |= {(v, i): body(rows) for i, rows in enumerate(calls[v])}
                most = max(map(len, calls[n * self.count : (n + 1) * self.count])) if split else 0
                self.idle = True
                for _ in range(len(calls[v]), most):
                    body(IDLE)
                self.idle = False
        return found

    @contextmanager
    def alike(self) -> Iterator[None]:
        """What is not finite within the context on one rank is an error on all: each then undoes the same update."""
        own: NumericalError | None = None
        try:
            yield
        except NumericalError as error:
            own = error
        told = self.exchange(str(own or "").encode())
        if own is not None:
            raise own
        for rank, text in enumerate(told):
            if text:
                raise NumericalError(f"{text.decode()} (on rank {rank})")

    @contextmanager
    def _apart(self, module: nn.Module) -> Iterator["Sums"]:
        """Within the context the gradients of ``module`` are a sum of their own, kept for ``reduce`` afterwards."""
        sums = Sums([p for p in module.parameters() if p.requires_grad], self.exact)
        try:
            yield sums
        except BaseException:
            self._sums.clear()
            raise
        finally:
            sums.put_back()
        for p, total in zip(sums.parameters, sums.totals()):
            self._sums.setdefault(p, []).append(total)

    def leave_out(self, parameters: Iterable[nn.Parameter]) -> None:
        """Let these have no gradient of the step, which no sample asks: a network that is split has one of 0."""
        self._sums |= {p: [None] * len(self._sums[p]) for p in parameters if p in self._sums}

    def forget(self) -> None:
        """What was accumulated for a step that is broken off."""
        self._sums.clear()

    @torch.no_grad()
    def reduce(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add Eq. (1) of what was accumulated since the last step to the gradients that are there."""
        held = [p for p in parameters if p in self._sums]
        for sums in zip(*(self._sums.pop(p) for p in held)):
            for p, total in zip(held, self._total(held, list(sums))):
                if total is not None:
                    p.grad = total if p.grad is None else p.grad + total

    def _total(self, parameters: Sequence[nn.Parameter], sums: list[Tensor | None]) -> list[Tensor | None]:
        """The sum over the ranks of each parameter's; None where no rank has a gradient."""
        if self.count == 1 or all(map(shards.is_split, parameters)):  # the sum of what is split is FSDP2's
            return sums
        told = torch.tensor([total is not None for total in sums], dtype=torch.int32)
        torch.distributed.all_reduce(told)
        there = told.tolist()
        filled = [torch.zeros_like(p) if total is None else total for p, total in zip(parameters, sums)]
        reduced = self._reduced([total for total, some in zip(filled, there) if some])
        return [next(reduced) if some else None for some in there]

    def _reduced(self, tensors: list[Tensor]) -> Iterator[Tensor]:
        """The sum over the ranks of each tensor, in buckets."""
        for bucket in buckets(tensors):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            if self.exact:
                parts = [torch.empty_like(flat) for _ in range(self.count)]
                torch.distributed.all_gather(parts, flat)
                flat = shards.tree(parts)
            else:
                torch.distributed.all_reduce(flat)
            sizes = [tensor.numel() for tensor in bucket]
            yield from (part.view_as(tensor) for part, tensor in zip(flat.split(sizes), bucket))

    @torch.no_grad()
    def clip(self, parameters: Iterable[nn.Parameter], most: float) -> float:
        """Scale the gradients down to the norm ``most``; their norm before, of what is split over all ranks."""
        wanted = [p for p in parameters if p.grad is not None]
        gradients = [p.grad for p in wanted if p.grad is not None]
        split = any(map(shards.is_split, wanted))
        total = self.norm(gradients) if split else nn.utils.get_total_norm(gradients)
        norm = total.item()
        near = 2e-6 + 2 * torch.finfo(total.dtype).eps * norm  # else torch's factor, most / (norm + 1e-6), is 1
        if math.isfinite(norm) and norm + near >= most:
            nn.utils.clip_grads_with_norm_([_rows(p) for p in wanted] if split else wanted, most, total)
        return norm

    @torch.no_grad()
    def norm(self, gradients: list[Tensor]) -> Tensor:
        """The norm of gradients that are split; ``exact``: as of whole ones, of which there is one at a time."""
        if self.exact:
            return nn.utils.get_total_norm([nn.utils.get_total_norm([shards.whole(g)]) for g in gradients])
        squares = torch.stack([shards.own(g).double().square().sum() for g in gradients]).sum()
        if self.count > 1:
            torch.distributed.all_reduce(squares)
        return squares.sqrt().to(gradients[0].dtype)

    def gather(self, records: Mapping[tuple[int, int], Record]) -> list[Record]:
        """The records of all ranks by share and number, in that order, each on the device of the first of this rank."""
        if self.count == 1:
            return [records[key] for key in sorted(records)]
        device = next((value.device for record in records.values() for value in record.values()), torch.device("cpu"))
        own = {f"{v}/{i}/{name}": value for (v, i), record in records.items() for name, value in record.items()}
        found: dict[tuple[int, int], Record] = {}
        for blob in self.exchange(pack(own)):
            for key, value in unpack(blob).items():
                v, i, name = key.split("/", 2)
                found.setdefault((int(v), int(i)), {})[name] = value.to(device)
        return [found[key] for key in sorted(found)]

    def meet_beside(self) -> None:
        """Have a second group, for what another thread does (``exchange``) while the ranks go on."""
        if self.count > 1 and self._beside is None:
            self._beside = torch.distributed.new_group(backend="gloo")

    def exchange(self, blob: bytes, beside: bool = False) -> list[bytes]:
        """The bytes of every rank, in the order of the ranks. In another thread it is ``beside``."""
        if self.count == 1:
            return [blob]
        group = self._beside if beside else None
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        torch.distributed.all_gather(sizes, torch.tensor([len(blob)]), group=group)
        own = torch.zeros(max(int(size) for size in sizes), dtype=torch.uint8)
        own[: len(blob)] = torch.frombuffer(bytearray(blob), dtype=torch.uint8) if blob else own[:0]
        parts = [torch.empty_like(own) for _ in range(self.count)]
        torch.distributed.all_gather(parts, own, group=group)
        return [part[: int(size)].numpy().tobytes() for part, size in zip(parts, sizes)]

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Within the context the first rank is alone, then all others are: for what it makes and they find, however
        long that takes. Nothing in it may wait for another rank: each is by itself there.
        """
        if self.count > 1 and self._patient is None:
            self._patient = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
        if self.rank:
            self._meet()
        with joined(Ranks()):
            yield
        if not self.rank:
            self._meet()

    def _meet(self) -> None:
        """Wait for the other ranks, without the deadline of all else that they do together; a death is seen at once."""
        if self.count > 1:
            torch.distributed.barrier(group=self._patient)

    def by_first(self, make: Callable[[], Any]) -> Any:
        """What ``make`` gives the first rank, as JSON has it, on every rank: for what takes no part in learning, and
        need not be done, nor its rewards be asked for, as often as there are ranks.
        """
        if self.count == 1:
            return make()
        told = b""
        with self.in_turn():
            if not self.rank:
                told = json.dumps(make()).encode()
        return json.loads(self.exchange(told)[0])

    def of_first(self, value: int) -> int:
        """The first rank's number, on every rank: for what depends on a clock or a signal."""
        if self.count == 1:
            return value
        told = torch.tensor([value], dtype=torch.int64)
        torch.distributed.broadcast(told, 0)
        return int(told)

    def require_alike(self, named: dict[str, nn.Parameter], step: int) -> None:
        """Compare the parameters across the ranks after optimiser step number ``step``, where that is due.

        Raises:
            RanksDiffer: names the first that differs.
        """
        named = {name: p for name, p in named.items() if not shards.is_split(p)}  # no two ranks hold the same rows
        if self.count == 1 or not named or not (step <= FIRST or step % EVERY == 0):
            return
        own = torch.stack([_mark(p) for p in named.values()]).cpu()
        parts = [torch.empty_like(own) for _ in range(self.count)]
        torch.distributed.all_gather(parts, own)
        for rank, part in enumerate(parts):
            if not torch.equal(part, parts[0]):
                name = list(named)[int((part != parts[0]).flatten(1).any(1).nonzero()[0])]
                raise RanksDiffer(
                    f"ranks 0 and {rank} differ in {name!r} after {step} optimiser steps: expected the same bits; "
                    "a learner that draws unseeded noise, or machines of different kinds, lead to this"
                )


def _rows(p: nn.Parameter) -> nn.Parameter:
    """This rank's rows of a parameter, with those of its gradient."""
    own = nn.Parameter(shards.own(p))
    own.grad = None if p.grad is None else shards.own(p.grad)
    return own


def _mark(p: Tensor) -> Tensor:
    """Two integers that change with (nearly) any change of a tensor's bits."""
    kinds: dict[int, Any] = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = p.detach().contiguous().view(kinds[p.element_size()]).flatten().to(torch.int64)
    place = torch.arange(1, len(bits) + 1, device=bits.device)
    return torch.stack([bits.sum(), (bits * (2 * place + 1)).sum()])


_current = Ranks()


def current() -> Ranks:
    """The ranks of this process: it alone, unless it is within ``joined``."""
    return _current


@contextmanager
def joined(ranks: Ranks) -> Iterator[Ranks]:
    """Within the context this process is one of ``ranks``."""
    global _current
    before, _current = _current, ranks
    try:
        yield ranks
    finally:
        _current = before
