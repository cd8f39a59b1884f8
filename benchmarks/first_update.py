"""How soon ``rlfusion finetune`` has learned: CPU seconds from its start to the end of its first update.

    python benchmarks/first_update.py [--runs 3]

All is at the defaults, so the base is evaluated before. The start is warm: a first run, which is not counted, has
pretrained the base, and Python has compiled what it imports. Beside it stands the import of torch alone, in turn.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from first_output import seconds


def until_update(folder: Path, name: str) -> float:
    """CPU seconds of ``rlfusion finetune`` when its first update is written."""
    words = [sys.executable, "-m", "rlfusion", "finetune", "--root", str(folder), "--name", name, "--updates", "2"]
    file, quiet = folder / name / "metrics.jsonl", subprocess.DEVNULL
    process = subprocess.Popen(words, stdout=quiet, stderr=quiet, env=os.environ | {"PYTHONDONTWRITEBYTECODE": ""})
    try:
        while process.poll() is None:
            cpu = seconds(process.pid)
            if file.is_file() and updated(file.read_text()):
                return cpu
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    sys.exit(f"rlfusion finetune ended with {process.returncode} before its first update")


def updated(text: str) -> bool:
    """Whether whole lines of metrics have those of an update."""
    return any("train/grad_norm" in json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n"))


def of_torch() -> float:
    """CPU seconds of a process that imports torch."""
    before = os.times()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    """Print a line for each run, the first of which is not warm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        cold = until_update(Path(place), "cold")
        print(f"with the base's pretraining: {cold:.1f} CPU s")
        for i in range(args.runs):
            cpu, torch = until_update(Path(place), f"warm{i}"), of_torch()
            print(f"first update after {cpu:.2f} CPU s; import torch {torch:.2f}; ratio {cpu / torch:.2f}", flush=True)


if __name__ == "__main__":
    main()
