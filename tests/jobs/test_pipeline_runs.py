"""Pretrained pipelines in training: four learners, export and reading back, precision, memory; on a tiny model."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from pipeline_runs import LORA, SIDE, STEPS, gain, ran, settings
from rounding import ROUNDING
from safetensors.torch import load_file
from tiny_pipelines import PROMPTS, about

from rlfusion import models
from rlfusion.agents import AGENTS
from rlfusion.common.errors import ConfigError, NumericalError
from rlfusion.common.progress import Progress
from rlfusion.common.stops import Signals
from rlfusion.config import Evaluations, Finetune, Rollout
from rlfusion.diffusion.chain import Chain
from rlfusion.diffusion.policy import frozen_copy
from rlfusion.diffusion.sampling import chain_noise, sample
from rlfusion.jobs import base_model, measure
from rlfusion.jobs.finetune import check, finetune
from rlfusion.jobs.measure import draw
from rlfusion.jobs.parts import opened
from rlfusion.jobs.tasks import make_task, recipe
from rlfusion.models import pipelines
from rlfusion.rl.monitor import Config as Monitoring
from rlfusion.rollout import plan, run_item

DROPPED = "LoRA(rank=4, alpha=8.0, dropout=0.5)"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    return root


def walks(config: Finetune) -> Finetune:
    """Small images and enough walks for a policy gradient; a last step of little noise would drown the others."""
    return replace(
        config,
        chain=Chain(steps=2, spacing="trailing"),
        rollout=Rollout(prompts=2, samples_per_prompt=32, item=64),
        pipeline=replace(config.pipeline, size=8),
        updates=6,
    )


@pytest.fixture(scope="module")
def adapted(root, tiny_pipelines) -> Path:
    """A run of DRaFT-1 with adapters."""
    result = ran(settings(tiny_pipelines["sd"], "draft", root, lora=LORA), "draft")
    assert gain(result) > 0.5
    return root / "draft"


@pytest.fixture(scope="module")
def whole(root, tiny_pipelines) -> Path:
    """A run of ReFL with all weights."""
    result = ran(settings(tiny_pipelines["sd"], "refl", root), "refl")
    assert gain(result) > 2
    return root / "refl"


@pytest.mark.parametrize("agent", ["ddpo", "grpo"])
def test_a_policy_gradient_raises_the_reward(agent, root, tiny_pipelines):
    result = ran(walks(settings(tiny_pipelines["sd"], agent, root)), agent)
    assert gain(result) > 0.4
    assert {"reward", "diversity", "brightness", "edge_density", "entropy"} <= result["after"].keys()


def noise() -> torch.Tensor:
    return chain_noise((0, "test"), range(2), STEPS, (4, SIDE // 2, SIDE // 2))


@torch.no_grad()
def by_diffusers(pipe, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The pipeline's latents and images of our noise."""
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": STEPS, "guidance_scale": 2.0, "height": SIDE, "width": SIDE}
    latents = pipe(PROMPTS, latents=z[:, 0].clone(), output_type="latent", **call).images
    return latents, torch.from_numpy(pipe(PROMPTS, latents=z[:, 0].clone(), output_type="np", **call).images)


def by_rlfusion(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of the run's own model, read as ``rlfusion sample`` reads it."""
    card = models.describe(str(folder), pipelines.Settings())
    assert card.names == tuple(PROMPTS)
    assert card.shape == (3, SIDE, SIDE)
    denoiser = models.build(card)
    chain = Chain(**card.chain | {"kernel": "DDIM(eta=0.0)"})
    x = sample(chain.policy(denoiser, card.names), noise(), chain.times(denoiser), torch.arange(2))
    return x, denoiser.space.decode(x).permute(0, 2, 3, 1)


def test_adapters_are_exported_for_diffusers_and_give_it_the_same_images(adapted, tiny_pipelines):
    assert sorted(f.name for f in (adapted / "model").iterdir()) == ["model.json", "pytorch_lora_weights.safetensors"]
    pipe = diffusers.DiffusionPipeline.from_pretrained(tiny_pipelines["sd"])
    base, _ = by_diffusers(pipe, noise())
    pipe.load_lora_weights(adapted / "model")
    theirs, ours = by_diffusers(pipe, noise()), by_rlfusion(adapted)
    assert (theirs[0] - base).abs().max() > 0.1, "the adapters do something"
    for a, b in zip(theirs, ours):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_whole_weights_are_exported_as_a_pipeline(whole):
    pipe = diffusers.DiffusionPipeline.from_pretrained(whole / "model")
    for a, b in zip(by_diffusers(pipe, noise()), by_rlfusion(whole)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_trained_pipeline_is_trained_on(adapted, root):
    config = settings(adapted, "draft", root, lora=LORA, pipeline=pipelines.Settings(), updates=1)
    config = replace(config, agent=replace(config.agent, optimizer="adamw8bit"))
    ran(config, "again")
    held = json.loads((root / "again" / "model" / "model.json").read_text())["pipeline"]
    assert held["adapters"] == [str((adapted / "model").resolve()), "."]
    card = models.describe(str(root / "again"), pipelines.Settings(prompts="another prompt"))
    assert card.names == ("another prompt",)


def test_a_run_that_goes_on_from_a_checkpoint_makes_the_same_weights(root, tiny_pipelines):
    config = settings(tiny_pipelines["sd"], "ddpo", root, lora=DROPPED, updates=2, checkpoint_every=1)
    config = replace(walks(config), updates=2, rollout=Rollout(prompts=2, samples_per_prompt=4, item=8))
    ran(config, "straight")
    shutil.copytree(root / "straight", root / "resumed")
    shutil.rmtree(root / "resumed" / "checkpoints" / "step-00000002")
    shutil.rmtree(root / "resumed" / "model")
    (root / "resumed" / "summary.json").unlink()
    assert [path.name for path in (root / "resumed" / "checkpoints").iterdir()] == ["step-00000001"]
    finetune(config, root / "resumed", Signals(), Progress())
    one, other = (load_file(root / name / "model" / pipelines.LORA) for name in ("straight", "resumed"))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.fixture
def policy(root, tiny_pipelines):
    """The policy, card and settings of a model with adapters that are not 0."""
    config = settings(tiny_pipelines["sd"], "ddpo", root, lora=LORA)
    begun = base_model.begin(opened(config).base, torch.device("cpu"), Signals(), Progress())
    with torch.no_grad():
        for p in begun.denoiser.parameters():
            if p.requires_grad:
                p.add_(0.05)
    return config.chain.policy(begun.denoiser, begun.card.names), begun.card, config


def test_an_export_that_is_not_the_trained_model_fails(policy, tmp_path, monkeypatch):
    made, card, _ = policy
    denoiser = made.denoiser.denoiser
    models.save(tmp_path / "fine", denoiser, card)
    plain = diffusers.StableDiffusionPipeline.save_lora_weights

    def without_settings(folder, unet_lora_layers, unet_lora_adapter_metadata, **rest):
        return plain(folder, unet_lora_layers=unet_lora_layers, **rest)  # the strength is then taken for 1

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "save_lora_weights", without_settings)
    with pytest.raises(NumericalError, match="answers otherwise"):
        models.save(tmp_path / "strength", denoiser, card)

    def half(folder, unet_lora_layers, **rest):
        return plain(
            folder, unet_lora_layers=dict(list(unet_lora_layers.items())[: len(unet_lora_layers) // 2]), **rest
        )

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "save_lora_weights", half)
    with pytest.raises(NumericalError, match="other weights"):
        models.save(tmp_path / "half", denoiser, card)
    assert not (tmp_path / "half" / "model.json").exists()
    assert not (tmp_path / "strength" / "model.json").exists()


def test_the_reference_is_the_same_weights_without_a_copy(policy):
    made = policy[0]
    reference = frozen_copy(made)
    ours = {name: p for name, p in made.named_parameters()}
    frozen = [name for name, p in ours.items() if not p.requires_grad]
    theirs = dict(reference.named_parameters())
    assert all(theirs[name] is ours[name] for name in frozen)
    assert all(theirs[name] is not ours[name] for name in ours.keys() - set(frozen))
    assert sum(ours[n].numel() for n in frozen) > 3 * sum(p.numel() for n, p in ours.items() if n not in frozen)
    assert reference.denoiser.denoiser.net.conditions is made.denoiser.denoiser.net.conditions


def test_a_worker_rebuilds_the_same_walks(policy):
    made, card, config = policy
    from rlfusion.common.weights import Weights

    weights = Weights.of(made, 0)
    item = plan(0, 0, 2, 2, 4, 2, 0)[0]
    here = make_task(opened(config).task, card, frozen_copy(made), lambda samples, cond: samples.mean((1, 2, 3)))
    parts = opened(replace(config, reward="ink"))
    there = recipe(parts.task, parts.workers, card, made, here.reward, torch.device("cpu")).build()
    weights.load_into(there.policy)
    a, b = run_item(here, item), run_item(there, item)
    assert torch.equal(a.x, b.x)
    assert torch.equal(a.log_prob, b.log_prob)
    torch.testing.assert_close(a.reward, b.reward, **ROUNDING)  # another mean than the reward's own


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_the_networks_alone(dtype, root, tiny_pipelines):
    config = settings(tiny_pipelines["sd"], "ddpo", root, lora=LORA)
    config = replace(config, pipeline=replace(config.pipeline, dtype=dtype))
    denoiser, card, *_ = base_model.begin(opened(config).base, torch.device("cpu"), Signals(), Progress())
    kinds = {p.dtype for p in denoiser.parameters() if not p.requires_grad}
    assert kinds == {getattr(torch, dtype)}
    assert {p.dtype for p in denoiser.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in denoiser.space.vae.parameters()} == {torch.float32}
    made = config.chain.policy(denoiser, card.names)
    task = make_task(opened(config).task, card, made, lambda samples, cond: samples.mean((1, 2, 3)))
    walks = run_item(task, plan(0, 0, 2, 2, 4, 2, 0)[0])
    assert {walks.x.dtype, walks.log_prob.dtype, walks.reward.dtype} == {torch.float32}
    learner = config.agent.learner(task, None, 0)
    assert learner.preflight(walks)["log_ratio_max"] < 1e-3
    learner.update(walks)
    with pytest.raises(ConfigError, match=f"dtype = {dtype}"):
        check(replace(config, lora=""))


def test_checkpointing_and_chunks_change_memory_alone(tiny_pipelines):
    grads = []
    for settings_ in ({"checkpointing": False, "decode": 8}, {"checkpointing": True, "decode": 2}):
        denoiser = pipelines.build(about(tiny_pipelines["sd"], **settings_), PROMPTS)
        chain = Chain(steps=2, spacing="model", kernel="DDIM(eta=0.0)")
        made = chain.policy(denoiser, PROMPTS)
        z = chain_noise((0, "test"), range(5), 2, (4, 8, 8))
        x = sample(made, z, chain.times(denoiser), torch.arange(5) % 2)
        assert torch.equal(denoiser.space.decode(x), denoiser.space.decode(x.clone().requires_grad_()))
        t = torch.tensor(0.5, dtype=torch.float64)
        out = denoiser.space.decode(made.denoiser(x, t, torch.arange(5) % 2).x0)
        (out[:, 0] - out[:, 2]).mean().backward()
        grads.append({n: p.grad.clone() for n, p in denoiser.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-3, atol=1e-6)


def test_what_cannot_work_is_refused_with_a_reason(root, tiny_pipelines, tmp_path):
    config = settings(tiny_pipelines["sd"], "ddpo", root)
    for changes, message in (
        ({"pipeline": pipelines.Settings(size=SIDE)}, "pipeline.prompts"),
        ({"pipeline": replace(config.pipeline, size=17)}, "size = 17.*multiple of 2"),
        ({"pipeline": replace(config.pipeline, prompts=str(tmp_path / "no.txt"))}, "no such file"),
        ({"reward": "class_logprob"}, "class_logprob.*no data"),
        ({"evaluation": Evaluations(samples=50, bits_per_dim=True)}, "bits_per_dim"),
        ({"monitor": Monitoring(best="agreement")}, "monitor.best"),
        ({"base": "nobody/nothing-of-the-kind"}, "cannot be fetched.*model_index.json.*HF_HOME"),
        ({"base": str(tmp_path)}, "no model"),
        ({"base": ""}, "no pretrained pipeline"),
    ):
        with pytest.raises(ConfigError, match=message):
            check(replace(config, **changes))
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline", "scheduler": ["diffusers", "X"]}')
    with pytest.raises(ConfigError, match="unknown pipeline 'WanPipeline'"):
        check(replace(config, base=str(tmp_path)))
    refl = AGENTS["refl"](pretrain_weight=1.0)
    with pytest.raises(ConfigError, match="data are not known"):
        ran(replace(config, agent=refl), "refused")


def test_the_chain_of_a_pipeline_is_its_own(tiny_pipelines):
    sampled, trained = (pipelines.defaults(str(tiny_pipelines["sd"]), training) for training in (False, True))
    assert sampled == {"spacing": "model", "steps": 50, "kernel": "DDIM(eta=0.0)", "guidance_scale": 7.5}
    assert trained == sampled | {"steps": 20, "kernel": "DDIM(eta=1.0)"}
    assert pipelines.defaults(str(tiny_pipelines["flux"]), True)["kernel"] == "FlowSDE(noise=0.7)"
    assert pipelines.defaults(str(tiny_pipelines["lcm"]), True) == {
        "spacing": "model", "steps": 4, "kernel": "Renoise()", "guidance_scale": 8.5,
    }  # fmt: skip


def test_negative_prompts_lead_each_prompt_away_from_its_own(tiny_pipelines):
    denoiser = pipelines.build(about(tiny_pipelines["sd"]), PROMPTS)
    alone = [
        pipelines.build(about(tiny_pipelines["sd"], negatives=[n]), [p]) for p, n in zip(PROMPTS, ("dark", "blurred"))
    ]
    chain = Chain(steps=2, spacing="model", kernel="DDIM(eta=0.0)", guidance_scale=4.0)
    z = chain_noise((0, "test"), range(2), 2, (4, 8, 8))
    both = sample(chain.policy(denoiser, PROMPTS), z, chain.times(denoiser), torch.arange(2))
    for i, one in enumerate(alone):
        single = sample(
            chain.policy(one, PROMPTS[i : i + 1]), z[i : i + 1], chain.times(one), torch.zeros(1, dtype=torch.long)
        )
        torch.testing.assert_close(both[i : i + 1], single, rtol=1e-4, atol=1e-4)


def test_samples_do_not_depend_on_what_is_drawn_beside_them(tiny_pipelines, monkeypatch):
    chain = Chain(steps=2, spacing="model", kernel="DDIM(eta=1.0)")
    label = torch.arange(4) % 2
    parts = []
    for decode in (1, 4):
        monkeypatch.setattr(measure, "WALKED", decode)
        denoiser = pipelines.build(about(tiny_pipelines["sd"], decode=decode), PROMPTS)
        made = chain.policy(denoiser, PROMPTS)
        parts.append(draw(made, chain.times(denoiser), label, (3, SIDE, SIDE), 0, "test"))
    torch.testing.assert_close(*parts, rtol=1e-4, atol=1e-4)
