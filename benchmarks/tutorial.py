"""Every command of docs/tutorial.md after the installation, as it stands, with the seconds of clock and CPU of each.

    python benchmarks/tutorial.py --folder /tmp/tutorial

The folder must be new: what the page calls a first run is then one. ``rlfusion`` is that of this Python.
"""

import argparse
import os
import re
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).resolve().parents[1] / "docs" / "tutorial.md"
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[str]:
    """The lines that call ``rlfusion``, in order."""
    shell = "\n".join(text for kind, text in BLOCK.findall(page) if kind == "bash")
    return [line for line in shell.splitlines() if line.startswith("rlfusion ")]


def files(page: str) -> dict[str, str]:
    """The files that the page says to write, by the name in their first line."""
    python = [text for kind, text in BLOCK.findall(page) if kind == "python"]
    return {text.partition("\n")[0].removeprefix("# "): text for text in python}


class Took(NamedTuple):
    """Seconds of the clock, and of the CPU in all processes of a command."""

    clock: float
    cpu: float


def used() -> Took:
    """The clock, and the CPU seconds of the commands that have ended."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Took(time.perf_counter(), spent.ru_utime + spent.ru_stime)


def run(command: str, folder: Path) -> Took:
    """Run a command to its end, ``board`` until it says its address.

    Raises:
        SystemExit: it failed.
    """
    began = used()
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    process = subprocess.Popen(shlex.split(command), cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    shown = False
    for line in process.stdout:
        print("   ", line, end="", flush=True)
        if command.startswith("rlfusion board") and "http://" in line:
            clock, shown = time.perf_counter(), True
            process.terminate()
            break
    process.communicate()
    if process.returncode and not shown:
        raise SystemExit(f"{command}: exit code {process.returncode}")
    ended = used()
    return Took((clock if shown else ended.clock) - began.clock, ended.cpu - began.cpu)


def table(took: dict[str, Took]) -> str:
    """The seconds as Markdown."""
    whole = Took(*(sum(parts) for parts in zip(*took.values(), strict=True)))
    rows = [
        f"| {name} | {one.clock:.0f} | {one.cpu:.0f} |"
        for name, one in [*((f"`{command}`", one) for command, one in took.items()), ("in all", whole)]
    ]
    return "\n".join(["| command | seconds | CPU seconds |", "|---|---|---|", *rows])


def main() -> None:
    """The whole page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where to work; it must not be there yet")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True)
    page = PAGE.read_text("utf-8")
    for name, text in files(page).items():
        (folder / name).write_text(text)
    print(table({command: run(command, folder) for command in commands(page)}))


if __name__ == "__main__":
    main()
