"""The variational bound against joint Gaussians, entropies and the normal distribution function, all in float64."""

import json
import math
from itertools import pairwise

import numpy as np
import oracles
import pytest
import torch
from by_answer import ByAnswer
from processes import rlfusion
from scipy.stats import norm

from rlfusion import data
from rlfusion.common.errors import ConfigError
from rlfusion.data import Dataset
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.kernel import CPS, DDIM, DDPM, FlowSDE, Langevin, Renoise, ReverseSDE
from rlfusion.diffusion.parameterization import target
from rlfusion.diffusion.policy import Policy
from rlfusion.diffusion.schedule import DDPM as Table
from rlfusion.diffusion.schedule import VP, Cosine, Geometric, Karras, Rectified, level
from rlfusion.evaluation.likelihood import _decoder, bits_per_dim, bound, require_bound


class Exact(ByAnswer):
    """E[x0 | x] of a rule (x, a, b) -> x0_hat, as a network that predicts ``kind``."""

    def __init__(self, rule, schedule, kind="eps"):
        super().__init__(torch.nn.Linear(1, 1), schedule, kind)
        self.rule = rule

    def answer(self, x, t, cond=None):
        l = level(self.schedule, t, x)
        x0 = self.rule(x, l.alpha, l.sigma)
        return target(self.kind, x0, (x - l.alpha * x0) / l.sigma, l)


def hermite(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Nodes and weights of E f(z), z standard normal."""
    z, w = np.polynomial.hermite_e.hermegauss(n)
    return torch.from_numpy(z), torch.from_numpy(w / w.sum())


def gaussian_rule(m, lam):
    return lambda x, a, b: m + a * lam * (x - a * m) / (a**2 * lam + b**2)


def joint_kl(x0: float, steps: list, q_steps: list, model_steps: list) -> float:
    """KL of the joint Gaussians of all noisy x, each a chain of affine steps: q from its x_1, p from N(0, sigma^2)."""

    def joint(mean, var, affine):
        means, cov = [mean], np.array([[var]])
        for slope, shift, std in affine:
            row = slope * cov[-1]
            cov = np.block([[cov, row[:, None]], [row[None], np.array([[slope * row[-1] + std**2]])]])
            means.append(slope * means[-1] + shift)
        return np.array(means), cov

    (a, b), *_ = steps
    mq, cq = joint(a * x0, b**2, q_steps)
    mp, cp = joint(0.0, b**2, model_steps)
    inverse, gap = np.linalg.inv(cp), mp - mq
    logs = np.linalg.slogdet(cp)[1] - np.linalg.slogdet(cq)[1]
    return 0.5 * (np.trace(inverse @ cq) - len(mq) + gap @ inverse @ gap + logs)


@pytest.mark.parametrize("x0", [-0.8, 0.4])
@pytest.mark.parametrize(
    ("kernel", "coefficients"),
    [
        (DDPM(), lambda t, s: (oracles.ddpm(t, s), oracles.ddpm(t, s))),
        (DDPM("large"), lambda t, s: (oracles.ddpm(t, s), oracles.ddpm(t, s, large=True))),
        (DDIM(0.6), lambda t, s: (oracles.ddim(t, s, 0.6),) * 2),
    ],
    ids=["DDPM(small)", "DDPM(large)", "DDIM(0.6)"],
)
def test_the_telescoped_sum_is_the_kl_of_the_whole_path(kernel, coefficients, x0):
    """prior + steps = KL(q(x_1..x_K | x0) || p(x_1..x_K)), here a KL of two Gaussians of 6 variables."""
    m, lam, schedule = 0.2, 0.3, Table()
    times = TimeGrid(6).times(schedule)
    ab = schedule(times).alpha.numpy() ** 2
    q_steps, p_steps = [], []
    for t, s in pairwise(ab[:-1]):
        (A, B, S), (mA, mB, mS) = coefficients(t, s)
        a, b = math.sqrt(t), math.sqrt(1 - t)
        q_steps.append((B / b, A * x0 - B / b * a * x0, S))
        p_steps.append(oracles.gaussian_step(m, lam, (a, b, mA, mB, mS)))
    levels = [(math.sqrt(t), math.sqrt(1 - t)) for t in ab]
    z, w = hermite(4)
    noise = z[:, None, None].expand(-1, len(times), 1)
    policy = Policy(Exact(gaussian_rule(m, lam), schedule), kernel)
    found = bound(policy, torch.full((4, 1), x0, dtype=torch.float64), None, times, noise, 17)
    assert ((found.prior + found.steps) @ w).item() == pytest.approx(joint_kl(x0, levels, q_steps, p_steps), rel=1e-9)


def test_the_posterior_of_the_ddpm_chain_is_that_of_the_forward_chain():
    """Cov(x_s, x_t | x0) = (alpha_t / alpha_s) sigma_s^2: the q of the test above is the noising process."""
    ab = np.array([0.05, 0.3, 0.7])
    slope = oracles.ddpm(ab[0], ab[1])[1] / math.sqrt(1 - ab[0])
    assert slope * (1 - ab[0]) == pytest.approx(math.sqrt(ab[0] / ab[1]) * (1 - ab[1]))


GREY = torch.linspace(-1, 1, 17, dtype=torch.float64)
MASS = torch.softmax(torch.sin(3 * GREY) * 1.5, 0)


def grey_rule(x, a, b):
    """E[x0 | x] of a grey level drawn by MASS."""
    p = (MASS.log() - (x - a * GREY) ** 2 / (2 * b**2)).softmax(-1)
    return (p * GREY).sum(-1, keepdim=True)


def mean_bound(schedule, kernel, steps, kind, rule=grey_rule) -> tuple[float, torch.Tensor]:
    """E L over the 17 grey levels and quadrature over the noise, nats; and L of each level."""
    times = TimeGrid(steps).times(schedule)
    z, w = hermite(40)
    x0, noise = GREY.repeat_interleave(40)[:, None], z.repeat(17)[:, None, None].expand(-1, len(times), 1)
    found = bound(Policy(Exact(rule, schedule, kind), kernel), x0, None, times, noise, 17).total
    each = found.reshape(17, 40) @ w
    return (each @ MASS).item(), each


@pytest.mark.parametrize(
    ("schedule", "kernel", "kind"),
    [
        (Cosine(), DDPM(), "v"),
        (VP(), DDIM(1.0), "eps"),
        (Rectified(), DDPM(), "flow"),
        (Karras(0.02, 40.0), DDPM(), "EDM()"),
        (Geometric(0.02, 40.0), DDPM(), "score"),
    ],
    ids=repr,
)
def test_the_bound_of_the_exact_denoiser_falls_to_the_entropy_and_never_below(schedule, kernel, kind):
    """(With few steps a coarse last one can be better: the chains do not nest. Then the gap falls as 1 / K.)"""
    entropy = -(MASS * MASS.log()).sum().item()
    gaps = [mean_bound(schedule, kernel, steps, kind)[0] - entropy for steps in (10, 40, 160, 640, 2560)]
    assert all(gap > -1e-9 for gap in gaps)
    assert gaps[4] < 0.4 * gaps[3] < 0.16 * gaps[2]
    assert gaps[4] < 0.07


def test_the_bound_falls_to_minus_log_p_of_each_value():
    errors = [(mean_bound(Cosine(), DDPM(), n, "v")[1] + MASS.log()).abs().max().item() for n in (100, 400, 1600)]
    assert errors[2] < 0.08
    assert errors[2] < 0.4 * errors[1] < 0.16 * errors[0]


def test_a_wrong_denoiser_has_a_higher_bound():
    right, _ = mean_bound(Cosine(), DDPM(), 40, "v")
    worse, _ = mean_bound(Cosine(), DDPM(), 40, "v", lambda x, a, b: grey_rule(x, a, b) + 0.02)
    assert worse > right + 0.005


def test_the_decoder_is_the_mass_of_bins_and_keeps_its_tails():
    mean = torch.tensor([0.3, -1.4, 0.99, 0.0], dtype=torch.float64)[:, None].expand(-1, 17)
    for std in (0.02, 0.2, 3.0):
        x0 = GREY.expand(4, 17).reshape(-1, 1)
        got = -_decoder(mean.reshape(-1, 1), x0, torch.tensor(std).double(), 17).reshape(4, 17)
        torch.testing.assert_close(got.exp().sum(1), torch.ones(4).double())
        edges = np.concatenate([[-np.inf], (GREY[1:] + GREY[:-1]).numpy() / 2, [np.inf]])
        expected = np.diff(norm.cdf((edges - mean.numpy()[:, :1]) / std), axis=1)
        seen = expected > 1e-12
        np.testing.assert_allclose(got.exp().numpy()[seen], expected[seen], rtol=1e-4)
    far = -_decoder(torch.zeros(2, 1).double(), torch.tensor([[0.5], [-0.5]]).double(), torch.tensor(0.01).double(), 17)
    tail = norm.logsf(43.75) + np.log1p(-np.exp(norm.logsf(56.25) - norm.logsf(43.75)))
    np.testing.assert_allclose(far.numpy(), [tail, tail], rtol=1e-6)


def test_the_decoder_of_a_coarse_chain_has_the_std_of_its_last_level():
    """One step from t = 0.4, where alpha is far from 1: N(x0_hat, (sigma / alpha)^2)."""
    times = torch.tensor([0.4, 0.0], dtype=torch.float64)
    l = VP()(times[0])
    rule = gaussian_rule(0.2, 0.3)
    x0, noise = GREY[5:6, None], torch.full((1, 1, 1), 0.7, dtype=torch.float64)
    found = bound(Policy(Exact(rule, VP()), DDPM()), x0, None, times, noise, 17)
    mean, std = rule(l.alpha * x0 + l.sigma * 0.7, l.alpha, l.sigma).item(), (l.sigma / l.alpha).item()
    mass = np.diff(norm.cdf((x0.item() + np.array([-1, 1]) / 16 - mean) / std)).item()
    assert l.alpha < 0.8
    assert found.decoder.item() == pytest.approx(-math.log(mass), rel=1e-9)
    assert found.steps.item() == 0


def grey_data(levels=17) -> Dataset:
    x = GREY[torch.multinomial(MASS, 900, replacement=True, generator=torch.Generator().manual_seed(0))]
    return Dataset(x.reshape(-1, 1, 1, 1), torch.zeros(900, dtype=torch.int64), ("all",), levels)


def test_bits_per_dimension_of_data():
    """The mean of the bound in bits, its parts adding up to it, within sampling error of the entropy."""
    policy, times = Policy(Exact(grey_rule, Cosine(), "v"), DDPM()), TimeGrid(200).times(Cosine())
    found = bits_per_dim(policy, times, grey_data(), 0)
    parts = sum(found[f"bits_per_dim_{name}"] for name in ("prior", "steps", "decoder"))
    assert found["bits_per_dim"] == pytest.approx(parts, rel=1e-9)
    expected, _ = mean_bound(Cosine(), DDPM(), 200, "v")
    assert abs(found["bits_per_dim"] - expected / math.log(2)) < 4 * found["bits_per_dim_error"]
    assert found["bits_per_dim_error"] < 0.15
    assert found == bits_per_dim(policy, times, grey_data(), 0) != bits_per_dim(policy, times, grey_data(), 1)


@pytest.mark.parametrize("kernel", [DDPM(), DDPM("large"), DDIM(0.3), DDIM(1.0), CPS(0.5), Renoise()], ids=repr)
def test_kernels_that_keep_the_marginals_have_a_bound(kernel):
    policy = Policy(Exact(grey_rule, Table()), kernel)
    assert require_bound(policy, TimeGrid(20).times(Table()), grey_data()) == 17


@pytest.mark.parametrize(
    ("kernel", "schedule"),
    [
        *((k, Rectified()) for k in (DDIM(0.0), CPS(0.0), FlowSDE())),
        *((k, Geometric()) for k in (ReverseSDE(), Langevin())),
    ],
    ids=repr,
)
def test_other_kernels_are_refused(kernel, schedule):
    policy = Policy(Exact(grey_rule, schedule, "x0"), kernel)
    with pytest.raises(ConfigError, match="the bound is not defined"):
        require_bound(policy, TimeGrid(20).times(schedule), grey_data())


def test_repeated_times_and_continuous_data_are_refused():
    policy = Policy(Exact(grey_rule, Geometric()), DDPM())
    with pytest.raises(ConfigError, match="falling times"):
        require_bound(policy, TimeGrid(5, repeats=2).times(Geometric()), grey_data())
    with pytest.raises(ConfigError, match="continuous"):
        require_bound(policy, TimeGrid(5).times(Geometric()), grey_data(None))


def test_captions_that_come_once_leave_nothing_to_bound():
    """No sample of such data is held out: said before any training."""
    x = torch.zeros(6, 1, 8, 8)
    once = data.captioned(x, [f"a picture {i}" for i in range(6)], levels=256)
    assert len(once.split(0.25)[1]) == 0
    policy = Policy(Denoiser(torch.nn.Identity(), VP(), "v"), DDPM())
    for held_out in (once.split(0.25)[1], once._take(np.array([0]))):
        with pytest.raises(ConfigError, match="expected at least 2"):
            require_bound(policy, TimeGrid(5).times(VP()), held_out)


def test_data_say_their_grey_levels(tmp_path):
    digits = data.load("digits")
    assert digits.levels == digits.split(0.25)[1].levels == 17
    steps = (digits.x + 1) / 2 * 16
    assert torch.equal(steps, steps.round())
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images)
    np.savez(tmp_path / "b.npz", images=images[:, None].astype(np.float32) / 255)
    assert (data.load(str(tmp_path / "a.npz")).levels, data.load(str(tmp_path / "b.npz")).levels) == (256, None)


def test_the_commands_report_and_refuse_it(tiny_root, tmp_path):
    common = ("evaluate", "--checkpoint", tiny_root / "first", "--root", tiny_root, "--evaluation.samples", 50)
    asked = (*common, "--evaluation.bits_per_dim", "true")
    result = rlfusion(tmp_path, *asked, "--chain.steps", 4, "--out", "x.json")
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "x.json").read_text())
    assert 0 < found["bits_per_dim_steps"] < found["bits_per_dim"]
    refused = rlfusion(tmp_path, *asked, "--chain.kernel", "DDIM(eta=0.0)")
    assert refused.code == 2
    assert "bits_per_dim" in refused.err
    early = rlfusion(
        tmp_path, "pretrain", "--chain.kernel", "FlowSDE()", "--evaluation.bits_per_dim", "true", "--root", "none"
    )
    assert early.code == 2
    assert not (tmp_path / "none").exists()


def test_images_of_one_class_have_a_bound_without_a_judge(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "noise.npz", images=images)
    small = ("--train.steps", 3, "--train.batch", 8, "--model.net", "ResidualMLP(width=8, depth=1)", "--chain.steps", 5)
    asked = ("--evaluation.bits_per_dim", "true", "--name", "it")
    result = rlfusion(tmp_path, "pretrain", "--data", "noise.npz", *small, *asked)
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "runs" / "it" / "evaluation.json").read_text())
    assert found["bits_per_dim"] > 8  # uniform noise has 8 bits
