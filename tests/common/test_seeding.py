"""Keyed randomness: a number depends on its key alone, now and in every later version."""

import numpy as np
import pytest
import torch
from scipy import stats

from rlfusion.common import seeding
from rlfusion.common.seeding import integer, normal, normals, stream, streams
from rlfusion.diffusion.sampling import chain_noise


def test_a_row_depends_on_its_item_alone():
    whole = normal((3, "chain"), range(10), (4, 2))
    assert torch.equal(normal((3, "chain"), [7, 2], (4, 2)), whole[[7, 2]])
    assert torch.equal(normal((3, "chain"), np.array([7]), (4, 2)), whole[7:8])
    assert whole.dtype == torch.float32
    assert whole.shape == (10, 4, 2)
    assert normal((3, "chain"), [], (4, 2)).shape == (0, 4, 2)


def test_a_longer_chain_begins_with_the_noise_of_the_shorter():
    short, long = (chain_noise((0, 5), range(3), k, (1, 8, 8)) for k in (4, 9))
    assert short.shape == (3, 5, 1, 8, 8)
    assert torch.equal(long[:, :5], short)


def test_every_part_of_a_key_and_its_type_counts():
    keys = [(1, 2), (2, 1), (12,), (1, "2"), ("1", 2), (1, 2, 0), (1,), ("1,2",), (-1, 2)]
    assert len({integer(*key) for key in keys}) == len(keys)


def test_ten_thousand_samples_share_no_noise():
    firsts = normal((0, "chain"), range(10_000), (1,))
    assert len(firsts.unique()) > 9_990  # float32: a few equal values are chance
    assert len({integer(0, i) for i in range(10_000)}) == 10_000


def test_noise_is_standard_normal_and_items_are_uncorrelated():
    x = normal((11,), range(2000), (50,)).double().numpy()
    assert stats.kstest(x.ravel(), "norm").pvalue > 1e-4
    across = np.corrcoef(x[:, 0][:-1], x[:, 0][1:])[0, 1]
    along = np.corrcoef(x[:, 0], x[:, 1])[0, 1]
    assert max(abs(across), abs(along)) < 4 / np.sqrt(2000)


def test_the_numbers_of_a_key_are_fixed_for_ever():
    """Checkpoints and published seeds rest on these values (BLAKE2b, Philox 4x64, numpy's ziggurat)."""
    assert integer(0, "rlfusion", 1) == 7841475503453892319
    np.testing.assert_array_equal(
        normal((0, "rlfusion"), [3], (3,)).numpy()[0],
        np.float32([0.10905937850475311, -0.44122159481048584, 0.6153650879859924]),
    )


def test_the_global_generators_are_neither_read_nor_moved():
    torch.manual_seed(0)
    state, held = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    a = normal((1,), [1], (5,))
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == held).all()  # noqa: NPY002
    torch.manual_seed(9)
    assert torch.equal(normal((1,), [1], (5,)), a)


def test_a_stream_is_its_own_at_every_call():
    first, second = stream(4, "x"), stream(4, "x")
    first.normal(size=100)
    assert stream(4, "x").integers(1 << 60) == second.integers(1 << 60)


def test_streams_in_turn_are_each_items_own_whatever_was_drawn_before():
    """Of single numbers and of halves of words, of which a generator keeps the rest."""
    for item, taken in zip([7, 2, 7], streams((4, "x"), [7, 2, 7])):
        alone = stream(4, "x", item)
        for draw in (lambda of: of.integers(3), lambda of: of.standard_normal(5, dtype=np.float32).tolist()):
            assert draw(taken) == draw(alone)


@pytest.mark.parametrize("block", [1, 3 * 6, 4 * 3 * 6, seeding.BLOCK])
def test_columns_that_are_drawn_as_they_are_taken_are_the_same(block, monkeypatch):
    monkeypatch.setattr(seeding, "BLOCK", block)
    whole = normal((2, "x"), [5, 0, 9], (7, 2, 3))
    found = list(normals((2, "x"), iter([5, 0, 9]), 7, (2, 3)))
    assert torch.equal(torch.stack(found, 1), whole)


def test_columns_are_not_drawn_before_they_are_taken(monkeypatch):
    """Two columns of noise are held at a time where that is what ``BLOCK`` allows, however many there are."""
    monkeypatch.setattr(seeding, "BLOCK", 2 * 3 * 4)
    drawn, draw = [], seeding._drawn
    monkeypatch.setattr(seeding, "_drawn", lambda of, count, shape: drawn.append(shape) or draw(of, count, shape))
    columns = normals((2,), range(3), 5, (4,))
    for wanted in ([(2, 4)], [(2, 4)], [(2, 4)] * 2, [(2, 4)] * 2, [(2, 4), (2, 4), (1, 4)]):
        next(columns)
        assert drawn == wanted
