"""clip_score(x, c) = scale cos(f(x), g(text of c)): does the image suit its text, for a CLIP? Differentiable.

f is the image tower, g the text tower (Radford et al. 2021). CLIPScore (Hessel et al. 2021) is 2.5 max(cos, 0), so
``scale`` 2.5 up to the cut at 0, which would hide the gradient of the worst samples.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from rlfusion.common.tensors import Cond
from rlfusion.diffusion.denoiser import Precision
from rlfusion.rewards.clip.reward import ClipText, Source


class ClipScore(ClipText):
    """Does the image suit its text, for a CLIP? Differentiable.

    Args:
        model, checkpoint: the CLIP, as ``openclip.load``; a run without a model trains a small one on its data.
        template: text with ``{}`` for the prompt or ``{word}`` for the prompt with numerals spelled out; of several
            the mean embedding counts.
        scale: factor of the cosine.
        precision, resize_mode, batch, architecture: as ``clip.Source``.
        prompts: the text of each condition.
        shape: (C, H, W) of the samples.
    """

    def __init__(
        self,
        model: str | None = None,
        checkpoint: str = "",
        template: str | Sequence[str] = "{}",
        scale: float = 1.0,
        precision: Precision = "float32",
        resize_mode: str = "",
        batch: int = 64,
        architecture: Mapping[str, Any] | None = None,
        *,
        prompts: Sequence[str],
        shape: Sequence[int] = (3, 224, 224),
    ) -> None:
        source = Source(model, checkpoint, precision, resize_mode, batch, architecture, shape)
        super().__init__(source, template, prompts)
        self.scale = scale

    def forward(self, samples: Tensor, cond: Cond) -> Tensor:
        """samples (B, C, H, W) in [0, 1], cond (B,) int64 -> (B,) in [-scale, scale]."""
        return self.scale * self.cosine(samples, cond)
