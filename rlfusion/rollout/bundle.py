"""A work item that failed on every worker, kept so that it can be run again: a folder of safetensors and one JSON file.

bundle.json             run, item, prompts, version and SHA-256 of the weights, the recipe of the task with the files
                        of the user's own code, how the item failed on each worker, the numerics of the driver
weights.safetensors     the weights that acted, or the manifest of the files of them that lie beside it
part-NAME.safetensors   each blob of the recipe
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors

from rlfusion.common import row_files, storage
from rlfusion.common.code_files import receive, texts_of
from rlfusion.common.errors import ConfigError, shorten
from rlfusion.common.numerics import fingerprint
from rlfusion.common.weights import Weights, read_file, sha256
from rlfusion.rollout.item import WorkItem
from rlfusion.rollout.task import Recipe, run_item
from rlfusion.rollout.trajectory import Trajectory

FORMAT = 1
FILE, WEIGHTS = "bundle.json", "weights.safetensors"


class Raised(NamedTuple):
    """An error as text: the name of its class ("" for a worker that died) and what it says."""

    kind: str
    text: str

    @classmethod
    def of(cls, error: BaseException) -> "Raised":
        return cls(type(error).__name__, str(error))

    def __str__(self) -> str:
        return f"{self.kind}: {shorten(self.text, 300)}" if self.kind else shorten(self.text, 300)


class Keep(NamedTuple):
    """Where the items of ``run`` that fail are kept, and the names of its prompts."""

    folder: Path
    run: str
    prompts: Sequence[str]

    def write(
        self, recipe: Recipe, item: WorkItem, weights: Weights, failed: Mapping[int, str], error: BaseException | None
    ) -> Path:
        """Keep an item that failed so on each worker, with the last ``error``; the bundle's folder.

        Raises:
            StorageError: it cannot be written.
        """
        folder = self.folder / f"iteration-{item.iteration}-item-{item.index}"
        if folder.exists():
            shutil.rmtree(folder)
        storage.make_folder(folder)
        parts = {f"part-{name}.safetensors": blob for name, blob in recipe.blobs.items()} | {WEIGHTS: weights.blob}
        record = {
            "format": FORMAT,
            "run": self.run,
            "item": item.to_json(),
            "prompts": [self.prompts[group] for group in item.groups] if self.prompts else [],
            "weights": {"version": weights.version, "sha256": weights.sha256},
            "recipe": {"builder": recipe.builder, "config": json.loads(recipe.text)},
            "files": texts_of(recipe.config),
            "workers": {str(worker): how for worker, how in failed.items()},
            "error": dict(Raised.of(error)._asdict()) if error is not None else {"kind": "", "text": ""},
            "numerics": fingerprint(),
            "sha256": {name: sha256(blob) for name, blob in parts.items()},
        }
        for name, blob in parts.items():
            storage.write(folder / name, blob)
        if row_files.is_manifest(weights.blob):
            row_files.keep(weights.blob, folder)
        storage.write(folder / FILE, json.dumps(record, indent=1))
        return folder


@dataclass(frozen=True)
class Bundle:
    """What a folder of ``Keep.write`` holds."""

    run: str
    item: WorkItem
    prompts: tuple[str, ...]
    weights: Weights
    recipe: Recipe
    files: Mapping[str, str]
    workers: Mapping[str, str]
    error: Raised
    numerics: dict[str, str]

    @classmethod
    def read(cls, folder: Path) -> "Bundle":
        """
        Raises:
            ConfigError: the folder is no whole bundle; the first thing that is amiss is named.
        """
        record = _record(folder)
        try:
            blobs = {name: _part(folder, name, digest) for name, digest in record["sha256"].items()}
            weights = Weights(record["weights"]["version"], record["weights"]["sha256"], blobs.pop(WEIGHTS))
            if row_files.is_manifest(weights.blob):
                weights = Weights.manifest(weights.version, row_files.moved(weights.blob, folder))
            parts = {name.removeprefix("part-").removesuffix(".safetensors"): blob for name, blob in blobs.items()}
            return cls(
                run=record["run"],
                item=WorkItem.from_json(record["item"]),
                prompts=tuple(record["prompts"]),
                weights=weights,
                recipe=Recipe(record["recipe"]["builder"], record["recipe"]["config"], parts),
                files=record["files"],
                workers=record["workers"],
                error=Raised(**record["error"]),
                numerics=record["numerics"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{folder / FILE}: {type(error).__name__} at {error}, expected what was written"
            ) from error

    def run_again(self, device: str) -> Trajectory:
        """Build the task in this process, on ``device``, and run the item as a worker does.

        Raises:
            whatever the item raises.
        """
        receive(self.files)
        config = self.recipe.config | ({"device": device} if "device" in self.recipe.config else {})
        task = Recipe(self.recipe.builder, config, self.recipe.blobs).build()
        self.weights.load_into(task.policy)
        return run_item(task, self.item)


def _record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads(read_file(folder / FILE))
    except OSError as error:
        raise ConfigError(
            f"{str(folder)!r} is no bundle: expected a folder with {FILE}, as a run leaves it in failed-items"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{folder / FILE} is no JSON: {shorten(error)}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise ConfigError(f"{folder / FILE}: format {shorten(repr(found))}, expected {FORMAT}")
    return record


def _part(folder: Path, name: str, digest: str) -> bytes:
    """A file of a bundle, whole."""
    if Path(name).name != name:
        raise ConfigError(f"{folder / FILE} names {shorten(repr(name))}, which is no file of the bundle")
    try:
        blob = read_file(folder / name)
        safetensors.deserialize(blob)
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError(f"{folder / name} cannot be read: {shorten(error)}") from error
    if (found := sha256(blob)) != digest:
        raise ConfigError(f"{folder / name}: SHA-256 {found}, expected {digest}")
    return blob
