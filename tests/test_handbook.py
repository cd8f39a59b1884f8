"""docs/handbook.md: no equation or algorithm is missing, and what the table names is there."""

import ast
import importlib
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "handbook.md").read_text()
ROWS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("| ")][1:]
QUOTED = re.compile(r"`([^`]+)`")


def numbers(word: str) -> set[int]:
    """The numbers of "Eq. 5-7, 9" or "Alg. 4, 5" in the first column, ranges filled."""
    found: set[int] = set()
    for row in ROWS:
        for run in re.findall(rf"{word}\. ((?:\d+(?:-\d+)?(?:, )?)+)", row[0]):
            for part in run.rstrip(", ").split(", "):
                first, _, last = part.partition("-")
                found |= set(range(int(first), int(last or first) + 1))
    return found


def test_every_equation_and_algorithm_has_a_row():
    assert numbers("Eq") >= set(range(5, 40))
    assert numbers("Alg") >= set(range(1, 10))


def functions(file: str) -> list[str]:
    tree = ast.parse(next((ROOT / "tests").rglob(f"{file}.py")).read_text())
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]


def test_every_test_that_is_named_exists():
    file, count = "", 0
    for name in QUOTED.findall(PAGE):
        if not name.startswith(("test_", "::")):
            continue
        head, _, test = name.rpartition("::") if "::" in name else ("", "", name)
        if not head and not name.startswith("::") and any((ROOT / "tests").rglob(f"{name}.py")):
            head, test = name, ""
        file, count = head or file, count + 1
        assert not test or any(fnmatch(f, test) for f in functions(file)), name
    assert count > 40


@pytest.mark.parametrize("name", sorted({n for row in ROWS for n in QUOTED.findall(row[2])}))
def test_every_function_that_is_named_exists(name):
    """Of dotted names: the rest are kinds, settings, and names in the module of the one before."""
    path = re.match(r"[a-z_]+(\.[A-Za-z_]+)+", name)
    if not path:
        return
    head, *rest = path[0].split(".")
    found = importlib.import_module(f"rlfusion.{head}")
    for part in rest:
        found = getattr(found, part) if hasattr(found, part) else importlib.import_module(f"{found.__name__}.{part}")
