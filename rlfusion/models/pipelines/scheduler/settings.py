"""Which settings of a diffusers scheduler are followed; every other must have the value with which it changes nothing.

A setting is one of these, or the scheduler is refused by its name:

    followed    the reader, or the scheduler asked for its times, takes it into account
    idle        it cannot change a step while those of ``ONLY`` have their one value
    of others   it belongs to another class, and diffusers itself leaves it aside (configurations are passed around)
    default     it has the value that the class itself gives it, or none
"""

import inspect
from collections.abc import Iterable
from typing import Any

import numpy as np

from rlfusion.common.errors import ConfigError


def names(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


ONLY = {"clip_sample": False, "thresholding": False}
"""Settings that would make a step no longer Gaussian in x_t and the answer, and the one value of each that is read."""

BETAS = names("num_train_timesteps beta_start beta_end beta_schedule rescale_betas_zero_snr prediction_type")
SPACED = names("timestep_spacing steps_offset")
SIGMAS = names("use_karras_sigmas use_exponential_sigmas use_beta_sigmas sigma_min sigma_max")
FLOW = names(
    "num_train_timesteps shift use_dynamic_shifting base_shift max_shift base_image_seq_len "
    "max_image_seq_len shift_terminal time_shift_type use_karras_sigmas use_exponential_sigmas "
    "use_beta_sigmas"
)
SOLVER = names("solver_order solver_type lower_order_final euler_at_final")
"""What a solver of several steps does beyond its first-order form."""

IDLE = names("clip_sample_range dynamic_thresholding_ratio sample_max_value")

OTHERS = names(
    "skip_prk_steps set_alpha_to_one clip_sample thresholding interpolation_type timestep_type "
    "variance_type algorithm_type predict_x0 solver_p disable_corrector lambda_min_clipped use_lu_lambdas "
    "use_flow_sigmas flow_shift invert_sigmas stochastic_sampling original_inference_steps "
    "timestep_scaling sigma_data sigma_schedule rho snr_shift_scale final_sigmas_type trained_betas "
    "use_timesteps tensor_format"
)
"""Further settings of other classes."""

KNOWN = BETAS | SPACED | SIGMAS | FLOW | SOLVER | IDLE | OTHERS


def require_followed(scheduler: Any, follows: Iterable[str]) -> None:
    """Refuse what ``scheduler`` is told that its reader, which ``follows`` these settings, would leave out.

    Raises:
        ConfigError: names the setting, its value and the one expected.
    """
    own = inspect.signature(type(scheduler).__init__).parameters
    for setting, given in scheduler.config.items():
        if setting in follows or setting.startswith("_") or (setting in IDLE and setting in own):
            continue
        if setting not in own:
            if setting in KNOWN or not given:
                continue
            raise _refused(scheduler, setting, given, "none: the installed diffusers does not know this setting")
        only = ONLY.get(setting, own[setting].default)
        if not _same(given, only):
            raise _refused(scheduler, setting, given, only)


def _refused(scheduler: Any, setting: str, given: Any, expected: Any) -> ConfigError:
    shown = repr(given) if len(repr(given)) <= 40 else f"{repr(given)[:40]}..."
    return ConfigError(
        f"scheduler {type(scheduler).__name__}: {setting} = {shown} would change a step and is not followed, expected "
        f"{expected} (in scheduler/scheduler_config.json)"
    )


def _same(given: Any, only: Any) -> bool:
    """Whether a value is the expected one; None, False and nothing are one."""
    given = given.tolist() if isinstance(given, np.ndarray) else given
    return bool(given == only) or (not given and not only)


def told(scheduler: Any) -> str:
    """The settings of ``scheduler`` that are not its class's own defaults, as text."""
    own = inspect.signature(type(scheduler).__init__).parameters
    changed = {
        name: scheduler.config[name]
        for name, parameter in own.items()
        if name in scheduler.config and not _same(scheduler.config[name], parameter.default)
    }
    return "".join(f", {name} = {value!r}" for name, value in changed.items() if len(repr(value)) <= 40)
