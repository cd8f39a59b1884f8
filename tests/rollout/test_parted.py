"""The walks of a rollout on two ranks: each has those of its own shares, gets others where all are asked for, and says
so where it is asked for more than it has.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from ranked import members
from rollout_tasks import CLASSES, make_policy, make_recipe

from rlfusion.common.weights import Weights
from rlfusion.rl.replay import Replay
from rlfusion.rollout import Settings, make_backend, plan
from rlfusion.rollout.among_ranks import AmongRanks
from rlfusion.rollout.backend import Away, Backend, Pool
from rlfusion.rollout.parted import Parted, at_steps, moves_like
from rlfusion.rollout.trajectory import Trajectory, concatenate
from rlfusion.rollout.wire import from_wire, to_wire_apart
from rlfusion.training.ranks import Ranks

SIZES = {"items that end with shares": 3, "items that do not": 5, "one item": 12}
X = torch.arange(24.0).reshape(6, 2, 2)


def one_of_two(rank: int = 0) -> Parted:
    """Rows 0, 1, 2 or 3, 4, 5 of ``X``."""
    return Parted(X[3 * rank :][:3], 6, Ranks(rank, 2, 2), split=False)


def test_what_is_known_without_any_row():
    x = one_of_two()
    assert (x.shape, x.dtype, x.device, x.ndim, len(x), x.numel()) == ((6, 2, 2), torch.float32, X.device, 3, 6, 24)
    assert x.to(torch.float64).dtype == torch.float64
    assert x._all is None


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_by_itself_has_its_own_rows_and_no_others(rank):
    x, own, other = one_of_two(rank), torch.tensor([2, 0]) + 3 * rank, torch.tensor([5 - 3 * rank])
    x.ranks.apart = True
    assert torch.equal(x[own, -1], X[own, -1])
    assert torch.equal(x[own, torch.tensor([0, 1])], X[own, torch.tensor([0, 1])])
    zeros = moves_like(x)
    zeros[own, torch.tensor([0, 0])] = torch.ones(2, 2)
    assert zeros.held.sum() == 4
    with pytest.raises(IndexError):
        x[other, 0]
    with pytest.raises(TypeError, match="expected their numbers, int64"):
        x[:, 0]
    with pytest.raises(RuntimeError, match="expected rows of those"):
        x.mean()
    x.ranks.idle = True
    assert x[other, 0].shape == (1, 2)  # for a call of no weight


def test_the_rows_at_some_steps_are_those_of_an_index_of_two():
    walk, step = torch.tensor([5, 0, 3, 3]), torch.tensor([0, 1, 1, 0])
    for x in (X, X.transpose(0, 1).contiguous().transpose(0, 1), one_of_two()):
        if isinstance(x, Parted):
            x.ranks.apart, walk = True, walk % 3
        assert torch.equal(at_steps(x, walk, step), X[walk, step])


def test_what_is_not_a_function_of_torchs_own_is_refused():
    with pytest.raises(RuntimeError, match="lie on several ranks"), torch._C.DisableTorchFunctionSubclass():
        one_of_two() + 1


class Files(NamedTuple):
    """A store that all ranks reach, and the first rank's shelf: files in a folder."""

    folder: Path

    def put(self, number: int, places: list[tuple[str, Any]]) -> None:
        (self.folder / f"{number}.json").write_text(json.dumps([(sha256, str(place)) for sha256, place in places]))

    def get(self, number: int) -> list[tuple[str, Any]]:
        return json.loads((self.folder / f"{number}.json").read_text())

    def fetch(self, place: Any) -> np.ndarray:
        return np.load(place)


class Elsewhere(Pool):
    """Walks that stay in files."""

    def __init__(self, local: Backend, folder: Path) -> None:
        self.local, self.folder = local, folder

    def submit(self, items, weights):
        raise AssertionError("the walks are not wanted here")

    def submit_apart(self, items, weights):
        return lambda: [self._away(n, one) for n, one in enumerate(self.local.collect(items, weights))]

    def _away(self, number: int, trajectory: Trajectory) -> Away:
        (text, blob, sha256), states = to_wire_apart(trajectory)
        file = self.folder / f"{number}.npy"
        np.save(file, states)
        return Away(from_wire(text, blob), sha256, file)

    def close(self) -> None:
        """Nothing is held."""


def _collected(rank: int, count: int, sizes: dict[str, int], folder: str) -> dict[str, Any]:
    """What a rank has of rollouts of 12 walks, against all of them."""
    found: dict[str, Any] = {}
    weights = Weights.of(make_policy(), 1)
    with make_backend(make_recipe(), Settings()) as local:
        for name, size in sizes.items():
            work = plan(7, 0, 3, 4, size, CLASSES, 1)
            expected = concatenate(local.collect(work, weights))
            for split in (False, True):
                ranks = Ranks(rank, count, 4)
                (batch,) = AmongRanks(local, ranks, whole=False, split=split).collect(work, weights)
                (ends,) = AmongRanks(local if not rank else None, ranks, whole=True, split=split).collect(work, weights)
                far = Ranks(rank, count, 4)
                far.shelf = Files(Path(folder))
                pool = AmongRanks(None if rank else Elsewhere(local, Path(folder)), far, whole=True, split=split)
                found[f"{name}, {'split' if split else 'whole'}"] = _seen(
                    batch, expected, ends, *pool.collect(work, weights)
                )
    return found


def _seen(batch: Trajectory, expected: Trajectory, *others: Trajectory) -> dict[str, Any]:
    """Bytes held, whether they are the right ones, and those that came: for a rank, of a rollout without workers and
    with those of the first rank, whose walks come here or stay where they are; after the failed rewards are left out,
    and where all are wanted.
    """
    ranks, split = batch.x.ranks, batch.x.network_split
    own = ranks.dealt(12, split)[ranks.rank]
    same = all(torch.equal(one.x.held, expected.x[own]) for one in (batch, *others))
    same &= all(torch.equal(one.reward, expected.reward) for one in others)
    fetched = others[-1].x.ranks.received
    seen = {"fetched": fetched, "held": batch.x.held.nbytes, "all": expected.x.nbytes, "came": ranks.received}
    fine = torch.arange(12) % 5 != 3
    fewer = batch.take(fine)
    same &= torch.equal(fewer.x.held, expected.x[fine][ranks.dealt(int(fine.sum()), split)[ranks.rank]])
    same &= torch.equal(batch.reward, expected.reward) and torch.equal(
        batch.log_prob[:, :-1], expected.log_prob[:, :-1]
    )
    seen["fewer"] = fewer.x.held.nbytes
    kept = Replay(20).add(batch)
    same &= torch.equal(kept.x, expected.x) and not isinstance(kept.x, Parted)
    same &= torch.equal(batch.x[:, 0], expected.x[:, 0])
    return seen | {"same": same}


def test_each_of_two_ranks_has_the_walks_of_its_shares_whoever_drew_them(tmp_path):
    told = members(2, _collected, SIZES, str(tmp_path))
    for rank, found in enumerate(told):
        assert len(found) == 6
        for name, seen in found.items():
            assert seen["same"], (rank, name)
            assert seen["held"] == seen["all"] / 2, (rank, name)
            assert seen["fewer"] <= seen["all"] / 2, (rank, name)
    each = told[0]["one item, whole"]["all"] // 12
    # the second rank gets its 6 walks from the first, which has workers; without workers only those at the borders
    assert [rank["items that end with shares, whole"]["came"] for rank in told] == [0, 6 * each]
    assert [rank["items that do not, whole"]["came"] for rank in told] == [each, 6 * each]
    # from a store each fetches the items in which its walks are
    assert [rank["items that end with shares, whole"]["fetched"] for rank in told] == [6 * each, 6 * each]
    assert [rank["items that do not, whole"]["fetched"] for rank in told] == [10 * each, 7 * each]
