"""What docs/algorithms/ has of the code: tables of settings and equations, from its docstrings. ``make help`` writes
them again, and so does the site when it is built.

    python docs/site/algorithms.py
"""

import inspect
import re
from dataclasses import fields
from pathlib import Path

import docstring_parser

from rlfusion.agents import AGENTS
from rlfusion.rl import reward_gradient, weighted

PAGES = Path(__file__).resolve().parents[1] / "algorithms"
TABLE = re.compile(r"(<!-- settings of (\w+) -->\n).*?(<!-- end of settings -->)", re.DOTALL)

EQUATIONS = re.compile(r"(<!-- equations of (\w+) -->\n).*?(<!-- end of equations -->)", re.DOTALL)
SHARED = {"drwr": weighted, "dawr": weighted, "draft": reward_gradient, "refl": reward_gradient}
"""Whose equations an agent has beside its own."""


def table(agent: str) -> str:
    """A row for each setting of an agent: its name, default and meaning.

    Raises:
        KeyError: a setting that no docstring describes.
    """
    settings = AGENTS.get(agent)
    said: dict[str, str] = {}
    for held in reversed(settings.__mro__):
        said |= {p.arg_name: p.description or "" for p in docstring_parser.parse(held.__doc__ or "").params}
    rows = ["| `--agent.` | default | what it does |", "|---|---|---|"]
    for field in fields(settings):
        if field.name != "name":
            meaning = " ".join(said[field.name].split()).replace("|", r"\|").replace("*", r"\*")
            rows.append(f"| `{field.name}` | `{_shown(field.default)}` | {meaning} |")
    return "\n".join(rows)


def _shown(value: object) -> str:
    """A default as the command line takes it."""
    return {"None": "null", "True": "true", "False": "false"}.get(repr(value), str(value))


def equations(agent: str) -> str:
    """The docstring of an agent's module, and of the one that it shares with others, as a block of text."""
    homes = [inspect.getmodule(AGENTS.get(agent)), *([SHARED[agent]] if agent in SHARED else [])]
    text = "\n\n".join(f"{home.__name__}\n\n{inspect.getdoc(home)}" for home in homes)
    return f"```text\n{text}\n```"


def written(page: str) -> str:
    """A page with what it has of the code as the code is now."""
    page = TABLE.sub(lambda found: f"{found[1]}{table(found[2])}\n{found[3]}", page)
    return EQUATIONS.sub(lambda found: f"{found[1]}{equations(found[2])}\n{found[3]}", page)


if __name__ == "__main__":
    for path in sorted(PAGES.glob("*.md")):
        path.write_text(written(path.read_text("utf-8")), "utf-8")
