"""The plots of a comparison: gain against queries, seconds, and what it costs in quality."""

from io import BytesIO
from pathlib import Path
from typing import Any

from rlfusion.common import storage
from rlfusion.config.compare import Compare
from rlfusion.jobs.compare.baselines import BASE, Measured, diversity, gain
from rlfusion.jobs.compare.curves import Point

SHOWN = 2.5
"""Gains are drawn up to so many times the target."""

Run = tuple[str, int, list[Point]]
"""The agent, the seed and the evaluations of a run."""


def plot(config: Compare, folder: Path, reward: str, runs: list[Run], measured: dict[str, Measured | str]) -> None:
    """Every run of a reward: gain against queries and seconds; and with data gain against the Frechet distance, and
    agreement against it; without, gain against diversity, and diversity against queries.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), layout="constrained")
    FigureCanvasAgg(figure)
    by_queries, by_seconds, price, fourth = figure.subplots(2, 2).flat
    looks = {agent: _look(number) for number, agent in enumerate(dict.fromkeys(agent for agent, *_ in runs))}
    first = min(seed for _, seed, _ in runs)
    for agent, seed, points in runs:
        gains, label = [p.gain for p in points], agent if seed == first else None
        by_queries.plot([p.queries for p in points], gains, label=label, **looks[agent])
        by_seconds.plot([p.cpu_seconds for p in points], gains, **looks[agent])
    highest = max(p.gain for _, _, points in runs for p in points)
    for axes in (by_queries, by_seconds, price):
        axes.axhline(config.target, color="0.7", linestyle="--", zorder=0)
        axes.set(
            ylabel="gain (sd of the base's rewards)", ylim=(-0.2, max(0.2, min(1.05 * highest, SHOWN * config.target)))
        )
    by_queries.set(xlabel="queries", title=reward)
    ends = [points[-1].cpu_seconds for *_, points in runs]
    scale = (
        "symlog" if max(ends) > 10 * min(ends) else "linear"
    )  # on a symlog axis of one decade hardly a tick is named
    by_seconds.set(xlabel="CPU seconds of training", xscale=scale)
    (_of_frechet if "frechet" in measured[BASE] else _of_diversity)(config, price, fourth, runs, looks, measured)
    figure.legend(loc="outside right upper", fontsize=8)
    drawn = BytesIO()
    figure.savefig(drawn, dpi=80)
    storage.write(folder / f"{_file(reward)}.png", drawn.getvalue())


def _stars(measured: dict[str, Measured | str], *drawn: tuple[Any, Any, Any]) -> None:
    """The baselines, in each of some (axes, horizontal, vertical), functions of their values."""
    for name, values in measured.items():
        for axes, x, y in drawn if not isinstance(values, str) else ():
            axes.plot(x(values), y(values), "k*")
            axes.annotate(name, (x(values), y(values)), xytext=(4, 4), textcoords="offset points", fontsize=8)


def _of_frechet(config: Compare, price: Any, agreement: Any, runs: list[Run], looks: dict, measured: dict) -> None:
    base = measured[BASE]
    for agent, _, points in runs:
        price.plot([p.frechet for p in points], [p.gain for p in points], **looks[agent])
        agreement.plot([p.frechet for p in points], [p.agreement for p in points], **looks[agent])
    _stars(
        measured,
        (price, lambda v: v["frechet"], lambda v: gain(v, base)),
        (agreement, lambda v: v["frechet"], lambda v: v["agreement"]),
    )
    for axes in (price, agreement):
        axes.axvline(config.quality * base["frechet"], color="0.7", linestyle=":", zorder=0)
        axes.set(xlabel="Frechet distance to held-out data", xscale="log")
    price.set(title=f"price of the reward; dotted: {config.quality:g} times the base's Frechet distance")
    agreement.set(ylabel="agreement with the prompt")


def _of_diversity(config: Compare, price: Any, by_queries: Any, runs: list[Run], looks: dict, measured: dict) -> None:
    base = measured[BASE]
    for agent, _, points in runs:
        price.plot([p.diversity for p in points], [p.gain for p in points], **looks[agent])
        by_queries.plot([p.queries for p in points], [p.diversity for p in points], **looks[agent])
    _stars(measured, (price, lambda v: diversity(v, base), lambda v: gain(v, base)))
    price.set(xlabel="diversity within a prompt / the base's", title="price of the reward")
    by_queries.set(xlabel="queries", ylabel="diversity within a prompt / the base's")


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
