"""The curve of a run: its evaluations, with the queries and seconds spent until each.

gain = (mean reward - mean reward of the base) / (standard deviation of the base's rewards)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

from rlfusion.common.errors import ConfigError
from rlfusion.common.jsonl import read_lines
from rlfusion.evaluation.gains import gain
from rlfusion.evaluation.images import ImageStatistics
from rlfusion.rewards import labels
from rlfusion.rl.constraints import Constraint
from rlfusion.training.identity import Record

IMAGES = ImageStatistics._fields
GAIN: Callable[["Point"], Any] = attrgetter("gain")
EACH = "evaluation/reward_"
OTHERS = (f"{EACH}std", f"{EACH}failed")
"""What begins like the mean of one of several rewards, and is none."""
PUT_BACK = "put it back, or remove that folder, and a comparison that made it runs it again"


@dataclass(frozen=True)
class Point:
    """One evaluation of a run. ``diversity`` is a share of real data's, or of the base's where there are none; then
    there is no judge either: agreement and frechet are None, and ``images`` has the means of the image statistics.
    ``frechet`` is None, too, where there are fewer samples than before and after.
    ``alarm``: the monitor has found the reward gamed, here or at an evaluation before. ``rewards`` has the mean of each
    of several rewards, by its short name; ``lower`` are those of which less is better: a penalty, or one that is only
    bound from above.
    """

    updates: int
    queries: int
    seconds: float
    cpu_seconds: float
    gain: float
    reward: float
    agreement: float | None
    frechet: float | None
    diversity: float
    images: dict[str, float]
    alarm: bool = False
    rewards: dict[str, float] = field(default_factory=dict)
    lower: tuple[str, ...] = ()


def curve(folder: Path) -> list[Point]:
    """The evaluations of a run in order, the base's first.

    Raises:
        ConfigError: lines of its metrics or times are lost.
    """
    lines = _lines(folder / "metrics.jsonl")
    found = {step: line for step, line in lines.items() if "evaluation/reward" in line}
    alarmed = min((step for step, line in lines.items() if line.get("monitor/alarms")), default=math.inf)
    spent = _lines(folder / "timing.jsonl") | {0: {"queries": 0, "seconds": 0.0, "cpu_seconds": 0.0}}
    if lost := sorted({0} - found.keys()) or sorted(found.keys() - spent.keys()):
        raise ConfigError(
            f"{folder}: metrics.jsonl or timing.jsonl has lost what it said of update {lost[0]}; {PUT_BACK}"
        )
    base, lower = found[0], _lower(folder)
    return [
        Point(
            updates=step,
            queries=spent[step]["queries"],
            seconds=spent[step]["seconds"],
            cpu_seconds=spent[step]["cpu_seconds"],
            gain=_gain(e, base),
            reward=e["evaluation/reward"],
            **_quality(e, base),
            alarm=step >= alarmed,
            rewards={name.removeprefix(EACH): e[name] for name in e if name.startswith(EACH) and name not in OTHERS},
            lower=lower,
        )
        for step, e in sorted(found.items())
    ]


def _lower(folder: Path) -> tuple[str, ...]:
    """The short names of the rewards of a run of which less is better, by its settings."""
    try:
        held = Record.read(folder).settings
    except FileNotFoundError:
        return ()
    weights = {name.removeprefix("reward."): weight for name, weight in held.items() if name.startswith("reward.")}
    bound = [Constraint.parse(text) for text in held.get("constraint") or ()]
    wanted = {one.name for one in bound if one.sense == ">="}
    unwanted = {one.name for one in bound if one.sense == "<="} - wanted
    less = [name for name, weight in weights.items() if weight < 0 or (not weight and name in unwanted)]
    return tuple(labels(list(weights))[name] for name in less)


def base_of(folder: Path) -> dict[str, float]:
    """What the evaluation of the base of a run found, by name.

    Raises:
        ConfigError: its line is lost.
    """
    found = _lines(folder / "metrics.jsonl").get(0, {})
    base = {name.removeprefix("evaluation/"): value for name, value in found.items() if name.startswith("evaluation/")}
    if "reward" not in base:
        raise ConfigError(f"{folder}: metrics.jsonl has lost what it said of the base model; {PUT_BACK}")
    return base


def _lines(file: Path) -> dict[int, dict[str, Any]]:
    """The lines of a file by their step, of one step together.

    Raises:
        ConfigError: a line is damaged.
    """
    lines, bad = read_lines(file)
    if bad:
        raise ConfigError(f"{file} has {bad} damaged line(s); {PUT_BACK}")
    found: dict[int, dict[str, Any]] = {}
    for _, line in lines:
        found[line["step"]] = found.get(line["step"], {}) | line
    return found


def _gain(found: dict[str, float], base: dict[str, float]) -> float:
    """The gain of an evaluation: of fewer samples than the base's what the run has written, over the same of these."""
    if found.get("evaluation/count", 0) < base.get("evaluation/count", 0) and "evaluation/gain" in found:
        return found["evaluation/gain"]
    return gain(found["evaluation/reward"], base["evaluation/reward"], base["evaluation/reward_std"])


def _quality(found: dict[str, float], base: dict[str, float]) -> dict[str, Any]:
    """What ``Point`` holds of the quality of samples."""
    if "evaluation/frechet" in base:
        judged = {"agreement": found["evaluation/agreement"], "frechet": found.get("evaluation/frechet")}
        return judged | {"diversity": found["evaluation/diversity_relative"], "images": {}}
    images = {name: found[f"evaluation/{name}"] for name in IMAGES}
    relative = found["evaluation/diversity"] / max(base["evaluation/diversity"], 1e-12)
    return {"agreement": None, "frechet": None, "diversity": relative, "images": images}


def first_at(points: list[Point], least: float, of: Callable[[Point], Any] = GAIN) -> Point | None:
    """The first evaluation whose gain, or what else of it is asked for, is that."""
    return next((p for p in points if of(p) >= least), None)


def sound(points: list[Point]) -> list[Point]:
    """The evaluations before the monitor's first alarm."""
    return [p for p in points if not p.alarm]


def reached(points: list[Point], goal: float) -> Point | None:
    """The first evaluation with the gain ``goal``, where it is before the monitor's first alarm."""
    return first_at(sound(points), goal)


def best_within(points: list[Point], frechet: float, of: Callable[[Point], Any] = GAIN) -> Point | None:
    """The evaluation of the largest gain, or what else of it is asked for, among those after training at a Frechet
    distance up to ``frechet``.
    """
    within = [p for p in points[1:] if p.frechet is not None and p.frechet <= frechet]
    return max(within, key=of, default=None)
