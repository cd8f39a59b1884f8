"""Families of pipelines: latents and images are those of diffusers' own call, learners train and export."""

import shutil
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from pipeline_runs import ran, settings
from tiny_pipelines import NEWER, PROMPTS, SIDE, UNADAPTED, about, agree, flux_2_klein

from rlfusion import models
from rlfusion.common.errors import ConfigError
from rlfusion.config import Evaluations, Rollout
from rlfusion.diffusion.chain import Chain
from rlfusion.diffusion.sampling import chain_noise, sample
from rlfusion.models import pipelines
from rlfusion.models.pipelines import Whole, hub

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def side(name: str) -> int:
    return SIDE.get(name, 16)


@pytest.mark.parametrize("name", NEWER)
def test_latents_and_images_are_those_of_the_pipelines_own_call(name, newer_pipelines):
    told, steps = about(newer_pipelines[name]), 3
    denoiser, whole = pipelines.build(told, PROMPTS), Whole(told)
    scale = whole.known[denoiser.net.family.scale].default + denoiser.net.family.offset
    shape = denoiser.space.latent((3, side(name), side(name)))
    z = torch.randn(2, steps + 1, *shape, generator=torch.Generator().manual_seed(2))
    chain = Chain(steps=steps, spacing="model", kernel=denoiser.own.sampling.kernel, guidance_scale=scale)
    ours = sample(chain.policy(denoiser, PROMPTS), z, chain.times(denoiser), torch.arange(2))
    agree(ours, whole.latents(PROMPTS, [0, 1], z, guidance_scale=scale))
    image = whole.latents(PROMPTS, [0, 1], z, guidance_scale=scale, output_type="pt")
    torch.testing.assert_close(denoiser.space.decode(ours), image, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NEWER)
def test_it_is_trained_and_diffusers_reads_it_back(name, newer_pipelines, tmp_path):
    """By DDPO with adapters, or where there are none DRaFT on all weights."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    agent, lora = ("draft", "") if name in UNADAPTED else ("ddpo", "LoRA(rank=2)")
    config = settings(newer_pipelines[name], agent, tmp_path, updates=1, lora=lora)
    published = pipelines.defaults(str(newer_pipelines[name]), training=True)
    config = replace(
        config,
        chain=Chain(**published | {"steps": 2, "spacing": "trailing"}),
        rollout=Rollout(prompts=2, samples_per_prompt=4, item=8),
        pipeline=replace(config.pipeline, size=side(name)),
        evaluation=Evaluations(samples=50, deterministic=False),
    )
    ran(config, agent)
    card = models.describe(str(tmp_path / agent), pipelines.Settings())
    denoiser = models.build(card)
    chain = Chain(**card.chain | {"spacing": "model", "kernel": denoiser.own.sampling.kernel})
    times, label = chain.times(denoiser), torch.arange(2)
    z = chain_noise((0, "export"), range(2), len(times) - 1, denoiser.space.latent(card.shape))
    ours = sample(chain.policy(denoiser, card.names), z, times, label)
    agree(ours, pipelines.published(card.pipeline, card.names, [0, 1], z, chain.guidance_scale))
    base = pipelines.build(about(newer_pipelines[name], negatives=["", ""]), PROMPTS)
    assert (ours - sample(chain.policy(base, PROMPTS), z, times, label)).abs().max() > 1e-6, "training moved it"


@pytest.mark.parametrize("name", UNADAPTED)
def test_adapters_that_diffusers_has_no_form_for_are_refused_by_name(name, newer_pipelines):
    card = models.describe(str(newer_pipelines[name]), pipelines.Settings(prompts="a red cat"))
    with pytest.raises(ConfigError, match=r"lora = 'LoRA\(rank=2\)': .* expected none, which trains all weights"):
        models.adapt(models.build(card), card, "LoRA(rank=2)")


def test_a_distilled_klein_has_no_guidance(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flux_2_klein(distilled=True).save_pretrained(tmp_path / "flux_2_klein")
    told = about(tmp_path / "flux_2_klein")
    denoiser, whole = pipelines.build(told, PROMPTS), Whole(told)
    assert "guidance_scale" not in pipelines.defaults(told["name"], training=False)
    z = torch.randn(2, 3, *denoiser.space.latent((3, 16, 16)), generator=torch.Generator().manual_seed(2))
    chain = Chain(steps=2, spacing="model", kernel="DDIM(eta=0.0)")
    ours = sample(chain.policy(denoiser, PROMPTS), z, chain.times(denoiser), torch.arange(2))
    agree(ours, whole.latents(PROMPTS, [0, 1], z))
    with pytest.raises(ConfigError, match="negative = 'dark'"):
        pipelines.build(told | {"negatives": ["dark", ""]}, PROMPTS)


def test_the_guidance_of_z_image_counts_from_one(newer_pipelines):
    assert pipelines.defaults(str(newer_pipelines["z_image"]), training=False)["guidance_scale"] == 6.0


def test_the_guidance_of_qwen_image_leads_away_from_a_blank_unless_told_a_negative_prompt(newer_pipelines):
    assert pipelines.defaults(str(newer_pipelines["qwen_image"]), training=False)["guidance_scale"] == 4.0
    told = about(newer_pipelines["qwen_image"], negatives=["dark", ""])
    denoiser, whole = pipelines.build(told, PROMPTS), Whole(told)
    z = torch.randn(2, 3, *denoiser.space.latent((3, 16, 16)), generator=torch.Generator().manual_seed(2))
    chain = Chain(steps=2, spacing="model", kernel="DDIM(eta=0.0)", guidance_scale=4.0)
    ours = sample(chain.policy(denoiser, PROMPTS), z, chain.times(denoiser), torch.arange(2))
    agree(ours, whole.latents(PROMPTS, [0, 1], z, guidance_scale=4.0))
    call = {"height": 16, "width": 16, "num_inference_steps": 2, "true_cfg_scale": 4.0, "output_type": "latent"}
    given = denoiser.net.family.given(z[:, 0]).split(1)
    spaces = torch.cat([whole.pipe(p, n, latents=x, **call).images for p, n, x in zip(PROMPTS, ("dark", " "), given)])
    agree(ours, denoiser.net.family.taken(whole.pipe, spaces, ours))


def test_an_image_is_the_one_frame_of_a_video(newer_pipelines):
    told = about(newer_pipelines["qwen_image"], decode=1)
    space, vae = pipelines.build(told, PROMPTS).space, Whole(told).pipe.vae
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = (torch.tensor(vae.config[name])[:, None, None] for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        z = (vae.encode(x[:, :, None]).latent_dist.mode()[:, :, 0] - mean) / std
        made = vae.decode((z * std + mean)[:, :, None]).sample[:, :, 0]
    torch.testing.assert_close(space.encode(x), z, rtol=1e-5, atol=1e-5)
    assert space.latent((3, 16, 16)) == z.shape[1:]
    z.requires_grad_()
    pixels = space.decode(z)
    torch.testing.assert_close(pixels, made / 2 + 0.5, rtol=1e-5, atol=1e-5)
    assert torch.autograd.grad(pixels.sum(), z)[0].abs().amax((1, 2, 3)).min() > 0, "of each sample"


def test_a_qwen_image_that_reads_its_guidance_is_refused(newer_pipelines, tmp_path):
    folder = shutil.copytree(newer_pipelines["qwen_image"], tmp_path / "qwen_image")
    file = Path(folder) / "transformer" / "config.json"
    file.write_text(file.read_text().replace('"guidance_embeds": false', '"guidance_embeds": true'))
    with pytest.raises(ConfigError, match="guidance_embeds = true: Qwen-Image is guided by two answers"):
        pipelines.build(about(folder), PROMPTS)


REFUSED = {
    "QwenImageEditPipeline": "unknown pipeline 'QwenImageEditPipeline'.*It does not fit: it is given an image",
    "QwenImageImg2ImgPipeline": "unknown pipeline.*It does not fit: it is given an image",
    "StableDiffusionXLImg2ImgPipeline": "unknown pipeline.*It does not fit: it is given an image",
    "WanPipeline": "unknown pipeline 'WanPipeline'.*It does not fit: it draws videos",
    "HunyuanVideoPipeline": "unknown pipeline.*It does not fit: it draws videos",
    "Kandinsky5T2VPipeline": "unknown pipeline.*It does not fit: it draws videos",
    "StableAudio3InpaintPipeline": "unknown pipeline.*It does not fit: it makes sounds",
    "Kandinsky3Pipeline": r"unknown pipeline 'Kandinsky3Pipeline'.*rlfusion.families\)$",
    "StableCascadeDecoderPipeline": "unknown pipeline.*It does not fit: two networks",
    "KolorsPipeline": r"unknown pipeline 'KolorsPipeline'.*rlfusion.families\)$",
    "AuraFlowPipelin": "did you mean 'AuraFlowPipeline'",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_does_not_fit_is_refused_with_its_reason(name, tiny_pipelines, tmp_path):
    folder = shutil.copytree(tiny_pipelines["sd"], tmp_path / "other")
    file = Path(folder) / "model_index.json"
    file.write_text(file.read_text().replace("StableDiffusionPipeline", name))
    with pytest.raises(ConfigError, match=REFUSED[name]):
        pipelines.family_of(folder)


def test_no_family_that_there_is_has_a_reason_not_to_fit():
    assert not any(hub._why_not(name) for name in hub.FAMILIES)


def test_a_family_that_the_installed_diffusers_lacks_is_refused_with_the_version(newer_pipelines, monkeypatch):
    monkeypatch.setattr(hub, "class_named", lambda name: None)
    with pytest.raises(ConfigError, match=rf"ChromaPipeline.* diffusers {diffusers.__version__}, .*expected 0.34.0"):
        pipelines.family_of(newer_pipelines["chroma"])
