"""A diffusion transformer for images and latents (Peebles & Xie 2023, section 3: adaLN-Zero).

    (1)  h = W patches(x) + P,     patches (B, N, p p C), N = (H / p)(W / p);   P fixed, N x width:
         [sin c r, cos c r, sin y r, cos y r] of a patch's column c and row y, at rates r_k = 10000^(-k / (width / 4))
    (2)  e = silu(W2 silu(W1 fourier(t)) + E[label])                             one embedding of time and class
    (3)  a block:  h + g1 attention(m1(h)), then h + g2 mlp(m2(h)),   m(h) = (1 + s) norm(h) + b,
         with b1, s1, g1, b2, s2, g2 linear in e
    (4)  y = unpatches(W m(h)),  again with b, s linear in e

The linear maps of e, and the last W, start at 0: at first every block is the identity and the network answers 0. The
call is that of ``mlp.ResidualMLP``.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from rlfusion.common.errors import ConfigError
from rlfusion.nets.parts import check_frequency, fourier, through, zeroed


def patchify(x: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, N, patch patch C): patches by rows, each with its pixels by rows, channels innermost."""
    rows, columns = x.shape[2] // patch, x.shape[3] // patch
    apart = x.reshape(-1, x.shape[1], rows, patch, columns, patch)
    return apart.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(tokens: Tensor, patch: int, shape: tuple[int, ...]) -> Tensor:
    """The inverse of ``patchify``; ``shape`` is (C, H, W)."""
    channels, height, width = shape
    apart = tokens.reshape(-1, height // patch, width // patch, patch, patch, channels)
    return apart.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def positions(rows: int, columns: int, width: int) -> Tensor:
    """P of Eq. (1), (rows columns, width), float64."""
    k = torch.arange(width // 4, dtype=torch.float64)
    rates = 10000 ** (-k / (width / 4))
    y, c = torch.meshgrid(torch.arange(rows).double(), torch.arange(columns).double(), indexing="ij")
    angles = [place.reshape(-1, 1) * rates for place in (c, y)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], 1)


class Norm(nn.Module):
    """m of Eq. (3); ``shift`` and ``scale`` (B, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)

    def forward(self, h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        normal = self.norm(h)
        return torch.addcmul(normal + shift[:, None], normal, scale[:, None])


class Attention(nn.Module):
    """W attention(h) over the N tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(h).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Eq. (3)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.modulate = nn.Linear(width, 6 * width)
        self.norm1, self.attention = Norm(width), Attention(width, heads)
        self.norm2 = Norm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        b1, s1, g1, b2, s2, g2 = self.modulate(embedding).chunk(6, 1)
        h = torch.addcmul(h, g1[:, None], self.attention(self.norm1(h, b1, s1)))
        return torch.addcmul(h, g2[:, None], self.mlp(self.norm2(h, b2, s2)))


class DiT(nn.Module):
    """``net(x, t, label)``: x (B, C, H, W), t (B,), label (B,) int64 in 0..classes, where ``classes`` means no class.

    Attributes:
        shape: (C, H, W) of a sample; H and W are multiples of ``patch``.
        patch: side p of a patch, in pixels.
        width: features of a token, a multiple of 4 and of ``heads``.
        depth: blocks.
        heads: of each attention.
        recompute: gradient checkpointing: recompute each block in the backward pass instead of keeping its activations.
        frequency: the largest of the embedding of time, as of ``mlp.ResidualMLP``.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        classes: int,
        patch: int = 2,
        width: int = 128,
        depth: int = 6,
        heads: int = 4,
        recompute: bool = False,
        frequency: float = 1000.0,
    ) -> None:
        super().__init__()
        _check(shape, patch, width, depth, heads)
        check_frequency(frequency)
        self.frequency = frequency
        self.shape, self.classes, self.patch, self.recompute = tuple(shape), classes, patch, recompute
        self.width, size = width, patch * patch * shape[0]
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(classes + 1, width)
        self.enter = nn.Linear(size, width)
        at = positions(shape[1] // patch, shape[2] // patch, width)
        self.register_buffer("positions", at.to(self.enter.weight.dtype), persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.modulate, self.norm = nn.Linear(width, 2 * width), Norm(width)
        self.leave = nn.Linear(width, size)
        self._initialize()

    def _initialize(self) -> None:
        """As the authors' code does: Xavier, 0.02 for what embeds, 0 for Eq. (4) and the maps of e."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for embeds in (self.label, self.time[0], self.time[2]):
            nn.init.normal_(embeds.weight, std=0.02)
        for last in (self.leave, self.modulate, *(block.modulate for block in self.blocks)):
            zeroed(last)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        embedding = silu(self.time(fourier(t, self.width, self.frequency).to(x)) + self.label(label))
        h = self.enter(patchify(x, self.patch)) + self.positions
        for block in self.blocks:
            h = through(block, self.recompute, h, embedding)
        shift, scale = self.modulate(embedding).chunk(2, 1)
        return unpatchify(self.leave(self.norm(h, shift, scale)), self.patch, self.shape)


def _check(shape: tuple[int, ...], patch: int, width: int, depth: int, heads: int) -> None:
    if min(patch, depth, heads) < 1:
        raise ConfigError(f"patch = {patch}, depth = {depth}, heads = {heads}: expected numbers >= 1")
    if len(shape) != 3 or any(side % patch for side in shape[1:]):
        raise ConfigError(f"shape = {tuple(shape)}: expected (C, H, W), H and W multiples of patch = {patch}")
    if width < 4 or width % 4 or width % heads:
        raise ConfigError(f"width = {width}: expected a multiple of 4 and of heads = {heads}")
