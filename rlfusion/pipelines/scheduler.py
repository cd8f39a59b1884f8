"""What a diffusers scheduler's configuration says of a model: its schedule, the kind that it predicts, its time grid.

    (1)  tables (T times): our time is (k + 1) / T at the scheduler's k, and x = alpha z where it counts z = x / alpha,
         of noise level sigma / alpha (Euler, DPM-Solver)
    (2)  flow matching: our time is the scheduler's sigma, shifted or not; the network's is T sigma

The grid is the scheduler's own: it is asked for its times, so that spacing, offset, shift, dynamic shift and Karras,
exponential or beta sigmas are as it has them. One step of each scheduler is a kernel: DDIM(0) is the step of DDIM,
Euler and flow matching, DDIM(1) that of ancestral Euler, Renoise that of LCM. Of a solver of several steps (PNDM,
DPM-Solver), which has no transition density, the single-step form walks the same grid.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlfusion.consistency import LCM
from rlfusion.errors import ConfigError, unknown
from rlfusion.kinds import Kind, Timed
from rlfusion.parameterization import named
from rlfusion.schedule import DDPM, Between, Rectified, ScaledLinear, Schedule, SquaredCosine, UnitPrior, ZeroSNR

KINDS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
UNREAD = {"clip_sample": False, "thresholding": False, "trained_betas": None, "timestep_type": "discrete"}
"""Settings that would change a step, and the only value of each that we follow."""

GridArguments = Callable[[Any, int], dict[str, Any]]
"""(scheduler, steps) -> the keywords with which a pipeline calls its scheduler's ``set_timesteps``."""


@dataclass(frozen=True)
class Sampling:
    """A scheduler, read.

    Attributes:
        schedule: Eq. (1) or (2).
        kind: what the network predicts, with its own count of time.
        times: steps -> the K + 1 times of the grid.
        kernel: the scheduler's own step, as ``Chain.kernel`` writes it.
        explore: a kernel with noise at every step, for policy gradients: ``kernel`` where it has noise itself.
        around: what the scheduler puts around the guided network.
        first_order: of a solver of several steps, of which all this is the first-order form: makes the scheduler of
            diffusers that takes just those steps; None where the scheduler's own steps are ours.
    """

    schedule: Schedule
    kind: Kind
    times: Callable[[int], Tensor]
    kernel: str
    explore: str
    around: Callable[[nn.Module], nn.Module]
    first_order: Callable[[], Any] | None = None


def read(scheduler: Any, arguments: GridArguments) -> Sampling:
    """What the configuration of ``scheduler`` says.

    Raises:
        ConfigError: a scheduler, or a setting of one, that is not among those read.
    """
    name = type(scheduler).__name__
    if name not in READERS:
        raise unknown("scheduler", name, READERS)
    for setting, only in UNREAD.items():
        if (given := scheduler.config.get(setting, only)) not in (only, None, False):
            raise ConfigError(
                f"scheduler {name}: {setting} = {given} would change a step and is not followed, expected {only}"
            )
    return READERS[name](scheduler, arguments)


def _same(denoiser: nn.Module) -> nn.Module:
    return denoiser


def _kind(config: Mapping[str, Any]) -> Timed:
    prediction = config["prediction_type"]
    if prediction not in KINDS:
        raise unknown("prediction_type of the scheduler", prediction, KINDS)
    return Timed(named(KINDS[prediction]), config["num_train_timesteps"], -1.0)


def table(config: Mapping[str, Any]) -> Schedule:
    """The table of betas.

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
        raise unknown("beta_schedule of the scheduler", config["beta_schedule"], makers)
    made = makers[config["beta_schedule"]]()
    return ZeroSNR(repr(made)) if config.get("rescale_betas_zero_snr") else made


def _table_times(scheduler: Any, arguments: GridArguments, last: int) -> Callable[[int], Tensor]:
    """Eq. (1): the scheduler's times, then ``last`` / T."""
    total = scheduler.config["num_train_timesteps"]

    def times(steps: int) -> Tensor:
        if steps > total:
            raise ConfigError(f"steps = {steps}: expected at most the scheduler's {total} times")
        scheduler.set_timesteps(**arguments(scheduler, steps))
        code = scheduler.timesteps.double().cpu()
        return torch.cat([code + 1, torch.tensor([float(last)], dtype=torch.float64)]) / total

    return times


def _warped(config: Mapping[str, Any]) -> bool:
    """Whether the grid is made in noise levels (Karras et al. 2022 and its kin), and its times follow."""
    return any(
        config.get(f"use_{name}") for name in ("karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas")
    )


def _sigma_times(scheduler: Any, arguments: GridArguments, base: Schedule, last: int) -> Callable[[int], Tensor]:
    """The times of the scheduler's noise levels sigma / alpha, with log sigma linear between two of the table."""
    total = scheduler.config["num_train_timesteps"]
    held = base(torch.arange(1, total + 1, dtype=torch.float64) / total)
    known = (held.sigma / held.alpha).log().numpy()

    def times(steps: int) -> Tensor:
        scheduler.set_timesteps(**arguments(scheduler, steps))
        code = np.interp(scheduler.sigmas[:-1].double().cpu().log().numpy(), known, np.arange(1.0, total + 1))
        return torch.from_numpy(np.append(code, float(last))) / total

    return times


def _ddim(scheduler: Any, arguments: GridArguments) -> Sampling:
    config = scheduler.config
    times = _table_times(scheduler, arguments, 0 if config.get("set_alpha_to_one", True) else 1)
    return Sampling(UnitPrior(table(config)), _kind(config), times, "DDIM(eta=0.0)", "DDIM(eta=1.0)", _same)


def _pndm(scheduler: Any, arguments: GridArguments) -> Sampling:
    from diffusers import DDIMScheduler

    def first_order() -> Any:
        return DDIMScheduler.from_config(scheduler.config, clip_sample=False)

    return replace(_ddim(first_order(), arguments), first_order=first_order)


def _ddpm(scheduler: Any, arguments: GridArguments) -> Sampling:
    variances = {"fixed_small": "small", "fixed_large": "large"}
    config = scheduler.config
    if config["variance_type"] not in variances:
        raise unknown("variance_type of the scheduler", config["variance_type"], variances)
    kernel = f"DDPM(variance='{variances[config['variance_type']]}')"
    return Sampling(
        UnitPrior(table(config)), _kind(config), _table_times(scheduler, arguments, 0), kernel, kernel, _same
    )


def _lcm(scheduler: Any, arguments: GridArguments) -> Sampling:
    config = scheduler.config
    times, scaling = _table_times(scheduler, arguments, 0), config["timestep_scaling"]

    def around(denoiser: nn.Module) -> nn.Module:
        return LCM(denoiser, scaling=scaling)

    return Sampling(UnitPrior(table(config)), _kind(config), times, "Renoise()", "Renoise()", around)


def _euler(kernel: str) -> Callable[[Any, GridArguments], Sampling]:
    def reader(scheduler: Any, arguments: GridArguments) -> Sampling:
        config = scheduler.config
        if config.get("interpolation_type", "linear") != "linear":
            raise ConfigError(f"scheduler: interpolation_type = {config['interpolation_type']}, expected linear")
        base, last = table(config), 1 if config.get("final_sigmas_type", "zero") == "sigma_min" else 0
        schedule: Schedule = Between(base, "log_sigma" if _warped(config) else "sigma")
        if config["timestep_spacing"] == "leading":  # else it begins with sigma(t_0) noise, as we do
            schedule = UnitPrior(schedule)
        warped = _warped(config)
        times = _sigma_times(scheduler, arguments, base, last) if warped else _table_times(scheduler, arguments, last)
        return Sampling(schedule, _kind(config), times, kernel, "DDIM(eta=1.0)", _same)

    return reader


def _flow_times(scheduler: Any, arguments: GridArguments) -> Callable[[int], Tensor]:
    """Eq. (2)."""

    def times(steps: int) -> Tensor:
        scheduler.set_timesteps(**arguments(scheduler, steps))
        return scheduler.sigmas.double().cpu()

    return times


def _flow(scheduler: Any, arguments: GridArguments) -> Sampling:
    config = scheduler.config
    if config.get("invert_sigmas"):
        raise ConfigError("scheduler: invert_sigmas = True is not supported, expected False")
    kind = Timed(named("flow"), config["num_train_timesteps"])
    kernel = "Renoise()" if config.get("stochastic_sampling") else "DDIM(eta=0.0)"
    explore = kernel if kernel == "Renoise()" else "FlowSDE(noise=0.7)"
    return Sampling(Rectified(), kind, _flow_times(scheduler, arguments), kernel, explore, _same)


def _dpm(scheduler: Any, arguments: GridArguments) -> Sampling:
    sampling = _dpm_first(scheduler, arguments)
    if scheduler.config["solver_order"] == 1:
        return sampling
    return replace(sampling, first_order=lambda: type(scheduler).from_config(scheduler.config, solver_order=1))


def _dpm_first(scheduler: Any, arguments: GridArguments) -> Sampling:
    """The first-order step of DPM-Solver is DDIM(0), that of its SDE form DDIM(1). Its networks get whole times."""
    config = scheduler.config
    total = config["num_train_timesteps"]
    kernel = "DDIM(eta=1.0)" if config["algorithm_type"].startswith("sde") else "DDIM(eta=0.0)"
    if config.get("use_flow_sigmas"):
        kind, times = Timed(named("flow"), total, whole="floor"), _flow_times(scheduler, arguments)
        return Sampling(UnitPrior(Rectified()), kind, times, kernel, "FlowSDE(noise=0.7)", _same)
    base, last = table(config), 1 if config["final_sigmas_type"] == "sigma_min" else 0
    schedule, kind = UnitPrior(Between(base, "log_sigma")), _kind(config)
    if not _warped(config):
        return Sampling(schedule, kind, _table_times(scheduler, arguments, last), kernel, "DDIM(eta=1.0)", _same)
    whole = "round" if config.get("use_karras_sigmas") or config.get("use_lu_lambdas") else "floor"
    kind, times = replace(kind, whole=whole), _sigma_times(scheduler, arguments, base, last)
    return Sampling(schedule, kind, times, kernel, "DDIM(eta=1.0)", _same)


READERS: Mapping[str, Callable[[Any, GridArguments], Sampling]] = {
    "DDIMScheduler": _ddim,
    "DDPMScheduler": _ddpm,
    "PNDMScheduler": _pndm,
    "LCMScheduler": _lcm,
    "EulerDiscreteScheduler": _euler("DDIM(eta=0.0)"),
    "EulerAncestralDiscreteScheduler": _euler("DDIM(eta=1.0)"),
    "DPMSolverMultistepScheduler": _dpm,
    "FlowMatchEulerDiscreteScheduler": _flow,
}
"""The schedulers that are read, by the name of their class."""
