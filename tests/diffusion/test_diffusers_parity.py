"""Step-by-step parity with diffusers' DDPM and DDIM schedulers: the same x, network output and noise, in float32.

Our time is (code time + 1) / 1000. Where diffusers differs on purpose or by rounding, the tests say so:
- it keeps alpha_bar as a float32 product, and 1 - ab_t / ab_s formed from it has lost four digits near clean data (up
  to 3e-4 in a sample). So each step is compared twice, both to 1e-5: with its table as shipped, from time 0.1
  up; and at every time with the float64 product in its place (its arithmetic on samples stays float32).
- its DDPM step adds noise on the way to clean data unless the code time is 0; ours never does.
- its DDIM step goes to code time k - 1000 // steps, whatever the grid; we step to the same.
"""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.kernel import DDIM, DDPM
from rlfusion.diffusion.policy import Observation, Policy
from rlfusion.diffusion.schedule import DDPM as Table

KIND = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
GRIDS = [(50, "leading"), (50, "trailing"), (50, "linspace"), (7, "trailing"), (7, "linspace"), (30, "leading")]
TOLERANCE = 1e-5


class Given(torch.nn.Module):
    """A network that answers ``y``."""

    def forward(self, x, t, cond):
        return self.y


class Gap(NamedTuple):
    """The largest |ours - theirs|: with diffusers' table at times >= 0.1, and with the float64 table at all times."""

    shipped: float
    exact: float


def double_table(scheduler):
    scheduler.alphas_cumprod = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
    return scheduler


class Pair:
    """Both sides of the comparison for one scheduler class and its settings, on one grid."""

    def __init__(self, monkeypatch, make, kind: str, kernel, steps: int, spacing: str, **settings):
        settings |= {"prediction_type": KIND[kind], "clip_sample": False, "timestep_spacing": spacing}
        self.shipped, self.exact = make(**settings), double_table(make(**settings))
        for scheduler in (self.shipped, self.exact):
            scheduler.set_timesteps(steps)
        self.times = TimeGrid(steps, spacing).times(Table())
        assert ((self.times[:-1] * 1000).round().long() - 1).tolist() == self.shipped.timesteps.tolist()
        self.policy = Policy(Denoiser(Given(), Table(), kind), kernel)
        monkeypatch.setattr(f"{make.__module__}.randn_tensor", lambda *_, **__: self.noise)

    def compare(self, ends, **options) -> Gap:
        """Step from times of the grid to those of ``ends``, each from the same x on both sides: from every time, or
        on a long grid from every eighth and from the 24 at either end, where most can go wrong."""
        shipped, exact = [0.0], [0.0]
        drawn = torch.randn(len(ends), 3, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        steps = [k for k in range(len(ends)) if k % 8 == 0 or not 24 <= k < len(ends) - 24]
        for t, s, (x, y, noise) in ((self.times[k], ends[k], drawn[k]) for k in steps):
            self.noise = noise
            self.policy.denoiser.net.y = y
            ours = self.policy(Observation(x, t, s)).sample(noise)
            code = round(float(t) * 1000) - 1
            theirs = [scheduler.step(y, code, x, **options).prev_sample for scheduler in (self.exact, self.shipped)]
            assert {ours.dtype, *(x.dtype for x in theirs)} == {torch.float32}
            exact.append(float((ours - theirs[0]).abs().max()))
            if t >= 0.1:
                shipped.append(float((ours - theirs[1]).abs().max()))
        return Gap(max(shipped), max(exact))


def assert_parity(gap: Gap) -> None:
    assert max(gap) <= TOLERANCE, gap


def ddpm_gap(monkeypatch, kind: str, variance: str, steps: int, spacing: str) -> Gap:
    pair = Pair(monkeypatch, DDPMScheduler, kind, DDPM(variance), steps, spacing, variance_type=f"fixed_{variance}")
    ends = pair.times[1:] if pair.shipped.timesteps[-1] == 0 or variance == "small" else pair.times[1:-1]
    return pair.compare(ends)


def ddim_gap(monkeypatch, kind: str, eta: float, steps: int, spacing: str) -> Gap:
    pair = Pair(monkeypatch, DDIMScheduler, kind, DDIM(eta), steps, spacing, set_alpha_to_one=True)
    return pair.compare((pair.times[:-1] - (1000 // steps) / 1000).clamp(min=0), eta=eta)


@pytest.mark.parametrize(("steps", "spacing"), GRIDS)
@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("kind", KIND)
def test_ddpm_on_subsequences(monkeypatch, kind, variance, steps, spacing):
    assert_parity(ddpm_gap(monkeypatch, kind, variance, steps, spacing))


@pytest.mark.parametrize(("steps", "spacing"), GRIDS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", KIND)
def test_ddim_on_subsequences(monkeypatch, kind, eta, steps, spacing):
    assert_parity(ddim_gap(monkeypatch, kind, eta, steps, spacing))


@pytest.mark.parametrize(("kind", "variance"), [("eps", "small"), ("x0", "small"), ("v", "large")])
def test_ddpm_on_the_full_grid(monkeypatch, kind, variance):
    assert_parity(ddpm_gap(monkeypatch, kind, variance, 1000, "leading"))


@pytest.mark.parametrize(("kind", "eta"), [("eps", 0.0), ("x0", 0.5), ("v", 1.0)])
def test_ddim_on_the_full_grid(monkeypatch, kind, eta):
    assert_parity(ddim_gap(monkeypatch, kind, eta, 1000, "leading"))


def test_where_ddim_visits_its_grid_the_next_time_is_ours():
    """On trailing and leading grids whose step divides 1000, diffusers' rule k - 1000 // steps is our grid itself."""
    for steps, spacing in ((50, "leading"), (50, "trailing"), (1000, "leading")):
        times = TimeGrid(steps, spacing).times(Table())
        torch.testing.assert_close((times[:-1] - (1000 // steps) / 1000).clamp(min=0), times[1:])
