"""Every command of docs/tutorial.md after the installation, run as it stands, with the seconds that each took.

    python benchmarks/tutorial.py --folder /tmp/tutorial

The folder must be new: what the page calls a first run is then one. ``rlfusion`` is that of this Python.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

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


def run(command: str, folder: Path) -> float:
    """Run a command to its end, ``board`` until it says its address; the seconds.

    Raises:
        SystemExit: it failed.
    """
    began = time.perf_counter()
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    process = subprocess.Popen(shlex.split(command), cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        print("   ", line, end="")
        if command.startswith("rlfusion board") and "http://" in line:
            took = time.perf_counter() - began
            process.terminate()
            process.communicate()
            return took
    if process.wait():
        raise SystemExit(f"{command}: exit code {process.returncode}")
    return time.perf_counter() - began


def main() -> None:
    """The whole page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where to work; it must not be there yet")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True)
    page = PAGE.read_text("utf-8")
    for name, text in files(page).items():
        (folder / name).write_text(text)
    took = {command: run(command, folder) for command in commands(page)}
    for command, seconds in took.items():
        print(f"{seconds:7.1f} s  {command}")
    print(f"{sum(took.values()):7.1f} s  in all")


if __name__ == "__main__":
    main()
