"""Dropout of adapters: one keyed mask an iteration, the same at rollout and update, and none anywhere else."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from adapted import NETS, policy_of, randomised
from pipeline_runs import LORA, settings
from rounding import ROUNDING
from safetensors import safe_open
from torch import nn

from rlfusion import models
from rlfusion.agents import ddpo, nft
from rlfusion.common.errors import NumericalError
from rlfusion.common.progress import Progress
from rlfusion.common.seeding import stream
from rlfusion.common.stops import Signals
from rlfusion.common.weights import ADAPTER, Weights, learned
from rlfusion.data import to_pixels
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.policy import Policy
from rlfusion.jobs import base_model
from rlfusion.jobs.parts import opened
from rlfusion.jobs.preflight import PREFLIGHT, preflight
from rlfusion.models import lora, pipelines
from rlfusion.models.lora_dropout import dropped
from rlfusion.rl.guard import Config, Guarded
from rlfusion.rollout import Local, Task, plan
from rlfusion.rollout.trajectory import Trajectory, concatenate

GRID, SHAPE, CLASSES, TEXT = TimeGrid(4), (1, 8, 8), 10, "LoRA(rank=2, dropout=0.5)"
INPUT = (torch.randn(3, 1, 8, 8), torch.rand(3), torch.tensor([1, 2, 3]))


def trained(text: str = TEXT) -> Policy:
    """A policy whose adapters are not 0."""
    policy = policy_of(text)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in learned(policy).values():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return policy


def rolled(policy: Policy, iteration: int = 0, size: int = 12) -> Trajectory:
    task = Task(copy.deepcopy(policy), GRID, SHAPE, torch.arange(CLASSES), to_pixels, bright, "bright")
    return concatenate(Local(task).collect(plan(0, iteration, 3, 4, size, CLASSES, 0), Weights.of(policy, 0)))


def bright(samples, cond):
    return samples.flatten(1).mean(1)


def learner_of(policy: Policy) -> ddpo.Learner:
    return ddpo.Learner(policy, GRID.times(policy.schedule), ddpo.Config(micro_batch=16, kl_loss=0.0))


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv2d(6, 5, 3, padding=1)])
def test_columns_of_a_are_dropped_and_the_mean_is_kept(layer):
    net = nn.ModuleDict({"a": layer}).requires_grad_(False)
    lora.attach(net, "LoRA(rank=2, dropout=0.25)")
    adapter = net["a"]
    nn.init.normal_(adapter.lora_B["default"].weight)
    x = torch.randn(4, 6, 7, 7) if isinstance(layer, nn.Conv2d) else torch.randn(4, 7, 6)
    down, kept = adapter.lora_A["default"].weight, stream(3, "dropout", 8, "a").random(6) >= 0.25
    assert 0 < kept.sum() < 6
    whole, plain = down.detach().clone(), adapter(x)
    with torch.no_grad():
        down.mul_(torch.from_numpy(kept / 0.75).float().reshape(1, 6, *[1] * (down.ndim - 2)))
    expected = adapter(x)
    with torch.no_grad():
        down.copy_(whole)
    with dropped(net, 3, 8):
        torch.testing.assert_close(adapter(x), expected, **ROUNDING)
    assert torch.equal(adapter(x), plain)


def test_the_share_that_is_dropped_is_p_and_layers_and_iterations_differ():
    masks = [stream(0, "dropout", n, name).random(1000) >= 0.3 for n in range(4) for name in ("a", "b")]
    assert all(abs(mask.mean() - 0.7) < 0.06 for mask in masks)
    policy = trained()
    seen = []
    for key in ((0, 0), (0, 1), (1, 0), (0, 0)):
        with dropped(policy, *key):
            seen.append(policy.denoiser.net(*INPUT))
    assert torch.equal(seen[0], seen[3])
    assert all((seen[0] - other).abs().max() > 1e-3 for other in seen[1:3])


@pytest.mark.parametrize("name", NETS)
def test_outside_of_an_iteration_nothing_is_dropped(name):
    plain, dropping = randomised(name), randomised(name)
    lora.attach(plain, "LoRA(rank=2)", seed=1)
    lora.attach(dropping, TEXT, seed=1)
    for net in (plain, dropping):
        torch.manual_seed(2)
        for parameter in learned(net).values():
            nn.init.normal_(parameter, std=0.3)
    whole = lora.merged(dropping)
    assert torch.equal(dropping(*INPUT), plain(*INPUT))
    with dropped(dropping, 0, 0):
        assert (dropping(*INPUT) - plain(*INPUT)).abs().max() > 1e-3
        torch.testing.assert_close(whole(*INPUT), plain(*INPUT), **ROUNDING)  # nor in what is saved
    assert torch.equal(dropping(*INPUT), plain(*INPUT))
    assert dropping.state_dict().keys() == plain.state_dict().keys()


def test_the_ratio_is_1_at_the_weights_that_acted_and_only_with_their_mask(tmp_path):
    policy = trained()
    batch, learner = rolled(policy), learner_of(policy)
    gap = learner.transitions.require_on_policy
    with dropped(policy, 0, 0):
        assert gap(batch, 0.2)["log_ratio_max"] < 1e-3
    with pytest.raises(NumericalError, match="ratio is not 1"):
        gap(batch, 0.2)
    with dropped(policy, 0, 1), pytest.raises(NumericalError, match="ratio is not 1"):
        gap(batch, 0.2)
    assert preflight(learner, rolled(policy, PREFLIGHT))["log_ratio_max"] < 1e-3
    told = [Guarded(learner, Config(), tmp_path).update(rolled(policy, n))["log_ratio_first"] for n in range(2)]
    assert max(told) < 1e-3


def test_walks_do_not_depend_on_how_they_are_cut_into_items():
    policy = trained()
    whole, parts, alone = (rolled(policy, 0, size) for size in (12, 6, 1))
    for other in (parts, alone):
        torch.testing.assert_close(other.x, whole.x, **ROUNDING)
    assert torch.equal(rolled(policy, 0, 6).x, parts.x)
    assert (rolled(policy, 1).x[:, -1] - whole.x[:, -1]).abs().max() > 1e-2


def test_the_policy_that_acted_has_the_mask_too_where_a_learner_keeps_it():
    learner = nft.Learner(trained(), nft.Config())
    assert learner.policy is not learner.trained
    with dropped(learner.policy, 0, 0):
        mine, theirs = learner.trained.denoiser.net(*INPUT), learner.policy.denoiser.net(*INPUT)
        assert torch.equal(mine, theirs)
    assert not torch.equal(mine, learner.trained.denoiser.net(*INPUT))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    (root / "prompts.txt").write_text("a red cat\ntwo dogs\n")
    return root


def begun(root: Path, folder: Path, text: str, **pipeline) -> tuple[models.Card, nn.Module]:
    config = settings(folder, "ddpo", root, lora=text)
    config = replace(config, pipeline=replace(config.pipeline, **pipeline))
    denoiser, card, *_ = base_model.begin(opened(config).base, torch.device("cpu"), Signals(), Progress())
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in learned(denoiser).values():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return card, denoiser


def answer(denoiser: nn.Module) -> torch.Tensor:
    x = torch.linspace(-1, 1, 2 * 4 * 8 * 8).reshape(2, 4, 8, 8)
    return denoiser.net(x, torch.tensor([500.0, 20.0]), torch.arange(2))


def test_the_export_drops_nothing_even_in_training_mode(root, tiny_pipelines, tmp_path):
    card, denoiser = begun(root, tiny_pipelines["sd"], LORA.replace(")", ", dropout=0.5)"))
    models.save(tmp_path, denoiser, card)
    with safe_open(tmp_path / pipelines.LORA, "pt") as file:
        about = json.loads(file.metadata()["lora_adapter_metadata"])
    assert about["unet.lora_dropout"] == 0
    pipe = diffusers.DiffusionPipeline.from_pretrained(tiny_pipelines["sd"])
    pipe.load_lora_weights(tmp_path)
    pipe.unet.train()
    own, denoiser.net.model = denoiser.net.model, pipe.unet
    theirs = answer(denoiser)
    denoiser.net.model = own
    torch.testing.assert_close(theirs, answer(denoiser), **ROUNDING)


def test_activations_that_are_made_again_have_the_mask(root, tiny_pipelines):
    grads = []
    for checkpointing in (False, True):
        _, denoiser = begun(root, tiny_pipelines["sd"], TEXT, checkpointing=checkpointing)
        with dropped(denoiser, 0, 5):
            answer(denoiser).square().mean().backward()
        grads.append({name: p.grad for name, p in denoiser.named_parameters() if ADAPTER in name})
    assert any(bool((grad == 0).all(0).any()) for name, grad in grads[0].items() if "lora_A" in name)
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-3, atol=1e-7)
