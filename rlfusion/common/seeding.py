"""Randomness keyed by what it is for, never by who draws it.

Every random number of a run comes from a counter-based stream (Philox 4x64) whose 128-bit key is the BLAKE2b hash of
(seed, purpose, iteration, item, ...). So the same configuration draws the same numbers on 0 or N workers, for any
batch size, interrupted or not; and the stream of a sample holds the noises of all its denoising steps, in order.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.random.bit_generator import ISeedSequence
from torch import Tensor

Key = int | str
BLOCK = 2**20
"""Numbers that ``normals`` draws at a time, where one column is no more than that."""


class _Words(ISeedSequence):
    """A Philox key of its own, instead of one from numpy's hash of a seed: numpy asks the system for a seed first where
    it is given a key, which takes three times as long as the rest.
    """

    def __init__(self, digest: bytes) -> None:
        self.words = np.frombuffer(digest, dtype=np.uint64)

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        """The two words, as Philox asks for them."""
        assert (n_words, dtype) == (2, np.uint64)
        return self.words


def stream(*key: Key) -> np.random.Generator:
    """The generator of one key. Keys that differ in any part give independent streams."""
    return next(_streams(key[:-1], key[-1:]))


def _streams(key: tuple[Key, ...], items: Iterable[Key]) -> Iterator[np.random.Generator]:
    """``stream(*key, item)`` for each item; what their keys have in common is hashed once."""
    common = hashlib.blake2b("".join(f"{_text(part)}\x1f" for part in key).encode(), digest_size=16)
    for item in items:
        hashed = common.copy()
        hashed.update(_text(item).encode())
        yield np.random.Generator(np.random.Philox(_Words(hashed.digest())))


def _text(part: Key) -> str:
    return f"{type(part).__name__}:{part}"


def integer(*key: Key) -> int:
    """A 63-bit seed for libraries that want an integer."""
    return int(stream(*key).integers(0, 2**63 - 1))


def normal(key: tuple[Key, ...], items: Iterable[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 noise (len(items), *shape); row i depends on ``key`` and ``items[i]`` alone."""
    return _drawn(list(_streams(key, map(int, items))), shape)


def normals(key: tuple[Key, ...], items: Iterable[int], columns: int, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """The ``columns`` (len(items), *shape) of ``normal(key, items, (columns, *shape))``, one after another and drawn as
    they are taken, ``BLOCK`` numbers at a time.
    """
    streams = list(_streams(key, map(int, items)))
    at_once = max(1, BLOCK // max(1, len(streams) * math.prod(shape)))
    for first in range(0, columns, at_once):
        yield from _drawn(streams, (min(at_once, columns - first), *shape)).unbind(1)


def _drawn(streams: list[np.random.Generator], shape: tuple[int, ...]) -> Tensor:
    """The next numbers of each stream, (len(streams), *shape)."""
    out = np.empty((len(streams), *shape), dtype=np.float32)
    for row, of in zip(out, streams):
        of.standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(out)
