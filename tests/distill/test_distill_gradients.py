"""The gradient of every distillation method against finite differences of what it descends, in float64.

(1)  g . v = (L(theta + h v) - L(theta - h v)) / 2h + O(h^2)   in random directions v of all weights that are trained,
     with the networks, kinds and learners of a run. What a method holds constant (the answer of its target, a
     direction, a tangent) is constant in L too: that is what its gradient is said to be of. Whether that is the right
     direction is asked of closed forms (``test_distill_methods``, ``test_matching``).
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from math import pi

import pytest
import torch
from distilled import CARD, SHAPE, settings_of, teaching
from torch import Tensor, nn

from rlfusion.common.tensors import mean_features
from rlfusion.distill import METHODS, Student, Teaching
from rlfusion.distill.matching import Learner
from rlfusion.distill.stages import Staged
from rlfusion.jobs import distill
from rlfusion.pretrain import Draw, LossLearner
from rlfusion.pretrain.continuous import normalised, tangent

DOUBLE, H = torch.float64, 1e-5


class Exactly(Draw):
    """A draw of float64, its further noise too."""

    def normal(self, purpose: str, *shape: int, of: int = 0) -> Tensor:
        return super().normal(purpose, *shape, of=of).double()


def draw_of(n: int = 12) -> Draw:
    g = torch.Generator().manual_seed(4)
    x0, eps = (torch.randn(n, *SHAPE, dtype=DOUBLE, generator=g) for _ in range(2))
    u, label = (torch.arange(n, dtype=DOUBLE) + 0.5) / n, torch.arange(n) % 3
    return Exactly(x0, label, eps, u, 3, 6, (0, "test", 3), x0, label, 3, torch.arange(n))


def disturb(module: nn.Module, seed: int) -> nn.Module:
    """Every weight matters, and is another than any it began as."""
    g = torch.Generator().manual_seed(seed)
    for p in module.double().parameters():
        p.data += 0.1 * torch.randn(p.shape, dtype=DOUBLE, generator=g)
    return module


def made(name: str, init: Student | None = None, **settings) -> tuple[LossLearner | Staged | Learner, Teaching]:
    """The learner of a small run of float64, its student somewhere in the midst of training."""
    config = settings_of(name, init, **settings)
    given = teaching(config, CARD)
    for module in (given.teacher, given.unguided, given.student):
        module.double()
    learner = distill.make_learner(config, given)
    disturb(given.student, 5)
    return learner, given


def agree(module: nn.Module, gradient: Callable[[], object], value: Callable[[], Tensor]) -> None:
    """Eq. (1): ``gradient`` leaves it in ``module``, ``value`` is L at the module's weights as they are."""
    module.zero_grad()
    gradient()
    weights = [p for p in module.parameters() if p.grad is not None]
    held = [p.grad.clone() for p in weights]
    assert sum(float(h.square().sum()) for h in held) > 1e-12
    g = torch.Generator().manual_seed(6)
    for _ in range(3):
        way = [torch.randn(p.shape, dtype=DOUBLE, generator=g) for p in weights]
        slope = sum(float((a * b).sum()) for a, b in zip(held, way))
        found = []
        for h in (H, -H):
            for p, v in zip(weights, way):
                p.data += h * v
            found.append(value().item())
            for p, v in zip(weights, way):
                p.data -= h * v
        assert slope == pytest.approx((found[0] - found[1]) / (2 * H), rel=2e-5, abs=1e-8)


FITS = {
    "cd": ("cd", {}, 0),
    "cd, Heun and pseudo-Huber": ("cd", {"span": 2, "solver": "heun", "metric": "PseudoHuber(c=0.1)"}, 0),
    "ct": ("ct", {}, 0),
    "lcm": ("lcm", {}, 0),
    "pd": ("pd", {}, 0),
    "pd, SNR + 1": ("pd", {"weight": "SNRPlusOne()"}, 0),
    "guided_pd, the guidance": ("guided_pd", {}, 0),
    "guided_pd, the steps": ("guided_pd", {}, 1),
    "reflow": ("reflow", {"rounds": 1}, 0),
    "reflow, by the mapping": ("reflow", {"rounds": 1, "weight": "RectifiedFlow(cap=100.0)"}, 0),
    "regression": ("regression", {}, 0),
}
"""What minimises one loss: the method, its settings, the stage."""


@pytest.mark.parametrize("row", FITS)
def test_of_one_loss(row):
    name, settings, stage = FITS[row]
    learner, given = made(name, **settings)
    if isinstance(learner, Staged):
        learner._begin(stage)
        learner = learner.learner
    target = disturb(copy.deepcopy(given.student), 7).requires_grad_(False)

    def value() -> Tensor:
        return learner.loss(given.student, target, draw_of()).mean()

    agree(given.student, lambda: value().backward(), value)


def test_of_matching_the_teacher():
    learner, _ = made("cd", Student(kind="flow", schedule="Rectified()", init="match", match=2))
    fit = learner.learner

    def value() -> Tensor:
        return fit.loss(fit.denoiser, fit.denoiser, draw_of()).mean()

    agree(fit.denoiser, lambda: value().backward(), value)


def test_of_scd():
    """L is -2 / d F . g, the normalised tangent g constant."""
    learner, given = made("scd", rise=0, c=0.7)
    learner._begin(1)
    loss, student, draw = learner.learner.loss, given.student, draw_of()
    at = loss.sct.noised(student, draw)
    x0, eps = given.teacher(at.x, at.t, draw.cond)
    dx = (at.l.d_alpha * x0 + at.l.d_sigma * eps) * (2 / pi)
    g = normalised(tangent(student, at.x, dx, at.t, draw.cond), 0.7)

    def value() -> Tensor:
        return -2 * mean_features(student.answer(at.x, at.t, draw.cond) * g).mean()

    agree(student, lambda: loss(student, student, draw).mean().backward(), value)


GENERATORS = {
    "sds": {},
    "vsd": {},
    "dmd": {"weight": "Normalized()", "inputs": "data", "adversarial": 0.7, "regression": 0.5, "r1": 0.3},
    "add": {"r1": 0.3},
    "add, noised": {"r1": 0.3, "noised": True},
    "add, one for all": {"r1": 0.3, "per_step": False},
}


def generating(row: str) -> tuple[Learner, Teaching]:
    learner, given = made(row.partition(",")[0], **GENERATORS[row])
    for n, part in enumerate(learner._others().values()):
        disturb(part.optimization.module, 8 + n)
    if learner.parts.regression is not None:
        learner.parts = replace(learner.parts, regression=replace(learner.parts.regression, draw=lambda n: draw_of()))
    return learner, given


@pytest.mark.parametrize("row", GENERATORS)
def test_of_the_generator(row):
    """L: the direction's inner product with G, constant; the adversarial loss through D; the regression on pairs."""
    learner, given = generating(row)
    p, draw = learner.parts, draw_of()
    real, fake, weight = learner._predictions(draw, p.generator(draw).detach())

    def value() -> Tensor:
        x = p.generator(draw)
        loss = p.matching * mean_features(weight * (fake - real) * x)
        if p.discriminator is not None:
            loss = loss + p.adversarial * p.discriminator.losses.generator(p.discriminator._logits(p.told(draw), x))
        if p.regression is not None:
            loss = loss + p.regression(p.generator, p.regression.pairs(0, draw))
        return loss.mean()

    agree(given.student, lambda: learner._loss(draw, 0)[0].backward(), value)


@pytest.mark.parametrize("row", ["dmd", "add", "add, noised", "add, one for all"])
def test_of_the_discriminator_with_r1(row):
    learner, _ = generating(row)
    judge, draw = learner.parts.discriminator, learner.parts.told(draw_of())
    fake = learner.parts.generator(draw_of()).detach()

    def value() -> Tensor:
        return judge._loss(draw, fake)[0]

    agree(judge.critic, lambda: value().backward(), value)


@pytest.mark.parametrize("row", ["vsd", "dmd"])
def test_of_the_fake_denoiser(row):
    learner, _ = generating(row)
    follower, draw = learner.parts.fake, learner.parts.told(draw_of())  # of any samples

    def value() -> Tensor:
        return follower.loss(follower.denoiser, follower.denoiser, draw).mean()

    agree(follower.denoiser, lambda: value().backward(), value)


def test_no_method_is_left_out():
    seen = {name for name, _, _ in FITS.values()} | {"scd"} | {row.partition(",")[0] for row in GENERATORS}
    assert seen == set(METHODS)
