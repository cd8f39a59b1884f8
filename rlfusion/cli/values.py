"""The value of a setting: as it is read from the command line, and checked against what it may be."""

import json
import os
import re
from typing import Any, Literal, get_args, get_origin

from rlfusion.cli.settings_text import load
from rlfusion.cli.settings_tree import Tree
from rlfusion.common.annotations import fits, kinds, refused
from rlfusion.common.code_files import absolute
from rlfusion.common.errors import ConfigError, shorten

MOST_NAME, MOST_PATH = 240, 3500
"""Bytes of the name of a folder, and of a path: what file systems take, less what is added."""

ONE_TEXT = ("templates",)
"""Lists of texts, in which a comma is part of one."""


def read(key: str, text: str, annotation: Any) -> Any:
    """The value that a text on the command line stands for: of texts the text itself, else YAML."""
    allowed = kinds(annotation)
    words_only = all(get_origin(kind) is Literal for kind in allowed)
    if annotation is str or words_only or not text.strip():
        return text
    if str in allowed:
        return load(text, f"--{key}") if text.lstrip().startswith("{") else text
    if get_origin(annotation) not in (list, tuple) or text.lstrip().startswith("["):
        return load(text, f"--{key}")
    if key in ONE_TEXT:
        return [text]
    parts = [part.strip() for part in re.split(r",(?![^(]*\))", text)]
    return parts if str in get_args(annotation) else [load(part, f"--{key}") for part in parts]


def checked(key: str, value: Any, known: Tree) -> str:
    """A value as the text that jsonargparse reads it from.

    Raises:
        ConfigError: it is not what the setting may be.
    """
    annotation = known.leaves.get(key, Any)
    if get_origin(annotation) in (list, tuple) and isinstance(value, str | int | float) and value not in ("", True):
        value = [value]
    if not fits(value, annotation) or (isinstance(value, list) and "" in value):
        raise ConfigError(refused(key, value, annotation))
    if key == "root" and not value.strip():
        raise ConfigError(f"root = {value!r}: expected a folder, such as runs, or . for this one")
    if key in ("root", "name"):
        _require_short(key, value)
    _require_text(key, value)
    value = _placed(key, value)
    return value if isinstance(value, str) else json.dumps(value)


def _placed(key: str, value: Any) -> Any:
    """A value in which what names a thing in a file has the file's path from the root; so have the keys of a mapping,
    which are names of rewards.
    """
    if isinstance(value, list):
        return [absolute(one) if isinstance(one, str) else one for one in value]
    if not isinstance(value, dict):
        return absolute(value) if isinstance(value, str) else value
    held: dict[Any, Any] = {}
    for name, one in value.items():
        place = absolute(name) if isinstance(name, str) else name
        if place in held:
            raise ConfigError(f"{key}: {shorten(repr(name))} names {shorten(repr(place))} twice: expected it once")
        held[place] = one
    return held


def _require_short(key: str, path: str) -> None:
    """Refuse a folder whose name no file system takes, with what is added to a name that is taken."""
    longest = max(len(os.fsencode(part)) for part in path.split("/"))
    if longest > MOST_NAME or len(os.fsencode(path)) > MOST_PATH:
        raise ConfigError(
            f"{key} = {shorten(repr(path))}: expected names of at most {MOST_NAME} bytes, {MOST_PATH} in all"
        )


def _require_text(key: str, value: Any) -> None:
    """Refuse texts that cannot be written to a file: bytes that are no UTF-8, control characters."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        for one in value:
            _require_text(key, one)
    elif isinstance(value, str) and (bad := re.search("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", value)):
        raise ConfigError(f"{key} = {shorten(ascii(value))}: it has the character {bad[0]!a}, expected UTF-8 text")
