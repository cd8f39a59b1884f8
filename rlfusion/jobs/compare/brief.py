"""A comparison in a few columns, for a terminal that is too narrow for its tables."""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

from rlfusion.jobs.compare.tables import Table

HEAD = ["", "seeds", "gain", "queries", "CPU s", "alarms"]


def ends(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What became of each run of a comparison that is done, as plain data: its last evaluation, or its problem."""
    told = json.loads((folder / "comparison.json").read_text())
    return {"runs": [{**one, "points": len(one["points"]), "end": (one["points"] or [None])[-1]} for one in told]}


def brief(folder: Path) -> list[Table]:
    """A table a reward, a row an agent: means over seeds of the last evaluations, and how many runs had an alarm."""
    runs = ends(folder)["runs"]
    tables = []
    for reward in dict.fromkeys(run["reward"] for run in runs):
        mine = [run for run in runs if run["reward"] == reward]
        agents = dict.fromkeys(run["agent"] for run in mine)
        tables.append(Table(reward, HEAD, [_row(a, [run for run in mine if run["agent"] == a]) for a in agents]))
    return tables


def _row(agent: str, runs: list[dict[str, Any]]) -> list[str]:
    found = [run["end"] for run in runs if run["end"]]
    if not found:
        return [agent, "0", *["-"] * (len(HEAD) - 2)]
    gain, queries, seconds = (fmean(end[name] for end in found) for name in ("gain", "queries", "cpu_seconds"))
    alarms = sum(bool(end["alarm"]) for end in found)
    return [agent, str(len(found)), f"{gain:+.2f}", f"{queries:,.0f}", f"{seconds:.1f}", str(alarms)]
