"""The settings of ``rlfusion check-agent``, ``check-reward``, ``check-model`` and ``reproduce``."""

from dataclasses import dataclass, field
from typing import Any

from rlfusion.common.code_files import absolute
from rlfusion.common.errors import ConfigError, require_not_negative, require_positive, require_share
from rlfusion.diffusion.chain import Chain
from rlfusion.models import lora, pipelines


@dataclass(frozen=True)
class CheckAgent:
    """Is an algorithm fit to be trained with? On a chain whose expected reward is known in closed form.

    Attributes:
        agent: the algorithm, with settings or without: grpo, grpo(epochs=1), my_agent.py:Mine(lr=0.01).
        walks: of a rollout.
        repeats: rollouts, of noise of their own, whose first updates are averaged.
        seed: keys the noise.
        threads: CPU threads of torch.
    """

    agent: str
    walks: int = 64
    repeats: int = 16
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        require_positive(self, "threads")
        for name, least in (("walks", 8), ("repeats", 4)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} = {getattr(self, name)}: expected at least {least}")
        object.__setattr__(self, "agent", absolute(self.agent))


@dataclass(frozen=True)
class CheckReward:
    """Check a reward: shape, range, repeatability, batches, condition, gradient, speed.

    Attributes:
        reward: its name, as of finetune.
        options: its settings.
        model: draw the samples from this model, with its own prompts: a folder of a run, of a model or of a pipeline,
            or a name on the hub; empty takes those of ``data``.
        pipeline: of a pretrained pipeline: its prompts, the size of its images, its precision.
        chain: the sampler of the model; the command line's default is the model's own.
        data: the samples to try it on, as of pretrain.
        size: images of a folder are brought to size x size.
        held_out: share of each class that a reward which learns from data does not see, as of finetune: so the two
            share what is learned, in the cache.
        samples: how many.
        seed: keys the noise.
        timeout_s: for one batch.
        root: folder whose cache holds what such rewards have learned.
        device: "cpu", "cuda", or "auto".
        threads: CPU threads of torch.
    """

    reward: str
    options: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    pipeline: pipelines.Settings = field(default_factory=pipelines.Settings)
    chain: Chain = field(default_factory=Chain)
    data: str = "digits"
    size: int = 32
    held_out: float = 0.25
    samples: int = 16
    seed: int = 0
    timeout_s: float = 60.0
    root: str = "runs"
    device: str = "auto"
    threads: int = 1

    def __post_init__(self) -> None:
        require_positive(self, "size", "samples", "timeout_s", "threads")
        require_share(self, "held_out")
        if not self.model and self.pipeline != pipelines.Settings():
            raise ConfigError("pipeline.* is given without a model: expected --model, a pretrained pipeline")


@dataclass(frozen=True)
class CheckModel:
    """Check a model: shapes, condition, batches, kind, decoding, likelihood ratio, gradient, its own sampler.

    Attributes:
        model: folder of a run, of a model or of a diffusers pipeline, or a name on the hub.
        pipeline: of a pretrained pipeline: its prompts, the size of its images, its precision.
        chain: the sampler; the command line's default is the model's own.
        lora: adapters, as of finetune; the gradient is then that of them.
        count: samples to try.
        steps: of the walks, at most; fewer than the chain's own are quicker.
        seed: keys the noise.
        device: "cpu", "cuda", or "auto".
        threads: CPU threads of torch.
    """

    model: str
    pipeline: pipelines.Settings = field(default_factory=pipelines.Settings)
    chain: Chain = field(default_factory=Chain)
    lora: str = ""
    count: int = 4
    steps: int = 4
    seed: int = 0
    device: str = "auto"
    threads: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "lora", lora.written(self.lora))
        require_positive(self, "count", "steps", "threads")


@dataclass(frozen=True)
class Reproduce:
    """Run again, in this process, a work item that failed on every worker: does it fail alike?

    Attributes:
        bundle: the folder in which the run kept it, RUN/failed-items/iteration-I-item-N.
        device: "cpu", "cuda", or "auto", the device that it failed on. The numbers of another are its own.
        threads: CPU threads of torch; 0 takes as many as the worker had.
    """

    bundle: str
    device: str = "auto"
    threads: int = 0

    def __post_init__(self) -> None:
        require_not_negative(self, "threads")
