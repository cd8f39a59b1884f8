"""Measures of samples that need no judge and no data: brightness, edges, entropy, diversity within a prompt.

diversity     mean root-mean-square difference of two samples of one prompt, in thumbnails of 16x16 pixels
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from rlfusion.common.errors import ConfigError, NumericalError
from rlfusion.evaluation.images import image_statistics
from rlfusion.evaluation.manifold import class_spread

SIDE = 16


def thumbnails(x: Tensor) -> Tensor:
    """Pixels (N, C, H, W) -> features (N, F), whose distances are root-mean-square differences of thumbnails."""
    small = F.adaptive_avg_pool2d(x, (min(SIDE, x.shape[2]), min(SIDE, x.shape[3]))).flatten(1)
    return small / small.shape[1] ** 0.5


@torch.no_grad()
def plain_report(samples: Tensor, label: Tensor) -> dict[str, float]:
    """count, diversity (of prompts with two samples) and the means of ``image_statistics`` of samples (B, C, H, W).

    Raises:
        NumericalError: a sample is not finite.
        ConfigError: no prompt has two samples.
    """
    held = plain_figures(samples, label)
    if "diversity" not in held:
        raise ConfigError(f"samples = {len(samples)}: expected two of a prompt at least, for diversity")
    return held


@torch.no_grad()
def plain_figures(samples: Tensor, label: Tensor) -> dict[str, float]:
    """As ``plain_report``, without diversity where no prompt has two samples. Raises NumericalError."""
    if not bool(samples.isfinite().all()):
        raise NumericalError("samples are not finite")
    spread = class_spread(thumbnails(samples), label)
    means = {name: value.mean().item() for name, value in image_statistics(samples)._asdict().items()}
    diversity = {"diversity": sum(spread.values()) / len(spread)} if spread else {}
    return {"count": float(len(samples)), **diversity, **means}
