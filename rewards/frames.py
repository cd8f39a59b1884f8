"""A message of the reward service as bytes: a JSON text and a safetensors blob behind their lengths, never a pickle.

    (1)  frame = "RLF1" | n (uint32) | m (uint64) | n bytes of JSON, UTF-8 | m bytes of safetensors     (big-endian)

The JSON is the record that ``nested.flatten`` makes of the message, whose tensors are in the blob. Equal messages give
equal bytes, and tensors come back bit for bit.
"""

import json
import struct
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from rlfusion.nested import flatten, restore
from rlfusion.weights import pack, unpack

MAGIC = b"RLF1"
HEAD = struct.Struct(">4sIQ")
MOST_TEXT = 16 * 2**20
"""Bytes of JSON in a frame at most: read, "[[],[],..." takes many times the memory of its text."""


class FrameError(ValueError):
    """Bytes that are no frame; it says what is wrong with them."""


def encode(message: Any) -> bytes:
    """Eq. (1) of a message of dicts, lists, tensors, strings, numbers and None.

    Raises:
        FrameError: beside its tensors it is above ``MOST_TEXT``.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(flatten(message, "message", tensors)).encode()
    _require_short(len(text))
    blob = pack(tensors)
    return b"".join([HEAD.pack(MAGIC, len(text), len(blob)), text, blob])


def decode(frame: bytes) -> Any:
    """The message that ``encode`` wrote, its tensors on the CPU.

    Raises:
        FrameError: the bytes are truncated, too many, or no frame at all.
    """
    if len(frame) < HEAD.size:
        raise FrameError(f"{len(frame)} bytes: a frame has a head of {HEAD.size}")
    magic, text, blob = HEAD.unpack_from(frame)
    if magic != MAGIC:
        raise FrameError(f"the bytes begin with {magic!r}: a frame begins with {MAGIC!r}")
    if len(frame) != HEAD.size + text + blob:
        found = "truncated" if len(frame) < HEAD.size + text + blob else "too long"
        raise FrameError(f"the frame is {found}: {len(frame)} bytes, its head says {HEAD.size + text + blob}")
    _require_short(text)
    try:
        record = json.loads(frame[HEAD.size : HEAD.size + text])
        return restore(record, unpack(frame[HEAD.size + text :]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise FrameError(f"the frame holds no message: {type(error).__name__}: {error}") from error


def _require_short(text: int) -> None:
    if text > MOST_TEXT:
        raise FrameError(f"{text} bytes of JSON: a frame has at most {MOST_TEXT}")
