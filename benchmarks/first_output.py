"""How soon each command says something in a terminal: CPU and wall seconds from its start to the first byte.

    python benchmarks/first_output.py
    python benchmarks/first_output.py --only pretrain distill

CPU seconds are those of the process itself, so that they hold on a busy machine as well. Each command is ended once it
has said something. Exit code 1: one took more CPU seconds than LIMIT_S.
"""

import argparse
import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT_S = 2.0
COMMANDS: dict[str, list[str]] = {
    **{name: [] for name in ("finetune", "compare", "pretrain", "distill", "pretrain-autoencoder", "train-clip")},
    **{name: ["--checkpoint", "runs/NAME"] for name in ("sample", "evaluate")},
    "doctor": [],
    "check-model": ["runs/NAME"],
    "check-reward": ["ink"],
    "check-agent": ["ddpo"],
    "serve-reward": ["ink"],
    "board": ["runs"],
    "push": ["runs/NAME", "--to", "me/it"],
    "list": [],
    "runs": [],
}
"""The commands and what they are given. There is no run: where one is asked for, that is said in the end."""


def first(words: list[str], folder: Path) -> tuple[float, float, str]:
    """CPU and wall seconds until ``rlfusion WORDS`` writes, and the first line of that."""
    begun = time.monotonic()
    read, write = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "rlfusion", *words], stdout=write, stderr=write, cwd=folder, process_group=0
    )
    os.close(write)
    try:
        select.select([read], [], [], 120)
        wall, cpu = time.monotonic() - begun, seconds(process.pid)
        said = os.read(read, 4096).decode(errors="replace").strip().splitlines()
        return cpu, wall, said[0] if said else "(it ended in silence)"
    finally:
        os.killpg(process.pid, 9) if process.poll() is None else None
        process.wait()
        os.close(read)


def seconds(pid: int) -> float:
    """CPU seconds of a process so far, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> int:
    """Measure all; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=list(COMMANDS), default=list(COMMANDS))
    slow = []
    print("| command | CPU s | wall s | first line |\n|---|---|---|---|")
    for name in parser.parse_args().only:
        with tempfile.TemporaryDirectory() as folder:
            cpu, wall, said = first([name, *COMMANDS[name]], Path(folder))
        print(f"| {name} | {cpu:.2f} | {wall:.2f} | {said[:60]} |", flush=True)
        slow += [name] if cpu > LIMIT_S else []
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
