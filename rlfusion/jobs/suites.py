"""Suites of prompts whose figures are told by category: files that the user brings, in the formats of their authors.

    parti       PartiPrompts.tsv               Prompt, Category, Challenge, Note
    drawbench   DrawBench.csv                  Prompts, Category
    geneval     evaluation_metadata.jsonl      {"prompt", "tag", "include", ...}: what a reward is given as metadata
    dpg         a folder of .txt               a prompt each; its source is the name without the number at its end

Another file of prompts is a suite as well: its categories are its columns of a usual name (``USUAL``), if it has any.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rlfusion.common import storage
from rlfusion.common.errors import ConfigError, listed, shorten, unknown
from rlfusion.common.weights import sha256
from rlfusion.models import pipelines
from rlfusion.models.pipelines.prompt_files import READERS

USUAL = ("category", "challenge", "tag", "type", "source")
"""Columns of any file that have categories, upper or lower case."""
UNTOLD = "(none)"
"""The category of a prompt that names none."""


class Published(NamedTuple):
    """A suite's format: the file's usual places in a folder, the columns that it has, those that are categories, and
    where it is published.
    """

    places: tuple[str, ...]
    columns: tuple[str, ...]
    categories: tuple[str, ...]
    where: str


PUBLISHED = {
    "parti": Published(
        ("PartiPrompts.tsv",),
        ("Category", "Challenge", "Note"),
        ("Category", "Challenge"),
        "github.com/google-research/parti, Apache-2.0",
    ),
    "drawbench": Published(
        ("DrawBench.csv", "drawbench.csv", "data.csv"), ("Category",), ("Category",), "imagen.research.google"
    ),
    "geneval": Published(
        ("evaluation_metadata.jsonl", "prompts/evaluation_metadata.jsonl"),
        ("tag", "include"),
        ("tag",),
        "github.com/djghosh13/geneval, MIT",
    ),
    "dpg": Published(
        ("prompts", "dpg_bench/prompts", "."), ("source",), ("source",), "github.com/TencentQQGYLab/ELLA, Apache-2.0"
    ),
}


@dataclass(frozen=True)
class Suite:
    """Prompts with categories.

    Attributes:
        name: in a word.
        prompts: the file that ``pipelines.read_prompts`` reads them from.
        sha256: of the prompts and all that is known of them.
        count: how many prompts there are.
        metadata: of each prompt, for rewards.
        categories: of each column the category of each prompt.
    """

    name: str
    prompts: str
    sha256: str
    count: int
    metadata: tuple[Mapping[str, Any], ...] = ()
    categories: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def groups(self) -> dict[str, dict[str, list[int]]]:
        """The prompts of each category, by column; categories in the order in which they first come."""
        found: dict[str, dict[str, list[int]]] = {}
        for column, held in self.categories.items():
            for number, category in enumerate(held):
                found.setdefault(column, {}).setdefault(category, []).append(number)
        return found


def read(text: str, root: Path) -> Suite:
    """The suite that ``text`` names: ``NAME=PATH``, a file or a folder; ``NAME``, whose files are in
    ``root``/suites/NAME; or a file of prompts.

    Raises:
        ConfigError: there is no such suite or file, or it is not in the published format.
    """
    name, equals, path = text.partition("=")
    if name in PUBLISHED:
        return _published(name, Path(path).expanduser() if equals else root / "suites" / name, bool(equals), root)
    if equals and not Path(text).exists():
        raise unknown("suite", name, PUBLISHED)
    file = Path(text).expanduser()
    if file.suffix.lower() not in READERS and not file.exists():
        raise unknown("suite", text, [*PUBLISHED, "a file of prompts"])
    return _of_file(Path(text).stem, text, None)


def _published(name: str, path: Path, told: bool, root: Path) -> Suite:
    about = PUBLISHED[name]
    places = [path / place for place in about.places] if path.is_dir() else [path]
    found = next((place for place in places if place.exists()), None)
    if found is None:
        names = ", ".join(about.places)
        expected = f"expected {names} in it" if path.is_dir() else f"expected --suite {name}=PATH"
        where = "" if told else f", or put it into {shorten(str(path))}"
        raise ConfigError(
            f"suite {name!r}: {shorten(repr(str(path)))} has no prompts: {expected}{where} (published at {about.where})"
        )
    if name == "dpg":
        found = _gathered(found, path, root / "cache" / "suites")
    return _of_file(name, str(found), about)


def _of_file(name: str, path: str, about: Published | None) -> Suite:
    prompts = pipelines.read_prompts(path)
    rows = prompts.metadata or ({},) * len(prompts.texts)
    there = dict.fromkeys(column for row in rows for column in row)
    columns = [column for column in there if column.lower() in USUAL] if about is None else about.categories
    for number, row in enumerate(rows if about else (), 1):
        if missing := [column for column in about.columns if column not in row]:
            raise ConfigError(
                f"suite {name!r}: prompt {number} of {path!r} has {listed(list(row), missing[0]) or 'no columns'}: "
                f"expected {', '.join(about.columns)} beside the prompt, as published at {about.where}"
            )
    held = {column: tuple(_category(row.get(column), column, path) for row in rows) for column in columns}
    return Suite(name, path, prompts.sha256, len(prompts.texts), prompts.metadata, held)


def _category(value: Any, column: str, path: str) -> str:
    """A category in a word.

    Raises:
        ConfigError: it is none.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return UNTOLD
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value).strip()
    raise ConfigError(f"suite {path!r}: {column!r} is {shorten(repr(value))}, expected a category, one word or number")


def _gathered(folder: Path, told: Path, cache: Path) -> Path:
    """The prompts of a folder of texts as one file, kept in the cache by its content."""
    files = sorted(folder.glob("*.txt"), key=_by_number) if folder.is_dir() else []
    if not files:
        raise ConfigError(
            f"suite 'dpg': {shorten(repr(str(told)))} has no .txt: expected a folder of them, a prompt each"
        )
    rows = []
    for file in files:
        try:
            text = " ".join(file.read_text(encoding="utf-8-sig").split())
        except UnicodeDecodeError as error:
            raise ConfigError(f"suite 'dpg': {shorten(repr(str(file)))} is not UTF-8, expected UTF-8") from error
        if not text:
            raise ConfigError(f"suite 'dpg': {shorten(repr(str(file)))} is blank, expected a prompt")
        rows.append({"prompt": text, "file": file.stem, "source": re.sub(r"[\d_-]+$", "", file.stem) or UNTOLD})
    blob = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    made = cache / f"dpg-{sha256(blob)[:16]}.jsonl"
    storage.make_folder(cache)
    storage.write(made, blob)
    return made


def _by_number(file: Path) -> tuple[str, int]:
    """``whoops2`` before ``whoops10``."""
    head, number = re.fullmatch(r"(.*?)(\d*)", file.stem, re.DOTALL).groups()  # type: ignore[union-attr]
    return head, int(number or 0)


def figures(suite: Suite, found: Mapping[Any, Any], paired: Sequence[Any], differ: Any) -> dict[str, Any]:
    """What is found by category: {column: {category: {"prompts": n, "models": ..., "paired": ...}}}.

    Args:
        found: {(model, sampler): ``Figures``}, whose samples have the prompts in turn.
        paired: (sampler, the first model's figures, the second's) of each sampler, where there are two models.
        differ: (first, second) -> what is said of their differences, of figures with some of the samples.
    """
    held: dict[str, Any] = {}
    for column, groups in suite.groups().items():
        for category, prompts in groups.items():
            models: dict[str, Any] = {}
            for (model, sampler), one in found.items():
                some = one.of_prompts(prompts, suite.count)
                models.setdefault(model, {})[sampler] = {name: v.mean().item() for name, v in some.each.items()}
            told = {"prompts": len(prompts), "models": models}
            if paired:
                told["paired"] = {
                    sampler: differ(*(one.of_prompts(prompts, suite.count) for one in pair))
                    for sampler, *pair in paired
                }
            held.setdefault(column, {})[category] = told
    return {"name": suite.name, "sha256": suite.sha256, "prompts": suite.count, "categories": held}
