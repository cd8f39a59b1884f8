"""What every network must do alike: recompute to the same bits, compile to one graph, and serve a denoiser compiled."""

import copy

import pytest
import torch
from rounding import ROUNDING
from torch._dynamo.testing import CompileCounter

from rlfusion import models
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.schedule import Cosine
from rlfusion.models import Card, Config

UNET, DIT = "UNet(width=8, multipliers=(1, 2), depth=1, attention=(1,)%s)", "DiT(width=16, depth=3, heads=2%s)"
NETS = ["ResidualMLP(width=16, depth=2)", UNET % "", DIT % "", UNET % ", recompute=True", DIT % ", recompute=True"]


def network(text: str) -> torch.nn.Module:
    """With weights that are nowhere 0, so that every path counts."""
    net = models.build(Card(Config(text), (1, 8, 8), ("a", "b"))).net
    torch.manual_seed(0)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net


def inputs(n: int):
    g = torch.Generator().manual_seed(n)
    return torch.randn(n, 1, 8, 8, generator=g), torch.rand(n, generator=g), torch.arange(n) % 3


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@pytest.mark.parametrize("text", [UNET, DIT])
def test_recomputation_changes_memory_and_nothing_else(text):
    answers, held = [], []
    nets = [network(text % more) for more in ("", ", recompute=True")]
    for net in nets:
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=saved: s.append(x.numel()) or x, lambda x: x):
            answer = net(*inputs(3))
        answer.square().sum().backward()
        answers.append(answer)
        held.append(sum(saved))
    assert held[1] < 0.5 * held[0]
    assert torch.equal(*answers)
    for kept, recomputed in zip(*(net.parameters() for net in nets)):
        assert torch.equal(kept.grad, recomputed.grad)
        assert kept.grad.any()


@pytest.mark.parametrize("text", [*NETS[:3], NETS[-1]])
def test_it_compiles_to_one_graph_for_all_sizes_of_batch(text):
    net, counter = network(text), CompileCounter()
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for n in (3, 5, 2, 12):
        torch.testing.assert_close(compiled(*inputs(n)), net(*inputs(n)), **ROUNDING)
    assert counter.frame_count <= 2  # the second is for any batch


@pytest.mark.parametrize("text", [*NETS[:2], NETS[-1]])
def test_a_denoiser_with_a_compiled_network_gives_the_same_answers_and_gradients(text):
    plain = Denoiser(network(text), Cosine(), "v")
    compiled = copy.deepcopy(plain)
    compiled.net.compile(backend="aot_eager", fullgraph=True)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    x, t, label = inputs(4)
    with torch.no_grad():
        at = torch.tensor(0.3, dtype=torch.float64)
        torch.testing.assert_close(compiled(x, at, label), plain(x, at, label))
    for denoiser in (plain, compiled):
        denoiser(x, t.double(), label).x0.square().sum().backward()
    for mine, theirs in zip(plain.parameters(), compiled.parameters()):
        torch.testing.assert_close(theirs.grad, mine.grad)
