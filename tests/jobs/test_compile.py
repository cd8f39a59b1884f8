"""``--compile``: what learns by compiled calls, what it saves, and what is refused. torch's "aot_eager" stands for
inductor but in one test: it traces and differentiates in the same way, and needs no C++ compiler.
"""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import TINY

from rlfusion import models
from rlfusion.cli import main
from rlfusion.common import compiled
from rlfusion.common.errors import ConfigError, foreseen
from rlfusion.config import Finetune
from rlfusion.config.parts import Learners, Rollout
from rlfusion.diffusion.chain import Chain
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.policy import frozen_copy
from rlfusion.diffusion.schedule import Cosine
from rlfusion.jobs.finetune.checks import _require_device as require_device_of
from rlfusion.jobs.parts import opened
from rlfusion.jobs.preflight import require_alike
from rlfusion.jobs.tasks import build_task, recipe
from rlfusion.nets.mlp import ResidualMLP
from rlfusion.rewards import ink
from rlfusion.rl.agent import Clip
from rlfusion.rollout import Task, plan, run_item

SHORT = ("--reward", "ink", "--updates", 2, "--checkpoint_every", 1, "--monitor.every", 1, "--monitor.samples", 50)
SHORT = (*SHORT, "--evaluation.deterministic", "false", "--threads", 1, "--chain.steps", 3)


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def finetune(root, name: str, *settings: object) -> int:
    return main.main([str(v) for v in ("finetune", "--root", root, "--name", name, *TINY, *SHORT, *settings)])


def weights(root, name: str) -> dict[str, torch.Tensor]:
    return load_file(root / name / "model" / "weights.safetensors")


def test_a_compiled_run_learns_as_a_plain_one_and_resumed_it_has_the_bits_of_one_that_never_stopped(tiny_root):
    assert finetune(tiny_root, "plain") == 0
    assert finetune(tiny_root, "whole", "--compile", "true") == 0
    assert finetune(tiny_root, "halved", "--compile", "true", "--updates", 1) == 0
    torch.compiler.reset()
    again = ("finetune", "--resume", str(tiny_root / "halved"), "--change", "updates=2")
    assert main.main(list(again)) == 0
    plain, whole, halved = (weights(tiny_root, name) for name in ("plain", "whole", "halved"))
    assert plain.keys() == whole.keys() == halved.keys()
    for name, value in whole.items():
        assert torch.equal(value, halved[name])
        torch.testing.assert_close(value, plain[name], rtol=1e-3, atol=1e-4)
    assert "compile: true" in (tiny_root / "halved" / "config.yaml").read_text()


def test_adapters_are_learned_by_compiled_calls_and_saved_by_their_own_names(tiny_root):
    assert finetune(tiny_root, "adapted", "--compile", "true", "--lora", "LoRA(rank=2)", "--agent", "draft") == 0
    adapters = load_file(next((tiny_root / "adapted" / "adapter").glob("*.safetensors")))
    assert adapters
    assert not any("_orig_mod" in name for name in (*adapters, *weights(tiny_root, "adapted")))


class Moody(ResidualMLP):
    """Another network where a graph is recorded."""

    def forward(self, x, t, cond):
        y = super().forward(x, t, cond)
        return y + 0.05 if torch.is_grad_enabled() else y


def walks(net, kernel="DDIM(eta=1.0)"):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.02)
    chain = Chain(steps=3, kernel=kernel)
    denoiser = Denoiser(net, Cosine(), "v")
    compiled.compile_calls(net)
    policy = chain.policy(denoiser, [str(i) for i in range(10)])
    task = Task(policy, chain.grid(denoiser), (1, 8, 8), torch.arange(10), lambda x: x.clamp(0, 1), ink, "ink")
    return policy, run_item(task, plan(0, 0, 2, 4, 8, 10, 0)[0])


@pytest.mark.parametrize("kernel", ["DDIM(eta=1.0)", "DDIM(eta=0.0)"])
def test_a_network_whose_two_codes_differ_is_refused_by_a_tenth_of_the_clip(kernel):
    policy, batch = walks(ResidualMLP((1, 8, 8), 10, width=16, depth=1), kernel)
    assert require_alike(policy, batch, Clip(0.2))["compiled_log_ratio_max"] < 1e-3
    policy, batch = walks(Moody((1, 8, 8), 10, width=16, depth=1), kernel)
    with pytest.raises(ConfigError, match="compile = True: compiled, the network answers") as refused:
        require_alike(policy, batch, Clip(0.2))
    assert "\n" not in str(refused.value)
    gap = float(str(refused.value).partition("log ratio| = ")[2].partition(" ")[0])
    assert require_alike(policy, batch, Clip(11 * gap))["compiled_log_ratio_max"] == pytest.approx(gap, rel=1e-2)
    with pytest.raises(ConfigError, match="clip range"):
        require_alike(policy, batch, Clip(9 * gap))
    require_alike(policy, batch, Clip(11 * gap / 64, per_dim=True))


def test_the_only_step_of_a_chain_is_asked_twice(monkeypatch):
    """A call that is recorded and not played gives the first answer again."""
    net = ResidualMLP((1, 8, 8), 10, width=16, depth=1)
    torch.nn.init.normal_(net.leave.weight)
    policy, batch = walks(net)
    first: dict[bool, torch.Tensor] = {}
    forward = type(net).forward

    def stale(self, *args):
        answer = forward(self, *args)
        return answer if torch.is_grad_enabled() else first.setdefault(True, answer)

    monkeypatch.setattr(type(net), "forward", stale)
    torch.compiler.reset()
    one = replace(batch, x=batch.x[:, :2], times=batch.times[[0, -1]])
    with compiled.plain(policy), pytest.raises(ConfigError, match="answers rollouts and updates differently"):
        require_alike(policy, one, Clip(0.2))


def test_copies_are_compiled_and_what_is_measured_is_not():
    policy, _ = walks(ResidualMLP((1, 8, 8), 10, width=16, depth=1))
    copied = frozen_copy(policy)
    assert len(compiled.compiled(copied)) == len(compiled.compiled(policy)) == 1
    with compiled.plain(policy):
        assert not compiled.compiled(policy)
        assert not compiled.compiled(frozen_copy(policy))
    assert compiled.compiled(policy) == [policy.denoiser.net]


def test_each_size_of_a_call_has_a_code_of_its_own_whatever_came_before(monkeypatch):
    monkeypatch.setattr(compiled, "SHAPES", 6)
    net = ResidualMLP((1, 8, 8), 10, width=16, depth=1)
    compiled.compile_calls(net)
    found = []
    with torch.no_grad():
        for rows in (2, 3, 4, 5, 6, 7):
            found.append(net(torch.ones(rows, 1, 8, 8), torch.ones(rows), torch.zeros(rows, dtype=torch.int64)))
        assert [len(y) for y in found] == [2, 3, 4, 5, 6, 7]
        with pytest.raises(Exception, match="limit") as refused:
            net(torch.ones(8, 1, 8, 8), torch.ones(8), torch.zeros(8, dtype=torch.int64))
    assert "compile = True" in str(foreseen(refused.value))


class Smooth(torch.nn.Module):
    """Not one of torch's own modules, which older versions do not compile by themselves."""

    def forward(self, x):
        return torch.nn.functional.silu(x)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_without_a_compiler_it_is_one_line(monkeypatch):
    import torch._inductor.config as inductor

    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(inductor, "force_disable_caches", True)
    net = Smooth()
    compiled.compile_calls(net)
    with pytest.raises(RuntimeError) as raised:
        net(torch.ones(2, 3))
    said = foreseen(raised.value)
    assert isinstance(said, ConfigError)
    assert "\n" not in str(said)
    assert "compile = True: the network's calls cannot be compiled here" in str(said)
    assert "no-such-compiler" in str(said)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"compile": True, "lora": "LoRA(rank=2, dropout=0.1)"}, "dropout"),
        ({"compile": "graphs", "lora": "LoRA(rank=2, dropout=0.1)"}, "dropout"),
        ({"compile": "graphs", "learner": Learners(ranks=2, shard="fsdp", shares=2)}, "learner.shard"),
        ({"compile": True, "learner": Learners(ranks=2, shard="fsdp", shares=2)}, "learner.shard"),
        ({"channels_last": True, "learner": Learners(ranks=2, shard="fsdp", shares=2)}, "learner.shard"),
    ],
)
def test_what_cannot_be_compiled_is_refused_by_name(settings, word):
    with pytest.raises(ConfigError, match=f"(compile|channels_last) = (True|graphs) with .*{word}"):
        Finetune(device="cpu", **settings)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"learner": Learners(ranks=2, shares=2)}, "with learner.gpus_per_rank = 0"),
        ({"learner": Learners(ranks=2, shares=2, gpus_per_rank=1.0), "device": "cpu"}, "the device is 'cpu'"),
        ({"learner": Learners(ranks=2, shares=2, gpus_per_rank=1.0), "device": "cpu:0"}, "the device is 'cpu'"),
        ({"rollout": Rollout(workers=2)}, "with ray.gpus_per_worker = 0"),
    ],
)
def test_graphs_are_refused_where_workers_or_ranks_have_no_gpu(settings, word):
    with pytest.raises(ConfigError, match=f"compile = graphs.*{word}.*expected"):
        require_device_of(Finetune(compile="graphs", **settings))


def test_graphs_are_refused_where_there_is_no_gpu_before_any_work(tiny_root, capsys):
    assert finetune(tiny_root, "graphs", "--compile", "graphs", "--device", "cpu") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "compile = graphs: only a GPU has CUDA graphs, and the device is 'cpu'" in said
    assert not (tiny_root / "graphs").exists()


def test_a_worker_computes_as_the_settings_say(tiny_root):
    config = Finetune(compile=True, precision="bfloat16", reward="ink", device="cpu")
    parts, (denoiser, card) = opened(config), models.load(tiny_root / "first" / "model")
    policy = config.chain.policy(denoiser, card.names)
    told = recipe(parts.task, parts.workers, card, policy, ink, torch.device("cpu"))
    made = build_task(json.loads(told.text), told.blobs).policy
    assert made.denoiser.precision == "bfloat16"
    assert compiled.compiled(made) == [made.denoiser.net]
    last = json.loads(told.text)
    last["arithmetic"]["channels_last"] = True
    with pytest.raises(ConfigError, match="channels_last"):
        build_task(last, told.blobs)
