"""Kits of rewards for real: installed, given tiny random weights, served, and checked over HTTP.

    python benchmarks/kits.py [NAME ...] [--envs FOLDER] [--out benchmarks/results/kits.json]

An environment is made as by ``rlfusion rewards install`` (6 GB, most of it CUDA's libraries, which uv links from its
cache) in a folder that is removed at the end, or in ``--envs``, and asked which versions it has. In it ``kits_tiny.py``
makes weights. ``rlfusion rewards serve`` serves them, and ``rlfusion check-reward URL`` asks about samples of a tiny
pipeline. The published weights were not there: no score says anything, but that the packages, as they are pinned, do
what the scorer asks of them.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests" / "support"))

from rlfusion.jobs.reward_kits import Environment, install  # noqa: E402
from rlfusion.rewards.kit import KITS  # noqa: E402

PROMPTS = (
    {"prompt": "a photo of a bench", "tag": "single_object", "include": [{"class": "bench", "count": 1}]},
    {"prompt": "a photo of a red dog", "tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}]},
)
STARTED_S, CHECKED_S = 600.0, 600.0
ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+")


def pipeline(folder: Path, side: int) -> list[str]:
    """What ``check-reward`` is told to draw samples."""
    import torch
    from tiny_pipelines import stable_diffusion_3

    torch.manual_seed(0)
    stable_diffusion_3().save_pretrained(folder / "pipeline")
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in PROMPTS))
    told = ["--model", str(folder / "pipeline"), "--pipeline.prompts", str(folder / "prompts.jsonl")]
    return [*told, "--pipeline.size", str(side), "--pipeline.max_sequence_length", "16"]


def versions(made: Environment) -> dict[str, str]:
    """Of the packages that the requirements name, as they are installed."""
    names = [line.partition("==")[0] for line in made.kit.requirements.split()]
    code = "import json, sys, importlib.metadata as m; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    return json.loads(subprocess.check_output([str(made.python), "-c", code, *names], text=True))


def python(made: Environment) -> str:
    """The version of its interpreter."""
    code = "import platform; print(platform.python_version())"
    return subprocess.check_output([str(made.python), "-c", code], text=True).strip()


def checked(made: Environment, folder: Path, drawn: list[str]) -> dict[str, Any]:
    """What the served kit was asked, and how it did."""
    weights = folder / made.kit.name
    weights.mkdir()
    tiny = [str(made.python), str(ROOT / "benchmarks" / "kits_tiny.py"), made.kit.name, str(weights)]
    told = json.loads(subprocess.check_output(tiny, text=True).splitlines()[-1])
    command = [sys.executable, "-m", "rlfusion", "rewards", "serve", made.kit.name, "--port", "0", "--device", "cpu"]
    words = ["--options", json.dumps(told["options"] | {"device": "cpu"})]
    log = folder / f"{made.kit.name}.log"
    with log.open("w") as file:
        server = subprocess.Popen(
            [*command, *words], stdout=file, stderr=subprocess.STDOUT, env=os.environ | told["environment"]
        )
    try:
        url = _address(server, log)
        asked = [sys.executable, "-m", "rlfusion", "check-reward", url, *drawn, "--samples", "6"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=CHECKED_S, check=False)
    finally:
        server.terminate()
        server.wait()
    return {"check-reward": done.returncode, "said": verdicts(done.stdout) or done.stderr.splitlines()[-1:]}


def verdicts(said: str) -> list[str]:
    """The lines of the table of ``check-reward``."""
    lines = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in said.splitlines() if line[:1] == "│"]
    return [": ".join(filter(None, cells)) for cells in lines]


def _address(server: subprocess.Popen, log: Path) -> str:
    end = time.monotonic() + STARTED_S
    while time.monotonic() < end and server.poll() is None:
        if found := ADDRESS.search(log.read_text()):
            return found[0]
        time.sleep(0.5)
    raise SystemExit(f"the server did not start: {log.read_text()[-2000:]}")


def main() -> None:
    """Run all, print what they say, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(KITS)}; default: all")
    parser.add_argument("--envs", type=Path, help="where environments are made, and stay")
    parser.add_argument("--side", type=int, default=64, help="of the images, in pixels")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "kits.json")
    args = parser.parse_args()
    found = json.loads(args.out.read_text()) if args.out.is_file() else {}
    with tempfile.TemporaryDirectory() as place:
        drawn = pipeline(Path(place), args.side)
        os.environ["RLFUSION_REWARD_ENVS"] = str(args.envs or Path(place) / "envs")
        for name in args.names or KITS:
            made = install(name, dry=False, say=print)
            told = checked(made, Path(place), drawn)
            found[name] = {"python": python(made), "versions": versions(made), **told}
            print(name, json.dumps(found[name], indent=1), flush=True)
            args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
