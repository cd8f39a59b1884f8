"""The settings of ``rlfusion finetune``."""

from collections.abc import Mapping
from dataclasses import dataclass, field, make_dataclass, replace
from typing import Any, Literal

from rlfusion import pretrain
from rlfusion.agents import AGENTS, ddpo
from rlfusion.common import spec
from rlfusion.common.code_files import absolute, label
from rlfusion.common.compiled import Compile
from rlfusion.common.errors import ConfigError, require_distinct, require_not_negative, require_positive, unknown
from rlfusion.config.parts import Evaluations, Learners, Ray, Rollout
from rlfusion.config.pretrain import Base
from rlfusion.diffusion.chain import Chain
from rlfusion.diffusion.denoiser import Precision
from rlfusion.models import Arithmetic, lora, pipelines
from rlfusion.rewards import REWARDS, CallOptions, labels, names_of
from rlfusion.rl.agent import Agent, Plan
from rlfusion.rl.constraints import Constraint, parsed
from rlfusion.rl.guard import Config as Guards
from rlfusion.rl.monitor import Config as Monitoring
from rlfusion.rollout import Settings
from rlfusion.rollout.together import colocated, require_both
from rlfusion.training.checkpoint import Keep
from rlfusion.training.devices import Deterministic
from rlfusion.training.trackers import require_trackers

FEWEST = 16
"""Samples of the base model from which a spread is told."""


@dataclass(frozen=True)
class Finetune:
    """Improve a model for a reward. Without a base model, one is pretrained first and kept in root/cache.

    Attributes:
        root: folder of all runs, and of what they share (root/cache).
        name: of the run's folder below root; empty makes one from the settings.
        seed: keys every random draw of the fine-tuning.
        device: "cpu", "cuda", or "auto" (cuda where there is one).
        threads: CPU threads of torch.
        deterministic: on a GPU, kernels that give the same bits each time; where there is none torch warns, or with
            "strict" it is an error (docs/models.md). false lets the fastest act.
        tf32: on a GPU, products of float32 matrices keep 10 bits of their factors' mantissas, for speed.
        precision: of the network's arithmetic, "float32" or "bfloat16" (autocast); latents, transitions,
            log-probabilities and the optimiser stay in float32.
        compile: torch.compile makes the code of the network's calls in rollouts and updates (docs/models.md), for each
            size of a call when it first comes; "graphs" has a GPU replay the calls of rollouts as CUDA graphs, for
            networks whose kernels are small. Refused where the importance ratio is then not 1 at the acting weights,
            with adapters that have dropout, and with learner.shard.
        channels_last: give the network of a U-Net images with their channels last in memory, as a GPU's half-precision
            convolutions want them.
        base: the model to start from: folder of a run or of its model, a diffusers folder or a name on the hub of a
            pretrained pipeline; empty pretrains one as ``pretrain`` says. --model is the same.
        pretrain: how the base model is made where ``base`` is empty, and the data to compare with. By default 60 % of
            the labels are random, so that the base follows its prompt in part of its samples only.
        pipeline: of a pretrained text-to-image pipeline: its prompts, the size of its images, its precision.
        lora: adapters that are trained in place of all weights, LoRA(rank=..., alpha=..., targets=..., dropout=...):
            targets are ends of layers' names by commas; empty trains all weights. The saved model has them merged. A
            file of adapters, FILE.safetensors or LoRA(file=...), is trained on (docs/models.md).
        reward: ink, symmetry, jpeg_compressibility, jpeg_incompressibility, class_logprob, clip_score, clip_class,
            clip_similarity, aesthetic, hps_v2, pick_score, package.module:name, path/to/file.py:name,
            http://host:port, or a mapping of such names to weights (docs/rewards.md).
        reward_options: settings of each named reward, those of ``monitor.held_out`` among them.
        reward_normalize: several rewards: "none" adds them as they are; "group" and "batch" give each mean 0 and std 1
            over the prompt's walks, or the rollout's, before its weight; "calibrated" brings each to median 0 and
            spread 1, 1.4826 times its MAD, on samples of the base model that are drawn before the training.
        constraint: conditions on the means of rewards, "aesthetic >= base", "ink <= 0.4": the number, or the base
            model's mean. Each has a Lagrange multiplier. A reward that is only constrained has weight 0.
        constraint_rate: how fast multipliers follow: what a standard deviation of the base's rewards by which a mean
            misses its bound adds to its weight in each rollout, beside the reward's own of 1.
        base_samples: of the base model, on which "calibrated" and "base" are measured.
        reward_failures: a reward that is NaN for a sample is an error ("error"), or the sample is left out ("mask").
        max_failed: share of a rollout whose rewards may fail before that is an error after all.
        reward_timeout_s: a reward that takes longer for one batch has failed for it; 0 sets no limit.
        reward_cache: samples whose rewards each process remembers, should a batch be scored again; 0 for none.
        budget_queries: rewards that the training may ask for, however many updates are left; 0 sets no limit. The last
            rollout is cut to the whole prompts that it may still ask for. Where the agent asks as it learns, or cannot
            learn from so few walks, the training ends before an update that would ask for more.
        updates: rollouts, each followed by the learner's updates.
        chain: the sampling chain that is trained.
        rollout: how many walks are collected, and by how many workers.
        ray: the workers.
        learner: the processes that learn.
        agent: the algorithm and its settings.
        guard: what is done about updates that go wrong.
        monitor: what is watched beside the reward.
        evaluation: the evaluation.
        checkpoint_every: rollouts between checkpoints.
        checkpoints: those that stay, and how they are written.
        track: trackers beside TensorBoard: wandb, trackio, mlflow, package.module:Class or path/to/file.py:Class, with
            settings in brackets (docs/tracking.md).
        track_failures: a tracker that fails while the run is at work is told once, and the training goes on ("warn"),
            or ends ("stop").
    """

    root: str = "runs"
    name: str = ""
    seed: int = 0
    device: str = "auto"
    threads: int = 1
    deterministic: Deterministic = True
    tf32: bool = False
    precision: Precision = "float32"
    compile: Compile = False
    channels_last: bool = False
    base: str = ""
    pretrain: Base = field(default_factory=lambda: Base(train=pretrain.Config(label_noise=0.6)))
    pipeline: pipelines.Settings = field(default_factory=pipelines.Settings)
    lora: str = ""
    reward: str | dict[str, float] = "class_logprob"
    reward_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    reward_normalize: Literal["none", "group", "batch", "calibrated"] = "none"
    constraint: list[str] = field(default_factory=list)
    constraint_rate: float = 0.1
    base_samples: int = 256
    reward_failures: Literal["error", "mask"] = "error"
    max_failed: float = 0.1
    reward_timeout_s: float = 0.0
    reward_cache: int = 0
    updates: int = 24
    budget_queries: int = 0
    chain: Chain = field(default_factory=Chain)
    rollout: Rollout = field(default_factory=Rollout)
    ray: Ray = field(default_factory=Ray)
    learner: Learners = field(default_factory=Learners)
    agent: Agent = field(default_factory=ddpo.Config)
    guard: Guards = field(default_factory=Guards)
    monitor: Monitoring = field(default_factory=Monitoring)
    evaluation: Evaluations = field(default_factory=Evaluations)
    checkpoint_every: int = 8
    checkpoints: Keep = field(default_factory=Keep)
    track: list[str] = field(default_factory=list)
    track_failures: Literal["warn", "stop"] = "warn"

    def __post_init__(self) -> None:
        object.__setattr__(self, "track", [absolute(text) for text in self.track])
        require_trackers(self.track)
        object.__setattr__(self, "lora", lora.written(self.lora))
        require_positive(self, "threads", "updates", "checkpoint_every")
        require_not_negative(self, "budget_queries", "reward_timeout_s", "reward_cache")
        require_positive(self, "constraint_rate", "base_samples")
        self._constrain()
        self._require_known_options()
        self._require_computable()
        if not 0 <= self.max_failed < 1:
            raise ConfigError(f"max_failed = {self.max_failed}: expected a share in [0, 1)")
        if self.reward_normalize != "none" and isinstance(self.reward, str):
            raise ConfigError(f"reward_normalize = {self.reward_normalize}: there is one reward, expected none")
        unscored = not self.agent.rollout_spec(self.chain.moves).end
        traits = self.agent.traits()
        watches = traits.rewards == "watched"
        why = f"agent {self.agent.name!r} {self._scoring()}"
        if (unscored or watches) and self.constraint:
            raise ConfigError(f"constraint = {self.constraint}: {why}, expected none")
        if watches and self.reward_normalize != "none":
            raise ConfigError(f"reward_normalize = {self.reward_normalize}: {why}, expected none")
        if unscored and (self.reward_normalize, self.reward_failures) != ("none", "error"):
            raise ConfigError(
                f"reward_normalize, reward_failures = {self.reward_normalize}, {self.reward_failures}: {why}, expected "
                "none and error"
            )
        if self.budget_queries and traits.rewards == "none":
            raise ConfigError(
                f"budget_queries = {self.budget_queries}: agent {self.agent.name!r} learns from stored samples and "
                "asks for no reward, expected 0 (updates is how long it learns)"
            )
        if 0 < self.budget_queries < self.queries:
            raise ConfigError(
                f"budget_queries = {self.budget_queries}: expected at least {self.queries}, which one update asks for "
                "(rollout.prompts x rollout.samples_per_prompt; smaller ones ask for less), or 0 for no limit"
            )
        r = self.rollout
        if r.overlap and (unscored or self.learner.split):
            why = f"learner.shard = {self.learner.shard}: all ranks walk in step"
            why = f"agent {self.agent.name!r}, which {self._scoring()}" if unscored else why
            raise ConfigError(f"rollout.overlap = True with {why}, expected false")
        self.agent.check(self._plan(r.prompts))
        self.learner.require_device(self.device)
        self.learner.require_splittable(self.device, traits.optimizer)
        require_both(self.ray.placement, self.learner.ranks, r.workers)
        workers, _ = self.settings.roles  # refuses what no backend can use
        if self.ray.placement == "colocated":
            colocated(self.learner.role(self.threads), workers)

    def _constrain(self) -> None:
        """Give each reward that is only constrained its weight, 0.

        Raises:
            ConfigError: a constraint that cannot be.
        """
        if self.base_samples < FEWEST:
            raise ConfigError(f"base_samples = {self.base_samples}: expected at least {FEWEST}")
        if isinstance(self.constraint, str):
            raise ConfigError(f"constraint = {self.constraint!r}: expected a list of texts, [{self.constraint!r}]")
        if not self.constraint:
            return
        if self.agent.traits().pathwise:
            raise ConfigError(
                f"constraint = {self.constraint}: agent.last_step = pathwise takes the gradient of the rewards without "
                "the multipliers, expected exclude"
            )
        found = self.constraints
        known = [*names_of(self.reward), *labels(names_of(self.reward)).values(), *REWARDS.names()]
        for one in found:
            if one.name not in known and ":" not in one.name:
                raise unknown("reward in constraint", one.name, known)
            if one.name in self.monitor.held_out:
                raise ConfigError(
                    f"constraint = {str(one)!r}: {one.name!r} is in monitor.held_out, and what is constrained is "
                    "learned from: expected it in one of the two"
                )
        weights = {self.reward: 1.0} if isinstance(self.reward, str) else dict(self.reward)
        object.__setattr__(self, "reward", weights | {o.name: 0.0 for o in found if o.name not in weights})
        object.__setattr__(self, "constraint", [str(one) for one in found])

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """Those on rewards, each by the whole name."""
        short = labels(names_of(self.reward))
        return parsed(self.constraint, {label: name for name, label in short.items()})

    def _require_computable(self) -> None:
        """Raise ConfigError for adapters that cannot be read, and where a network cannot be called as it shall be."""
        adapters = lora.parse(self.lora)
        for name in ("compile", "channels_last"):
            if getattr(self, name) and self.learner.split:
                raise ConfigError(
                    f"{name} = {getattr(self, name)} with learner.shard = {self.learner.shard}: expected false, or "
                    "learner.shard none"
                )
        if self.compile and adapters is not None and adapters.dropout:
            raise ConfigError(
                f"compile = {self.compile} with lora = {self.lora}: masks are drawn anew in each rollout, which is "
                "another network to a compiler, expected dropout=0, or compile false"
            )

    def _require_known_options(self) -> None:
        names = [*names_of(self.reward), *self.monitor.held_out]
        if not names_of(self.reward):
            raise ConfigError("reward = {}: expected one reward at least, {name: weight}")
        require_distinct("monitor.held_out", self.monitor.held_out)
        for name in self.reward_options:
            if name not in names:
                raise unknown("reward in the options", name, names)
        for name in self.ray.reward_envs:
            if name not in names_of(self.reward):
                raise unknown("reward in ray.reward_envs", name, names_of(self.reward))
        if self.ray.reward_envs and not self.rollout.workers:
            raise ConfigError("rollout.workers = 0 with ray.reward_envs: expected Ray workers, 1 at least")
        require_not_negative(self.ray, "gpus_per_reward")
        self._require_one_account()
        floor_s = self.ray.limits.item_floor_s
        if self.rollout.workers and self.reward_timeout_s >= floor_s:
            raise ConfigError(
                f"reward_timeout_s = {self.reward_timeout_s:g}: a worker that is not done with its item within "
                f"ray.limits.item_floor_s = {floor_s:g} may be killed before, expected less, or a larger item_floor_s"
            )

    def _require_one_account(self) -> None:
        """Refuse a limit of tokens that each of several processes would hold by itself."""
        if self.rollout.workers > 0 or self.learner.ranks > 1:
            require_one_account(self.reward_options, "each worker and each rank")

    @property
    def arithmetic(self) -> Arithmetic:
        """How the network computes."""
        return Arithmetic(self.precision, self.compile, self.channels_last)

    @property
    def settings(self) -> Settings:
        """The backend's settings."""
        settings = self.ray.settings(self.rollout.workers, self.threads, self.device)
        return replace(settings, overlap=self.rollout.overlap)

    @property
    def queries(self) -> int:
        """The rewards that one update asks for: one a walk, by what is scored as it learns one a walk and pass."""
        walks = self.rollout.prompts * self.rollout.samples_per_prompt
        scored = self.agent.rollout_spec(self.chain.moves).end
        return walks if scored else walks * self.agent.traits().passes

    def _scoring(self) -> str:
        """What an agent does whose rollouts are not scored to be learned from."""
        return {
            "none": "learns from stored samples and asks for no reward",
            "watched": "learns from no reward and only watches it",
            "learned": "scores as it learns, sample by sample",
        }[self.agent.traits().rewards]

    def _plan(self, prompts: int) -> Plan:
        r, where = self.rollout, (self.learner.shares, self.rollout.workers, self.learner.ranks)
        return Plan(prompts, r.samples_per_prompt, r.lag, self.chain.moves, *where)

    def left(self, asked: int) -> int | None:
        """The rewards that rollouts may still ask for after ``asked``, at most the budget's, None for any number: the
        last of them is cut, unless the agent cannot learn from so few walks. None as well where it is not rollouts that
        ask.
        """
        r = self.rollout
        if not self.budget_queries or not self.agent.rollout_spec(self.chain.moves).end:
            return None
        whole, few = divmod((self.budget_queries - asked) // r.samples_per_prompt, r.prompts)
        return (whole * r.prompts + (few if few and self._learns_from(few) else 0)) * r.samples_per_prompt

    def _learns_from(self, prompts: int) -> bool:
        """Whether the agent takes a rollout of so few prompts."""
        try:
            self.agent.check(self._plan(prompts))
        except ConfigError:
            return False
        return True

    @property
    def reward_name(self) -> str:
        """The reward in a word, for tables and folder names."""
        return "+".join(label.replace("/", "-") for label in labels(names_of(self.reward)).values())

    @property
    def call_options(self) -> CallOptions:
        """How rewards are called."""
        return CallOptions(self.reward_timeout_s, self.reward_cache)

    @property
    def default_name(self) -> str:
        """The name of the run's folder where none is given."""
        return f"{label(self.agent.name)}-{self.reward_name}-seed{self.seed}"


def with_agent(name: str) -> type[Finetune]:
    """``Finetune`` as it is read from the command line: its ``agent`` has the settings of one algorithm.

    Raises:
        ConfigError: no such algorithm.
    """
    agent = spec.lookup(AGENTS, name, "agent")
    field_ = ("agent", agent, field(default_factory=agent))
    return make_dataclass("Finetune", [field_], bases=(Finetune,), frozen=True, namespace={"__doc__": Finetune.__doc__})


def require_one_account(options: Mapping[str, Any], each: str) -> None:
    """Refuse a limit of tokens that each of several processes would hold by itself.

    Raises:
        ConfigError: a judge has one, and no account of all.
    """
    limits = (options.get("vlm_judge") or {}).get("limits")
    if isinstance(limits, Mapping) and limits.get("most_tokens") and not limits.get("account"):
        raise ConfigError(
            f"most_tokens = {limits['most_tokens']} of vlm_judge: {each} would spend that, expected limits.account, "
            "the absolute path of a file that they share, or a served judge"
        )
