"""HPSv3 (Ma et al. 2025), by its package ``hpsv3``, two releases of which have the arguments in another order."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from rlfusion.rewards.base import RewardError, require_labels
from rlfusion.rewards.kit.calling import by_name, package, pictures, texts, written
from rlfusion.training.devices import pick_device

KIT = "hpsv3"


class HPSv3:
    """The mean of the predicted preference for each image."""

    def __init__(self, checkpoint: str = "", device: str = "auto", batch: int = 8, *, prompts: Sequence[str]) -> None:
        """``checkpoint`` is a file of weights, empty for the published ones; ``batch`` images are scored at once."""
        self.prompts, self.batch = prompts, batch
        given = {("device",): str(pick_device(device))} | ({("checkpoint_path",): checkpoint} if checkpoint else {})
        self.model = by_name(KIT, package("hpsv3", KIT).HPSv3RewardInferencer, given)

    @torch.no_grad()
    def __call__(self, samples: Tensor, cond: Tensor) -> Tensor:
        """samples (B, C, H, W) in [0, 1], cond (B,) -> (B,).

        Raises:
            RewardError: an answer that is not (mean, spread) of each image.
        """
        words = texts(self.prompts, require_labels(cond, len(samples), len(self.prompts), KIT))
        with TemporaryDirectory() as folder:
            paths = written(pictures(samples, KIT), Path(folder))
            parts = [slice(at, at + self.batch) for at in range(0, len(paths), self.batch)]
            return torch.cat([self._means(words[part], paths[part]) for part in parts])

    def _means(self, words: list[str], paths: list[str]) -> Tensor:
        found = by_name(KIT, self.model.reward, {("prompts",): words, ("image_paths", "images"): paths})
        rows = torch.stack([torch.as_tensor(row, dtype=torch.float32).flatten().cpu() for row in found])
        if rows.shape != (len(paths), 2):
            raise RewardError(f"hpsv3 answered {tuple(rows.shape)}: expected ({len(paths)}, 2), means and spreads")
        return rows[:, 0]
