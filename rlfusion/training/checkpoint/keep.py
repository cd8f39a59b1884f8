"""Which checkpoints stay, and how they are written."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rlfusion.common.errors import ConfigError, require_not_negative, require_positive, unknown

METRIC = "metric"
"""The entry of a manifest that holds the name and value of the metric by which a best checkpoint is kept."""


@dataclass(frozen=True)
class Keep:
    """The checkpoints of a run that stay, and how they are written.

    Attributes:
        last: the newest so many, 1 at least.
        every: also those after a number of updates that is a multiple of this; 0 for none.
        best: also the one whose metric of training is best, by its name in metrics.jsonl without "train/" (of another
            command "pretrain/", "distill/"), such as reward; empty for none. Of equal ones it is the earliest.
        lowest: the best value is the lowest, not the highest.
        background: a checkpoint is written from a copy while training goes on, which takes as much memory of the CPU as
            the checkpoint has; else training waits for it.

    Raises:
        ConfigError: ``last`` below 1, ``every`` below 0, or ``lowest`` without ``best``.
    """

    last: int = 3
    every: int = 0
    best: str = ""
    lowest: bool = False
    background: bool = True

    def __post_init__(self) -> None:
        require_positive(self, "last")
        require_not_negative(self, "every")
        if self.lowest and not self.best:
            raise ConfigError("checkpoints.lowest = true without checkpoints.best: expected the name of a metric there")

    def metric(self, metrics: Mapping[str, float]) -> dict[str, Any] | None:
        """What the manifest of a checkpoint says of the metric ``best``; None where no best one is kept. An update that
        was undone may lack it: it is not the best one.
        """
        value = float(metrics.get(self.best, math.nan))
        return {"name": self.best, "value": value if math.isfinite(value) else None} if self.best else None

    def require(self, metrics: Mapping[str, float]) -> None:
        """Refuse a name that is none of ``metrics``, those of the first update.

        Raises:
            ConfigError: no such metric.
        """
        if self.best and self.best not in metrics:
            raise unknown("metric in checkpoints.best", self.best, sorted(metrics))

    def stay(self, held: list["Held"]) -> set[int]:
        """The steps of the checkpoints that stay, of those ``held``: the newest, every so many-th, and the best."""
        steps = sorted(one.step for one in held)
        kept = set(steps[-self.last :])
        if self.every:
            kept |= {step for step in steps if step % self.every == 0}
        sign = -1 if self.lowest else 1
        known = [(sign * one.value, -one.step) for one in held if self.best and one.value is not None]
        return kept | ({-max(known)[1]} if known else set())

    def held(self, step: int, path: Path) -> "Held":
        """A checkpoint on disk, with its value of the metric ``best`` where its manifest says one."""
        if not self.best:
            return Held(step, None)
        try:
            said = json.loads((path / "manifest.json").read_text()).get(METRIC) or {}
        except (OSError, ValueError, AttributeError, RecursionError):  # damaged: it is not the best of anything
            return Held(step, None)
        value = said.get("value") if said.get("name") == self.best else None
        return Held(step, value if isinstance(value, float) else None)


NEWEST = Keep(last=1)
"""The newest alone."""


class Held(NamedTuple):
    """A checkpoint of ``step`` updates, and its value of the metric, where that is known and finite."""

    step: int
    value: float | None
