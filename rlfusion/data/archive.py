"""Arrays in an ``.npz``, without trust: what a header claims is compared with what is there, then memory is taken."""

import lzma
import struct
import tokenize
import warnings
import zipfile
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from rlfusion.common.errors import ConfigError
from rlfusion.data.rows import memory

HEADER = 1 << 16
BOMB_BYTES, BOMB_RATIO = 1 << 28, 200
"""More bytes than this, unpacked from so many times fewer, are refused: pictures do not pack like that."""

BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    tokenize.TokenError,
    NotImplementedError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    SyntaxError,
    OverflowError,
    MemoryError,
    ArithmeticError,
)
"""What zipfile, zlib, lzma and numpy raise of damaged files (RuntimeError of encrypted ones, ``.npy`` headers any)."""


class Archive:
    """An open ``.npz``: ``names`` of its arrays; ``read`` gives one."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            ConfigError: no file, no zip, or two arrays of one name.
        """
        self.path = path
        if not path.is_file():
            raise ConfigError(f"data file {str(path)!r} does not exist")
        try:
            self._zip = zipfile.ZipFile(path)
        except BROKEN as error:
            raise self._error(error) from error
        members = [info for info in self._zip.infolist() if info.filename.endswith(".npy")]
        self._members = {info.filename.removesuffix(".npy"): info for info in members}
        if len(self._members) < len(members):
            raise ConfigError(f"data file {str(path)!r} holds two arrays of one name: expected distinct names")

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    @property
    def names(self) -> list[str]:
        return sorted(self._members)

    def read(self, name: str) -> np.ndarray:
        """
        Raises:
            ConfigError: the array is damaged, encrypted, pickled, or not of the size that it claims.
        """
        info = self._members[name]
        if info.file_size > max(BOMB_BYTES, BOMB_RATIO * info.compress_size) or info.file_size > memory():
            raise ConfigError(
                f"array {name!r} in {str(self.path)!r} claims {info.file_size / 1e9:.3g} GB "
                f"from {info.compress_size / 1e6:.3g} MB: expected less than the memory here, "
                f"packed at most {BOMB_RATIO} times"
            )
        try:
            with warnings.catch_warnings(action="ignore"), self._zip.open(info) as file:
                head = file.read(min(HEADER, info.file_size))
                self._require_whole(head, info.file_size, name)
                content = head + file.read()
            return npy.read_array(BytesIO(content), allow_pickle=False)
        except ConfigError:
            raise
        except BROKEN as error:
            raise self._error(error, f"array {name!r} in ") from error

    def _require_whole(self, head: bytes, size: int, name: str) -> None:
        file = BytesIO(head)
        version = npy.read_magic(file)
        if version not in ((1, 0), (2, 0), (3, 0)):
            raise ValueError(f"version {version} of .npy")
        reader = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = reader(file)
        if dtype.hasobject:
            raise ConfigError(f"array {name!r} in {str(self.path)!r} is pickled objects: expected numbers or texts")
        claimed = dtype.itemsize
        for n in shape:
            claimed *= n
        if min(shape, default=0) < 0 or claimed != size - file.tell():
            raise ConfigError(
                f"array {name!r} in {str(self.path)!r} claims {shape} {dtype}, {claimed:,} bytes: the file holds "
                f"{size - file.tell():,}"
            )

    def _error(self, error: Exception, what: str = "") -> ConfigError:
        message: Any = " ".join(str(error).split())[:200] or type(error).__name__
        return ConfigError(f"{what}data file {str(self.path)!r} cannot be read as .npz: {message}")
