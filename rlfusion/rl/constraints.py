"""Constraints on the means of rewards, each with a Lagrange multiplier that dual ascent finds.

    maximise  E[R]   subject to  s_c (E[g_c] - b_c) >= 0,      s_c = 1 for >=, -1 for <=
    (1)  what is learned from:   R + sum_c m_c s_c (g_c - b_c),      m_c >= 0
    (2)  after each rollout:     m_c <- max(0, m_c + rate u_c s_c (b_c - mean of g_c) / d_c)

with d_c the standard deviation of g_c on the base model's samples, and u_c the unit of m_c: where rewards are added as
they are, (1) wants std of R / std of g_c, else 1. So ``rate`` has no unit: a constraint that is missed by a standard
deviation of the base's rewards has as much weight as the reward after 1 / rate rollouts. At a fixed point of (2) the
policy is best for (1), and m_c > 0 only where the constraint binds: the conditions of Karush, Kuhn and Tucker.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self, cast

from rlfusion.common.code_files import absolute
from rlfusion.common.errors import ConfigError, shorten

BASE = "base"
FORM = re.compile(r"\s*(\S(?:.*\S)?)\s*(>=|<=)\s*(\S+)\s*")
EXPECTED = 'expected "REWARD >= base", or a number in place of base, or <='


@dataclass(frozen=True)
class Constraint:
    """The mean of the reward ``name`` is at least (``>=``) or at most (``<=``) the ``bound``; None for the mean of the
    base model's.
    """

    name: str
    sense: Literal[">=", "<="]
    bound: float | None

    @classmethod
    def parse(cls, text: str) -> Self:
        """The constraint that a text says.

        Raises:
            ConfigError: it says none.
        """
        match = FORM.fullmatch(text) if isinstance(text, str) else None
        if match is None or re.search(r"[<>=]", match[1]):
            raise ConfigError(f"constraint = {shorten(repr(text))}: {EXPECTED}")
        name, sense, bound = match.groups()
        try:
            value = None if bound == BASE else float(bound)
        except ValueError:
            value = math.nan
        if value is not None and not math.isfinite(value):
            raise ConfigError(f"constraint = {shorten(repr(text))}: {bound!r} is no finite number, {EXPECTED}")
        return cls(name, cast(Literal[">=", "<="], sense), value)

    @property
    def sign(self) -> int:
        """s_c."""
        return 1 if self.sense == ">=" else -1

    def __str__(self) -> str:
        return f"{self.name} {self.sense} {BASE if self.bound is None else repr(self.bound).removesuffix('.0')}"


def parsed(texts: Sequence[str], names: Mapping[str, str]) -> tuple[Constraint, ...]:
    """The constraints that texts say, each of the whole name of its reward.

    Args:
        names: of rewards that are asked anyway, whole names by short ones.

    Raises:
        ConfigError: a text that says none, two of one reward and sense, or two that nothing can meet.
    """
    found: dict[tuple[str, str], Constraint] = {}
    for text in texts:
        one = Constraint.parse(text)
        whole = one.name if one.name in names.values() else names.get(one.name, absolute(one.name))
        one = Constraint(whole, one.sense, one.bound)
        if (one.name, one.sense) in found:
            raise ConfigError(f"constraint = {text!r}: {found[one.name, one.sense]!s} is given as well, expected one")
        found[one.name, one.sense] = one
    for (name, sense), low in found.items():
        high = found.get((name, "<="))
        if sense == ">=" and high and None not in (low.bound, high.bound) and low.bound > high.bound:  # type: ignore[operator]
            raise ConfigError(f"constraint = {str(low)!r}, {str(high)!r}: no mean is both, expected a bound below")
    return tuple(found.values())


def tags(constraints: Sequence[Constraint], labels: Mapping[str, str]) -> list[str]:
    """A short name of each for logs: the short name of its reward, with ``_low`` or ``_high`` where both are bound."""
    names = [one.name for one in constraints]
    ends = {">=": "_low", "<=": "_high"}
    return [labels[one.name] + (ends[one.sense] if names.count(one.name) > 1 else "") for one in constraints]


def ascended(multiplier: float, rate: float, unit: float, missed: float, std: float) -> float:
    """Eq. (2): the next multiplier, ``missed`` being s_c (b_c - mean of g_c)."""
    return max(0.0, multiplier + rate * unit * missed / std)
