"""Randomness keyed by what it is for, never by who draws it.

Every random number of a run comes from a counter-based stream (Philox 4x64) whose 128-bit key is the BLAKE2b hash of
(seed, purpose, iteration, item, ...). So the same configuration draws the same numbers on 0 or N workers, for any
batch size, interrupted or not; and the stream of a sample holds the noises of all its denoising steps, in order.
"""

import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

Key = int | str


def stream(*key: Key) -> np.random.Generator:
    """The generator of one key. Keys that differ in any part give independent streams."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64)))


def integer(*key: Key) -> int:
    """A 63-bit seed for libraries that want an integer."""
    return int(stream(*key).integers(0, 2**63 - 1))


def normal(key: tuple[Key, ...], items: Iterable[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 noise (len(items), *shape); row i depends on ``key`` and ``items[i]`` alone."""
    items = list(items)
    out = np.empty((len(items), *shape), dtype=np.float32)
    for row, item in zip(out, items):
        stream(*key, int(item)).standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(out)
