"""Settings of a diffusers scheduler as their class has them: a switch is true or false, a number finite.

A class of the library takes whatever a file holds: "no" is then a switch that is on, "3" an error of its arithmetic.
"""

import inspect
import math
from collections.abc import Mapping
from typing import Any

from rlfusion.common.errors import ConfigError, shorten

MOST_TIMES = 10**6
"""Times of a table; diffusers makes it before anything can be said of it."""

KINDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text"}


def require_typed(made: type, config: Mapping[str, Any], place: str) -> None:
    """
    Raises:
        ConfigError: names the setting of the file at ``place`` that is of another kind than its default in ``made``, or
            a table of too many times.
    """
    for name, parameter in inspect.signature(made.__init__).parameters.items():
        if name not in config or parameter.default is inspect.Parameter.empty:
            continue
        if expected := _expected(name, config[name], parameter):
            given = f"scheduler {made.__name__}: {name} = {shorten(repr(config[name]), 40)}"
            raise ConfigError(f"{given}: expected {expected} (in {place})")


def _expected(name: str, value: Any, parameter: inspect.Parameter) -> str:
    """What a value of this parameter is expected to be; "" for one that fits."""
    default = parameter.default
    if name == "num_train_timesteps" and not (type(value) is int and 0 < value <= MOST_TIMES):
        return f"a whole number, 1 to {MOST_TIMES}"
    if value is None:
        return "" if default is None or isinstance(default, bool) else KINDS.get(type(default), "")
    if default is None:  # the library says no more of its kind than its annotation
        return "a number" if isinstance(value, str) and "str" not in str(parameter.annotation) else ""
    if isinstance(default, float):
        fits = type(value) in (int, float) and (math.isfinite(value) or value == default)
        return "" if fits else KINDS[float]
    return "" if type(value) is type(default) or type(default) not in KINDS else KINDS[type(default)]
