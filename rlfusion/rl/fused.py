"""Agents whose one update of a rollout takes the rollout's own forward pass (``fused``; ``rollout.graphed``).

At the weights that walk every ratio is 1: a second forward pass would tell what is known. So the setting holds where a
rollout gives one update, of walks of this process under the present weights, from the transitions alone.
"""

from collections.abc import Mapping
from typing import Any

from rlfusion.common.errors import ConfigError
from rlfusion.rl.agent import Plan

WHY = "fused = True takes the gradient from the learner's own walks of the present weights"


def is_told(told: Mapping[str, Any]) -> bool:
    """Whether settings, as text or as YAML has them, ask for it."""
    return str(told.get("fused")).lower() == "true"


def require_one_update(found: Mapping[str, tuple[Any, Any]]) -> None:
    """Refuse settings, {name: (what it is, what it has to be)}, that take more than one update or other passes.

    Raises:
        ConfigError: names the first.
    """
    for name, (value, wanted) in found.items():
        if value != wanted:
            raise ConfigError(
                f"fused = True with {name} = {value}: a rollout's own pass serves one update, and nothing but its "
                f"transitions, expected {name} {wanted}, or fused false"
            )


def require_own_walks(plan: Plan) -> None:
    """Raise ConfigError for walks of other processes or of older weights."""
    plan.require_here(WHY)
