"""ODE solvers against the quantile map, their order, known rectified-flow values, and EDM's Algorithm 1."""

import numpy as np
import oracles
import pytest
import torch
from laws import Oracle

from rlfusion.common.errors import ConfigError
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.kernel import DDIM, FlowSDE
from rlfusion.diffusion.policy import Observation, Policy
from rlfusion.diffusion.schedule import VP, Cosine, Geometric, Karras, Rectified, Trig
from rlfusion.diffusion.solvers import edm_heun, end, euler, heun, solve

LAW = oracles.Mixture.scalar([0.35, 0.65], [-0.9, 0.6], [0.05, 0.1])
X = torch.linspace(-2.0, 2.0, 21, dtype=torch.float64)[:, None]


def errors(step, schedule, start: float, stop: float, counts: tuple[int, ...]) -> list[float]:
    """Largest distance from the exact flow between two times, in units of the end's level, for each number of steps."""
    ends = [schedule(torch.tensor(t, dtype=torch.float64)) for t in (start, stop)]
    (a, b), (c, d) = [(float(l.alpha), float(l.sigma)) for l in ends]
    x = X * float(np.sqrt(a**2 + b**2))
    truth = oracles.flow_map(LAW, x[:, 0].numpy(), (a, b), (c, d))
    found = []
    for n in counts:
        times = torch.linspace(start, stop, n + 1, dtype=torch.float64)
        gap = np.abs(end(step, Oracle(LAW, schedule), x, times)[:, 0].numpy() - truth).max()
        found.append(float(gap / np.hypot(c, d)))
    return found


WAYS = [(0.9, 0.1), (0.1, 0.9)]


@pytest.mark.parametrize(("start", "stop"), WAYS, ids=["sampling", "data to noise"])
@pytest.mark.parametrize("schedule", [Rectified(), Trig(0.5), VP(), Cosine(), Geometric(0.2, 2.0)], ids=repr)
@pytest.mark.parametrize(("step", "order"), [(euler, 1), (heun, 2), (edm_heun, 2)], ids=["euler", "heun", "edm_heun"])
def test_order_of_convergence_in_both_directions(step, order, schedule, start, stop):
    coarse, fine = errors(step, schedule, start, stop, (30, 60))
    assert 2**order * 0.7 < coarse / fine < 2**order * 1.4


@pytest.mark.parametrize(("start", "stop"), [(1.0, 0.0), (0.0, 1.0)])
def test_rectified_flow_goes_both_ways_between_the_very_ends(start, stop):
    assert errors(heun, Rectified(), start, stop, (100,))[0] < 3e-2
    coarse, fine = errors(euler, Rectified(), start, stop, (100, 200))
    assert fine < 0.65 * coarse < 0.1


def test_known_values_of_few_euler_steps():
    """handbook-notes 2.4: N(0.7, 0.25) from y = 1.3 in 1, 2, 4, 8, 32 steps; the exact end is 1.35."""
    law = Oracle(oracles.Mixture.scalar([1.0], [0.7], [0.25]), Rectified())
    for steps, value in ((1, 0.70), (2, 0.96), (4, 1.14), (8, 1.24), (32, 1.32)):
        got = end(euler, law, torch.full((1, 1), 1.3).double(), TimeGrid(steps).times(Rectified()))
        assert got.item() == pytest.approx(value, abs=0.0051)


def test_euler_is_the_noise_free_flow_kernel_and_for_a_flow_schedule_ddim():
    t, s = (torch.tensor(v, dtype=torch.float64) for v in (0.7, 0.5))
    for schedule in (Rectified(), VP()):
        law = Oracle(LAW, schedule)
        torch.testing.assert_close(euler(law, X, t, s), Policy(law, FlowSDE(0.0))(Observation(X, t, s)).mean)
    law = Oracle(LAW, Rectified())
    torch.testing.assert_close(euler(law, X, t, s), Policy(law, DDIM(0.0))(Observation(X, t, s)).mean)


def test_edm_heun_is_algorithm_1():
    """Karras et al. 2022, Alg. 1 with S_churn = 0, in their letters; the last step is to sigma_min here."""
    law, times = Oracle(LAW, Karras()), TimeGrid(8).times(Karras())
    x, sigma = 80 * X, Karras()(times).sigma
    for i, got in enumerate(solve(edm_heun, law, x, times)):
        t, s = float(sigma[i]), float(sigma[i + 1])
        d = (x - torch.from_numpy(LAW.x0(x.numpy(), 1.0, t))) / t
        after = x + (s - t) * d
        other = (after - torch.from_numpy(LAW.x0(after.numpy(), 1.0, s))) / s
        x = x + (s - t) * (d / 2 + other / 2)
        torch.testing.assert_close(got, x, rtol=1e-8, atol=1e-8)


class Counted(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x, t, cond):
        self.calls += 1
        return x


def test_the_last_step_needs_no_network_at_clean_data():
    """An x0 network does not determine eps at t = 0; K steps of Heun cost 2 K - 1 calls."""
    for step, schedule in ((heun, VP()), (heun, Rectified()), (edm_heun, VP())):
        net = Counted()
        end(step, Denoiser(net, schedule, "x0"), X, TimeGrid(3).times(schedule))
        assert net.calls == 5


def test_what_is_undefined_is_refused():
    law = Oracle(LAW, VP())
    zero, half = torch.tensor([0.0, 0.5], dtype=torch.float64)
    with pytest.raises(ConfigError, match="infinite at clean data"):
        euler(law, X, zero, half)
    with pytest.raises(ConfigError, match="signal at t = 1"):
        edm_heun(Oracle(LAW, Rectified()), X, torch.tensor(1.0).double(), half)
