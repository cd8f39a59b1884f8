"""Explicit, implicit, sliced and denoising score matching: one gradient, by quadrature, in float64."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rlfusion import models
from rlfusion.common.errors import ConfigError
from rlfusion.data import Dataset
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.parameterization import named
from rlfusion.diffusion.schedule import VP, Cosine, Geometric, Rectified
from rlfusion.pretrain import Draw, Draws, losses
from rlfusion.pretrain.denoising import Denoising
from rlfusion.pretrain.score_matching import ESM, ISM, SSM, _slices, of_condition, posterior_mean

POINTS = torch.tensor([[-0.8, 0.3], [0.5, 0.6], [0.9, -0.7]], dtype=torch.float64)
LABELS = torch.tensor([0, 1, 1])
NO_CLASS = 2
NODES = 32


class Net(nn.Module):
    """A smooth network of 2 features, a time and a label."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.enter, self.leave = nn.Linear(3, 6, dtype=torch.float64), nn.Linear(6, 2, dtype=torch.float64)
        self.label = nn.Embedding(NO_CLASS + 1, 6, dtype=torch.float64)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        h = self.enter(torch.cat([x.flatten(1), t[:, None]], 1)) + self.label(cond)
        return self.leave(torch.tanh(h / 2)).reshape(x.shape)


@dataclass(frozen=True)
class Signs(Draw):
    """All four sign vectors of the plane as slices: then Eq. (4) is exact."""

    def normal(self, purpose: str, *shape: int, of: int = 0) -> Tensor:
        assert shape[0] == 4
        signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        return signs[:, None].expand(4, shape[1], 2).reshape(shape)


def quadrature(cond: int, t: float, points: Tensor = POINTS, labels: Tensor = LABELS) -> tuple[Draw, Tensor]:
    """The points of one condition, each with all noise by Gauss-Hermite, and the weight of every row."""
    z, w = np.polynomial.hermite_e.hermegauss(NODES)
    z, w = torch.from_numpy(z), torch.from_numpy(w / w.sum())
    eps, weight = torch.cartesian_prod(z, z), (w[:, None] * w).flatten()
    chosen = torch.arange(len(points)) if cond == NO_CLASS else (labels == cond).nonzero().flatten()
    index = chosen.repeat_interleave(len(eps))
    shape = (len(index), 2, 1, 1)
    draw = Signs(
        x0=points[index].reshape(shape),
        cond=torch.full((len(index),), cond),
        eps=eps.repeat(len(chosen), 1).reshape(shape),
        u=torch.full((len(index),), t, dtype=torch.float64),
        step=0,
        total=1,
        key=(0,),
        data=points.reshape(-1, 2, 1, 1),
        label=labels,
        no_class=NO_CLASS,
        index=index,
    )
    return draw, weight.repeat(len(chosen)) / len(chosen)


def value_and_gradient(loss, draw, weight, schedule, kind) -> tuple[float, Tensor]:
    denoiser = Denoiser(Net(), schedule, kind)
    value = loss(denoiser, denoiser, draw) @ weight
    parts = torch.autograd.grad(value, denoiser.parameters(), allow_unused=True)
    return value.item(), torch.cat([p.flatten() for p in parts if p is not None])


CASES = [
    ("score", VP(), "SNR()"),
    ("eps", VP(), "Own()"),
    ("x0", Cosine(), "MinSNR(gamma=0.7)"),
    ("v", Cosine(), "Own()"),
    ("flow", Rectified(), "SNRPlusOne()"),
    ("EDM()", Geometric(0.3, 3.0), "SNR()"),
]


@pytest.mark.parametrize("cond", [0, 1, NO_CLASS])
@pytest.mark.parametrize(("kind", "schedule", "weight"), CASES)
def test_all_have_one_gradient_and_differ_by_the_constants_of_the_handbook(kind, schedule, weight, cond):
    """ESM = ISM + E w |s|^2 = DSM - E w Var(eps | x) / sigma^2; condition 0 is one point (Gaussian data)."""
    draw, rows = quadrature(cond, 0.6)
    losses = {
        "esm": ESM(weight),
        "dsm": Denoising(weight),
        "ism": ISM(weight),
        "hutchinson": ISM(weight, probes=4),
        "sliced": SSM(weight, probes=4, reduced=False),
        "reduced": SSM(weight, probes=4),
    }
    found = {name: value_and_gradient(loss, draw, rows, schedule, kind) for name, loss in losses.items()}
    value, gradient = found["esm"]
    assert gradient.abs().max() > 1e-2
    for name, (_, other) in found.items():
        torch.testing.assert_close(other, gradient, rtol=0, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")
    w, eps = constants(draw, schedule, kind, weight, cond)
    assert found["ism"][0] == pytest.approx(value - ((w * eps.square().mean(1)) @ rows).item(), abs=1e-6)
    spread = (w * (draw.eps.flatten(1) - eps).square().mean(1)) @ rows
    assert found["dsm"][0] == pytest.approx(value + spread.item(), abs=1e-6)
    assert spread > 1e-3 or cond == 0
    for name in ("hutchinson", "sliced", "reduced"):
        assert found[name][0] == pytest.approx(found["ism"][0], abs=1e-9)


def constants(draw, schedule, kind, weight, cond) -> tuple[Tensor, Tensor]:
    """w of the eps error (B,) and E[eps | x] (B, 2), the score by autograd of the mixture's log-density."""
    l = schedule(draw.u[:1])
    chosen = POINTS if cond == NO_CLASS else POINTS[cond == LABELS]
    x = (l.alpha * draw.x0 + l.sigma * draw.eps).flatten(1).requires_grad_()
    log_q = torch.logsumexp(-(x[:, None] - l.alpha * chosen).square().sum(2) / (2 * l.sigma**2), 1)
    (score,) = torch.autograd.grad(log_q.sum(), x)
    snr = (l.alpha / l.sigma) ** 2
    a, b = named(kind).row(l)
    own = {"SNR()": 1 + 0 * snr, "SNRPlusOne()": 1 + 1 / snr, "MinSNR(gamma=0.7)": snr.clamp(max=0.7) / snr}
    det = l.alpha * b - l.sigma * a
    return own.get(weight, (det / l.alpha) ** 2), -l.sigma * score.detach()


def test_the_units_are_those_of_the_score_error_times_sigma_squared():
    """Of a score network under SNR(): sigma^2 |psi - s|^2, the mean over features, row by row."""
    draw, _ = quadrature(1, 0.5)
    denoiser = Denoiser(Net(), VP(), "score")
    l = VP()(draw.u[:1])
    x = l.alpha * draw.x0 + l.sigma * draw.eps
    _, eps = constants(draw, VP(), "score", "SNR()", 1)
    psi = denoiser.answer(x, draw.u, draw.cond).flatten(1)
    expected = l.sigma**2 * (psi + eps / l.sigma).square().mean(1)
    torch.testing.assert_close(ESM("SNR()")(denoiser, denoiser, draw), expected, rtol=1e-8, atol=1e-10)


def test_the_exact_trace_is_that_of_the_jacobian_and_a_slice_the_printed_one():
    draw, _ = quadrature(0, 0.4)
    denoiser = Denoiser(Net(), Cosine(), "v")
    row = Draw(**{**vars(draw), **{n: getattr(draw, n)[:1] for n in ("x0", "cond", "eps", "u", "index")}})
    l = Cosine()(row.u)
    x = l.alpha * row.x0 + l.sigma * row.eps

    def psi(x):
        return -denoiser(x.reshape(row.x0.shape), row.u, row.cond).eps.flatten() / l.sigma

    jacobian = torch.autograd.functional.jacobian(psi, x.flatten())
    expected = l.sigma**2 * (psi(x).square().sum() + 2 * jacobian.trace()) / 2
    torch.testing.assert_close(ISM("SNR()")(denoiser, denoiser, row), expected)
    v = _slices(row, 1).flatten()
    across = 2 * v @ jacobian @ v
    sliced, reduced = l.sigma**2 / 2 * ((v @ psi(x)) ** 2 + across), l.sigma**2 / 2 * (psi(x).square().sum() + across)
    torch.testing.assert_close(SSM("SNR()", reduced=False)(denoiser, denoiser, row), sliced)
    torch.testing.assert_close(SSM("SNR()")(denoiser, denoiser, row), reduced)
    assert abs(sliced - reduced) > 1e-3


def test_random_slices_have_the_mean_of_the_exact_trace():
    draw, _ = quadrature(1, 0.6)
    few = Draw(**{**vars(draw), **{n: getattr(draw, n)[::97] for n in ("x0", "cond", "eps", "u", "index")}})
    denoiser = Denoiser(Net(), VP(), "eps")
    exact = ISM()(denoiser, denoiser, few)
    assert (ISM(probes=1)(denoiser, denoiser, few) - exact).abs().max() > 1e-3
    torch.testing.assert_close(ISM(probes=2000)(denoiser, denoiser, few), exact, rtol=0, atol=0.06)
    torch.testing.assert_close(SSM(probes=2000, reduced=False)(denoiser, denoiser, few), exact, rtol=0, atol=0.25)


def test_the_posterior_mean_survives_small_noise():
    """At sigma = 1e-3 the exponents are of order 1e6: the nearest point wins, and a tie is a mean."""
    x = torch.tensor([[0.5, 0.6], [0.7, -0.05]], dtype=torch.float32)
    one, sigma = torch.ones(2, dtype=torch.float64), torch.full((2,), 1e-3, dtype=torch.float64)
    got = posterior_mean(x, POINTS.float(), one, sigma, torch.ones(2, 3, dtype=torch.bool))
    torch.testing.assert_close(got[0], POINTS[1].float().double())
    middle = posterior_mean((POINTS[1:2] + POINTS[2:]) / 2, POINTS, one[:1], sigma[:1], torch.ones(1, 3).bool())
    torch.testing.assert_close(middle[0], (POINTS[1] + POINTS[2]) / 2, rtol=0, atol=1e-6)


def test_each_condition_has_its_own_samples():
    draw, _ = quadrature(NO_CLASS, 0.5)
    mixed = Draw(**{**vars(draw), "cond": torch.tensor([0, 1, NO_CLASS])})
    assert of_condition(mixed, LABELS).tolist() == [[True, False, False], [False, True, True], [True, True, True]]


def test_a_reference_of_some_samples_holds_the_batch_and_tends_to_the_exact_score():
    g = torch.Generator().manual_seed(0)
    data = torch.randn(2000, 2, 1, 1, generator=g, dtype=torch.float64)
    draw, _ = quadrature(NO_CLASS, 0.8)
    n, label = 64, torch.zeros(2000, dtype=torch.int64)
    index = torch.arange(n)
    rows = {"x0": data[:n], "cond": torch.zeros(n).long(), "eps": draw.eps[:n], "u": draw.u[:n], "index": index}
    draw = Draw(**{**vars(draw), **rows, "data": data, "label": label})
    denoiser = Denoiser(Net(), VP(), "eps")
    held, _ = ESM(reference=100)._among(draw)
    assert 100 <= len(held) <= 164
    assert (held[:, None] == draw.x0).flatten(2).all(2).any(0).all()
    exact = ESM()(denoiser, denoiser, draw).detach()
    gaps = [(ESM(reference=n)(denoiser, denoiser, draw) - exact).abs().mean().item() for n in (50, 1000, 2000)]
    assert gaps[0] > gaps[1] > gaps[2] == 0


def test_what_cannot_work_is_refused():
    for make in (lambda: ISM(probes=-1), lambda: SSM(probes=0), lambda: ESM(reference=-1)):
        with pytest.raises(ConfigError, match="expected"):
            make()
    with pytest.raises(ConfigError, match="loss weight 'SNRR'"):
        ESM(weight="SNRR()")
    assert math.isfinite(value_and_gradient(ISM(), *quadrature(0, 0.5), VP(), "eps")[0])


@pytest.mark.parametrize("loss", ["ISM(probes=2)", "ISM()", "SSM()"])
@pytest.mark.parametrize(
    "net",
    ["DiT(patch=2, width=16, depth=1, heads=2%s)", "UNet(width=8, multipliers=(1, 2), depth=1, attention=(1,)%s)"],
)
def test_the_second_derivative_passes_through_attention(loss, net):
    """And through what is recomputed in the backward pass, to the same bits."""
    kept, recomputed = (second_derivative(loss, net % more) for more in ("", ", recompute=True"))
    assert kept.isfinite().all()
    assert kept.any()
    assert torch.equal(kept, recomputed)


def second_derivative(loss, net):
    """The gradient of the loss, flat."""
    card = models.Card(models.Config(net, "VP()", "eps"), (1, 4, 4), ("a", "b"))
    denoiser, draw = models.build(card), torch.Generator().manual_seed(1)
    for p in denoiser.parameters():
        p.data.normal_(std=0.2, generator=draw)
    data = Dataset(torch.rand(16, 1, 4, 4, generator=draw) * 2 - 1, torch.arange(16) % 2, card.names)
    losses.make(loss)(denoiser, denoiser, Draws(data, 4, 0.1, 1, torch.device("cpu"), 0, "test")(0)).sum().backward()
    return torch.cat([p.grad.flatten() for p in denoiser.parameters() if p.grad is not None])
