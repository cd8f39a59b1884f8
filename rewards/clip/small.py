"""A CLIP small enough to be trained in a minute: the architecture of ``rlfusion train-clip``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlfusion.common.errors import ConfigError, require_not_negative, require_positive

LONGEST, PATCHES = 32, 4
"""The image's longest side, and its patches along a side."""


@dataclass(frozen=True)
class SmallClip:
    """Two transformers, one on patches of the image, one on the tokens of the text.

    Attributes:
        width: of both.
        layers: of each.
        heads: of each attention.
        embed: numbers in an embedding.
        image: side of what the image tower reads; 0 takes the samples' shorter side, at most 32, in fours.
        patch: side of a patch; 0 takes a quarter of the image's, at least 4.
        context: tokens of a text.
    """

    width: int = 64
    layers: int = 2
    heads: int = 2
    embed: int = 32
    image: int = 0
    patch: int = 0
    context: int = 16

    def __post_init__(self) -> None:
        require_positive(self, "width", "layers", "heads", "embed", "context")
        require_not_negative(self, "image", "patch")
        if self.width % self.heads:
            raise ConfigError(f"heads = {self.heads}: expected a number that divides width = {self.width}")

    def described(self, shape: Sequence[int]) -> tuple[dict[str, Any], dict[str, Any]]:
        """open_clip's ``model_cfg`` and ``preprocess_cfg`` for samples (C, H, W).

        Raises:
            ConfigError: patches that do not tile the image.
        """
        image = self.image or max(PATCHES, min(*shape[1:], LONGEST) // PATCHES * PATCHES)
        patch = self.patch or max(PATCHES, image // PATCHES)
        if image % patch:
            raise ConfigError(f"patch = {patch}: expected a number that divides the image's {image} pixels")
        vision = {"image_size": image, "patch_size": patch, "head_width": self.width // self.heads}
        vision |= {"pool_type": "avg", "final_ln_after_pool": True}
        text = {"context_length": self.context, "vocab_size": 49408, "heads": self.heads}
        towers = {"width": self.width, "layers": self.layers}
        model = {"embed_dim": self.embed, "vision_cfg": vision | towers, "text_cfg": text | towers}
        return model, {"size": image, "mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "shortest"}
