"""Ray workers that go wrong once, in whichever process comes first."""

from pathlib import Path
from typing import Any

import ray

from rlfusion.common.weights import Weights
from rlfusion.rollout.ray_worker import Asked, Worker


def first(marker: str) -> bool:
    """Whether this is the first call for a marker, in any process."""
    try:
        Path(marker).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


class Flipping(Worker):
    """Gets weights of which one byte was flipped on the way."""

    def run(self, item: dict[str, Any], asked: Asked, blob: list[ray.ObjectRef]) -> tuple[Asked, str, bytes]:
        if asked[1] > 0 and first(f"{self.task.reward_name}.flipped"):
            damaged = bytearray(ray.get(blob[0]))
            damaged[-3] ^= 4
            return super().run(item, asked, [ray.put(bytes(damaged))])
        return super().run(item, asked, blob)


class Stale(Worker):
    """Is told to act under the weights of the version before."""

    def run(self, item: dict[str, Any], asked: Asked, blob: list[ray.ObjectRef]) -> tuple[Asked, str, bytes]:
        if asked[1] > 0 and first(f"{self.task.reward_name}.stale"):
            return super().run(item, (asked[0], asked[1] - 1, asked[2]), blob)
        return super().run(item, asked, blob)


class Behind(Worker):
    """Goes on under the weights that it has, once."""

    def load(self, weights: Weights) -> None:
        if weights.version < 2 or not first(f"{self.task.reward_name}.behind"):
            super().load(weights)


class Elsewhere(Worker):
    """Answers for another run, once."""

    def run(self, item: dict[str, Any], asked: Asked, blob: list[ray.ObjectRef]) -> tuple[Asked, str, bytes]:
        acted, text, walks = super().run(item, asked, blob)
        other = (f"another-{acted[0]}", *acted[1:])
        return (other if first(f"{self.task.reward_name}.elsewhere") else acted), text, walks
