"""The end of a comparison: tables as Markdown and CSV, all figures as JSON, plots, and one page that holds them all.

Where there are data, quality is the Frechet distance to them and the agreement of a judge; a pretrained pipeline has
neither, and its samples are told by their diversity, beside the base's, and by their image statistics.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from rlfusion.common import storage
from rlfusion.jobs.compare import fronts, paired
from rlfusion.jobs.compare.baselines import BASE, Measured, diversity, gain
from rlfusion.jobs.compare.page import Page, Run, Section
from rlfusion.jobs.compare.paired import Rewards
from rlfusion.jobs.compare.plots import plot, plot_front
from rlfusion.jobs.compare.seeds import difference
from rlfusion.jobs.compare.tables import Table
from rlfusion.jobs.curves import IMAGES, Point, best_within, reached, sound

Baselines = dict[str, Measured | str]
"""What is said of each baseline, or why there is none, by its name."""


class Untrained(NamedTuple):
    """The baselines of a reward: what is said of each, and the rewards (2, N) of its samples where they are known."""

    measured: Baselines
    rewards: Rewards = MappingProxyType({})


DATA = "comparison.json"
"""Every evaluation of every run."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of one run: its evaluations, or the reason why there are none."""

    agent: str
    reward: str
    seed: int
    points: list[Point]
    problem: str


@dataclass(frozen=True)
class Terms:
    """What is compared, and how it is told.

    Attributes:
        budget: what each run was given, as a sentence begins.
        agents: their names, in order.
        rewards: of each a table.
        target: gain whose price is told.
        quality: the gain at fixed quality is the largest at a Frechet distance up to so many times the base's.
        note: what is to be said besides.
        command: the command line that makes the page.
        differing: {run: {setting: value}} of the settings in which the runs differ.
    """

    budget: str
    agents: list[str]
    rewards: list[str]
    target: float
    quality: float
    note: str
    command: str
    differing: dict[str, dict[str, str]]


def report(
    terms: Terms,
    folder: Path,
    outcomes: list[Outcome],
    untrained: Mapping[str, Untrained],
    places: dict[tuple[str, str, int], Path],
) -> str:
    """Write ``comparison.md``, ``.csv`` and ``.json``, the plots, and ``report.html`` with samples from the ``places``
    of the runs; returns the Markdown.
    """
    judged = all("frechet" in found.measured[BASE] for found in untrained.values())
    head, sections, texts = _head(terms, judged), [], []
    for reward in terms.rewards:
        mine = [o for o in outcomes if o.reward == reward]
        measured, rewards = untrained[reward]
        tables = [_table(terms, reward, mine, measured), *_differences(reward, terms.agents, mine)]
        tables += paired.differences(reward, _cells(terms.agents, mine, places), paired.of_baselines(rewards))
        drawn = [(o.agent, o.seed, o.points) for o in mine if o.points]
        picture = plot(terms.target, terms.quality, folder, reward, drawn, measured) if drawn else b""
        runs = [Run.read(f"{o.agent}, seed {o.seed}", places[o.agent, reward, o.seed]) for o in mine if o.points]
        sections.append(Section(reward, tables, picture.decode(), runs))
        texts += tables
    for front in fronts.fronts([(o.agent, o.seed, o.points) for o in outcomes]):
        told = fronts.table(front)
        sections.append(Section(" against ".join(front.rewards), [told], plot_front(folder, front).decode(), []))
        texts.append(told)
    text = f"# Comparison\n\n{head}\n\n" + "\n\n".join(table.markdown() for table in texts) + "\n"
    storage.write(folder / "comparison.md", text)
    storage.write(folder / "comparison.csv", "\n".join(table.csv() for table in texts))
    storage.write(folder / DATA, json.dumps([asdict(o) for o in outcomes], indent=1))
    storage.write(folder / "report.html", Page(folder.name, head, terms.command, sections, terms.differing).html())
    return text


def _head(terms: Terms, judged: bool) -> str:
    price = "Frechet distance" if judged else "diversity within a prompt beside the base's"
    quality = (
        f"`at quality` is the largest gain at a Frechet distance up to {terms.quality:g} times the base's"
        if judged
        else "there are no data, so no judge: the statistics of the images say what became of them"
    )
    return (
        f"{terms.budget}; gain in standard deviations of the base's rewards. `+{terms.target:g}` is the first "
        f"evaluation with that gain: queries, CPU seconds of training, {price}; {quality}. Both are of evaluations "
        "before the monitor's first alarm, from which on the reward is gamed; `end` is the last evaluation of all. "
        f"Figures of several seeds stand beside one another; - is never.{terms.note}"
    )


class Column(NamedTuple):
    """A column: which evaluation of a run it is of, what it says of it, and of a baseline's values (None: nothing)."""

    head: str
    at: str
    say: Callable[[Point], str]
    baseline: Callable[[Measured, Measured], str] | None = None


def _frechet(point: Point) -> str:
    return "-" if point.frechet is None else f"{point.frechet:.1f}"


def _columns(terms: Terms, base: Measured) -> Iterator[Column]:
    """The columns of the table of a reward whose base model has these values."""
    judged = "frechet" in base
    yield Column(f"+{terms.target:g}: queries", "reached", lambda p: f"{p.queries:,}")
    yield Column("CPU s", "reached", lambda p: f"{p.cpu_seconds:.1f}")
    if judged:
        yield Column("Frechet", "reached", _frechet)
        yield Column("at quality: gain", "within", lambda p: f"{p.gain:.2f}")
        yield Column("Frechet", "within", _frechet)
    else:
        yield Column("diversity", "reached", lambda p: f"{p.diversity:.2f}")
    yield Column("end: gain", "end", lambda p: f"{p.gain:.2f}", lambda v, b: f"{gain(v, b):.2f}")
    yield Column("queries", "end", lambda p: f"{p.queries:,}")
    if judged:
        yield Column("agreement", "end", lambda p: f"{p.agreement:.3f}", lambda v, b: f"{v['agreement']:.3f}")
        yield Column("Frechet", "end", _frechet, lambda v, b: f"{v['frechet']:.1f}")
        relative = "diversity_relative"
        yield Column("diversity / real", "end", lambda p: f"{p.diversity:.2f}", lambda v, b: f"{v[relative]:.2f}")
        return
    yield Column("diversity", "end", lambda p: f"{p.diversity:.2f}", lambda v, b: f"{diversity(v, b):.2f}")
    for name in IMAGES:
        yield Column(
            name.replace("_", " "),
            "end",
            lambda p, name=name: f"{p.images[name]:.3f}",
            lambda v, b, name=name: f"{v[name]:.3f}",
        )


def _table(terms: Terms, reward: str, outcomes: list[Outcome], measured: Baselines) -> Table:
    """The table of one reward."""
    columns = list(_columns(terms, measured[BASE]))
    rows = [_baseline(columns, name, values, measured[BASE]) for name, values in measured.items()]
    for agent in terms.agents:
        if mine := [o for o in outcomes if o.agent == agent]:
            rows.append(_row(terms, columns, agent, mine))
    return Table(reward, ["", *(c.head for c in columns)], rows)


def _baseline(columns: list[Column], name: str, values: Measured | str, base: Measured) -> list[str]:
    """The cells of a baseline, or of why there is none."""
    if isinstance(values, str):
        return [f"{name} (no training)", values]
    return [f"{name} (no training)", *("-" if c.baseline is None else c.baseline(values, base) for c in columns)]


def _row(terms: Terms, columns: list[Column], agent: str, runs: list[Outcome]) -> list[str]:
    """The cells of an agent: every seed's figure."""
    done = [o.points for o in runs if o.points]
    if not done:
        return [agent, runs[0].problem]
    at = {
        "reached": [reached(points, terms.target) for points in done],
        "within": [best_within(sound(points), terms.quality * (points[0].frechet or 0.0)) for points in done],
        "end": [points[-1] for points in done],
    }
    cells = [" / ".join("-" if p is None else c.say(p) for p in at[c.at]) for c in columns]
    told = [f"(seed {o.seed} {text})" for o in runs for text in (o.problem, _alarm(o.points)) if text]
    return [" ".join([agent, *told]), *cells]


def _alarm(points: list[Point]) -> str:
    after = next((p.updates for p in points if p.alarm), None)
    return "" if after is None else f"alarm by update {after}"


def _cells(
    agents: list[str], outcomes: list[Outcome], places: Mapping[tuple[str, str, int], Path]
) -> dict[str, paired.Cells]:
    """The (seed, prompt) cells of each agent's runs on a reward."""
    found: dict[str, paired.Cells] = {agent: {} for agent in agents}
    for o in outcomes:
        if o.points:
            found[o.agent] |= paired.of_run(places[o.agent, o.reward, o.seed], o.seed, o.points)
    return found


def _differences(reward: str, agents: list[str], outcomes: list[Outcome]) -> list[Table]:
    """How the agents differ in their gains at the end, where they share seeds."""
    ends = {a: {o.seed: o.points[-1].gain for o in outcomes if o.agent == a and o.points} for a in agents}
    found = [(a, b, difference(ends[a], ends[b])) for a, b in combinations(agents, 2)]
    rows = [
        [f"{a} - {b}", f"{d.mean:+.2f}", f"{d.low:+.2f} .. {d.high:+.2f}", f"{d.p:.3g}", str(d.seeds)]
        for a, b, d in found
        if d is not None
    ]
    head = ["", "end: gain", "95 % (bootstrap of the seeds)", "p (changes of sign)", "seeds"]
    return [Table(f"{reward}: differences, seed by seed", head, rows)] if rows else []
