"""A step of supervised training in the shares of ``training.ranks``: each rank runs the networks on its own rows.

The draws of the whole batch are made by every rank alike; they are cheap beside the networks. A rank takes its rows of
them, so that a sample meets the same noise, time and condition on any number of ranks; where there are shares, what a
network draws of its own (dropout) is keyed by the share. The losses are means over the whole batch (``base``, Eq. 1).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rlfusion.common import shards
from rlfusion.common.errors import ConfigError
from rlfusion.common.seeding import integer
from rlfusion.pretrain.base import Draw
from rlfusion.training.ranks import Ranks, Record, current

Body = Callable[[Draw], tuple[Tensor, Record]]
"""A part of a draw -> what it adds to the loss (``Draw.mean``), and what is to be known of its samples, (b,) each."""


def accumulate(module: nn.Module, draw: Draw, body: Body) -> Record:
    """Accumulate the gradient of ``body`` over all of a draw in ``module``, share by share.

    Returns:
        What is to be known, detached, of all samples in their order, (B,) each, on every rank.

    Raises:
        ConfigError: the draw has fewer samples than there are shares.
    """
    ranks = current()

    def part(rows: Tensor) -> tuple[Tensor, Record]:
        some = draw.part(rows)
        with _apart(ranks, some):
            return body(some)

    records = ranks.accumulate(module, _share(ranks, draw), len(draw), part)
    return {name: torch.cat([record[name] for record in records]) for name in records[0]}


@torch.no_grad()
def mapped(module: nn.Module, draw: Draw, fn: Callable[[Draw], Tensor]) -> Tensor:
    """``fn``, of a draw the values (B, *), of the shares that this rank accumulates in ``module``, without gradient;
    NaN in the rows of others.
    """
    ranks = current()
    if ranks.shares == 1:
        return fn(draw)
    share, found = _share(ranks, draw), draw.x0.new_empty(0)
    for v in range(ranks.rank, ranks.shares, ranks.count) if shards.roots(module) else ranks.mine:
        some = draw.part((share == v).nonzero().flatten())
        with _apart(ranks, some):
            values = fn(some)
        if not len(found):
            found = values.new_full((len(draw), *values.shape[1:]), float("nan"))
        found[some.rows] = values
    return found


def _share(ranks: Ranks, draw: Draw) -> Tensor:
    """The share of each sample of a draw, (B,)."""
    if len(draw) < ranks.shares:
        raise ConfigError(f"batch = {len(draw)}: expected a sample at least in each of learner.shares = {ranks.shares}")
    return ranks.share(torch.arange(len(draw)), len(draw))


@contextmanager
def _apart(ranks: Ranks, draw: Draw) -> Iterator[None]:
    """Within the context torch's own generators are keyed by the share, where there are several."""
    if ranks.shares == 1:
        yield
        return
    devices = [draw.x0.device] if draw.x0.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(integer(*draw.key, "own"))
        yield
