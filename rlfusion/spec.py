"""Settings as text: a frozen dataclass is written as its repr, ``DDIM(eta=0.5)``, and read back from it.

Only a name and literal keyword arguments are read; nothing is evaluated.
"""

import ast
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args, get_origin

from rlfusion.errors import ConfigError, unknown


def split(text: str) -> tuple[str, dict[str, Any]]:
    """``"DDIM(eta=0.5)"`` -> ``("DDIM", {"eta": 0.5})``; a bare name has no arguments.

    Raises:
        ConfigError: not a name with literal keyword arguments.
    """
    name, bracket, rest = text.strip().partition("(")
    if not bracket:
        return name, {}
    try:
        tree = ast.parse(f"f({rest}", mode="eval").body
        called = isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and not tree.args
        keys = [k.arg for k in tree.keywords] if called else [None]
        if None in keys or len(set(keys)) < len(keys):
            raise ValueError("not keyword arguments")
        return name, {str(k.arg): ast.literal_eval(k.value) for k in tree.keywords}
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{text!r}: expected Name or Name(setting=value, ...)") from error


def lookup(table: Mapping[str, Callable[..., Any]], name: str, what: str) -> Callable[..., Any]:
    """The entry of ``table`` under ``name``, in any case.

    Raises:
        ConfigError: no such entry; the nearest one is named.
    """
    known = {key.lower(): key for key in table}
    if name.lower() not in known:
        raise unknown(what, name, table)
    return table[known[name.lower()]]


def parse(text: str, table: Mapping[str, Callable[..., Any]], what: str) -> Any:
    """The object that ``text`` writes, made by its entry in ``table``.

    Raises:
        ConfigError: unknown name or setting (with the nearest one), or a value that the entry refuses.
    """
    name, settings = split(text)
    return call(lookup(table, name, what), settings, f"{what} {name!r}")


def call(factory: Callable[..., Any], settings: Mapping[str, Any], what: str) -> Any:
    """``factory`` called with keyword ``settings``, each checked against its signature.

    Raises:
        ConfigError: a setting that the factory does not have, a missing one, a value that is none of those its
            annotation allows, or one that the factory cannot use.
    """
    signature = inspect.signature(factory)
    for key, value in settings.items():
        if key not in signature.parameters:
            raise unknown(f"setting of {what}", key, signature.parameters)
        allowed = signature.parameters[key].annotation
        if get_origin(allowed) is Literal and value not in get_args(allowed):
            raise ConfigError(f"{key} = {value!r} of {what}: expected one of {', '.join(map(str, get_args(allowed)))}")
    try:
        signature.bind(**settings)
    except TypeError as error:
        raise ConfigError(f"{what}: {error}") from error
    try:
        return factory(**settings)
    except (TypeError, RuntimeError) as error:
        raise ConfigError(f"{what} cannot be made with {dict(settings)}: {error}") from error
