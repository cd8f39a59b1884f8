"""pick_score(x, c) = s cos(f(x), g(text of c)), s the CLIP's own logit scale, for a CLIP (ViT-H/14) that was trained on
which of two images people picked: PickScore (Kirstain et al. 2023). Differentiable.

The difference of two images' scores is the log-odds that the first is picked. Published scores lie about 15 to 26.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from rlfusion.common.tensors import Cond
from rlfusion.diffusion.denoiser import Precision
from rlfusion.rewards.clip.reward import PREFERENCE, PREFERENCE_SHAPE, ClipText, Source, published

PUBLISHED = "hf-hub:yuvalkirstain/PickScore_v1/model.safetensors"


class PickScore(ClipText):
    """PickScore: a CLIP that was trained on which image people picked. Differentiable.

    Args:
        model, checkpoint: the CLIP, as ``openclip.load``; without a checkpoint the published weights.
        template: text with ``{}`` for the prompt.
        precision, resize_mode, batch, architecture: as ``clip.Source``.
        prompts: the text of each condition.
    """

    def __init__(
        self,
        model: str | None = PREFERENCE,
        checkpoint: str = "",
        template: str | Sequence[str] = "{}",
        precision: Precision = "float32",
        resize_mode: str = "",
        batch: int = 64,
        architecture: Mapping[str, Any] | None = None,
        *,
        prompts: Sequence[str],
    ) -> None:
        named = published(model, checkpoint, PUBLISHED)
        source = Source(model, named, precision, resize_mode, batch, architecture, PREFERENCE_SHAPE)
        super().__init__(source, template, prompts)

    def forward(self, samples: Tensor, cond: Cond) -> Tensor:
        """samples (B, C, H, W) in [0, 1], cond (B,) int64 -> (B,) in [-s, s]."""
        cosine = self.cosine(samples, cond)
        return self.logit_scale.to(cosine) * cosine
