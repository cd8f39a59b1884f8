"""The end of a comparison: a table in Markdown, and plots of gain against queries and against Frechet distance."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlfusion.comparison.baselines import Measured
from rlfusion.comparison.curves import Point, best_within, first_at
from rlfusion.comparison.settings import Compare

BASE = "base"


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
            _plot(folder, reward, mine, measured[reward])
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
    for agent in config.agents:
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
    failed = [f"seed {o.seed} {o.problem}" for o in runs if o.problem]
    return f"| {' '.join([agent, *failed])} | {' | '.join(cells)} |"


def _join(points: list[Point | None], say: Callable[[Point], str]) -> str:
    return " / ".join("-" if p is None else say(p) for p in points)


def _plot(folder: Path, reward: str, outcomes: list[Outcome], measured: dict[str, Measured]) -> None:
    """Gain against queries, and against the Frechet distance, of every run of a reward."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    agents = list(dict.fromkeys(o.agent for o in outcomes))
    for o in outcomes:
        look: dict[str, Any] = {"color": f"C{agents.index(o.agent)}", "marker": ".", "alpha": 0.8}
        label = o.agent if o.seed == 0 else None
        left.plot([p.queries for p in o.points], [p.gain for p in o.points], label=label, **look)
        right.plot([p.frechet for p in o.points], [p.gain for p in o.points], label=label, **look)
    base = measured[BASE]
    for name, values in measured.items():
        gain = (values["reward"] - base["reward"]) / max(base["reward_std"], 1e-12)
        right.plot(values["frechet"], gain, "k*")
        right.annotate(name, (values["frechet"], gain), xytext=(4, 4), textcoords="offset points", fontsize=8)
    left.set(xlabel="queries", ylabel="gain (sd of the base's rewards)", title=reward)
    right.set(xlabel="Frechet distance to held-out data", title="price of the reward")
    left.legend()
    figure.savefig(folder / f"{_file(reward)}.png", dpi=110)


def _file(reward: str) -> str:
    return "".join(c if c.isalnum() or c in "._" else "-" for c in reward)
