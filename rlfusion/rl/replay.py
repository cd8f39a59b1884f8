"""Walks that outlive their rollout: the newest ones, up to a number, with the rewards that they had."""

from dataclasses import fields, replace

import torch

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
        whole = new if self.held is None else concatenate([replace(self.held, version=new.version), new])
        kept = max(self.capacity, len(new))
        self.held = whole.take(torch.arange(max(0, len(whole) - kept), len(whole)))
        return self.held

    def state_dict(self) -> dict:
        """The walks as tensors, by the names of ``Trajectory``; empty before the first rollout."""
        return {} if self.held is None else {f.name: getattr(self.held, f.name) for f in fields(self.held)}

    def load_state_dict(self, state: dict, device: torch.device | str) -> None:
        """Raises StateError where it is no record of walks."""
        if state:
            require_entries(state, {f.name: state.get(f.name) for f in fields(Trajectory)}, "the replay")
        self.held = Trajectory(**state).to(device) if state else None
