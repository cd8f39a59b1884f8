"""The settings of ``rlfusion compare``."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple

from rlfusion.agents import AGENTS
from rlfusion.common import spec
from rlfusion.common.code_files import absolute, label
from rlfusion.common.errors import ConfigError, require_distinct, require_not_negative, require_positive, unknown
from rlfusion.config.finetune import Finetune, require_one_account
from rlfusion.config.parts import Evaluations, Nodes, Rollout
from rlfusion.config.pretrain import Base
from rlfusion.config.vary import changed, combinations, placed, title
from rlfusion.diffusion.chain import Chain
from rlfusion.models import lora, pipelines
from rlfusion.rl.agent import Agent
from rlfusion.rl.guard import Config as Guards
from rlfusion.rl.monitor import Config as Monitoring
from rlfusion.rollout.placement import Role
from rlfusion.training.devices import Deterministic
from rlfusion.training.trackers import require_trackers

SHARED = ("device", "threads", "deterministic", "tf32", "base", "pretrain", "pipeline", "lora", "max_failed")
SHARED += ("reward_timeout_s", "reward_cache", "budget_queries", "chain", "rollout", "guard", "monitor", "evaluation")
SHARED += ("track",)
"""The settings of a fine-tuning that a comparison has under the same names, for all of its runs."""


class Row(NamedTuple):
    """A row of the tables: its name, its agent as it is written, and the values of the settings that are varied."""

    name: str
    agent: str
    varied: dict[str, Any]


@dataclass(frozen=True)
class Compare:
    """Compare algorithms: every agent on every reward with every seed, from one base model, under one query budget.

    Attributes:
        agents: the algorithms, each with settings of its own if need be: ddpo, grpo(window=5), ddpo(form='sf'). One may
            be given another name for tables, plots and folders: "DDPO_SF = ddpo(form='sf')".
        vary: values of any other setting of a fine-tuning, of which every agent meets every combination:
            --vary agent.lr=1e-4,3e-4 --vary chain.steps=10,20, or {agent.lr: [1e-4, 3e-4]} in a file.
        rewards: names of rewards, as of finetune.
        reward_options: settings of each named reward.
        reward_failures, max_failed, reward_timeout_s, reward_cache: as of finetune, for the baselines too; "mask" is of
            the agents that can leave a sample out, for the others (``unmasked``) a failure is an error.
        seeds: runs of each agent on each reward, with seeds 0, 1, ...
        budget_queries: rewards that each run may ask for; none asks for more: the last rollout is cut where it would. A
            run whose first update would is refused.
        evaluations: evaluations of each run on its way, about.
        side_by_side: runs at once, each in a process of its own; "auto" takes as many as there is room for: processors
            for ``threads`` and for the workers of each, and memory for each, or a GPU each; or all that a cluster has
            places for. 1 is one after another, in this process or on a cluster. The bits are the same.
        run_restarts: times in a row, without a new checkpoint, that a run side by side goes on whose process died.
        ray: the Ray cluster on whose nodes runs are done side by side: their folder lies on storage that all share.
        best_of: baselines without training: the best of so many samples of the base model by the reward.
        guidance: baselines without training: guidance weights w of the base model.
        target: gain, in standard deviations of the base's rewards, whose price in queries and seconds is told.
        quality: the gain at fixed quality is the largest at a Frechet distance up to so many times the base's, where
            there are data to have one from.
        root: folder of the comparison, and of the shared cache.
        name: of the comparison's folder below root; empty makes one from the settings.
        device: "cpu", "cuda", or "auto".
        threads: CPU threads of torch.
        deterministic: on a GPU, kernels that give the same bits each time; where there is none torch warns, or with
            "strict" it is an error (docs/models.md). false lets the fastest act.
        tf32: on a GPU, products of float32 matrices keep 10 bits of their factors' mantissas, for speed.
        base: the model to start from, as of finetune; empty pretrains one as ``pretrain`` says. --model is the same.
        pretrain: the base model where ``base`` is empty, and the data to compare with.
        pipeline: of a pretrained text-to-image pipeline: its prompts, the size of its images, its precision.
        lora: adapters that all runs train in place of all weights, as of finetune.
        micro_batch: of the agents whose own settings name none; null leaves each what it has by default.
        chain: the sampling chain of all runs.
        rollout: the rollouts of all runs.
        guard: what is done about updates that go wrong.
        monitor: what watches for rewards that are gamed; at each evaluation, or never with ``every`` 0.
        evaluation: the evaluation; its ``every`` is 0 here, and follows from ``evaluations``.
        track: trackers of every run, as of finetune.
    """

    agents: list[str] = field(default_factory=lambda: ["ddpo", "grpo"])
    vary: dict[str, list[Any]] = field(default_factory=dict)
    rewards: list[str] = field(default_factory=lambda: ["class_logprob"])
    reward_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    reward_failures: Literal["error", "mask"] = "error"
    max_failed: float = 0.1
    reward_timeout_s: float = 0.0
    reward_cache: int = 0
    seeds: int = 1
    budget_queries: int = 2400
    evaluations: int = 10
    side_by_side: int | Literal["auto"] = 1
    run_restarts: int = 3
    ray: Nodes = field(default_factory=Nodes)
    best_of: list[int] = field(default_factory=lambda: [4])
    guidance: list[float] = field(default_factory=lambda: [3.0])
    target: float = 2.0
    quality: float = 3.0
    root: str = "runs"
    name: str = ""
    device: str = "auto"
    threads: int = 1
    deterministic: Deterministic = True
    tf32: bool = False
    base: str = ""
    pretrain: Base = field(default_factory=lambda: Finetune().pretrain)
    pipeline: pipelines.Settings = field(default_factory=pipelines.Settings)
    lora: str = ""
    micro_batch: int | None = None
    chain: Chain = field(default_factory=Chain)
    rollout: Rollout = field(default_factory=Rollout)
    guard: Guards = field(default_factory=Guards)
    monitor: Monitoring = field(default_factory=Monitoring)
    evaluation: Evaluations = field(default_factory=lambda: Evaluations(samples=500, every=0, deterministic=False))
    track: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        object.__setattr__(self, "track", [absolute(text) for text in self.track])
        require_trackers(self.track)
        object.__setattr__(self, "lora", lora.written(self.lora))
        require_positive(self, "seeds", "budget_queries", "evaluations", "target", "quality", "threads")
        if self.evaluation.every != 0:
            raise ConfigError(
                f"evaluation.every = {self.evaluation.every}: a comparison evaluates each run about "
                f"evaluations = {self.evaluations} times, expected that setting and every = 0"
            )
        if self.side_by_side != "auto":
            require_positive(self, "side_by_side")
        require_not_negative(self, "run_restarts")
        if self.side_by_side != 1 or self.ray.address:
            require_one_account(self.reward_options, "each run, and each of its restarts,")
        if self.ray.address and self.device.startswith("cuda") and not self.ray.gpus_per_run:
            raise ConfigError(f"ray.gpus_per_run = 0 with device = {self.device}: expected a share of a GPU above 0")
        if not self.agents or not self.rewards:
            raise ConfigError(f"agents = {self.agents}, rewards = {self.rewards}: expected one of each at least")
        for name in ("rewards", "best_of", "guidance"):
            require_distinct(name, getattr(self, name))
        for name in self.reward_options:
            if name not in self.rewards:
                raise unknown("reward in the options", name, self.rewards)
        if any(n < 2 for n in self.best_of):
            raise ConfigError(f"best_of = {self.best_of}: expected numbers >= 2")
        object.__setattr__(self, "agents", [_whole(text) for text in self.agents])
        object.__setattr__(self, "vary", placed(self.vary))
        for text in self.agents:
            self.agent(text)
        rows = self.rows()
        names = [row.name for row in rows]
        if len(set(names)) < len(names):
            raise ConfigError(f"agents = {names}: expected each once, or under different names")
        for row in rows:
            self._parts(row)

    @property
    def default_name(self) -> str:
        """The name of the run's folder where none is given."""
        names = [label(written(text)) for text in self.agents]
        varied = [f"by-{name.rpartition('.')[2]}" for name in self.vary]
        return "-".join(["compare", *dict.fromkeys(names), *varied])

    @property
    def role(self) -> Role:
        """What each run reserves of a cluster."""
        return self.ray.role(self.threads, self.rollout.workers)

    def rows(self) -> list[Row]:
        """Every agent with every combination of the varied values."""
        return [
            Row(" ".join(filter(None, [shown(_without(text, varied)), title(varied)])), text, varied)
            for text in self.agents
            for varied in combinations(self.vary)
        ]

    def runs(self) -> Iterator[tuple[str, str, int, Finetune]]:
        """(name of the row, reward, seed, settings) of every run."""
        for reward in self.rewards:
            for row in self.rows():
                for seed in range(self.seeds):
                    yield row.name, reward, seed, self.settings(row, reward, seed)

    def agent(self, text: str) -> Agent:
        """The settings of one of ``agents``."""
        agent: Any = make_agent(text)
        own = self.micro_batch is None or "micro_batch" in spec.split(written(text))[1]
        own = own or "micro_batch" not in {field.name for field in fields(agent)}
        return agent if own else replace(agent, micro_batch=self.micro_batch)

    def unmasked(self) -> list[str]:
        """The names of the rows whose rewards that fail are errors although ``reward_failures`` is "mask": those that
        score as they learn, by the reward's gradient.
        """
        if self.reward_failures != "mask":
            return []
        return [row.name for row in self.rows() if not _scored(self._parts(row))]

    def settings(self, row: Row, reward: str, seed: int) -> Finetune:
        """The fine-tuning of one run."""
        parts = self._parts(row)
        rollout: Rollout = parts["rollout"]
        updates = max(1, self.budget_queries // (rollout.prompts * rollout.samples_per_prompt))
        every = max(1, updates // self.evaluations)
        options = {reward: self.reward_options[reward]} if reward in self.reward_options else {}
        masked = self.reward_failures == "mask" and _scored(parts)
        told = {"evaluation": replace(self.evaluation, every=every), "checkpoint_every": every}
        watched: Monitoring = parts["monitor"]
        told["monitor"] = replace(watched, every=every if watched.every else 0)
        told |= {"seed": seed, "reward": reward, "reward_options": options, "updates": updates}
        told["reward_failures"] = "mask" if masked else "error"
        if parts["agent"].traits().rewards == "none":
            told["budget_queries"] = 0  # its updates are those of the others
        try:
            run = Finetune(**parts | told)
            walks = rollout.prompts * rollout.samples_per_prompt
            more = (run.left(0) or 0) > updates * walks  # a last rollout, which is cut
            return replace(run, updates=updates + 1) if more else run
        except ConfigError as error:
            raise (ConfigError(f"vary: {row.name}: {error}") if row.varied else error) from error

    def _parts(self, row: Row) -> dict[str, Any]:
        """What the fine-tunings of a row are made of, but for what follows from it, the reward and the seed.

        Raises:
            ConfigError: a varied setting that the agent does not have, or a value that does not fit.
        """
        usual = Finetune()
        parts = {field.name: getattr(usual, field.name) for field in fields(usual)}
        parts |= {name: getattr(self, name) for name in SHARED} | {"agent": self.agent(row.agent)}
        return changed(Finetune, parts, row.varied, f"agent {spec.split(written(row.agent))[0]!r}")


def _scored(parts: Mapping[str, Any]) -> bool:
    """Whether the samples of a rollout are scored before anything learns from them."""
    chain: Chain = parts["chain"]
    return bool(parts["agent"].rollout_spec(chain.moves).end)


def _without(text: str, varied: Mapping[str, Any]) -> str:
    """An agent's text without the settings that are varied, whose values stand beside it."""
    if shown(text) != _short(text):
        return text
    name, told = spec.split(text)
    if not any(f"agent.{key}" in varied for key in told):
        return text
    left = {key: value for key, value in told.items() if f"agent.{key}" not in varied}
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in left.items())})" if left else name


def shown(text: str) -> str:
    """The name under which an agent is shown."""
    name, _ = _named(text)
    return name or _short(text)


def _named(text: str) -> tuple[str, str]:
    """The name that an agent is given before " = ", "" for none, and the agent. ``ddpo(lr = 0.1)`` has none."""
    name, given, rest = text.partition(" = ")
    return (name.strip(), rest.strip()) if given and name.count("(") == name.count(")") else ("", text)


def _short(text: str) -> str:
    """A text without the place of what it names."""
    name, bracket, settings = text.partition("(")
    return f"{label(name)}{bracket}{settings}"


def _whole(text: str) -> str:
    """A text whose file, if it names one, has its path from the root."""
    agent = written(text)
    return text.replace(agent, absolute(agent)) if text.endswith(agent) else text


def written(text: str) -> str:
    """The agent of a text, without the name that it may be given."""
    return _named(text)[1]


def make_agent(text: str) -> Agent:
    """The settings that a text like ``grpo(window=5)`` or ``short window = grpo(window=5)`` writes.

    Raises:
        ConfigError: no such agent or setting, or a value that cannot work.
    """
    return spec.parse(written(text), AGENTS, "agent")
