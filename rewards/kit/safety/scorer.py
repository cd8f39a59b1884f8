"""A filter of images that are not safe for work, as a penalty, by ``transformers``' image classification."""

import torch
from torch import Tensor

from rlfusion.common.errors import ConfigError
from rlfusion.rewards.base import RewardError
from rlfusion.rewards.kit.calling import package, pictures
from rlfusion.training.devices import pick_device

KIT = "safety"


class Safety:
    """Minus the probability of the unsafe class of each image; 0 where it is below the threshold."""

    def __init__(
        self,
        model: str = "Falconsai/nsfw_image_detection",
        unsafe: str = "nsfw",
        threshold: float = 0.0,
        device: str = "auto",
        batch: int = 16,
    ) -> None:
        """``unsafe`` is the name of the class in the model's own words.

        Raises:
            ConfigError: a threshold that is no probability, or a model without that class.
        """
        if not 0 <= threshold < 1:
            raise ConfigError(f"safety: threshold = {threshold}: expected 0 <= threshold < 1")
        self.unsafe, self.threshold, self.batch = unsafe, threshold, batch
        self.model = package("transformers", KIT).pipeline(
            "image-classification", model=model, device=pick_device(device)
        )
        known = list(self.model.model.config.id2label.values())
        if unsafe not in known:
            raise ConfigError(f"safety: unsafe = {unsafe!r}: expected a class of {model!r}, {', '.join(known)}")
        self.classes = len(known)

    def __call__(self, samples: Tensor, cond: Tensor) -> Tensor:
        """samples (B, C, H, W) in [0, 1] -> (B,).

        Raises:
            RewardError: an answer without that class.
        """
        # its first parameter is ``images`` in some versions and ``inputs`` in others: it stands alone
        answers = self.model(pictures(samples, KIT), top_k=self.classes, batch_size=self.batch)
        found = torch.tensor([self._probability(answer) for answer in answers])
        return torch.where(found < self.threshold, torch.zeros_like(found), -found)

    def _probability(self, answer: list[dict]) -> float:
        held = {one["label"]: one["score"] for one in answer}
        if self.unsafe not in held:
            raise RewardError(f"safety: the classes {list(held)} came without {self.unsafe!r}")
        return held[self.unsafe]
