"""Schedulers of DDPM tables that count whole times: what one step of each is.

    (1)  our time is (k + 1) / T at the scheduler's k

DDIM steps by T // steps, which is not always to the next time of its grid, and is refused where it is not.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rlfusion.common.errors import ConfigError, unknown
from rlfusion.diffusion.consistency import LCM
from rlfusion.diffusion.kinds import Timed
from rlfusion.diffusion.parameterization import named
from rlfusion.diffusion.schedule import DDPM, ScaledLinear, Schedule, ShiftedSNR, SquaredCosine, UnitPrior, ZeroSNR
from rlfusion.models.pipelines import hub
from rlfusion.models.pipelines.scheduler.grid import Form, Unfollowed

KINDS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


def kind_of(config: Mapping[str, Any]) -> Timed:
    """What the network predicts, with its count of time.

    Raises:
        ConfigError: a prediction_type that is none of epsilon, sample and v_prediction.
    """
    prediction = config["prediction_type"]
    if prediction == "flow_prediction":
        raise ConfigError(
            "scheduler: prediction_type = flow_prediction on a table of betas is not read, expected use_flow_sigmas = "
            "True beside it, or one of " + ", ".join(KINDS)
        )
    if prediction not in KINDS:
        raise unknown("prediction_type of the scheduler", str(prediction), KINDS)
    return Timed(named(KINDS[prediction]), config["num_train_timesteps"], -1.0)


def table(config: Mapping[str, Any], last: float = 0.0) -> Schedule:
    """The table of betas; ``last`` is alpha at t = 1 of one that is rescaled to zero terminal SNR.

    Raises:
        ConfigError: a beta_schedule that is none of linear, scaled_linear and squaredcos_cap_v2.
    """
    total, ends = config["num_train_timesteps"], (config["beta_start"], config["beta_end"])
    makers: dict[str, Callable[[], Schedule]] = {
        "linear": lambda: DDPM(total, *ends),
        "scaled_linear": lambda: ScaledLinear(total, *ends),
        "squaredcos_cap_v2": lambda: SquaredCosine(total),
    }
    if config["beta_schedule"] not in makers:
        raise unknown("beta_schedule of the scheduler", str(config["beta_schedule"]), makers)
    made = makers[config["beta_schedule"]]()
    if (scale := config.get("snr_shift_scale")) is not None:
        made = ShiftedSNR(repr(made), scale)
    return ZeroSNR(repr(made), last) if config.get("rescale_betas_zero_snr") else made


def code_times(scheduler: Any, last: float) -> Tensor:
    """Eq. (1): the scheduler's times, then ``last`` / T."""
    code = scheduler.timesteps.double().cpu()
    count = torch.cat([code + 1, torch.tensor([float(last)], dtype=torch.float64)])
    return count / scheduler.config.num_train_timesteps


def _to(last: int) -> Callable[[Any, int], Tensor]:
    return lambda scheduler, steps: code_times(scheduler, last)


def _ddim_times(scheduler: Any, steps: int) -> Tensor:
    """Raises Unfollowed where a step is not to the next time of the grid."""
    stride, code = scheduler.config.num_train_timesteps // steps, scheduler.timesteps
    to = code - stride
    if not torch.equal(to[:-1], code[1:]):
        spacing = scheduler.config.timestep_spacing
        raise Unfollowed(
            f"with timestep_spacing = {spacing} it steps by T // steps = {stride}, not to the next time of its grid",
            "timestep_spacing = leading" if spacing == "linspace" else "steps that divide T",
        )
    clean = 0 if scheduler.config.get("set_alpha_to_one", True) else 1
    return code_times(scheduler, to[-1].item() + 1 if to[-1] >= 0 else clean)


def ddim(scheduler: Any) -> Form:
    """Reads DDIMScheduler."""
    config = scheduler.config
    return Form(UnitPrior(table(config)), kind_of(config), "DDIM(eta=0.0)", "DDIM(eta=1.0)", _ddim_times)


def pndm(scheduler: Any) -> Form:
    """Its first-order form is DDIM on its grid."""

    def first_order() -> Any:
        settings = {"clip_sample": False, "rescale_betas_zero_snr": False}
        return hub.diffusers().DDIMScheduler.from_config(scheduler.config, **settings)

    return replace(ddim(first_order()), first_order=first_order)


def ddpm(scheduler: Any) -> Form:
    """Reads DDPMScheduler.

    Raises:
        ConfigError: a variance that is neither the small nor the large one.
    """
    variances = {"fixed_small": "small", "fixed_small_log": "small", "fixed_large": "large"}
    config = scheduler.config
    if config["variance_type"] not in variances:
        raise unknown("variance_type of the scheduler", str(config["variance_type"]), variances)
    kernel = f"DDPM(variance='{variances[config['variance_type']]}')"
    return Form(UnitPrior(table(config)), kind_of(config), kernel, kernel, _to(0))


def lcm(scheduler: Any) -> Form:
    """Reads LCMScheduler: re-noising around the boundary of a consistency function."""
    config = scheduler.config
    scaling = config["timestep_scaling"]

    def around(denoiser: nn.Module) -> nn.Module:
        return LCM(denoiser, scaling=scaling)

    form = Form(UnitPrior(table(config)), kind_of(config), "Renoise()", "Renoise()", _to(0), around)
    return replace(form, ask=_within(config))


def tcd(scheduler: Any) -> Form:
    """With eta = 0, as pipelines call it unless told otherwise; its last time is the first of the table."""
    config = scheduler.config
    form = Form(UnitPrior(table(config)), kind_of(config), "DDIM(eta=0.0)", "DDIM(eta=1.0)", _to(1))
    return replace(form, ask=_within(config), call={"eta": 0.0})


def _within(config: Mapping[str, Any]) -> Callable[[int], dict[str, Any]]:
    """Refuses more steps than the model was distilled from."""
    most = config["original_inference_steps"]

    def ask(steps: int) -> dict[str, Any]:
        if steps > most:
            raise Unfollowed(f"original_inference_steps = {most}", f"at most {most} steps")
        return {}

    return ask
