"""The transition's Gaussian against torch.distributions, summed over features."""

import math

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from rlfusion.diffusion.gaussian import Gaussian

MEAN, OTHER, X = torch.randn(3, 5, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
STDS = {"scalar": torch.tensor(0.3).double(), "per row": torch.linspace(0.1, 2, 5).double()[:, None, None]}


def reference(mean: torch.Tensor, std: torch.Tensor) -> Independent:
    return Independent(Normal(mean, std.expand_as(mean)), 2)


@pytest.mark.parametrize("std", STDS.values(), ids=STDS)
def test_log_prob_and_entropy_are_sums_over_features(std):
    torch.testing.assert_close(Gaussian(MEAN, std).log_prob(X), reference(MEAN, std).log_prob(X))
    torch.testing.assert_close(Gaussian(MEAN, std).entropy(), reference(MEAN, std).entropy())


@pytest.mark.parametrize("std", STDS.values(), ids=STDS)
@pytest.mark.parametrize("factor", [1.0, 1.7])
def test_kl(std, factor):
    truth = kl_divergence(reference(MEAN, std), reference(OTHER, std * factor))
    torch.testing.assert_close(Gaussian(MEAN, std).kl(Gaussian(OTHER, std * factor)), truth)


@pytest.mark.parametrize("std", STDS.values(), ids=STDS)
def test_the_kl_of_one_std_keeps_a_small_gap_and_has_the_gradient_of_any_two(std):
    std = std.float()
    near = (MEAN.float() + 1e-4 * std).requires_grad_()
    found = Gaussian(near, std).kl(Gaussian(MEAN.float(), std))
    gap = (near.detach().double() - MEAN.float().double()) / std.double()
    torch.testing.assert_close(found, (gap.square().sum((1, 2)) / 2).float(), rtol=1e-5, atol=0.0)
    two = Gaussian(near, std).kl(Gaussian(MEAN.float(), std.clone()))
    assert torch.equal(*(torch.autograd.grad(kl.sum(), near)[0] for kl in (found, two)))


def test_score_is_the_gradient_of_log_prob_in_the_mean():
    mean = MEAN.clone().requires_grad_()
    Gaussian(mean, STDS["per row"]).log_prob(X).sum().backward()
    torch.testing.assert_close(mean.grad, (X - MEAN) / STDS["per row"] ** 2)  # erratum 79: the sign


def test_a_point_mass_has_no_density():
    assert Gaussian(MEAN, torch.tensor(0.0)).log_prob(MEAN).isnan().all()
    std = torch.tensor([0.0, 1, 0, 1, 1]).double()[:, None, None]
    assert Gaussian(MEAN, std).log_prob(X).isnan().tolist() == [True, False, True, False, False]
    assert torch.equal(Gaussian(MEAN, torch.tensor(0.0)).sample(X), MEAN)


def test_sample_is_reparameterised():
    torch.testing.assert_close(Gaussian(MEAN, STDS["per row"]).sample(X), MEAN + STDS["per row"] * X)


def test_half_precision_is_lifted_to_float32():
    low = Gaussian(MEAN.bfloat16(), torch.tensor(0.3).bfloat16()).log_prob(X.bfloat16())
    assert low.dtype == torch.float32
    exact = Gaussian(MEAN.bfloat16().double(), torch.tensor(0.3).bfloat16().double()).log_prob(X.bfloat16().double())
    torch.testing.assert_close(low.double(), exact, rtol=1e-5, atol=1e-5)
    assert math.isfinite(low.sum())


@pytest.mark.parametrize("std", STDS.values(), ids=STDS)
def test_the_gradients_of_log_prob_are_those_of_finite_differences(std):
    x, mean, s = (v.clone().requires_grad_() for v in (X, MEAN, std))
    assert torch.autograd.gradcheck(lambda *v: Gaussian(*v[1:]).log_prob(v[0]), (x, mean, s))
    one = MEAN[:1].clone().requires_grad_()  # of several rows of x
    assert torch.autograd.gradcheck(lambda m: Gaussian(m, torch.tensor(0.3).double()).log_prob(X), (one,))


def test_log_prob_has_second_derivatives_and_those_of_torch_func():
    x, mean, s = (v.clone().requires_grad_() for v in (X, MEAN, torch.linspace(0.5, 2, len(X)).double()[:, None, None]))
    assert torch.autograd.gradgradcheck(lambda *v: Gaussian(*v[1:]).log_prob(v[0]), (x, mean, s))
    slope = torch.func.grad(lambda m: Gaussian(m, s.detach()).log_prob(X).sum())(MEAN)
    torch.testing.assert_close(slope, ((X - MEAN) / s.square()).detach())


def test_log_prob_and_its_gradient_have_the_bits_of_a_graph_of_their_parts():
    mean, x = (v.float().requires_grad_() for v in (MEAN, X))
    weight = torch.linspace(-1, 1, 5)
    for std in (torch.tensor(0.3), torch.linspace(0.1, 2, 5)[:, None, None]):
        z = (x - mean) / std
        parts = -(z.square() / 2 + (std.log() + math.log(2 * math.pi) / 2)).flatten(1).sum(1)
        found = Gaussian(mean, std).log_prob(x)
        assert torch.equal(found, parts)
        slopes = [torch.autograd.grad((value * weight).sum(), (mean, x)) for value in (found, parts)]
        assert all(map(torch.equal, *slopes))
