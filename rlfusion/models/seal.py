"""SHA-256 by which a saved model is known to be whole."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from rlfusion.common.errors import ConfigError
from rlfusion.common.weights import sha256


def sealed(about: dict[str, Any]) -> bytes:
    """A description as JSON, with a digest of itself."""
    return json.dumps({**about, "seal": sha256(json.dumps(about).encode())}, indent=1).encode()


def require_seal(held: dict[str, Any], file: Path) -> None:
    """Raise ConfigError where a description is not as ``sealed`` wrote it."""
    about = {name: value for name, value in held.items() if name != "seal"}
    if held.get("seal") != sha256(json.dumps(about).encode()):
        raise ConfigError(f"{str(file)!r} is damaged: it does not match its own SHA-256")


def digest(file: Path) -> str:
    """SHA-256 of a file, read again where its size or its time changed."""
    stat = file.stat()
    return _digest_as(file, stat.st_size, stat.st_mtime_ns)


@lru_cache
def _digest_as(file: Path, size: int, time: int) -> str:
    """SHA-256 of a file as it is since ``time``."""
    with file.open("rb") as held:
        return hashlib.file_digest(held, "sha256").hexdigest()


def require_files(stated: Any, folder: Path) -> None:
    """Raise ConfigError unless the files of a saved pipeline are those of which SHA-256 is ``stated``."""
    if not isinstance(stated, dict):
        raise ConfigError(
            f"{str(folder)!r}: model.json states no SHA-256 of its files, expected a model as it was saved"
        )
    for name, one in stated.items():
        if not (folder / name).is_file() or digest(folder / name) != one:
            raise ConfigError(f"{str(folder / name)!r} is damaged or missing: expected the SHA-256 in model.json")
