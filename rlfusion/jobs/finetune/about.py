"""What a run tells TensorBoard of itself: what it is, the layout of its scalars, and its row of HPARAMS."""

import json
import platform
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rlfusion.common.code_files import label
from rlfusion.common.errors import ConfigError
from rlfusion.config import Compare, Finetune, with_agent
from rlfusion.jobs.curves import curve, reached
from rlfusion.training.identity import Record
from rlfusion.training.tracking import Cells, flatten

PACKAGES = ("rlfusion", "torch", "numpy", "ray", "diffusers", "transformers")
PROMPTS = 100
"""Of a pipeline's prompts so many are listed, in the order of the pictures' columns."""
LEAVES_OUT = ("name", "root", "agent.name")
"""Of the settings that are other than usual: where the run is, and what stands beside them."""

START = "start (model)"
"""The column of the model: HPARAMS shows the first five by name, among which the seed is to be."""
COLUMNS: Cells = {"agent": "", "reward": "", "seed": 0, START: "", "steps": 0, "lr": 0.0, "kl": 0.0}
"""The columns that every run has, each with a value of its kind."""
FILE = "columns.json"
"""Those of all runs of a comparison, in its folder."""
BESIDE = ("reward", "seed", "base", "chain.steps", "agent.lr", "agent.kl_loss", "agent.kl", "lora")
"""Settings that are columns of HPARAMS under a shorter name. The page sorts its columns, and shows the first few."""

SPENT = {"queries": "queries", "seconds": "seconds", "cpu_seconds": "CPU seconds"}
"""What reaching the goal has cost, as ``Point`` and HPARAMS call it."""
QUALITY = ("frechet", "diversity")
"""How good the samples were there."""

COMPARED = {
    "runs beside one another": {
        "gain by queries": ["compare_.*/gain by queries$"],
        "gain by CPU seconds of training, or hundredths": ["compare_.*/gain by .*CPU seconds?$"],
        "gain by hundredths of the Frechet distance": ["compare_.*/gain by Frechet distance x 100$"],
        "diversity by queries": ["compare_.*/diversity by queries$"],
    },
}
"""Charts that a run of a comparison has before ``CHARTS``."""
CHARTS = {
    "how far it has come": {
        "gain, in the base's sd": ["evaluation/gain$"],
        "reward of the rollouts": ["train/reward$"],
        "reward of the evaluations": ["evaluation/reward$"],
    },
    "what it cost in quality": {
        "Frechet distance, and that of real data": ["evaluation/frechet$", "evaluation/frechet_floor$"],
        "diversity over that of the data": ["evaluation/diversity_relative$"],
        "diversity over the base's": ["monitor/diversity$"],
        "agreement": ["evaluation/agreement$"],
    },
    "how healthy the updates are": {
        "KL to the base": ["train/kl.*", "monitor/kl$"],
        "log-ratio": ["train/.*log_ratio.*"],
        "gradient": ["train/grad_norm$"],
        "clipped": ["train/clip.*"],
    },
    "alarms": {
        "alarms": ["monitor/alarms$"],
        "image statistics, in the base's sd": ["monitor/brightness$", "monitor/edge_density$", "monitor/entropy$"],
        "failed rewards": [".*reward_failed$"],
    },
}
"""Charts of TensorBoard's CUSTOM SCALARS by group: the tags that each shows, as regular expressions. A chart has one
figure, so that its lines are the runs.
"""


def charts(folder: Path) -> dict[str, dict[str, list[str]]]:
    """Those of a run in ``folder``."""
    return {**(COMPARED if (folder.parent / "run.json").is_file() else {}), **CHARTS}


def texts(config: Finetune) -> dict[str, str]:
    """What to read of a run before its curves, as Markdown by name."""
    unusual = other_than_usual(config)
    settings = "\n".join(f"| {name} | {value} |" for name, value in unusual.items())
    return {
        "run/plan": f"{label(config.agent.name)} on {reward_of(config)}, seed {config.seed}: {config.agent.plan()}",
        "run/settings": f"| other than usual | |\n|---|---|\n{settings}" if unusual else "all are the usual ones",
        "run/versions": ", ".join(f"{name} {number}" for name, number in _versions().items()),
    }


def other_than_usual(config: Finetune) -> dict[str, Any]:
    """The settings by dotted name that are not the defaults of the command with this agent."""
    usual = flatten(asdict(with_agent(config.agent.name)()))
    ours = flatten(asdict(config))
    return {k: v for k, v in ours.items() if usual.get(k) != v and k not in LEAVES_OUT}


def reward_of(config: Finetune) -> str:
    """The name of the reward, or of several with their weights."""
    if isinstance(config.reward, str):
        return label(config.reward)
    return " + ".join(f"{weight:g} {label(name)}" for name, weight in config.reward.items())


def columns(config: Finetune) -> Cells:
    """A run's row of HPARAMS: what one compares runs by, the same columns for all; then what is unusual of this one."""
    agent = asdict(config.agent)
    row: dict[str, Any] = {
        "agent": label(config.agent.name),
        "reward": reward_of(config),
        "seed": config.seed,
        START: _start(config),
        "steps": config.chain.steps,
    }
    row |= {"kl" if name == "kl_loss" else name: agent[name] for name in ("lr", "kl_loss", "kl") if name in agent}
    row |= {"lora": config.lora} if config.lora else {}
    return row | {f"with {name}": value for name, value in other_than_usual(config).items() if name not in BESIDE}


def shared(rows: Iterable[Cells]) -> Cells:
    """The columns of several rows, each with a value of its kind: a text, where one of them has one."""
    found = dict(COLUMNS)
    for row in rows:
        found |= {name: value for name, value in row.items() if not isinstance(found.get(name), str)}
    return found


def beside(folder: Path) -> Cells:
    """The columns of the comparison of which the run in ``folder`` is one; none where it is of no comparison.

    Raises:
        ConfigError: their file is damaged.
    """
    file = folder.parent / FILE
    if _comparison(folder) is None:
        return {}
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"{file} is damaged ({error}); a comparison that goes on writes it again") from error
    if not isinstance(held, dict) or not all(isinstance(value, str | int | float) for value in held.values()):
        raise ConfigError(f"{file} holds no columns; a comparison that goes on writes it again")
    return held


def results(figures: Iterable[str]) -> list[str]:
    """The names of a run's metrics in the order of HPARAMS; ``figures`` are those of an evaluation."""
    goal = [*(f"{word} to the goal" for word in SPENT.values()), *(f"{name} at the goal" for name in QUALITY), "goal"]
    return [f"final/{name}" for name in ("gain", *goal, *figures, "seconds", "cpu_seconds", "queries")]


def at_the_goal(folder: Path) -> dict[str, float | None]:
    """What a run has spent when it first had the gain of its goal, and how good its samples then were, as the table of
    a comparison tells it; None where it never had. The goal is that of its comparison, else the default of one.

    Raises:
        ConfigError: lines of its metrics or times are lost.
    """
    goal = _goal(folder)
    point = reached(curve(folder), goal)
    spent = {f"{word} to the goal": getattr(point, name, None) for name, word in SPENT.items()}
    quality = {f"{name} at the goal": getattr(point, name, None) for name in QUALITY}
    return {**spent, **quality, "goal": goal}


def _goal(folder: Path) -> float:
    comparison = _comparison(folder)
    return float(comparison.config["target"]) if comparison else Compare.target


def _comparison(folder: Path) -> Record | None:
    """The record of the comparison of which the run in ``folder`` is one; None where it is of none."""
    try:
        record = Record.read(folder.parent)
    except FileNotFoundError:
        return None
    return record if record.command == "compare" else None


def _start(config: Finetune) -> str:
    """The model that a run begins with, in a word."""
    base = Path(config.base)
    if not config.base:
        return f"pretrained on {config.pretrain.data}"
    return base.parent.name if base.name == "model" else base.name


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
