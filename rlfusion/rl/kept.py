"""What a learner keeps in checkpoints: its optimisation, the counts of its updates and queries, policies that are not
trained, and parts of its own.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from rlfusion.common.weights import learned, require_entries, restore
from rlfusion.training.optimization import Optimization


class Counting(Protocol):
    """A learner with one optimisation, that counts."""

    optimization: Optimization
    iteration: int
    queries: int

    def state_dict(self) -> dict[str, Any]: ...


class Part(Protocol):
    """A part of it with a state."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


Policies = Mapping[str, nn.Module | None]
"""By name; None for one that the settings do not ask for, of which nothing is kept."""


def state_of(learner: Counting, policies: Policies, **parts: Part) -> dict[str, Any]:
    """The state of ``learner``, ``policies`` and ``parts``, by name."""
    own = {name: part.state_dict() for name, part in parts.items()}
    fixed = {name: learned(policy) for name, policy in policies.items() if policy is not None}
    counts = {"iteration": learner.iteration, "queries": learner.queries}
    return {"optimization": learner.optimization.state_dict()} | own | counts | fixed


def put_back(state: dict[str, Any], learner: Counting, policies: Policies, **parts: Part) -> None:
    """Load what ``state_of`` gave.

    Raises:
        StateError: it is of another learner.
    """
    require_entries(state, learner.state_dict(), "the learner")
    learner.optimization.load_state_dict(state["optimization"])
    for name, part in parts.items():
        part.load_state_dict(state[name])
    learner.iteration, learner.queries = state["iteration"], state["queries"]
    for name, policy in policies.items():
        if policy is not None:
            restore(policy, state[name])
