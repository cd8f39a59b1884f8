"""A generator that is its samples: as many points of each class, of which the noise picks one."""

import math

import torch
from torch import Tensor, nn

from rlfusion.common.errors import ConfigError


class Points(nn.Module):
    """``net(x, t, label)`` = the point of the label, (B, *shape), to which the direction of x belongs.

    The angle of the first two coordinates of x is uniform where x is noise, whatever its scale, so all ``count`` points
    are as likely. ``label`` holds them: row c is the points of class c, one after another.
    """

    def __init__(self, shape: tuple[int, ...], classes: int, count: int = 32) -> None:
        super().__init__()
        if count < 1 or math.prod(shape) < 2:
            raise ConfigError(f"count = {count}, shape = {tuple(shape)}: expected a point at least, of two coordinates")
        self.shape, self.count = tuple(shape), count
        self.label = nn.Embedding(classes + 1, count * math.prod(shape))

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        flat = x.flatten(1)
        turn = torch.atan2(flat[:, 1], flat[:, 0]) / (2 * math.pi) + 0.5
        which = (turn * self.count).long().clamp(0, self.count - 1)
        points = self.label(label).unflatten(1, (self.count, -1))
        return points[torch.arange(len(x), device=x.device), which].reshape(x.shape)
