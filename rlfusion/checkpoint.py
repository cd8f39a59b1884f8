"""Checkpoints: a state as a folder that is either whole or not there.

    step-00000020/
        <key>.safetensors   the tensors below each top-level key of the state
        state.json          its structure and scalars; floats, int keys and tuples come back exactly
        manifest.json       SHA-256 and size of each file, the numerics fingerprint, and a SHA-256 of itself

A checkpoint is written under a temporary name, each file fsynced, the folder renamed, its parent fsynced, and then read
again and verified. The newest that verifies wins; one that does not is renamed ``*.corrupt`` and named. A process that
dies at any moment leaves the previous checkpoint as it was. One process at a time writes to a folder; nothing is ever
unpickled.
"""

import json
import logging
import os
import re
import shutil
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from rlfusion import storage
from rlfusion.nested import flatten, restore
from rlfusion.numerics import differences, fingerprint
from rlfusion.weights import pack, sha256, unpack

FORMAT = 1
NAME = re.compile(r"step-(\d{8,})")
KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged, or that cannot hold the state."""


class Found(NamedTuple):
    """The newest checkpoint that verifies, and what was set aside (or differs) on the way to it."""

    step: int
    path: Path
    warnings: tuple[str, ...]


def save(folder: Path, step: int, state: dict[str, Any], keep: int = 3) -> Path:
    """Write ``state`` as the checkpoint of ``step``, keep the newest ``keep`` up to it, and return its path.

    ``state`` is a dict by name of nested dicts (str or int keys), lists, tuples, tensors, str, int, float, bool, None.
    Saving a step again replaces it.

    Raises:
        TypeError: the state holds something else; its place is named.
        CheckpointError: a top-level name is no file name, or what was written does not verify.
        StorageError: the disk is full or fails; the checkpoints that were there still are.
    """
    if keep < 1 or step < 0:
        raise CheckpointError(f"keep = {keep}, step = {step}: expected keep >= 1 and step >= 0")
    path = folder / f"step-{step:08d}"
    files = _files(state)
    storage.patiently(lambda: _attempt(path, files), path, "; the checkpoint was not saved")
    verify(path)
    for old in [old for at, old in _candidates(folder) if at <= step][keep:]:
        _remove(old)
    _tidy(folder)
    return path


def load(path: Path) -> dict[str, Any]:
    """The state of a checkpoint, its tensors on the CPU. Another numerics fingerprint is logged, not refused.

    Raises:
        CheckpointError: it does not verify.
    """
    manifest = verify(path)
    for text in fingerprint_warnings(path, manifest):
        _log.warning(text)
    tensors: dict[str, Tensor] = {}
    for name in manifest["files"]:
        if name.endswith(".safetensors"):
            tensors |= unpack((path / name).read_bytes())
    return restore(json.loads((path / "state.json").read_text()), tensors)


def latest(folder: Path) -> Found | None:
    """The newest checkpoint in ``folder`` that verifies, or None.

    Damaged ones are renamed ``*.corrupt``; this and another numerics fingerprint are logged and returned as warnings.
    Leftovers of writers that died are removed.
    """
    if not folder.is_dir():
        return None
    _tidy(folder)
    warnings: list[str] = []
    for step, path in _candidates(folder):
        try:
            manifest = verify(path)
        except CheckpointError as error:
            aside = _set_aside(path)
            warnings.append(f"{error}; set aside as {aside.name}")
            _log.warning(warnings[-1])
            continue
        return Found(step, path, (*warnings, *fingerprint_warnings(path, manifest)))
    return None


def verify(path: Path) -> dict[str, Any]:
    """Read every file of a checkpoint against its manifest, and return the manifest.

    Raises:
        CheckpointError: names the checkpoint, the file and what is wrong with it.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        stated = manifest.pop("sha256")
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"checkpoint {path} has format {manifest['format']}: expected {FORMAT}")
        if sha256(_canonical(manifest)) != stated:
            raise CheckpointError(f"checkpoint {path} is damaged: manifest.json does not match its own SHA-256")
        for name, entry in manifest["files"].items():
            _verify_file(path / name, entry["size"], entry["sha256"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {type(error).__name__}: {error}") from error
    return manifest


def _verify_file(file: Path, size: int, digest: str) -> None:
    blob = file.read_bytes()
    if len(blob) != size or sha256(blob) != digest:
        what = f"has {len(blob)} bytes, expected {size}" if len(blob) != size else "does not match its SHA-256"
        raise CheckpointError(f"checkpoint {file.parent} is damaged: {file.name} {what}")


def fingerprint_warnings(path: Path, manifest: dict[str, Any]) -> tuple[str, ...]:
    """A sentence for each entry of the numerics fingerprint that is not this process's."""
    changed = differences(manifest["fingerprint"], fingerprint())
    return tuple(f"checkpoint {path}: a resumed run may differ in its last bits ({text})" for text in changed)


def write_json_atomic(path: Path, value: Any) -> None:
    """Write ``value`` as JSON so that ``path`` holds either its old content or all of the new."""
    storage.write(path, json.dumps(value, indent=2))
    _sync_folder(path.parent)


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _files(state: dict[str, Any]) -> dict[str, bytes]:
    """The content of every file of a checkpoint, by name."""
    for key in state:
        if not isinstance(key, str) or not KEY.fullmatch(key):
            raise CheckpointError(f"state[{key!r}]: expected a top-level name of letters, digits, '_', '.' and '-'")
    shards: dict[str, dict[str, Tensor]] = {key: {} for key in state}
    record = {"dict": [[key, flatten(value, key, shards[key])] for key, value in state.items()]}
    files = {f"{key}.safetensors": pack(shard) for key, shard in shards.items() if shard}
    files["state.json"] = json.dumps(record, allow_nan=False).encode()
    entries = {name: {"size": len(blob), "sha256": sha256(blob)} for name, blob in files.items()}
    manifest = {"format": FORMAT, "files": entries, "fingerprint": fingerprint()}
    return files | {
        "manifest.json": json.dumps({**manifest, "sha256": sha256(_canonical(manifest))}, indent=2).encode()
    }


def _owned_name(kind: str, path: Path) -> Path:
    """A hidden sibling of ``path`` that says which process made it."""
    return path.with_name(f".{kind}-{path.name}-{socket.gethostname()}-{os.getpid()}")


def _attempt(path: Path, files: dict[str, bytes]) -> None:
    """Write a checkpoint; what fails leaves nothing behind."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _tidy(path.parent)
        _write(path, files)
    except OSError:
        with suppress(OSError):  # the folder itself may be what is gone
            _tidy(path.parent)
        raise


def _write(path: Path, files: dict[str, bytes]) -> None:
    part = _owned_name("part", path)
    part.mkdir()
    for name, blob in files.items():
        _write_file(part / name, blob)
    _sync_folder(part)
    if path.exists():
        path.rename(path.with_name(f".replaced-{path.name}"))
    part.rename(path)
    _sync_folder(path.parent)


def _write_file(path: Path, blob: bytes) -> None:
    with path.open("wb") as file:
        file.write(blob)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    held = os.open(path, os.O_RDONLY)
    try:
        os.fsync(held)
    finally:
        os.close(held)


def _candidates(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the checkpoints in ``folder``, newest first."""
    matches = [(NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)


def _set_aside(path: Path) -> Path:
    """Rename to the first free ``*.corrupt``, ``*.corrupt-2``, ..."""
    names = (f"{path.name}.corrupt" + (f"-{n}" if n > 1 else "") for n in range(1, 1000))
    aside = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    return path.rename(aside)


def _remove(path: Path) -> None:
    """Delete a checkpoint under another name, so that no half of it is ever taken for one."""
    shutil.rmtree(path.rename(_owned_name("part", path)))


def _tidy(folder: Path) -> None:
    """Remove the leftovers of writers that died, and undo a replacement that was cut short."""
    if not folder.is_dir():
        return
    for old in folder.glob(".replaced-*"):
        path = folder / old.name.removeprefix(".replaced-")
        if path.exists():
            shutil.rmtree(old)
        else:
            old.rename(path)
    for part in folder.glob(".part-*"):
        if not _in_use(part.name):
            shutil.rmtree(part)


def _in_use(name: str) -> bool:
    """Whether the owner of a temporary name is another process that lives, or may live on another machine."""
    head, _, owner = name.rpartition("-")
    if not head.endswith(f"-{socket.gethostname()}"):
        return True
    pid = int(owner)
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
