"""The common part of all rewards with a CLIP image tower.

    f(x) = visual(preprocess(x)) / |visual(preprocess(x))|

The tower is frozen and in eval mode; gradients reach the pixels. What a sample is compared with, the embeddings of the
prompts, say, is a table with one row a condition: computed once where the reward is made. The tower and the table are
the state dict, and all that a worker needs; the text tower stays behind.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rlfusion.common.errors import ConfigError, require_positive
from rlfusion.common.tensors import Cond
from rlfusion.diffusion.denoiser import Precision
from rlfusion.rewards.base import Learned, require_labels
from rlfusion.rewards.clip import towers
from rlfusion.rewards.clip.preprocessing import Preprocess
from rlfusion.rewards.clip.small import SmallClip

PREFERENCE = "ViT-H-14"
"""The architecture of the published scores of human preference; their images are of ``PREFERENCE_SHAPE``."""
PREFERENCE_SHAPE = (3, 224, 224)


@dataclass(frozen=True)
class Source:
    """The settings that all these rewards have: which tower, and how it computes.

    Attributes:
        model, checkpoint: as ``openclip.load``; no model stands for an untrained tower of the size that ``train-clip``
            makes of samples ``shape``, to be given its weights by ``load_state_dict``.
        precision: of the tower's arithmetic, "float32" or "bfloat16" (autocast); cosines are in float32.
        resize_mode: in place of the tower's own, "shortest", "longest" or "squash".
        batch: images that the tower reads at a time.
        architecture: plain data of ``openclip.Opened``, in place of a model: a tower whose weights are to come.
        shape: (C, H, W) of the samples.
    """

    model: str | None
    checkpoint: str
    precision: Precision
    resize_mode: str
    batch: int
    architecture: Mapping[str, Any] | None
    shape: Sequence[int]

    def __post_init__(self) -> None:
        require_positive(self, "batch")
        if self.precision not in ("float32", "bfloat16"):
            raise ConfigError(f"precision = {self.precision!r}: expected float32 or bfloat16")

    def open(self) -> towers.Opened:
        """
        Raises:
            ConfigError: as ``openclip.load``; a checkpoint of no model.
        """
        if self.checkpoint and not self.model:
            raise ConfigError(
                f"checkpoint = {self.checkpoint!r} without a model: expected the option model beside it, the "
                "architecture of these weights"
            )
        if self.architecture is not None:
            return towers.blank(self.architecture)
        if self.model is None:
            model, preprocess = SmallClip().described(self.shape)
            return towers.blank({"model": model, "preprocess": preprocess})
        return towers.load(self.model, self.checkpoint)


class ClipReward(Learned):
    """A reward of f(x). ``table`` (P, width), where a reward has one, holds a unit vector a condition."""

    def __init__(self, clip: towers.Opened, source: Source) -> None:
        super().__init__()
        self.visual, self.precision, self.batch = clip.visual, source.precision, source.batch
        changed = {"resize_mode": source.resize_mode} if source.resize_mode else {}
        self.preprocess = Preprocess.of(clip.architecture["preprocess"] | changed)
        self.architecture = clip.architecture

    def blank(self) -> dict[str, Any]:
        """As ``Learned.blank``."""
        return {"model": None, "checkpoint": "", "architecture": self.architecture}

    def features(self, samples: Tensor) -> Tensor:
        """f(x): (B, C, H, W) in [0, 1] -> (B, width), unit vectors, in float32 or better."""
        x = samples.to(torch.promote_types(samples.dtype, torch.float32))
        return torch.cat([self._features(part) for part in x.split(self.batch)])

    def _features(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            found = self.visual(self.preprocess(x))
        pooled = found[0] if isinstance(found, tuple) else found  # a tower that also answers its tokens
        return F.normalize(pooled.to(x), dim=-1)

    def cosine(self, samples: Tensor, cond: Cond) -> Tensor:
        """(B,): of f(x) and the condition's row of the table.

        Raises:
            ConfigError: the condition is no label of a row.
        """
        label = require_labels(cond, len(samples), len(self.table), type(self).__name__)
        found = self.features(samples)
        return (found * self.table[label].to(found)).sum(1)


class ClipText(ClipReward):
    """A CLIP reward of texts: ``table`` (P, width) holds g of each prompt's, ``logit_scale`` () the CLIP's own s."""

    def __init__(self, source: Source, template: str | Sequence[str], prompts: Sequence[str]) -> None:
        clip = source.open()
        super().__init__(clip, source)
        self.register_buffer("table", clip.table(template, prompts))
        self.register_buffer("logit_scale", torch.tensor(clip.logit_scale))


def published(model: str, checkpoint: str, file: str) -> str:
    """``checkpoint``, or where none is given the ``file`` that was published for the architecture ``PREFERENCE``."""
    return checkpoint or (file if model == PREFERENCE else "")
