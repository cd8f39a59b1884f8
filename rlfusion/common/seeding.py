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
    return next(_generators(key[:-1], key[-1:]))


def streams(key: tuple[Key, ...], items: Iterable[Key]) -> Iterator[np.random.Generator]:
    """``stream(*key, item)`` for each item, in one generator that begins each in turn: draw from it before you take the
    next. A generator of its own takes four times as long to make.
    """
    philox = np.random.Philox(_Words(bytes(16)))
    generator, beginning = np.random.Generator(philox), philox.state
    for digest in _digests(key, items):
        beginning["state"]["key"] = np.frombuffer(digest, dtype=np.uint64)
        philox.state = beginning
        yield generator


def _generators(key: tuple[Key, ...], items: Iterable[Key]) -> Iterator[np.random.Generator]:
    """``stream(*key, item)`` for each item, each a generator of its own."""
    return (np.random.Generator(np.random.Philox(_Words(digest))) for digest in _digests(key, items))


def _digests(key: tuple[Key, ...], items: Iterable[Key]) -> Iterator[bytes]:
    """The Philox key of each item; what their keys have in common is hashed once."""
    common = hashlib.blake2b("".join(f"{_text(part)}\x1f" for part in key).encode(), digest_size=16)
    for item in items:
        hashed = common.copy()
        hashed.update(_text(item).encode())
        yield hashed.digest()


def _text(part: Key) -> str:
    return f"{type(part).__name__}:{part}"


def integer(*key: Key) -> int:
    """A 63-bit seed for libraries that want an integer."""
    return int(stream(*key).integers(0, 2**63 - 1))


def normal(key: tuple[Key, ...], items: Iterable[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 noise (len(items), *shape); row i depends on ``key`` and ``items[i]`` alone."""
    of = [int(item) for item in items]
    return _drawn(streams(key, of), len(of), shape)


def normals(key: tuple[Key, ...], items: Iterable[int], columns: int, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """The ``columns`` (len(items), *shape) of ``normal(key, items, (columns, *shape))``, one after another and drawn as
    they are taken, ``BLOCK`` numbers at a time.
    """
    of = [int(item) for item in items]
    at_once = max(1, BLOCK // max(1, len(of) * math.prod(shape)))
    if columns <= at_once:
        yield from normal(key, of, (columns, *shape)).unbind(1)
        return
    held = list(_generators(key, of))
    for first in range(0, columns, at_once):
        yield from _drawn(held, len(held), (min(at_once, columns - first), *shape)).unbind(1)


def _drawn(each: Iterable[np.random.Generator], count: int, shape: tuple[int, ...]) -> Tensor:
    """The next numbers of each of ``count`` streams, (count, *shape)."""
    out = np.empty((count, *shape), dtype=np.float32)
    for row, of in zip(out, each):
        of.standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(out)
