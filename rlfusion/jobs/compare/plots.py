"""The plots of a comparison: gain against queries, seconds, and what it costs in quality."""

from collections.abc import Callable, Sequence
from io import BytesIO
from itertools import combinations
from pathlib import Path
from typing import Any

from rlfusion.common import storage
from rlfusion.jobs.compare.baselines import BASE, Measured, diversity, gain
from rlfusion.jobs.compare.fronts import Front
from rlfusion.jobs.compare.seeds import band
from rlfusion.jobs.curves import Point, sound

SHOWN = 2.5
"""Gains are drawn up to so many times the target."""

FORMATS = ("png", "pdf", "svg")

Run = tuple[str, int, list[Point]]
"""The agent, the seed and the evaluations of a run."""

WITHOUT_DATE: dict[str, dict[str, Any]] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
"""What keeps a file that is drawn again the same."""


def plot(
    target: float, quality: float, folder: Path, reward: str, runs: list[Run], measured: dict[str, Measured | str]
) -> bytes:
    """Every run of a reward: gain against queries and seconds, beside the baselines'; and with data gain against the
    Frechet distance, and agreement against it; without, gain against diversity, and diversity against queries.

    An agent of several seeds has its mean and the interval of it (``seeds``) in the first two. Written as PNG, PDF and
    SVG; the SVG is returned.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), layout="constrained")
    FigureCanvasAgg(figure)
    by_queries, by_seconds, price, fourth = figure.subplots(2, 2).flat
    looks = {agent: style(number) for number, agent in enumerate(dict.fromkeys(agent for agent, *_ in runs))}
    for axes, along in ((by_queries, lambda p: p.queries), (by_seconds, lambda p: p.cpu_seconds)):
        for agent, look in looks.items():
            _gains(axes, [points for name, _, points in runs if name == agent], along, agent, look)
    levels = _levels(measured)
    for name, level in levels.items():
        _level(by_queries, name, level)
        _level(by_seconds, "", level)
    highest = max([*levels.values(), *(p.gain for _, _, points in runs for p in points)])
    for axes in (by_queries, by_seconds, price):
        axes.axhline(target, color="0.7", linestyle="--", zorder=0)
        axes.set(ylabel="gain (sd of the base's rewards)", ylim=(-0.2, max(0.2, min(1.05 * highest, SHOWN * target))))
    by_queries.set(xlabel="queries", title=reward)
    ends = [points[-1].cpu_seconds for *_, points in runs]
    scale = (
        "symlog" if max(ends) > 10 * min(ends) else "linear"
    )  # on a symlog axis of one decade hardly a tick is named
    by_seconds.set(xlabel="CPU seconds of training", xscale=scale)
    if "frechet" in measured[BASE]:
        _of_frechet(quality, price, fourth, runs, looks, measured)
    else:
        _of_diversity(price, fourth, runs, looks, measured)
    lines = dict(zip(*reversed(by_queries.get_legend_handles_labels())))
    figure.legend(lines.values(), lines.keys(), loc="outside right upper", fontsize=8)
    return _written(folder, reward, figure)


def _written(folder: Path, name: str, figure: Any) -> bytes:
    """A figure as PNG, PDF and SVG; the SVG."""
    from matplotlib import rc_context

    for form in FORMATS:
        drawn = BytesIO()
        with rc_context({"svg.hashsalt": "rlfusion"}):
            figure.savefig(drawn, format=form, dpi=80, metadata=WITHOUT_DATE.get(form))
        storage.write(folder / f"{_file(name)}.{form}", drawn.getvalue())
    return drawn.getvalue()


def plot_front(folder: Path, front: Front) -> bytes:
    """Each pair of a front's rewards: all runs from their base on, and the members of the front as rings. Written as
    PNG, PDF and SVG; the SVG is returned.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pairs = list(combinations(front.rewards, 2))
    figure = Figure(figsize=(5.5 * min(len(pairs), 3), 4.5 * -(-len(pairs) // 3)), layout="constrained")
    FigureCanvasAgg(figure)
    looks = {agent: style(number) for number, agent in enumerate(dict.fromkeys(agent for agent, *_ in front.runs))}
    grid = list(figure.subplots(-(-len(pairs) // 3), min(len(pairs), 3), squeeze=False).flat)
    for axes in grid[len(pairs) :]:
        axes.set_visible(False)
    for axes, (x, y) in zip(grid, pairs):
        for agent, _, points in front.runs:
            look = looks[agent] | {"label": agent}
            _line(axes, points, lambda p, x=x: p.rewards[x], lambda p, y=y: p.rewards[y], look)
        at = [(one.point.rewards[x], one.point.rewards[y]) for one in front.members]
        axes.plot(*zip(*at), "o", color="none", markeredgecolor="k", markersize=9, label="not beaten")
        axes.set(xlabel=x, ylabel=y)
    lines = dict(zip(*reversed(grid[0].get_legend_handles_labels())))
    figure.legend(lines.values(), lines.keys(), loc="outside right upper", fontsize=8)
    return _written(folder, f"front-{'-'.join(front.rewards)}", figure)


def _gains(axes: Any, runs: list[list[Point]], along: Callable[[Point], float], label: str, look: dict) -> None:
    """An agent's runs, and where there are several their mean in front of them."""
    for points in runs:
        _line(axes, points, along, lambda p: p.gain, look | ({"alpha": 0.3} if len(runs) > 1 else {"label": label}))
    if len(runs) > 1:
        kept = [sound(points) or points[:1] for points in runs]
        mean_curve(axes, kept, along, lambda p: p.gain, {"color": look["color"], "linewidth": 2, "label": label})


def mean_curve(
    axes: Any,
    runs: Sequence[Sequence[Any]],
    along: Callable[[Any], float],
    value: Callable[[Any], float],
    look: dict[str, Any],
) -> None:
    """The mean of an agent's runs and, as a band, its interval (``seeds``). ``look``: what matplotlib draws lines by,
    with a colour.
    """
    found = band(runs, along, value)
    axes.plot(found.at, found.mean, **look)
    axes.fill_between(found.at, found.low, found.high, color=look["color"], alpha=0.15, linewidth=0)


def _line(
    axes: Any, points: list[Point], x: Callable[[Point], Any], y: Callable[[Point], Any], look: dict[str, Any]
) -> None:
    """A run: as it looks up to the monitor's first alarm, which is a cross, and dotted behind it."""
    before = sound(points)
    axes.plot([x(p) for p in before], [y(p) for p in before], **look)
    if behind := points[len(before) :]:
        dotted = look | {"linestyle": ":", "marker": "", "label": None}
        joined = [*before[-1:], *behind]
        axes.plot([x(p) for p in joined], [y(p) for p in joined], **dotted)
        axes.plot(x(behind[0]), y(behind[0]), "x", color=look["color"])


def _levels(measured: dict) -> dict[str, float]:
    """The gains of the baselines, but for the base models'."""
    told = {name: values for name, values in measured.items() if not name.startswith(BASE)}
    return {name: gain(values, measured[BASE]) for name, values in told.items() if not isinstance(values, str)}


def _level(axes: Any, name: str, level: float) -> None:
    """What a baseline has without training, whatever is spent."""
    axes.axhline(level, color="0.4", linestyle=(0, (1, 3)), linewidth=1, zorder=0)
    axes.annotate(
        name, (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7, annotation_clip=True
    )


def stars(measured: dict[str, Measured | str], *drawn: tuple[Any, Any, Any]) -> None:
    """The baselines, in each of some (axes, horizontal, vertical), functions of their values."""
    for name, values in measured.items():
        for axes, x, y in drawn if not isinstance(values, str) else ():
            axes.plot(x(values), y(values), "k*")
            axes.annotate(name, (x(values), y(values)), xytext=(4, 4), textcoords="offset points", fontsize=8)


def _of_frechet(quality: float, price: Any, agreement: Any, runs: list[Run], looks: dict, measured: dict) -> None:
    from matplotlib.ticker import LogFormatter

    base = measured[BASE]
    for agent, _, all_points in runs:
        points = [p for p in all_points if p.frechet is not None]
        _line(price, points, lambda p: p.frechet, lambda p: p.gain, looks[agent])
        _line(agreement, points, lambda p: p.frechet, lambda p: p.agreement, looks[agent])
    stars(
        measured,
        (price, lambda v: v["frechet"], lambda v: gain(v, base)),
        (agreement, lambda v: v["frechet"], lambda v: v["agreement"]),
    )
    for axes in (price, agreement):
        axes.axvline(quality * base["frechet"], color="0.7", linestyle=":", zorder=0)
        axes.set(xlabel="Frechet distance to held-out data", xscale="log")
        axes.xaxis.set_major_formatter(LogFormatter())  # 20, not 2 x 10^1
        axes.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    price.set(title=f"price of the reward; dotted: {quality:g} times the base's Frechet distance")
    agreement.set(ylabel="agreement with the prompt")


def _of_diversity(price: Any, by_queries: Any, runs: list[Run], looks: dict, measured: dict) -> None:
    base = measured[BASE]
    for agent, _, points in runs:
        _line(price, points, lambda p: p.diversity, lambda p: p.gain, looks[agent])
        _line(by_queries, points, lambda p: p.queries, lambda p: p.diversity, looks[agent])
    stars(measured, (price, lambda v: diversity(v, base), lambda v: gain(v, base)))
    price.set(xlabel="diversity within a prompt / the base's", title="price of the reward")
    by_queries.set(xlabel="queries", ylabel="diversity within a prompt / the base's")


def style(number: int) -> dict[str, Any]:
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
