"""diffusers' own loop over its scheduler, and ours over what is read of it, with one analytic model and one noise.

The model is the exact one of data N(mean, 0.25 I), as a function of what a network gets alone: its input and its time.
"""

import warnings
from collections.abc import Callable
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from rlfusion.common import spec
from rlfusion.diffusion.chain import KERNELS
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.policy import Policy
from rlfusion.diffusion.sampling import sample
from rlfusion.models.pipelines.scheduler import Sampling, read

SHAPE = (1, 1, 2, 4)
MEAN = torch.linspace(-1.0, 1.0, 8, dtype=torch.float64).reshape(SHAPE)
VARIANCE = 0.25

Model = Callable[[Tensor, float], Tensor]
"""(input of the network, its time) -> its answer."""


def told(scheduler, steps: int) -> dict:
    """How a pipeline asks for times: with mu where the scheduler wants one, as those of flows do."""
    config = scheduler.config
    dynamic = config.get("use_dynamic_shifting") and "Flow" in type(scheduler).__name__
    wants = dynamic or (config.get("use_dynamic_shifting") and config.get("use_flow_sigmas"))
    return {"num_inference_steps": steps, **({"mu": 0.8} if wants else {})}


def _unknowns(x: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
    """The mean of x0 and of eps given alpha x0 + sigma eps = x."""
    share = 1 / (alpha**2 * VARIANCE + sigma**2)
    left = x - alpha * MEAN
    return MEAN + alpha * VARIANCE * share * left, sigma * share * left


def model_of(scheduler) -> Model:
    """What a network trained for ``scheduler`` would answer."""
    config, name = scheduler.config, type(scheduler).__name__
    if name.startswith("EDM"):
        return lambda x, time: _edm(x, time, config)
    if name == "SCMScheduler":
        return lambda x, time: np.cos(time) * _trig(x, time)[1] - np.sin(time) * _trig(x, time)[0]
    total = config["num_train_timesteps"]
    if name.startswith("Flow") or config.get("use_flow_sigmas"):
        return lambda x, time: _flow(x, time / total)
    held = scheduler.alphas_cumprod.double().sqrt().numpy()

    def table(x: Tensor, time: float) -> Tensor:
        alpha = float(np.interp(time, np.arange(total), held))
        sigma = (1 - alpha**2) ** 0.5
        x0, eps = _unknowns(x, alpha, sigma)
        answers = {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0}
        return answers.get(config["prediction_type"], eps)

    return table


def _flow(x: Tensor, sigma: float) -> Tensor:
    x0, eps = _unknowns(x, 1 - sigma, sigma)
    return eps - x0


def _trig(x: Tensor, time: float) -> tuple[Tensor, Tensor]:
    """Of x in units of sigma_data."""
    return _unknowns(x, np.cos(time), np.sin(time))


def _edm(x: Tensor, time: float, config) -> Tensor:
    tau, sd = np.exp(4 * time), config["sigma_data"]
    norm = (tau**2 + sd**2) ** 0.5
    x0 = _unknowns(x * norm, 1.0, tau)[0]
    return (x0 - sd**2 / norm**2 * x * norm) * norm / (tau * sd)


def noise(steps: int) -> Tensor:
    return torch.randn(SHAPE[0], steps + 1, *SHAPE[1:], generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@torch.no_grad()
def theirs(scheduler, z: Tensor, **call) -> Tensor:
    """The end of diffusers' loop, in units of ours."""
    steps, model = z.shape[1] - 1, model_of(scheduler)
    unit, asked = 1.0, told(scheduler, steps)
    if type(scheduler).__name__ == "SCMScheduler":
        unit = scheduler.config.sigma_data
        asked |= {} if steps == 2 else {"intermediate_timesteps": None}
    scheduler.set_timesteps(**asked)
    x = z[:, 0] * float(getattr(scheduler, "init_noise_sigma", 1.0)) * unit
    scaled = getattr(scheduler, "scale_model_input", lambda x, time: x / unit)
    with patch(f"{type(scheduler).__module__}.randn_tensor", create=True) as draw:
        for k, code in enumerate(scheduler.timesteps[:steps]):
            draw.side_effect = lambda *_, k=k, **__: z[:, k + 1]
            given = x / unit if unit != 1.0 else scaled(x, code)
            x = scheduler.step(unit * model(given.double(), float(code)), code, x, **call).prev_sample
    return x.double() / unit


class Analytic(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor, cond: object) -> Tensor:
        return self.model(x, float(t[0]))


def ours(scheduler, z: Tensor) -> tuple[Tensor, Sampling]:
    """The end of our chain over what is read of ``scheduler``, and that."""
    sampling = read(scheduler, told)
    net = Analytic(model_of(scheduler))
    denoiser = sampling.around(Denoiser(net, sampling.schedule, sampling.kind))
    policy = Policy(denoiser, spec.parse(sampling.kernel, KERNELS, "kernel"))
    return sample(policy, z, sampling.times(z.shape[1] - 1)), sampling


def made(cls, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls(**settings)
