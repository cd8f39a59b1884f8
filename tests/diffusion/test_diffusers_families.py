"""Step-by-step parity with diffusers' LCM, FlowMatchEuler, EDM (Euler) and SCM (TrigFlow) schedulers.

The same x, network output and noise on both sides, in float32, on each scheduler's own grid. diffusers keeps sigma and
alpha_bar in float32; our coefficients are float64, so the steps agree to float32 rounding.
"""

from itertools import pairwise

import pytest
import torch
from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from diffusers.schedulers.scheduling_scm import SCMScheduler

from rlfusion.diffusion.consistency import LCM
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.kernel import DDIM, FlowSDE, Renoise
from rlfusion.diffusion.kinds import EDM, TrigFlow
from rlfusion.diffusion.policy import Observation, Policy
from rlfusion.diffusion.schedule import Karras, Rectified, ScaledLinear, Trig

NEAR = {"rtol": 1e-5, "atol": 1e-5}


class Given(torch.nn.Module):
    """A network that answers ``y``."""

    def forward(self, x, t, cond):
        return self.y


def drawn(steps: int) -> torch.Tensor:
    """x, y, noise of each step."""
    return torch.randn(steps, 3, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def patch_noise(monkeypatch, scheduler, noise) -> None:
    monkeypatch.setattr(f"{type(scheduler).__module__}.randn_tensor", lambda *_, **__: noise)


@pytest.mark.parametrize("steps", [1, 4, 8, 50])
@pytest.mark.parametrize(("kind", "theirs"), [("eps", "epsilon"), ("x0", "sample"), ("v", "v_prediction")])
def test_lcm(monkeypatch, kind, theirs, steps):
    scheduler = LCMScheduler(prediction_type=theirs)  # scaled_linear 0.00085 .. 0.012
    scheduler.set_timesteps(steps)
    times = torch.cat([(scheduler.timesteps + 1).double() / 1000, torch.zeros(1).double()])
    net = Given()
    policy = Policy(LCM(Denoiser(net, ScaledLinear(), kind)), Renoise())
    for (t, s), code, (x, y, noise) in zip(pairwise(times), scheduler.timesteps, drawn(steps)):
        patch_noise(monkeypatch, scheduler, noise)
        net.y = y
        expected = scheduler.step(y, code, x).prev_sample
        torch.testing.assert_close(policy(Observation(x, t, s)).sample(noise), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 5, 28, 250])
@pytest.mark.parametrize("stochastic", [False, True])
def test_flow_match_euler(monkeypatch, stochastic, steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=stochastic)
    scheduler.set_timesteps(steps)
    net = Given()
    kernels = [Renoise()] if stochastic else [DDIM(0.0), FlowSDE(0.0)]
    times = scheduler.sigmas.double()
    for (t, s), code, (x, y, noise) in zip(pairwise(times), scheduler.timesteps, drawn(steps)):
        patch_noise(monkeypatch, scheduler, noise)
        net.y = y
        expected = scheduler.step(y, code, x).prev_sample
        for kernel in kernels:
            policy = Policy(Denoiser(net, Rectified(), "flow"), kernel)
            torch.testing.assert_close(policy(Observation(x, t, s)).sample(noise), expected, **NEAR)


@pytest.mark.parametrize("steps", [2, 5, 18, 200])
def test_edm_euler(steps):
    """All steps but the last, which diffusers makes to sigma = 0: that is x0_hat at sigma_min."""
    scheduler = EDMEulerScheduler()
    scheduler.set_timesteps(steps)
    times = torch.linspace(1, 0, steps, dtype=torch.float64)
    net = Given()
    denoiser = Denoiser(net, Karras(), EDM(0.5))
    for i, (code, (x, y, _)) in enumerate(zip(scheduler.timesteps, drawn(steps))):
        x = x * float(scheduler.sigmas[i])
        net.y = y
        scheduler.scale_model_input(x, code)
        expected = scheduler.step(y, code, x).prev_sample
        if i == steps - 1:
            ours = denoiser(x, times[i]).x0
        else:
            ours = Policy(denoiser, DDIM(0.0))(Observation(x, times[i], times[i + 1])).mean
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * float(scheduler.sigmas[i] + 1))


@pytest.mark.parametrize("steps", [2, 5, 250])
def test_scm(monkeypatch, steps):
    """Their model output is V = sigma_data F, their time the angle pi t / 2."""
    scheduler = SCMScheduler(sigma_data=0.5)
    scheduler.set_timesteps(steps, max_timesteps=1.5, intermediate_timesteps=None)
    net = Given()
    policy = Policy(Denoiser(net, Trig(0.5), TrigFlow(0.5)), Renoise())
    times = scheduler.timesteps.double() * 2 / torch.pi
    for (t, s), code, (x, y, noise) in zip(pairwise(times), scheduler.timesteps, drawn(steps)):
        patch_noise(monkeypatch, scheduler, noise)
        net.y = y
        expected = scheduler.step(0.5 * y, code, x).prev_sample
        torch.testing.assert_close(policy(Observation(x, t, s)).sample(noise), expected, **NEAR)
