"""What is made of the times of rows: gathered where they are a chain's, else made once for each tensor of times."""

import gc
from dataclasses import dataclass

import pytest
import torch
from counted import counting

from rlfusion.diffusion import rows
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.kernel import DDIM
from rlfusion.diffusion.policy import Observation, Policy
from rlfusion.diffusion.schedule import Cosine, Rectified, level
from rlfusion.nets.mlp import ResidualMLP

TIMES = torch.linspace(1, 0, 6, dtype=torch.float64)
STEP = torch.tensor([0, 3, 3, 1, 2, 4, 0])
SHAPE = (1, 4, 4)


def policy(kind: str = "v", offset: float = 0.0091) -> Policy:
    torch.manual_seed(0)
    net = ResidualMLP(SHAPE, 2, width=8, depth=1)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return Policy(Denoiser(net.double(), Cosine(offset), kind), DDIM(1.0))


def observed(t: torch.Tensor, s: torch.Tensor) -> Observation:
    x = torch.randn(len(t), *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Observation(x, t, s, torch.zeros(len(t), dtype=torch.int64))


@pytest.mark.parametrize("kind", ["v", "x0", "EDM(sigma_data=0.5)"])
def test_rows_of_a_chain_are_those_of_their_own_times(kind):
    step = STEP if kind != "EDM(sigma_data=0.5)" else STEP.clamp(min=1)  # alpha(1) = 0
    times = TIMES if kind != "EDM(sigma_data=0.5)" else TIMES * 0.9
    acting = policy(kind)
    t, s = rows.of_chain(times, step)
    assert torch.equal(t, times[step])
    assert torch.equal(s, times[step + 1])
    found, plain = acting(observed(t, s)), acting(observed(t.clone(), s.clone()))
    torch.testing.assert_close(found.mean, plain.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.std, plain.std, rtol=1e-12, atol=1e-12)
    for i, k in enumerate(step.tolist()):
        shared = acting(Observation(*observed(t, s)[:1], times[k], times[k + 1], observed(t, s).cond))
        assert torch.equal(found.std[i].squeeze(), shared.std)
        torch.testing.assert_close(found.mean[i], shared.mean[i], rtol=1e-12, atol=1e-12)


def test_the_coefficients_of_a_chain_are_made_once():
    acting, counts = policy(offset=0.0092).float(), []
    for _ in range(2):
        obs = observed(*rows.of_chain(TIMES, STEP))
        obs = obs._replace(x=obs.x.float())
        with counting(torch.float64) as ops:
            acting(obs)
        counts.append(sum(ops.values()) - ops["aten._local_scalar_dense"])
    assert counts[0] > 100
    assert counts[1] == 0


def test_times_of_other_steps_are_no_chain():
    t, s = rows.of_chain(TIMES, STEP)
    other = rows.of_chain(TIMES, STEP.clone())
    assert rows.steps(t, s) is not None
    assert rows.steps(t, t) is rows.steps(s, t) is rows.steps(t, other[1]) is rows.steps(t, s.clone()) is None
    assert rows.chain(s) is rows.chain(t.clone()) is None


CALLS: list[int] = []


@dataclass(frozen=True)
class Counted(Cosine):
    """A schedule that says how often it is asked for rows."""

    def __call__(self, t):
        if t.ndim:
            CALLS.append(len(t))
        return super().__call__(t)


def test_several_networks_at_one_tensor_of_times_ask_for_its_levels_once():
    CALLS.clear()
    acting = policy()
    acting.denoiser.schedule = Counted()
    t = torch.rand(3, dtype=torch.float64)
    x, cond = torch.randn(3, *SHAPE, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
    first = acting.denoiser(x, t, cond)
    assert all(map(torch.equal, first, acting.denoiser(x, t, cond)))
    l = level(Counted(), t, x)
    assert l.alpha.shape == (3, 1, 1, 1)
    assert CALLS == [3]
    assert level(Counted(), t, x[:, 0]).alpha.shape == (3, 1, 1)
    acting.denoiser(x, t.clone(), cond)
    assert CALLS == [3, 3, 3]


def test_times_that_gradients_flow_through_are_asked_each_time():
    for _ in range(2):
        t = torch.rand(3, dtype=torch.float64).requires_grad_()
        for _ in range(2):
            (slope,) = torch.autograd.grad(level(Cosine(), t, torch.zeros(3, 1)).alpha.sum(), t)
            torch.testing.assert_close(slope[:, None], level(Cosine(), t.detach(), torch.zeros(3, 1)).d_alpha)


def test_nothing_is_kept_longer_than_the_times():
    gc.collect()
    before = len(rows._kept)
    policy()(observed(*rows.of_chain(TIMES, STEP)))
    for schedule in (Cosine(), Rectified()):  # whose sigma is t itself
        level(schedule, torch.rand(3, dtype=torch.float64), torch.zeros(3, 1))
    plain = observed(torch.rand(3, dtype=torch.float64) / 2 + 0.5, torch.rand(3, dtype=torch.float64) / 2)
    policy()(plain)
    del plain
    gc.collect()
    assert len(rows._kept) == before


def test_what_inference_made_first_serves_training():
    acting = policy()
    obs = observed(*rows.of_chain(TIMES, STEP))
    plain = obs._replace(t=obs.t.clone(), s=obs.s.clone())
    for one in (obs, plain):
        with torch.inference_mode():
            acting(one)
        acting(one).mean.square().sum().backward()


def test_times_that_are_written_to_are_others():
    """A sampler of one's own may hold one tensor of times and write the next into it."""
    acting, t, s = policy(), torch.empty(3, dtype=torch.float64), torch.empty(3, dtype=torch.float64)
    for before, after in ((0.9, 0.6), (0.6, 0.3), (0.3, 0.1)):
        t.fill_(before), s.fill_(after)
        found, fresh = acting(observed(t, s)), acting(observed(t.clone(), s.clone()))
        assert torch.equal(found.mean, fresh.mean)
        assert torch.equal(found.std, fresh.std)


def test_a_chain_that_is_written_to_is_none():
    t, s = rows.of_chain(TIMES, STEP)
    t.mul_(0.9)
    assert rows.chain(t) is rows.steps(t, s) is None


def test_times_of_inference_mode_are_asked_each_time():
    """Nothing says when they are written to."""
    with torch.inference_mode():
        t = torch.full((3,), 0.9, dtype=torch.float64)
        first = level(Cosine(), t, torch.zeros(3, 1)).alpha
        t.fill_(0.2)
        assert not torch.equal(level(Cosine(), t, torch.zeros(3, 1)).alpha, first)
        assert rows.chain(rows.of_chain(TIMES, STEP)[0]) is None
