"""A model of 16 steps becomes one of 4 by distillation, which is then fine-tuned for a reward: three commands.

python examples/distil_then_finetune.py [FOLDER]

The settings are those of a trial of seconds; docs/distillation.md and README.md have those of a real run.
"""

import json
import sys
from pathlib import Path

from rlfusion.cli.main import main as rlfusion

NET = "ResidualMLP(width=64, depth=2)"


def commands(root: Path) -> list[list[str]]:
    """The words of the three commands."""
    small = ["--root", str(root), "--evaluation.samples", "50"]
    return [
        [
            *("pretrain", *small, "--name", "teacher", "--model.net", NET, "--train.steps", "200"),
            *("--train.batch", "64", "--chain.steps", "16"),
        ],
        [
            *("distill", *small, "--name", "student", "--method", "pd", "--teacher", str(root / "teacher")),
            *("--method.steps", "40", "--method.batch", "64"),
        ],
        [
            *("finetune", *small, "--name", "tuned", "--base", str(root / "student"), "--reward", "ink"),
            *("--updates", "3", "--rollout.prompts", "4", "--rollout.samples_per_prompt", "8", "--monitor.every", "0"),
            *("--chain.kernel", "DDIM(eta=1.0)"),  # the student's own chain has no noise, and so no probabilities
        ],
    ]


def main(root: Path) -> tuple[float, float]:
    """Run them; the reward of the student, and of what it became."""
    for words in commands(root):
        print("rlfusion", *words)
        if code := rlfusion(words):
            raise SystemExit(code)
    told = json.loads((root / "tuned" / "summary.json").read_text())
    return told["before"]["reward"], told["after"]["reward"]


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs"))
