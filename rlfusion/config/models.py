"""The settings of the commands that look at a model: ``rlfusion sample`` and ``rlfusion evaluate``."""

from dataclasses import dataclass, field
from typing import Any

from rlfusion.common.code_files import absolute
from rlfusion.common.errors import ConfigError, require_distinct, require_positive, require_share
from rlfusion.config.parts import Figures, require_output
from rlfusion.diffusion.chain import Chain
from rlfusion.models import pipelines

SAMPLERS = ("training", "published")
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
    """Measure a model, or two on the same seeds: rewards, agreement with the prompt, FID, KID, precision, recall,
    diversity.

    Attributes:
        checkpoint: folder of a model or of a run, or a pretrained pipeline by its folder or its name on the hub.
        pipeline: of such a pipeline: its prompts, the size of its images, its precision. There are no data to compare
            with: its report is without a judge.
        against: a second model, measured on the same seeds and prompts with the same chain, and compared sample by
            sample; empty for none.
        prompts: held-out prompts, as pipeline.prompts: a file or one text, of a pipeline or of a model that reads
            captions; empty for the model's own.
        suite: held-out prompts whose figures are told by category, too: parti, drawbench, geneval or dpg, as NAME=PATH
            of the published file or folder, or NAME where it is in root/suites/NAME; or any file of prompts, by its
            columns category, challenge, tag, type and source. All of its prompts are drawn.
        per_prompt: samples of each prompt of a suite; evaluation.samples are then these of all prompts.
        samplers: "training", the chain of these settings, and "published", a pipeline's own sampler, or DDIM(eta=0.0)
            on the chain's grid for other models. Each is measured.
        reward: as of finetune; empty measures no reward.
        rewards: further rewards, each measured by itself under its name.
        reward_options: settings of each named reward.
        data: the real data to compare with, as of pretrain.
        size: images of a folder are brought to size x size.
        real: real images to hold the samples against in ``features``, as data (docs/inputs.md), brought to the model's
            size: FID, KID, precision and recall; empty for none.
        features: the network of these figures: Inception(weights=...), CLIP(model=..., checkpoint=...), thumbnails, or
            your own (docs/evaluation.md).
        diversity: within a prompt, beside that of the report: LPIPS(net=..., weights=...), CLIP(...), or another of
            ``features``; empty for none.
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
    against: str = ""
    prompts: str = ""
    suite: str = ""
    per_prompt: int = 1
    samplers: list[str] = field(default_factory=lambda: ["training"])
    reward: str | dict[str, float] = ""
    rewards: list[str] = field(default_factory=list)
    reward_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    data: str = "digits"
    size: int = 32
    real: str = ""
    features: str = "Inception"
    diversity: str = ""
    held_out: float = 0.25
    root: str = "runs"
    out: str = ""
    seed: int = 0
    chain: Chain = field(default_factory=Chain)
    evaluation: Figures = field(default_factory=Figures)
    device: str = "auto"
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("data", "real", "features", "diversity"):
            object.__setattr__(self, name, absolute(getattr(self, name)))
        require_positive(self, "size", "threads", "per_prompt")
        require_distinct("rewards", self.rewards)
        require_distinct("samplers", self.samplers)
        unknown = [name for name in self.samplers if name not in SAMPLERS]
        if unknown or not self.samplers:
            wrong = unknown[0] if unknown else []
            raise ConfigError(f"samplers: {wrong!r}: expected some of {', '.join(SAMPLERS)}")
        if self.prompts and self.pipeline.prompts:
            raise ConfigError("prompts and pipeline.prompts are given: they are the same, expected one of them")
        if self.suite and (self.prompts or self.pipeline.prompts):
            raise ConfigError("suite and prompts are given: a suite has its own, expected one of them")
        if self.per_prompt > 1 and not self.suite:
            raise ConfigError(f"per_prompt = {self.per_prompt}: it is of a suite, expected 1, or a suite")
        if self.suite and not (self.reward or self.rewards):
            raise ConfigError("suite is given without a reward: its figures are rewards by category, expected rewards")
        if self.against and self.evaluation.bits_per_dim:
            raise ConfigError("evaluation.bits_per_dim = True with against: expected false, or one model at a time")
        if self.out:
            require_output("out", self.out, (".json",))
        require_share(self, "held_out")
