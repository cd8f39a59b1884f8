"""What the comparison of all learners has found, as ``results/learners.json`` keeps it, and who is ahead in it.

A learner's figure is one of each seed. Two learners differ by ``rlfusion.jobs.compare.seeds.difference``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Any, NamedTuple

from rlfusion.config.compare import make_agent
from rlfusion.jobs.compare.baselines import BASE
from rlfusion.jobs.compare.seeds import difference
from rlfusion.jobs.curves import GAIN, Point, best_within, first_at

FIGURES = ("updates", "queries", "seconds", "cpu_seconds", "gain", "reward", "agreement", "frechet", "diversity")
"""Of an evaluation."""
AGREEMENT = 0.9
"""The goal on ``class_logprob``, whose gain is bound: a log-probability is at most 0."""
GRADIENT = ("draft", "refl")
"""The agents that always learn by the reward's own gradient."""
NO_REWARD = ("opd", "sft")
"""The agents that learn from no reward; that of the rollouts of ``opd`` is only watched."""


@dataclass(frozen=True)
class Race:
    """What the comparison of one reward has found.

    Attributes:
        reward: its name.
        made: the versions of torch and Python.
        config: budget, seeds, samples, target, quality: as of ``rlfusion compare``.
        baselines: what is said of each, by its name.
        agents: how each learner is written, by the name of its row.
        curves: its runs' evaluations, seed by seed, of each learner that is done.
        prompts: of each learner and seed the mean gain at the end of each prompt's samples.
    """

    reward: str
    made: dict[str, str]
    config: dict[str, float]
    baselines: dict[str, dict[str, float]]
    agents: dict[str, str]
    curves: dict[str, list[list[Point]]]
    prompts: dict[str, list[dict[str, float]]]

    def kept(self) -> dict[str, Any]:
        """As the record has it."""
        runs = {
            agent: [[[short(getattr(p, name)) for name in FIGURES] for p in points] for points in seeds]
            for agent, seeds in self.curves.items()
        }
        held = ("reward", "made", "config", "baselines", "agents", "prompts")
        return {name: getattr(self, name) for name in held} | {"curves": runs}

    @classmethod
    def read(cls, kept: dict[str, Any]) -> "Race":
        """Of the record."""
        runs = {
            agent: [[Point(**dict(zip(FIGURES, values)), images={}) for values in points] for points in seeds]
            for agent, seeds in kept["curves"].items()
        }
        return cls(**{**kept, "curves": runs})

    @property
    def by_agreement(self) -> bool:
        """Whether the goal is an agreement, and not a gain."""
        return self.reward == "class_logprob"

    @property
    def goal(self) -> float:
        return AGREEMENT if self.by_agreement else self.config["target"]

    @property
    def of(self) -> Callable[[Point], Any]:
        """What the goal is of."""
        return (lambda p: p.agreement) if self.by_agreement else GAIN

    @property
    def base(self) -> dict[str, float]:
        return self.baselines[BASE]

    @property
    def limit(self) -> float:
        """``quality`` times the Frechet distance of the bases of the runs, on average."""
        bases = [points[0].frechet or 0.0 for seeds in self.curves.values() for points in seeds]
        return self.config["quality"] * sum(bases) / len(bases)

    def reached(self, agent: str) -> list[Point | None]:
        """The first evaluation of each seed at the goal."""
        return [first_at(points, self.goal, self.of) for points in self.curves[agent]]

    def within(self, agent: str) -> list[Point | None]:
        """The farthest evaluation of each seed at a Frechet distance up to ``quality`` times the base's."""
        return [
            best_within(points, self.config["quality"] * (points[0].frechet or 0.0), self.of)
            for points in self.curves[agent]
        ]

    @cached_property
    def groups(self) -> dict[str, list[str]]:
        """The learners with a curve, by what they learn from."""
        found: dict[str, list[str]] = {"samples": [], "gradient": [], "no reward": []}
        for name in self.curves:
            found[source(self.agents[name])].append(name)
        return found


def source(written: str) -> str:
    """What an agent learns from: the rewards of its "samples", the reward's "gradient", or "no reward"."""
    agent: Any = make_agent(written)
    if agent.name in NO_REWARD:
        return "no reward"
    return "gradient" if agent.name in GRADIENT or getattr(agent, "q", "") in ("denoised", "noised") else "samples"


def agent_of(written: str) -> str:
    """The name of the agent, as of ``--agent``."""
    return str(make_agent(written).name)


def short(value: float) -> float:
    """With the digits that a page shows, and some more."""
    return value if isinstance(value, int) else float(f"{value:.5g}")


class Question(NamedTuple):
    """What is asked of a race: a figure of an evaluation, whether the least is best, and how it is told."""

    head: str
    at: Callable[[Race, str], list[Point | None]]
    of: Callable[[Race, str, Sequence[Point | None]], list[float | None]]
    least: bool
    say: Callable[[float], str]


def times(race: Race, agent: str, points: Sequence[Point | None]) -> list[float | None]:
    """The Frechet distance of an evaluation of each seed over that of the run's base."""
    bases = [curve[0].frechet or 1.0 for curve in race.curves[agent]]
    return [None if p is None else (p.frechet or 0.0) / base for p, base in zip(points, bases)]


def _each(of: Callable[[Point], Any]) -> Callable[[Race, str, Sequence[Point | None]], list[float | None]]:
    return lambda race, agent, points: [None if p is None else of(p) for p in points]


def _farthest(race: Race, agent: str, points: Sequence[Point | None]) -> list[float | None]:
    return _each(race.of)(race, agent, points)


QUESTIONS = (
    Question("fewest queries", Race.reached, _each(attrgetter("queries")), True, lambda v: f"{v:,.0f}"),
    Question("fewest CPU seconds", Race.reached, _each(attrgetter("cpu_seconds")), True, lambda v: f"{v:.1f}"),
    Question("nearest to the data there", Race.reached, times, True, lambda v: f"{v:.1f} x"),
    Question("farthest within the limit", Race.within, _farthest, False, lambda v: f"{v:.2f}"),
)


class Answer(NamedTuple):
    """Who is ahead: the best mean over the seeds, and who cannot be told from it; nobody for no one."""

    best: str
    mean: float
    equal: list[tuple[str, float]]


def answer(race: Race, question: Question, agents: list[str]) -> Answer | None:
    """Among learners that have the figure on every seed. Another one is equal where the 95 % interval of the
    difference, seed by seed, contains 0.
    """
    figures: dict[str, dict[int, float]] = {}
    for agent in agents:
        values = question.of(race, agent, question.at(race, agent))
        held = {seed: value for seed, value in enumerate(values) if value is not None}
        if len(held) == race.config["seeds"]:
            figures[agent] = held
    if not figures:
        return None
    means = {agent: sum(of.values()) / len(of) for agent, of in figures.items()}
    order = sorted(means, key=lambda agent: means[agent] if question.least else -means[agent])
    best, equal = order[0], []
    for agent in order[1:]:
        apart = difference(figures[best], figures[agent])
        if apart is not None and apart.low <= 0 <= apart.high:
            equal.append((agent, means[agent]))
    return Answer(best, means[best], equal)
