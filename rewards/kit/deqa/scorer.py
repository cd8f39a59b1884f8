"""DeQA-Score (You et al. 2025), by the code of its weights' repository, which ``transformers`` runs."""

import torch
from torch import Tensor

from rlfusion.rewards.base import RewardError
from rlfusion.rewards.kit.calling import by_name, package, pictures
from rlfusion.training.devices import pick_device

KIT = "deqa"
LOWEST, HIGHEST = 1.0, 5.0


class DeQA:
    """(score - 1) / 4 of each image."""

    def __init__(
        self, model: str = "zhiyuanyou/DeQA-Score-Mix3", revision: str = "main", device: str = "auto", batch: int = 8
    ) -> None:
        """``revision`` is that of the code and weights, a commit where they shall stay the same."""
        on = pick_device(device)
        half = torch.float32 if on.type == "cpu" else torch.float16
        held = package("transformers", KIT).AutoModelForCausalLM.from_pretrained(
            model, revision=revision, trust_remote_code=True, attn_implementation="eager", torch_dtype=half
        )
        self.model, self.batch = held.to(on).eval(), batch

    @torch.no_grad()
    def __call__(self, samples: Tensor, cond: Tensor) -> Tensor:
        """samples (B, C, H, W) in [0, 1] -> (B,).

        Raises:
            RewardError: an answer that is not one score an image.
        """
        images = pictures(samples, KIT)
        parts = [images[at : at + self.batch] for at in range(0, len(images), self.batch)]
        found = [by_name(KIT, self.model.score, {("images",): part}) for part in parts]
        scores = torch.cat([torch.as_tensor(part).float().flatten().cpu() for part in found])
        if len(scores) != len(samples):
            raise RewardError(f"deqa answered {len(scores)} scores: expected {len(samples)}")
        return (scores - LOWEST) / (HIGHEST - LOWEST)
