"""The memory estimate against what a learner's update is seen to take, and ``rlfusion doctor``."""

from dataclasses import replace
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
from pipeline_runs import LORA, STEPS, settings
from torch.profiler import ProfilerActivity, profile

from rlfusion import models
from rlfusion.agents import AGENTS
from rlfusion.cli.main import main
from rlfusion.common import heap
from rlfusion.common.progress import Progress
from rlfusion.common.stops import Signals
from rlfusion.config import Finetune
from rlfusion.finetuning import finetune as begin
from rlfusion.jobs import base_model, memory
from rlfusion.jobs.finetune import check, finetune, job
from rlfusion.jobs.parts import opened
from rlfusion.jobs.roles import of_finetuning
from rlfusion.jobs.tasks import make_task
from rlfusion.rl.critic import make_critic
from rlfusion.rollout import plan, run_item


def mean(samples, cond):
    return samples.mean((1, 2, 3))


def peak(call) -> int:
    """The most bytes of tensors that a call holds at once, beside those that were there."""
    with profile(profile_memory=True, activities=[ProfilerActivity.CPU]) as seen:
        call()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def begun(config: Finetune, root):
    denoiser, card, *_ = base_model.begin(opened(config).base, torch.device("cpu"), Signals(), Progress())
    policy = config.chain.policy(denoiser, card.names)
    shape = policy.space.latent(card.shape)
    return memory.estimate(opened(config).holds, denoiser, policy, config.chain.times(denoiser), shape), card, policy


HALVES = {"recompute": "halves"}


@pytest.mark.parametrize(
    ("agent", "lora", "more"), [("ddpo", LORA, {}), ("ddpo", "", {}), ("draft", "", {}), ("draft", "", HALVES)]
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_of_an_update_is_near_its_measured_peak(
    agent, lora, more, checkpointing, tiny_pipelines, tmp_path
):
    (tmp_path / "prompts.txt").write_text("a red cat\ntwo dogs\n")
    config = settings(tiny_pipelines["sd"], agent, tmp_path, lora=lora)
    pipeline = config.pipeline.__class__(**vars(config.pipeline) | {"checkpointing": checkpointing, "decode": 4})
    small = config.agent.__class__(
        **vars(config.agent) | {"micro_batch": 12, "updates_per_epoch": 1, "epochs": 1, **more}
    )
    config = Finetune(**vars(config) | {"pipeline": pipeline, "agent": small})
    found, card, policy = begun(config, tmp_path)
    task = make_task(opened(config).task, card, policy, lambda samples, cond: samples.mean((1, 2, 3)))
    walks = run_item(task, plan(0, 0, 2, 6, 12, 2, 0)[0])
    learner = config.agent.learner(task, None, 0)
    seen = peak(lambda: learner.update(walks))
    held = ("gradients", "activations", "decoding")  # what an update itself adds
    expected = sum(size for name, size in found.items() if name.startswith(held))
    assert 0.6 < expected / seen < 1.5, (expected, seen, found)


def test_by_halves_a_step_and_its_decoding_are_not_held_at_once(tiny_pipelines, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red cat\n")
    sizes = {}
    for recompute in (False, "halves"):
        config = settings(tiny_pipelines["sd"], "draft", tmp_path)
        config = replace(config, agent=replace(config.agent, recompute=recompute, micro_batch=4))
        found, card, policy = begun(config, tmp_path)
        sizes[recompute] = [size for name, size in found.items() if name.startswith(("activations", "decoding"))]
    shape, times, rows = policy.space.latent(card.shape), config.chain.times(policy.denoiser), opened(config).holds.rows
    whole, half = (memory.activations(policy, times, shape, rows, by_halves) for by_halves in (False, True))
    decoded = memory.decoding(policy, shape, rows)
    assert whole > 1.5 * half > 0 < decoded
    assert sizes == {False: [whole, decoded], "halves": [max(half, decoded)]}


def test_copies_are_counted(tiny_pipelines, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red cat\n")
    config = settings(tiny_pipelines["sd"], "ddpo", tmp_path, lora=LORA)
    found, _, policy = begun(config, tmp_path)
    trained = sum(p.numel() * 4 for p in policy.parameters() if p.requires_grad)
    frozen = sum(p.numel() * 4 for p in policy.parameters() if not p.requires_grad)
    assert (found["network, trained"], found["network, frozen"]) == (trained, frozen)
    assert found["gradients and optimiser"] == 3 * trained
    assert found["to undo an update"] == 4 * trained
    assert found["copies of what is trained"] == trained  # the rollouts'; no reference, no monitor here
    assert found["autoencoder"] == sum(p.numel() * 4 for p in policy.space.vae.parameters())
    assert f"{sum(found.values()) / 1e9:.3g} GB" in memory.described(found)


@pytest.mark.parametrize("lora", [LORA, ""])
def test_a_critic_is_counted_with_what_its_learning_and_its_undoing_take(lora, tiny_pipelines, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red cat\n")
    config = settings(tiny_pipelines["sd"], "ddpo", tmp_path, lora=lora)
    config = Finetune(**vars(config) | {"agent": AGENTS["qsm"]()})
    found, card, policy = begun(config, tmp_path)
    critic = make_critic(config.agent.critic, make_task(opened(config).task, card, policy, mean), 0)
    size = sum(p.numel() * 4 for p in critic.parameters() if p is not critic.head.weight and p is not critic.head.bias)
    assert found["critic, its gradients and optimiser"] == 4 * size
    trained = found["network, trained"]
    assert found["to undo an update"] == 5 * trained + 3 * size  # with its copy of the base model
    least = of_finetuning(opened(config)).learner
    with_none = replace(config.agent, q="denoised")
    assert least - of_finetuning(opened(Finetune(**vars(config) | {"agent": with_none}))).learner == 7 * size


@pytest.mark.parametrize(("advantage", "counted"), [("gae", True), ("prompt", False)])
def test_so_is_a_value_function(advantage, counted, tiny_pipelines, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red cat\n")
    config = settings(tiny_pipelines["sd"], "ddpo", tmp_path)
    config = Finetune(**vars(config) | {"agent": AGENTS["dawr"](advantage=advantage)})
    found, _, _ = begun(config, tmp_path)
    net = models.make_net(config.agent.value_net, (4, 8, 8), 1)
    size = sum(p.numel() * 4 for p in net.parameters())
    assert found["critic, its gradients and optimiser"] == (4 * size if counted else 0)


def test_the_command(tiny_pipelines, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("python", "torch", "diffusers", "GPU", "main memory"))
    model = ["--model", str(tiny_pipelines["sd"]), "--pipeline.prompts", "a cat", "--pipeline.size", "16"]
    assert main(["doctor", *model, "--reward", "ink", "--chain.steps", str(STEPS), "--lora", LORA]) == 0
    assert "together" in capsys.readouterr().out
    assert main(["doctor", *model, "--reward", "no such"]) == 2


HELD = [(heap.M_MMAP_THRESHOLD, heap.LIMIT)]


@pytest.fixture
def limits(monkeypatch):
    """What the C library is told, of which it hears nothing."""
    told = []
    library = SimpleNamespace(mallopt=lambda *given: told.append(given) or 1)
    monkeypatch.setattr(heap, "ctypes", SimpleNamespace(CDLL=lambda name: library))
    monkeypatch.setattr(heap, "platform", SimpleNamespace(libc_ver=lambda: ("glibc", "2.36")))
    for name in heap.TUNED:
        monkeypatch.delenv(name, raising=False)
    return told


@pytest.mark.parametrize(
    ("recompute", "checkpointing", "expected"),
    [("halves", False, HELD), (True, True, HELD), (True, False, [])],
)
def test_large_blocks_are_given_back_once_a_training_begins_and_by_nothing_else(
    recompute, checkpointing, expected, limits, tiny_pipelines, tmp_path
):
    (tmp_path / "prompts.txt").write_text("a red cat\ntwo dogs\n")
    config = settings(tiny_pipelines["sd"], "draft", tmp_path, updates=1)
    config = replace(
        config,
        agent=replace(config.agent, recompute=recompute, updates_per_epoch=1),
        pipeline=replace(config.pipeline, checkpointing=checkpointing),
    )
    check(config)
    assert not limits
    (tmp_path / "run").mkdir()
    finetune(config, tmp_path / "run", Signals(), Progress())
    assert limits == expected
    limits.clear()
    models.load(tmp_path / "run" / "model")  # as each command does that takes no gradient
    run = begin(config.base, config.reward, agent=config.agent, **in_python(config, tmp_path, checkpointing))
    assert not limits
    next(run)
    assert limits == expected


def in_python(config, root, checkpointing) -> dict:
    """The settings of a run that ``rlf.finetune`` begins."""
    chain = {"steps": STEPS, "spacing": "model", "guidance_scale": 2.0}
    pipeline = {"prompts": str(root / "prompts.txt"), "size": 16, "checkpointing": checkpointing}
    rollout = {"prompts": 2, "samples_per_prompt": 2}
    return {"chain": chain, "pipeline": pipeline, "rollout": rollout, "root": str(root), "device": config.device}


@pytest.mark.parametrize(("device", "expected"), [("cpu", HELD), ("cuda", [])])
def test_they_are_only_where_the_run_has_its_tensors_on_the_cpu(device, expected, limits, monkeypatch):
    monkeypatch.setattr(job, "pick_device", torch.device)  # there is none here to be picked
    config = SimpleNamespace(agent=AGENTS["draft"](recompute="halves"), device=device)
    job.spare_memory(config, SimpleNamespace(pipeline={"checkpointing": True}))
    assert limits == expected
