"""Augmentation of training images: a pure function of the images and of a keyed stream."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rlfusion.common import spec
from rlfusion.common.errors import ConfigError


@dataclass(frozen=True)
class Augment:
    """Each image is mirrored with probability ``flip``, and moved by up to ``shift`` whole pixels each way."""

    flip: float = 0.0
    shift: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.flip <= 1:
            raise ConfigError(f"flip = {self.flip}: expected a probability in [0, 1]")
        if self.shift < 0:
            raise ConfigError(f"shift = {self.shift}: expected a number >= 0")

    def __call__(self, x: Tensor, draw: np.random.Generator) -> Tensor:
        """x (B, C, H, W) -> the same shape."""
        mirrored = torch.from_numpy(draw.random(len(x)) < self.flip).to(x.device)
        x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
        return shifted(x, self.shift, draw) if self.shift else x


def shifted(x: Tensor, shift: int, draw: np.random.Generator) -> Tensor:
    """(B, C, H, W) -> same shape: each image moved by its own whole number of pixels, its border repeated."""
    batch, channels, height, width = x.shape
    padded = F.pad(x, (shift,) * 4, mode="replicate")
    dy, dx = torch.from_numpy(draw.integers(0, 2 * shift + 1, size=(2, batch)))
    rows, columns = dy[:, None] + torch.arange(height), dx[:, None] + torch.arange(width)
    image, channel = torch.arange(batch)[:, None, None, None], torch.arange(channels)[:, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def make(text: str) -> Augment | None:
    """The augmentation that a text like ``Augment(flip=0.5)`` writes; none for "".

    Raises:
        ConfigError: another name or setting, or a value that cannot work.
    """
    return spec.parse(text, {"Augment": Augment}, "augmentation") if text else None
