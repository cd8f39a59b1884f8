"""Walks that outlive their rollout: the newest ones, up to a number, with the rewards that they had."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from rlfusion.common.errors import StateError
from rlfusion.common.weights import require_entries
from rlfusion.rollout.trajectory import Trajectory, concatenate


class Replay:
    """At most ``capacity`` of the newest walks, and never fewer than the last rollout's; 0 keeps none."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held: Trajectory | None = None

    def __len__(self) -> int:
        return 0 if self.held is None else len(self.held)

    def add(self, batch: Trajectory) -> Trajectory:
        """Take in a rollout; what is held now, the newest last, as one record of the rollout's version."""
        new = replace(batch, terms=None)
        if not self.capacity:
            return new
        new = new.whole()
        whole = new if self.held is None else concatenate([replace(self.held, version=new.version), new])
        kept = max(self.capacity, len(new))
        self.held = whole.take(torch.arange(max(0, len(whole) - kept), len(whole)))
        return self.held

    def state_dict(self) -> dict:
        """The walks as tensors, by the names of ``Trajectory``; empty before the first rollout."""
        return {} if self.held is None else {f.name: getattr(self.held, f.name) for f in fields(self.held)}

    def load_state_dict(self, state: dict, device: torch.device | str) -> None:
        """Raises StateError where it is no record of walks."""
        self.held = _walks(state).to(device) if state != {} else None


def _walks(state: Any) -> Trajectory:
    """
    Raises:
        StateError: no record of walks.
    """
    counts = {f.name: 0 for f in fields(Trajectory) if f.type in (int, "int")}
    optional = {f.name: Tensor for f in fields(Trajectory) if "None" in str(f.type)}
    ours = {f.name: counts.get(f.name) for f in fields(Trajectory)}
    require_entries(state, ours, "the replay", optional)
    tensors = {name: state[name] for name in ("x", "times", "group")}
    tensors |= {name: state[name] for name in optional if state[name] is not None}
    tensors |= state["cond"] if isinstance(state["cond"], Mapping) else {"cond": state["cond"]}
    for name, held in tensors.items():
        if not isinstance(held, Tensor) or held.ndim == 0:
            raise StateError(f"the replay: {name!r} is {type(held).__name__}, expected a tensor of all walks")
        if name != "times" and len(held) != len(state["x"]):
            raise StateError(f"the replay: {name!r} is of shape {tuple(held.shape)}, of {len(state['x'])} walks")
    return Trajectory(**state)
