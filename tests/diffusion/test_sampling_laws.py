"""Walks of rlfusion with an oracle denoiser against the closed-form law of the whole sampler."""

import math
from itertools import pairwise

import numpy as np
import oracles
import pytest
import torch
from laws import Oracle, steps_of

from rlfusion.common.tensors import cast
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.kernel import DDIM, DDPM, FlowSDE
from rlfusion.diffusion.policy import Policy
from rlfusion.diffusion.sampling import chain_noise, sample, walk
from rlfusion.diffusion.schedule import DDPM as Table
from rlfusion.diffusion.schedule import Cosine, Rectified, Trig

KERNELS = [DDPM("small"), DDPM("large"), DDIM(0.0), DDIM(0.6), DDIM(1.0), FlowSDE(0.0), FlowSDE(0.5)]
CHAINS = [(Table(), 10), (Cosine(), 6), (Rectified(), 7), (Trig(), 6)]


def handbook_steps(schedule, times, eta: float) -> list[oracles.Step]:
    """The same for DDIM(eta), from alpha_bar and the handbook's Eq. 14 alone."""
    ab = [float(schedule(t).alpha ** 2) for t in times[:-1]] + [1.0]
    return [(math.sqrt(t), math.sqrt(1 - t), *oracles.ddim(t, s, eta)) for t, s in pairwise(ab)]


@pytest.mark.parametrize(("schedule", "steps"), CHAINS, ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_law_of_the_sampler_on_a_gaussian(kernel, schedule, steps):
    """3 features with variances .04, .25, 1.5: mean and variance of each within 4 standard errors."""
    lam, m, n = np.array([0.04, 0.25, 1.5]), np.array([0.7, -0.3, 0.2]), 20_000
    policy = Policy(Oracle(oracles.Mixture(np.ones(1), m[None], np.diag(lam)[None]), schedule), kernel)
    times = TimeGrid(steps).times(schedule)
    noise = torch.randn(n, steps + 1, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = sample(policy, noise, times).numpy()
    chain = steps_of(policy, times)
    if isinstance(kernel, DDIM) and not isinstance(schedule, Rectified):
        np.testing.assert_allclose(chain, handbook_steps(schedule, times, kernel.eta), atol=1e-9)
    for i in range(3):
        mean, var = oracles.gaussian_law(m[i], lam[i], chain, (0.0, policy.prior_std(times) ** 2))
        assert abs(x[:, i].mean() - mean) < 4 * math.sqrt(var / n)
        assert abs(x[:, i].var() - var) < 4 * var * math.sqrt(2 / n)


@pytest.mark.parametrize(("schedule", "steps"), [(Cosine(), 6), (Rectified(), 7)], ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_law_of_the_sampler_on_a_mixture(kernel, schedule, steps):
    """1-D, by quadrature; Kolmogorov-Smirnov on 20,000 samples, P(exceed) = 1e-4."""
    law, n = oracles.Mixture.scalar([0.35, 0.65], [-0.9, 0.6], [0.02, 0.1]), 20_000
    policy, times = Policy(Oracle(law, schedule), kernel), TimeGrid(steps).times(schedule)
    noise = torch.randn(n, steps + 1, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = np.sort(sample(policy, noise, times)[:, 0].numpy())
    cdf = oracles.mixture_law(law, steps_of(policy, times), policy.prior_std(times))(x)
    assert np.abs(cdf - (np.arange(n) + 0.5) / n).max() < 2.2 / math.sqrt(n)


@pytest.mark.parametrize("kernel", [DDIM(0.0), FlowSDE(0.0)], ids=repr)
def test_noise_free_walks_follow_the_probability_flow(kernel):
    """DDIM(0) and the Euler flow step end, with many steps, where the ODE does: the quantile map."""
    law = oracles.Mixture.scalar([0.35, 0.65], [-0.9, 0.6], [0.05, 0.1])
    start = torch.linspace(-2.5, 2.5, 21, dtype=torch.float64)[:, None]
    truth = oracles.flow_map(law, start[:, 0].numpy(), (0.0, 1.0), (1.0, 0.0))
    errors = []
    for steps in (100, 200, 400):
        times = TimeGrid(steps).times(Trig())
        noise = torch.zeros(21, steps + 1, 1, dtype=torch.float64)
        noise[:, 0] = start
        end = sample(Policy(Oracle(law, Trig()), kernel), noise, times)[:, 0].numpy()
        errors.append(np.abs(end - truth).max())
    assert errors[2] < 0.02
    assert errors[2] < 0.65 * errors[1] < 0.65**2 * errors[0]


def test_walk_yields_what_it_drew_and_depends_on_its_own_row_alone():
    policy = Policy(Oracle(oracles.Mixture.scalar([1.0], [0.0], [0.5]), Cosine()), DDIM(1.0))
    times = TimeGrid(4).times(Cosine())
    noise = chain_noise((7, "test"), [3, 1, 9], 4, (1,))
    steps = list(walk(policy, noise, times))
    assert torch.equal(steps[0].obs.x, noise[:, 0])
    for k, step in enumerate(steps):
        assert (step.obs.t, step.obs.s) == (times[k], times[k + 1])
        assert torch.equal(step.x, step.transition.mean + step.transition.std * noise[:, k + 1])
        assert k == 0 or torch.equal(step.obs.x, steps[k - 1].x)
    assert steps[-1].transition.std == 0
    alone = sample(policy, chain_noise((7, "test"), [1], 4, (1,)), times)
    torch.testing.assert_close(sample(policy, noise, times)[1:2], alone)


def test_the_chain_begins_at_the_noise_level_of_its_first_time():
    policy = Policy(Oracle(oracles.Mixture.scalar([1.0], [0.0], [0.5]), Trig()), DDIM(1.0))
    times = torch.tensor([0.5, 0.2, 0.0], dtype=torch.float64)
    first = next(iter(walk(policy, torch.ones(2, 3, 1), times)))
    torch.testing.assert_close(first.obs.x, torch.full((2, 1), math.sin(math.pi / 4)))


@pytest.mark.parametrize("shape", [(4, 3, 1), (4, 4), (4, 5, 1)], ids=str)
def test_noise_of_another_number_of_steps_is_refused(shape):
    policy = Policy(Oracle(oracles.Mixture.scalar([1.0], [0.0], [0.5]), Trig()), DDIM(1.0))
    with pytest.raises(ValueError, match=r"noise is \(B, 4"):
        sample(policy, torch.zeros(shape), TimeGrid(3).times(Trig()))


def test_coefficients_are_cast_last():
    """float32 walks stay within rounding of float64 walks over 500 steps."""
    law, times = oracles.Mixture.scalar([0.4, 0.6], [-0.8, 0.6], [0.04, 0.1]), TimeGrid(500).times(Table())
    policy = Policy(Oracle(law, Table()), DDPM())
    noise = torch.randn(8, 501, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    low = sample(policy, noise.float(), times)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), sample(policy, noise.float().double(), times), rtol=0, atol=2e-4)
    assert cast(torch.tensor(1 / 3, dtype=torch.float64), low).dtype == torch.float32
