"""Rewards that are given as Python objects, beside those that are named: each gets a name for settings and errors."""

from collections.abc import Callable, Mapping
from typing import Any

from rlfusion.common.errors import ConfigError, shorten


def named(
    reward: str | Callable[..., Any] | Mapping[str | Callable[..., Any], float],
) -> tuple[str | dict[str, float], dict[str, Any]]:
    """The setting that says the same by names alone, and the objects by their names.

    A function is called as it is called in Python, another object as its class.

    Raises:
        ConfigError: something that is no reward, a weight that is no number, or two of one name.
    """
    if not isinstance(reward, Mapping):
        name = _name(reward)
        return name, {} if isinstance(reward, str) else {name: reward}
    names: dict[str, float] = {}
    for one, weight in reward.items():
        if _name(one) in names:
            raise ConfigError(f"reward {_name(one)!r} is given twice: expected two names")
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ConfigError(f"reward {_name(one)!r} = {shorten(repr(weight))}: expected a number, its weight")
        names[_name(one)] = weight
    return names, {_name(one): one for one in reward if not isinstance(one, str)}


def _name(reward: Any) -> str:
    if isinstance(reward, str):
        return reward
    if not callable(reward) and not callable(getattr(reward, "score", None)):
        raise ConfigError(
            f"reward = {shorten(repr(reward))}: expected a name, a callable (samples, cond) -> (B,), or a mapping of "
            "such to weights"
        )
    return str(getattr(reward, "__name__", type(reward).__name__))
