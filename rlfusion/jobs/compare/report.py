"""The end of a comparison: a table in Markdown, its figures as JSON, and a plot a reward.

Where there are data, quality is the Frechet distance to them and the agreement of a judge; a pretrained pipeline has
neither, and its samples are told by their diversity, beside the base's, and by their image statistics.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from rlfusion.common import storage
from rlfusion.config.compare import Compare, shown
from rlfusion.jobs.compare.baselines import BASE, Measured, diversity, gain
from rlfusion.jobs.compare.curves import IMAGES, Point, best_within, first_at
from rlfusion.jobs.compare.plots import plot


@dataclass(frozen=True)
class Outcome:
    """The outcome of one run: its evaluations, or the reason why there are none."""

    agent: str
    reward: str
    seed: int
    points: list[Point]
    problem: str


def report(
    config: Compare, folder: Path, outcomes: list[Outcome], measured: dict[str, dict[str, Measured | str]]
) -> str:
    """Write ``comparison.md``, ``comparison.json`` and the plots; returns the Markdown."""
    text = "\n\n".join(_section(config, reward, outcomes, measured[reward]) for reward in config.rewards)
    judged = all("frechet" in found[BASE] for found in measured.values())
    page = f"# Comparison\n\n{_head(config, judged)}\n\n{text}\n"
    storage.write(folder / "comparison.md", page)
    storage.write(folder / "comparison.json", json.dumps([asdict(o) for o in outcomes], indent=1))
    for reward in config.rewards:
        mine = [(o.agent, o.seed, o.points) for o in outcomes if o.reward == reward and o.points]
        if mine:
            plot(config, folder, reward, mine, measured[reward])
    return page


def _head(config: Compare, judged: bool) -> str:
    price = "Frechet distance" if judged else "diversity within a prompt beside the base's"
    quality = (
        f"`at quality` is the largest gain at a Frechet distance up to {config.quality:g} times the base's"
        if judged
        else "there are no data, so no judge: the statistics of the images say what became of them"
    )
    unmasked = config.unmasked()
    failures = f" A reward that fails is left out, but an error for {', '.join(unmasked)}." if unmasked else ""
    return (
        f"{config.budget_queries} queries a run, {config.seeds} seed(s), one base model; gain in standard deviations "
        f"of the base's rewards. `+{config.target:g}` is the first evaluation with that gain: queries, CPU seconds of "
        f"training, {price}; {quality}. Figures of several seeds stand beside one another; - is never.{failures}"
    )


class Column(NamedTuple):
    """A column: which evaluation of a run it is of, what it says of it, and of a baseline's values (None: nothing)."""

    head: str
    at: str
    say: Callable[[Point], str]
    baseline: Callable[[Measured, Measured], str] | None = None


def _columns(config: Compare, base: Measured) -> Iterator[Column]:
    """The columns of the table of a reward whose base model has these values."""
    judged = "frechet" in base
    yield Column(f"+{config.target:g}: queries", "reached", lambda p: f"{p.queries:,}")
    yield Column("CPU s", "reached", lambda p: f"{p.cpu_seconds:.1f}")
    if judged:
        yield Column("Frechet", "reached", lambda p: f"{p.frechet:.1f}")
        yield Column("at quality: gain", "within", lambda p: f"{p.gain:.2f}")
        yield Column("Frechet", "within", lambda p: f"{p.frechet:.1f}")
    else:
        yield Column("diversity", "reached", lambda p: f"{p.diversity:.2f}")
    yield Column("end: gain", "end", lambda p: f"{p.gain:.2f}", lambda v, b: f"{gain(v, b):.2f}")
    if judged:
        yield Column("agreement", "end", lambda p: f"{p.agreement:.3f}", lambda v, b: f"{v['agreement']:.3f}")
        yield Column("Frechet", "end", lambda p: f"{p.frechet:.1f}", lambda v, b: f"{v['frechet']:.1f}")
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


def _section(config: Compare, reward: str, outcomes: list[Outcome], measured: dict[str, Measured | str]) -> str:
    """The table of one reward."""
    columns = list(_columns(config, measured[BASE]))
    head = [f"## {reward}", "", f"| | {' | '.join(c.head for c in columns)} |", f"|---|{'---|' * len(columns)}"]
    rows = [_baseline(columns, name, values, measured[BASE]) for name, values in measured.items()]
    for agent in map(shown, config.agents):
        mine = [o for o in outcomes if (o.agent, o.reward) == (agent, reward)]
        rows.append(_row(config, columns, agent, mine))
    return "\n".join([*head, *rows])


def _baseline(columns: list[Column], name: str, values: Measured | str, base: Measured) -> str:
    """One line, of a baseline or of why there is none."""
    if isinstance(values, str):
        return f"| {name} (no training) | {_cell(values)} |{' |' * (len(columns) - 1)}"
    cells = ["-" if c.baseline is None else c.baseline(values, base) for c in columns]
    return f"| {name} (no training) | {' | '.join(cells)} |"


def _row(config: Compare, columns: list[Column], agent: str, runs: list[Outcome]) -> str:
    """One line: every seed's figure."""
    done = [o.points for o in runs if o.points]
    if not done:
        return f"| {agent} | {_cell(runs[0].problem)} |{' |' * (len(columns) - 1)}"
    at = {
        "reached": [first_at(points, config.target) for points in done],
        "within": [best_within(points, config.quality * (points[0].frechet or 0.0)) for points in done],
        "end": [points[-1] for points in done],
    }
    cells = [" / ".join("-" if p is None else c.say(p) for p in at[c.at]) for c in columns]
    failed = [f"(seed {o.seed} {_cell(o.problem)})" for o in runs if o.problem]
    return f"| {' '.join([agent, *failed])} | {' | '.join(cells)} |"


def _cell(text: str) -> str:
    """A sentence as it may stand in a table: guards speak of |log ratio|, errors of others have several lines."""
    return " ".join(text.split()).replace("|", r"\|")
