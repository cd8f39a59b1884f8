"""The interface of an algorithm: its settings, the part of a rollout that it takes, and its learner."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from rlfusion.common.errors import ConfigError, shorten
from rlfusion.common.registry import lacking
from rlfusion.data import Dataset
from rlfusion.diffusion.policy import Policy
from rlfusion.rollout import RolloutSpec, Task
from rlfusion.rollout.outside import Stored
from rlfusion.rollout.trajectory import Trajectory
from rlfusion.training.optimization import Learner, Optimization


@dataclass(frozen=True)
class Plan:
    """The plan of the rollouts, in global units.

    Attributes:
        prompts: distinct prompts of a rollout.
        samples_per_prompt: walks of each.
        lag: rollouts that may be collected ahead of the weights.
        steps: K, denoising steps of a walk.
        shares: parts into which a rollout is cut for the ranks; each optimiser step takes walks of every one.
        workers: Ray workers that walk; 0 for this process.
        ranks: processes that learn; 0 for this one.
    """

    prompts: int
    samples_per_prompt: int
    lag: int
    steps: int
    shares: int = 1
    workers: int = 0
    ranks: int = 0

    @property
    def walks(self) -> int:
        """Walks of a rollout."""
        return self.prompts * self.samples_per_prompt

    def require_here(self, why: str) -> None:
        """Refuse walks of other processes than the one that learns, or of older weights; ``why`` says who does.

        Raises:
            ConfigError: names the setting.
        """
        held = {"rollout.workers": self.workers, "rollout.lag": self.lag, "learner.ranks": self.ranks}
        held |= {"learner.shares": self.shares - 1}
        for name, value in held.items():
            if value:
                one = int(name == "learner.shares")
                raise ConfigError(f"{name} = {value + one}: {why}, expected {one}, or agent.fused false")

    def require_groups(self, advice: str = "") -> None:
        """Refuse one walk a prompt where walks of a prompt are compared; ``advice`` names the way out.

        Raises:
            ConfigError: says so.
        """
        if self.samples_per_prompt < 2:
            raise ConfigError(
                f"samples_per_prompt = {self.samples_per_prompt}: expected at least 2, to compare in a prompt{advice}"
            )

    def require_walks(self, updates_per_epoch: int) -> None:
        """Refuse more optimiser steps a pass than there are walks to share among them.

        Raises:
            ConfigError: says so.
        """
        if updates_per_epoch > self.walks // self.shares:
            cut = f", in each of learner.shares = {self.shares}" if self.shares > 1 else ""
            raise ConfigError(
                f"updates_per_epoch = {updates_per_epoch}: expected at most the {self.walks // self.shares} walks of a "
                f"rollout{cut}"
            )


class AgentLearner(Learner[Trajectory], Protocol):
    """A learner of the policy: ``update`` takes the trajectory of a rollout, and its metrics hold ``reward``, unless no
    walk was scored.

    Attributes:
        policy: acts in the next rollouts; its weights go to the workers.
        optimization: the trained weights and their average.
        iteration: rollouts learned from.
        seed: of the run.
        queries: rewards asked for so far, in rollouts and by the learner itself.
    """

    policy: Policy
    optimization: Optimization
    iteration: int
    seed: int
    queries: int

    def preflight(self, batch: Trajectory) -> dict[str, float]:
        """Check a first batch, of the present weights, without changing anything.

        Raises:
            NumericalError, ConfigError: what would fail quietly later.
        """


class Clip(NamedTuple):
    """The clip range of an importance ratio, and whether it holds the ratio to the power 1 / d, for d numbers of a
    latent. What has no ratio has the usual range.
    """

    range: float = 0.2
    per_dim: bool = False


@dataclass(frozen=True)
class Traits:
    """What a run has to know of an agent, with its settings, before there is a learner.

    Attributes:
        rewards: "learned" from; only "watched"; or "none" is asked for, because all is learned from stored samples.
        passes: over a rollout, in each of which it scores anew, where rollouts are not scored.
        copies: of what is trained that the learner has beside it: a reference, older weights, the base model.
        critic: network of a critic that is learned, as text; "" for none.
        teacher: another model as large teaches.
        noiseless: it learns from a chain without noise, also where it is given every step.
        pathwise: it takes a reward's own gradient beside the rollout's rewards.
        denoises: its loss is a denoiser's, whose best answer is the mean of what x_t may have come from.
        optimizer: of the policy, as text.
        averaged: an average of what is trained is kept beside it.
        rows: samples or transitions in one call of an update; None for as many as ``rollout.item``.
        halves: where it has a gradient, the two answers of guidance are made one after the other.
        clip: of its ratio.
    """

    rewards: Literal["learned", "watched", "none"] = "learned"
    passes: int = 1
    copies: int = 0
    critic: str = ""
    teacher: bool = False
    noiseless: bool = False
    pathwise: bool = False
    denoises: bool = False
    optimizer: str = "adamw"
    averaged: bool = False
    rows: int | None = None
    halves: bool = False
    clip: Clip = Clip()


@dataclass(frozen=True)
class Defaults:
    """Defaults of an agent: any plan will do, and the first line of its docstring is its description.

    Attributes:
        KEPT: what the learner's state has of the rewards of earlier rollouts, {entry: kind}, and a resumed run begins
            anew where a change of settings makes them others'; the kinds are those of ``jobs.finetune.anew``.
    """

    KEPT: ClassVar[Mapping[str, str]] = {}

    def check(self, plan: Plan) -> None:
        return

    def plan(self) -> str:
        return (type(self).__doc__ or type(self).__name__).partition("\n")[0]

    def traits(self) -> Traits:
        """Those of settings with the usual names: ``kl_loss`` > 0 asks for one copy, ``epochs`` are passes,
        ``micro_batch`` rows, an ``ema_decay`` > 0 averages, and ``clip``, ``clip_low``, ``clip_high``, ``clip_per_dim``
        and ``optimizer`` are what they are called. Others are as if they were not there.
        """
        told = [getattr(self, name, None) for name in ("clip", "clip_low", "clip_high")]
        clip = min((limit for limit in told if isinstance(limit, float)), default=Clip().range)
        return Traits(
            passes=getattr(self, "epochs", 1),
            copies=int(getattr(self, "kl_loss", 0.0) > 0),
            optimizer=getattr(self, "optimizer", Traits.optimizer),
            averaged=getattr(self, "ema_decay", 0.0) > 0,
            rows=getattr(self, "micro_batch", None),
            clip=Clip(clip, getattr(self, "clip_per_dim", False)),
        )

    def check_stored(self, stored: Callable[[str], Stored]) -> None:
        return

    @staticmethod
    def for_pipelines(told: Mapping[str, Any]) -> dict[str, Any]:
        """Defaults where the model is a pretrained pipeline, beside the settings that are ``told``: none. A name with a
        dot is that of another setting of a fine-tuning, as ``rollout.samples_per_prompt``.
        """
        return {}


class Agent(Protocol):
    """The settings of an algorithm: a frozen dataclass, ``Config`` of its file in ``rlfusion.agents``."""

    @property
    def name(self) -> str:
        """The algorithm, as of the command line."""

    def check(self, plan: Plan) -> None:
        """Raise ConfigError where rollouts of this plan cannot serve the algorithm."""

    def rollout_spec(self, steps: int) -> RolloutSpec:
        """The part of a walk of ``steps`` steps that workers run, and what of it they keep."""

    def plan(self) -> str:
        """One line that says what the learner does with each rollout."""

    def traits(self) -> Traits:
        """What a run has to know of it before there is a learner."""

    def check_stored(self, stored: Callable[[str], Stored]) -> None:
        """Raise ConfigError where the images that the settings name cannot be learned from; ``stored(data)`` gives them
        without their latents, before the weights of a pipeline are read.
        """

    def learner(self, task: Task, data: Dataset | None, seed: int) -> AgentLearner:
        """The learner of ``task.policy``; ``data`` are the training samples of the base model, None where not known.

        Raises:
            ConfigError: the chain or the reward cannot be learned from in this way.
        """


def learner_of(agent: Agent, task: Task, data: Dataset | None, seed: int) -> AgentLearner:
    """The learner of an agent, which may be a stranger's.

    Raises:
        ConfigError: as ``Agent.learner``; or the learner lacks a member of ``AgentLearner``.
    """
    learner = agent.learner(task, data, seed)
    if missing := lacking(learner, AgentLearner):
        raise ConfigError(
            f"the learner of agent {agent.name!r}, {type(learner).__name__}, has no {', '.join(missing)}: expected "
            f"what {AgentLearner.__module__}.{AgentLearner.__qualname__} has (docs/doors.md)"
        )
    return learner


UNSCORED = ("grad_norm",)
"""What the metrics of every update say."""
NEEDED = ("reward", *UNSCORED)
"""And of an update on walks that were scored."""


def wrong_metrics(told: Any, needed: Iterable[str] = NEEDED) -> list[str]:
    """What keeps an answer from being metrics, names with numbers, ``needed`` among them, in a few words each."""
    if not isinstance(told, Mapping):
        return [f"it returns {shorten(repr(told))}, expected numbers by name"]
    kinds = [
        f"{k} is a {type(v).__name__}, expected a float" for k, v in told.items() if not isinstance(v, float | int)
    ]
    return kinds + [f"{name} is missing" for name in needed if name not in told]
