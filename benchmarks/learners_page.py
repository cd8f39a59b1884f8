"""docs/learners.md, and the table of winners that docs/algorithms/index.md has of it."""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
from learners_record import QUESTIONS, Answer, Race, agent_of, answer, times

from rlfusion.jobs.compare.baselines import gain
from rlfusion.jobs.compare.seeds import difference, interval
from rlfusion.jobs.compare.tables import Table
from rlfusion.jobs.curves import Point

WINNERS = re.compile(r"(<!-- winners -->\n).*?(<!-- end of winners -->)", re.DOTALL)
RUNS = re.compile(r"(<!-- runs of (\w+) -->\n).*?(<!-- end of runs -->)", re.DOTALL)
MOST_EQUAL = 3
GROUPS = {"samples": "from rewards alone", "gradient": "by the reward's gradient"}


class Column(NamedTuple):
    """A column: which evaluation of each seed it is of, what it says of it, and of a baseline (None: nothing)."""

    head: str
    at: str
    of: Callable[[Point], float]
    say: Callable[[float], str]
    baseline: Callable[[dict[str, float], Race], float] | None = None


def columns(race: Race) -> list[Column]:
    """The way to the goal, the farthest within the limit, the end."""
    goal = f"agreement {race.goal:g}" if race.by_agreement else f"+{race.goal:g} sd"
    what = "agreement" if race.by_agreement else "gain"
    two: Callable[[float], str] = (lambda v: f"{v:.3f}") if race.by_agreement else (lambda v: f"{v:.2f}")
    end = Column("end: agreement", "end", lambda p: p.agreement or 0.0, lambda v: f"{v:.3f}", _said("agreement"))
    gains = Column("end: gain", "end", lambda p: p.gain, lambda v: f"{v:.1f}", lambda v, r: gain(v, r.base))
    far = Column("Frechet", "end", lambda p: p.frechet or 0.0, lambda v: f"{v:.0f}", _said("frechet"))
    spread = Column("diversity / real", "end", lambda p: p.diversity, lambda v: f"{v:.2f}", _said("diversity_relative"))
    last = [end, far, spread] if race.by_agreement else [gains, far, end._replace(head="agreement")]
    return [
        Column(f"to {goal}: queries", "reached", lambda p: p.queries, lambda v: f"{v:,.0f}"),
        Column("CPU s", "reached", lambda p: p.cpu_seconds, lambda v: f"{v:.1f}"),
        Column("Frechet", "reached", lambda p: p.frechet or 0.0, lambda v: f"{v:.0f}"),
        Column(f"{what} up to {race.config['quality']:g} x", "within", race.of, two),
        *last,
    ]


def _said(name: str) -> Callable[[dict[str, float], Race], float]:
    return lambda values, race: values[name]


def table(race: Race) -> Table:
    """A row a baseline and a learner; learners in the order of the end, the first the farthest."""
    shown = columns(race)
    rows = []
    for name, values in race.baselines.items():
        cells = ["-" if c.baseline is None else c.say(c.baseline(values, race)) for c in shown]
        rows.append([f"{name} (no training)", *cells, ""])
    order = sorted(race.curves, key=lambda agent: -fmean(race.of(points[-1]) for points in race.curves[agent]))
    for agent, after in zip(order, [*order[1:], ""]):
        at = {
            "reached": race.reached(agent),
            "within": race.within(agent),
            "end": [points[-1] for points in race.curves[agent]],
        }
        rows.append([agent, *(cell(c, at[c.at]) for c in shown), ahead(race, agent, after) if after else ""])
    rows += [[agent, "not run"] for agent in race.agents if agent not in race.curves]
    return Table(race.reward, ["learner", *(c.head for c in shown), "end: gain over the next row's"], rows)


def cell(column: Column, points: Iterable[Point | None]) -> str:
    """A cell of a learner, of an evaluation of each seed."""
    return said([None if p is None else column.of(p) for p in points], column.say)


def said(of_seeds: Sequence[float | None], say: Callable[[float], str]) -> str:
    """The mean over the seeds and its interval, where that can be seen; of some seeds alone, how many."""
    values = np.array([value for value in of_seeds if value is not None], dtype=float)
    if not len(values):
        return "-"
    mean, low, high = (say(float(v)) for v in interval(values))
    shown = mean if low == high else f"{mean} [{low}, {high}]"
    return shown if len(values) == len(of_seeds) else f"{shown}, {len(values)} of {len(of_seeds)} seeds"


def ahead(race: Race, one: str, other: str) -> str:
    """The mean difference of two learners' gains at the end, by seed and prompt, and its p."""
    found = difference(_cells(race, one), _cells(race, other))
    return "" if found is None else f"{found.mean:+.2f}, p {found.p:.1g}"


def _cells(race: Race, agent: str) -> dict[tuple[int, str], float]:
    return {(seed, prompt): value for seed, of in enumerate(race.prompts[agent]) for prompt, value in of.items()}


def winners(races: list[Race]) -> str:
    """A row a reward, and what the learners learn from; a column a question."""
    rows = []
    for race in races:
        for group, said in GROUPS.items():
            if agents := race.groups[group]:
                goal = f"agreement {race.goal:g}" if race.by_agreement else f"+{race.goal:g} sd"
                told = [_told(answer(race, q, agents), q.say) for q in QUESTIONS]
                rows.append([f"{race.reward} ({goal}), {said}", *told])
    return "\n".join(
        Table("", ["reward (goal), learners", *(q.head for q in QUESTIONS)], rows).markdown().split("\n")[2:]
    )


def _told(found: Answer | None, say: Callable[[float], str]) -> str:
    if found is None:
        return "none on every seed"
    equal = [f"{name} {say(mean)}" for name, mean in found.equal]
    more = [f"{len(equal) - MOST_EQUAL} more"] if len(equal) > MOST_EQUAL else []
    return f"**{found.best}** {say(found.mean)}" + (
        f" (like it: {', '.join(equal[:MOST_EQUAL] + more)})" if equal else ""
    )


def with_winners(text: str, races: list[Race]) -> str:
    """A page with the table of winners as the record has it.

    Raises:
        SystemExit: it has no place for one.
    """
    if not WINNERS.search(text):
        raise SystemExit("the page has no <!-- winners --> and <!-- end of winners -->")
    return WINNERS.sub(lambda found: f"{found[1]}\n{winners(races)}\n\n{found[2]}", text)


def runs(races: list[Race], name: str) -> str:
    """What the rows of an agent have reached, reward by reward: at the goal and at the end."""
    rows = []
    for race in races:
        way, seconds, _, _, end, *_ = columns(race)
        for agent in race.curves:
            if agent_of(race.agents[agent]) == name:
                there, last = race.reached(agent), [points[-1] for points in race.curves[agent]]
                what = "agreement" if race.by_agreement else "sd"
                way_there = [cell(way, there), cell(seconds, there), said(times(race, agent, there), _so_many)]
                ends = [f"{cell(end, last)} {what}", said(times(race, agent, last), _so_many)]
                rows.append([f"{race.reward}, {agent}", *way_there, *ends])
    head = ["reward, row", "to the goal: queries", "CPU s", "distance / base's", "end", "distance / base's"]
    return Table("", head, rows).markdown().partition("\n\n")[2]


def _so_many(value: float) -> str:
    return f"{value:.1f} x"


def with_runs(text: str, races: list[Race]) -> str:
    """An agent's page with the table of its runs as the record has it."""
    return RUNS.sub(lambda found: f"{found[1]}\n{runs(races, found[2])}\n\n{found[3]}", text)


def section(race: Race, prose: Path) -> str:
    """One reward: what the runs say, the figure, how to run it, the table."""
    config = race.config
    head = (
        f"`rlfusion compare --config benchmarks/learners/{race.reward}.yaml`: {config['budget']:,} queries a run, "
        f"seeds 0 to {config['seeds'] - 1}, {config['samples']:,} samples an evaluation."
    )
    figure = f"![{race.reward}: by queries, and against the Frechet distance](pictures/learners-{race.reward}.svg)"
    rows = table(race).markdown().partition("\n\n")[2]
    text = (prose / f"{race.reward}.md").read_text().strip()
    return "\n\n".join([f"## {race.reward}", text, figure, head, rows])


def settings(races: list[Race]) -> str:
    """How each learner is set, reward by reward."""
    lines = ["## Settings", "", "| reward | learner | settings |", "|---|---|---|"]
    lines += [f"| {race.reward} | {name} | `{text}` |" for race in races for name, text in race.agents.items()]
    return "\n".join(lines)


def page(races: list[Race], prose: Path) -> str:
    """The whole page: the answers, then how to read it, then each reward."""
    runs = [points for race in races for seeds in race.curves.values() for points in seeds]
    seconds = fmean(points[-1].cpu_seconds for points in runs)
    versions = " and ".join(sorted({f"torch {race.made['torch']}, Python {race.made['python']}" for race in races}))
    told = (
        f"`python benchmarks/learners.py` makes this page ({versions}, one CPU thread; "
        f"{len(runs)} runs, each of {seconds:.1f} CPU seconds of training on average)."
    )
    texts = {name: (prose / f"{name}.md").read_text().strip() for name in ("introduction", "reading")}
    sections = [section(race, prose) for race in races]
    return (
        "\n\n".join([texts["introduction"], winners(races), texts["reading"], told, *sections, settings(races)]) + "\n"
    )
