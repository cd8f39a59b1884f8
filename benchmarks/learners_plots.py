"""The figures of the comparison of all learners: means over the seeds with their intervals, as ``rlfusion compare``
draws them (``rlfusion.jobs.compare.plots``).
"""

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from learners_record import Race, agent_of
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from rlfusion.jobs.compare.baselines import gain
from rlfusion.jobs.compare.plots import mean_curve, stars, style
from rlfusion.jobs.compare.seeds import band
from rlfusion.jobs.curves import Point

SETTINGS = {"svg.hashsalt": "rlfusion", "svg.fonttype": "none", "font.size": 9}
PANELS = {"ink": "gain in ink (sd of the base's)", "class_logprob": "agreement with the judge"}
"""The two panels of a learner's own figure."""
COLOURS = ("#3f51b5", "#e08a00", "#00897b")
HIGHEST = 1.6
"""Gains are drawn up to so many times the goal: beyond it a reward is gamed."""


@contextlib.contextmanager
def _figure(columns: int, size: tuple[float, float], file: Path) -> Iterator[tuple[Figure, Any]]:
    """A figure and its panels; written as SVG, the same again for the same data."""
    with rc_context(SETTINGS):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        panels = figure.subplots(1, columns)
        for panel in panels:
            panel.spines[["top", "right"]].set_visible(False)
        yield figure, panels
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    file.write_text("\n".join(line.rstrip() for line in drawn.getvalue().splitlines()) + "\n")


def _label(race: Race) -> str:
    return "agreement with the prompt" if race.by_agreement else "gain (sd of the base's rewards)"


def _limits(race: Race) -> tuple[float, float]:
    if race.by_agreement:
        return min(0.4, race.base["agreement"]) - 0.03, 1.01
    ends = [race.of(points[-1]) for seeds in race.curves.values() for points in seeds]
    return -0.2, min(HIGHEST * race.goal, 1.1 * max(race.goal, *ends))


def side_by_side(race: Race, names: list[str], file: Path) -> None:
    """All learners on a reward: by queries, and against the Frechet distance; each line a mean of the seeds. The place
    of a learner in ``names`` says how it looks.
    """
    with _figure(2, (10.5, 4.6), file) as (figure, (by_queries, price)):
        for agent, seeds in sorted(race.curves.items(), key=lambda of: names.index(of[0])):
            look = style(names.index(agent)) | {"label": agent, "linewidth": 1.3}
            if agent not in race.groups["no reward"]:
                mean_curve(by_queries, seeds, lambda p: p.queries, race.of, look)
            places = [sum(p.frechet or 0.0 for p in at) / len(at) for at in zip(*seeds)]
            heights = [sum(race.of(p) for p in at) / len(at) for at in zip(*seeds)]
            price.plot(places, heights, **look)
        heights_of = _height(race)
        stars(dict(race.baselines), (price, lambda v: v["frechet"], heights_of))
        for panel in (by_queries, price):
            panel.axhline(race.goal, color="0.7", linestyle="--", zorder=0)
            panel.set(ylim=_limits(race), ylabel=_label(race))
        price.axvline(race.limit, color="0.7", linestyle=":", zorder=0)
        price.set(xlabel="Frechet distance to held-out digits", xscale="log", title="what it costs in distance")
        by_queries.set(xlabel="queries (rewards asked for)", title=race.reward)
        price.set_xlim(right=1.2 * max(race.limit, *_distances(race)))
        lines = dict(zip(*reversed(price.get_legend_handles_labels())))
        figure.legend(lines.values(), lines.keys(), loc="outside right upper", fontsize=8, frameon=False)


def _distances(race: Race) -> list[float]:
    """Of the evaluations that are not above the figure."""
    highest = _limits(race)[1]
    points = [p for seeds in race.curves.values() for points in seeds for p in points]
    return [p.frechet or 0.0 for p in points if race.of(p) <= highest]


def _height(race: Race) -> Callable[[Any], float]:
    return (lambda v: v["agreement"]) if race.by_agreement else (lambda v: gain(v, race.base))


def of_each(races: list[Race], folder: Path) -> None:
    """A figure for each agent, NAME.svg: its rows in colour before those of all others in grey."""
    shown = [race for reward in PANELS for race in races if race.reward == reward]
    rows = [(agent_of(race.agents[row]), row in race.groups["no reward"]) for race in shown for row in race.curves]
    for name, silent in sorted(set(rows)):
        with _figure(2, (7.6, 2.7), folder / f"{name}.svg") as (_, panels):
            for panel, race in zip(panels, shown):
                _panel(panel, race, name, silent)


def _panel(panel: Any, race: Race, name: str, silent: bool) -> None:
    """One reward in an agent's figure: the mean and the band of each of its rows. An agent that is ``silent`` asks for
    no reward: its curve goes by CPU seconds.
    """
    own = [row for row in race.curves if agent_of(race.agents[row]) == name]

    def along(point: Point) -> float:
        return point.cpu_seconds if silent else point.queries

    for row, seeds in race.curves.items():
        if row not in own and (silent or row not in race.groups["no reward"]):
            others = band(seeds, along, race.of)
            panel.plot(others.at, others.mean, color="#bbb", linewidth=0.8, zorder=1)
    for row, colour in zip(own, COLOURS):
        mean_curve(panel, race.curves[row], along, race.of, {"color": colour, "linewidth": 1.8, "label": row})
    title = PANELS[race.reward]
    panel.set(title=title if own else f"{title}: the others", ylim=(0.3, 1) if race.by_agreement else (-0.5, 6))
    panel.set(xlabel="CPU seconds of training" if silent else "queries")
    if own:
        panel.legend(frameon=False, loc="lower right" if race.by_agreement else "upper left")
