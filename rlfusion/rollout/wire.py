"""A trajectory as plain data, a JSON text and one safetensors blob: how it crosses between processes."""

import hashlib
import json
from dataclasses import fields, replace
from typing import NamedTuple

from torch import Tensor

from rlfusion.common.nested import flatten, restore
from rlfusion.common.weights import pack, unpack
from rlfusion.rollout.trajectory import Trajectory

Wire = tuple[str, bytes]
"""A JSON text and a safetensors blob."""


class Acted(NamedTuple):
    """Which weights act: of which run, after how many updates, and their SHA-256."""

    run: str
    version: int
    sha256: str

    def __str__(self) -> str:
        return f"run {self.run!r}, version {self.version}, SHA-256 {self.sha256[:12] or 'none'}"


def to_wire(trajectory: Trajectory) -> Wire:
    """All of a trajectory, whatever its condition."""
    tensors: dict[str, Tensor] = {}
    held = {field.name: getattr(trajectory, field.name) for field in fields(trajectory)}
    record = flatten(held, "trajectory", tensors)
    return json.dumps(record), pack(tensors)


def from_wire(record: str, blob: bytes) -> Trajectory:
    """The trajectory that ``to_wire`` wrote, on the CPU."""
    return Trajectory(**restore(json.loads(record), unpack(blob)))


def digest(trajectory: Trajectory) -> str:
    """SHA-256 of what an item decides of its trajectory: all but what a worker's cache remembered of the rewards."""
    record, blob = to_wire(replace(trajectory, cached=None))
    return hashlib.sha256(record.encode() + blob).hexdigest()
