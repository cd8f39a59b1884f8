"""Differences paired by seed and prompt: where two agents' last evaluations have the rewards of the same samples.

A cell is a seed and a prompt: the mean gain of its samples. Two agents differ by the mean of their differences cell by
cell; interval and p are those of ``seeds``, with cells in the place of seeds. They say of these runs whether one model
is above the other over prompts; whether the agents differ, the seeds say.
"""

from collections.abc import Iterable, Mapping
from itertools import combinations
from pathlib import Path

import numpy as np

from rlfusion.jobs.compare.baselines import BASE
from rlfusion.jobs.compare.seeds import difference
from rlfusion.jobs.compare.tables import Table
from rlfusion.jobs.curves import Point
from rlfusion.jobs.sample_rewards import kept

Cells = dict[tuple[int, int], float]
"""The mean gain of the samples of a (seed, prompt)."""

Rewards = Mapping[str, np.ndarray]
"""(2, N), as of ``sample_rewards``, of each baseline by its name; on the seed 0."""


def cells(seed: int, found: np.ndarray, base: np.ndarray) -> Cells:
    """The cells of a model with the rewards ``found`` beside its base's, both (2, N); a failed reward is in none."""
    mean, std = np.nanmean(base[1]), np.nanstd(base[1])
    gains = (found[1] - mean) / max(std, 1e-12)
    fine = np.isfinite(gains)
    return {
        (seed, int(prompt)): float(gains[fine & (found[0] == prompt)].mean()) for prompt in np.unique(found[0][fine])
    }


def of_run(folder: Path, seed: int, points: list[Point]) -> Cells:
    """Those of the last evaluation of a run; none where its rewards were not kept."""
    base, last = kept(folder, 0), kept(folder, points[-1].updates)
    return {} if base is None or last is None else cells(seed, last, base)


def of_baselines(rewards: Rewards) -> dict[str, Cells]:
    """Those of each baseline but the base model itself, whose gain is zero."""
    return {name: cells(0, found, rewards[BASE]) for name, found in rewards.items() if name != BASE}


def differences(reward: str, agents: Mapping[str, Cells], baselines: Mapping[str, Cells]) -> Iterable[Table]:
    """The table of the differences of agents, and of agents and baselines; none where no two share cells."""
    pairs = [*combinations(agents, 2), *((agent, name) for agent in agents for name in baselines)]
    known = {**baselines, **agents}
    found = [(one, other, difference(known[one], known[other])) for one, other in pairs]
    rows = [
        [f"{one} - {other}", f"{d.mean:+.2f}", f"{d.low:+.2f} .. {d.high:+.2f}", f"{d.p:.2g}", str(d.seeds)]
        for one, other, d in found
        if d is not None
    ]
    head = ["", "end: gain", "95 % (bootstrap of the cells)", "p (changes of sign)", "cells"]
    if rows:
        yield Table(f"{reward}: differences of these runs, by seed and prompt", head, rows)
