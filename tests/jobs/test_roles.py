"""The memory of each role, from a model's description and files alone, against that of the model when it is loaded."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from pipeline_runs import LORA, settings
from safetensors.torch import save_file

from rlfusion import models
from rlfusion.common.progress import Progress
from rlfusion.common.stops import Signals
from rlfusion.config import Base, Distill, Finetune, Pretrain, Rollout
from rlfusion.config.parts import Learners
from rlfusion.jobs import base_model, memory
from rlfusion.jobs.parts import opened
from rlfusion.jobs.roles import Least, elements, of_finetuning, roles
from rlfusion.models.pipelines import hub
from rlfusion.rollout.placement import PROCESS

SMALL = Base(model=models.Config(net="ResidualMLP(width=8, depth=1)"))


def loaded(config: Finetune) -> tuple[dict[str, int], int]:
    """The estimate of the model once it is here, without activations; the bytes of the network and its autoencoder."""
    parts = opened(config)
    denoiser, card, *_ = base_model.begin(parts.base, torch.device("cpu"), Signals(), Progress())
    policy = config.chain.policy(denoiser, card.names)
    times, shape = config.chain.times(denoiser), policy.space.latent(card.shape)
    found = memory.estimate(parts.holds._replace(watched=False), denoiser, policy, times, shape)
    held = {name: size for name, size in found.items() if not name.startswith(("activations", "decoding"))}
    space = getattr(policy.space, "vae", torch.nn.Module())
    return held, sum(p.numel() * p.element_size() for part in (denoiser, space) for p in part.parameters())


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_of_a_pipeline_it_is_what_the_loaded_model_takes(family, tiny_pipelines, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red cat\n")
    config = settings(tiny_pipelines[family], "ddpo", tmp_path)
    assert of_finetuning(opened(config)) == Least(sum(loaded(config)[0].values()), loaded(config)[1])


@pytest.mark.parametrize("made", [None, type("Odd", (), {"load_config": str, "from_config": lambda _: odd()})])
def test_of_a_network_that_cannot_be_made_without_memory_nothing_is_known(made, tiny_pipelines, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a red cat\n")
    config = settings(tiny_pipelines["sd"], "ddpo", tmp_path)
    real = hub.diffusers()
    monkeypatch.setattr(hub, "diffusers", lambda: SimpleNamespace(UNet2DConditionModel=made))
    assert hub.parameters(tiny_pipelines["sd"], "unet") == 0
    monkeypatch.setattr(hub, "diffusers", lambda: real)
    monkeypatch.setattr(hub, "without_memory", lambda *_: None)
    assert of_finetuning(opened(config)) == Least()


def odd() -> torch.nn.Module:
    return torch.nn.Linear(int(torch.ones(3).sum()), 1)


def test_of_adapters_it_is_at_most_that(tiny_pipelines, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red cat\n")
    config = settings(tiny_pipelines["sd"], "ddpo", tmp_path, lora=LORA)
    found, (held, network) = of_finetuning(opened(config)), loaded(config)
    assert held["network, frozen"] + held["autoencoder"] == found.learner == found.worker
    assert found.learner < sum(held.values())
    assert found.worker < network


@pytest.mark.parametrize("adapters", ["", LORA])
def test_of_a_model_made_here_it_is_the_same_from_its_settings_and_from_its_folder(tmp_path, adapters):
    parts = opened(Finetune(pretrain=SMALL, lora=adapters))
    denoiser = models.build(models.Card(SMALL.model, (1, 8, 8), tuple("0123456789")))
    size = sum(p.numel() * 4 for p in denoiser.parameters())
    made = of_finetuning(parts)
    assert made.worker == size
    # weights, gradients, 2 moments, average, the rollouts' copy, the reference; 5 of these to undo an update
    assert made.learner == (size if adapters else 12 * size)
    models.save(tmp_path / "model", denoiser, models.Card(SMALL.model, (1, 8, 8), tuple("0123456789")))
    assert of_finetuning(parts._replace(base=replace(parts.base, name=str(tmp_path / "model")))) == made


def test_a_network_that_is_split_is_split_between_the_ranks():
    whole, split = (
        of_finetuning(opened(Finetune(pretrain=SMALL, learner=Learners(2, 2, shard=shard), rollout=Rollout(workers=1))))
        for shard in ("none", "fsdp")
    )
    assert split.worker == whole.worker
    assert 0 <= 2 * split.learner - whole.learner < 20  # rounded up, tensor kind by tensor kind


def test_each_role_has_what_its_settings_say_and_the_driver_what_is_left():
    config = Finetune(pretrain=SMALL, learner=Learners(2, 2, gpus_per_rank=1.0), rollout=Rollout(workers=3), threads=2)
    least = of_finetuning(opened(config))
    (ranks, workers, rewards), driver = roles(config)
    assert (ranks.count, ranks.memory, ranks.device, ranks.threads, ranks.alone) == (2, least.learner, "cuda", 2, True)
    assert (workers.count, workers.memory, workers.device, workers.threads) == (3, least.worker, "cpu", 2)
    assert rewards.count == 0
    assert (driver.device, driver.memory) == ("cpu", PROCESS)
    alone = replace(config, learner=Learners(), device="cpu")
    (ranks, workers, _), driver = roles(alone)
    assert (ranks.count, workers.memory) == (0, least.worker)
    assert driver.memory == PROCESS + of_finetuning(opened(alone)).learner


@pytest.mark.parametrize("config", [Pretrain, Distill])
def test_of_other_commands_nothing_is_known(config):
    (ranks, *_), driver = roles(config(learner=Learners(2, 2)))
    assert (ranks.count, ranks.memory) == (2, 0)
    assert driver.memory == PROCESS


def test_of_several_variants_of_the_same_weights_one_counts(tmp_path):
    for name, count in (("a-00001-of-00002", 6), ("a-00002-of-00002", 4), ("a.fp16", 10)):
        save_file({"w": torch.zeros(count)}, tmp_path / f"{name}.safetensors")
    assert elements(tmp_path) == elements(tmp_path, "a") == 10
    assert elements(tmp_path, "b") == elements(tmp_path / "absent") == 0
