"""Several rewards against each other: which evaluations no other one beats in all of them (the Pareto front).

An evaluation is dominated if another one is at least as good in every reward, and better in one. Of a penalty (a
negative weight), or a reward that is only bound from above, less is better. Evaluations from the monitor's first alarm
on do not count, and the base model is one of them.
"""

from collections.abc import Sequence
from typing import NamedTuple

from rlfusion.jobs.compare.tables import Table
from rlfusion.jobs.curves import Point, sound

Run = tuple[str, int, list[Point]]
"""The agent, the seed and the evaluations of a run."""


class At(NamedTuple):
    """An evaluation of a run."""

    agent: str
    seed: int
    point: Point

    @property
    def title(self) -> str:
        """In words; all runs of a seed begin with the same base."""
        return f"base, seed {self.seed}" if self.point.updates == 0 else f"{self.agent}, seed {self.seed}"


class Front(NamedTuple):
    """What is on the front of some rewards, in the order of the first one, the best first; and all runs with these."""

    rewards: tuple[str, ...]
    members: list[At]
    runs: list[Run]
    lower: tuple[str, ...] = ()
    """Those of the rewards of which less is better."""

    @property
    def title(self) -> str:
        """Of its table."""
        return f"{' against '.join(self.rewards)}: what no other evaluation beats in all"


def dominated(values: Sequence[float], by: Sequence[float]) -> bool:
    """Whether ``by`` is at least as good in everything, and better in something."""
    return all(b >= a for a, b in zip(values, by)) and any(b > a for a, b in zip(values, by))


def fronts(runs: Sequence[Run]) -> list[Front]:
    """Of each set of several rewards, the front of the runs that have measured it."""
    sets = dict.fromkeys(_set(points) for *_, points in runs if points)
    return [_front(one, runs) for one in sets if len(one[0]) > 1]


def _set(points: list[Point]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The rewards of a run, and those of which less is better."""
    return tuple(sorted(points[0].rewards)), tuple(sorted(points[0].lower))


def _front(one: tuple[tuple[str, ...], tuple[str, ...]], runs: Sequence[Run]) -> Front:
    names, lower = one
    mine = [(agent, seed, points) for agent, seed, points in runs if points and _set(points) == one]
    all_of = [At(agent, seed, point) for agent, seed, points in mine for point in sound(points)]
    distinct = {(one.title, one.point.updates, *_values(one, names)): one for one in all_of}
    values = [_good(at, names, lower) for at in distinct.values()]
    left = [at for at, own in zip(distinct.values(), values) if not any(dominated(own, by) for by in values)]
    return Front(names, sorted(left, key=lambda at: _good(at, names, lower), reverse=True), mine, lower)


def _good(one: At, names: tuple[str, ...], lower: tuple[str, ...]) -> tuple[float, ...]:
    """The means of the rewards, of which more is better in each."""
    return tuple(-value if name in lower else value for name, value in zip(names, _values(one, names)))


def _values(one: At, names: tuple[str, ...]) -> tuple[float, ...]:
    return tuple(one.point.rewards[name] for name in names)


def table(front: Front) -> Table:
    """The members of a front: each reward's mean, and the queries that were spent."""
    rows = [
        [one.title, *(f"{value:.4g}" for value in _values(one, front.rewards)), f"{one.point.queries:,}"]
        for one in front.members
    ]
    heads = [f"{name} (less is better)" if name in front.lower else name for name in front.rewards]
    return Table(front.title, ["", *heads, "queries"], rows)
