"""Every reader of a diffusers scheduler over the product of its options: diffusers' own loop, or a refusal by name.

The two ends of a chain agree within ``ALIKE`` of the largest number (or of 1): tables and sigmas are float32 there.
Of a solver of several steps the end is that of the same scheduler of diffusers at order 1.
"""

import inspect
import json
import random
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import schedulers
from diffusers.schedulers.scheduling_flow_match_lcm import FlowMatchLCMScheduler
from diffusers.schedulers.scheduling_scm import SCMScheduler
from schedulers import made, noise, ours, theirs, told

from rlfusion.common.errors import ConfigError
from rlfusion.models.pipelines import hub
from rlfusion.models.pipelines.family import plain_grid
from rlfusion.models.pipelines.scheduler import READERS, REFUSED, read

pytestmark = pytest.mark.filterwarnings("ignore")

ALIKE = 1e-3
EACH = 20
"""Combinations of a reader's options."""

STEPS = [1, 2, 3, 4, 7, 10, 1, 5, 20, 3, 8, 60]
"""Divisors of the training times and others, and more than some samplers have."""

BOOL = [False, True]
TABLE: dict[str, list] = {
    "num_train_timesteps": [1000, 100],
    "beta_schedule": ["scaled_linear", "linear", "squaredcos_cap_v2"],
    "prediction_type": ["epsilon", "v_prediction", "sample"],
    "timestep_spacing": ["leading", "trailing", "linspace"],
    "steps_offset": [0, 1],
}
CLIPPED = {"clip_sample": [False] * 5 + [True], "thresholding": [False] * 7 + [True]}
TERMINAL = {"rescale_betas_zero_snr": BOOL}
FAMILIES = [None, "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"]
"""Of noise levels."""

SOLVER = {"solver_order": [1, 2, 3], "lower_order_final": BOOL, "flow_shift": [1.0, 3.0], "algorithm_type": [None]}
PREDICTIONS = {"prediction_type": ["epsilon", "v_prediction", "sample", "flow_prediction"]}
FINAL = {"final_sigmas_type": ["zero", "sigma_min"]}
EDM = {
    "sigma_max": [80.0, 20.0],
    "sigma_data": [0.5, 1.0],
    "sigma_schedule": ["karras", "exponential"],
    "prediction_type": ["epsilon"] * 4 + ["v_prediction"],
    "rho": [7.0, 5.0],
}
FLOW = {
    "num_train_timesteps": [1000, 100],
    "shift": [1.0, 3.0],
    "family": FAMILIES,
    "use_dynamic_shifting": BOOL,
    "shift_terminal": [None, 0.1],
    "time_shift_type": ["exponential", "linear"],
    "invert_sigmas": [False] * 4 + [True],
}

OPTIONS: dict[Any, dict[str, list]] = {
    schedulers.DDIMScheduler: TABLE | CLIPPED | TERMINAL | {"set_alpha_to_one": BOOL},
    schedulers.DDPMScheduler: TABLE | CLIPPED | TERMINAL | {
        "variance_type": ["fixed_small", "fixed_large", "fixed_small_log", "fixed_large_log", "learned"],
    },
    schedulers.PNDMScheduler: TABLE | {"skip_prk_steps": BOOL, "set_alpha_to_one": BOOL},
    schedulers.LCMScheduler: TABLE | CLIPPED | TERMINAL | {
        "original_inference_steps": [50, 20], "timestep_scaling": [10.0, 1.0],
    },
    schedulers.TCDScheduler: TABLE | CLIPPED | TERMINAL | {"original_inference_steps": [50, 20]},
    schedulers.CogVideoXDDIMScheduler: TABLE | TERMINAL | {
        "snr_shift_scale": [3.0, 1.0], "set_alpha_to_one": BOOL, "clip_sample": BOOL,
    },
    schedulers.EulerDiscreteScheduler: TABLE | TERMINAL | FINAL | {
        "family": FAMILIES,
        "interpolation_type": ["linear"] * 5 + ["log_linear"],
        "timestep_type": ["discrete"] * 3 + ["continuous"],
        "sigma_max": [None, None, 10.0, 700.0],
    },
    schedulers.EulerAncestralDiscreteScheduler: TABLE | TERMINAL,
    schedulers.DPMSolverMultistepScheduler: TABLE | TERMINAL | FINAL | SOLVER | PREDICTIONS | {
        "family": [*FAMILIES, "use_lu_lambdas", "use_flow_sigmas"],
        "algorithm_type": ["dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"],
        "euler_at_final": BOOL,
        "lambda_min_clipped": [-float("inf")] * 3 + [-5.1],
    },
    schedulers.UniPCMultistepScheduler: TABLE | TERMINAL | FINAL | SOLVER | PREDICTIONS | {
        "family": [*FAMILIES, "use_flow_sigmas"],
        "solver_type": ["bh2", "bh1"],
        "predict_x0": [True, True, False],
    },
    schedulers.DEISMultistepScheduler: TABLE | SOLVER | PREDICTIONS | {"family": [*FAMILIES, "use_flow_sigmas"]},
    schedulers.EDMEulerScheduler: EDM | FINAL,
    schedulers.EDMDPMSolverMultistepScheduler: EDM | FINAL | {
        "solver_order": [1, 2], "algorithm_type": ["dpmsolver++", "sde-dpmsolver++"],
    },
    schedulers.FlowMatchEulerDiscreteScheduler: FLOW | {"stochastic_sampling": BOOL},
    FlowMatchLCMScheduler: FLOW | {"scale_factors": [None] * 4 + [[0.5]]},
    SCMScheduler: {"sigma_data": [0.5, 1.0]},
}  # fmt: skip


def combinations(cls) -> list[tuple[dict, int]]:
    """``EACH`` of the product, in which every value of every option is as often as it can be."""
    draw = random.Random(cls.__name__)
    columns = {}
    for option, values in {**OPTIONS[cls], "steps": STEPS}.items():
        columns[option] = [values[i % len(values)] for i in range(EACH)]
        draw.shuffle(columns[option])
    rows = [dict(zip(columns, row)) for row in zip(*columns.values())]
    for row in rows:
        if (family := row.pop("family", None)) is not None:
            row[family] = True
    return [({k: v for k, v in row.items() if v is not None and k != "steps"}, row["steps"]) for row in rows]


def first_order(scheduler) -> Any:
    """diffusers' scheduler of one step, made by this test itself."""
    cls, config = type(scheduler), scheduler.config
    if cls is schedulers.PNDMScheduler:
        return schedulers.DDIMScheduler.from_config(config, clip_sample=False)
    if cls is schedulers.UniPCMultistepScheduler:
        return made(cls.from_config, config=config, solver_order=1, disable_corrector=list(range(1000)))
    return made(cls.from_config, config=config, solver_order=1) if "solver_order" in config else cls.from_config(config)


def apart(scheduler, steps: int) -> float:
    """How far our chain ends from diffusers' loop."""
    z = noise(steps)
    end, sampling = ours(scheduler, z)
    several = scheduler.config.get("solver_order", 1) > 1 or type(scheduler) in (
        schedulers.PNDMScheduler,
        schedulers.UniPCMultistepScheduler,
    )
    assert (sampling.first_order is not None) == several, "a first-order form says so, and an exact one does not"
    expected = theirs(first_order(scheduler), z, **({"eta": 0.0} if "TCD" in type(scheduler).__name__ else {}))
    assert expected.isfinite().all()
    return float((end - expected).abs().max() / expected.abs().max().clamp(min=1))


def require_named(message: str, settings: dict) -> None:
    """A refusal is one line that says a setting, what was expected and nothing of Python's."""
    assert message.count("\n") == 0
    assert "expected" in message
    assert any(name in message for name in [*settings, "steps =", "variance_type"]), (message, settings)
    assert "<function" not in message


@pytest.mark.parametrize("cls", OPTIONS, ids=lambda cls: cls.__name__)
def test_the_product_of_options_is_diffusers_own_loop_or_refused_by_name(cls):
    diffusers.utils.logging.set_verbosity_error()
    followed = 0
    for settings, steps in combinations(cls):
        try:
            scheduler = made(cls, **settings)
        except (ValueError, NotImplementedError):
            continue  # the library itself refuses to make it
        try:
            gap = apart(scheduler, steps)
        except ConfigError as error:
            require_named(str(error), settings)
            continue
        followed += 1
        assert gap <= ALIKE, (settings, steps, gap)
    assert followed >= 3, "most refusals are of few options"


def test_every_reader_is_walked():
    assert {cls.__name__ for cls in OPTIONS} == set(READERS)


SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
XL = SD | {
    "interpolation_type": "linear", "sample_max_value": 1.0, "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1, "timestep_spacing": "leading", "trained_betas": None, "use_karras_sigmas": False,
}  # fmt: skip
WAN = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "predict_x0": True, "solver_type": "bh2"}
PUBLISHED: dict[str, tuple[str, dict, int, str, bool]] = {
    "SD 1.5": (
        "PNDM",
        SD | {"set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1},
        20,
        "DDIM(eta=0.0)",
        True,
    ),
    "SD 2.1": (
        "DDIM",
        SD | {"set_alpha_to_one": False, "steps_offset": 1, "prediction_type": "v_prediction", "skip_prk_steps": True},
        10,
        "DDIM(eta=0.0)",
        False,
    ),
    "SD 2.1, zero SNR": (
        "DDIM",
        SD | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        10,
        "DDIM(eta=0.0)",
        False,
    ),
    "SDXL": ("EulerDiscrete", XL, 20, "DDIM(eta=0.0)", False),
    "SDXL with zero SNR (NoobAI)": (
        "EulerDiscrete",
        XL | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        12,
        "DDIM(eta=0.0)",
        False,
    ),
    "SDXL Turbo": ("EulerAncestralDiscrete", XL | {"timestep_spacing": "trailing"}, 1, "DDIM(eta=1.0)", False),
    "SD Turbo": ("EulerDiscrete", XL | {"timestep_spacing": "trailing"}, 2, "DDIM(eta=0.0)", False),
    "SDXL Lightning": ("EulerDiscrete", XL | {"timestep_spacing": "trailing"}, 4, "DDIM(eta=0.0)", False),
    "Hyper-SD": ("TCD", XL | {"original_inference_steps": 50}, 4, "DDIM(eta=0.0)", False),
    "LCM": (
        "LCM",
        SD | {"original_inference_steps": 50, "set_alpha_to_one": True, "timestep_scaling": 10.0},
        4,
        "Renoise()",
        False,
    ),
    "DDPM (CIFAR)": (
        "DDPM",
        {"clip_sample": False, "variance_type": "fixed_large"},
        10,
        "DDPM(variance='large')",
        False,
    ),
    "SD3": ("FlowMatchEulerDiscrete", {"shift": 3.0}, 28, "DDIM(eta=0.0)", False),
    "FLUX dev": (
        "FlowMatchEulerDiscrete",
        {"base_image_seq_len": 256, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0, "use_dynamic_shifting": True},
        10,
        "DDIM(eta=0.0)",
        False,
    ),
    "FLUX schnell": (
        "FlowMatchEulerDiscrete",
        {"shift": 1.0, "use_dynamic_shifting": False},
        4,
        "DDIM(eta=0.0)",
        False,
    ),
    "AuraFlow": ("FlowMatchEulerDiscrete", {"shift": 1.73, "use_dynamic_shifting": False}, 20, "DDIM(eta=0.0)", False),
    "Sana": (
        "DPMSolverMultistep",
        {
            "flow_shift": 3.0,
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "solver_order": 2,
            "beta_schedule": "linear",
        },
        10,
        "DDIM(eta=0.0)",
        True,
    ),
    "Sana Sprint": ("SCM", {"sigma_data": 0.5}, 2, "Renoise()", False),
    "PixArt": (
        "DPMSolverMultistep",
        {"algorithm_type": "dpmsolver++", "lambda_min_clipped": -float("inf"), "solver_order": 2},
        20,
        "DDIM(eta=0.0)",
        True,
    ),
    "SDE of DPM++, Karras": (
        "DPMSolverMultistep",
        SD | {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
        20,
        "DDIM(eta=1.0)",
        True,
    ),
    "Playground 2.5": (
        "EDMDPMSolverMultistep",
        {"sigma_data": 0.5, "sigma_max": 80.0, "sigma_min": 0.002, "rho": 7.0, "solver_order": 2},
        10,
        "DDIM(eta=0.0)",
        True,
    ),
    "Playground 2.5, Euler": (
        "EDMEuler",
        {"sigma_data": 0.5, "sigma_max": 80.0, "sigma_min": 0.002},
        20,
        "DDIM(eta=0.0)",
        False,
    ),
    "Cosmos": (
        "EDMEuler",
        {"sigma_data": 0.5, "sigma_max": 80.0, "final_sigmas_type": "sigma_min"},
        10,
        "DDIM(eta=0.0)",
        False,
    ),
    "CogVideoX 2b": (
        "CogVideoXDDIM",
        {
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "snr_shift_scale": 3.0,
            "timestep_spacing": "trailing",
        },
        10,
        "DDIM(eta=0.0)",
        False,
    ),
    "Wan 2.1": ("UniPCMultistep", WAN | {"flow_shift": 3.0, "solver_order": 2}, 20, "DDIM(eta=0.0)", True),
    "UniPC on SD": ("UniPCMultistep", SD | {"solver_order": 2}, 20, "DDIM(eta=0.0)", True),
    "DEIS on SD": ("DEISMultistep", SD | {"solver_order": 3}, 20, "DDIM(eta=0.0)", True),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_read(name):
    short, config, steps, kernel, several = PUBLISHED[name]
    cls = SCMScheduler if short == "SCM" else getattr(schedulers, f"{short}Scheduler")
    scheduler = made(cls.from_config, config=config)
    assert apart(scheduler, steps) <= ALIKE
    sampling = read(scheduler, told)
    assert (sampling.kernel, sampling.first_order is not None) == (kernel, several)
    assert "eta=0.0" not in sampling.explore


@pytest.mark.parametrize("cls", OPTIONS, ids=lambda cls: cls.__name__)
def test_an_option_that_is_not_followed_must_have_its_default(cls):
    """What a reader does not name, of this version of diffusers or of another, is refused by name."""
    quiet = {n: False for n in ("clip_sample", "thresholding") if n in inspect.signature(cls.__init__).parameters}
    held = {"set_alpha_to_one", "clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value"}
    for option, parameter in inspect.signature(cls.__init__).parameters.items():
        if option in ("self", *READERS[cls.__name__].follows, *held):
            continue
        scheduler = made(cls, **quiet)
        for changed in ("other", 0.123, [0.5], not parameter.default):
            scheduler.register_to_config(**{option: changed})
            if changed or parameter.default:
                if (changed or None) == (quiet.get(option, parameter.default) or None):
                    continue
                with pytest.raises(ConfigError, match=f"{option} = .*expected"):
                    read(scheduler, told)
    scheduler = made(cls, **quiet)
    scheduler.register_to_config(invented_next_year=0.3, skip_prk_steps=True, invented_and_off=None, _private=1)
    with pytest.raises(ConfigError, match=r"invented_next_year = 0.3.*does not know"):
        read(scheduler, told)


@pytest.mark.parametrize("name", REFUSED)
def test_other_published_schedulers_are_refused_with_the_reason(name):
    scheduler = type(name, (), {"config": {}})()
    with pytest.raises(ConfigError, match=f"{name}.*is not read: .*expected"):
        read(scheduler, told)


REFUSALS = {
    "LCM with 60 steps": (schedulers.LCMScheduler(), 60, r"steps = 60.*original_inference_steps = 50.*at most 50"),
    "dynamic shift without mu": (
        schedulers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        4,
        "`mu` must be.*use_dynamic_shifting",
    ),
    "a grid of one step that is NaN": (
        schedulers.FlowMatchEulerDiscreteScheduler(shift=3.0, shift_terminal=0.1),
        1,
        "steps = 1.*shift_terminal.*not finite",
    ),
    "no steps": (schedulers.DDIMScheduler(clip_sample=False), 0, "steps = 0: expected at least 1"),
    "more than there are": (schedulers.DDIMScheduler(clip_sample=False), 1001, "steps = 1001.*cannot be larger"),
    "a time beyond the last": (
        schedulers.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1),
        1000,
        r"steps_offset = 1.*not in \[0, 1\]",
    ),
    "DDIM between its times": (
        schedulers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing"),
        30,
        "timestep_spacing.*T // steps = 33.*divide T",
    ),
    "sigmas beyond the table": (
        schedulers.EulerDiscreteScheduler(use_karras_sigmas=True, sigma_max=700.0),
        4,
        "sigma_max = 700.0.*leave its table",
    ),
    "no signal": (
        schedulers.DDIMScheduler(clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="trailing"),
        4,
        "prediction_type = epsilon.*rescale_betas_zero_snr",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_errors_on_the_way_are_refusals_that_name_the_setting(name):
    scheduler, steps, message = REFUSALS[name]
    with pytest.raises(ConfigError, match=message) as caught:
        read(scheduler, plain_grid({}, ())).times(steps)
    assert "\n" not in str(caught.value)


def test_the_first_order_of_the_sde_in_eps_is_refused():
    """It was once read as DDIM(eta=1.0), and is 43 % off that."""
    scheduler = made(
        schedulers.DPMSolverMultistepScheduler,
        algorithm_type="sde-dpmsolver", solver_order=1, final_sigmas_type="sigma_min",
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"algorithm_type = sde-dpmsolver is not read.*sde-dpmsolver\+\+"):
        read(scheduler, told)


@pytest.mark.parametrize("planted", ["result", "input", "time", "start"])
def test_a_step_that_another_version_would_make_otherwise_is_caught(planted, monkeypatch):
    """A change by 1 % in what a scheduler does, of which its settings say nothing."""
    cls = schedulers.EulerDiscreteScheduler
    step, scaled, grid = cls.step, cls.scale_model_input, cls.set_timesteps

    def stepped(self, y, *rest, **settings):
        return step(self, 1.01 * y, *rest, **settings)

    def shifted(self, *rest, **settings):
        grid(self, *rest, **settings)
        self.timesteps = self.timesteps + 1

    if planted == "result":
        monkeypatch.setattr(cls, "step", stepped)
    elif planted == "input":
        monkeypatch.setattr(cls, "scale_model_input", lambda self, x, t: 1.01 * scaled(self, x, t))
    elif planted == "time":
        monkeypatch.setattr(cls, "set_timesteps", shifted)
    else:
        monkeypatch.setattr(cls, "init_noise_sigma", 14.0)
    with pytest.raises(ConfigError, match=r"EulerDiscreteScheduler, steps = 4.*(off DDIM|begins with noise|not in)"):
        read(made(cls.from_config, config=SD), told).times(4)


def test_times_are_made_once_and_given_out_as_copies(monkeypatch):
    sampling = read(schedulers.DDIMScheduler(clip_sample=False), told)
    first = sampling.times(5)
    monkeypatch.setattr(schedulers.DDIMScheduler, "set_timesteps", None)
    first.zero_()
    assert torch.equal(sampling.times(5)[[0, -1]], torch.tensor([0.801, 0.0], dtype=torch.float64))


def of_file(folder: Path, name: str, **config: Any) -> Any:
    """The scheduler of a pipeline's folder, read as a pipeline's is."""
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / hub.INDEX).write_text(json.dumps({"scheduler": ["diffusers", name]}))
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": name, **config}))
    return hub.scheduler(folder)


WRONG: dict[type, list[Any]] = {
    bool: ["yes", "no", "", 1, 2, 0.0, [], {}],
    int: ["1", 1.5, True, None, [1], float("nan")],
    float: ["0.1", True, None, [0.1], float("nan"), {}],
    str: [3, None, True, ["x"], 0.5],
    type(None): ["x"],
}
"""What no setting is, by the kind of its default."""


@pytest.mark.parametrize("cls", sorted(READERS))
def test_a_setting_of_another_kind_is_refused_by_name(cls, tmp_path):
    parameters = inspect.signature(getattr(diffusers, cls).__init__).parameters.values()
    tried = 0
    for parameter in parameters:
        wrong = WRONG.get(type(parameter.default), []) if parameter.name != "self" else []
        if parameter.default is None and "str" in str(parameter.annotation):
            continue
        for value in wrong:
            tried += 1
            with pytest.raises(ConfigError, match=f"{parameter.name} = .*: expected ") as caught:
                of_file(tmp_path, cls, **{parameter.name: value})
            assert "\n" not in str(caught.value)
    assert tried >= 10


EXTREMES: dict[str, list[Any]] = {
    "num_train_timesteps": [0, -5, 10**8],
    "beta_start": [0, -1e-3, 1.0, 1e300],
    "beta_end": [0, -1, 1e300],
    "trained_betas": [[], [2.0] * 1000],
    "rho": [0, -1],
    "sigma_data": [0, -1],
    "sigma_min": [0, -1, 1e9],
    "sigma_max": [0, -1],
    "shift": [0, -1, 1e300],
    "steps_offset": [10**9],
    "original_inference_steps": [0, -1],
}


@pytest.mark.parametrize("cls", sorted(READERS))
def test_extremes_are_read_with_finite_levels_or_refused_in_one_line(cls, tmp_path):
    for name in EXTREMES.keys() & set(inspect.signature(getattr(diffusers, cls).__init__).parameters):
        for value in EXTREMES[name]:
            try:
                sampling = read(of_file(tmp_path, cls, **{name: value}), plain_grid({}, ()))
                times = sampling.times(4)
            except ConfigError as error:
                assert "\n" not in str(error)  # noqa: PT017 - either way is right
                continue
            assert bool((times.diff() < 0).all()), (name, value)
            assert 0 <= times[-1] <= times[0] <= 1
            assert all(bool(part.isfinite().all()) for part in sampling.schedule(times[:-1])), (name, value)


def test_settings_as_they_are_published_fit(tmp_path):
    of_file(tmp_path, "EulerDiscreteScheduler", use_karras_sigmas=False, sigma_min=None, trained_betas=None)
    of_file(tmp_path, "DDIMScheduler", rescale_betas_zero_snr=None)  # older files have null for a switch
    of_file(tmp_path, "DPMSolverMultistepScheduler", lambda_min_clipped=-float("inf"), solver_p=None, beta_end=1)
    of_file(tmp_path, "FlowMatchEulerDiscreteScheduler", shift=3, unknown_key="kept for the reader")


def test_settings_that_diffusers_itself_refuses_are_one_line(tmp_path):
    config = {"algorithm_type": "dpmsolver", "final_sigmas_type": "zero"}
    with pytest.raises(ConfigError, match=r"scheduler_config.json.*final_sigmas_type.*expected settings") as caught:
        of_file(tmp_path, "DPMSolverMultistepScheduler", **config)
    assert "\n" not in str(caught.value)
