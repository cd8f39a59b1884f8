"""``pipeline.attention`` takes a back end of diffusers by its name, or says which there are; ``channels_last`` changes
how images lie in memory and nothing that is computed.
"""

import pytest
import torch
from saved_models import CARD
from tiny_pipelines import PROMPTS

from rlfusion import models
from rlfusion.common.errors import ConfigError
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.schedule import Cosine
from rlfusion.models import Arithmetic
from rlfusion.models.arithmetic import slides
from rlfusion.models.pipelines import Settings
from rlfusion.models.pipelines.attention import fault
from rlfusion.nets.dit import DiT
from rlfusion.nets.mlp import ResidualMLP
from rlfusion.nets.unet import UNet

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    return str(tmp_path / "p.txt")


def built(folder, prompts, attention):
    card = models.describe(str(folder), Settings(prompts=prompts, size=16, attention=attention))
    return models.build(card), card


def called(model) -> set:
    found = [getattr(m, "processor", None) for m in model.modules()]
    return {p._attention_backend for p in found if hasattr(p, "_attention_backend")}


def test_a_back_end_acts_in_the_network_alone_and_gives_its_numbers(tiny_pipelines, prompts):
    from diffusers.models import attention_dispatch as dispatch

    plain, card = built(tiny_pipelines["flux"], prompts, None)
    assert "attention" not in card.pipeline
    told, card = built(tiny_pipelines["flux"], prompts, "_native_math")
    assert card.pipeline["attention"] == "_native_math"
    assert called(plain.net.model) == {None}
    assert called(told.net.model) == {dispatch.AttentionBackendName._NATIVE_MATH}
    other, _ = built(tiny_pipelines["flux"], prompts, None)
    assert called(other.net.model) == {None}
    assert dispatch._AttentionBackendRegistry.get_active_backend()[0] == "native", "no other model has it"
    x, t = torch.randn(2, *plain.space.latent(card.shape)), torch.tensor(0.5, dtype=torch.float64)
    cond = {"label": torch.tensor([0, 1]), "w": torch.full((2,), 2.5)}
    with torch.no_grad():
        torch.testing.assert_close(plain(x, t, cond).x0, told(x, t, cond).x0, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "attention", "said"),
    [
        ("flux", "flsh", "unknown pipeline.attention 'flsh'"),
        ("flux", "flash", "does not work here"),
        ("flux", "sage", "does not work here"),
        ("flux", "flash_hub", "does not work here"),
        ("sd", "_native_math", "is not dispatched by diffusers, expected native"),
        ("sd", "flashy", "unknown pipeline.attention"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(tiny_pipelines, prompts, name, attention, said):
    with pytest.raises(ConfigError, match=said) as refused:
        built(tiny_pipelines[name], prompts, attention)
    assert "\n" not in str(refused.value)
    assert "native" in str(refused.value)


def test_native_is_what_a_network_without_a_dispatcher_calls(tiny_pipelines, prompts):
    built(tiny_pipelines["sd"], prompts, "native")


def test_attention_without_a_gradient_is_a_fault():
    class Dispatch:
        @staticmethod
        def attention_backend(name):
            return torch.no_grad()

        @staticmethod
        def dispatch_attention_fn(q, k, v):
            return {"one": q + k, "none": (q + k + v).detach(), "all": q + k + v}[name]

    name = "all"
    assert not fault(Dispatch, name, "cpu", torch.float32)
    for name in ("one", "none"):
        assert "gradient" in fault(Dispatch, name, "cpu", torch.float32)


def test_channels_last_reaches_the_network_and_leaves_its_numbers():
    seen = []
    net = UNet((3, 16, 16), 4)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.02)
    net.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    denoiser = Denoiser(net, Cosine(), "v")
    x, cond, t = torch.randn(4, 3, 16, 16), torch.arange(4), torch.tensor(0.5, dtype=torch.float64)
    plain = denoiser(x, t, cond)
    Arithmetic(channels_last=True).act(denoiser, CARD)
    last = denoiser(x, t, cond)
    assert seen[0].is_contiguous()
    assert not seen[1].is_contiguous()
    assert seen[1].is_contiguous(memory_format=torch.channels_last)
    assert last.x0.is_contiguous()
    torch.testing.assert_close(plain.x0, last.x0, rtol=1e-4, atol=1e-5)
    last.x0.square().sum().backward()
    assert all(p.grad.is_contiguous() for p in net.parameters() if p.grad is not None), "weights lie as they did"


@pytest.mark.parametrize("net", [ResidualMLP((1, 8, 8), 3), DiT((1, 8, 8), 3)])
def test_channels_last_of_what_is_no_u_net_is_refused(net):
    assert not slides(net)
    with pytest.raises(ConfigError, match=f"True: the network {type(net).__name__} has no convolutions"):
        Arithmetic(channels_last=True).act(Denoiser(net, Cosine(), "v"), CARD)
