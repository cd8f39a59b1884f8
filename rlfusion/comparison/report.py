"""The end of a comparison: a table in Markdown, and plots of gain against queries, seconds and Frechet distance."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlfusion.comparison.baselines import Measured
from rlfusion.comparison.curves import Point, best_within, first_at
from rlfusion.comparison.settings import Compare, shown

BASE = "base"
SHOWN = 2.5
"""Gains are drawn up to so many times the target."""


@dataclass(frozen=True)
class Outcome:
    """What became of one run: its evaluations, or why there are none."""

    agent: str
    reward: str
    seed: int
    points: list[Point]
    problem: str


def report(config: Compare, folder: Path, outcomes: list[Outcome], measured: dict[str, dict[str, Measured]]) -> str:
    """Write ``comparison.md``, ``comparison.json`` and the plots; returns the Markdown."""
    text = "\n\n".join(_section(config, reward, outcomes, measured[reward]) for reward in config.rewards)
    page = f"# Comparison\n\n{_head(config)}\n\n{text}\n"
    (folder / "comparison.md").write_text(page)
    (folder / "comparison.json").write_text(json.dumps([asdict(o) for o in outcomes], indent=1))
    for reward in config.rewards:
        mine = [o for o in outcomes if o.reward == reward and o.points]
        if mine:
            _plot(config, folder, reward, mine, measured[reward])
    return page


def _head(config: Compare) -> str:
    return (
        f"{config.budget_queries} queries a run, {config.seeds} seed(s), one base model; gain in standard deviations "
        f"of the base's rewards. `+{config.target:g}` is the first evaluation with that gain: queries, CPU seconds of "
        f"training, Frechet distance. `at quality` is the largest gain at a Frechet distance up to {config.quality:g} "
        "times the base's. Figures of several seeds stand beside one another; - is never."
    )


def _section(config: Compare, reward: str, outcomes: list[Outcome], measured: dict[str, Measured]) -> str:
    """The table of one reward."""
    head = [
        f"## {reward}",
        "",
        f"| | +{config.target:g}: queries | CPU s | Frechet | at quality: gain | Frechet | end: gain | agreement "
        "| Frechet | diversity / real |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = [_baseline(name, values, measured[BASE]) for name, values in measured.items()]
    for agent in map(shown, config.agents):
        rows.append(_row(config, agent, [o for o in outcomes if (o.agent, o.reward) == (agent, reward)]))
    return "\n".join([*head, *rows])


def _baseline(name: str, values: Measured, base: Measured) -> str:
    gain = (values["reward"] - base["reward"]) / max(base["reward_std"], 1e-12)
    end = f"{gain:.2f} | {values['agreement']:.3f} | {values['frechet']:.1f} | {values['diversity_relative']:.2f}"
    return f"| {name} (no training) | - | - | - | - | - | {end} |"


def _row(config: Compare, agent: str, runs: list[Outcome]) -> str:
    """One line: every seed's figure."""
    done = [o.points for o in runs if o.points]
    if not done:
        return f"| {agent} | {runs[0].problem} | | | | | | | | |"
    reached = [first_at(points, config.target) for points in done]
    within = [best_within(points, config.quality * points[0].frechet) for points in done]
    ends = [points[-1] for points in done]
    cells = [
        _join(reached, lambda p: f"{p.queries:,}"),
        _join(reached, lambda p: f"{p.cpu_seconds:.1f}"),
        _join(reached, lambda p: f"{p.frechet:.1f}"),
        _join(within, lambda p: f"{p.gain:.2f}"),
        _join(within, lambda p: f"{p.frechet:.1f}"),
        _join(ends, lambda p: f"{p.gain:.2f}"),
        _join(ends, lambda p: f"{p.agreement:.3f}"),
        _join(ends, lambda p: f"{p.frechet:.1f}"),
        _join(ends, lambda p: f"{p.diversity:.2f}"),
    ]
    failed = [f"(seed {o.seed} {o.problem})" for o in runs if o.problem]
    return f"| {' '.join([agent, *failed])} | {' | '.join(cells)} |"


def _join(points: list[Point | None], say: Callable[[Point], str]) -> str:
    return " / ".join("-" if p is None else say(p) for p in points)


def _plot(config: Compare, folder: Path, reward: str, outcomes: list[Outcome], measured: dict[str, Measured]) -> None:
    """Every run of a reward: gain against queries, seconds and the Frechet distance, and agreement against the last."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), layout="constrained")
    FigureCanvasAgg(figure)
    by_queries, by_seconds, by_frechet, agreement = figure.subplots(2, 2).flat
    looks = {agent: _look(number) for number, agent in enumerate(dict.fromkeys(o.agent for o in outcomes))}
    for o in outcomes:
        gains, label = [p.gain for p in o.points], o.agent if o.seed == min(m.seed for m in outcomes) else None
        by_queries.plot([p.queries for p in o.points], gains, label=label, **looks[o.agent])
        by_seconds.plot([p.cpu_seconds for p in o.points], gains, **looks[o.agent])
        by_frechet.plot([p.frechet for p in o.points], gains, **looks[o.agent])
        agreement.plot([p.frechet for p in o.points], [p.agreement for p in o.points], **looks[o.agent])
    for name, values in measured.items():
        gain = (values["reward"] - measured[BASE]["reward"]) / max(measured[BASE]["reward_std"], 1e-12)
        for axes, height in ((by_frechet, gain), (agreement, values["agreement"])):
            axes.plot(values["frechet"], height, "k*")
            axes.annotate(name, (values["frechet"], height), xytext=(4, 4), textcoords="offset points", fontsize=8)
    highest = max(p.gain for o in outcomes for p in o.points)
    for axes in (by_queries, by_seconds, by_frechet):
        axes.axhline(config.target, color="0.7", linestyle="--", zorder=0)
        axes.set(ylabel="gain (sd of the base's rewards)", ylim=(-0.2, min(1.05 * highest, SHOWN * config.target)))
    for axes in (by_frechet, agreement):
        axes.axvline(config.quality * measured[BASE]["frechet"], color="0.7", linestyle=":", zorder=0)
        axes.set(xlabel="Frechet distance to held-out data", xscale="log")
    by_queries.set(xlabel="queries", title=reward)
    by_seconds.set(xlabel="CPU seconds of training", xscale="symlog")
    by_frechet.set(title=f"price of the reward; dotted: {config.quality:g} times the base's Frechet distance")
    agreement.set(ylabel="agreement with the prompt")
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(folder / f"{_file(reward)}.png", dpi=80)


def _look(number: int) -> dict[str, Any]:
    """How the runs of an agent are drawn: 10 colours, each with four marks."""
    return {
        "color": f"C{number % 10}",
        "marker": "osv^"[number // 10 % 4],
        "markersize": 3,
        "linewidth": 1,
        "alpha": 0.8,
    }


def _file(reward: str) -> str:
    return "".join(c if c.isalnum() or c in "._" else "-" for c in reward)
