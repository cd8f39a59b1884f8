"""Statistics of images as rewards, and with bounds as penalties."""

import pytest
import torch

from rlfusion.common.errors import ConfigError
from rlfusion.rewards import build, score
from rlfusion.rewards.registry import task_info

INFO = task_info(("a", "b"), (3, 8, 8))
COND = torch.zeros(3, dtype=torch.long)


def made(name: str, **options):
    return build(name, {name: options} if options else {}, INFO)


def images() -> torch.Tensor:
    """Grey .5; a checkerboard of 0 and 1; a ramp of 8 levels."""
    board = ((torch.arange(8)[:, None] + torch.arange(8)) % 2).float()
    ramp = torch.arange(8).float().expand(8, 8) / 8
    return torch.stack([torch.full((8, 8), 0.5), board, ramp])[:, None].expand(3, 3, 8, 8).contiguous()


VALUES = {"brightness": [0.5, 0.5, 7 / 16], "edge_density": [0.0, 63 / 64, 0.0], "entropy": [0.0, 1.0, 3.0]}


@pytest.mark.parametrize("name", VALUES)
def test_the_statistic_is_the_reward(name):
    assert score(made(name), images(), COND, name).tolist() == pytest.approx(VALUES[name])


@pytest.mark.parametrize("name", VALUES)
def test_with_bounds_it_costs_the_distance_from_them(name):
    low, high = 0.2, 0.45
    expected = [-max(low - v, v - high, 0.0) for v in VALUES[name]]
    assert score(made(name, low=low, high=high), images(), COND, name).tolist() == pytest.approx(expected, abs=1e-6)
    assert score(made(name, low=low), images(), COND, name).tolist() == pytest.approx(
        [-max(low - v, 0) for v in VALUES[name]]
    )
    assert score(made(name, high=high), images(), COND, name).tolist() == pytest.approx(
        [-max(v - high, 0) for v in VALUES[name]]
    )


def test_brightness_has_a_gradient_and_the_others_have_none():
    x = images().requires_grad_()
    made("brightness", low=0.6)(x, COND).sum().backward()
    assert bool((x.grad > 0).all())
    for name in ("edge_density", "entropy"):
        assert not made(name)(x, COND).requires_grad


@pytest.mark.parametrize("bounds", [{"low": 1.0, "high": 0.5}, {"low": float("nan")}, {"high": float("inf")}])
def test_bounds_that_are_none_are_refused(bounds):
    with pytest.raises(
        ConfigError, match=r"expected (finite numbers, low <= high, or neither|float, a finite number or null)"
    ):
        made("entropy", **bounds)
