"""Prompts: what a text-to-image model is asked for, and what guidance leads it away from.

A text is itself, or the name of a file: ``.txt``, one prompt a line, or ``.jsonl``, lines {"prompt": ..., "negative":
...} of which the second may be left out.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from rlfusion.errors import ConfigError

SUFFIXES = (".txt", ".jsonl")


@dataclass(frozen=True)
class Prompts:
    """Distinct prompts, and the negative prompt of each ("" for none)."""

    texts: tuple[str, ...]
    negatives: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.texts or len(self.texts) != len(self.negatives):
            raise ConfigError(f"{len(self.texts)} prompts, {len(self.negatives)} negative ones: expected one for each")
        repeated = sorted({text for text in self.texts if self.texts.count(text) > 1})
        if repeated:
            raise ConfigError(f"prompt {repeated[0]!r} is there twice: expected distinct prompts")


def read(text: str, negative: str = "") -> Prompts:
    """The prompts that ``text`` is or names; ``negative`` is the negative prompt of those that have none of their own.

    Raises:
        ConfigError: no such file, nothing in it, or a line that is no prompt.
    """
    path = Path(text)
    if path.suffix not in SUFFIXES:
        return Prompts((text,), (negative,))
    if not path.is_file():
        raise ConfigError(f"prompts = {text!r}: there is no such file")
    lines = [line.strip() for line in path.read_text().splitlines()]
    rows = [(i + 1, line) for i, line in enumerate(lines) if line]
    if not rows:
        raise ConfigError(f"prompts = {text!r}: the file holds no prompt")
    if path.suffix == ".txt":
        return Prompts(tuple(line for _, line in rows), (negative,) * len(rows))
    held = [_row(text, number, line) for number, line in rows]
    return Prompts(tuple(row["prompt"] for row in held), tuple(row.get("negative", negative) for row in held))


def _row(file: str, number: int, line: str) -> dict[str, str]:
    """One line of a ``.jsonl``."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"prompts = {file!r}, line {number}: no JSON ({error})") from error
    fine = isinstance(row, dict) and "prompt" in row and row.keys() <= {"prompt", "negative"}
    if not fine or not all(isinstance(value, str) for value in row.values()):
        raise ConfigError(f"prompts = {file!r}, line {number}: expected {{'prompt': text}}, and 'negative' if any")
    return row
