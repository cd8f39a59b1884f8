"""A CLIP's score of a pipeline's samples: latent -> the pipeline's own decoder -> preprocessing -> tower, and back."""

from dataclasses import replace
from pathlib import Path

import diffusers
import open_clip
import pytest
import torch
from pipeline_runs import SIDE, gain, ran, settings
from tiny_pipelines import PROMPTS, about

from rlfusion.models import pipelines
from rlfusion.rewards import build, score, task_info
from rlfusion.rewards.clip import towers
from rlfusion.rewards.clip.small import SmallClip

TEMPLATE = "a photo of {}"


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A small CLIP of random weights that reads images of another size than the pipeline's."""
    config, preprocess = SmallClip(width=32, layers=2, embed=16, image=12, patch=4).described((3, 12, 12))
    path = tmp_path_factory.mktemp("clip")
    towers.save(path, towers.build(config, seed=1), config, preprocess)
    return path


def made(clip: Path) -> torch.nn.Module:
    options = {"clip_score": {"model": str(clip), "template": TEMPLATE}}
    return build("clip_score", options, task_info(PROMPTS, (3, SIDE, SIDE)))


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(4, 4, SIDE // 2, SIDE // 2, generator=torch.Generator().manual_seed(0))


COND = torch.tensor([0, 1, 1, 0])


@torch.no_grad()
def test_the_score_of_a_latent_is_that_of_diffusers_image_to_open_clip(clip, tiny_pipelines, latents):
    space = pipelines.build(about(tiny_pipelines["sd"]), PROMPTS).space
    pipe = diffusers.DiffusionPipeline.from_pretrained(tiny_pipelines["sd"])
    image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    image = pipe.image_processor.postprocess(image, output_type="pil")
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{clip}")
    seen = model.eval().encode_image(torch.stack([transform(one) for one in image]), normalize=True)
    read = open_clip.get_tokenizer(f"local-dir:{clip}")([TEMPLATE.format(PROMPTS[c]) for c in COND])
    wanted = (seen * model.encode_text(read, normalize=True)).sum(1)
    torch.testing.assert_close(made(clip)(space.decode(latents), COND), wanted, atol=5e-3, rtol=0)  # 8 bits in a PIL
    assert wanted.std() > 0.02


def test_its_gradient_in_the_latent_matches_finite_differences(clip, tiny_pipelines, latents):
    """Through several parts of the decoder, each made again in the backward pass."""
    space = pipelines.build(about(tiny_pipelines["sd"], decode=3), PROMPTS).space
    space.vae.double()
    reward, z, h = made(clip).double(), 0.1 * latents.double(), 1e-6
    leaf = z.clone().requires_grad_()
    score(reward, space.decode(leaf), COND, "it").sum().backward()
    directions = torch.randn(3, *z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for v in directions:
        with torch.no_grad():
            ends = [reward(space.decode(z + step * v), COND).sum() for step in (h, -h)]
        torch.testing.assert_close((leaf.grad * v).sum(), (ends[0] - ends[1]) / (2 * h), rtol=1e-4, atol=1e-8)
    assert leaf.grad.flatten(1).norm(dim=1).min() > 1e-5
    assert all(p.grad is None for p in (*space.vae.parameters(), *reward.parameters()))


def test_it_is_raised_by_its_gradient_and_is_a_reward_without(clip, tiny_pipelines, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    options = {"clip_score": {"model": str(clip), "template": TEMPLATE}}
    config = settings(tiny_pipelines["sd"], "draft", tmp_path, reward="clip_score", reward_options=options, updates=3)
    assert gain(ran(config, "draft")) > 0.5
    few = replace(config.rollout, samples_per_prompt=4, item=8)
    config = replace(config, agent=settings(Path(), "grpo", tmp_path).agent, rollout=few, updates=1)
    assert abs(ran(config, "grpo")["after"]["reward"]) <= 1
