"""DDPO over kinds of prediction and kernels: one table of reward gains, with no code for any combination.

    gain = (mean reward - mean reward of the base) / (standard deviation of the base's rewards), each in its own chain

Each row of ``KINDS`` is a base model, pretrained once by ``rlfusion pretrain --objective``; each kernel of it is a
``rlfusion finetune --chain.kernel`` of it, the same settings for all. Bases and finished cells are kept in the folder
and not made again.

    python benchmarks/chains.py --root runs/chains --out docs/chains.md
"""

import argparse
import contextlib
import io
import json
import platform
from pathlib import Path

import torch

from rlfusion.cli.main import main as rlfusion

VP = ("DDIM(eta=1.0)", "DDIM(eta=0.5)", "DDPM(variance='large')", "FlowSDE(noise=0.7)", "CPS(eta=0.5)", "Renoise()")
KINDS = {
    "eps": (*VP, "ReverseSDE(noise=1.0)"),
    "x0": VP,
    "v": VP,
    "flow": VP[:2] + VP[3:],
    "trigflow": VP,
}
"""Each objective, and the kernels that its schedule has: ReverseSDE needs signal at t = 1, DDPM's posterior a
variance-preserving path."""

SETTINGS = ("--reward", "ink", "--updates", "4", "--agent.kl_loss", "0.05", "--agent.epochs", "4")
SETTINGS += ("--agent.updates_per_epoch", "1", "--agent.clip", "0.5")


def run(*arguments: str) -> str:
    """A command of ``rlfusion``; what it said on stderr, and "" where it went well."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = rlfusion(list(arguments))
    return said.getvalue().strip().splitlines()[-1] if code else ""


def base(objective: str, root: Path) -> Path:
    """The base model of an objective."""
    folder = root / f"base-{objective}"
    if not (folder / "evaluation.json").is_file():
        refused = run("pretrain", "--objective", objective, "--root", str(root), "--name", folder.name)
        if refused:
            raise SystemExit(refused)
    return folder


def cell(objective: str, kernel: str, root: Path, seed: int) -> dict[str, float | str]:
    """The outcome of one fine-tuning, or what refused it."""
    name = "".join(c if c.isalnum() or c in "." else "-" for c in f"{objective}-{kernel}-{seed}").strip("-")
    summary = root / name / "summary.json"
    if not summary.is_file():
        place = ("--root", str(root), "--name", name, "--seed", str(seed), "--base", str(base(objective, root)))
        refused = run("finetune", *place, "--chain.kernel", kernel, *SETTINGS)
        if refused:
            return {"refused": refused}
    found = json.loads(summary.read_text())
    before, after = found["before"], found["after"]
    return {
        "gain": (after["reward"] - before["reward"]) / before["reward_std"],
        "agreement": after["agreement"],
        "frechet_before": before["frechet"],
        "frechet": after["frechet"],
        "queries": found["queries"],
    }


def line(objective: str, kernel: str, cells: list[dict]) -> str:
    """A row of the table: one column a seed of the gain, the means of the rest."""
    if "refused" in cells[0]:
        return f"| {objective} | `{kernel}` | refused: {cells[0]['refused']} | | | |"
    mean = {name: sum(c[name] for c in cells) / len(cells) for name in cells[0]}
    gains = " / ".join(f"{c['gain']:+.2f}" for c in cells)
    figures = f"{mean['agreement']:.3f} | {mean['frechet_before']:.1f} | {mean['frechet']:.1f}"
    return f"| {objective} | `{kernel}` | {gains} | {figures} |"


def main() -> None:
    """Fill the table, cell by cell, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/chains"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=Path("docs/chains.md"), help="the table to write")
    parser.add_argument("--seeds", type=int, default=1, help="fine-tunings of each cell")
    parser.add_argument("--objective", choices=KINDS, action="append", help="of one kind alone, or several")
    parser.add_argument("--kernel", choices=KINDS["eps"], action="append", help="of one kernel alone, or several")
    arguments = parser.parse_args()
    chosen = [(o, k) for o in arguments.objective or KINDS for k in KINDS[o] if k in (arguments.kernel or KINDS[o])]
    if not chosen:
        parser.error(f"none of {arguments.objective} has any of the kernels {arguments.kernel}")
    lines = []
    for objective, kernel in chosen:
        cells = [cell(objective, kernel, arguments.root, seed) for seed in range(arguments.seeds)]
        lines.append(line(objective, kernel, cells))
        print(lines[-1], flush=True)
    arguments.out.write_text(page(lines, arguments.seeds))


def page(lines: list[str], seeds: int) -> str:
    """The Markdown page."""
    return "\n".join(
        [
            "# DDPO over kinds and kernels",
            "",
            "`python benchmarks/chains.py` makes this page. For each objective `rlfusion pretrain --objective` trains "
            "one base model. Each row is one fine-tuning of it by DDPO on the reward `ink`, with 960 queries and the "
            "kernel named. The gain is in standard deviations of the base model's own rewards in the same chain.",
            "",
            f"All rows have the same settings: `rlfusion finetune {' '.join(SETTINGS)}`, {seeds} seed(s), 20 steps "
            f"(torch {torch.__version__}, Python {platform.python_version()}, CPU, one thread).",
            "",
            "An objective is combined with the kernels that its schedule allows. `ReverseSDE` needs signal at t = 1 "
            "and is refused elsewhere. `DDPM(variance='large')` is defined for variance-preserving schedules; DDPM "
            "with the small variance is `DDIM(eta=1.0)`. `Langevin` needs a variance-exploding schedule, which none of "
            "these objectives has.",
            "",
            "| objective | kernel | gain | agreement after | Frechet before | after |",
            "|---|---|---|---|---|---|",
            *lines,
            "",
        ]
    )


if __name__ == "__main__":
    main()
