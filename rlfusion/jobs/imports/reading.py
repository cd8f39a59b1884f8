"""Files of settings of other programs, as plain data: nothing in them is run.

.yaml, .yml, .json   a mapping
.py                  a call of the configuration's class with literal arguments; or, of ml_collections, a function
                     that fills one in, ``config.py:NAME``
.sh, .txt            the words of a command line, --name value
"""

import ast
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rlfusion.common.errors import ConfigError, shorten, unknown

LONGEST = 2**20
"""Bytes of a file of settings."""
KINDS = (".yaml", ".yml", ".json", ".py", ".sh", ".txt")


def text_of(path: Path) -> str:
    """The text of a file.

    Raises:
        ConfigError: it is not there, of another kind, too large, or not UTF-8.
    """
    if path.suffix.lower() not in KINDS:
        raise ConfigError(f"{str(path)!r}: expected a file of settings: {', '.join(KINDS)}")
    if not path.is_file():
        raise ConfigError(f"{str(path)!r} is no file")
    held = path.read_bytes()
    if len(held) > LONGEST:
        raise ConfigError(f"{str(path)!r} has {len(held)} bytes: expected {LONGEST} at most")
    try:
        return held.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{str(path)!r} is not UTF-8: byte {error.start}") from error


def mapping(path: Path) -> dict[str, Any]:
    """The mapping of a YAML or JSON file.

    Raises:
        ConfigError: it holds something else.
    """
    text = text_of(path)
    try:
        held = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read: {shorten(error, 200)}") from error
    if not isinstance(held, dict) or not all(isinstance(name, str) for name in held):
        raise ConfigError(f"{str(path)!r} holds {type(held).__name__}: expected a mapping of settings")
    return held


def words(path: Path) -> dict[str, str]:
    """The options of a command line, behind the script that they are of.

    Raises:
        ConfigError: a word that is no option and no value of one, or an option twice.
    """
    text = text_of(path)
    try:
        given = shlex.split(text.replace("\\\n", " "), comments=True)
    except ValueError as error:
        raise ConfigError(f"{str(path)!r} cannot be read: {error}") from error
    scripts = [n for n, word in enumerate(given) if word.endswith(".py")]
    given = given[scripts[-1] + 1 :] if scripts else given
    found: dict[str, str] = {}
    while given:
        word, *given = given
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not name:
            raise ConfigError(f"{str(path)!r}: {shorten(repr(word))} is no option: expected --name value")
        if not equals:
            value = given.pop(0) if given and not given[0].startswith("--") else "true"
        if (name := name.replace("-", "_")) in found:
            raise ConfigError(f"{str(path)!r}: --{name} is there twice")
        found[name] = value
    return found


def call(path: Path, classes: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The class of ``classes`` that a Python file makes, and its arguments.

    Raises:
        ConfigError: there is none or more than one, or an argument that is no literal.
    """
    calls = [n for n in ast.walk(_tree(path)) if isinstance(n, ast.Call) and _name(n.func) in classes]
    if len(calls) != 1:
        told = f"{len(calls)} calls" if calls else "no call"
        raise ConfigError(f"{str(path)!r} has {told} of {' or '.join(classes)}: expected one")
    (found,) = calls
    if found.args or any(keyword.arg is None for keyword in found.keywords):
        raise ConfigError(f"{str(path)!r}, line {found.lineno}: expected arguments by name, each a literal")
    given = {str(k.arg): _literal(path, k.value, f"{k.arg}=") for k in found.keywords}
    return _name(found.func), given


def collection(path: Path, function: str) -> dict[str, Any]:
    """What a function of a file of ml_collections fills in, by dotted name: its own assignments, over those of the
    function that it begins with, in this file or in a file beside it.

    Raises:
        ConfigError: something else than assignments of literals to settings.
    """
    tree = _tree(path)
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    if function not in functions:
        raise unknown(f"function in {str(path)!r}", function, functions)
    return _Filled(path, tree).of(functions, function, ())


class _Filled:
    """The assignments of functions, followed line by line."""

    def __init__(self, path: Path, tree: ast.Module) -> None:
        self.path = path
        self.files = {
            target.id: path.parent / ending
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
            for target in node.targets
            if isinstance(target, ast.Name) and (ending := _python_file(node.value))
        }

    def of(self, functions: Mapping[str, ast.FunctionDef], name: str, above: tuple[str, ...]) -> dict[str, Any]:
        """The settings that the function leaves."""
        if name in above:
            raise ConfigError(f"{str(self.path)!r}: {name} begins with itself")
        held: dict[str, Any] = {}
        places: dict[str, str] = {}
        for node in functions[name].body:
            if isinstance(node, ast.Return | ast.Pass) or _is_text(node):
                continue
            if not isinstance(node, ast.Assign):
                raise self._no(node)
            if (begun := self._begun(node.value, functions, (*above, name))) is not None:
                held = begun
                places |= {target.id: "" for target in node.targets if isinstance(target, ast.Name)}
                continue
            self._assign(node, held, places)
        return held

    def _assign(self, node: ast.Assign, held: dict[str, Any], places: dict[str, str]) -> None:
        group = isinstance(node.value, ast.Call) and _name(node.value.func) == "ConfigDict" and not node.value.args
        dotted = [self._place(t, places) for t in node.targets if isinstance(t, ast.Attribute)]
        for target in node.targets:
            if isinstance(target, ast.Name):
                places[target.id] = dotted[0] if dotted else ""
        if group:
            return
        if not dotted:
            raise self._no(node)
        for name in dotted:
            held[name] = _literal(self.path, node.value, f"{name} =")

    def _begun(self, value: ast.expr, functions: Mapping[str, ast.FunctionDef], above: tuple[str, ...]) -> Any:
        """What another function leaves, where the value is a call of one."""
        if not isinstance(value, ast.Call) or value.args or value.keywords:
            return None
        if isinstance(value.func, ast.Name) and value.func.id in functions:
            return self.of(functions, value.func.id, above)
        if isinstance(value.func, ast.Attribute) and isinstance(value.func.value, ast.Name):
            file = self.files.get(value.func.value.id)
            return None if file is None else collection(file, value.func.attr)
        return None

    def _place(self, target: ast.Attribute, places: Mapping[str, str]) -> str:
        parts, node = [target.attr], target.value
        while isinstance(node, ast.Attribute):
            parts, node = [node.attr, *parts], node.value
        if not isinstance(node, ast.Name) or node.id not in places:
            raise self._no(target)
        return ".".join(filter(None, (places[node.id], *parts)))

    def _no(self, node: ast.AST) -> ConfigError:
        line = getattr(node, "lineno", 0)
        return ConfigError(f"{str(self.path)!r}, line {line}: expected an assignment of a literal to a setting")


def _tree(path: Path) -> ast.Module:
    text = text_of(path)
    try:
        return ast.parse(text, filename=path.name)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{str(path)!r} is no Python: {shorten(error, 200)}") from error


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _python_file(node: ast.Call) -> str:
    """The name of the Python file in a call that loads one."""
    held = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return next((text for text in held if text.endswith(".py")), "")


def _literal(path: Path, node: ast.expr, what: str) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        place = f"{str(path)!r}, line {node.lineno}"
        raise ConfigError(f"{place}: {what} {shorten(ast.unparse(node), 60)}: expected a literal") from error
