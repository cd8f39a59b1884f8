"""The measures of the house: how many arguments a function takes, how long it is and a file; and that what is public
says what it is.
"""

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


OF_TORCH = {"forward", "state_dict", "load_state_dict"}
"""Methods that torch's own documentation describes."""
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def public(body: list[ast.stmt]) -> list[Definition]:
    """The public definitions among statements; of an overloaded function the last, which has the docstring."""
    found = [node for node in body if isinstance(node, Definition) and not node.name.startswith("_")]
    return [node for node in found if not any(ast.unparse(d) == "overload" for d in node.decorator_list)]


def methods(module: str) -> list[tuple[str, Definition]]:
    """The public methods of the public classes of a module, by Class.method."""
    classes = [node for node in public(ast.parse(MODULES[module].read_text()).body) if isinstance(node, ast.ClassDef)]
    return [(f"{held.name}.{node.name}", node) for held in classes for node in public(held.body)]


def test_what_is_public_says_what_it_is():
    """A method may leave it to a class or protocol that describes the method of that name."""
    told = {node.name for module in MODULES for _, node in methods(module) if ast.get_docstring(node)} | OF_TORCH
    silent = []
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text())
        silent += [module] if not ast.get_docstring(tree) else []
        silent += [f"{module}.{node.name}" for node in public(tree.body) if not ast.get_docstring(node)]
        silent += [f"{module}.{name}" for name, node in methods(module) if node.name not in told]
    assert not silent


def test_a_silent_name_is_found():
    body = ast.parse("@overload\ndef a(): ...\ndef a(): ...\ndef _b(): ...\nclass C: ...").body
    assert [node.name for node in public(body)] == ["a", "C"]
