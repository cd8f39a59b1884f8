"""Several blobs as one: each after its length."""

import struct
from collections.abc import Iterable

_LENGTH = struct.Struct("<Q")


def joined_blobs(blobs: Iterable[bytes]) -> bytes:
    """One blob of several."""
    return b"".join(_LENGTH.pack(len(blob)) + blob for blob in blobs)


def split_blobs(blob: bytes) -> list[bytes]:
    """The blobs that ``joined_blobs`` joined.

    Raises:
        ValueError: it is cut short.
    """
    found, at = [], 0
    while at < len(blob):
        if at + _LENGTH.size > len(blob):
            raise ValueError(f"a length is cut short at byte {at} of {len(blob)}")
        (size,) = _LENGTH.unpack_from(blob, at)
        at += _LENGTH.size
        if at + size > len(blob):
            raise ValueError(f"a blob of {size} bytes is cut short at byte {at} of {len(blob)}")
        found.append(blob[at : at + size])
        at += size
    return found
