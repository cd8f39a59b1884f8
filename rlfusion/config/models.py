"""The settings of the commands that look at a model: ``rlfusion sample`` and ``rlfusion evaluate``."""

from dataclasses import dataclass, field
from typing import Any

from rlfusion.common.code_files import absolute
from rlfusion.common.errors import require_positive, require_share
from rlfusion.config.parts import Evaluation, require_output
from rlfusion.diffusion.chain import Chain
from rlfusion.models import pipelines

IMAGES = (".png", ".jpg", ".jpeg", ".webp")
"""What a picture may end in."""


@dataclass(frozen=True)
class Sample:
    """Draw samples of a model as one image grid.

    Attributes:
        checkpoint: folder of a model or of a run, or a pretrained pipeline by its folder or its name on the hub.
        pipeline: of such a pipeline: its prompts, the size of its images, its precision.
        out: the picture to write: .png, .jpg, .jpeg or .webp.
        count: samples; the classes take turns unless ``label`` is given.
        label: the class of every sample, by name; empty for all in turn.
        seed: keys the noise.
        chain: the sampler; the command line's default is the one that the model was made with.
        device: "cpu", "cuda", or "auto".
        threads: CPU threads of torch.
        scale: pixels of the picture for one of a sample.
    """

    checkpoint: str
    pipeline: pipelines.Settings = field(default_factory=pipelines.Settings)
    out: str = "grid.png"
    count: int = 100
    label: str = ""
    seed: int = 0
    chain: Chain = field(default_factory=Chain)
    device: str = "auto"
    threads: int = 1
    scale: int = 4

    def __post_init__(self) -> None:
        require_positive(self, "count", "threads", "scale")
        require_output("out", self.out, IMAGES)


@dataclass(frozen=True)
class Evaluate:
    """Measure a model: reward, agreement with the prompt, Frechet distance, precision, recall, diversity.

    Attributes:
        checkpoint: folder of a model or of a run, or a pretrained pipeline by its folder or its name on the hub.
        pipeline: of such a pipeline: its prompts, the size of its images, its precision. There are no data to compare
            with: its report is without a judge.
        reward: as of finetune; empty measures no reward.
        reward_options: settings of each named reward.
        data: the real data to compare with, as of pretrain.
        size: images of a folder are brought to size x size.
        held_out: share of each class that the model did not train on.
        root: folder whose cache holds the judge.
        out: a JSON file to write; empty writes none.
        seed: keys the noise.
        chain: the sampler; the command line's default is the one that the model was made with.
        evaluation: the evaluation.
        device: "cpu", "cuda", or "auto".
        threads: CPU threads of torch.
    """

    checkpoint: str
    pipeline: pipelines.Settings = field(default_factory=pipelines.Settings)
    reward: str | dict[str, float] = ""
    reward_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    data: str = "digits"
    size: int = 32
    held_out: float = 0.25
    root: str = "runs"
    out: str = ""
    seed: int = 0
    chain: Chain = field(default_factory=Chain)
    evaluation: Evaluation = field(default_factory=Evaluation)
    device: str = "auto"
    threads: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", absolute(self.data))
        require_positive(self, "size", "threads")
        if self.out:
            require_output("out", self.out, (".json",))
        require_share(self, "held_out")
