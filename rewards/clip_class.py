"""clip_class(x, c) = softmax_k(s cos(f(x), g(text of k)))_c, s the CLIP's own logit scale: the zero-shot probability of
class c among all prompts (Radford et al. 2021, 3.1). With ``log`` its logarithm. Differentiable.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from rlfusion.common.tensors import Cond
from rlfusion.diffusion.denoiser import Precision
from rlfusion.rewards.base import require_labels
from rlfusion.rewards.clip.reward import ClipText, Source


class ClipClass(ClipText):
    """A CLIP's zero-shot probability of the sample's class among all prompts. Differentiable.

    Args:
        model, checkpoint: the CLIP, as ``openclip.load``; a run without a model trains a small one on its data.
        template: text with ``{}`` for the prompt or ``{word}`` for the prompt with numerals spelled out; of several
            the mean embedding counts.
        log: answer the log-probability.
        precision, resize_mode, batch, architecture: as ``clip.Source``.
        prompts: the text of each condition.
        shape: (C, H, W) of the samples.
    """

    def __init__(
        self,
        model: str | None = None,
        checkpoint: str = "",
        template: str | Sequence[str] = "{}",
        log: bool = False,
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
        self.log = log

    def forward(self, samples: Tensor, cond: Cond) -> Tensor:
        """samples (B, C, H, W) in [0, 1], cond (B,) int64 -> (B,) in [0, 1], or with ``log`` at most 0."""
        label = require_labels(cond, len(samples), len(self.table), "clip_class")
        found = self.features(samples)
        logits = self.logit_scale.to(found) * found @ self.table.to(found).T
        value = logits.log_softmax(1).gather(1, label[:, None])[:, 0]
        return value if self.log else value.exp()
