"""Every pretraining objective on digits: classifier agreement and Frechet distance, one table from one script.

Each preset of ``rlfusion pretrain --objective`` is trained with its own settings and sampled with its own chain;
consistency models also with the chains of ``MORE``. Finished trainings are kept in the folder and not repeated.

    python benchmarks/pretraining.py --root runs/pretraining --out docs/pretraining.md
"""

import argparse
import contextlib
import io
import json
import platform
import time
from pathlib import Path

import torch

from rlfusion.cli.main import main as rlfusion
from rlfusion.pretrain import PRESETS

MORE: dict[str, tuple[int, ...]] = {"ct": (2,), "ict": (2,), "sct": (2,)}
"""Objectives that are also measured at other numbers of steps."""

NOTES = (
    "A second step makes `sct` worse: its tangent is noisy, and the function is wrong at middle noise "
    "([notes](notes/sct-second-step.md)). Distilled from a teacher, as `scd` in [distillation](distillation.md), the "
    "same network comes to 5.6 to 7.3 with one step.",
    "",
    "`--learner.ranks 8 --learner.shares 8 --learner.shard fsdp` pretrains in eight processes, with an eighth of the "
    "network, its moments and its averages on each, by every objective ([design](design.md#learners)). `ism` and "
    "`ssm` have derivatives of the network in their loss: for these the network is gathered on each rank while it "
    "computes.",
)
"""What was found, and what is to be known, beside the table."""

SHOWN = ("agreement", "frechet", "precision", "recall", "diversity_relative")


def run(*arguments: str) -> None:
    """A command of ``rlfusion``, silently.

    Raises:
        SystemExit: it failed, with what it said.
    """
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = rlfusion(list(arguments))
    if code:
        raise SystemExit(said.getvalue())


def trained(objective: str, seed: int, root: Path) -> Path:
    """The run of one training, with its seconds beside it."""
    folder = root / f"{objective}-{seed}"
    if not (folder / "seconds.json").is_file():
        begin = time.process_time()
        place = ("--root", str(root), "--name", folder.name, "--seed", str(seed))
        run("pretrain", "--objective", objective, *place)
        (folder / "seconds.json").write_text(json.dumps(time.process_time() - begin))
    return folder


def measured(folder: Path, steps: int) -> dict[str, float]:
    """The evaluation of a trained model at another number of steps."""
    out = folder / f"steps-{steps}.json"
    if not out.is_file():
        place = ("--checkpoint", str(folder), "--root", str(folder.parent), "--out", str(out))
        run("evaluate", *place, "--chain.steps", str(steps))
    return json.loads(out.read_text())


def line(objective: str, steps: int, results: list[dict[str, float]], seconds: list[float]) -> str:
    """One row: each figure for every seed."""
    figures = [
        " / ".join(f"{r[name]:.3f}" if name != "frechet" else f"{r[name]:.2f}" for r in results) for name in SHOWN
    ]
    taken = " / ".join(f"{s:.0f}" for s in seconds)
    return f"| {objective} | {steps} | {' | '.join(figures)} | {taken} |"


def rows(objective: str, seeds: int, root: Path) -> list[str]:
    """The rows of one objective: its own chain, then those of ``MORE``."""
    folders = [trained(objective, seed, root) for seed in range(seeds)]
    seconds = [json.loads((f / "seconds.json").read_text()) for f in folders]
    own = PRESETS[objective].get("chain.steps", 20)
    first = [json.loads((f / "evaluation.json").read_text()) for f in folders]
    others = [(n, [measured(f, n) for f in folders]) for n in MORE.get(objective, ())]
    return [line(objective, n, results, seconds) for n, results in [(own, first), *others]]


def recipe(objective: str) -> str:
    """The settings that a preset stands for."""
    settings = "; ".join(f"`{key} = {value}`" for key, value in PRESETS[objective].items())
    return f"| {objective} | {settings} |"


def page(table: list[str], objectives: list[str], floor: float, seeds: int) -> str:
    """The Markdown page."""
    return "\n".join(
        [
            "# Pretraining on digits, objective by objective",
            "",
            "`python benchmarks/pretraining.py` makes this page: it runs `rlfusion pretrain --objective NAME` with "
            f"seeds {', '.join(map(str, range(seeds)))} and draws 1,000 samples of each model. A cell has one figure a "
            "seed. Agreement and Frechet distance come from the judge network, which is trained on the training split "
            "and right on .989 of the held-out digits. The Frechet distance between the two splits of the real digits "
            f"is {floor:.2f}. CPU seconds are those of the whole command on one thread, with its evaluation (torch "
            f"{torch.__version__}, Python {platform.python_version()}).",
            "",
            "| objective | steps | agreement | Frechet | precision | recall | diversity / real | CPU s |",
            "|---|---|---|---|---|---|---|---|",
            *table,
            "",
            *NOTES,
            "",
            "## What each preset sets",
            "",
            "Any of these settings may be given beside `--objective` to change it. A setting that is not listed has "
            "the default of `rlfusion pretrain`.",
            "",
            "| objective | settings |",
            "|---|---|",
            *[recipe(objective) for objective in objectives],
            "",
        ]
    )


def main() -> None:
    """Train what is not trained yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/pretraining"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=Path("docs/pretraining.md"), help="the page to write")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each objective")
    parser.add_argument("--objective", choices=PRESETS, action="append", help="of one objective alone, or several")
    arguments = parser.parse_args()
    objectives = arguments.objective or list(PRESETS)
    table: list[str] = []
    for objective in objectives:
        table += rows(objective, arguments.seeds, arguments.root)
        print(table[-1], flush=True)
    any_run = trained(objectives[0], 0, arguments.root)
    floor = json.loads((any_run / "evaluation.json").read_text())["frechet_floor"]
    arguments.out.write_text(page(table, objectives, floor, arguments.seeds))


if __name__ == "__main__":
    main()
