"""Folders as runs leave them, written by hand: what a comparison reads."""

import json
from pathlib import Path

from rlfusion.cli.arguments import settings_of
from rlfusion.training import identity

STEPS = 4


def run(
    root: Path,
    name: str,
    *settings: object,
    agent: str = "ddpo",
    gain: float = 1.0,
    alarm: int = 0,
    frechet: float = 8.0,
) -> Path:
    """The folder of a run whose gain rises by ``gain`` an update."""
    folder = root / name
    folder.mkdir(parents=True)
    words = ["--agent", agent, "--reward", "ink", "--updates", "4", *map(str, settings)]
    identity.enter(folder, "finetune", settings_of("finetune", words))
    lines, laps = [], []
    for step in range(STEPS + 1):
        found = {"reward": 1 + 0.5 * gain * step, "reward_std": 0.5, "agreement": 0.9, "diversity_relative": 1.0}
        found["frechet"] = frechet + step
        lines.append({"step": step, **{f"evaluation/{key}": value for key, value in found.items()}})
        if alarm and step >= alarm:
            lines.append({"step": step, "monitor/alarms": 1.0})
        if step:
            laps.append({"step": step, "queries": 10 * step, "seconds": 2.0 * step, "cpu_seconds": 3.0 * step})
    for file, records in (("metrics.jsonl", lines), ("timing.jsonl", laps)):
        (folder / file).write_text("".join(f"{json.dumps(record)}\n" for record in records))
    (folder / "before.json").write_text("{}")
    return folder
