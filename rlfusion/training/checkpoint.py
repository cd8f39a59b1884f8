"""Checkpoints: a state as a folder that is either whole or not there.

    step-00000020/
        <key>.safetensors   the tensors below each top-level key of the state
        state.json          its structure and scalars; floats, int keys and tuples come back exactly
        manifest.json       the step, the run, a digest of its settings (all three are in state.json too), SHA-256 and
                        size of each file, the numerics fingerprint, and a SHA-256 of itself

A checkpoint is written under a temporary name, each file fsynced, the folder renamed, its parent fsynced, and then read
again and verified. The newest that verifies wins; one that does not is renamed ``*.corrupt`` and named, and so is one
whose name is not its step; one of another run, or of settings that the run never had, is renamed ``*.foreign``. A
process that dies at any moment leaves the previous checkpoint as it was. One process at a time writes to a folder;
nothing is ever unpickled.
"""

import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from torch import Tensor

from rlfusion.common import storage
from rlfusion.common.errors import RlfusionError, StateError
from rlfusion.common.nested import flatten, restore
from rlfusion.common.numerics import differences, fingerprint
from rlfusion.common.weights import pack, read_file, sha256, unpack

FORMAT = 2
NAME = re.compile(r"step-([0-9]{8,})")
KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_log = logging.getLogger(__name__)


MALFORMED = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading a file of another form raises."""


class CheckpointError(StateError):
    """A checkpoint that is damaged, that does not fit the run, or that cannot hold the state."""


class Owner(NamedTuple):
    """Whose checkpoints are: a run, and the digests of the settings that it has had, the present ones last."""

    run: str = ""
    digests: tuple[str, ...] = ("",)


NOBODY = Owner()


class Found(NamedTuple):
    """The newest checkpoint that verifies, what was set aside (or differs) on the way to it, and the digest of the
    settings under which it was saved.
    """

    step: int
    path: Path
    warnings: tuple[str, ...]
    settings: str = ""


def save(folder: Path, step: int, state: dict[str, Any], keep: int = 3, owner: Owner = NOBODY) -> Path:
    """Write ``state`` as ``owner``'s checkpoint of ``step``, keep the newest ``keep`` up to it, and return its path.

    ``state`` is a dict by name of nested dicts (str or int keys), lists, tuples, tensors, str, int, float, bool, None.
    Saving a step again replaces it.

    Raises:
        TypeError: the state holds something else; its place is named.
        CheckpointError: a top-level name is no file name, or what was written does not verify.
        StorageError: the disk is full or fails; the checkpoints that were there still are.
    """
    if keep < 1 or step < 0:
        raise CheckpointError(f"keep = {keep}, step = {step}: expected keep >= 1 and step >= 0")
    path = folder / _name(step)
    files = _files(state, step, owner)
    storage.patiently(lambda: _attempt(path, files), path, "; the checkpoint was not saved")
    verify(path)
    for old in [old for at, old in candidates(folder) if at <= step][keep:]:
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
    try:
        for name in manifest["files"]:
            if name.endswith(".safetensors"):
                tensors |= unpack((path / name).read_bytes())
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
        said = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"checkpoint {path} does not fit this run: {said}") from error


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
    _tidy(folder)
    warnings: list[str] = []
    for step, path in candidates(folder):
        try:
            manifest = verify(path)
            said, why = _stranger(path, manifest, owner), "foreign"
        except CheckpointError as error:
            said, why = str(error), "corrupt"
        if not said:
            told = (*warnings, *fingerprint_warnings(path, manifest))
            return Found(step, path, told, manifest["settings"])
        warnings.append(f"{said}; set aside as {set_aside(path, why).name}")
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


def verify(path: Path) -> dict[str, Any]:
    """Read every file of a checkpoint against its manifest, and return the manifest.

    Raises:
        CheckpointError: names the checkpoint, the file and what is wrong with it.
    """
    try:
        manifest = json.loads(read_file(path / "manifest.json"))
        stated = manifest.pop("sha256")
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"checkpoint {path} has format {manifest['format']!r}: expected {FORMAT}")
        if sha256(_canonical(manifest)) != stated:
            raise CheckpointError(f"checkpoint {path} is damaged: manifest.json does not match its own SHA-256")
        for name, entry in manifest["files"].items():
            if not KEY.fullmatch(name):
                raise ValueError(f"manifest.json lists the file {name!r}")
            _verify_file(path / name, entry["size"], entry["sha256"])
        _verify_identity(path, manifest)
        differences(manifest["fingerprint"], {})
    except MALFORMED as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {type(error).__name__}: {error}") from error
    return manifest


def _verify_identity(path: Path, manifest: dict[str, Any]) -> None:
    """The step of the manifest is that of the name; and the state was saved with it, for the same run."""
    if NAME.fullmatch(path.name) and path.name != _name(step := manifest["step"]):
        raise CheckpointError(f"checkpoint {path} is damaged: it is of step {step}, which is not its name's")
    state = json.loads((path / "state.json").read_text()) if "state.json" in manifest["files"] else {}
    for name in ("step", "run", "settings"):
        if state[name] != manifest[name]:
            raise CheckpointError(f"checkpoint {path} is damaged: manifest.json and state.json differ in {name!r}")


def _verify_file(file: Path, size: int, digest: str) -> None:
    blob = read_file(file)
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


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _files(state: dict[str, Any], step: int, owner: Owner) -> dict[str, bytes]:
    """The content of every file of a checkpoint, by name."""
    for key in state:
        if not isinstance(key, str) or not KEY.fullmatch(key):
            raise CheckpointError(f"state[{key!r}]: expected a top-level name of letters, digits, '_', '.' and '-'")
    shards: dict[str, dict[str, Tensor]] = {key: {} for key in state}
    record = {"dict": [[key, flatten(value, key, shards[key])] for key, value in state.items()]}
    files = {f"{key}.safetensors": pack(shard) for key, shard in shards.items() if shard}
    about = {"step": step, "run": owner.run, "settings": owner.digests[-1]}
    files["state.json"] = json.dumps({**about, "state": record}, allow_nan=False).encode()
    entries = {name: {"size": len(blob), "sha256": sha256(blob)} for name, blob in files.items()}
    manifest = {"format": FORMAT, **about, "files": entries, "fingerprint": fingerprint()}
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
    if os.path.lexists(path):
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


def candidates(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the checkpoints in ``folder``, by their names, newest first."""
    matches = [(NAME.fullmatch(path.name), path) for path in folder.glob("step-*")]
    return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)


def set_aside(path: Path, why: str) -> Path:
    """Rename to the first free ``*.why``, ``*.why-2``, ..."""
    names = (f"{path.name}.{why}" + (f"-{n}" if n > 1 else "") for n in count(1))
    aside = next(path.with_name(name) for name in names if not os.path.lexists(path.with_name(name)))
    with storage.stored(path):
        return path.rename(aside)


def _remove(path: Path) -> None:
    """Delete a checkpoint under another name, so that no half of it is ever taken for one."""
    _delete(path.rename(_owned_name("part", path)))


def _delete(path: Path) -> None:
    """Remove a folder, or what stands in its place; of a link not what it points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _tidy(folder: Path) -> None:
    """Remove the leftovers of writers that died, and undo a replacement that was cut short."""
    if not folder.is_dir():
        return
    for old in folder.glob(".replaced-*"):
        path = folder / old.name.removeprefix(".replaced-")
        if os.path.lexists(path):
            _delete(old)
        else:
            old.rename(path)
    for part in folder.glob(".part-*"):
        if not _in_use(part.name):
            _delete(part)


def _in_use(name: str) -> bool:
    """Whether the owner of a temporary name is another process that lives, or may live on another machine."""
    head, _, owner = name.rpartition("-")
    if not head.endswith(f"-{socket.gethostname()}"):
        return True
    if not owner.isdecimal():
        return True
    pid = int(owner)
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
