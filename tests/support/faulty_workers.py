"""Ray workers that go wrong once, in whichever process comes first."""

from pathlib import Path
from typing import Any

import ray

from rlfusion.rollout.ray_backend import Worker


def first(marker: str) -> bool:
    """Whether this is the first call for a marker, in any process."""
    try:
        Path(marker).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


class Flipping(Worker):
    """Gets weights of which one byte was flipped on the way."""

    def run(self, item: dict[str, Any], version: int, sha256: str, blob: list[ray.ObjectRef]) -> tuple[str, bytes]:
        if version > 0 and first(f"{self.task.reward_name}.flipped"):
            damaged = bytearray(ray.get(blob[0]))
            damaged[-3] ^= 4
            return super().run(item, version, sha256, [ray.put(bytes(damaged))])
        return super().run(item, version, sha256, blob)


class Stale(Worker):
    """Has the weights of the version before."""

    def run(self, item: dict[str, Any], version: int, sha256: str, blob: list[ray.ObjectRef]) -> tuple[str, bytes]:
        if version > 0 and first(f"{self.task.reward_name}.stale"):
            return super().run(item, version - 1, sha256, blob)
        return super().run(item, version, sha256, blob)
