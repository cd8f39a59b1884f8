"""A learning rate that follows how far the policy moves, in a unit that carries over from one model to another.

The unit is the shift b of a transition: how far its mean has moved since the rollout, root mean square over the d
dimensions of the latent, in standard deviations of the transition's noise. Then log r is a Gaussian of mean -d b^2 / 2
(a KL of b^2 / 2 nats a dimension) and standard deviation sqrt(d) b. A typical |log r| is the sum of the two, so that

    (1)  b = (sqrt(1 + 2 m) - 1) / sqrt(d),    m = median |log r| = sqrt(d) b + d b^2 / 2

An optimiser step of AdamW moves every weight by about the learning rate, the first by just that, whatever the
gradient. How far the policy moves by it depends on the width of the layers, on guidance and on the chain. So each
optimiser step but the first of a rollout, the one after j of n, looks at the ratios from which its gradient is made:

    (2)  b > 1.5 pace j / n:  the share of the learning rate is halved
         b <  .5 pace j / n:  it is doubled, up to 1

A fresh optimiser begins with the share ``START``. The ratios are those of all ranks, and so is the share.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rlfusion.common.errors import ConfigError, StateError
from rlfusion.common.weights import require_entries

START = 1 / 16
ADAPTERS = 1e-2
"""The largest learning rate of adapters, whose weights begin at 0 and are few."""


def require_pace(pace: float | None) -> None:
    """Raise ConfigError for a setting ``pace`` that is no shift."""
    if pace is not None and not 0 < pace < math.inf:
        raise ConfigError(f"pace = {pace}: expected a number > 0, such as 0.1, or null for a learning rate as it is")


def require_followed(pace: float | None, updates: int) -> None:
    """Raise ConfigError for a pace where a rollout gives one update: no ratio tells how far it moved, Eq. (2)."""
    if pace is not None and updates < 2:
        raise ConfigError(
            f"pace = {pace} with one update a rollout: the learning rate follows the ratios of the updates after the "
            "first, and would stay a sixteenth; expected epochs or updates_per_epoch 2 at least, or pace null"
        )


def said(pace: float | None, lr: float) -> str:
    """The end of the line that says what a learner does with each rollout."""
    return "" if pace is None else f"; the learning rate, at most {lr:g}, follows a shift of {pace:g} a rollout"


def of_pipelines(told: Mapping[str, Any]) -> dict[str, float]:
    """The defaults of ``pace`` and ``lr`` beside these settings of a pretrained pipeline, where a pass of four updates
    is usual: adapters have a learning rate of their own, and one update a rollout has none to follow.
    """
    if str(told.get("updates_per_epoch")) == "1" and str(told.get("epochs") or 1) == "1":
        return {}
    return {"pace": 0.1} | ({"lr": ADAPTERS} if told.get("lora") else {})


def shift_of(log_ratio: Tensor, features: int) -> float:
    """Eq. (1) of some transitions (N,) of latents of so many dimensions; 0 for none."""
    typical = log_ratio.abs().median().item() if len(log_ratio) else 0.0
    return (math.sqrt(1 + 2 * typical) - 1) / math.sqrt(features)


class Pace:
    """The share of the learning rate that the next optimiser step has, Eq. (2); always 1 without a ``target``."""

    def __init__(self, target: float | None) -> None:
        self.target, self.share, self.shift = target, 1.0 if target is None else START, 0.0

    def heed(self, records: list[dict[str, Tensor]], done: int, total: int, features: int) -> float:
        """The share of the step whose gradient is made of ``records``, after ``done`` of the ``total`` of a rollout."""
        if self.target is None or not done:
            return self.share
        self.shift, due = shift_of(torch.cat([r["log_ratio"] for r in records]), features), self.target * done / total
        if self.shift > 1.5 * due:
            self.share /= 2
        elif self.shift < due / 2:
            self.share = min(1.0, 2 * self.share)
        return self.share

    def told(self) -> dict[str, float]:
        """lr_share and shift, the last that was looked at, for the metrics of an update; nothing without a target."""
        return {} if self.target is None else {"lr_share": self.share, "shift": self.shift}

    def kept(self) -> dict[str, "Pace"]:
        """What of a learner's state is the pace's; nothing without a target."""
        return {} if self.target is None else {"pace": self}

    def state_dict(self) -> dict[str, Any]:
        return {"share": self.share}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises StateError where it is of something else."""
        require_entries(state, self.state_dict(), "the pace")
        if not 0 < state["share"] <= 1:
            raise StateError(f"the pace's 'share' of a learning rate is {state['share']}, expected one in (0, 1]")
        self.share = state["share"]
