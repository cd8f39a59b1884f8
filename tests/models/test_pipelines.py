"""Pretrained pipelines: our sampler against the pipeline's own, for each family and each scheduler, on tiny models."""

import json
import os
import shutil
from collections.abc import Callable

import diffusers
import pytest
import torch
from diffusers import schedulers
from tiny_pipelines import (
    MAKERS,
    NEGATIVES,
    PROMPTS,
    SCALED,
    SD15,
    SIDE,
    about,
    agree,
    stable_diffusion,
    stable_diffusion_xl,
    vae,
)

from rlfusion import models
from rlfusion.cli.arguments import settings_of
from rlfusion.common.errors import ConfigError
from rlfusion.diffusion.chain import Chain
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.kinds import Timed
from rlfusion.diffusion.sampling import sample
from rlfusion.diffusion.schedule import Between, Rectified, ScaledLinear, SquaredCosine, UnitPrior, ZeroSNR, prior_std
from rlfusion.jobs.memory import kept
from rlfusion.models import pipelines
from rlfusion.models.pipelines import flux, hub
from rlfusion.models.pipelines.family import plain_grid
from rlfusion.models.pipelines.model import Published, _cached
from rlfusion.models.pipelines.scheduler import read

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


SCALE, STEPS = 3.0, 4


@pytest.fixture(scope="session")
def denoisers(tiny_pipelines) -> dict[str, Denoiser]:
    return {name: pipelines.build(about(folder), PROMPTS) for name, folder in tiny_pipelines.items()}


@pytest.fixture(scope="session")
def loaded(tiny_pipelines) -> dict[str, diffusers.DiffusionPipeline]:
    found = {name: diffusers.DiffusionPipeline.from_pretrained(folder) for name, folder in tiny_pipelines.items()}
    for pipe in found.values():
        pipe.set_progress_bar_config(disable=True)
    return found


def noise(denoiser, side: int, steps: int = STEPS) -> torch.Tensor:
    shape = denoiser.space.latent((3, side, side))
    return torch.randn(2, steps + 1, *shape, generator=torch.Generator().manual_seed(1))


def ours(denoiser, z, kernel: str = "", scale: float = SCALE) -> torch.Tensor:
    kernel = kernel or denoiser.own.sampling.kernel
    chain = Chain(steps=z.shape[1] - 1, spacing="model", kernel=kernel, guidance_scale=scale)
    return sample(chain.policy(denoiser, PROMPTS), z, chain.times(denoiser), torch.arange(2))


@torch.no_grad()
def theirs(pipe, z, side: int, scale: float = SCALE, **settings) -> torch.Tensor:
    """What the pipeline itself makes of the same noise."""
    packed = isinstance(pipe, diffusers.FluxPipeline)
    if not isinstance(pipe, diffusers.FluxPipeline | diffusers.LatentConsistencyModelPipeline):
        settings["negative_prompt"] = NEGATIVES
    if isinstance(pipe, diffusers.SanaPipeline):
        settings["use_resolution_binning"] = False
    start = z[:, 0].clone()
    made = pipe(
        PROMPTS, height=side, width=side, num_inference_steps=z.shape[1] - 1, guidance_scale=scale,
        latents=flux.pack(start) if packed else start, output_type="latent", **settings,
    ).images  # fmt: skip
    return flux.unpack(made, start) if packed else made


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "sana"])
def test_our_sampler_ends_where_the_pipelines_own_does(name, denoisers, loaded):
    side, denoiser = SIDE.get(name, 16), denoisers[name]
    z = noise(denoiser, side)
    expected = theirs(loaded[name], z, side)
    agree(ours(denoiser, z), expected)
    swapped = ours(denoiser, z, scale=1.0)
    assert (swapped - expected).abs().max() > 1e-3, "guidance acts"
    agree(swapped, theirs(loaded[name], z, side, 1.0))


def following(pipe, denoiser, scheduler, monkeypatch=None, z=None) -> tuple[Denoiser, diffusers.DiffusionPipeline]:
    """The tiny Stable Diffusion with another scheduler, on both sides; ``z`` is the noise that theirs draws."""
    sampling, given = read(scheduler, plain_grid({}, ())), dict(scheduler.config)
    if isinstance(scheduler, schedulers.FlowMatchEulerDiscreteScheduler):
        scheduler.init_noise_sigma = 1.0  # which this pipeline asks for
    other = Denoiser(denoiser.net, sampling.schedule, sampling.kind)
    other.space, other.own = denoiser.space, Published(sampling, denoiser.own.conditions)
    if monkeypatch is not None:
        drawn = iter(z.transpose(0, 1)[1:])
        monkeypatch.setattr(f"{type(scheduler).__module__}.randn_tensor", lambda *_, **__: next(drawn))
    walked = diffusers.StableDiffusionPipeline(**{**pipe.components, "scheduler": scheduler})
    walked.set_progress_bar_config(disable=True)
    scheduler.register_to_config(**given)  # the pipeline means it well with old settings
    return other, walked


SCHEDULERS: dict[str, Callable] = {
    "ddim": lambda: schedulers.DDIMScheduler(**SD15),
    "ddim to clean data": lambda: schedulers.DDIMScheduler(**{**SD15, "set_alpha_to_one": True, "steps_offset": 0}),
    "ddim, linear betas, x0": lambda: schedulers.DDIMScheduler(clip_sample=False, prediction_type="sample"),
    "ddim, cosine betas": lambda: schedulers.DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False),
    "ddim, v, zero SNR, trailing": lambda: schedulers.DDIMScheduler(
        **{**SD15, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    ),
    "euler": lambda: schedulers.EulerDiscreteScheduler(**SCALED),
    "euler, leading": lambda: schedulers.EulerDiscreteScheduler(**SCALED, timestep_spacing="leading", steps_offset=1),
    "euler, trailing, v": lambda: schedulers.EulerDiscreteScheduler(
        **SCALED, timestep_spacing="trailing", prediction_type="v_prediction"
    ),
    "euler, Karras": lambda: schedulers.EulerDiscreteScheduler(**SCALED, use_karras_sigmas=True),
    "euler, exponential": lambda: schedulers.EulerDiscreteScheduler(**SCALED, use_exponential_sigmas=True),
    "dpm, one step": lambda: schedulers.DPMSolverMultistepScheduler(**SCALED, solver_order=1),
    "dpm, one step, Karras": lambda: schedulers.DPMSolverMultistepScheduler(
        **SCALED, solver_order=1, use_karras_sigmas=True
    ),
    "dpm, one step, flow": lambda: schedulers.DPMSolverMultistepScheduler(
        solver_order=1, use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
    ),
    "flow": lambda: schedulers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow, Karras": lambda: schedulers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_karras_sigmas=True),
    "flow, shift to a terminal": lambda: schedulers.FlowMatchEulerDiscreteScheduler(shift=3.0, shift_terminal=0.1),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_without_noise_is_followed(name, denoisers, loaded):
    denoiser, pipe = following(loaded["sd"], denoisers["sd"], SCHEDULERS[name]())
    z = noise(denoiser, 16)
    agree(ours(denoiser, z), theirs(pipe, z, 16))


NOISY: dict[str, Callable] = {
    "ancestral euler": lambda: schedulers.EulerAncestralDiscreteScheduler(**SCALED),
    "ancestral euler, trailing": lambda: schedulers.EulerAncestralDiscreteScheduler(
        **SCALED, timestep_spacing="trailing"
    ),
    "ddpm": lambda: schedulers.DDPMScheduler(**SCALED, clip_sample=False),
    "ddpm, large variance": lambda: schedulers.DDPMScheduler(**SCALED, clip_sample=False, variance_type="fixed_large"),
    "lcm": lambda: schedulers.LCMScheduler(),
    "dpm, one step of the SDE": lambda: schedulers.DPMSolverMultistepScheduler(
        **SCALED, solver_order=1, algorithm_type="sde-dpmsolver++"
    ),
    "flow, noised again": lambda: schedulers.FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True),
}


@pytest.mark.parametrize("name", NOISY)
def test_a_scheduler_with_noise_is_followed_on_the_same_noise(name, denoisers, loaded, monkeypatch):
    scheduler = NOISY[name]()
    z = noise(denoisers["sd"], 16)
    denoiser, pipe = following(loaded["sd"], denoisers["sd"], scheduler, monkeypatch, z)
    agree(ours(denoiser, z), theirs(pipe, z, 16))


def test_a_latent_consistency_model_reads_the_guidance_weight(denoisers, loaded, monkeypatch):
    pipe, denoiser = loaded["lcm"], denoisers["lcm"]
    z = noise(denoiser, 16)
    drawn = []
    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *_, **__: drawn.pop(0))
    for scale in (1.0, 8.5):
        drawn[:] = list(z.transpose(0, 1)[1:])
        agree(ours(denoiser, z, scale=scale), theirs(pipe, z, 16, scale))


def test_the_multistep_scheduler_of_stable_diffusion_is_walked_by_single_steps(denoisers, loaded):
    pndm = schedulers.PNDMScheduler(**SCALED, set_alpha_to_one=False, steps_offset=1, skip_prk_steps=True)
    denoiser, pipe = following(loaded["sd"], denoisers["sd"], pndm)
    pipe.scheduler = schedulers.DDIMScheduler.from_config(pndm.config, clip_sample=False)
    z = noise(denoiser, 16)
    agree(ours(denoiser, z), theirs(pipe, z, 16))


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (lambda: schedulers.HeunDiscreteScheduler(), "'HeunDiscreteScheduler' is not read.*EulerDiscreteScheduler"),
        (lambda: schedulers.RePaintScheduler(), "unknown scheduler 'RePaintScheduler'.*mean 'PNDMScheduler'"),
        (lambda: schedulers.DDIMScheduler(), "clip_sample = True.*expected False"),
        (lambda: schedulers.DDIMScheduler(clip_sample=False, trained_betas=[0.1, 0.2]), "trained_betas"),
        (lambda: schedulers.DDPMScheduler(clip_sample=False, variance_type="learned"), "variance_type.*'learned'"),
        (lambda: schedulers.EulerDiscreteScheduler(interpolation_type="log_linear"), "interpolation_type"),
        (
            lambda: schedulers.EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
            "timestep_type = continuous",
        ),
        (lambda: schedulers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas"),
    ],
)
def test_what_is_not_followed_is_refused_by_name(scheduler, message):
    with pytest.raises(ConfigError, match=message):
        read(scheduler(), plain_grid({}, ()))


def test_prompts_are_encoded_alone_and_once(tiny_pipelines, tmp_path, monkeypatch):
    folder = tiny_pipelines["sd"]
    first = pipelines.build(about(folder, cache=str(tmp_path)), PROMPTS)
    alone = pipelines.build(about(folder, negatives=["dark"]), PROMPTS[:1])
    label = torch.tensor([0])
    assert torch.equal(
        first.net.conditions(label, torch.float32)["text"], alone.net.conditions(label, torch.float32)["text"]
    )
    monkeypatch.setattr("rlfusion.models.pipelines.model._encode", None)
    again = pipelines.build(about(folder, cache=str(tmp_path)), PROMPTS)
    assert again.net.conditions.table.keys() == first.net.conditions.table.keys()
    assert all(torch.equal(t, again.net.conditions.table[n]) for n, t in first.net.conditions.table.items())
    assert len(list(tmp_path.iterdir())) == 1


def test_embeddings_are_encoded_again_when_what_encodes_has_changed(tiny_pipelines, tmp_path):
    folder = shutil.copytree(tiny_pipelines["sd"], tmp_path / "sd")
    family, weights = hub.family(folder), folder / "text_encoder" / "model.safetensors"

    def key(**settings):
        return _cached(folder, family, about(folder, cache=str(tmp_path), **settings), PROMPTS)

    seen = [key(), key(variant="fp16"), key(dtype="bfloat16"), key(side=32), key(negatives=["", ""])]
    assert key() == seen[0]
    stat, held = weights.stat(), bytearray(weights.read_bytes())
    held[-1] ^= 1
    weights.write_bytes(held)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    seen.append(key())
    index = folder / hub.INDEX  # where SDXL says that no negative prompt means zeros
    index.write_text(json.dumps(json.loads(index.read_text()) | {"force_zeros_for_empty_prompt": False}))
    seen.append(key())
    assert len(set(seen)) == len(seen)


def test_schedules_of_pipelines_keep_their_levels():
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    for base in (ScaledLinear(), SquaredCosine(), ZeroSNR("ScaledLinear()")):
        held, wrapped = base(t), UnitPrior(base)(t)
        assert all(torch.equal(a, b) for a, b in zip(held, wrapped))
        assert prior_std(UnitPrior(base), t.flip(0)) == 1.0
    assert prior_std(ScaledLinear(), t.flip(0)) == pytest.approx(0.99766, abs=1e-5)
    between = torch.tensor([0.0105, 0.3337, 0.9999], dtype=torch.float64)
    for linear in ("sigma", "log_sigma"):
        schedule = Between(ScaledLinear(), linear)
        assert all(torch.equal(a[1:], b[1:]) for a, b in zip(schedule(t), ScaledLinear()(t)))
        l = schedule(between)
        torch.testing.assert_close(l.alpha**2 + l.sigma**2, torch.ones(3, dtype=torch.float64))
        k = between * 1000
        low, high = (ScaledLinear()(end / 1000) for end in (k.floor(), k.ceil()))
        u, (v, w) = l.sigma / l.alpha, (end.sigma / end.alpha for end in (low, high))
        share = k - k.floor()
        expected = v + share * (w - v) if linear == "sigma" else (v.log() + share * (w.log() - v.log())).exp()
        torch.testing.assert_close(u, expected)
        h = 1e-7
        ahead, behind = schedule(between + h), schedule(between - h)
        torch.testing.assert_close(l.d_alpha, (ahead.alpha - behind.alpha) / (2 * h), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(l.d_sigma, (ahead.sigma - behind.sigma) / (2 * h), rtol=1e-5, atol=1e-6)


def test_a_network_counts_time_in_its_own_units():
    t = torch.tensor([1.0, 0.9996, 0.5], dtype=torch.float64)
    l = Rectified()(t)
    from rlfusion.diffusion.parameterization import named

    kind = Timed(named("flow"), 1000, -1.0)
    torch.testing.assert_close(kind.time(t, l), torch.tensor([999.0, 998.6, 499.0], dtype=torch.float64))
    assert Timed(named("flow"), 1000, whole="floor").time(t, l).tolist() == [1000, 999, 500]
    assert Timed(named("flow"), 1000, whole="round").time(t, l).tolist() == [1000, 1000, 500]
    assert kind.row(l) == named("flow").row(l)


@pytest.mark.parametrize("name", ["euler, Karras", "euler, exponential", "dpm, one step, Karras"])
def test_levels_between_the_times_of_the_table_are_the_schedulers(name):
    scheduler = SCHEDULERS[name]()
    sampling = read(scheduler, plain_grid({}, ()))
    times = sampling.times(9)
    scheduler.set_timesteps(9)
    l = sampling.schedule(times[:-1])
    assert ((times[1:-1] * 1000) % 1 > 0.01).any(), "there are such times"
    torch.testing.assert_close(l.sigma / l.alpha, scheduler.sigmas[:-1].double(), rtol=3e-4, atol=0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            '{"_class_name": ["mine", "Mine"], "scheduler": ["diffusers", "DDIMScheduler"]}',
            r"unknown pipeline .\['mine'",
        ),
        ('{"_class_name": "StableDiffusionPipeline"}', r"names the scheduler None: expected \[library, class\]"),
        ("{", "cannot be read"),
        ("7", "cannot be read"),
    ],
)
def test_an_index_that_cannot_be_followed_is_refused(text, said, tmp_path):
    (tmp_path / hub.INDEX).write_text(text)
    with pytest.raises(ConfigError, match=said):
        _ = hub.family(tmp_path), hub.scheduler(tmp_path)


@pytest.mark.parametrize("name", ["sd", "sana"])
def test_the_encoder_stays_where_it_is_until_something_is_encoded(name, tiny_pipelines):
    space = pipelines.build(about(tiny_pipelines[name]), PROMPTS).space
    images = space.decode(torch.empty(2, space.channels, 8, 8, device="meta"))
    assert images.device.type == "meta"
    encoder = {p.device.type for p in space.vae.encoder.parameters()}
    assert encoder == {"cpu"}
    assert {p.device.type for p in space.vae.decoder.parameters()} == {"meta"}
    space.encode(torch.empty(1, 3, 16, 16, device="meta"))
    assert {p.device.type for p in space.vae.parameters()} == {"meta"}


def test_an_autoencoder_decodes_in_the_precision_that_it_is_told(tiny_pipelines):
    whole, half = (
        pipelines.build(about(tiny_pipelines["sd"], vae_dtype=dtype), PROMPTS).space
        for dtype in ("float32", "bfloat16")
    )
    torch.manual_seed(0)
    z = torch.randn(3, 4, 8, 8)
    assert {p.dtype for p in half.vae.decoder.parameters()} == {torch.bfloat16}
    images, leaf = half.decode(z), z.clone().requires_grad_()
    assert images.dtype == torch.float32
    assert not torch.equal(images, whole.decode(z))
    torch.testing.assert_close(images, whole.decode(z), rtol=0, atol=0.03)
    half.decode(leaf).mean().backward()
    assert bool(leaf.grad.any())
    assert torch.equal(half.encode(images), whole.encode(images))


def test_an_autoencoder_can_make_its_activations_again(tiny_pipelines):
    """To the same bits, with less kept for the backward pass."""
    gradients, held = [], []
    for again in (False, True):
        space = pipelines.build(about(tiny_pipelines["sd"], checkpointing=again, decode=3), PROMPTS).space
        z = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        held.append(kept(lambda space=space, z=z: space.decode(z), space.vae))
        space.decode(z).square().mean().backward()
        gradients.append(z.grad)
    assert gradients[0].any()
    assert torch.equal(*gradients)
    assert 2 * held[1] < held[0]


def test_an_autoencoder_that_overflows_in_half_precision_is_refused(tmp_path):
    torch.manual_seed(0)
    pipe = stable_diffusion_xl()
    pipe.register_modules(vae=vae(force_upcast=True))
    pipe.save_pretrained(tmp_path / "sdxl")
    with pytest.raises(ConfigError, match=r"vae_dtype = float16.*expected bfloat16"):
        pipelines.build(about(tmp_path / "sdxl", vae_dtype="float16"), PROMPTS)


def test_means_and_stds_of_channels_are_undone_as_the_pipeline_does(tmp_path):
    """Those of a Stable Diffusion XL; another family's pipeline would ignore them, and is refused."""
    each = {"latents_mean": [0.1, -0.4, 1.0, 0.0], "latents_std": [1.5, 0.5, 2.0, 1.0]}
    torch.manual_seed(0)
    pipe = stable_diffusion_xl()
    pipe.register_modules(vae=vae(**each))
    pipe.save_pretrained(tmp_path / "sdxl")
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "sdxl")
    pipe.set_progress_bar_config(disable=True)
    z = torch.randn(1, 4, 8, 8)
    call = {"num_inference_steps": 2, "height": 16, "width": 16, "latents": z}
    latents, image = (pipe("a cat", **call, output_type=kind).images for kind in ("latent", "pt"))
    space = pipelines.build(about(tmp_path / "sdxl"), PROMPTS).space
    torch.testing.assert_close(space.decode(latents), image, rtol=1e-4, atol=1e-5)
    x = 2 * image - 1
    code = space.vae.encode(x).latent_dist.mode()
    torch.testing.assert_close(
        space.encode(x)[0, 2], (code[0, 2] - 1.0) * space.vae.config["scaling_factor"] / 2.0, rtol=1e-4, atol=1e-5
    )
    pipe = stable_diffusion()
    pipe.register_modules(vae=vae(**each))
    pipe.save_pretrained(tmp_path / "sd")
    with pytest.raises(ConfigError, match=r"latents_mean = \[0.1, -0.4, 1.0, 0.0\].*expected null"):
        pipelines.build(about(tmp_path / "sd"), PROMPTS)


@pytest.mark.parametrize("name", ["flux", "lcm"])
def test_negative_prompts_that_no_network_reads_are_refused(name, tiny_pipelines):
    with pytest.raises(ConfigError, match=r"negative = 'blurred'.*expected none"):
        pipelines.build(about(tiny_pipelines[name], negatives=["", "blurred"]), PROMPTS)


@pytest.mark.parametrize("name", MAKERS)
def test_every_adapter_has_a_gradient_and_it_is_the_slope(name, tiny_pipelines):
    """<y, r> of a random r, along a random direction of all of them, by central differences in float64."""
    denoiser = pipelines.build(about(tiny_pipelines[name]), PROMPTS)
    card = models.Card(models.Config(), (3, 16, 16), tuple(PROMPTS), pipeline={"dtype": "float32"})
    models.adapt(denoiser, card, "LoRA(rank=2)")
    net, draw = denoiser.net.double(), torch.Generator().manual_seed(0)
    net.dtype = torch.float64
    held = {n: p for n, p in net.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for p in held.values():
            p.copy_(0.3 * torch.randn(p.shape, generator=draw, dtype=p.dtype))
    side = 16 if name == "sana" else 8
    x = torch.randn(2, denoiser.space.channels, side, side, generator=draw, dtype=torch.float64)
    t, label = torch.tensor([900.0, 100.0]), torch.arange(2)
    cond = {"label": label, "w": torch.full((2,), 2.0)} if denoiser.weights else label
    r = torch.randn(x.shape, generator=draw, dtype=torch.float64)

    def value() -> torch.Tensor:
        return (net(x, t, cond) * r).sum()

    grads = torch.autograd.grad(value(), list(held.values()))
    assert all(grad.norm() > 1e-6 for grad in grads), [n for n, g in zip(held, grads) if not g.any()]
    steps = [1e-4 * torch.randn(p.shape, generator=draw, dtype=p.dtype) for p in held.values()]
    ends = []
    for times in (1, -2):
        with torch.no_grad():
            for p, step in zip(held.values(), steps):
                p.add_(step, alpha=times)
            ends.append(value())
    slope = sum((grad * step).sum() for grad, step in zip(grads, steps))
    torch.testing.assert_close((ends[0] - ends[1]) / 2, slope, rtol=1e-2, atol=0.0)


def test_targets_that_change_nothing_are_refused(tiny_pipelines):
    denoiser = pipelines.build(about(tiny_pipelines["sd3"]), PROMPTS)
    card = models.Card(models.Config(), (3, 16, 16), tuple(PROMPTS), pipeline={"dtype": "float32"})
    with pytest.raises(ConfigError, match="none of them can change"):
        models.adapt(denoiser, card, "LoRA(targets='transformer_blocks.1.attn.add_q_proj')")
    models.adapt(denoiser, card, "LoRA(targets='add_q_proj')")
    assert {n.split(".")[2] for n, p in denoiser.named_parameters() if p.requires_grad} == {"transformer_blocks"}
    assert {n.split(".")[3] for n, p in denoiser.named_parameters() if p.requires_grad} == {"0"}


@pytest.mark.parametrize("negatives", [["", ""], ["", "blurred"]])
def test_no_negative_prompt_is_what_the_pipeline_makes_of_none(negatives, tiny_pipelines):
    """Stable Diffusion XL answers to zeros where there is none, and not to an empty prompt."""
    told = about(tiny_pipelines["sdxl"], negatives=negatives)
    denoiser = pipelines.build(told, PROMPTS)
    z = noise(denoiser, 16)
    agree(ours(denoiser, z), pipelines.published(told, PROMPTS, [0, 1], z, SCALE))


@pytest.mark.parametrize("agent", ["ddpo", "draft"])
def test_a_pipeline_has_small_defaults(agent, tiny_pipelines):
    model = ("--model", str(tiny_pipelines["sd"]), "--device", "cpu")
    one = settings_of("finetune", [*model, "--agent", agent])
    assert (one.agent.micro_batch, one.rollout.item, one.evaluation.samples) == (8, 8, 64)
    assert settings_of("finetune", [*model, "--agent", agent, "--agent.micro_batch", "2"]).agent.micro_batch == 2
    assert settings_of("compare", [*model, "--agents", agent]).micro_batch == 8


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_scheduler_is_read_as_its_pipeline_corrects_it(name, tiny_pipelines, tmp_path):
    """Older files say clip_sample and steps_offset otherwise; the pipeline of Stable Diffusion mends them."""
    folder = shutil.copytree(tiny_pipelines[name], tmp_path / name)
    file = folder / "scheduler" / "scheduler_config.json"
    held = json.loads(file.read_text())
    old = {"_class_name": "DDIMScheduler", "clip_sample": True, "steps_offset": 0}
    file.write_text(
        json.dumps({k: v for k, v in held.items() if k in ("beta_start", "beta_end", "beta_schedule")} | old)
    )
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "DDIMScheduler"]}))
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder).scheduler
    ours = hub.scheduler(folder)
    assert _said(ours) == _said(theirs)
    assert (ours.config.clip_sample, ours.config.steps_offset) == ((False, 1) if name == "sd" else (True, 0))
    if name == "sd":
        read(ours, plain_grid({}, ()))
    else:
        with pytest.raises(ConfigError, match="clip_sample = True"):
            read(ours, plain_grid({}, ()))


def _said(scheduler):
    """Its settings, but for the library's notes on them."""
    return {name: value for name, value in scheduler.config.items() if not name.startswith("_")}


def folder_files() -> list[str]:
    texts = ["text_encoder/config.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"]
    return ["model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json", *texts]


@pytest.mark.parametrize("content", [b"null", b"{", b"[" * 200_000, b"\xff\xfe\xfa{"])
@pytest.mark.parametrize("name", folder_files())
def test_a_damaged_file_of_a_pipeline_is_refused_in_one_line(name, content, tiny_pipelines, tmp_path):
    folder = tmp_path / "sd"
    shutil.copytree(tiny_pipelines["sd"], folder)
    (folder / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        models.build(models.describe(str(folder), pipelines.Settings(prompts="a cat")))
    assert str(tmp_path) in str(caught.value)
    assert len(str(caught.value)) < 900


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("unet", {"sample_size": None}),
        ("unet", {"sample_size": "64"}),
        ("vae", {"block_out_channels": 3}),
    ],
)
def test_a_setting_of_a_component_that_is_of_another_kind_is_named(name, change, tiny_pipelines, tmp_path):
    folder = tmp_path / "sd"
    shutil.copytree(tiny_pipelines["sd"], folder)
    file = folder / name / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ConfigError, match=next(iter(change))):
        models.build(models.describe(str(folder), pipelines.Settings(prompts="a cat")))


def test_a_tokenizer_without_a_limit_is_named(tiny_pipelines, tmp_path):
    folder = tmp_path / "sd"
    shutil.copytree(tiny_pipelines["sd"], folder)
    (folder / "tokenizer" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizers whose tokenizer_config\.json says"):
        models.build(models.describe(str(folder), pipelines.Settings(prompts="a cat")))
