"""Cheap statistics of images: what a hacked reward shows first (darkness, blur or speckle, lost grey levels).

brightness     mean over channels and pixels
edge_density   share of pixels whose grey level (mean over channels) differs by more than 1/4 from the pixel to the
               right or below
entropy        bits of the histogram of 16 levels, per channel, then averaged: 0 for one flat colour, 4 at most
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rlfusion.common.tensors import mean_features

LEVELS = 16
EDGE = 0.25


class ImageStatistics(NamedTuple):
    """(B,) each, float32."""

    brightness: Tensor
    edge_density: Tensor
    entropy: Tensor


def image_statistics(x: Tensor) -> ImageStatistics:
    """Pixels (B, C, H, W) in [0, 1] -> the statistics of each image."""
    return ImageStatistics(mean_features(x), edge_density(x), entropy(x))


def edge_density(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B,) in [0, 1]. The last row and column have one neighbour, the last pixel none."""
    grey = x.mean(1)
    edge = torch.zeros_like(grey, dtype=torch.bool)
    edge[:, :, :-1] |= grey.diff(dim=2).abs() > EDGE
    edge[:, :-1] |= grey.diff(dim=1).abs() > EDGE
    return mean_features(edge.float())


def entropy(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B,) bits in [0, 4]."""
    level = (x * LEVELS).long().clamp(0, LEVELS - 1).flatten(2)
    count = torch.zeros(*level.shape[:2], LEVELS, device=x.device).scatter_add_(
        2, level, torch.ones_like(level, dtype=torch.float32)
    )
    share = count / level.shape[2]
    return -torch.special.xlogy(share, share).sum(2).mean(1) / torch.log(torch.tensor(2.0))
