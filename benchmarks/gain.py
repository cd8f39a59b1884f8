"""How soon and at what price runs of ``rlfusion finetune`` raised their reward.

    gain = (mean reward - mean reward of the base) / (standard deviation of the base's rewards)

Prints, for each run folder, the base model, the first evaluation with gain >= 2, and the last. Runs need
``--evaluation.every 1``.

    python benchmarks/gain.py runs/NAME ...
"""

import argparse
import json
from pathlib import Path

SHOWN = ("agreement", "frechet", "precision", "recall", "diversity_relative")


def evaluations(folder: Path) -> list[dict[str, float]]:
    """The evaluations of a run in order, names without their group; ``step`` counts updates."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "evaluation/reward" in line]
    return [{name.removeprefix("evaluation/"): value for name, value in line.items()} for line in found]


def row(what: str, queries: float, gain: float, values: dict[str, float]) -> str:
    """One line of the table."""
    return f"{what:>12} {queries:8.0f} {gain:6.2f}  " + "  ".join(f"{values[name]:9.3f}" for name in SHOWN)


def report(folder: Path, target: float) -> None:
    """Print the table of one run."""
    base, *rest = evaluations(folder)
    walks = json.loads((folder / "summary.json").read_text())["queries"] / rest[-1]["step"]
    gains = [(e["reward"] - base["reward"]) / base["reward_std"] for e in rest]
    print(f"{folder.name}\n{'':>12} {'queries':>8} {'gain':>6}  " + "  ".join(f"{name[:9]:>9}" for name in SHOWN))
    print(row("base", 0, 0, base))
    first = next((i for i, gain in enumerate(gains) if gain >= target), None)
    if first is not None:
        print(row(f"first >= {target:g}", rest[first]["step"] * walks, gains[first], rest[first]))
    print(row("end", rest[-1]["step"] * walks, gains[-1], rest[-1]))


def main() -> None:
    """Read the arguments and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--target", type=float, default=2.0, help="the gain to reach")
    arguments = parser.parse_args()
    for folder in arguments.runs:
        report(folder, arguments.target)


if __name__ == "__main__":
    main()
