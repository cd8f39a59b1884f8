"""The modules of the distribution."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = {"rlfusion": "rlfusion", "envs": "rlfusion.envs", "rewards": "rlfusion.rewards", "agents": "rlfusion.agents"}


def modules() -> dict[str, Path]:
    """Every module of the distribution by its name."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


MODULES = modules()
