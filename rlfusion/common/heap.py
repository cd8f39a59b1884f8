"""The heap of the C library, where memory counts for more than time.

Blocks above a limit are the kernel's own and are given back as they are freed. glibc raises that limit, up to 32 MiB,
each time such a block is freed; the tensors of a network then lie in its heap, among small ones that stay, and what is
freed between those is not given back: four times what is in use, as seen in a gradient through several steps.
"""

import ctypes
import os
import platform

import torch

LIMIT = 2**18
"""Bytes. Blocks above it have new pages each time, which the kernel makes and clears. Of an update of a small pipeline
that is 5 to 15 % more time; where there is little work for each byte it is most of the time: a loop of nothing but silu
of 1 MiB takes 5 times as long, one of a product and a sum 13 times.
"""
M_MMAP_THRESHOLD = -3
TUNED = {"MALLOC_MMAP_THRESHOLD_": "", "GLIBC_TUNABLES": "mmap_threshold"}
"""By these variables the user says it himself, where the second, which has more in it, names the limit."""


def give_back_large_blocks(device: torch.device | str) -> bool:
    """Keep the limit at ``LIMIT`` in this process from here on, where tensors are on the CPU and glibc has its memory;
    whether that was done.

    It is of the whole process and is not undone, so it is for a training that begins, not for what may be made there.
    """
    told = any(os.environ.get(name) and key in os.environ[name] for name, key in TUNED.items())
    if told or torch.device(device).type != "cpu" or platform.libc_ver()[0] != "glibc":
        return False
    return bool(ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LIMIT))
