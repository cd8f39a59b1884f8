"""Adapters: nothing changes at the start, only they are trained and travel, and what is saved needs no peft."""

import json
import subprocess
import sys
import threading

import pytest
import torch
from adapted import NETS, policy_of, randomised
from processes import rlfusion
from rounding import ROUNDING
from safetensors.torch import load_file
from tiny_runs import TINY

from rlfusion import models
from rlfusion.common.errors import ConfigError
from rlfusion.common.weights import ADAPTER, Weights, WeightsError, learned
from rlfusion.diffusion.policy import frozen_copy
from rlfusion.models import lora
from rlfusion.training.optimization import Optimization

INPUT = (torch.randn(3, 1, 8, 8), torch.rand(3), torch.tensor([1, 2, 3]))


@pytest.mark.parametrize("name", NETS)
def test_a_fresh_adapter_changes_nothing_and_merging_gives_the_same_function(name):
    net = randomised(name)
    before, state = net(*INPUT), torch.get_rng_state()
    lora.attach(net, "LoRA(rank=2, alpha=6)", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(net(*INPUT), before)
    trained = {n for n, p in net.named_parameters() if p.requires_grad}
    assert trained == {n for n in net.state_dict() if ADAPTER in n} != set()
    for parameter in net.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    after = net(*INPUT)
    assert (after - before).abs().max() > 1e-3
    whole = lora.merged(net)
    assert whole.state_dict().keys() == NETS[name]().state_dict().keys()
    torch.testing.assert_close(whole(*INPUT), after, **ROUNDING)
    torch.testing.assert_close(net(*INPUT), after, **ROUNDING)  # the adapted one goes on as it was


def test_the_strength_is_alpha_over_rank():
    net = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3, bias=False)})
    lora.attach(net, "LoRA(rank=2, alpha=6)")
    layer = net["a"]
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(4, 3)
    low = x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
    torch.testing.assert_close(layer(x), x @ layer.get_base_layer().weight.T + 3 * low, **ROUNDING)


@pytest.mark.parametrize(("text", "scaling"), [("LoRA(rank=4)", 1.0), ("LoRA(rank=4, alpha=1)", 0.25)])
def test_the_scaling_is_that_of_peft(text, scaling):
    net = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3)})
    lora.attach(net, text)
    assert net["a"].scaling == {"default": scaling}


@pytest.mark.alone
def test_peft_asks_for_bitsandbytes_as_before_once_all_threads_are_done():
    from peft.tuners.lora import model

    before, inside = model.is_bnb_available, threading.Event()

    def other():
        with lora.without_bitsandbytes():
            inside.set()

    with lora.without_bitsandbytes():
        thread = threading.Thread(target=other)
        thread.start()
        assert not inside.wait(0.1)
    thread.join()
    assert inside.is_set()
    assert model.is_bnb_available is before


def test_bitsandbytes_is_not_imported_for_adapters_of_plain_layers():
    """Of a process of its own: this one may have imported it long ago."""
    code = (
        "import sys\nfrom torch import nn\nfrom rlfusion.models import lora\n"
        "net = nn.Sequential(nn.Linear(2, 2))\nlora.attach(net, 'LoRA(rank=1)')\n"
        "assert 'bitsandbytes' not in sys.modules\n"
        "from peft.tuners.lora import model\nassert model.is_bnb_available() and model.is_bnb_4bit_available()\n"
    )
    pytest.importorskip("bitsandbytes")
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr[-2000:]


@pytest.mark.parametrize("alpha", ["0", "-1"])
def test_adapters_without_strength_are_refused(alpha):
    with pytest.raises(ConfigError, match=f"alpha = {alpha}: expected a finite number > 0, or None"):
        lora.parse(f"LoRA(alpha={alpha})")


def test_targets_name_layers_and_others_are_refused_with_a_near_match():
    net = randomised("dit")
    layers = [n for n, m in net.named_modules() if isinstance(m, torch.nn.Linear)]
    lora.attach(net, f"LoRA(rank=2, targets='{layers[-1]}')")
    assert {n.partition(".lora")[0] for n in net.state_dict() if ADAPTER in n} == {layers[-1]}
    with pytest.raises(ConfigError, match="did you mean 'time'"):
        lora.attach(randomised("mlp"), "LoRA(targets='tim')")
    with pytest.raises(ConfigError, match="rank"):
        lora.parse("LoRA(rank=0)")
    with pytest.raises(ConfigError, match="dropout = 1"):
        lora.parse("LoRA(dropout=1)")
    with pytest.raises(ConfigError, match="LoRA"):
        lora.parse("DoRA(rank=1)")


def test_equal_seeds_give_equal_adapters():
    def of(seed: int) -> dict[str, torch.Tensor]:
        net = randomised("mlp")
        lora.attach(net, "LoRA(rank=2)", seed)
        return learned(net)

    one, again, other = of(3), of(3), of(4)
    assert all(torch.equal(one[n], again[n]) for n in one)
    assert not all(torch.equal(one[n], other[n]) for n in one)


def test_only_adapters_travel_are_averaged_and_kept():
    policy, other = policy_of(), policy_of()
    weights = Weights.of(policy, 1)
    assert len(weights.blob) < 0.6 * len(Weights.of(policy_of(""), 1).blob)
    optimization = Optimization(policy, 1e-2, ema=0.5)
    assert optimization.ema.shadow.keys() == learned(policy).keys() == optimization.state_dict()["module"].keys()
    frozen = {n: t.clone() for n, t in policy.state_dict().items() if ADAPTER not in n}
    for _ in range(2):
        policy.denoiser.net(*INPUT).square().sum().backward()
        optimization.step()
    assert all(torch.equal(policy.state_dict()[n], t) for n, t in frozen.items())
    Weights.of(policy, 2).load_into(other)
    assert torch.equal(other.denoiser.net(*INPUT), policy.denoiser.net(*INPUT))
    with pytest.raises(WeightsError, match="not in the module"):
        weights.load_into(policy_of(""))


def test_a_frozen_copy_shares_what_is_not_trained_and_keeps_the_rest():
    policy = policy_of()
    copy = frozen_copy(policy)
    for (name, mine), (_, theirs) in zip(policy.named_parameters(), copy.named_parameters()):
        assert (mine is theirs) == (ADAPTER not in name)
        assert not theirs.requires_grad
    before = copy.denoiser.net(*INPUT)
    with torch.no_grad():
        for parameter in learned(policy).values():
            parameter.add_(1)
    assert torch.equal(copy.denoiser.net(*INPUT), before)


AGENTS = {
    "ddpo": ("--agent.kl_loss", 0.1),
    "grpo": (),
    "ppo": (),
    "awm": ("--agent.kl_loss", 0.1),
    "nft": ("--agent.kl", 0.1),
    "dpo": (),
    "sft": ("--agent.data", "digits"),
    "opd": ("--agent.teacher_guidance", 2.0),
    "drwr": (),
    "dawr": (),
    "qsm": ("--reward", "ink", "--agent.q", "denoised", "--agent.noisings", 1),
    "draft": ("--reward", "ink", "--agent.kl_loss", 0.1),
    "refl": ("--reward", "ink"),
}


@pytest.mark.parametrize("agent", AGENTS)
def test_every_learner_trains_adapters(agent, tiny_root, tmp_path):
    common = ("--root", tiny_root, *TINY, "--updates", 3, "--lora", "LoRA(rank=2, dropout=0.3)")
    said = rlfusion(tmp_path, "finetune", "--agent", agent, *common, "--name", f"lora-{agent}", *AGENTS[agent])
    assert said.code == 0, said.err
    folder = tiny_root / f"lora-{agent}"
    state = load_file(folder / "model" / "weights.safetensors")
    assert not [n for n in state if ADAPTER in n]
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert any(bool(tensor.any()) for name, tensor in adapter.items() if "lora_B" in name)
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["r"] == 2
    models.load(folder)


def test_resumption_gives_the_bits_of_one_process(tiny_root, tmp_path):
    """Of masks too. (That workers draw the same is seen on a pretrained pipeline, in jobs/test_workers.)"""
    common = ("--root", tiny_root, *TINY, "--lora", "LoRA(rank=2, dropout=0.5)")
    for name in ("lora0", "lora1"):
        said = rlfusion(tmp_path, "finetune", *common, "--name", name)
        assert said.code == 0, said.err
    mine, theirs = (tiny_root / n / "model" / "weights.safetensors" for n in ("lora0", "lora1"))
    assert mine.read_bytes() == theirs.read_bytes()
    for name in ("summary.json", "model/weights.safetensors"):
        (tiny_root / "lora1" / name).unlink()
    for late in (tiny_root / "lora1" / "checkpoints").glob("step-*6*"):
        for file in late.iterdir():
            file.unlink()
        late.rmdir()
    assert rlfusion(tmp_path, "finetune", "--resume", tiny_root / "lora1").code == 0
    assert mine.read_bytes() == theirs.read_bytes()
