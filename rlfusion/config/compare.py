"""The settings of ``rlfusion compare``."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from rlfusion.agents import AGENTS
from rlfusion.common import spec
from rlfusion.common.code_files import absolute, label
from rlfusion.common.errors import ConfigError, require_distinct, require_positive, unknown
from rlfusion.config.finetune import Finetune
from rlfusion.config.parts import Evaluation, Rollout
from rlfusion.config.pretrain import Base
from rlfusion.diffusion.chain import Chain
from rlfusion.models import pipelines
from rlfusion.rl.agent import Agent
from rlfusion.rl.guard import Config as Guards
from rlfusion.rl.monitor import Config as Monitoring
from rlfusion.training.devices import Deterministic


@dataclass(frozen=True)
class Compare:
    """Compare algorithms: every agent on every reward with every seed, from one base model, under one query budget.

    Attributes:
        agents: the algorithms, each with settings of its own if need be: ddpo, grpo(window=5), ddpo(form='sf'). One may
            be given another name for tables, plots and folders: "DDPO_SF = ddpo(form='sf')".
        rewards: names of rewards, as of finetune.
        reward_options: settings of each named reward.
        reward_failures, max_failed, reward_timeout_s, reward_cache: as of finetune, for the baselines too; "mask" is of
            the agents that can leave a sample out, for the others (``unmasked``) a failure is an error.
        seeds: runs of each agent on each reward, with seeds 0, 1, ...
        budget_queries: rewards that each run may ask for; none asks for more, and one whose first update would is
            refused.
        evaluations: evaluations of each run on its way, about.
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
        evaluation: the evaluation; its ``every`` is set by ``evaluations``.
    """

    agents: list[str] = field(default_factory=lambda: ["ddpo", "grpo"])
    rewards: list[str] = field(default_factory=lambda: ["class_logprob"])
    reward_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    reward_failures: Literal["error", "mask"] = "error"
    max_failed: float = 0.1
    reward_timeout_s: float = 0.0
    reward_cache: int = 0
    seeds: int = 1
    budget_queries: int = 2400
    evaluations: int = 10
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
    evaluation: Evaluation = field(default_factory=lambda: Evaluation(samples=500, deterministic=False))

    def __post_init__(self) -> None:
        require_positive(self, "seeds", "budget_queries", "evaluations", "target", "quality", "threads")
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
        for text in self.agents:
            self.agent(text)
        names = [shown(text) for text in self.agents]
        if len(set(names)) < len(names):
            raise ConfigError(f"agents = {names}: expected each once, or under different names")

    @property
    def default_name(self) -> str:
        """The name of the run's folder where none is given."""
        names = [label(written(text)) for text in self.agents]
        return f"compare-{'-'.join(dict.fromkeys(names))}"

    def runs(self) -> Iterator[tuple[str, str, int, Finetune]]:
        """(name of the agent, reward, seed, settings) of every run."""
        for reward in self.rewards:
            for agent in self.agents:
                for seed in range(self.seeds):
                    yield shown(agent), reward, seed, self.settings(agent, reward, seed)

    def agent(self, text: str) -> Agent:
        """The settings of one of ``agents``."""
        agent: Any = make_agent(text)
        own = self.micro_batch is None or "micro_batch" in spec.split(written(text))[1]
        own = own or "micro_batch" not in {field.name for field in fields(agent)}
        return agent if own else replace(agent, micro_batch=self.micro_batch)

    def unmasked(self) -> list[str]:
        """The names of the agents whose rewards that fail are errors although ``reward_failures`` is "mask": those that
        score as they learn, by the reward's gradient.
        """
        scored = [text for text in self.agents if make_agent(text).rollout_spec(self.chain.moves).end]
        return [shown(text) for text in self.agents if self.reward_failures == "mask" and text not in scored]

    def settings(self, agent: str, reward: str, seed: int) -> Finetune:
        """The fine-tuning of one run."""
        updates = max(1, self.budget_queries // (self.rollout.prompts * self.rollout.samples_per_prompt))
        every = max(1, updates // self.evaluations)
        options = {reward: self.reward_options[reward]} if reward in self.reward_options else {}
        return Finetune(
            seed=seed,
            device=self.device,
            threads=self.threads,
            deterministic=self.deterministic,
            tf32=self.tf32,
            base=self.base,
            pretrain=self.pretrain,
            pipeline=self.pipeline,
            lora=self.lora,
            reward=reward,
            reward_options=options,
            reward_failures="error" if shown(agent) in self.unmasked() else self.reward_failures,
            max_failed=self.max_failed,
            reward_timeout_s=self.reward_timeout_s,
            reward_cache=self.reward_cache,
            updates=updates,
            budget_queries=self.budget_queries,
            chain=self.chain,
            rollout=self.rollout,
            agent=self.agent(agent),
            guard=self.guard,
            monitor=replace(self.monitor, every=every if self.monitor.every else 0),
            evaluation=Evaluation(**asdict(self.evaluation) | {"every": every}),
            checkpoint_every=every,
        )


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
