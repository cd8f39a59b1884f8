"""The measures of the house: how many arguments a function takes, how long it is, and how long a file."""

import ast
from collections.abc import Iterator

import pytest
from house import MODULES, ROOT

ARGUMENTS = 8
FUNCTION_LINES = 60
FILE_LINES = 400


def functions(module: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function of a module, methods and inner ones too."""
    tree = ast.parse(MODULES[module].read_text())
    return (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many arguments a caller may give, without ``self``. A constructor's that are given by name alone are settings
    (a reward's options, an environment's), and are not counted.
    """
    a = function.args
    given = [*a.posonlyargs, *a.args]
    named = 0 if function.name == "__init__" else len(a.kwonlyargs)
    return len(given) + named - (bool(given) and given[0].arg in ("self", "cls"))


def lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The lines of a function without its docstring."""
    doc = function.body[0]
    is_doc = isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant) and isinstance(doc.value.value, str)
    return function.end_lineno - function.lineno + 1 - (doc.end_lineno - doc.lineno + 1 if is_doc else 0)


@pytest.mark.parametrize("module", MODULES)
def test_functions_are_small_and_take_few_arguments(module):
    many = {f"{f.name} (line {f.lineno})": n for f in functions(module) if (n := arguments(f)) > ARGUMENTS}
    assert not many, f"more than {ARGUMENTS} arguments: group them in a record"
    long = {f"{f.name} (line {f.lineno})": n for f in functions(module) if (n := lines(f)) > FUNCTION_LINES}
    assert not long, f"more than {FUNCTION_LINES} lines"
    assert len(MODULES[module].read_text().splitlines()) <= FILE_LINES


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("def f(a, b, /, c, *, d=1, e=2): ...", 5),
        ("class A:\n def __init__(self, a, *, b=1): ...", 1),
        ("class A:\n def f(self, a, *, b=1): ...", 2),
    ],
)
def test_arguments_are_counted(text, count):
    (found,) = (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef))
    assert arguments(found) == count


def test_no_test_file_imports_another():
    """What they share is in tests/support, so each runs alone and in any process."""
    found = list((ROOT / "tests").rglob("*.py"))
    names = {path.stem for path in found if path.stem.startswith("test_")} | {"conftest"}
    imported = [
        (path.name, name)
        for path in found
        for node in ast.walk(ast.parse(path.read_text()))
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [])
        if name in names
    ]
    assert len(names) > 80
    assert not imported
