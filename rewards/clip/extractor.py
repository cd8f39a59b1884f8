"""The image tower of a CLIP as features to compare samples in."""

from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor, nn

from rlfusion.rewards.clip import towers


@dataclass(frozen=True)
class Clip:
    """The unit embeddings of a CLIP's image tower.

    Attributes:
        model: as of the reward clip_score: an architecture of open_clip, hf-hub:OWNER/REPO, or a folder.
        checkpoint: of an architecture, its weights: a tag, hf-hub:OWNER/REPO/FILE, or a path.
    """

    model: str = "ViT-L-14"
    checkpoint: str = "openai"

    def __post_init__(self) -> None:
        _opened(self.model, self._checkpoint)

    def __call__(self, samples: Tensor) -> Tensor:
        opened = _opened(self.model, self._checkpoint)
        visual = opened.visual.to(samples.device)
        return nn.functional.normalize(visual(opened.preprocess(samples)), dim=-1)

    @property
    def _checkpoint(self) -> str:
        """Folders and repositories come with their weights."""
        alone = self.model.startswith("hf-hub:") or "/" in self.model
        return "" if alone and self.checkpoint == "openai" else self.checkpoint


@lru_cache(maxsize=2)
def _opened(model: str, checkpoint: str) -> towers.Opened:
    return towers.load(model, checkpoint)
