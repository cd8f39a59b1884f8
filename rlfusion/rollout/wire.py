"""A trajectory as plain data, a JSON text and one safetensors blob: how it crosses between processes."""

import hashlib
import json
from dataclasses import fields, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlfusion.common.nested import flatten, restore
from rlfusion.common.weights import pack, unpack
from rlfusion.rollout.commands import RolloutError
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


def to_wire_apart(trajectory: Trajectory) -> tuple[tuple[str, bytes, str], np.ndarray]:
    """The same in two: all but the states, with the SHA-256 of these; and their bytes (B, N), which a store hands out
    without copies.
    """
    x = trajectory.x.detach().cpu().contiguous()
    states = x.flatten(1).view(torch.uint8).numpy()
    text, blob = to_wire(replace(trajectory, x=x[:0]))
    return (text, blob, hashlib.sha256(states.data).hexdigest()), states


def states_of(states: np.ndarray, sha256: str, head: Trajectory, walks: Tensor) -> Tensor:
    """The states (N, K+1, *) of some of the ``walks`` of an answer in two, a copy.

    Raises:
        RolloutError: they are not those that were announced.
    """
    found = hashlib.sha256(states.data).hexdigest()
    if found != sha256:
        raise RolloutError(f"walks of weights {head.version}: SHA-256 {found}, expected {sha256}")
    rows = torch.from_numpy(states[walks.numpy()])
    return rows.view(head.x.dtype).view(len(walks), *head.x.shape[1:])


def digest(trajectory: Trajectory, states: str = "") -> str:
    """SHA-256 of what an item decides of its trajectory: all but what a worker's cache remembered of the rewards.
    ``states`` is that of states which are elsewhere.
    """
    record, blob = to_wire(replace(trajectory, cached=None))
    return hashlib.sha256(record.encode() + blob + states.encode()).hexdigest()
