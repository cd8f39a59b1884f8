"""The settings of ``rlfusion pretrain``, and of the base models that other commands pretrain."""

from dataclasses import dataclass, field
from typing import Literal

from rlfusion import models, pretrain
from rlfusion.common.code_files import absolute, label
from rlfusion.common.errors import require_positive, require_share
from rlfusion.config.parts import Cluster, Evaluation, Learners
from rlfusion.data import name_of
from rlfusion.diffusion.chain import Chain
from rlfusion.rollout import Settings
from rlfusion.training.checkpoint import NEWEST, Keep
from rlfusion.training.devices import Deterministic
from rlfusion.training.trackers import require_trackers


@dataclass(frozen=True)
class Base:
    """The settings that define a pretrained model, whichever command trains it.

    Attributes:
        seed: keys every random draw.
        data: "digits", a folder of images, an .npz, a table (.csv, .tsv, .jsonl, .parquet), or one with settings:
            folder(path='...', split='...'), npz(...), table(...), hf(path='...', caption='...') (docs/inputs.md).
        size: images of a folder are brought to size x size.
        held_out: share of each class kept from training, for evaluation; data with a held-out split of their own (val/)
            keep that.
        autoencoder: folder of the autoencoder in whose latents the model works (of ``pretrain-autoencoder``, or a
            diffusers AutoencoderKL); empty for pixels.
        model: the denoiser.
        train: the training.
        checkpoint_every: optimiser steps between checkpoints.
    """

    seed: int = 0
    data: str = "digits"
    size: int = 32
    held_out: float = 0.25
    autoencoder: str = ""
    model: models.Config = field(default_factory=models.Config)
    train: pretrain.Config = field(default_factory=pretrain.Config)
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", absolute(self.data))
        require_share(self, "held_out")
        require_positive(self, "size", "checkpoint_every")

    @property
    def keep(self) -> Keep:
        """The checkpoints that stay while the model is made."""
        return NEWEST


@dataclass(frozen=True)
class Pretrain(Base):
    """Train a denoiser by supervision.

    Attributes:
        seed: keys every random draw.
        data: "digits", a folder of images, an .npz, a table (.csv, .tsv, .jsonl, .parquet), or one with settings:
            folder(path='...', split='...'), npz(...), table(...), hf(path='...', caption='...') (docs/inputs.md).
        size: images of a folder are brought to size x size.
        held_out: share of each class kept from training, for evaluation; data with a held-out split of their own (val/)
            keep that.
        autoencoder: folder of the autoencoder in whose latents the model works (of ``pretrain-autoencoder``, or a
            diffusers AutoencoderKL); empty for pixels.
        model: the denoiser.
        train: the training.
        checkpoint_every: optimiser steps between checkpoints.
        root: folder of all runs, and of what they share (root/cache).
        name: of the run's folder below root; empty makes one from the settings.
        device: "cpu", "cuda", or "auto" (cuda where there is one).
        threads: CPU threads of torch.
        deterministic: on a GPU, kernels that give the same bits each time; where there is none torch warns, or with
            "strict" it is an error (docs/models.md). false lets the fastest act.
        tf32: on a GPU, products of float32 matrices keep 10 bits of their factors' mantissas, for speed.
        chain: the sampler of the evaluation and the grid.
        evaluation: the evaluation.
        checkpoints: those that stay, and how they are written.
        learner: the processes that learn.
        ray: the cluster that they run on.
        track: trackers beside TensorBoard, as of finetune (docs/tracking.md).
        track_failures: a tracker that fails while the run is at work is told once, and the training goes on ("warn"),
            or ends ("stop").
    """

    root: str = "runs"
    name: str = ""
    device: str = "auto"
    threads: int = 1
    deterministic: Deterministic = True
    tf32: bool = False
    chain: Chain = field(default_factory=Chain)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoints: Keep = field(default_factory=lambda: NEWEST)
    learner: Learners = field(default_factory=Learners)
    ray: Cluster = field(default_factory=Cluster)
    track: list[str] = field(default_factory=list)
    track_failures: Literal["warn", "stop"] = "warn"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "track", [absolute(text) for text in self.track])
        require_trackers(self.track)
        require_positive(self, "threads")
        self.learner.require_device(self.device)
        self.learner.require_splittable(self.device, self.train.optimizer)
        self.learner.require_batch("train.batch", self.train.batch)
        _ = self.settings  # refuses what no cluster can have

    @property
    def settings(self) -> Settings:
        """The settings of the cluster."""
        return self.ray.alone(self.threads)

    @property
    def keep(self) -> Keep:
        """The checkpoints that stay."""
        return self.checkpoints

    @property
    def default_name(self) -> str:
        """The name of the run's folder where none is given."""
        words = [label(text) for text in (self.model.kind, self.train.loss)]
        return f"pretrain-{name_of(self.data)}-{'-'.join(words)}-seed{self.seed}"
