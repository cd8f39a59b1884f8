"""A message of the reward service as bytes: a JSON text and a safetensors blob behind lengths and a digest, no pickle.

    (1)  frame = "RLF3" | n (uint32) | m (uint64) | d (32 bytes) | n bytes of JSON, UTF-8 | m bytes of safetensors
    (2)  d = BLAKE2b-256 of all the other bytes                                                          (big-endian)

The JSON is the record that ``nested.flatten`` makes of the message, whose tensors are in the blob. Equal messages give
equal bytes, and tensors come back bit for bit. Whatever has one entry a sample or a prompt is a tensor, lists of texts
too (``packed``), so that both JSON texts, ours and the one inside the blob, stay small whatever is sent. They are held
to that before they are parsed, by a count of their brackets and commas: "[[],[],..." takes many times the time and the
memory of its text, and no other thread runs meanwhile.
"""

import json
import math
import re
import struct
from collections.abc import Sequence
from hashlib import blake2b
from itertools import pairwise
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from rlfusion.common.nested import flatten, restore
from rlfusion.common.weights import pack, unpack

PROTOCOL = 3
MAGIC = b"RLF%d" % PROTOCOL
HEAD = struct.Struct(">4sIQ32s")
DIGESTED = struct.Struct(">4sIQ")
MOST_TEXT = 64 * 2**10
"""Bytes of a JSON text."""
MOST_ENTRIES, MOST_DEPTH, MOST_TENSORS = 4096, 32, 256
MOST_TEXTS = 4_000_000
"""Entries of a list of texts."""
DTYPES = ("F16", "BF16", "F32", "F64", "I32", "I64", "U8")
"""What tensors of a message may be, as safetensors names it."""
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"?', re.DOTALL)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class FrameError(ValueError):
    """Bytes that are no frame, or a frame that is not the message expected; it says what is wrong with it."""


class DamagedFrame(FrameError):
    """A frame whose bytes are not those that its head announces: it was damaged on the way."""


def encode(message: Any) -> bytes:
    """Eq. (1) of a message of dicts, lists, tensors, strings, numbers and None.

    Raises:
        FrameError: it is above what ``decode`` takes.
    """
    tensors: dict[str, Tensor] = {}
    record = flatten(message, "message", tensors)
    try:
        text = json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise FrameError(f"a text of the message is no Unicode: {error}") from error
    _require_short(len(text), "the message")
    _require_small(text, "the message")
    if len(tensors) > MOST_TENSORS:
        raise FrameError(f"{len(tensors)} tensors: a frame has at most {MOST_TENSORS}")
    blob = pack(tensors)
    return b"".join([HEAD.pack(MAGIC, len(text), len(blob), _digest(text, blob)), text, blob])


def decode(frame: bytes) -> Any:
    """The message that ``encode`` wrote, its tensors on the CPU.

    Raises:
        DamagedFrame: the bytes are truncated, too many, or others than were sent.
        FrameError: they are no frame at all, or of another protocol; or the message is none that ``encode`` writes.
    """
    _require_magic(frame)
    if len(frame) < HEAD.size:
        raise DamagedFrame(f"the frame is truncated: {len(frame)} bytes, its head alone has {HEAD.size}")
    _, text, blob, digest = HEAD.unpack_from(frame)
    if len(frame) != HEAD.size + text + blob:
        found = "truncated" if len(frame) < HEAD.size + text + blob else "too long"
        raise DamagedFrame(f"the frame is {found}: {len(frame)} bytes, its head says {HEAD.size + text + blob}")
    whole = memoryview(frame)
    written, held = whole[HEAD.size : HEAD.size + text], whole[HEAD.size + text :]
    if _digest(written, held) != digest:
        raise DamagedFrame("the frame is damaged: its digest is not that of its bytes")
    record = strict_json(written, "the message")
    tensors = _Taken(_tensors(held))
    try:
        message = restore(record, tensors)
    except (ValueError, KeyError, TypeError) as error:
        raise FrameError(f"the frame holds no message: {type(error).__name__}: {error}") from error
    if tensors:
        raise FrameError(f"the frame holds tensors that are not in its message: {sorted(tensors)[:5]}")
    return message


def digest_of(frame: bytes) -> str:
    """The digest that is written in a frame, hexadecimal: what an answer says it is the answer to."""
    return HEAD.unpack_from(frame)[3].hex()


def packed(texts: Sequence[str]) -> dict[str, Tensor]:
    """A list of texts as tensors: their UTF-8 joined, (N,) uint8, and where each ends, (n,) int64.

    Raises:
        FrameError: a text that is no Unicode, or too many.
    """
    if len(texts) > MOST_TEXTS:
        raise FrameError(f"{len(texts)} texts: a frame has at most {MOST_TEXTS}")
    try:
        parts = [text.encode() for text in texts]
    except UnicodeEncodeError as error:
        raise FrameError(f"a text of the message is no Unicode: {error}") from error
    joined = bytearray(b"".join(parts))
    utf8 = torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.zeros(0, dtype=torch.uint8)
    return {"utf8": utf8, "ends": torch.tensor([len(part) for part in parts], dtype=torch.int64).cumsum(0)}


def unpacked(record: Any, what: str) -> list[str]:
    """The texts that ``packed`` gave the ``record`` of.

    Raises:
        FrameError: it is none; it says of ``what``.
    """
    utf8, ends = fields_of(record, what, "utf8", "ends").values()
    if not _is(utf8, torch.uint8) or not _is(ends, torch.int64) or len(ends) > MOST_TEXTS:
        raise FrameError(f"{what}: expected UTF-8 (N,) uint8 and at most {MOST_TEXTS} ends (n,) int64")
    starts = torch.cat([ends.new_zeros(1), ends])
    if int(starts[-1]) != len(utf8) or bool((starts[1:] < starts[:-1]).any()):
        raise FrameError(f"{what}: expected ends that rise from 0 to {len(utf8)}")
    joined, places = utf8.numpy().tobytes(), starts.tolist()
    try:
        return [joined[a:b].decode() for a, b in pairwise(places)]
    except UnicodeDecodeError as error:
        raise FrameError(f"{what}: expected UTF-8 ({error})") from error


def fields_of(message: Any, what: str, *names: str) -> dict[str, Any]:
    """The entries of a message, in the order of ``names``.

    Raises:
        FrameError: it has not exactly these.
    """
    if not isinstance(message, dict) or set(message) != set(names):
        got = ", ".join(map(str, message))[:200] if isinstance(message, dict) else type(message).__name__
        raise FrameError(f"expected {what} of {', '.join(names)}: got {got}")
    return {name: message[name] for name in names}


def strict_json(written: bytes | memoryview, what: str) -> Any:
    """A JSON text, parsed only if it is small; each key once, no NaN or infinity, UTF-8.

    Raises:
        FrameError: it is too large, too deep, or none.
    """
    _require_short(len(written), what)
    text = bytes(written)
    _require_small(text, what)
    if _SURROGATE.search(text):
        raise FrameError(f"{what}: half a character, \\ud800 to \\udfff, expected UTF-8")
    try:
        return json.loads(text.decode(), object_pairs_hook=_once, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        raise FrameError(f"{what} is no JSON: {error}") from error


def _require_magic(frame: bytes) -> None:
    magic = bytes(frame[: len(MAGIC)])
    if magic == MAGIC:
        return
    if magic[:3] == MAGIC[:3] and magic[3:].isdigit():
        raise FrameError(
            f"a frame of protocol {magic[3:].decode()}: expected {PROTOCOL}, the same rlfusion on both sides"
        )
    raise FrameError(f"{len(frame)} bytes that begin with {magic!r}: a frame begins with {MAGIC!r}")


def _digest(text: bytes | memoryview, blob: bytes | memoryview) -> bytes:
    """Eq. (2)."""
    state = blake2b(DIGESTED.pack(MAGIC, len(text), len(blob)), digest_size=32)
    state.update(text)
    state.update(blob)
    return state.digest()


def _require_short(length: int, what: str) -> None:
    if length > MOST_TEXT:
        raise FrameError(f"{what}: {length} bytes of JSON, expected at most {MOST_TEXT}")


def _require_small(text: bytes, what: str) -> None:
    bare = _STRING.sub(b"", text)
    entries = sum(map(bare.count, (b"[", b"{", b",")))
    if entries > MOST_ENTRIES:
        raise FrameError(f"{what}: {entries} entries of JSON, expected at most {MOST_ENTRIES}")
    depth = deepest = 0
    for bracket in re.findall(rb"[][{}]", bare):
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    if deepest > MOST_DEPTH:
        raise FrameError(f"{what}: JSON {deepest} deep, expected at most {MOST_DEPTH}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a key comes twice among {sorted(key for key, _ in pairs)[:10]}")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:50]} is no finite number")
    return value


def _tensors(blob: memoryview) -> dict[str, Tensor]:
    """The tensors of a safetensors blob, whose own header is as small and strict as ours.

    Raises:
        FrameError: it is none.
    """
    length = int.from_bytes(blob[:8], "little")
    if len(blob) < 8 or length > len(blob) - 8:
        raise FrameError("the frame's tensors have no whole header")
    header = strict_json(blob[8 : 8 + length], "the header of the tensors")
    if not isinstance(header, dict) or len(header) > MOST_TENSORS:
        raise FrameError(f"the header of the tensors: expected at most {MOST_TENSORS} by name")
    for name, entry in header.items():
        told = fields_of(entry, f"tensor {name[:50]!r}", "dtype", "shape", "data_offsets")
        if told["dtype"] not in DTYPES:
            raise FrameError(f"tensor {name[:50]!r} is {str(told['dtype'])[:20]}: expected one of {', '.join(DTYPES)}")
    try:
        return unpack(bytes(blob))
    except (ValueError, TypeError, RuntimeError, OverflowError, SafetensorError) as error:
        raise FrameError(f"the frame's tensors cannot be read: {error}") from error


class _Taken(dict[str, Tensor]):
    """Tensors of which each is given out once."""

    def __getitem__(self, name: str) -> Tensor:
        return self.pop(name)


def _is(value: Any, dtype: torch.dtype) -> bool:
    return isinstance(value, Tensor) and value.dtype == dtype and value.ndim == 1
