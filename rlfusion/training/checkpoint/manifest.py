"""The manifest of a checkpoint: what it states of the files, and whether they are so."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from rlfusion.common import storage
from rlfusion.common.errors import StateError
from rlfusion.common.nested import flatten
from rlfusion.common.numerics import differences, fingerprint
from rlfusion.common.weights import read_file, sha256
from rlfusion.training.checkpoint import rows
from rlfusion.training.checkpoint.keep import METRIC

FORMAT = 2
NAME = re.compile(r"step-([0-9]{8,})")
KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
MALFORMED = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading a file of another form raises."""


class CheckpointError(StateError):
    """A checkpoint that is damaged, that does not fit the run, or that cannot hold the state."""


class Owner(NamedTuple):
    """Whose checkpoints are: a run, and the digests of the settings that it has had, the present ones last."""

    run: str = ""
    digests: tuple[str, ...] = ("",)


NOBODY = Owner()


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
    if NAME.fullmatch(path.name) and path.name != name_of(step := manifest["step"]):
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


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def name_of(step: int) -> str:
    """The name of the folder of a step's checkpoint."""
    return f"step-{step:08d}"


Files = dict[str, bytes]
"""The content of files by name."""
Shards = Mapping[str, Mapping[str, Tensor]]
"""Tensors by name, below each top-level key of a state."""


class Snapshot(NamedTuple):
    """A state at one moment: its JSON record, and its tensors on the CPU by name, below each top-level key; of those
    that are split over ranks, this rank's rows apart.
    """

    record: dict[str, Any]
    shards: dict[str, dict[str, Tensor]]
    split: dict[str, dict[str, Tensor]]

    @property
    def is_for_here(self) -> bool:
        """Whether this process has a part in writing it: a process that is silent only where it has rows."""
        return storage.writes() or any(self.split.values())


def snapshot(state: Mapping[str, Any], kept: Snapshot | None = None) -> Snapshot:
    """A copy of ``state`` that shares memory with nothing, in the memory of ``kept``, an earlier one, where the tensors
    are of the same shape and dtype. What is not split is copied where this process ``storage.writes``.

    Raises:
        TypeError: the state holds what no checkpoint can; its place is named.
        CheckpointError: a top-level name is no file name.
    """
    for key in state:
        if not isinstance(key, str) or not KEY.fullmatch(key):
            raise CheckpointError(f"state[{key!r}]: expected a top-level name of letters, digits, '_', '.' and '-'")
    live: dict[str, dict[str, Tensor]] = {key: {} for key in state}
    record = {"dict": [[key, flatten(value, key, live[key])] for key, value in state.items()]}
    parted = {key: rows.apart(held) for key, held in live.items()}
    plain = {key: held if storage.writes() else {} for key, (held, _) in parted.items()}
    split = {key: held for key, (_, held) in parted.items()}
    return Snapshot(record, _copies(plain, kept.shards if kept else {}), _copies(split, kept.split if kept else {}))


def _copies(live: Shards, kept: Shards) -> dict[str, dict[str, Tensor]]:
    return {
        key: {name: _copy(tensor, kept.get(key, {}).get(name)) for name, tensor in held.items()}
        for key, held in live.items()
    }


def _copy(tensor: Tensor, kept: Tensor | None) -> Tensor:
    """A contiguous copy on the CPU, in the memory of ``kept`` where that fits."""
    if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
        pinned = tensor.device.type == "cuda"
        kept = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
    return kept.copy_(tensor.detach())


class Entry(NamedTuple):
    """What a manifest states of a file."""

    size: int
    sha256: str


def entries_of(files: Files) -> dict[str, Entry]:
    """The entries of some files."""
    return {name: Entry(len(blob), sha256(blob)) for name, blob in files.items()}


def files_of(held: Snapshot, step: int, owner: Owner) -> Files:
    """The content of the files of a checkpoint that one process writes, but for the manifest."""
    files = {f"{key}.safetensors": safetensors.torch.save(shard) for key, shard in held.shards.items() if shard}
    files["state.json"] = json.dumps({**_about(step, owner), "state": held.record}, allow_nan=False).encode()
    return files


def split_of(held: Snapshot, rank: int, count: int) -> Files:
    """The content of the files that each rank writes, of what is split."""
    return {rows.name_of(key, rank, count): safetensors.torch.save(split) for key, split in held.split.items() if split}


def manifest_of(entries: Mapping[str, Entry], step: int, owner: Owner, metric: dict[str, Any] | None) -> Files:
    """The manifest of files with these entries; ``metric`` is what ``Keep.metric`` gave."""
    listed = {name: entry._asdict() for name, entry in entries.items()}
    manifest = {"format": FORMAT, **_about(step, owner), "files": listed, "fingerprint": fingerprint()}
    manifest |= {METRIC: metric} if metric else {}
    return {"manifest.json": json.dumps({**manifest, "sha256": sha256(_canonical(manifest))}, indent=2).encode()}


def _about(step: int, owner: Owner) -> dict[str, Any]:
    return {"step": step, "run": owner.run, "settings": owner.digests[-1]}
