"""Guidance settings that carry diffusers' names mean what they mean there, over their range, in every family."""

from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from tiny_pipelines import (
    MAKERS,
    NEGATIVES,
    PROMPTS,
    SCALED,
    SD15,
    about,
    agree,
    flux,
    stable_diffusion,
    stable_diffusion_xl,
)

from rlfusion.common.errors import ConfigError
from rlfusion.diffusion.chain import Chain
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.sampling import sample
from rlfusion.models import pipelines
from rlfusion.models.pipelines import Whole

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

STEPS = 2
FURTHER: dict[str, Callable] = {
    "sd2": lambda: stable_diffusion(DDIMScheduler(**SD15, prediction_type="v_prediction")),
    "sd, distilled": lambda: stable_diffusion(time_cond_proj_dim=8),
    "turbo": lambda: stable_diffusion_xl(EulerAncestralDiscreteScheduler(**SCALED, timestep_spacing="trailing")),
    "sdxl, lcm": lambda: stable_diffusion_xl(LCMScheduler(), time_cond_proj_dim=8),
    "schnell": lambda: flux(FlowMatchEulerDiscreteScheduler(shift=1.0), guidance=False),
}
CARDS = {
    "sd": (7.5,), "sd2": (7.5, 9.0), "sd, distilled": (7.5,), "lcm": (8.5, 8.0), "sdxl": (5.0,), "turbo": (5.0, 0.0),
    "sdxl, lcm": (5.0, 8.0), "sd3": (7.0, 3.5, 0.0), "flux": (3.5, 50.0), "schnell": (3.5, 0.0), "sana": (4.5, 5.0),
}  # fmt: skip
"""The default of each pipeline's call, and values of model cards."""

SCALES = (0.0, 0.5, 1.0, 1.5)
ONE_ANSWER = ("flux", "schnell", "lcm", "sd, distilled", "sdxl, lcm")
READS = ("flux", "lcm", "sd, distilled", "sdxl, lcm")
TWO_ANSWERS = [name for name in CARDS if name not in ONE_ANSWER]


def told(folder, name: str) -> dict:
    return about(folder, side=32 if name == "sana" else 16, negatives=["", ""] if name in ONE_ANSWER else NEGATIVES)


@pytest.fixture(scope="module")
def folders(tiny_pipelines, tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("further")
    for name, make in FURTHER.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            make().save_pretrained(root / name)
    return tiny_pipelines | {name: root / name for name in FURTHER}


@pytest.fixture(scope="module")
def pair(folders) -> Callable[[str], tuple[Denoiser, Whole]]:
    """Both sides of a family, made once."""
    made = {}

    def get(name: str) -> tuple[Denoiser, Whole]:
        if name not in made:
            settings = told(folders[name], name)
            made[name] = pipelines.build(settings, PROMPTS), Whole(settings)
        return made[name]

    return get


def both(sides: tuple[Denoiser, Whole], **guidance) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of the two prompts from one and the same noise: ours, and the pipeline's."""
    denoiser, whole = sides
    shape = denoiser.space.latent((3, whole.about["side"], whole.about["side"]))
    z = torch.randn(1, STEPS + 1, *shape, generator=torch.Generator().manual_seed(1)).repeat(2, 1, 1, 1, 1)
    chain = Chain(steps=STEPS, spacing="model", kernel=denoiser.own.sampling.kernel, **guidance)
    ours = sample(chain.policy(denoiser, PROMPTS), z, chain.times(denoiser), torch.arange(2))
    return ours, whole.latents(PROMPTS, [0, 1], z, **guidance)


@pytest.mark.parametrize("name", CARDS)
def test_a_guidance_scale_is_that_of_diffusers_over_its_range(name, pair):
    assert CARDS.keys() == MAKERS.keys() | FURTHER.keys(), "every family"
    assert CARDS[name][0] == pair(name)[1].known["guidance_scale"].default
    ends = {}
    for scale in sorted({*SCALES, *CARDS[name]}):
        ours, theirs = both(pair(name), guidance_scale=scale)
        agree(ours, theirs)
        assert (ours[0] - ours[1]).abs().max() > 1e-3, "the prompt is heard"
        ends[scale] = ours
    acts = [scale for scale in ends if not torch.equal(ends[scale], ends[1.0])]
    expected = {"schnell": []} | {read: [s for s in ends if s != 1] for read in READS}
    assert acts == expected.get(name, [s for s in ends if s > 1])


@pytest.mark.parametrize("name", TWO_ANSWERS)
def test_a_rescale_is_that_of_diffusers_over_its_range(name, pair):
    denoiser, whole = pair(name)
    for rescale in (0.3, 1.0):
        chain = Chain(steps=STEPS, guidance_scale=7.5, guidance_rescale=rescale)
        assert chain.policy(denoiser, PROMPTS).denoiser.rescale == rescale
        if "guidance_rescale" in whole.known:
            agree(*both((denoiser, whole), guidance_scale=7.5, guidance_rescale=rescale))


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 1.0, 1.001, 7.5])
def test_two_answers_are_combined_above_one_and_an_input_is_always_given(scale, pair):
    """do_classifier_free_guidance is guidance_scale > 1."""
    chain = Chain(guidance_scale=scale)
    assert chain.weight == (scale - 1 if scale > 1 else 0)
    assert chain.told == scale - 1
    assert chain.policy(pair("lcm")[0], PROMPTS).denoiser.denoiser.weight == scale - 1


@pytest.mark.parametrize("name", ONE_ANSWER)
@pytest.mark.parametrize("settings", [{"guidance_rescale": 0.5}, {"guidance_low": 0.1}, {"negative": "dark"}])
def test_settings_of_two_answers_are_refused_where_there_is_one(name, settings, pair):
    with pytest.raises(ConfigError, match=r"guidance_rescale, .*no second answer, expected none of them"):
        Chain(guidance_scale=4.0, **settings).policy(pair(name)[0], PROMPTS)


def test_the_handbooks_weight_is_its_own_and_refused_where_nothing_reads_it(pair):
    """guidance = w extrapolates below 0 as well, which diffusers does not; a model without guidance takes 0 alone."""
    sd, schnell = pair("sd")[0], pair("schnell")[0]
    assert Chain(guidance=-0.5).policy(sd, PROMPTS).denoiser.weight == -0.5
    assert Chain().policy(schnell, PROMPTS).denoiser is schnell
    with pytest.raises(ConfigError, match=r"guidance = -1.0: this model reads no guidance weight.*expected 0"):
        Chain(guidance=-1.0).policy(schnell, PROMPTS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["guidance", "guidance_scale"])
def test_numbers_that_are_none_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name} = {value}: expected a finite number"):
        Chain(**{name: value})


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("settings", [{"guidance_rescale": 0.5}, {"guidance_high": 0.9}, {"negative": "dark"}])
def test_without_guidance_its_settings_are_refused_with_the_scale_that_acts(scale, settings):
    with pytest.raises(ConfigError, match="there is no guidance, expected guidance_scale above 1"):
        Chain(guidance_scale=scale, **settings)
