"""The settings of each command: frozen dataclasses, read from YAML and the command line, written back as YAML.

All counts are global (prompts, samples per prompt, updates per rollout): no result depends on the number of workers.
"""

from dataclasses import asdict, dataclass, field, make_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from rlfusion import distill, lora, models, pipelines, pretrain, spec
from rlfusion.agent import Agent, Plan
from rlfusion.agents import AGENTS, ddpo
from rlfusion.chain import Chain
from rlfusion.denoiser import Precision
from rlfusion.errors import ConfigError, require_not_negative, require_positive, unknown
from rlfusion.guard import Config as Guards
from rlfusion.monitor import Config as Monitoring
from rlfusion.rewards import Care, labels, names_of
from rlfusion.rollout import Limits, Settings


@dataclass(frozen=True)
class Rollout:
    """How many walks are collected, and by how many workers.

    Attributes:
        prompts: distinct prompts (classes) of a rollout.
        samples_per_prompt: walks of each.
        item: walks of one work item; a work item is what one worker does at a time.
        workers: Ray actors that collect; 0 collects in this process, without Ray.
        lag: rollouts that may be collected ahead of the weights; each walk then has weights up to ``lag`` updates old.
    """

    prompts: int = 10
    samples_per_prompt: int = 24
    item: int = 120
    workers: int = 0
    lag: int = 0

    def __post_init__(self) -> None:
        require_positive(self, "prompts", "samples_per_prompt", "item")
        require_not_negative(self, "workers", "lag")


@dataclass(frozen=True)
class Ray:
    """Settings of the Ray workers, where ``rollout.workers`` is not 0.

    Attributes:
        address: of a running Ray cluster; empty starts a private one on this machine, on its loopback alone.
        cpus_per_worker: CPU cores that each worker reserves.
        gpus_per_worker: GPUs, or a fraction of one, that each worker reserves.
        limits: deadlines and retries.
        reward_envs: rewards that run in an actor with a runtime environment of its own, by name: what Ray calls
            runtime_env, such as {pip: [...]}, {working_dir: ...}, {env_vars: {...}}.
        gpus_per_reward: GPUs, or a fraction of one, that each of those reserves.
    """

    address: str = ""
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    limits: Limits = field(default_factory=Limits)
    reward_envs: dict[str, dict[str, Any]] = field(default_factory=dict)
    gpus_per_reward: float = 0.0

    def settings(self, workers: int, threads: int, device: str) -> Settings:
        """The backend's settings for so many workers.

        Raises:
            ConfigError: values that no backend can use.
        """
        if workers and device.startswith("cuda") and not self.gpus_per_worker:
            raise ConfigError(f"gpus_per_worker = 0 with device = {device}: expected a share of a GPU above 0")
        return Settings(workers, self.cpus_per_worker, self.gpus_per_worker, threads, self.address, self.limits)


@dataclass(frozen=True)
class Evaluation:
    """Settings of the evaluation on fixed seeds.

    Attributes:
        samples: how many; the classes take turns.
        every: also evaluate each time that many updates are done; 0 evaluates before and after only.
        deterministic: also log reward, agreement and Frechet distance under DDIM(eta=0), which many will sample with.
        bits_per_dim: also bound the likelihood of the held-out data under the chain (``evaluate.likelihood``), which
            needs data of known grey levels and a kernel such as DDIM(eta=1.0) or DDPM().
    """

    samples: int = 1000
    every: int = 0
    deterministic: bool = True
    bits_per_dim: bool = False

    def __post_init__(self) -> None:
        if self.samples < 50:
            raise ConfigError(f"samples = {self.samples}: expected at least 50")
        if self.every < 0:
            raise ConfigError(f"every = {self.every}: expected a number >= 0")


@dataclass(frozen=True)
class Base:
    """What a pretrained model is, whoever trains it and wherever.

    Attributes:
        seed: keys every random draw.
        data: "digits", a folder of images, an .npz file, or hf(path='...', label='...' or caption='...').
        size: images of a folder are brought to size x size.
        held_out: share of each class kept from training, for evaluation.
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
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out = {self.held_out}: expected a share in (0, 1)")
        require_positive(self, "size", "checkpoint_every")


@dataclass(frozen=True)
class Pretrain(Base):
    """Train a denoiser by supervision.

    Attributes:
        seed: keys every random draw.
        data: "digits", a folder of images, an .npz file, or hf(path='...', label='...' or caption='...').
        size: images of a folder are brought to size x size.
        held_out: share of each class kept from training, for evaluation.
        autoencoder: folder of the autoencoder in whose latents the model works (of ``pretrain-autoencoder``, or a
            diffusers AutoencoderKL); empty for pixels.
        model: the denoiser.
        train: the training.
        checkpoint_every: optimiser steps between checkpoints.
        root: folder of all runs, and of what they share (root/cache).
        name: of the run's folder below root; empty makes one from the settings.
        device: "cpu", "cuda", or "auto" (cuda where there is one).
        threads: CPU threads of torch.
        chain: the sampler of the evaluation and the grid.
        evaluation: the evaluation.
    """

    root: str = "runs"
    name: str = ""
    device: str = "auto"
    threads: int = 1
    chain: Chain = field(default_factory=Chain)
    evaluation: Evaluation = field(default_factory=Evaluation)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "threads")

    @property
    def default_name(self) -> str:
        words = [spec.split(text)[0] for text in (self.model.kind, self.train.loss)]
        return f"pretrain-{Path(self.data).stem}-{'-'.join(words)}-seed{self.seed}"


@dataclass(frozen=True)
class Finetune:
    """Improve a model for a reward. Without a base model, one is pretrained first and kept in root/cache.

    Attributes:
        root: folder of all runs, and of what they share (root/cache).
        name: of the run's folder below root; empty makes one from the settings.
        seed: keys every random draw of the fine-tuning.
        device: "cpu", "cuda", or "auto" (cuda where there is one).
        threads: CPU threads of torch.
        precision: of the network's arithmetic, "float32" or "bfloat16" (autocast); latents, transitions,
            log-probabilities and the optimiser stay in float32.
        base: the model to start from: folder of a run or of its model, a diffusers folder or a name on the hub of a
            pretrained pipeline; empty pretrains one as ``pretrain`` says. --model is the same.
        pretrain: how the base model is made where ``base`` is empty, and the data to compare with. By default 60 % of
            the labels are random, so that the base follows its prompt in part of its samples only.
        pipeline: of a pretrained text-to-image pipeline: its prompts, the size of its images, its precision.
        lora: adapters that are trained in place of all weights, LoRA(rank=..., alpha=..., targets=...), with targets
            ends of layers' names by commas; empty trains all weights. The saved model has them merged.
        reward: ink, symmetry, jpeg_compressibility, jpeg_incompressibility, class_logprob, clip_score, clip_class,
            clip_similarity, aesthetic, hps_v2, pick_score, package.module:name, path/to/file.py:name,
            http://host:port, or a mapping of such names to weights (docs/rewards.md).
        reward_options: settings of each named reward, those of ``monitor.held_out`` among them.
        reward_normalize: several rewards: "none" adds them as they are; "group" and "batch" give each mean 0 and std 1
            over the prompt's walks, or the rollout's, before its weight.
        reward_failures: a reward that is NaN for a sample is an error ("error"), or the sample is left out ("mask").
        max_failed: share of a rollout whose rewards may fail before that is an error after all.
        reward_timeout_s: a reward that takes longer for one batch has failed for it; 0 sets no limit.
        reward_cache: samples whose rewards each process remembers, should a batch be scored again; 0 for none.
        budget_queries: rewards asked for after which the training ends, however many updates are left; 0 sets no limit.
        updates: rollouts, each followed by the learner's updates.
        chain: the sampling chain that is trained.
        rollout: how many walks are collected, and by how many workers.
        ray: the workers.
        agent: the algorithm and its settings.
        guard: what is done about updates that go wrong.
        monitor: what is watched beside the reward.
        evaluation: the evaluation.
        checkpoint_every: rollouts between checkpoints.
    """

    root: str = "runs"
    name: str = ""
    seed: int = 0
    device: str = "auto"
    threads: int = 1
    precision: Precision = "float32"
    base: str = ""
    pretrain: Base = field(default_factory=lambda: Base(train=pretrain.Config(label_noise=0.6)))
    pipeline: pipelines.Settings = field(default_factory=pipelines.Settings)
    lora: str = ""
    reward: str | dict[str, float] = "class_logprob"
    reward_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    reward_normalize: Literal["none", "group", "batch"] = "none"
    reward_failures: Literal["error", "mask"] = "error"
    max_failed: float = 0.1
    reward_timeout_s: float = 0.0
    reward_cache: int = 0
    updates: int = 24
    budget_queries: int = 0
    chain: Chain = field(default_factory=Chain)
    rollout: Rollout = field(default_factory=Rollout)
    ray: Ray = field(default_factory=Ray)
    agent: Agent = field(default_factory=ddpo.Config)
    guard: Guards = field(default_factory=Guards)
    monitor: Monitoring = field(default_factory=Monitoring)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoint_every: int = 8

    def __post_init__(self) -> None:
        require_positive(self, "threads", "updates", "checkpoint_every")
        require_not_negative(self, "budget_queries", "reward_timeout_s", "reward_cache")
        self._require_known_options()
        lora.parse(self.lora)
        if not 0 <= self.max_failed < 1:
            raise ConfigError(f"max_failed = {self.max_failed}: expected a share in [0, 1)")
        if self.reward_normalize != "none" and isinstance(self.reward, str):
            raise ConfigError(f"reward_normalize = {self.reward_normalize}: there is one reward, expected none")
        unscored = not self.agent.needs(self.chain.moves).end
        if unscored and (self.reward_normalize, self.reward_failures) != ("none", "error"):
            raise ConfigError(
                f"reward_normalize, reward_failures = {self.reward_normalize}, {self.reward_failures}: agent "
                f"{self.agent.name!r} scores as it learns, sample by sample, expected none and error"
            )
        r = self.rollout
        self.agent.check(Plan(r.prompts, r.samples_per_prompt, r.lag, self.chain.moves))
        _ = self.settings  # refuses what no backend can use

    def _require_known_options(self) -> None:
        names = [*names_of(self.reward), *self.monitor.held_out]
        for name in self.reward_options:
            if name not in names:
                raise unknown("reward in the options", name, names)
        for name in self.ray.reward_envs:
            if name not in names_of(self.reward):
                raise unknown("reward in ray.reward_envs", name, names_of(self.reward))
        if self.ray.reward_envs and not self.rollout.workers:
            raise ConfigError("rollout.workers = 0 with ray.reward_envs: expected Ray workers, 1 at least")
        require_not_negative(self.ray, "gpus_per_reward")

    def options_of(self, *names: str) -> dict[str, dict[str, Any]]:
        """The options of these rewards."""
        return {name: options for name, options in self.reward_options.items() if name in names}

    @property
    def settings(self) -> Settings:
        """The backend's settings."""
        return self.ray.settings(self.rollout.workers, self.threads, self.device)

    @property
    def reward_name(self) -> str:
        """The reward in a word, for tables and folder names."""
        return "+".join(label.replace("/", "-") for label in labels(names_of(self.reward)).values())

    @property
    def may_fail(self) -> float | None:
        """The share of rewards that may fail; None where none may."""
        return self.max_failed if self.reward_failures == "mask" else None

    @property
    def care(self) -> Care:
        """How rewards are called."""
        return Care(self.reward_timeout_s, self.reward_cache)

    @property
    def default_name(self) -> str:
        return f"{self.agent.name}-{self.reward_name}-seed{self.seed}"


def with_agent(name: str) -> type[Finetune]:
    """``Finetune`` as it is read from the command line: its ``agent`` has the settings of one algorithm.

    Raises:
        ConfigError: no such algorithm.
    """
    agent = spec.lookup(AGENTS, name, "agent")
    field_ = ("agent", agent, field(default_factory=agent))
    return make_dataclass("Finetune", [field_], bases=(Finetune,), frozen=True, namespace={"__doc__": Finetune.__doc__})


@dataclass(frozen=True)
class Distill:
    """Teach a model that needs few steps. Without a teacher, one is pretrained first and kept in root/cache.

    Attributes:
        root: folder of all runs, and of what they share (root/cache).
        name: of the run's folder below root; empty makes one from the settings.
        seed: keys every random draw of the distillation.
        device: "cpu", "cuda", or "auto" (cuda where there is one).
        threads: CPU threads of torch.
        teacher: folder of the model that teaches (a run or its model folder); empty pretrains one as ``pretrain`` says.
        pretrain: how the teacher is made where ``teacher`` is empty, and the data to train on and to compare with.
        guidance: classifier-free guidance weight w with which the teacher answers; the student has it built in.
        student: what the student is, where it is not as its teacher.
        chain: the student's sampler: it is saved with it, and with it the student is sampled and fine-tuned.
        method: the method and its settings.
        workers: Ray workers that make pairs of the teacher, where the method learns from them; 0 makes them here.
        ray: the Ray workers.
        evaluation: the evaluation.
        checkpoint_every: updates between checkpoints.
    """

    root: str = "runs"
    name: str = ""
    seed: int = 0
    device: str = "auto"
    threads: int = 1
    teacher: str = ""
    pretrain: Base = field(default_factory=Base)
    guidance: float = 0.0
    student: distill.Student = field(default_factory=lambda: distill.METHODS["cd"].STUDENT)
    chain: Chain = field(default_factory=lambda: distill.METHODS["cd"].CHAIN)
    method: distill.Method = field(default_factory=lambda: distill.METHODS["cd"]())
    workers: int = 0
    ray: Ray = field(default_factory=Ray)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        require_positive(self, "threads", "checkpoint_every")
        _ = self.settings  # refuses what no backend can use

    @property
    def settings(self) -> Settings:
        """The settings of the backend that makes pairs."""
        return self.ray.settings(self.workers, self.threads, self.device)

    @property
    def held_out(self) -> float:
        return self.pretrain.held_out

    @property
    def default_name(self) -> str:
        return f"distill-{self.method.name}-{self.chain.steps}-seed{self.seed}"


def with_method(name: str) -> type[Distill]:
    """``Distill`` as it is read from the command line: ``method`` has the settings of one method, ``student``
    and ``chain`` are those of its students, unless told otherwise.

    Raises:
        ConfigError: no such method.
    """
    method = spec.lookup(distill.METHODS, name, "method")
    fields_ = [
        ("student", distill.Student, field(default_factory=lambda: method.STUDENT)),
        ("chain", Chain, field(default_factory=lambda: method.CHAIN)),
        ("method", method, field(default_factory=method)),
    ]
    return make_dataclass("Distill", fields_, bases=(Distill,), frozen=True, namespace={"__doc__": Distill.__doc__})


@dataclass(frozen=True)
class Sample:
    """Draw samples of a model as one image grid.

    Attributes:
        checkpoint: folder of a model or of a run, or a pretrained pipeline by its folder or its name on the hub.
        pipeline: of such a pipeline: its prompts, the size of its images, its precision.
        out: the PNG to write.
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
        require_positive(self, "size", "threads")
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out = {self.held_out}: expected a share in (0, 1)")


def to_yaml(config: Any) -> str:
    """The complete settings as YAML that ``--config`` reads back."""
    return yaml.safe_dump(asdict(config), sort_keys=False)
