"""``--vary SETTING=V1,V2`` of a comparison, as often as there are settings to vary, as one mapping."""

import json
import re
from collections.abc import Iterator
from typing import Any

from rlfusion.cli.settings_text import load
from rlfusion.common.errors import ConfigError, shorten

FORM = "--vary SETTING=VALUE,VALUE, as in --vary agent.lr=1e-4,3e-4"
PAIRS = {"(": ")", "[": "]", "{": "}"}


def varied(arguments: list[str]) -> list[str]:
    """The arguments with all of their ``--vary`` as the last of them: ``--vary {"agent.lr": [0.0001, 0.0003]}``.

    Raises:
        ConfigError: one that is no setting with values, or a setting twice.
    """
    out: list[str] = []
    held: dict[str, Any] = {}
    words = iter(arguments)
    for word in words:
        option, equals, text = word.partition("=")
        if option != "--vary":
            out.append(word)
            continue
        told = text if equals else next(words, None)
        if told is None or (not equals and re.match(r"--?[A-Za-z]", told)):
            raise ConfigError(f"--vary has no value: expected {FORM}")
        for name, values in _read(told):
            if name in held:
                raise ConfigError(f"--vary {shorten(name)} is given twice: expected all of its values at one place")
            held[name] = values
    return [*out, "--vary", json.dumps(held)] if held else out


def _read(text: str) -> Iterator[tuple[str, Any]]:
    """The settings and values of one ``--vary``; a mapping in YAML may hold several."""
    if text.lstrip().startswith("{"):
        mapping = load(text, "--vary")
        yield from mapping.items() if isinstance(mapping, dict) else ()
        return
    name, equals, values = text.partition("=")
    if not equals or not name.strip() or not values.strip():
        raise ConfigError(f"--vary {shorten(repr(text))}: expected {FORM}")
    pieces = [piece.strip() for piece in _pieces(values)]
    if "" in pieces:
        raise ConfigError(
            f"--vary {shorten(repr(text))}: a value is empty; expected {FORM}, or '' in quotes for no text"
        )
    yield name.strip(), [load(piece, f"--vary {name.strip()}") for piece in pieces]


def _pieces(text: str) -> Iterator[str]:
    """The text between commas that are within no brackets and no quotes: ``DDIM(eta=0.0),DDPM()`` has one."""
    begin, closing, quote = 0, [], ""
    for n, sign in enumerate(text):
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        elif sign in PAIRS:
            closing.append(PAIRS[sign])
        elif closing and sign == closing[-1]:
            closing.pop()
        elif sign == "," and not closing:
            yield text[begin:n]
            begin = n + 1
    yield text[begin:]
