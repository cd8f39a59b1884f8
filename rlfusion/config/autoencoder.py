"""The settings of ``rlfusion pretrain-autoencoder``."""

from dataclasses import dataclass, field

from rlfusion.common.errors import require_decay, require_not_negative, require_positive, require_share
from rlfusion.config.parts import Cluster, Learners
from rlfusion.data import name_of
from rlfusion.models import autoencoder
from rlfusion.rollout import Settings
from rlfusion.training import optimizers


@dataclass(frozen=True)
class Autoencode:
    """Train an autoencoder, for models that work in its latents.

    Attributes:
        seed: keys every random draw.
        data: "digits", a folder of images, an .npz, a table (.csv, .tsv, .jsonl, .parquet), or one with settings:
            folder(path='...', split='...'), npz(...), table(...), hf(path='...', caption='...') (docs/inputs.md).
        size: images of a folder are brought to size x size.
        held_out: share of each class kept from training, to measure the reconstruction.
        model: the architecture.
        steps: optimiser steps.
        batch: samples in a step.
        lr: peak learning rate; it falls to 0 along a cosine, after ``warmup`` steps.
        optimizer: adamw, sgd(momentum=...), adamw8bit, or any torch.optim.Optimizer as package.module:Class or
            path/to/file.py:Class, its arguments in brackets.
        warmup: steps over which the learning rate rises from 0.
        ema_decay: decay of the averaged weights that are saved.
        checkpoint_every: optimiser steps between checkpoints.
        root: folder of all runs.
        name: of the run's folder below root; empty makes one from the settings.
        device: "cpu", "cuda", or "auto" (cuda where there is one).
        threads: CPU threads of torch.
        learner: the processes that learn.
        ray: the cluster that they run on.
    """

    seed: int = 0
    data: str = "digits"
    size: int = 32
    held_out: float = 0.25
    model: autoencoder.Config = field(default_factory=autoencoder.Config)
    steps: int = 1500
    batch: int = 128
    lr: float = 2e-3
    optimizer: str = "adamw"
    warmup: int = 0
    ema_decay: float = 0.99
    checkpoint_every: int = 500
    root: str = "runs"
    name: str = ""
    device: str = "auto"
    threads: int = 1
    learner: Learners = field(default_factory=Learners)
    ray: Cluster = field(default_factory=Cluster)

    def __post_init__(self) -> None:
        require_positive(self, "size", "steps", "batch", "lr", "checkpoint_every", "threads")
        require_not_negative(self, "warmup")
        optimizers.settle(self)
        require_share(self, "held_out")
        require_decay(self.ema_decay)
        self.learner.require_device(self.device)
        self.learner.require_splittable(self.device, self.optimizer)
        self.learner.require_batch("batch", self.batch)
        _ = self.settings  # refuses what no cluster can have

    @property
    def settings(self) -> Settings:
        """The settings of the cluster."""
        return self.ray.alone(self.threads)

    @property
    def default_name(self) -> str:
        """The name of the run's folder where none is given."""
        return f"autoencoder-{name_of(self.data)}-seed{self.seed}"
