"""Every learner on every reward, on digits: one table, and one plot of reward against Frechet distance.

Each file of ``learners/`` is the ``rlfusion compare --config`` of one reward. A comparison that is in the folder is
resumed where it was stopped and not run again where it is done; the page is made of what it holds.

    python benchmarks/learners.py --root runs/learners --out docs/learners.md
"""

import argparse
import json
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch

from rlfusion.cli.arguments import settings_of
from rlfusion.cli.main import main as rlfusion
from rlfusion.config import Compare
from rlfusion.jobs.compare.curves import Point, best_within, first_at

CONFIGS = Path(__file__).parent / "learners"
REWARDS = ("ink", "jpeg_compressibility", "symmetry", "class_logprob")
AGREEMENT = 0.9
INTRODUCTION = CONFIGS / "introduction.md"


@dataclass(frozen=True)
class Compared:
    """One reward: the settings, the runs' curves by agent, why there are none, and the baselines."""

    config: Compare
    runs: dict[str, list[list[Point]]]
    problems: dict[str, list[str]]
    baselines: dict[str, dict[str, float]]

    @property
    def base(self) -> dict[str, float]:
        return self.baselines["base"]

    @property
    def limit(self) -> float:
        """The largest Frechet distance of "quality"."""
        return self.config.quality * self.base["frechet"]


def compared(reward: str, root: Path) -> Compared:
    """The comparison of a reward, run first where it is not done.

    Raises:
        SystemExit: the command failed.
    """
    path, folder = CONFIGS / f"{reward}.yaml", root / reward
    if not (folder / "comparison.json").is_file():
        new = ["--config", str(path), "--root", str(root), "--name", reward]
        code = rlfusion(["compare", *(["--resume", str(folder)] if folder.exists() else new)])
        if code:
            raise SystemExit(code)
    runs: dict[str, list[list[Point]]] = {}
    problems: dict[str, list[str]] = {}
    for outcome in json.loads((folder / "comparison.json").read_text()):
        runs.setdefault(outcome["agent"], []).append([Point(**p) for p in outcome["points"]])
        problems.setdefault(outcome["agent"], []).append(outcome["problem"])
    baselines = json.loads((folder / "baselines.json").read_text())[reward]
    return Compared(settings_of("compare", ["--config", str(path)]), runs, problems, baselines)


def joined(points: Iterable[Point | None], say: Callable[[Point], str]) -> str:
    """Every seed's figure."""
    return " / ".join("-" if p is None else say(p) for p in points)


def row(found: Compared, agent: str) -> str:
    """A learner on one reward: the way to the target, the most at quality, the end."""
    seeds = [points for points in found.runs[agent] if points]
    if not seeds:
        return f"| {agent} | {found.problems[agent][0].partition(':')[0]} | | | | | | | |"
    reached = [first_at(points, found.config.target) for points in seeds]
    within = [best_within(points, found.config.quality * points[0].frechet) for points in seeds]
    ends = [points[-1] for points in seeds]
    cells = [
        joined(reached, lambda p: f"{p.queries:,}"),
        joined(reached, lambda p: f"{p.cpu_seconds:.1f}"),
        joined(reached, lambda p: f"{p.frechet:.0f}"),
        " / ".join("-" if p is None else f"{p.frechet / s[0].frechet:.1f}" for p, s in zip(reached, seeds)),
        joined(within, lambda p: f"{p.gain:.2f}"),
        joined(ends, lambda p: f"{p.gain:.1f}"),
        joined(ends, lambda p: f"{p.frechet:.0f}"),
        joined(ends, lambda p: f"{p.agreement:.3f}"),
    ]
    return f"| {agent} | {' | '.join(cells)} |"


def prompt_row(found: Compared, agent: str) -> str:
    """A learner on the class of the prompt: the way to ``AGREEMENT``, and the end."""
    seeds = [points for points in found.runs[agent] if points]
    if not seeds:
        return f"| {agent} | {found.problems[agent][0].partition(':')[0]} | | | | | | |"
    reached = [next((p for p in points if p.agreement >= AGREEMENT), None) for points in seeds]
    best = [max(points, key=lambda p: p.agreement) for points in seeds]
    cells = [
        joined(reached, lambda p: f"{p.queries:,}"),
        joined(reached, lambda p: f"{p.cpu_seconds:.1f}"),
        joined(reached, lambda p: f"{p.frechet:.1f}"),
        joined(best, lambda p: f"{p.agreement:.3f}"),
        joined(best, lambda p: f"{p.frechet:.1f}"),
        joined(best, lambda p: f"{p.queries:,}"),
        joined(best, lambda p: f"{p.diversity:.2f}"),
    ]
    return f"| {agent} | {' | '.join(cells)} |"


def untrained(found: Compared) -> Iterable[tuple[str, float, dict[str, float]]]:
    """(name, gain, figures) of what no training does."""
    for name, values in found.baselines.items():
        yield name, (values["reward"] - found.base["reward"]) / found.base["reward_std"], values


def section(reward: str, found: Compared) -> str:
    """The table of one reward, and how to run it."""
    config = found.config
    settings = f"{config.budget_queries:,} queries a run, seeds 0 to {config.seeds - 1}"
    lines = [f"## {reward}", "", f"`rlfusion compare --config benchmarks/learners/{reward}.yaml`: {settings}.", ""]
    if reward == "class_logprob":
        lines += [
            f"| learner | to agreement {AGREEMENT:g}: queries | CPU s | Frechet | best agreement | Frechet | queries "
            "| diversity / real |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for name, _, v in untrained(found):
            figures = f"{v['agreement']:.3f} | {v['frechet']:.1f} | - | {v['diversity_relative']:.2f}"
            lines.append(f"| {name} (no training) | - | - | - | {figures} |")
        return "\n".join([*lines, *(prompt_row(found, agent) for agent in found.runs)])
    lines += [
        f"| learner | to +{config.target:g} sd: queries | CPU s | Frechet | of the base's "
        f"| gain up to {config.quality:g} x | end: gain | Frechet | agreement |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, gain, v in untrained(found):
        lines.append(
            f"| {name} (no training) | - | - | - | - | - | {gain:.1f} | {v['frechet']:.0f} | {v['agreement']:.3f} |"
        )
    return "\n".join([*lines, *(row(found, agent) for agent in found.runs)])


def settings_table(all_: dict[str, Compared]) -> str:
    """What each learner's settings are, reward by reward, where they are not its defaults."""
    lines = ["## Settings", "", "| reward | learner | settings |", "|---|---|---|"]
    for reward, found in all_.items():
        for text in found.config.agents:
            name, _, written = text.partition(" = ")
            lines.append(f"| {reward} | {name} | `{written or text}` |")
    return "\n".join(lines)


def plot(all_: dict[str, Compared], path: Path) -> None:
    """Reward against Frechet distance: a panel a reward, a colour and mark a learner, a line a seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9.5), layout="constrained")
    FigureCanvasAgg(figure)
    names = list(dict.fromkeys(agent for found in all_.values() for agent in found.runs))
    looks = {a: {"color": f"C{i % 10}", "marker": "osv^"[i // 10 % 4], "markersize": 3.5} for i, a in enumerate(names)}
    labelled: set[str] = set()
    for axes, (reward, found) in zip(figure.subplots(2, 2).flat, all_.items()):
        by_agreement = reward == "class_logprob"
        for agent, seeds in found.runs.items():
            for points in filter(None, seeds):
                heights = [p.agreement if by_agreement else p.gain for p in points]
                label = None if agent in labelled else agent
                labelled.add(agent)
                x = [p.frechet for p in points]
                axes.plot(x, heights, label=label, linewidth=0.9, alpha=0.8, **looks[agent])
        for name, gain, values in untrained(found):
            height = values["agreement"] if by_agreement else gain
            axes.plot(values["frechet"], height, "k*", markersize=8)
            axes.annotate(name, (values["frechet"], height), xytext=(5, -9), textcoords="offset points", fontsize=8)
        axes.axvline(found.limit, color="0.6", linestyle=":", zorder=0)
        limits = (min(0.4, found.base["agreement"]), 1.01) if by_agreement else (-0.1, 1.5 * found.config.target)
        axes.set(xscale="log", ylim=limits, title=reward, xlabel="Frechet distance to held-out digits")
        axes.set_xlim(right=max(1.3 * found.limit, min(200.0, axes.get_xlim()[1])))
        axes.set_ylabel("agreement with the prompt" if by_agreement else "gain (sd of the base's rewards)")
        if not by_agreement:
            axes.axhline(found.config.target, color="0.6", linestyle="--", zorder=0)
    figure.legend(loc="outside lower center", ncols=5, fontsize=9)
    figure.savefig(path, dpi=75)


def page(all_: dict[str, Compared], picture: str) -> str:
    """The whole page."""
    bases = {reward: found.base for reward, found in all_.items()}
    seconds = mean(points[-1].cpu_seconds for f in all_.values() for s in f.runs.values() for points in s if points)
    made = (
        f"`python benchmarks/learners.py` makes the tables below (torch {torch.__version__}, Python "
        f"{platform.python_version()}, one CPU thread; a run trains for {seconds:.1f} CPU seconds on average). "
        "Agreement and Frechet distance of the base models: "
        + "; ".join(f"{r} {b['agreement']:.3f}, {b['frechet']:.1f}" for r, b in bases.items())
        + "."
    )
    sections = [section(reward, found) for reward, found in all_.items()]
    head = [INTRODUCTION.read_text().strip(), made, f"![reward against Frechet distance]({picture})"]
    return "\n\n".join([*head, *sections, settings_table(all_)]) + "\n"


def main() -> None:
    """Run what is not done, then write the page and the picture beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/learners"))
    parser.add_argument("--out", type=Path, default=Path("docs/learners.md"))
    parser.add_argument("--reward", action="append", choices=REWARDS, help="default: all")
    args = parser.parse_args()
    all_ = {reward: compared(reward, args.root) for reward in args.reward or REWARDS}
    picture = args.out.with_suffix(".png")
    plot(all_, picture)
    args.out.write_text(page(all_, picture.name))


if __name__ == "__main__":
    main()
