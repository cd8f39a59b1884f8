"""The DiT: patches, positions, a block by hand, the whole against diffusers' DiT, refusals."""

import math

import pytest
import torch

from rlfusion.common.errors import ConfigError
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.schedule import Cosine
from rlfusion.nets.dit import Block, DiT, patchify, positions, unpatchify
from rlfusion.nets.parts import fourier

SMALL = {"width": 16, "depth": 2, "heads": 2}


def dit(shape=(3, 8, 8), **settings) -> DiT:
    """In float64, with weights that are nowhere 0, so that every path counts."""
    torch.manual_seed(0)
    net = DiT(shape, classes=4, **SMALL | settings)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net.double()


def inputs(n=3, shape=(3, 8, 8)):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, *shape, generator=g).double(), torch.rand(n, generator=g), torch.arange(n) % 5


@pytest.mark.parametrize(("shape", "patch"), [((3, 8, 8), 2), ((1, 4, 12), 4), ((2, 6, 3), 3), ((4, 5, 7), 1)])
def test_patches_are_the_squares_of_the_image_and_come_back(shape, patch):
    x = torch.arange(2 * math.prod(shape)).reshape(2, *shape).double()
    tokens, columns = patchify(x, patch), shape[2] // patch
    assert tokens.shape == (2, shape[1] // patch * columns, patch * patch * shape[0])
    assert torch.equal(unpatchify(tokens, patch, shape), x)
    for n in range(tokens.shape[1]):
        top, left = n // columns * patch, n % columns * patch
        square = x[1, :, top : top + patch, left : left + patch]
        assert torch.equal(tokens[1, n], square.permute(1, 2, 0).flatten())


def test_positions_are_sines_and_cosines_of_column_then_row():
    at = positions(3, 5, 16)
    for row, column in ((0, 0), (2, 1), (1, 4)):
        wanted = []
        for place in (column, row):
            angles = [place / 10000 ** (k / 4) for k in range(4)]
            wanted += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        torch.testing.assert_close(at[5 * row + column], torch.tensor(wanted).double(), rtol=1e-6, atol=1e-7)
    assert len(at.unique(dim=0)) == 15


@pytest.mark.parametrize(
    ("shape", "patch", "width", "depth", "heads"),
    [((3, 8, 8), 2, 16, 2, 2), ((1, 4, 12), 4, 24, 1, 3), ((4, 5, 5), 1, 8, 3, 1)],
)
def test_it_answers_in_the_shape_of_x_starts_at_zero_and_has_the_counted_parameters(shape, patch, width, depth, heads):
    net = DiT(shape, 4, patch, width, depth, heads)
    x, t, label = inputs(shape=shape)
    assert net(x.float(), t, label).shape == x.shape
    assert net(x.float(), t, label).count_nonzero() == 0
    w, size = width, patch * patch * shape[0]
    blocks = depth * (18 * w * w + 15 * w)
    ends = size * w + w + 2 * (w * w + w) + 5 * w + 2 * w * w + 2 * w + w * size + size
    assert sum(p.numel() for p in net.parameters()) == blocks + ends


def test_a_new_block_is_the_identity():
    h, e = torch.randn(2, 5, 16), torch.randn(2, 16)
    fresh = DiT((3, 8, 8), 4, **SMALL)
    for block in fresh.blocks:
        assert torch.equal(block(h, e), h)
        assert block.attention.qkv.weight.any()
        assert block.mlp[2].weight.any()


def test_initial_weights_are_those_of_the_paper_and_positions_are_not_saved():
    torch.manual_seed(0)
    net = DiT((3, 8, 8), 999, width=64, depth=1, heads=2)
    for embeds in (net.label, net.time[0], net.time[2]):
        assert embeds.weight.std().item() == pytest.approx(0.02, rel=0.1)
    inner = net.blocks[0].mlp[0]
    assert inner.weight.abs().max().item() == pytest.approx(math.sqrt(6 / (64 + 256)), rel=0.01)
    assert not inner.bias.any()
    assert "positions" not in net.state_dict()


def by_hand(block: Block, h: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    """Eq. (3) for one sample, h (N, width), e (width,), in plain sums."""
    n, width = h.shape
    b1, s1, g1, b2, s2, g2 = (block.modulate.weight @ e + block.modulate.bias).split(width)

    def norm(x):
        centred = x - x.mean(1, keepdim=True)
        return centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()

    q, k, v = (((1 + s1) * norm(h) + b1) @ block.attention.qkv.weight.T + block.attention.qkv.bias).split(width, 1)
    heads, size = block.attention.heads, width // block.attention.heads
    mixed = torch.zeros(n, width, dtype=h.dtype)
    for head in range(heads):
        at = slice(head * size, (head + 1) * size)
        weight = (q[:, at] @ k[:, at].T / math.sqrt(size)).exp()
        mixed[:, at] = weight / weight.sum(1, keepdim=True) @ v[:, at]
    h = h + g1 * (mixed @ block.attention.out.weight.T + block.attention.out.bias)
    inner = ((1 + s2) * norm(h) + b2) @ block.mlp[0].weight.T + block.mlp[0].bias
    inner = 0.5 * inner * (1 + (math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)).tanh())
    return h + g2 * (inner @ block.mlp[2].weight.T + block.mlp[2].bias)


def test_a_block_is_its_equation():
    block = dit().blocks[0]
    h, e = torch.randn(3, 7, 16).double(), torch.randn(3, 16).double()
    wanted = torch.stack([by_hand(block, h[i], e[i]) for i in range(3)])
    torch.testing.assert_close(block(h, e), wanted, rtol=1e-10, atol=1e-10)


def test_positions_matter_and_without_them_patches_are_a_set():
    net, (x, t, label) = dit(), inputs()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(2))
    shuffled = unpatchify(patchify(x, 2)[:, order], 2, (3, 8, 8))
    wanted = unpatchify(patchify(net(x, t, label), 2)[:, order], 2, (3, 8, 8))
    assert (net(shuffled, t, label) - wanted).abs().amax() > 1e-2
    net.positions.zero_()
    wanted = unpatchify(patchify(net(x, t, label), 2)[:, order], 2, (3, 8, 8))
    torch.testing.assert_close(net(shuffled, t, label), wanted, rtol=1e-9, atol=1e-9)


def test_rows_are_independent_and_time_and_class_matter():
    net, (x, t, label) = dit(), inputs()
    y = net(x, t, label)
    torch.testing.assert_close(net(x[1:2], t[1:2], label[1:2]), y[1:2])
    assert ((net(x, t + 0.1, label) - y).abs().amax((1, 2, 3)) > 1e-4).all()
    assert ((net(x, t, (label + 1) % 5) - y).abs().amax((1, 2, 3)) > 1e-4).all()


def test_every_pixel_sees_every_pixel_and_every_weight_learns():
    net, (x, t, label) = dit(), inputs()
    x.requires_grad_()
    net(x, t, label)[0, 0, 0, 0].backward()
    assert (x.grad[0] != 0).all()
    net.zero_grad()
    net(*inputs(5)).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def into_diffusers(net: DiT):
    """diffusers' DiT with the weights of ``net``; what embeds time and class is left to ``net``."""
    from diffusers import DiTTransformer2DModel

    channels, side, _ = net.shape
    theirs = DiTTransformer2DModel(
        num_attention_heads=net.blocks[0].attention.heads,
        attention_head_dim=net.width // net.blocks[0].attention.heads,
        in_channels=channels,
        out_channels=channels,
        num_layers=len(net.blocks),
        sample_size=side,
        patch_size=net.patch,
        norm_eps=1e-6,
    ).double()

    class Embedding(torch.nn.Module):
        def forward(self, t, label, hidden_dtype):
            return net.time(fourier(t, net.width).to(hidden_dtype)) + net.label(label)

    def put(linear, module):
        linear.weight.data, linear.bias.data = module.weight.data, module.bias.data

    kernel = net.enter.weight.data.reshape(net.width, net.patch, net.patch, channels).permute(0, 3, 1, 2)
    theirs.pos_embed.proj.weight.data, theirs.pos_embed.proj.bias.data = kernel, net.enter.bias.data
    for mine, block in zip(net.blocks, theirs.transformer_blocks):
        block.norm1.emb = Embedding()
        put(block.norm1.linear, mine.modulate)
        parts = zip(mine.attention.qkv.weight.data.chunk(3), mine.attention.qkv.bias.data.chunk(3))
        for linear, (weight, bias) in zip((block.attn1.to_q, block.attn1.to_k, block.attn1.to_v), parts):
            linear.weight.data, linear.bias.data = weight, bias
        put(block.attn1.to_out[0], mine.attention.out)
        put(block.ff.net[0].proj, mine.mlp[0])
        put(block.ff.net[2], mine.mlp[2])
    put(theirs.proj_out_1, net.modulate)
    put(theirs.proj_out_2, net.leave)
    return theirs.eval()


@pytest.mark.parametrize("patch", [1, 2])
def test_it_is_the_dit_of_diffusers(patch):
    net, (x, t, label) = dit(patch=patch), inputs()
    theirs = into_diffusers(net)
    torch.testing.assert_close(theirs(x, t, label).sample, net(x, t, label), rtol=1e-5, atol=1e-5)


def test_it_is_the_network_of_a_denoiser_and_runs_in_bfloat16():
    x, t, label = inputs()
    prediction = Denoiser(dit(), Cosine(), "v")(x, torch.tensor(0.3, dtype=torch.float64), label)
    assert prediction.x0.shape == prediction.eps.shape == x.shape
    low = dit().bfloat16()(x.bfloat16(), t, label)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), dit()(x, t, label), rtol=0.1, atol=0.3)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"shape": (3, 7, 8)}, "multiples of patch = 2"),
        ({"shape": (3, 8, 7)}, "multiples of patch = 2"),
        ({"shape": (8, 8)}, r"\(C, H, W\)"),
        ({"patch": 3}, "multiples of patch = 3"),
        ({"patch": 0}, "patch = 0"),
        ({"depth": 0}, "depth = 0"),
        ({"heads": 0}, "heads = 0"),
        ({"width": 18}, "width = 18"),
        ({"heads": 3}, "heads = 3"),
        ({"width": 0}, "width = 0"),
    ],
)
def test_impossible_settings_are_refused(settings, match):
    with pytest.raises(ConfigError, match=match):
        dit(**settings)
