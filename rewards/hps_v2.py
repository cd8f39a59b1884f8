"""hps_v2(x, c) = cos(f(x), g(text of c)) for a CLIP (ViT-H/14) that was trained on which of two images people prefer:
Human Preference Score v2 and v2.1 (Wu et al. 2023, whose published code answers the cosine). Differentiable.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from rlfusion.common.errors import unknown
from rlfusion.common.tensors import Cond
from rlfusion.diffusion.denoiser import Precision
from rlfusion.rewards.clip.reward import PREFERENCE, PREFERENCE_SHAPE, ClipText, Source, published

PUBLISHED = {
    "2.0": "hf-hub:xswu/HPSv2/HPS_v2_compressed.pt",
    "2.1": "hf-hub:xswu/HPSv2/HPS_v2.1_compressed.pt",
}


class HPSv2(ClipText):
    """Human Preference Score v2 and v2.1: a CLIP that was trained on which image people prefer. Differentiable.

    Args:
        version: of the published weights, "2.0" or "2.1", where there is no ``checkpoint``.
        model, checkpoint: the CLIP, as ``openclip.load``.
        template: text with ``{}`` for the prompt.
        precision, batch, architecture: as ``clip.Source``.
        resize_mode: as the published code, the whole image with borders.
        prompts: the text of each condition.

    Raises:
        ConfigError: another version.
    """

    def __init__(
        self,
        version: str = "2.1",
        model: str | None = PREFERENCE,
        checkpoint: str = "",
        template: str | Sequence[str] = "{}",
        precision: Precision = "float32",
        resize_mode: str = "longest",
        batch: int = 64,
        architecture: Mapping[str, Any] | None = None,
        *,
        prompts: Sequence[str],
    ) -> None:
        if str(version) not in PUBLISHED:
            raise unknown("version of hps_v2", str(version), PUBLISHED)
        named = published(model, checkpoint, PUBLISHED[str(version)])
        source = Source(model, named, precision, resize_mode, batch, architecture, PREFERENCE_SHAPE)
        super().__init__(source, template, prompts)

    def forward(self, samples: Tensor, cond: Cond) -> Tensor:
        """samples (B, C, H, W) in [0, 1], cond (B,) int64 -> (B,) in [-1, 1]."""
        return self.cosine(samples, cond)
