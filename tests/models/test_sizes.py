"""How many samples a call of a pipeline has, unless told."""

import itertools

import pytest
import torch
from torch.nn import functional as F

import rlfusion as rlf
from rlfusion.cli.arguments import settings_of
from rlfusion.config import to_yaml
from rlfusion.jobs import measure
from rlfusion.models.pipelines import sizes
from rlfusion.training import devices

GIB = 2**30
SD15 = sizes.Network(860_000_000, 4, 512**2, False, False)
NETWORKS = [
    SD15._replace(parameters=p, width=w, pixels=side**2, adapters=w < 4 or adapters, checkpointing=again)
    for p in (10**5, 860_000_000, 12 * 10**9)
    for w, side, adapters, again in itertools.product((2, 4), (16, 512, 1024), (False, True), (False, True))
]


@pytest.mark.parametrize("gib", [0.5, 12, 24, 80, 141])
def test_what_is_more_than_one_sample_fits(gib):
    """With what is held, three quarters of the room are the network's and one the autoencoder's."""
    memory = int(gib * GIB)
    for network in NETWORKS:
        found = sizes.fitting(network, memory)
        assert all(1 <= n <= most and n & (n - 1) == 0 for n, most in zip(found, sizes.MOST))
        room = 0.8 * memory - network.held
        updated = network.activations / (8 if network.checkpointing else 1)
        assert found.micro_batch == 1 or found.micro_batch * updated <= 0.75 * room
        assert found.item == 1 or found.item * network.activations / 8 <= 0.75 * room
        assert found.decode == 1 or found.decode * 4 * GIB * network.pixels / 512**2 <= 0.25 * room
        assert found.micro_batch == 64 or 2 * found.micro_batch * updated > 0.75 * room


def test_cases_by_hand():
    adapters = SD15._replace(width=2, adapters=True)
    assert sizes.fitting(adapters, 24 * GIB) == (
        8,
        64,
        1,
    )  # room 17.4: 13.1 / 1.5 = 8.7, 13.1 / .19 = 70, 4.4 / 4 = 1.1
    assert sizes.fitting(adapters, 80 * GIB) == (16, 64, 2)  # 62.2: 46.7 / 1.5 = 31, 15.6 / 4 = 3
    assert sizes.fitting(SD15, 24 * GIB) == (1, 1, 1)  # 38 GiB for all weights alone


def told(model, *words):
    made = settings_of("finetune", ["--model", str(model), *words])
    return made.rollout.item, made.agent.micro_batch, made.pipeline.decode


def test_a_run_has_them_written_down_and_keeps_them(tiny_pipelines, tmp_path, monkeypatch):
    model = tiny_pipelines["sd"]
    monkeypatch.setattr(devices, "memory_of", lambda device: 24 * GIB)
    assert told(model) == (64, 64, 8)
    assert told(model, "--device", "cpu") == (8, 8, None)
    assert told(model, "--rollout.item", "5", "--agent.micro_batch", "3", "--pipeline.decode", "2") == (5, 3, 2)
    compared = settings_of("compare", ["--model", str(model)])
    assert (compared.rollout.item, compared.micro_batch) == (64, 64)
    (tmp_path / "config.yaml").write_text(to_yaml(settings_of("finetune", ["--model", str(model)])))
    monkeypatch.setattr(devices, "memory_of", lambda device: 2**20)
    assert told(model) == (1, 1, 1)
    assert told(model, "--config", str(tmp_path / "config.yaml")) == (64, 64, 8)


@pytest.mark.parametrize(
    ("words", "factor"), [(["--pipeline.size", "64"], 16), (["--pipeline.checkpointing", "true"], 1)]
)
def test_images_and_what_is_made_again_count(words, factor, tiny_pipelines, monkeypatch):
    seen = []
    monkeypatch.setattr(devices, "memory_of", lambda device: 24 * GIB)
    monkeypatch.setattr(sizes, "fitting", lambda network, memory: seen.append(network) or sizes.CPU)
    told(tiny_pipelines["sd"])
    told(tiny_pipelines["sd"], *words, "--lora", "LoRA(rank=2)", "--pipeline.dtype", "bfloat16")
    plain, other = seen
    assert other.pixels == factor * plain.pixels
    assert other.checkpointing == (factor == 1)
    assert (plain.width, other.width, plain.adapters, other.adapters) == (4, 2, False, True)
    assert plain.parameters == other.parameters > 10_000


@pytest.mark.parametrize("size", [16, 32])
def test_how_many_are_walked_at_a_time_changes_samples_by_rounding_alone(size, tiny_pipelines, tmp_path, monkeypatch):
    """Latents of 8 x 8 and 16 x 16. A U-Net's kernels sum in another order where the batch has another size, so that
    the numbers are settings of a run, not of a machine's free memory.
    """
    (tmp_path / "prompts.txt").write_text("a red cat\ntwo dogs, 3")
    about = {"prompts": str(tmp_path / "prompts.txt"), "size": size}
    more = {"root": str(tmp_path), "device": "cpu", "chain": {"steps": 3}}
    run = rlf.finetune(tiny_pipelines["sd"], "tiny_pipelines:warm", pipeline=about, **more)
    times, label = run.config.chain.times(run.policy.denoiser), torch.arange(7) % 2

    def drawn(count: int) -> torch.Tensor:
        monkeypatch.setattr(measure, "at_once", lambda chunk, latent: count)
        monkeypatch.setattr(run.policy.space, "chunk", count)
        return measure.draw(run.policy, times, label, (3, size, size), 0, "evaluation")

    whole = drawn(7)
    assert torch.equal(drawn(7), whole)
    assert (drawn(3) - whole).abs().max() < 1e-4 < whole.std()


class Attention(torch.autograd.Function):
    """Keeps what a fused kernel keeps, and computes nothing."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out


def test_the_rule_holds_what_stable_diffusion_keeps(monkeypatch):
    """By count, without memory: each storage that the backward pass of one more sample needs."""
    from diffusers import UNet2DConditionModel

    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda query, key, value, **_: Attention.apply(query, key, value)
    )
    with torch.device("meta"):
        net = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)

        def kept(rows: int) -> int:
            held: list[torch.Tensor] = []
            inputs = torch.zeros(rows, 4, 64, 64), torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, 77, 768)
            with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x) or x, lambda x: x):
                net(*inputs)
                stored = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in held}
            return sum(stored.values())

        one = kept(2) - kept(1)
    parameters = sum(p.numel() for p in net.parameters())
    assert 1 <= sizes.Network(parameters, 4, 512**2, False, False).activations / one < 2
