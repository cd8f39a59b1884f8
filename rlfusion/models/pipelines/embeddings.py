"""The embeddings of prompts, each text's once: made shard by shard, kept in files, in memory where they are small.

    (1)  the distinct prompts, and the distinct negative prompts, are rows; condition i has the row of its text
    (2)  files PART-NNNNN.safetensors of ``SHARD`` rows each, PART "prompt" or "negative"; one that is there is not made
         again, so that what was killed goes on
    (3)  up to ``RESIDENT`` bytes of them are read into memory, more stay on the disk, mapped, and are read row by row
    (4)  each file states the SHA-256 of its tensors, to which those that are read into memory are held

A text is encoded alone, so that its embedding does not depend on the others beside it.
"""

import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from rlfusion.common import storage
from rlfusion.common.errors import StorageError
from rlfusion.common.progress import Progress
from rlfusion.common.weights import pack, sha256, unpack
from rlfusion.models.pipelines.conditions import Conditions, Rows

SHARD = 1024
RESIDENT = 2**30
SHOWN = 64
"""A bar is shown for more texts than that."""

DIGEST = "sha256"
PARTS = ("prompt", "negative")
Encode = Callable[[str, str], Rows | None]
"""(part, text) -> the embeddings of one text, (1, ...) each; None where a family has no negative prompts."""


class Texts(NamedTuple):
    """The distinct texts of each part, and the row of each condition."""

    prompt: list[str]
    negative: list[str]
    at: tuple[list[int], list[int]]

    @classmethod
    def of(cls, prompts: Sequence[str], negatives: Sequence[str]) -> "Texts":
        """Eq. (1), in the order in which texts come first."""
        rows = [{text: row for row, text in enumerate(dict.fromkeys(texts))} for texts in (prompts, negatives)]
        at = tuple([held[text] for text in texts] for held, texts in zip(rows, (prompts, negatives)))
        return cls(list(rows[0]), list(rows[1]), at)

    def part(self, name: str) -> list[str]:
        """Those of one part."""
        return self.prompt if name == "prompt" else self.negative


class Mapped:
    """Rows in files of ``SHARD`` each, read when they are asked for."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        self._open = lru_cache(maxsize=64)(lambda file: safe_open(file, "pt"))

    def take(self, at: Tensor) -> Rows:
        """The rows (B,) of these numbers, each read once."""
        distinct, place = at.cpu().unique(return_inverse=True)
        read = [self._row(row) for row in distinct.tolist()]
        return {name: torch.cat([row[name] for row in read])[place].to(at.device) for name in read[0]}

    def _row(self, row: int) -> Rows:
        file, row = self._open(self._files[row // SHARD]), row % SHARD
        return {name: file.get_slice(name)[row : row + 1] for name in file.keys()}  # noqa: SIM118


def kept(folder: Path, texts: Texts) -> Conditions | None:
    """The conditions of a folder that holds all embeddings; None where some are missing."""
    files = {part: _files(folder, part, len(texts.part(part))) for part in PARTS}
    if not all(file.is_file() for file in files["prompt"]):
        return None
    negated = all(file.is_file() for file in files["negative"])
    if not negated and not (folder / NONE).is_file():
        return None
    held = [files[part] for part in PARTS[: 1 + negated]]
    resident = sum(file.stat().st_size for part in held for file in part) <= RESIDENT
    if not all([_sound(file, resident) for part in held for file in part]):  # of each, all are looked at
        return None
    if resident:
        parts = [_joined([unpack(file.read_bytes()) for file in part]) for part in held]
        return Conditions(parts[0], parts[1] if negated else None, texts.at)
    return Conditions(Mapped(held[0]), Mapped(held[1]) if negated else None, texts.at)


def _packed(rows: Rows) -> bytes:
    """A file of rows, Eq. (4)."""
    return safetensors.torch.save(rows, metadata={DIGEST: sha256(pack(rows))})


def _sound(file: Path, whole: bool) -> bool:
    """Whether a file is as it was written; where it is not read ``whole``, whether it can be read. One that is not is
    removed, with a warning.
    """
    try:
        with safe_open(file, "pt") as held:
            stated = (held.metadata() or {}).get(DIGEST)
        if stated and (not whole or sha256(pack(unpack(file.read_bytes()))) == stated):
            return True
    except (OSError, safetensors.SafetensorError):
        pass
    warnings.warn(f"embeddings {str(file)!r} are damaged; they are made again", stacklevel=2)
    file.unlink(missing_ok=True)
    return False


def encoded(texts: Texts, encode: Encode, folder: Path | None) -> Conditions:
    """The conditions of texts, from what a folder holds and what is encoded, and then kept there; None keeps nothing.

    Raises:
        StorageError: there is no room for them.
    """
    if folder is None:
        parts = [_joined(list(_shards(texts.part(part), part, encode))) for part in PARTS]
        return Conditions(parts[0], parts[1] or None, texts.at)
    storage.make_folder(folder)
    for part in PARTS:
        _keep(folder, part, texts.part(part), encode)
    made = kept(folder, texts)
    assert made is not None
    return made


def _keep(folder: Path, part: str, texts: Sequence[str], encode: Encode) -> None:
    """Encode what a folder does not hold of a part, Eq. (2)."""
    for number, file in enumerate(_files(folder, part, len(texts))):
        if file.is_file():
            continue
        some = texts[number * SHARD : (number + 1) * SHARD]
        rows = _joined(list(_shards(some, part, encode, lambda row: _require_room(folder, row, len(texts)))))
        if not rows:
            storage.write(folder / NONE, b"")
            return
        storage.write(file, _packed(rows))


NONE = "negative-none"
"""A file that says that a family has no negative prompts."""


def _files(folder: Path, part: str, count: int) -> list[Path]:
    return [folder / f"{part}-{number:05d}.safetensors" for number in range(-(-count // SHARD))]


def _shards(
    texts: Sequence[str], part: str, encode: Encode, first: Callable[[Rows], None] = lambda row: None
) -> Iterator[Rows]:
    """The embeddings of texts, one by one; ``first`` is shown the first."""
    with Progress(quiet=len(texts) <= SHOWN).bar(f"encoding {part}s", len(texts)) as bar:
        for number, text in enumerate(texts):
            rows = encode(part, text)
            if rows is None:
                return
            if number == 0:
                first(rows)
            yield rows
            bar.advance()


def _joined(rows: list[Rows]) -> Rows:
    return {name: torch.cat([row[name] for row in rows]).cpu() for name in rows[0]} if rows else {}


def _require_room(folder: Path, row: Rows, count: int) -> None:
    needed = count * sum(tensor.nbytes for tensor in row.values())
    free = shutil.disk_usage(folder).free + sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if needed > free:
        raise StorageError(
            f"the embeddings of {count:,} prompts take {needed / 1e9:.1f} GB, {str(folder)!r} has room for "
            f"{free / 1e9:.1f} GB: expected fewer prompts, or a root with more room"
        )
