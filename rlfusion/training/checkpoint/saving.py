"""Writing a checkpoint, finding the newest that verifies, and reading its state."""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from torch import Tensor

from rlfusion.common import shards, storage
from rlfusion.common.errors import RlfusionError, StateError
from rlfusion.common.nested import restore
from rlfusion.common.weights import unpack
from rlfusion.training.checkpoint import rows
from rlfusion.training.checkpoint.disk import add, attempt, begin, candidates, give, remove, set_aside, tidy
from rlfusion.training.checkpoint.keep import Keep
from rlfusion.training.checkpoint.manifest import (
    MALFORMED,
    NOBODY,
    CheckpointError,
    Entry,
    Files,
    Owner,
    Snapshot,
    entries_of,
    files_of,
    fingerprint_warnings,
    manifest_of,
    name_of,
    snapshot,
    split_of,
    verify,
)
from rlfusion.training.folders import require_held
from rlfusion.training.ranks import Ranks, current

KEEP = Keep()
NONE: Mapping[str, float] = {}
_log = logging.getLogger(__name__)
UNSAVED = "; the checkpoint was not saved"


class Found(NamedTuple):
    """The newest checkpoint that verifies, what was set aside (or differs) on the way to it, and the digest of the
    settings under which it was saved.
    """

    step: int
    path: Path
    warnings: tuple[str, ...]
    settings: str = ""


def save(
    folder: Path,
    step: int,
    state: Mapping[str, Any],
    keep: Keep = KEEP,
    owner: Owner = NOBODY,
    metrics: Mapping[str, float] = NONE,
) -> Path:
    """Write ``state`` as ``owner``'s checkpoint of ``step``, remove those that ``keep`` does not name, return its path.

    ``state`` is a dict by name of nested dicts (str or int keys), lists, tuples, tensors, str, int, float, bool, None.
    Saving a step again replaces it. ``metrics`` are those of the training at this step.

    Raises:
        TypeError: the state holds something else; its place is named.
        CheckpointError: a top-level name is no file name, or what was written does not verify.
        StorageError: the disk is full or fails; the checkpoints that were there still are.
    """
    metric = keep.metric(metrics)
    if step < 0:
        raise CheckpointError(f"step = {step}: expected step >= 0")
    if not (storage.writes() or shards.active()):
        return folder / name_of(step)
    held = snapshot(state)
    if not held.is_for_here:
        return folder / name_of(step)
    return commit(folder, Commit(step, owner, keep, metric, current()), held)


class Commit(NamedTuple):
    """What a checkpoint says of itself beside its state, which others stay beside it, and the ranks that write it."""

    step: int
    owner: Owner
    keep: Keep
    metric: dict[str, Any] | None
    ranks: Ranks = Ranks()


def commit(folder: Path, about: Commit, held: Snapshot) -> Path:
    """Write a snapshot, verify what was written, and remove what does not stay: the one way to a checkpoint. Where the
    network is split all ranks do so together, beside whatever else they do.

    Raises:
        CheckpointError, StorageError: as ``save``.
        ConfigError: another process has taken the run.
    """
    path, keep = folder / name_of(about.step), about.keep
    require_held(folder.parent)
    if split := split_of(held, about.ranks.rank, about.ranks.count):
        _write_together(path, about, held, split)
    else:
        files = files_of(held, about.step, about.owner)
        files |= manifest_of(entries_of(files), about.step, about.owner, about.metric)
        storage.patiently(lambda: attempt(path, files), path, UNSAVED)
    if about.ranks.rank:
        return path
    verify(path)
    there = {at: old for at, old in candidates(folder) if at <= about.step}
    stay = keep.stay([keep.held(at, old) for at, old in there.items()]) | {about.step}
    for old in [old for at, old in there.items() if at not in stay]:
        remove(old)
    tidy(folder)
    return path


def _write_together(path: Path, about: Commit, held: Snapshot, split: Files) -> None:
    """Each rank writes its ``split`` files into a folder of the first rank's, which writes the others and the manifest
    of all, and gives the folder its name.
    """
    ranks, first = about.ranks, about.ranks.rank == 0
    part = str(storage.patiently(lambda: begin(path), path, UNSAVED)) if first else ""
    place = Path(ranks.exchange(part.encode(), beside=True)[0].decode())
    try:
        storage.patiently(lambda: add(place, split), path, UNSAVED)
        listed = ranks.exchange(json.dumps(entries_of(split)).encode(), beside=True)
        if first:
            files = files_of(held, about.step, about.owner)
            entries = {name: Entry(*entry) for own in map(json.loads, listed) for name, entry in own.items()}
            files |= manifest_of(entries | entries_of(files), about.step, about.owner, about.metric)
            storage.patiently(lambda: add(place, files), path, UNSAVED)
            storage.patiently(lambda: give(place, path), path, UNSAVED)
    except OSError:
        if first:
            tidy(path.parent)
        raise


def load(path: Path) -> dict[str, Any]:
    """The state of a checkpoint, its tensors on the CPU. Another numerics fingerprint is logged, not refused.

    Raises:
        CheckpointError: it does not verify.
    """
    manifest = verify(path)
    for text in fingerprint_warnings(path, manifest):
        _log.warning(text)
    tensors: dict[str, Tensor] = {}
    try:
        for name in manifest["files"]:
            if name.endswith(".safetensors") and not rows.NAME.fullmatch(name):
                tensors |= unpack((path / name).read_bytes())
        tensors |= rows.read(path, manifest["files"])
        return restore(json.loads((path / "state.json").read_text())["state"], tensors)
    except (*MALFORMED, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {type(error).__name__}: {error}") from error


@contextmanager
def loading(path: Path) -> Iterator[None]:
    """Within the context the state of the checkpoint ``path`` is loaded into what it is for.

    Raises:
        CheckpointError: it does not fit; the first entry that does not is named.
    """
    try:
        yield
    except StateError as error:
        raise CheckpointError(f"checkpoint {path} does not fit this run: {error}") from error
    except RlfusionError:
        raise
    except (*MALFORMED, RuntimeError, IndexError) as error:
        message = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"checkpoint {path} does not fit this run: {message}") from error


def latest(folder: Path, owner: Owner = NOBODY) -> Found | None:
    """The newest checkpoint in ``folder`` that verifies and is ``owner``'s, or None.

    Damaged ones are renamed ``*.corrupt``, those of others ``*.foreign``; this and another numerics fingerprint are
    logged and returned as warnings. Leftovers of writers that died are removed.

    Raises:
        CheckpointError: ``folder`` is there, and is no folder.
    """
    if not folder.is_dir():
        if os.path.lexists(folder):
            raise CheckpointError(f"{folder} is no folder: expected that of the checkpoints")
        return None
    tidy(folder)
    warnings: list[str] = []
    for step, path in candidates(folder):
        try:
            manifest = verify(path)
            problem, why = _stranger(path, manifest, owner), "foreign"
        except CheckpointError as error:
            problem, why = str(error), "corrupt"
        if not problem:
            told = (*warnings, *fingerprint_warnings(path, manifest))
            return Found(step, path, told, manifest["settings"])
        warnings.append(f"{problem}; set aside as {set_aside(path, why).name}")
        _log.warning(warnings[-1])
    return None


def newest_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of the newest checkpoint in ``folder`` that verifies, whose ever it is; nothing is set aside."""
    for _, path in candidates(folder):
        try:
            return verify(path)
        except CheckpointError:
            continue
    return None


def _stranger(path: Path, manifest: dict[str, Any], owner: Owner) -> str:
    """Why a checkpoint is not ``owner``'s, or ""."""
    if manifest["run"] != owner.run:
        return f"checkpoint {path} belongs to another run ({manifest['run'] or 'none'}, not {owner.run or 'none'})"
    if manifest["settings"] not in owner.digests:
        return f"checkpoint {path} was saved under settings that this run never had"
    return ""
