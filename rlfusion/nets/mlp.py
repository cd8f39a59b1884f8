"""A residual MLP for small images: the embedded default, 0.2 M parameters on 8x8 digits."""

import math

import torch
from torch import Tensor, nn

from rlfusion.common.errors import ConfigError
from rlfusion.nets.parts import check_frequency, fourier, zeroed


class Block(nn.Module):
    """h + W2 act((1 + scale) norm(h) + shift), with scale and shift from the embedding of time and class."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate = nn.Linear(width, 2 * width)
        self.inner, self.outer = nn.Linear(width, width), zeroed(nn.Linear(width, width))

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulate(embedding).chunk(2, 1)
        inner = self.inner(torch.addcmul(self.norm(h) + shift, self.norm(h), scale))
        return h + self.outer(nn.functional.silu(inner))


class ResidualMLP(nn.Module):
    """``net(x, t, label)``: x (B, *shape), t (B,), label (B,) int64 in 0..classes, where ``classes`` means no class.

    ``frequency`` is the largest of the embedding of time. Consistency models want a smooth one, of some 10 (Lu & Song
    2024, section 4.1): their training follows the derivative of the network in time.
    """

    def __init__(
        self, shape: tuple[int, ...], classes: int, width: int = 128, depth: int = 3, frequency: float = 1000.0
    ) -> None:
        super().__init__()
        check_frequency(frequency)
        if width < 2 or width % 2 or depth < 0:
            raise ConfigError(f"width = {width}, depth = {depth}: expected an even width >= 2 and a depth >= 0")
        self.shape, self.classes = tuple(shape), classes
        size = math.prod(self.shape)
        self.width, self.frequency = width, frequency
        self.time = nn.Linear(width, width)
        self.label = nn.Embedding(classes + 1, width)
        self.enter = nn.Linear(size, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.leave = zeroed(nn.Linear(width, size))

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        embedding = nn.functional.silu(self.time(fourier(t, self.width, self.frequency).to(x)) + self.label(label))
        h = self.enter(x.flatten(1))
        for block in self.blocks:
            h = block(h, embedding)
        return self.leave(h).reshape(x.shape)
