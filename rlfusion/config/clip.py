"""The settings of ``rlfusion train-clip``."""

from dataclasses import dataclass, field

from rlfusion.common.errors import require_decay, require_not_negative, require_positive, require_share
from rlfusion.data import name_of
from rlfusion.rewards.clip.small import SmallClip
from rlfusion.training import optimizers


@dataclass(frozen=True)
class TrainClip:
    """Train a small CLIP on images and the words of their labels.

    Attributes:
        seed: keys every random draw.
        data: "digits", a folder of images, an .npz, a table (.csv, .tsv, .jsonl, .parquet), or one with settings:
            folder(path='...', split='...'), npz(...), table(...), hf(path='...', caption='...') (docs/inputs.md).
        size: images of a folder are brought to size x size.
        held_out: share of each class kept from training, to measure the zero-shot accuracy.
        model: the architecture.
        templates: texts with {} for the label, or {word} for the label with numerals spelled out; none takes "a
            handwritten {word}" and others like it for numerals, "a picture of {}" and "{}" for other labels, and "{}"
            for captions.
        steps: optimiser steps.
        batch: images in a step.
        lr: peak learning rate, after a tenth of the steps; it falls to 0 along a cosine.
        weight_decay: of the optimizer.
        optimizer: adamw, sgd(momentum=...), adamw8bit, or any torch.optim.Optimizer as package.module:Class or
            path/to/file.py:Class, its arguments in brackets.
        ema_decay: decay of the averaged weights that are saved.
        shift: images are shifted by up to this many pixels each way, edges repeated.
        noise: standard deviation of the Gaussian noise added to the pixels.
        checkpoint_every: optimiser steps between checkpoints.
        root: folder of all runs.
        name: of the run's folder below root; empty makes one from the settings.
        device: "cpu", "cuda", or "auto" (cuda where there is one).
        threads: CPU threads of torch.
    """

    seed: int = 0
    data: str = "digits"
    size: int = 32
    held_out: float = 0.25
    model: SmallClip = field(default_factory=SmallClip)
    templates: list[str] = field(default_factory=list)
    steps: int = 1000
    batch: int = 64
    lr: float = 2e-3
    weight_decay: float = 0.01
    optimizer: str = "adamw"
    ema_decay: float = 0.99
    shift: int = 1
    noise: float = 0.1
    checkpoint_every: int = 500
    root: str = "runs"
    name: str = ""
    device: str = "auto"
    threads: int = 1

    def __post_init__(self) -> None:
        require_positive(self, "size", "steps", "batch", "lr", "checkpoint_every", "threads")
        require_not_negative(self, "weight_decay", "shift", "noise")
        optimizers.settle(self)
        require_share(self, "held_out")
        require_decay(self.ema_decay)

    @property
    def default_name(self) -> str:
        """The name of the run's folder where none is given."""
        return f"clip-{name_of(self.data)}-seed{self.seed}"
