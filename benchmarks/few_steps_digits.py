"""What learners do to students of few steps that draw images: digits, in 1, 2 and 4 steps of re-noising.

The student is that of ``rlfusion distill --method cd`` from the base model of ``learners/ink.yaml``; the learners have
the settings of that file, and raise ``ink`` by ``--updates`` rollouts of 160 samples. Told are the gain in standard
deviations of the student's own rewards, the Frechet distance over what it was before, and the agreement at the end.

    python benchmarks/few_steps_digits.py [--updates 6] [--seeds 0,1,2] [--out benchmarks/results/few-steps-digits.json]
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rlfusion.cli.arguments import settings_of
from rlfusion.cli.main import main as rlfusion
from rlfusion.common.errors import RlfusionError
from rlfusion.common.progress import Progress
from rlfusion.common.stops import Signals
from rlfusion.config import Compare
from rlfusion.jobs import finetune
from rlfusion.jobs.compare.members import with_settings
from rlfusion.jobs.curves import curve
from rlfusion.jobs.pretrain import base_model
from rlfusion.training.devices import set_numerics

BENCHMARKS = Path(__file__).resolve().parent
STEPS = (1, 2, 4)
WANTED = ("DRaFT-1", "DDPO_IS", "AWM", "NFT", "DPO")
MORE = {
    "GRPO": "grpo(window=1, lr=0.001, epochs=2, updates_per_epoch=1, clip_low=0.5, clip_high=0.5, kl_loss=0.1)",
    "AWM, Chain()": "awm(kl_loss=0.1, times='Chain()')",
    "DRWR, noised": "drwr(lr=0.001, kl=0.1, on='noised')",
}
"""What the file has otherwise, or not at all."""


def student(told: Compare, root: Path) -> Path:
    """The folder of the student, made where it is not there."""
    base = base_model(told.pretrain, root, torch.device("cpu"), Signals(), Progress())
    folder = root / "few-steps-student"
    if not (folder / "model").is_dir():
        new = ["--method", "cd", "--teacher", str(base), "--root", str(root), "--name", folder.name]
        if code := rlfusion(["distill", *(["--resume", str(folder)] if folder.exists() else new)]):
            raise SystemExit(code)
    return folder


def tried(told: Compare, agent: str, steps: int, seed: int, updates: int, model: Path) -> dict[str, float] | str:
    """What a run has at its end, or why it is refused."""
    config = replace(told, agents=[agent], chain=replace(told.chain, steps=steps, kernel="Renoise()", guidance=0.0))
    root, name = model.parent, f"few-{agent.partition(' = ')[0]}-{steps}-seed{seed}"
    folder = root / "".join(c if c.isalnum() or c in "-_" else "-" for c in name)
    try:
        given = config.settings(config.rows()[0], "ink", seed)
        about: dict[str, Any] = {"evaluation": replace(given.evaluation, every=updates), "checkpoint_every": updates}
        given = with_settings(given, root=str(root), name=folder.name, base=str(model), updates=updates, **about)
        finetune.check(given)
        folder.mkdir(exist_ok=True)
        finetune.finetune(given, folder, Signals(), Progress())
    except RlfusionError as error:
        return f"refused: {error}"
    before, end = curve(folder)[0], curve(folder)[-1]
    return {
        "gain": end.gain,
        "before": before.frechet,
        "frechet": end.frechet,
        "agreement": end.agreement,
        "cpu_seconds": end.cpu_seconds,
    }


def main() -> None:
    """Run all, print each and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/learners"))
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "results" / "few-steps-digits.json")
    args = parser.parse_args()
    set_numerics(1, torch.device("cpu"))
    told: Compare = settings_of("compare", ["--config", str(BENCHMARKS / "learners" / "ink.yaml")])
    model = student(told, args.root.absolute())
    agents = {text.partition(" = ")[0]: text for text in told.agents}
    rows = {name: agents[name] for name in WANTED} | {name: f"{name} = {text}" for name, text in MORE.items()}
    found: dict[str, Any] = {}
    for seed in args.seeds.split(","):
        for name, text in rows.items():
            for steps in STEPS:
                one = tried(told, text, steps, int(seed), args.updates, model)
                found.setdefault(name, {}).setdefault(str(steps), []).append(one)
                print(seed, name, steps, one, flush=True)
        about = {"torch": torch.__version__.partition("+")[0], "updates": args.updates, "rows": found}
        args.out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
