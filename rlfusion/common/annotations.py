"""Whether a value is what an annotation says: of settings that come as text, for which "it raised later" is too late.

A number is finite, an int is no bool and fits 64 bits, a float may be written as an int, a tuple may come as a list.
What is no plain annotation (a protocol, a callable) lets everything pass.
"""

import math
import re
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from rlfusion.common.errors import near, shorten

LARGEST = 2**63 - 1


def fits(value: Any, annotation: Any) -> bool:
    """Whether ``value`` is of ``annotation``."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in args)
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in args)
    if annotation in PLAIN:
        return PLAIN[annotation](value)
    kind = origin if isinstance(origin, type) else annotation
    if not isinstance(kind, type) or not issubclass(kind, list | tuple | dict | Sequence | Mapping):
        return bounded(value)
    if issubclass(kind, dict | Mapping):
        key, held = args or (Any, Any)
        return isinstance(value, Mapping) and all(fits(k, key) and fits(v, held) for k, v in value.items())
    return isinstance(value, list | tuple) and _each(value, kind, args)


def _each(value: Sequence[Any], kind: type, args: tuple[Any, ...]) -> bool:
    """Whether the members of a list or tuple are those of ``kind[args]``."""
    if issubclass(kind, tuple) and args and args[-1] is not Ellipsis:
        return len(value) == len(args) and all(map(fits, value, args))
    return all(fits(one, args[0] if args else Any) for one in value)


def bounded(value: Any) -> bool:
    """Whether every number in plain data is finite, and every whole one of 64 bits."""
    if isinstance(value, Mapping):
        return all(map(bounded, value.values()))
    if isinstance(value, list | tuple):
        return all(map(bounded, value))
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, int) or abs(value) <= LARGEST


def _is_int(value: Any) -> bool:
    return type(value) is int and abs(value) <= LARGEST


PLAIN = {
    Any: bounded,
    object: bounded,
    int: _is_int,
    float: lambda value: _is_int(value) or (type(value) is float and math.isfinite(value)),
    bool: lambda value: type(value) is bool,
    str: lambda value: type(value) is str,
    type(None): lambda value: value is None,
    None: lambda value: value is None,
}


def described(annotation: Any) -> str:
    """The words for the values that an annotation allows: "int", "float or null", "one of 'is', 'sf'"."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return f"one of {', '.join(map(repr, args))}" if len(args) > 1 else repr(args[0])
    if origin in (Union, types.UnionType):
        return " or ".join(described(one) for one in args)
    kind = origin if isinstance(origin, type) else annotation
    if isinstance(kind, type) and issubclass(kind, dict | Mapping):
        return f"a mapping {{name: {described(args[1])}, ...}}" if args else "a mapping"
    if isinstance(kind, type) and issubclass(kind, list | tuple):
        return f"a list [{described(args[0])}, ...]" if args else "a list"
    words = {
        int: "int, a whole number",
        float: "float, a finite number",
        bool: "bool, true or false",
        str: "text",
        type(None): "null",
        Any: "...",
    }
    return words.get(annotation, getattr(annotation, "__name__", str(annotation)))


def refused(name: str, value: Any, annotation: Any, of: str = "") -> str:
    """The message about a value that does not fit: what it is, what was expected, and what was likely meant. ``of``
    says whose setting it is.
    """
    hint = _meant(value, annotation) or _number(value, annotation, name.rpartition("_")[2])
    owner = f" of {of}" if of else ""
    bound = ", of less than 64 bits" if type(value) is int and abs(value) > LARGEST else ""
    meant = f"; did you mean {hint}?" if hint else ""
    return f"{name} = {shown(value)}{owner}: expected {described(annotation)}{bound}{meant}"


def shown(value: Any) -> str:
    """A value as it is written, in quotes where it is text that would be read as something else without."""
    if value is None:
        return "null"
    if isinstance(value, str) and re.fullmatch(r"[\w.+/-]+", value) and not _reads_otherwise(value):
        return shorten(value)
    try:
        return shorten(repr(value))
    except (ValueError, RecursionError):  # a whole number of more digits, or lists deeper, than Python prints
        return "a value too large to show"


def _reads_otherwise(text: str) -> bool:
    """Whether a bare word is no text to YAML, or to a reader: a number, a truth, nothing."""
    if text.lower() in ("true", "false", "yes", "no", "on", "off", "null", "none", "nan", "inf"):
        return True
    return re.match(r"[+-]?\.?\d", text) is not None or text.lower().strip("+-.") in ("nan", "inf", "infinity")


def _meant(value: Any, annotation: Any) -> str:
    """The near match of a value, "" for none."""
    allowed = kinds(annotation)
    choices = [one for kind in allowed if get_origin(kind) is Literal for one in get_args(kind) if isinstance(one, str)]
    if isinstance(value, str) and choices:
        found = near(value, choices)
        return repr(found[0]) if found else ""
    if isinstance(value, str) and type(None) in allowed and value.strip().lower() in ("none", "nil", "~", ""):
        return "null"
    if isinstance(value, float) and int in allowed and value.is_integer() and abs(value) <= LARGEST:
        return str(int(value))
    if bool in allowed and value in (0, 1):
        return "true" if value else "false"
    if str in allowed and isinstance(value, bool | int | float):
        return "a text in quotes"
    return ""


UNITS = {
    "s": {
        "s": 1,
        "sec": 1,
        "secs": 1,
        "seconds": 1,
        "m": 60,
        "min": 60,
        "mins": 60,
        "minutes": 60,
        "h": 3600,
        "ms": 1e-3,
    },
    "mb": {"mb": 1, "mib": 1, "gb": 1024, "gib": 1024, "kb": 1 / 1024},
    "": {"k": 1e3, "%": 1e-2, "": 1},
}
"""What a number is to be multiplied by, by the unit that the setting's name ends in, and the one that was typed."""


def _number(value: Any, annotation: Any, unit: str) -> str:
    """The number that a text was likely to be, with a unit, a comma, a bar or a typographic minus; "" for none."""
    if not isinstance(value, str) or not {int, float} & set(kinds(annotation)):
        return ""
    text = re.sub("[\u2010-\u2015\u2212\ufe63\uff0d]", "-", value.strip()).replace("\u00a0", "")
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+", text):
        text = text.replace(",", "")
    parts = re.fullmatch(r"([+-]?[\d.]*(?:,\d+)?(?:[eE][+-]?\d+)?)(?:/(\d+))?\s*([a-zA-Z%]*)", text)
    times = {**UNITS[""], **UNITS.get(unit, {})}.get(parts[3].lower()) if parts else None
    try:
        found = float(parts[1].replace(",", ".")) / float(parts[2] or 1) * times if parts and times else None
    except (ValueError, ArithmeticError):
        return ""
    if found is None or not math.isfinite(found):
        return ""
    return (
        f"{found:.0f}"
        if found.is_integer() and abs(found) < LARGEST
        else f"{found:.9g}"
        if fits(found, annotation)
        else ""
    )


def kinds(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation alone."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
