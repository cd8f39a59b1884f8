"""What each part of a fine-tuning is told: a job opens its settings here, once, and hands each part its own record."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rlfusion.config import Base, Finetune, Ray, Rollout
from rlfusion.diffusion.chain import Chain
from rlfusion.jobs.memory import Holds
from rlfusion.models import Arithmetic, pipelines
from rlfusion.rewards import CallOptions, names_of
from rlfusion.rl.agent import Clip
from rlfusion.rl.constraints import Constraint
from rlfusion.rl.guard import DEPTH
from rlfusion.rollout import RolloutSpec, Settings
from rlfusion.training.devices import Deterministic


@dataclass(frozen=True)
class BaseSpec:
    """The model to start from, by name or made as ``pretrain`` says, with adapters whose weights ``seed`` keys."""

    name: str
    pretrain: Base
    pipeline: pipelines.Settings
    negative: str
    root: Path
    arithmetic: Arithmetic = Arithmetic()
    lora: str = ""
    seed: int = 0


@dataclass(frozen=True)
class RewardSpec:
    """The reward that is learned from, and how it is asked.

    Attributes:
        reward: a name, or {name: weight}.
        name: the reward in a word, for tables and messages.
        given: the settings of each named reward, those that are only watched among them.
        normalize: what is made mean 0 and std 1 before the weights, if anything is; or "calibrated".
        masked: a reward that fails leaves its sample out, up to the share ``max_failed``; else it is an error.
        call_options: how rewards are called.
        constraints: on the means of rewards.
        rate: of the dual ascent of their multipliers.
        base_samples: of the base model, on which rewards are calibrated.
        together: samples of one prompt that are scored together, where a reward compares them.
    """

    reward: str | dict[str, float]
    name: str
    given: dict[str, dict[str, Any]]
    normalize: Literal["none", "group", "batch", "calibrated"]
    masked: bool
    max_failed: float
    call_options: CallOptions
    constraints: tuple[Constraint, ...] = ()
    rate: float = 0.1
    base_samples: int = 256
    together: int = 1

    @property
    def options(self) -> dict[str, dict[str, Any]]:
        """The settings of the rewards that are learned from."""
        return self.options_of(*names_of(self.reward))

    @property
    def may_fail(self) -> float | None:
        """The share of rewards that may fail; None where none may."""
        return self.max_failed if self.masked else None

    def options_of(self, *names: str) -> dict[str, dict[str, Any]]:
        """The settings of these rewards."""
        return {name: held for name, held in self.given.items() if name in names}


@dataclass(frozen=True)
class TaskSpec:
    """What walks are: their chain, what is collected, the reward at their end, the arithmetic of the network."""

    chain: Chain
    rollout: RolloutSpec
    rewards: RewardSpec
    arithmetic: Arithmetic
    lora: str
    threads: int
    deterministic: Deterministic
    tf32: bool
    clip: Clip = Clip()


@dataclass(frozen=True)
class Workers:
    """Where walks are collected: so many Ray workers, or this process for 0; and the backend's settings."""

    count: int
    ray: Ray
    backend: Settings


@dataclass(frozen=True)
class Collecting:
    """How many walks each step collects, and under which version of the weights: of none before the update ``least``,
    after which the settings of that were changed.
    """

    seed: int
    rollout: Rollout
    updates: int
    checkpoint_every: int
    least: int = 0


class Parts(NamedTuple):
    """The records of a fine-tuning."""

    base: BaseSpec
    rewards: RewardSpec
    task: TaskSpec
    workers: Workers
    collecting: Collecting
    holds: Holds


def opened(config: Finetune) -> Parts:
    """The settings of a fine-tuning, part by part."""
    c = config
    base = BaseSpec(c.base, c.pretrain, c.pipeline, c.chain.negative, Path(c.root), c.arithmetic, c.lora, c.seed)
    masked = c.reward_failures == "mask"
    called = (c.reward, c.reward_name, c.reward_options, c.reward_normalize, masked, c.max_failed, c.call_options)
    rewards = RewardSpec(
        *called, c.constraints, c.constraint_rate, c.base_samples, together=c.rollout.samples_per_prompt
    )
    spec = c.agent.rollout_spec(c.chain.moves)
    task = TaskSpec(
        c.chain, spec, rewards, c.arithmetic, c.lora, c.threads, c.deterministic, c.tf32, c.agent.traits().clip
    )
    collecting = Collecting(c.seed, c.rollout, c.updates, c.checkpoint_every)
    workers = Workers(c.rollout.workers, c.ray, c.settings)
    decodes = not spec.end and c.agent.traits().rewards != "none"
    return Parts(base, rewards, task, workers, collecting, _holds(c, decodes))


def _holds(config: Finetune, decodes: bool) -> Holds:
    agent, spec = config.agent.traits(), config.agent.rollout_spec(config.chain.moves)
    rows = config.rollout.item if agent.rows is None else agent.rows
    if spec.trained is not None:
        steps = spec.trained.most(config.chain.moves if spec.window is None else spec.window.size)
        rows = config.rollout.prompts * config.rollout.samples_per_prompt * steps
    return Holds(
        here=config.rollout.workers == 0 and spec.trained is None,
        copies=agent.copies,
        watched=config.monitor.every > 0,
        undo={"warn": 0, "rollback": 1 + DEPTH}.get(config.guard.action, 1),
        optimizer=agent.optimizer,
        rows=rows,
        halves=agent.halves,
        decodes=decodes,
        ranks=config.learner.ranks if config.learner.split else 1,
        critic=agent.critic,
        teacher=agent.teacher,
        averaged=agent.averaged,
    )
