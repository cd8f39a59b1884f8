"""The draws of supervised training: which labels are dropped, and that a step is pure in its key."""

from dataclasses import fields
from math import sqrt

import pytest
import torch
from torch import Tensor

from rlfusion.data import Dataset
from rlfusion.data.augment import Augment
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.schedule import Cosine
from rlfusion.nets.mlp import ResidualMLP
from rlfusion.pretrain import Config, Draw, Learner
from rlfusion.pretrain.draws import Draws

TOTAL, BATCH, CLASSES = 70, 32, 4
"""An epoch is no whole number of steps."""
SHARE = 0.3
CPU = torch.device("cpu")


def data() -> Dataset:
    """Sample i is (i + 1, -(i + 1)) in a row of two pixels: its number and whether it is mirrored can be read."""
    number = torch.arange(1.0, TOTAL + 1)
    x = torch.stack([number, -number], 1).reshape(TOTAL, 1, 1, 2)
    return Dataset(x, torch.arange(TOTAL) % CLASSES, tuple("abcd"))


def draws(dropout: float = 0.0, seed: int = 0, purpose: str = "test", flip: float | None = None) -> Draws:
    made = Draws(data(), BATCH, dropout, 1000, CPU, seed, purpose)
    made.augment = None if flip is None else Augment(flip=flip)
    return made


def within(count: int, n: int, p: float) -> bool:
    """Five standard deviations of the binomial: by chance one in two million would be outside."""
    return abs(count - n * p) <= 5 * sqrt(n * p * (1 - p))


def mirrored(draw: Draw) -> Tensor:
    """Which samples are mirrored, (B,)."""
    return draw.x0[:, 0, 0, 0] < 0


def same(one: Draw, other: Draw, *names: str) -> list[bool]:
    return [torch.equal(getattr(one, name), getattr(other, name)) for name in names]


RANDOM = ("x0", "cond", "eps", "u", "index")
"""What a step draws anew."""


def test_the_stated_share_loses_its_label_and_the_rest_keep_theirs():
    draw, steps = draws(SHARE), 300
    lost, seen, label = torch.zeros(TOTAL), torch.zeros(TOTAL), data().label
    for step in range(steps):
        d = draw(step)
        dropped = d.cond == CLASSES
        assert torch.equal(d.cond[~dropped], label[d.index[~dropped]])
        assert torch.equal(d.x0, data().x[d.index])  # a dropped label leaves the sample
        lost.index_add_(0, d.index, dropped.float())
        seen.index_add_(0, d.index, torch.ones(BATCH))
    assert within(lost.sum().item(), steps * BATCH, SHARE)
    for c in range(CLASSES):
        assert within(lost[label == c].sum().item(), seen[label == c].sum().item(), SHARE)
    assert all(
        within(count, n, SHARE) for count, n in zip(lost.tolist(), seen.tolist())
    )  # no sample is chosen for good


def test_each_sample_loses_its_label_on_its_own():
    """Pairs of neighbours in a batch, and the same place in two steps: both lose theirs in a share of p^2."""
    dropped = torch.stack([draws(SHARE)(step).cond == CLASSES for step in range(300)])
    for both in (dropped[:, 0::2] & dropped[:, 1::2], dropped[0::2] & dropped[1::2]):
        assert within(both.sum().item(), both.numel(), SHARE**2)


def test_dropout_of_0_and_1_are_none_and_all():
    for step in range(20):
        none, some, every = (draws(p)(step) for p in (0.0, SHARE, 1.0))
        assert torch.equal(none.cond, data().label[none.index])
        assert (every.cond == CLASSES).all()
        assert all(same(none, some, "x0", "eps", "u", "index"))  # the setting changes the labels alone


def test_the_setting_of_the_training_reaches_the_draws():
    net = ResidualMLP((1, 1, 2), CLASSES, width=8, depth=1)
    learner = Learner(
        Denoiser(net, Cosine(), "v"), data(), Config(batch=BATCH, label_dropout=1.0, augment="Augment(flip=1.0)")
    )
    assert (learner.draw(0).cond == CLASSES).all()
    assert mirrored(learner.draw(0)).all()
    assert learner.draw(3).key == (0, "pretrain", 3)


@pytest.mark.parametrize("flip", [None, 0.5])
def test_a_draw_is_pure_in_the_seed_the_purpose_and_the_step(flip):
    """Whatever was drawn before, by whom, and whatever torch's own generator does."""
    one, other = draws(SHARE, flip=flip), draws(SHARE, flip=flip)
    torch.manual_seed(0)
    forth = [one(step) for step in range(6)]
    state = torch.get_rng_state()
    back = [other(step) for step in reversed(range(6))][::-1]
    assert torch.equal(torch.get_rng_state(), state)
    for step, (a, b) in enumerate(zip(forth, back)):
        assert all(same(a, b, *RANDOM))
        assert a.key == b.key == (0, "test", step)
        assert torch.equal(a.normal("more", 5), b.normal("more", 5))
    others = {"step", "total", "key", "data", "label", "no_class", "rows", "whole"}
    assert set(RANDOM) | others == {f.name for f in fields(Draw)}


def test_seeds_purposes_and_steps_draw_apart():
    base = draws(SHARE)(5)
    for other in (draws(SHARE, seed=1)(5), draws(SHARE, purpose="else")(5), draws(SHARE)(6)):
        assert not any(same(base, other, *RANDOM))
    assert not torch.equal(base.normal("one", 5), base.normal("two", 5))
    eps = torch.stack([draws()(step).eps.flatten() for step in range(100)])
    overlap = eps @ eps.T / eps.shape[1] ** 0.5  # standard normal off the diagonal
    assert (overlap - overlap.diag().diag()).abs().max() < 6


def test_times_are_stratified_and_in_no_order_of_the_samples():
    n, where = 200, torch.zeros(BATCH)
    for step in range(n):
        u = draws()(step).u
        assert torch.equal((u.sort().values * BATCH).floor().long(), torch.arange(BATCH))
        where += u.float()
    assert (where / n - 0.5).abs().max() < 5 / sqrt(12 * n)


@pytest.mark.parametrize("flip", [None, 0.5])
def test_every_sample_comes_once_an_epoch(flip):
    """As read off the samples themselves, augmented or not; the epochs' orders differ."""
    draw, epochs = draws(flip=flip), 8
    steps = epochs * TOTAL // BATCH + 1
    number = torch.cat([draw(step).x0[:, 0, 0, 0].abs() for step in range(steps)]).long() - 1
    assert torch.equal(number, torch.cat([draw(step).index for step in range(steps)]))
    orders = number[: epochs * TOTAL].reshape(epochs, TOTAL)
    assert torch.equal(orders.sort(1).values, torch.arange(TOTAL).expand(epochs, TOTAL))
    assert len({tuple(order.tolist()) for order in orders}) == epochs


def test_augmentation_draws_of_its_own():
    """With it, the rest of the draw is as without; it falls on samples regardless of labels dropped, of the place in
    the batch, and of what it did to them an epoch ago."""
    flipped, lost, history = [], [], torch.zeros(TOTAL)
    again, draw, steps = 0, draws(SHARE, flip=0.5), 300
    for step in range(steps):
        d = draw(step)
        assert all(same(d, draws(SHARE)(step), "cond", "eps", "u", "index"))
        now = mirrored(d)
        again += (history[d.index] == now.float() * 2 - 1).sum().item()
        history[d.index] = now.float() * 2 - 1
        flipped.append(now), lost.append(d.cond == CLASSES)
    flipped, lost = torch.stack(flipped), torch.stack(lost)
    n = flipped.numel()
    assert within(flipped.sum().item(), n, 0.5)
    assert within((flipped & lost).sum().item(), n, 0.5 * SHARE)
    assert within(again, n - TOTAL, 0.5)
    assert all(within(count, steps, 0.5) for count in flipped.sum(0).tolist())
