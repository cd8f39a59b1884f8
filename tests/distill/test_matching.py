"""SDS, VSD, DMD and ADD as one learner, on Gaussians: known equilibria and gradients, what takes part, resuming.

Teacher N(m, s^2), generator mu + tau z: VSD and DMD end at (m, s), SDS at (m, 0) (handbook notes 3.2.2-3.2.4).
"""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from rlfusion.common.tensors import cast
from rlfusion.data import Dataset
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.kernel import Renoise
from rlfusion.diffusion.policy import Policy
from rlfusion.diffusion.schedule import Cosine, Rectified, level
from rlfusion.distill.discriminator import Discriminator
from rlfusion.distill.generator import Generator
from rlfusion.distill.matching import Fake, Learner, Parts, Regression
from rlfusion.distill.per_step import PerStep
from rlfusion.nets.critic import Critic
from rlfusion.nets.mlp import ResidualMLP
from rlfusion.nets.points import Points
from rlfusion.objectives import ADVERSARIAL, MATCHING
from rlfusion.objectives.times import TIMES
from rlfusion.pretrain import LOSSES, Draws
from rlfusion.pretrain.metrics import METRICS
from rlfusion.training.learning_rate import cosine
from rlfusion.training.optimization import Optimization

M, S = (0.5, -0.3), (0.4, 0.2)
SHAPE = (2, 1, 1)


class Affine(nn.Module):
    """mu + tau x: the x0 of a one-step generator."""

    def __init__(self, mu: float = -0.5, tau: float = 0.8) -> None:
        super().__init__()
        self.mu, self.tau = (nn.Parameter(torch.full(SHAPE, v)) for v in (mu, tau))

    def forward(self, x: Tensor, t: Tensor, cond=None) -> Tensor:
        return self.mu + self.tau * x


class GaussianNet(nn.Module):
    """E[x0 | x_t] of N(mean, exp(log_std)^2): the exact denoiser, its law learned."""

    def __init__(self, schedule, mean: float = 0.0, std: float = 1.0) -> None:
        super().__init__()
        self.schedule = schedule
        self.mean = nn.Parameter(torch.full(SHAPE, mean))
        self.log_std = nn.Parameter(torch.full(SHAPE, std).log())

    def forward(self, x: Tensor, t: Tensor, cond=None) -> Tensor:
        l = level(self.schedule, t.double().cpu(), x)
        a, b, lam = cast(l.alpha, x), cast(l.sigma, x), (2 * self.log_std).exp()
        return self.mean + a * lam * (x - a * self.mean) / (a**2 * lam + b**2)


class Teacher(GaussianNet):
    def __init__(self, schedule) -> None:
        super().__init__(schedule)
        self.mean.data, self.log_std.data = (torch.tensor(v).reshape(SHAPE) for v in (M, [s for s in S]))
        self.log_std.data.log_()


def data(n: int = 4000) -> Dataset:
    draw = torch.Generator().manual_seed(3)
    x = torch.tensor(M) + torch.tensor(S) * torch.randn(n, 2, generator=draw)
    return Dataset(x.reshape(n, *SHAPE), torch.zeros(n, dtype=torch.int64), ("all",))


def setting(
    weight: str = "Eps",
    fake: bool = True,
    steps: int = 1,
    lr: float = 0.02,
    batch: int = 256,
    total: int = 4000,
    net: nn.Module | None = None,
    inputs: str = "simulated",
    per_step: bool = False,
    **more,
) -> Learner:
    """A learner with an exact teacher on ``Cosine``, and a fake denoiser of the right family."""
    schedule = Cosine()
    student = Denoiser(net or Affine(), Rectified(), "x0")
    teacher = Denoiser(Teacher(schedule), schedule, "x0").requires_grad_(False)
    law = Denoiser(GaussianNet(schedule), schedule, "x0")
    follower = Fake(PerStep(law, steps) if per_step else law, LOSSES["Denoising"](), 4 * lr) if fake else None
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    generator = Generator(Policy(student, Renoise()), times, inputs)
    parts = Parts(
        generator,
        teacher,
        MATCHING[weight](),
        TIMES["Uniform"](margin=0.02),
        fake=follower,
        fake_updates=2,
        per_step=per_step,
        **more,
    )
    draws = Draws(data(), batch, 0.0, total, torch.device("cpu"), 5, "matching")
    return Learner(parts, draws, Optimization(student, lr), 0, total)


def run(learner: Learner, steps: int) -> Learner:
    learner.optimization.follow(cosine(steps))
    for step in range(steps):
        learner.update(step)
    return learner


def reached(learner: Learner) -> tuple[list[float], list[float]]:
    net = learner.parts.generator.policy.denoiser.net
    return net.mu.flatten().tolist(), net.tau.abs().flatten().tolist()


@pytest.mark.parametrize("weight", ["Eps", "Alpha", "Normalized"])
def test_with_a_fake_score_the_generator_ends_at_the_teachers_law(weight):
    mu, tau = reached(run(setting(weight, lr=0.04), 220))
    assert mu == pytest.approx(M, abs=0.03)
    assert tau == pytest.approx(S, abs=0.03)


def test_without_it_the_generator_ends_at_the_mode():
    mu, tau = reached(run(setting(fake=False), 500))
    assert mu == pytest.approx(M, abs=0.03)
    assert max(tau) < 0.03


def test_points_go_to_the_mode_and_are_drawn_evenly():
    """For points SDS is the gradient of a KL: each goes to a mode of the teacher's noised law, here the only one."""
    torch.manual_seed(0)
    net = Points(SHAPE, 1, count=8)
    run(setting(fake=False, net=net), 400)
    points = net.label.weight[0].unflatten(0, (8, 2))
    assert torch.allclose(points, torch.tensor(M).expand(8, 2), atol=0.03)
    noise = torch.randn(8000, *SHAPE)
    net.label.weight.data[0] = torch.arange(16.0)
    drawn = net(80 * noise, torch.ones(8000), torch.zeros(8000, dtype=torch.int64))[:, 0, 0, 0]
    share = drawn.unique(return_counts=True)[1] / 8000
    assert share.tolist() == pytest.approx([1 / 8] * 8, abs=0.02)
    assert torch.equal(drawn, net(noise, torch.ones(8000), torch.zeros(8000, dtype=torch.int64))[:, 0, 0, 0])


def test_the_expected_gradient_is_the_kls():
    """At one level, by a large sample: a^2 (mu - m) / V2 and a^2 tau (1 / V2 - 1 / V1), each over d = 2 features."""
    schedule = Cosine()
    learner = setting("KL", batch=200_000)
    learner.parts.fake.denoiser = Denoiser(GaussianNet(schedule, -0.5, 0.8), schedule, "x0")
    learner.parts = replace(learner.parts, times=lambda u, s: torch.full_like(u, 0.5))
    loss, _ = learner._loss(learner.draw(0), 0)
    loss.backward()
    l = schedule(torch.tensor(0.5, dtype=torch.float64))
    a, b = l.alpha.item(), l.sigma.item()
    net = learner.parts.generator.policy.denoiser.net
    for i, (m, s) in enumerate(zip(M, S)):
        v1, v2 = a**2 * 0.8**2 + b**2, a**2 * s**2 + b**2
        assert net.mu.grad.flatten()[i].item() == pytest.approx(a**2 * (-0.5 - m) / v2 / 2, abs=0.004)
        assert net.tau.grad.flatten()[i].item() == pytest.approx(a**2 * 0.8 * (1 / v2 - 1 / v1) / 2, abs=0.004)


def test_a_discriminator_alone_moves_the_generator_to_the_data():
    torch.manual_seed(0)
    schedule = Cosine()
    judge = Critic(Denoiser(ResidualMLP(SHAPE, 1, width=32, depth=1), schedule, "x0"), SHAPE)
    other = Discriminator(judge, ADVERSARIAL["nonsaturating"], TIMES["Uniform"](margin=0.02), 0.1, 0.01)
    learner = setting(fake=False, matching=0.0, discriminator=other, adversarial=1.0, lr=0.04)
    mu, tau = reached(run(learner, 150))
    assert mu == pytest.approx(M, abs=0.1)
    assert tau == pytest.approx(S, abs=0.1)


def regression() -> Regression:
    """Pairs of the exact map: x0 = m + s z."""
    draws = Draws(data(), 256, 0.0, 4000, torch.device("cpu"), 6, "pairs")

    def draw(step: int):
        found = draws(step)
        x0 = torch.tensor(M).reshape(SHAPE) + torch.tensor(S).reshape(SHAPE) * found.eps
        return replace(found, x0=x0)

    return Regression(draw, METRICS["L2"](), 1.0)


def test_regression_alone_learns_the_map_of_the_pairs():
    mu, tau = reached(run(setting(fake=False, matching=0.0, regression=regression()), 300))
    assert mu == pytest.approx(M, abs=0.01)
    assert tau == pytest.approx(S, abs=0.01)


class ByStep(nn.Module):
    """A generator of two steps that knows which it is in, and remembers the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.seen = Affine(0.1, 0.5), Affine(0.2, 0.25), []

    def forward(self, x: Tensor, t: Tensor, cond=None) -> Tensor:
        self.seen.append((x.detach().clone(), t.clone(), torch.is_grad_enabled()))
        return torch.where((t > 0.75).reshape(-1, 1, 1, 1), self.first(x, t), self.second(x, t))


def test_inputs_are_simulated_by_the_students_own_chain_and_only_the_last_call_has_gradients():
    net = ByStep()
    learner = setting(net=net, steps=2, batch=6)
    draw = learner.draw(0)
    k = torch.tensor([0, 1, 1, 0, 1, 0])
    samples = learner.parts.generator.at(draw, k)
    (x1, t1, grad1), (x2, t2, grad2) = net.seen
    assert (grad1, grad2) == (False, True)
    assert (t1 == 1).all()
    noise = draw.normal("generator noise", 6, 2, *SHAPE)
    assert torch.equal(x1, noise[:, 0])
    expected = torch.where((k == 0).reshape(-1, 1, 1, 1), noise[:, 0], 0.5 * net.first(x1, t1) + 0.5 * noise[:, 1])
    assert torch.allclose(x2, expected, atol=1e-6)
    assert torch.equal(t2, torch.where(k == 0, 1.0, 0.5).to(t2))
    samples.sum().backward()
    assert net.first.mu.grad.flatten()[0].item() == 3
    assert net.second.tau.grad.flatten()[0].item() == pytest.approx(x2[k == 1][:, 0].sum().item(), rel=1e-5)


def test_inputs_of_data_are_real_samples_noised():
    net = ByStep()
    learner = setting(net=net, steps=2, batch=6, inputs="data")
    draw = learner.draw(0)
    learner.parts.generator.at(draw, torch.tensor([0, 1, 1, 0, 1, 0]))
    x, t, _ = net.seen[0]
    a = (1 - t).reshape(-1, 1, 1, 1)
    assert torch.allclose(x, a * draw.x0 + (1 - a) * draw.normal("generator noise", 6, *SHAPE), atol=1e-6)


def laws(learner: Learner, n: int = 4000) -> list[tuple[Tensor, Tensor]]:
    """Mean and standard deviation (2,) of the samples of each step of two."""
    draw = replace(learner.draw(0), cond=torch.zeros(n, dtype=torch.int64), x0=torch.zeros(n, *SHAPE))
    ends = [learner.parts.generator.at(draw, torch.full((n,), k)).detach().flatten(1) for k in (0, 1)]
    return [(x.mean(0), x.std(0)) for x in ends]


def test_followed_each_by_its_own_network_the_steps_end_at_the_teachers_law_and_by_one_only_their_mean_does():
    goal = torch.tensor(M), torch.tensor(S)
    each = laws(run(setting(net=ByStep(), steps=2, per_step=True, lr=0.04), 200))
    for mean, std in each:
        torch.testing.assert_close(mean, goal[0], rtol=0, atol=0.05)
        torch.testing.assert_close(std, goal[1], rtol=0, atol=0.05)
    first, second = laws(run(setting(net=ByStep(), steps=2), 400))
    torch.testing.assert_close((first[0] + second[0]) / 2, goal[0], rtol=0, atol=0.05)
    assert (first[1] > goal[1] + 0.03).all()
    assert (second[1] < goal[1] - 0.03).all()


def test_each_sample_asks_the_network_of_its_step():
    torch.manual_seed(0)
    one = Denoiser(ResidualMLP(SHAPE, 3, width=8, depth=1), Cosine(), "v")
    each = PerStep(one, 3).double()  # a batch of one and of five take other kernels: in float32 they agree to 1e-4
    for p in each.parameters():
        nn.init.normal_(p)
    x, t, label = (
        torch.randn(5, *SHAPE, dtype=torch.float64),
        torch.linspace(0.1, 0.9, 5, dtype=torch.float64),
        torch.arange(5) % 3,
    )
    step = torch.tensor([2, 0, 2, 0, 2])
    cond = {"given": label, "step": step}
    for n, k in enumerate(step):
        own, at = each.denoisers[k], slice(n, n + 1)
        torch.testing.assert_close(each.answer(x, t, cond)[at], own.answer(x[at], t[at], label[at]))
        torch.testing.assert_close(each(x, t, cond).x0[at], own(x[at], t[at], label[at]).x0)
        torch.testing.assert_close(each(x, t, cond).eps[at], own(x[at], t[at], label[at]).eps)


def test_steps_are_drawn_evenly():
    net = ByStep()
    learner = setting(net=net, steps=2, batch=4000)
    learner.parts.generator(learner.draw(0))
    assert (net.seen[1][1] == 1).double().mean().item() == pytest.approx(0.5, abs=0.04)


def full() -> Learner:
    torch.manual_seed(0)
    judge = Critic(Denoiser(ResidualMLP(SHAPE, 1, width=8, depth=1), Cosine(), "x0"), SHAPE)
    other = Discriminator(judge, ADVERSARIAL["hinge"], None, 0.1, 0.01)
    return setting(steps=2, batch=16, discriminator=other, adversarial=0.1, regression=regression())


def test_it_resumes_bit_for_bit():
    whole = full()
    for step in range(6):
        whole.update(step)
    cut = full()
    for step in range(3):
        cut.update(step)
    state, again = copy.deepcopy(cut.state_dict()), full()
    again.load_state_dict(state)
    for step in range(3, 6):
        again.update(step)
    for name in ("optimization", "fake", "discriminator"):
        one, other = (learner.state_dict()[name]["module"] for learner in (whole, again))
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_others_get_no_gradient_of_the_generators_loss():
    learner = full()
    learner.update(0)
    for part in (learner.parts.fake.denoiser, learner.parts.discriminator.critic, learner.parts.teacher):
        assert all(p.grad is None for p in part.parameters())
    loss, _ = learner._loss(learner.draw(9), 1)
    loss.backward()
    for part in (learner.parts.fake.denoiser, learner.parts.discriminator.critic, learner.parts.teacher):
        assert all(p.grad is None for p in part.parameters())
    assert all(p.requires_grad for p in learner.parts.discriminator.critic.parameters())


def test_metrics_say_what_takes_part():
    assert set(setting(fake=False).update(0)) == {"loss", "grad_norm", "lr", "direction"}
    names = {"fake_loss", "discriminator_loss", "discriminator_accuracy", "adversarial", "regression"}
    assert set(full().update(0)) == {"loss", "grad_norm", "lr", "direction"} | names
