"""clip_similarity(x, c) = scale cos(f(x), f(r)): likeness to a reference image r, one for all or one a condition, in
the eyes of a CLIP's image tower. Differentiable.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlfusion.common.errors import ConfigError
from rlfusion.common.tensors import Cond
from rlfusion.data import read_image
from rlfusion.diffusion.denoiser import Precision
from rlfusion.rewards.clip.reward import ClipReward, Source


class ClipSimilarity(ClipReward):
    """Likeness to a reference image in the eyes of a CLIP. Differentiable.

    Args:
        reference: the file of the reference image, or one for each condition, in their order.
        model, checkpoint: the CLIP, as ``openclip.load``; a run without a model trains a small one on its data.
        scale: factor of the cosine.
        precision, resize_mode, batch, architecture: as ``clip.Source``.
        classes: number of conditions.
        shape: (C, H, W) of the samples.

    Raises:
        ConfigError: no such image, or another number of them than one or ``classes``.
    """

    def __init__(
        self,
        reference: str | Sequence[str],
        model: str | None = None,
        checkpoint: str = "",
        scale: float = 1.0,
        precision: Precision = "float32",
        resize_mode: str = "",
        batch: int = 64,
        architecture: Mapping[str, Any] | None = None,
        *,
        classes: int = 1,
        shape: Sequence[int] = (3, 224, 224),
    ) -> None:
        source = Source(model, checkpoint, precision, resize_mode, batch, architecture, shape)
        clip = source.open()
        super().__init__(clip, source)
        self.scale = scale
        files = [reference] * classes if isinstance(reference, str) else list(reference)
        if len(files) != classes:
            raise ConfigError(f"reference = {len(files)} images: expected one, or one for each of {classes} conditions")
        self.register_buffer("table", clip.some(classes) if architecture else self._of(files))

    @torch.no_grad()
    def _of(self, files: Sequence[str]) -> Tensor:
        """f of each file's image; a file that is named twice is read once."""
        found = {file: self.features(read_image(Path(file))[None]) for file in dict.fromkeys(files)}
        return torch.cat([found[file] for file in files])

    def forward(self, samples: Tensor, cond: Cond) -> Tensor:
        """samples (B, C, H, W) in [0, 1], cond (B,) int64 -> (B,) in [-scale, scale]."""
        return self.scale * self.cosine(samples, cond)
