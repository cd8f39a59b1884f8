"""A U-Net for images (Ho et al. 2020, appendix B; Dhariwal & Nichol 2021, section 3).

    (1)  e = W2 silu(W1 fourier(t)) + E[label]                               one embedding of time and class
    (2)  a stage:  h + conv(silu((1 + scale(e)) norm(conv(silu(norm(h)))) + shift(e))),  then self-attention if asked
    (3)  down: stages at width w_i, then half the size;  middle;  up: the same stages, each fed the skip of its mirror

The last convolution of every stage and of the network starts at 0. The call is that of ``mlp.ResidualMLP``.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, scaled_dot_product_attention, silu

from rlfusion.common.errors import ConfigError
from rlfusion.nets.parts import check_frequency, fourier, through, zeroed

GROUPS = 8
HEAD = 32


class Attention(nn.Module):
    """h + W attention(norm(h)) over the H W positions, heads of ``HEAD`` channels (or one head of fewer)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // HEAD)
        self.norm = nn.GroupNorm(GROUPS, width)
        self.qkv, self.out = nn.Conv2d(width, 3 * width, 1), zeroed(nn.Conv2d(width, width, 1))

    def forward(self, h: Tensor) -> Tensor:
        batch, width, *size = h.shape
        q, k, v = self.qkv(self.norm(h)).reshape(batch, 3, self.heads, width // self.heads, -1).mT.unbind(1)
        mixed = scaled_dot_product_attention(q, k, v).mT.reshape(batch, width, *size)
        return h + self.out(mixed)


class Stage(nn.Module):
    """Eq. (2), ``enter`` channels to ``width``."""

    def __init__(self, enter: int, width: int, embedding: int, attend: bool) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(GROUPS, enter), nn.Conv2d(enter, width, 3, padding=1)
        self.modulate = nn.Linear(embedding, 2 * width)
        self.norm2, self.conv2 = nn.GroupNorm(GROUPS, width), zeroed(nn.Conv2d(width, width, 3, padding=1))
        self.skip = nn.Identity() if enter == width else nn.Conv2d(enter, width, 1)
        self.attention = Attention(width) if attend else nn.Identity()

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulate(embedding)[:, :, None, None].chunk(2, 1)
        inner = self.norm2(self.conv1(silu(self.norm1(h))))
        return self.attention(self.skip(h) + self.conv2(silu(torch.addcmul(inner + shift, inner, scale))))


class Up(nn.Module):
    """Twice the size: nearest neighbour, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(interpolate(h, scale_factor=2.0, mode="nearest"))


class UNet(nn.Module):
    """``net(x, t, label)``: x (B, C, H, W), t (B,), label (B,) int64 in 0..classes, where ``classes`` means no class.

    Attributes:
        shape: (C, H, W) of a sample; H and W are multiples of 2 ** (levels - 1).
        width: channels of the first level, a multiple of 8; level i has width * multipliers[i].
        multipliers: one for each level; the size halves between levels.
        depth: stages a level on the way down (one more on the way up).
        attention: the levels, counted from 0, whose stages attend; the middle always does.
        recompute: gradient checkpointing: recompute each stage in the backward pass instead of keeping its activations.
        frequency: the largest of the embedding of time, as of ``mlp.ResidualMLP``.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        classes: int,
        width: int = 64,
        multipliers: tuple[int, ...] = (1, 2, 2),
        depth: int = 2,
        attention: tuple[int, ...] = (1, 2),
        recompute: bool = False,
        frequency: float = 1000.0,
    ) -> None:
        super().__init__()
        _check(shape, width, multipliers, depth, attention)
        check_frequency(frequency)
        self.shape, self.classes, self.width, self.recompute = tuple(shape), classes, width, recompute
        self.frequency = frequency
        embedding = 4 * width
        self.time = nn.Sequential(nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.label = nn.Embedding(classes + 1, embedding)
        self.enter = nn.Conv2d(shape[0], width, 3, padding=1)
        widths = [width * m for m in multipliers]
        down, skips = self._down(widths, depth, embedding, attention)
        self.down = nn.ModuleList(down)
        self.middle = nn.ModuleList(Stage(widths[-1], widths[-1], embedding, attend) for attend in (True, False))
        self.up = nn.ModuleList(self._up(widths, skips, depth, embedding, attention))
        self.norm, self.leave = nn.GroupNorm(GROUPS, widths[0]), zeroed(nn.Conv2d(widths[0], shape[0], 3, padding=1))

    @staticmethod
    def _down(
        widths: list[int], depth: int, embedding: int, attention: tuple[int, ...]
    ) -> tuple[list[nn.Module], list[int]]:
        """The modules of the way down, and the channels of every skip that they leave."""
        modules: list[nn.Module] = []
        skips = [widths[0]]
        for i, w in enumerate(widths):
            for _ in range(depth):
                modules.append(Stage(skips[-1], w, embedding, i in attention))
                skips.append(w)
            if i < len(widths) - 1:
                modules.append(nn.Conv2d(w, w, 3, stride=2, padding=1))
                skips.append(w)
        return modules, skips

    @staticmethod
    def _up(
        widths: list[int], skips: list[int], depth: int, embedding: int, attention: tuple[int, ...]
    ) -> list[nn.Module]:
        modules: list[nn.Module] = []
        channels, skips = widths[-1], list(skips)
        for i, w in reversed(list(enumerate(widths))):
            for _ in range(depth + 1):
                modules.append(Stage(channels + skips.pop(), w, embedding, i in attention))
                channels = w
            if i > 0:
                modules.append(Up(w))
        return modules

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        embedding = silu(self.time(fourier(t, self.width, self.frequency).to(x)) + self.label(label))
        h = self.enter(x)
        skips = [h]
        for module in self.down:
            h = through(module, self.recompute, h, embedding) if isinstance(module, Stage) else module(h)
            skips.append(h)
        for module in self.middle:
            h = through(module, self.recompute, h, embedding)
        for module in self.up:
            if isinstance(module, Stage):
                h = through(module, self.recompute, torch.cat([h, skips.pop()], 1), embedding)
            else:
                h = module(h)
        return self.leave(silu(self.norm(h)))


def _check(
    shape: tuple[int, ...], width: int, multipliers: tuple[int, ...], depth: int, attention: tuple[int, ...]
) -> None:
    if not multipliers or depth < 1:
        raise ConfigError(f"multipliers = {multipliers}, depth = {depth}: expected a level or more, and a depth >= 1")
    factor = 2 ** (len(multipliers) - 1)
    if len(shape) != 3 or any(side % factor for side in shape[1:]):
        raise ConfigError(f"shape = {tuple(shape)}: expected (C, H, W), H and W multiples of {factor}")
    if width < GROUPS or width % GROUPS or any(m < 1 or (width * m) % max(1, width * m // HEAD) for m in multipliers):
        raise ConfigError(f"width = {width}, multipliers = {multipliers}: expected a multiple of {GROUPS} or {HEAD}")
    if not set(attention) <= set(range(len(multipliers))):
        raise ConfigError(f"attention = {attention}: expected levels out of {list(range(len(multipliers)))}")
