"""ImageReward (Xu et al. 2023), by its package ``image-reward``."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rlfusion.rewards.base import require_labels
from rlfusion.rewards.kit.calling import by_name, package, pictures, texts
from rlfusion.training.devices import pick_device

KIT = "image_reward"


class ImageReward:
    """The score of each image for its prompt."""

    def __init__(self, model: str = "ImageReward-v1.0", device: str = "auto", *, prompts: Sequence[str]) -> None:
        """``model`` is a name of the package's, or a file."""
        self.prompts = prompts
        given = {("name",): model, ("device",): str(pick_device(device))}
        self.model = by_name(KIT, package("ImageReward", KIT).load, given)

    @torch.no_grad()
    def __call__(self, samples: Tensor, cond: Tensor) -> Tensor:
        """samples (B, C, H, W) in [0, 1], cond (B,) -> (B,)."""
        words = texts(self.prompts, require_labels(cond, len(samples), len(self.prompts), KIT))
        pairs = zip(words, pictures(samples, KIT))
        found = [by_name(KIT, self.model.score, {("prompt",): text, ("image",): image}) for text, image in pairs]
        return torch.tensor(found, dtype=torch.float32)
