"""Schedulers that count in noise levels u = sigma / alpha, on a table of betas, on a flow or of EDM: one step of each.

    (1)  on a table our time is where the schedule has that u, log u linear between two of the table
    (2)  on a flow our time is the scheduler's sigma, and the network's T sigma
    (3)  of EDM our time is (u / sigma_max)^(1 / rho)

Euler and EDM count x / alpha where we have x. Solvers of several steps are read in their first-order form: DDIM(0), of
their SDE DDIM(1).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rlfusion.common.errors import ConfigError
from rlfusion.diffusion.kinds import EDM, Timed
from rlfusion.diffusion.parameterization import named
from rlfusion.diffusion.schedule import Between, Power, Rectified, Schedule, UnitPrior
from rlfusion.models.pipelines.scheduler.grid import Form, Unfollowed
from rlfusion.models.pipelines.scheduler.tables import code_times, kind_of, table

SMALLEST = 2**-12
"""alpha at t = 1 of tables that are rescaled to zero terminal SNR, here."""

BEYOND = 5e-3
"""How far log u may be beyond the table, which the scheduler has in float32."""

Whole = Literal["", "floor", "round"]


def _warped(config: Mapping[str, Any]) -> bool:
    """Whether the grid is made in noise levels (Karras et al. 2022 and its kin), and its times follow."""
    return any(
        config.get(f"use_{name}") for name in ("karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas")
    )


def _level_times(base: Schedule, total: int, warped: bool, whole: Whole = "") -> Callable[[Any, int], Tensor]:
    """Eq. (1) on a table of ``total`` times, 0 for clean data; not ``warped``, all but the last are its own times."""
    held = base(torch.arange(1, total + 1, dtype=torch.float64) / total)
    known = (held.sigma / held.alpha).log().numpy()

    def times(scheduler: Any, steps: int) -> Tensor:
        log = scheduler.sigmas.double().cpu().log().numpy()
        inside = log[np.isfinite(log)]
        high, low = inside.max(initial=known[0]), inside.min(initial=known[-1])
        if high > known[-1] + BEYOND or low < known[0] - BEYOND:
            raise Unfollowed(
                f"its sigmas, {math.exp(high):.6g} to {math.exp(low):.6g}, leave its table of betas",
                f"sigma_max and sigma_min within {math.exp(known[-1]):.6g} and {math.exp(known[0]):.6g}",
            )
        code = np.where(np.isneginf(log), 0.0, np.interp(log, known, np.arange(1.0, total + 1)))
        if not warped:
            return code_times(scheduler, code[-1])
        return _held(torch.from_numpy(code), scheduler.timesteps.double().cpu() + 1, whole) / total

    return times


def _held(count: Tensor, code: Tensor, whole: Whole) -> Tensor:
    """The times ``count`` (K+1,) of a network that gets them as whole numbers, floored or rounded, at most a rounding
    error off so that they become the scheduler's own ``code`` (K,).
    """
    low = {"": -math.inf, "floor": 0.0, "round": -0.5 + 1e-6}[whole]
    high = {"": math.inf, "floor": 1 - 1e-4, "round": 0.5 - 1e-6}[whole]
    held = torch.cat([count[:-1].clamp(code + low, code + high), count[-1:]])
    return torch.where((held - count).abs() < 1e-2, held, count)


def euler(kernel: str) -> Callable[[Any], Form]:
    """Reads Euler's schedulers. ``kernel`` is a step of them: DDIM(eta=0.0), or DDIM(eta=1.0) of the ancestral one."""

    def form(scheduler: Any) -> Form:
        config = scheduler.config
        if "Ancestral" in type(scheduler).__name__ and config["prediction_type"] == "sample":
            raise ConfigError("scheduler: prediction_type = sample is not made by it, expected epsilon or v_prediction")
        if config.get("timestep_type", "discrete") != "discrete" and config["prediction_type"] == "v_prediction":
            raise ConfigError(
                f"scheduler: timestep_type = {config['timestep_type']} with v_prediction is not read, expected discrete"
            )
        base, warped = table(config, SMALLEST), _warped(config)
        schedule: Schedule = Between(base, "log_sigma" if warped else "sigma")
        if config["timestep_spacing"] == "leading":  # else it begins with sigma(t_0) noise, as we do
            schedule = UnitPrior(schedule)
        clock = _level_times(base, config["num_train_timesteps"], warped)
        return Form(schedule, kind_of(config), kernel, "DDIM(eta=1.0)", clock, over_alpha=True)

    return form


def _flow_kind(config: Mapping[str, Any], whole: Literal["", "floor"] = "") -> Timed:
    return Timed(named("flow"), config["num_train_timesteps"], whole=whole)


def flow(scheduler: Any) -> Form:
    """Reads FlowMatchEulerDiscreteScheduler: Euler on a rectified flow, or, stochastic, re-noising."""
    config = scheduler.config
    kernel = "Renoise()" if config.get("stochastic_sampling") else "DDIM(eta=0.0)"
    explore = kernel if kernel == "Renoise()" else "FlowSDE(noise=0.7)"
    return Form(UnitPrior(Rectified()), _flow_kind(config), kernel, explore, lambda made, _: made.sigmas.double().cpu())


def flow_lcm(scheduler: Any) -> Form:
    """Reads FlowMatchLCMScheduler: a rectified flow that re-noises its x0_hat."""
    return replace(flow(scheduler), kernel="Renoise()", explore="Renoise()")


def _solver(scheduler: Any, kernel: str, first_order: Callable[[], Any] | None) -> Form:
    """The first-order form of a solver on a table of betas or, ``use_flow_sigmas``, on a flow: DDIM(0) or DDIM(1)."""
    config = scheduler.config
    if config.get("use_flow_sigmas"):
        return _flow_solver(config, kernel, first_order)
    base, warped = table(config, SMALLEST), _warped(config)
    kind, whole = kind_of(config), _whole(scheduler) if warped else ""
    schedule, kind = UnitPrior(Between(base, "log_sigma")), replace(kind, whole=whole)
    clock = _level_times(base, config["num_train_timesteps"], warped, whole)
    return Form(schedule, kind, kernel, "DDIM(eta=1.0)", clock, first_order=first_order)


def _whole(scheduler: Any) -> Literal["floor", "round"]:
    """How a solver makes whole times for its network from noise levels."""
    config = scheduler.config
    rounds = config.get("use_karras_sigmas") or config.get("use_lu_lambdas")
    cosine = (
        type(scheduler).__name__ == "DPMSolverMultistepScheduler" and config["beta_schedule"] == "squaredcos_cap_v2"
    )
    return "round" if rounds and not cosine else "floor"


def _flow_solver(config: Mapping[str, Any], kernel: str, first_order: Callable[[], Any] | None) -> Form:
    if (given := config["prediction_type"]) != "flow_prediction":
        raise ConfigError(
            f"scheduler: prediction_type = {given} with use_flow_sigmas = True is not read, expected flow_prediction"
        )
    total = config["num_train_timesteps"]

    def times(scheduler: Any, steps: int) -> Tensor:
        return _held(scheduler.sigmas.double().cpu() * total, scheduler.timesteps.double().cpu(), "floor") / total

    # its grid begins a little below t = 1, where the noise of FlowSDE has no bound
    form = Form(UnitPrior(Rectified()), _flow_kind(config, "floor"), kernel, "CPS(eta=0.5)", times)
    return replace(form, first_order=first_order)


def _order_one(scheduler: Any, **settings: Any) -> Callable[[], Any] | None:
    """What makes the scheduler with ``settings`` of its first order; None where it has them."""
    if all(scheduler.config[name] == value for name, value in settings.items()):
        return None
    return lambda: type(scheduler).from_config(scheduler.config, **settings)


def _algorithm(config: Mapping[str, Any]) -> str:
    """The kernel of a DPM-Solver's first order."""
    kernels = {"dpmsolver": 0.0, "dpmsolver++": 0.0, "sde-dpmsolver++": 1.0}
    if (given := config["algorithm_type"]) not in kernels:
        raise ConfigError(
            f"scheduler: algorithm_type = {given} is not read: its first-order step does not keep the marginals, "
            f"expected one of {', '.join(kernels)}"
        )
    return f"DDIM(eta={kernels[given]})"


def dpm(scheduler: Any) -> Form:
    """Reads DPMSolverMultistepScheduler in its first-order form."""
    return _solver(scheduler, _algorithm(scheduler.config), _order_one(scheduler, solver_order=1))


def unipc(scheduler: Any) -> Form:
    """Its corrector, which looks back over two steps, is off in the first-order form."""
    off = list(range(scheduler.config.num_train_timesteps))
    return _solver(scheduler, "DDIM(eta=0.0)", _order_one(scheduler, solver_order=1, disable_corrector=off))


def deis(scheduler: Any) -> Form:
    """Reads DEISMultistepScheduler in its first-order form."""
    return _solver(scheduler, "DDIM(eta=0.0)", _order_one(scheduler, solver_order=1))


def edm(scheduler: Any) -> Form:
    """Eq. (3)."""
    config = scheduler.config
    if (given := config["prediction_type"]) != "epsilon":
        raise ConfigError(f"scheduler: prediction_type = {given} of EDM is not read, expected epsilon")

    def times(scheduler: Any, steps: int) -> Tensor:
        share = (scheduler.sigmas.double().cpu() / config["sigma_max"]).clamp(max=1)
        return share.cummin(0).values ** (1 / config["rho"])  # the last may be sigma_min once more, up to rounding

    schedule, kind = UnitPrior(Power(config["sigma_max"], config["rho"])), EDM(config["sigma_data"])
    return Form(schedule, kind, "DDIM(eta=0.0)", "DDIM(eta=1.0)", times, over_alpha=True)


def edm_dpm(scheduler: Any) -> Form:
    """Reads EDMDPMSolverMultistepScheduler in its first-order form."""
    first_order = _order_one(scheduler, solver_order=1)
    return replace(edm(scheduler), kernel=_algorithm(scheduler.config), first_order=first_order)
