"""Large blocks that are given back as they are freed, in processes of their own."""

import os
import platform
import subprocess
import sys

import pytest

from rlfusion.common.heap import TUNED

CODE = """
import ctypes, gc, torch
from rlfusion.common import heap

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keep")]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
done = heap.give_back_large_blocks({device!r})
for _ in range(3):
    torch.empty(24 * 2**20, dtype=torch.uint8)  # as it is freed, glibc raises its limit to its size
before, sizes = libc.mallinfo2().hblkhd, 4 * [1024 * k for k in range(300, 901, 50)]
held = [torch.empty(size, dtype=torch.uint8) for size in sizes]
print(done, libc.mallinfo2().hblkhd - before >= sum(sizes) / 2)  # some find a hole that the imports have left
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
@pytest.mark.parametrize(
    ("device", "more", "expected"),
    [
        ("cpu", {}, "True True"),
        ("cuda", {}, "False False"),
        ("cpu", {"MALLOC_MMAP_THRESHOLD_": str(2**25)}, "False False"),
        ("cpu", {"GLIBC_TUNABLES": f"glibc.malloc.mmap_threshold={2**25}"}, "False False"),
        ("cpu", {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}, "True True"),
    ],
)
def test_blocks_above_the_limit_are_not_in_the_heap(device, more, expected):
    own = {name: value for name, value in os.environ.items() if name not in TUNED}
    told = subprocess.run(
        [sys.executable, "-c", CODE.format(device=device)], env=own | more, capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == expected
