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
"""Bytes. Blocks above it have new pages each time, for some 5 to 15 % more time of an update."""
M_MMAP_THRESHOLD = -3
TUNED = ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
"""By these the user says it himself."""


def give_back_large_blocks(device: torch.device | str) -> bool:
    """Keep the limit at ``LIMIT`` in this process from here on, where tensors are on the CPU and glibc has its memory;
    whether that was done.
    """
    if torch.device(device).type != "cpu" or platform.libc_ver()[0] != "glibc" or any(map(os.environ.get, TUNED)):
        return False
    return bool(ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LIMIT))
