"""Frozen weights that are rounded to 4 or 8 bits: how far, in how many bytes, with adapters trained over them."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from pipeline_runs import LORA, ran, settings
from safetensors.torch import load_file
from tiny_pipelines import PROMPTS, about
from torch import nn

from rlfusion import models
from rlfusion.agents import AGENTS
from rlfusion.cli.arguments import settings_of
from rlfusion.common.errors import ConfigError
from rlfusion.common.progress import Progress
from rlfusion.common.seeding import normal
from rlfusion.common.stops import Signals
from rlfusion.config.parts import Learners
from rlfusion.jobs.finetune import finetune
from rlfusion.models import pipelines
from rlfusion.models.pipelines import quantized

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
WAYS = ["nf4", "int8", "torchao_int8"]


def usable(how: str) -> str:
    """A way to round weights, or the reason to skip it."""
    try:
        quantized.quantize(nn.Sequential(nn.Linear(4, 4)), how, torch.float32)
    except ConfigError as error:
        pytest.skip(str(error))
    return how


def answers(denoiser, rows: slice = slice(None)) -> torch.Tensor:
    net = denoiser.net
    shape = denoiser.space.latent((3, 16, 16))
    x, t = normal(("quantized",), range(3), shape)[rows], torch.tensor([900.0, 500.0, 100.0])[rows]
    label = (torch.arange(3) % net.conditions.count)[rows]
    with torch.no_grad():
        weight = {"label": label, "w": torch.full((len(x),), 2.0)}
        return net(x, t, weight if net.family.embeds(net.model.config) else label).float()


@pytest.mark.parametrize("how", WAYS)
def test_every_weight_is_rounded_to_its_law_and_no_further(how):
    usable(how)
    torch.manual_seed(0)
    layer = nn.Linear(128, 96)
    weight = layer.weight.detach().clone()
    net = nn.Sequential(layer)
    quantized.quantize(net, how, torch.float32)
    eye = torch.eye(128)
    found = (net(eye) - net(torch.zeros(1, 128))).T
    if how == "nf4":
        from bitsandbytes.functional import get_4bit_type

        law = get_4bit_type("nf4", device="cpu")
        scale = weight.reshape(-1, quantized.BLOCK).abs().amax(1, keepdim=True)
        nearest = (weight.reshape(-1, quantized.BLOCK, 1) / scale[:, :, None] - law).abs().argmin(-1)
        torch.testing.assert_close(found, (law[nearest] * scale).reshape(weight.shape), rtol=1e-5, atol=1e-6)
    else:
        step = weight.abs().amax(1, keepdim=True) / 127
        assert ((found - weight).abs() <= 0.57 * step).all()
        assert ((found - weight).abs() > 0.3 * step).any()
    assert torch.equal(net(torch.zeros(1, 128))[0], layer.bias)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("name", ["sd", "sd3", "flux"])
def test_a_network_of_rounded_weights_answers_alike_in_every_process_and_batch(name, how, tiny_pipelines):
    usable(how)
    about_it = about(tiny_pipelines[name])
    plain = pipelines.build(about_it, PROMPTS)
    one, two = (pipelines.build(about_it | {"quantize": how}, PROMPTS) for _ in range(2))
    found, expected = answers(one), answers(plain)
    assert torch.equal(found, answers(two))
    far = ((found - expected).norm() / expected.norm()).item()
    assert 1e-5 < far < {"nf4": 0.3}.get(how, 0.03)
    alone = answers(one, slice(1, 2))
    assert (alone - found[1:2]).abs().max() <= 1e-4 * found.abs().max()
    layers = [part for part in one.net.model.modules() if isinstance(part, nn.Linear)]
    assert len(layers) > 10
    assert not any(type(part) is nn.Linear and type(part.weight) is nn.Parameter for part in layers)
    assert not any(p.requires_grad for p in one.net.parameters())


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_the_bytes_that_are_told_are_those_that_are_held(how, tiny_pipelines):
    usable(how)
    told = pipelines.network_bytes(about(tiny_pipelines["sd3"]) | {"quantize": how})
    plain = pipelines.network_bytes(about(tiny_pipelines["sd3"]))
    model = pipelines.build(about(tiny_pipelines["sd3"]) | {"quantize": how}, PROMPTS).net.model
    beside = ("quant_map", "bitsandbytes", "weight_format", "pos_embed.pos_embed")  # codes, notes, and a buffer
    held = sum(v.numel() * v.element_size() for n, v in model.state_dict().items() if not any(b in n for b in beside))
    assert told == held < plain / 2


@pytest.mark.parametrize(("how", "agent"), [("nf4", "ddpo"), ("int8", "draft"), ("torchao_int8", "grpo")])
def test_adapters_are_trained_over_rounded_weights_and_saved_for_plain_ones(how, agent, tmp_path, tiny_pipelines):
    usable(how)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    config = settings(tiny_pipelines["sd"], agent, tmp_path, lora=LORA, updates=2, checkpoint_every=1)
    config = replace(config, pipeline=replace(config.pipeline, quantize=how))
    ran(config, "run")
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    firsts = [line["train/log_ratio_first"] for line in lines if "train/log_ratio_first" in line]
    assert len(firsts) == (0 if agent == "draft" else 2)
    assert all(abs(first) < 1e-5 for first in firsts)
    card = models.load_card(run)
    assert "quantize" not in card.pipeline
    assert card.pipeline["adapters"] == [str((run / "model").resolve())]
    expected = load_file(run / "model" / pipelines.LORA)
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    shutil.rmtree(run / "model")
    (run / "summary.json").unlink()
    finetune(config, run, Signals(), Progress())
    found = load_file(run / "model" / pipelines.LORA)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora": ""}, "quantize = int8: rounded weights are not trained, expected none, or adapters"),
        ({"learner": Learners(ranks=2, shares=2, shard="fsdp")}, "quantize = int8: rounded weights are not split"),
        (
            {"agent": AGENTS["qsm"]()},
            r"critic = 'Copy\(\)': it copies weights that are rounded, expected pipeline.quantize none",
        ),
    ],
)
def test_what_rounded_weights_cannot_do_is_refused(changes, said, tmp_path, tiny_pipelines):
    usable("int8")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    config = settings(tiny_pipelines["sd"], "ddpo", tmp_path, lora=LORA, updates=1)
    config = replace(config, pipeline=replace(config.pipeline, quantize="int8"), **changes)
    with pytest.raises(ConfigError, match=said):
        ran(config, "run")


@pytest.mark.parametrize(
    ("how", "package"), [("nf4", "bitsandbytes"), ("int8", "bitsandbytes"), ("torchao_int8", "torchao")]
)
def test_a_package_that_is_not_here_is_named(how, package, monkeypatch):
    for name in (package, f"{package}.nn", f"{package}.quantization"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ConfigError, match=f"quantize = {how} needs a newer package {package}: pip install -U {package}"
    ):
        quantized.quantize(nn.Sequential(nn.Linear(2, 2)), how, torch.float32)


def test_a_way_to_round_that_is_none_is_told_which_there_are():
    with pytest.raises(ConfigError, match=r"pipeline.quantize.*nf4.*int8.*torchao_int8"):
        settings_of("finetune", ["--pipeline.quantize", "int4"])
    with pytest.raises(ConfigError, match=r"pipeline.quantize"):
        settings_of("finetune", ["--load_in_4bit", "true"])
