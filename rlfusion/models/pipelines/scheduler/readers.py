"""Reads a diffusers scheduler's configuration: the schedule, the kind that the model predicts, the time grid.

The grid is the scheduler's own: it is asked for its times, so that spacing, offset, shift, dynamic shift and Karras,
exponential or beta sigmas are as it has them, and each step on it is held against the scheduler's (``grid``).
One step of each scheduler is a kernel: DDIM(0) is the step of DDIM, Euler, TCD without noise and flow matching,
DDIM(1) that of ancestral Euler, Renoise that of LCM and SCM. Of a solver of several steps (PNDM, DPM-Solver, UniPC,
DEIS), which has no transition density, the first-order form walks the same grid.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from rlfusion.common.errors import ConfigError, unknown
from rlfusion.diffusion.kinds import Kind, TrigFlow
from rlfusion.diffusion.schedule import Schedule, Trig
from rlfusion.models.pipelines.scheduler import levels, tables
from rlfusion.models.pipelines.scheduler.grid import Form, GridArguments, checked
from rlfusion.models.pipelines.scheduler.settings import BETAS, FLOW, SIGMAS, SOLVER, SPACED, names, require_followed


@dataclass(frozen=True)
class Sampling:
    """A scheduler, read.

    Attributes:
        schedule: what its times mean (``tables``, ``levels``).
        kind: what the network predicts, with its own count of time.
        times: steps -> the K + 1 times of the grid; raises ConfigError for steps of which there is none.
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
    if name in REFUSED:
        raise ConfigError(f"scheduler {name!r} is not read: {REFUSED[name]}")
    if name not in READERS:
        raise unknown("scheduler", name, READERS)
    require_followed(scheduler, READERS[name].follows)
    form = READERS[name].form(scheduler)
    times = checked(scheduler, form, arguments)
    return Sampling(form.schedule, form.kind, times, form.kernel, form.explore, form.around, form.first_order)


def _scm(scheduler: Any) -> Form:
    """Our time is 2 / pi of its angle, our x in units of sigma_data. The second of two steps begins at 1.3, as in its
    pipeline; of others the times are even.
    """
    if (given := scheduler.config["prediction_type"]) != "trigflow":
        raise ConfigError(f"scheduler: prediction_type = {given} is not read, expected trigflow")

    def times(scheduler: Any, steps: int) -> Tensor:
        return (scheduler.timesteps.double().cpu() * 2 / math.pi).clamp(max=1)

    def ask(steps: int) -> dict[str, Any]:
        return {} if steps == 2 else {"intermediate_timesteps": None}

    form = Form(Trig(), TrigFlow(), "Renoise()", "Renoise()", times, ask=ask)
    return replace(form, unit=scheduler.config["sigma_data"])


@dataclass(frozen=True)
class Reader:
    """scheduler -> what one step of it is; and the settings that it, or the scheduler asked for its times, follows."""

    form: Callable[[Any], Form]
    follows: frozenset[str]


_TABLE = BETAS | SPACED
_SOLVER = _TABLE | SIGMAS | SOLVER | names("use_flow_sigmas flow_shift use_dynamic_shifting time_shift_type")
_EDM = names("sigma_min sigma_max sigma_data sigma_schedule num_train_timesteps prediction_type rho")

READERS: Mapping[str, Reader] = {
    "DDIMScheduler": Reader(tables.ddim, _TABLE | {"set_alpha_to_one"}),
    "DDPMScheduler": Reader(tables.ddpm, _TABLE | {"variance_type"}),
    "PNDMScheduler": Reader(tables.pndm, _TABLE | {"set_alpha_to_one", "skip_prk_steps"}),
    "LCMScheduler": Reader(tables.lcm, _TABLE | {"original_inference_steps", "timestep_scaling", "set_alpha_to_one"}),
    "TCDScheduler": Reader(tables.tcd, _TABLE | {"original_inference_steps", "timestep_scaling", "set_alpha_to_one"}),
    "CogVideoXDDIMScheduler": Reader(tables.ddim, _TABLE | {"set_alpha_to_one", "snr_shift_scale", "clip_sample"}),
    "EulerDiscreteScheduler": Reader(
        levels.euler("DDIM(eta=0.0)"), _TABLE | SIGMAS | {"timestep_type", "final_sigmas_type"}
    ),
    "EulerAncestralDiscreteScheduler": Reader(levels.euler("DDIM(eta=1.0)"), _TABLE),
    "DPMSolverMultistepScheduler": Reader(
        levels.dpm, _SOLVER | {"algorithm_type", "use_lu_lambdas", "final_sigmas_type", "lambda_min_clipped"}
    ),
    "UniPCMultistepScheduler": Reader(
        levels.unipc, _SOLVER | {"predict_x0", "disable_corrector", "final_sigmas_type", "shift_terminal"}
    ),
    "DEISMultistepScheduler": Reader(levels.deis, _SOLVER | {"algorithm_type"}),
    "EDMEulerScheduler": Reader(levels.edm, _EDM | {"final_sigmas_type"}),
    "EDMDPMSolverMultistepScheduler": Reader(levels.edm_dpm, _EDM | SOLVER | {"final_sigmas_type", "algorithm_type"}),
    "FlowMatchEulerDiscreteScheduler": Reader(levels.flow, FLOW | {"stochastic_sampling"}),
    "FlowMatchLCMScheduler": Reader(levels.flow_lcm, FLOW),
    "SCMScheduler": Reader(_scm, frozenset({"num_train_timesteps", "prediction_type", "sigma_data"})),
}
"""The schedulers that are read, by the name of their class."""

_TWICE = "it asks the network twice a step, which is no step of a Markov chain; expected its first-order form, "
_SEVERAL = "it remembers earlier steps in a way that has no first-order setting; expected "
REFUSED: Mapping[str, str] = {
    "HeunDiscreteScheduler": _TWICE + "EulerDiscreteScheduler",
    "KDPM2DiscreteScheduler": _TWICE + "EulerDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler": _TWICE + "EulerAncestralDiscreteScheduler",
    "DPMSolverSDEScheduler": _TWICE + "DPMSolverMultistepScheduler with algorithm_type = sde-dpmsolver++",
    "FlowMatchHeunDiscreteScheduler": _TWICE + "FlowMatchEulerDiscreteScheduler",
    "LMSDiscreteScheduler": _SEVERAL + "EulerDiscreteScheduler, which it is at order 1",
    "IPNDMScheduler": _SEVERAL + "DDIMScheduler",
    "SASolverScheduler": _SEVERAL + "DPMSolverMultistepScheduler with algorithm_type = sde-dpmsolver++",
    "DPMSolverSinglestepScheduler": "its order changes from step to step; expected DPMSolverMultistepScheduler",
    "CogVideoXDPMScheduler": "it averages two steps; expected CogVideoXDDIMScheduler",
    "CMStochasticIterativeScheduler": "it clips x0_hat; expected our own chain, with kind CM and kernel Renoise",
}
"""Published schedulers that are not read, and why."""
