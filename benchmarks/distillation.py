"""Every distillation method on digits, from one teacher: quality at 1, 2, 4 and 8 steps, one table from one script.

The teacher is that of ``rlfusion distill`` without ``--teacher``. Each row of ``ROWS`` is a distillation with its
settings and the numbers of steps that its student is measured at; beside them the teacher and its own samplers, and the
price at which DDPO raises a reward of a 4-step student and of the teacher. Finished runs are kept and not repeated.

    python benchmarks/distillation.py --root runs/distillation --out docs/distillation.md [--only cd,pd] [--seeds 3]
"""

import argparse
import contextlib
import io
import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from rlfusion import models
from rlfusion.cli.main import main as rlfusion
from rlfusion.diffusion.chain import Chain
from rlfusion.jobs.curves import curve, first_at
from rlfusion.jobs.measure import draw
from rlfusion.training.tracking import grid, save_png


@dataclass(frozen=True)
class Row:
    """A distillation: the name of its method in the table, its arguments, and the steps to measure its student at.

    ``after`` is the row, of the same label and steps, whose student is the teacher; none for the teacher of all.
    """

    label: str
    arguments: tuple[str, ...]
    steps: tuple[int, ...] = (1, 2, 4, 8)
    after: tuple[int, ...] = ()

    def name(self, seed: int) -> str:
        """Of the run's folder."""
        return "-".join([self.label, *map(str, self.steps), f"seed{seed}"])

    def teacher(self, seed: int) -> str:
        """Of the folder of its teacher."""
        return Row(self.label, (), self.after).name(seed) if self.after else "teacher"


def halving(n: int, start: int) -> Row:
    """Progressive distillation to ``n`` steps: from the teacher of all, or by a further round from the student of
    ``start`` = 2 n steps.
    """
    arguments = ("--method", "pd", "--chain.steps", str(n), "--method.start", str(start))
    return Row("pd", arguments, (n,), (start,) if start == 2 * n else ())


FLOW = (
    "--student.kind",
    "flow",
    "--student.schedule",
    "Rectified()",
    "--student.init",
    "match",
    "--student.match",
    "6000",
)
"""A student that is a flow, of a teacher that predicts x0."""

ROWS: list[Row] = [
    halving(8, 32),
    halving(4, 8),
    halving(2, 4),
    halving(1, 2),
    Row("guided_pd", ("--method", "guided_pd", "--chain.steps", "4"), (4,)),
    Row("cd", ("--method", "cd")),
    Row("lcm", ("--method", "lcm")),
    Row("ct", ("--method", "ct")),
    Row("scd", ("--method", "scd")),
    Row("sds", ("--method", "sds"), (1,)),
    Row("vsd", ("--method", "vsd"), (1,)),
    Row(
        "dmd",
        ("--method", "dmd", "--method.weight", "Eps()", "--method.adversarial", "0.003", "--method.fake_updates", "2"),
        (1, 2, 4),
    ),
    Row("add", ("--method", "add"), (1, 2, 4)),
    Row("regression", ("--method", "regression"), (1,)),
    Row("reflow", ("--method", "reflow")),
    Row("reflow_twice", ("--method", "reflow", "--method.rounds", "2")),
    Row("reflow_mapping", ("--method", "reflow", "--method.weight", "RectifiedFlow(cap=100.0)")),
    Row("reflow_flow", ("--method", "reflow", *FLOW)),
]
"""A method adds its rows here."""

TEACHER = [(kernel, n) for kernel in ("DDIM(eta=1.0)", "DDIM(eta=0.0)") for n in (1, 2, 4, 8, 20, 50)]
"""The teacher's own samplers."""

SHOWN = ("agreement", "frechet", "precision", "recall", "diversity_relative")
FINETUNED = halving(4, 8)
"""The student that is fine-tuned."""
GAIN = 2.0
TUNING = ("--reward", "ink", "--updates", "12", "--agent.lr", "3e-4", "--agent.clip", "0.5", "--agent.kl_loss", "0.05")
TUNING += ("--evaluation.every", "1", "--evaluation.samples", "400", "--chain.kernel", "DDIM(eta=1.0)")
"""Chosen on another seed, so that the teacher gets there too."""


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


def teacher(root: Path) -> tuple[Path, float]:
    """The teacher's run, and the CPU seconds of its training with one evaluation."""
    folder = root / "teacher"
    if not (folder / "seconds.json").is_file():
        begin = time.process_time()
        run("pretrain", "--root", str(root), "--name", folder.name)
        (folder / "seconds.json").write_text(json.dumps(time.process_time() - begin))
    return folder, json.loads((folder / "seconds.json").read_text())


def distilled(row: Row, seed: int, root: Path) -> tuple[Path, float]:
    """The run of one distillation, and the CPU seconds of its training alone."""
    folder = root / row.name(seed)
    if not (folder / "evaluation.json").is_file():
        place = ("--root", str(root), "--name", folder.name, "--seed", str(seed))
        run("distill", *place, "--teacher", str(root / row.teacher(seed)), *row.arguments)
    last = (folder / "timing.jsonl").read_text().splitlines()[-1]
    return folder, json.loads(last)["cpu_seconds"]


def measured(folder: Path, steps: int, *more: str) -> dict[str, float]:
    """The evaluation of a model at a number of steps."""
    out = folder / f"steps-{'-'.join([str(steps), *more[1::2]])}.json"
    if not out.is_file():
        place = ("--checkpoint", str(folder), "--root", str(folder.parent), "--out", str(out))
        run("evaluate", *place, "--chain.steps", str(steps), *more)
    return json.loads(out.read_text())


def line(label: str, steps: int, results: list[dict[str, float]], seconds: list[float]) -> str:
    """One row: each figure for every seed."""
    figures = [
        " / ".join(f"{r[name]:.3f}" if name != "frechet" else f"{r[name]:.2f}" for r in results) for name in SHOWN
    ]
    return f"| {label} | {steps} | {' | '.join(figures)} | {' / '.join(f'{s:.0f}' for s in seconds)} |"


def table(rows: list[Row], seeds: int, root: Path) -> list[str]:
    """The lines of the teacher and of every row."""
    folder, seconds = teacher(root)
    lines = [
        line(f"teacher, {kernel}", n, [measured(folder, n, "--chain.kernel", kernel)], [seconds])
        for kernel, n in TEACHER
    ]
    spent: dict[str, float] = {}
    for row in rows:
        folders = []
        for seed in range(seeds):
            folder, own = distilled(row, seed, root)
            spent[folder.name] = own + spent.get(row.teacher(seed), 0.0)
            folders.append(folder)
        for n in row.steps:
            lines.append(line(row.label, n, [measured(f, n) for f in folders], [spent[f.name] for f in folders]))
            print(lines[-1], flush=True)
    return lines


def strip(folder: Path, chain: Chain) -> torch.Tensor:
    """A sample of each class, (classes, C, H, W)."""
    denoiser, card = models.load(folder)
    policy = chain.policy(denoiser, card.names)
    return draw(policy, chain.times(denoiser), torch.arange(card.classes), card.shape, 0, "strip")


def picture(rows: list[Row], root: Path) -> torch.Tensor:
    """A line of samples of the teacher at 50 steps, and of each row at each number of steps, of the first seed."""
    lines = [strip(root / "teacher", Chain(steps=50))]
    for row in rows:
        folder = distilled(row, 0, root)[0]
        own = models.load_card(folder).chain
        lines += [strip(folder, Chain(**{**own, "steps": n})) for n in row.steps]
    return grid(torch.cat(lines), len(lines[0]))


def price(label: str, base: str, seeds: int, root: Path) -> str:
    """What DDPO paid for the gain: a line of the second table, each figure for every seed."""
    points = []
    for seed in range(seeds):
        tuned = root / f"{label}-ddpo-seed{seed}"
        if not (tuned / "summary.json").is_file():
            place = ("--root", str(root), "--name", tuned.name, "--seed", str(seed))
            run("finetune", *place, "--base", str(root / base), *TUNING)
        points.append(curve(tuned))
    reached = [first_at(p, GAIN) for p in points]
    at = [first or p[-1] for first, p in zip(reached, points)]
    columns = (
        [str(first.queries) if first else "not reached" for first in reached],
        [f"{p.gain:.2f}" for p in at],
        [f"{p.frechet:.1f}" for p in at],
        [f"{1e3 * p[-1].cpu_seconds / p[-1].queries:.2f}" for p in points],
    )
    return f"| {label} | {' | '.join(' / '.join(column) for column in columns)} |"


def page(lines: list[str], prices: list[str], rows: list[Row], seeds: int, floor: float) -> str:
    """The tables in Markdown."""
    settings = [f"| {row.label} | {', '.join(map(str, row.steps))} | `{' '.join(row.arguments)}` |" for row in rows]
    return "\n".join(
        [
            "`python benchmarks/distillation.py` makes the tables below. There is one teacher, by `rlfusion pretrain` "
            "with its defaults. `rlfusion distill` runs with the arguments below and seeds "
            f"{', '.join(map(str, range(seeds)))}; a cell has one figure a seed. Each evaluation draws 1,000 samples; "
            "agreement and Frechet distance come from the judge network. The Frechet distance between the two splits "
            f"of the real digits is {floor:.2f}. CPU seconds are those of training on one thread: of a student with "
            "the rounds before it, of the teacher with one evaluation "
            f"(torch {torch.__version__}, Python {platform.python_version()}).",
            "",
            "| model | steps | agreement | Frechet | precision | recall | diversity / real | CPU s |",
            "|---|---|---|---|---|---|---|---|",
            *lines,
            "",
            "![A sample of each class: the teacher at 50 steps, then the rows above, first seed](distillation.png)",
            "",
            f"DDPO raises the reward `ink` until the gain is {GAIN:g} standard deviations of the base model's rewards:",
            "",
            "| base | queries | gain | Frechet | CPU ms a query |",
            "|---|---|---|---|---|",
            *prices,
            "",
            "| model | steps | arguments of `rlfusion distill` |",
            "|---|---|---|",
            *settings,
            "",
        ]
    )


MARK = "<!-- made by benchmarks/distillation.py -->"


def main() -> None:
    """Distil what is not distilled yet, and write the tables into the page, below the mark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/distillation"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=Path("docs/distillation.md"), help="the page to write in")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each row")
    parser.add_argument("--only", default="", help="labels of rows, by commas; all by default")
    arguments = parser.parse_args()
    rows = [row for row in ROWS if not arguments.only or row.label in arguments.only.split(",")]
    lines = table(rows, arguments.seeds, arguments.root)
    root = arguments.root
    prices = [price("teacher", "teacher", arguments.seeds, root)]
    if FINETUNED in rows:
        prices.append(price("student", FINETUNED.name(0), arguments.seeds, root))
    floor = json.loads((root / "teacher" / "evaluation.json").read_text())["frechet_floor"]
    save_png(arguments.out.with_suffix(".png"), picture(rows, root))
    text = arguments.out.read_text().partition(MARK)[0] if arguments.out.is_file() else ""
    arguments.out.write_text(f"{text}{MARK}\n\n{page(lines, prices, rows, arguments.seeds, floor)}")


if __name__ == "__main__":
    main()
