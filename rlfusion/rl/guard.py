"""Guards of the updates: a learner that notices when an update went wrong, and undoes it.

An update is bad when

    (1)  a gradient or a reward is not finite (nothing has been changed then)
    (2)  the gradient norm is above ``grad_norm`` times the median of the last ``WINDOW`` good updates
    (3)  the largest |log ratio| is above ``log_ratio``, or for latents of d > ``FEATURES`` dimensions above
         d / ``FEATURES`` times that
    (4)  the reward has fallen below the best good rollout by ``reward_fall`` standard deviations of the first rollout

    (5)  the effective share of the walks under the weights of older ones is below ``ess_stop``: this ends the run

and then, by ``action``, the run goes on from the weights before it ("skip"), from those of ``DEPTH`` good updates ago
("rollback"), as if nothing had been ("warn"), or ends ("halt"). After ``patience`` bad updates in a row it ends in any
case. The next rollout is drawn anew. ``diagnosis.md`` records every bad update; without a folder it is logged as a
warning.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any, Literal

from rlfusion.common import storage
from rlfusion.common.copies import copied
from rlfusion.common.errors import ConfigError, NumericalError, StateError, require_positive
from rlfusion.common.weights import require_entries
from rlfusion.models.lora_dropout import dropped
from rlfusion.rl.agent import NEEDED, UNSCORED, AgentLearner, wrong_metrics
from rlfusion.rollout.trajectory import Trajectory

WINDOW, FEWEST, DEPTH, FEATURES = 20, 4, 3, 1000
FILE = "diagnosis.md"
NOTHING: Mapping[str, float] = MappingProxyType({})
_log = logging.getLogger(__name__)

ADVICE = {
    "finite": "look at the reward and at the precision; a smaller learning rate; a kernel without tiny noise",
    "grad_norm": "a smaller learning rate or max_grad_norm; more walks; a KL to the base (agent.kl_loss)",
    "log_ratio": "a smaller agent.pace or learning rate; fewer updates a rollout (epochs, updates_per_epoch)",
    "staleness": "a smaller rollout.lag or learning rate; fewer updates a rollout; guard.ess_stop is the limit",
    "reward": "the policy is collapsing: a smaller learning rate, a KL to the base, fewer updates a rollout",
}


@dataclass(frozen=True)
class Config:
    """Settings of the guards of the updates.

    Attributes:
        action: what a bad update leads to: "skip", "rollback", "halt" or "warn".
        grad_norm: limit of the gradient norm, in medians of the last good updates.
        log_ratio: limit of |log p_theta - log p_old|, in nats; times d / 1000 for latents of d > 1000 dimensions.
        reward_fall: limit of the fall of a rollout's mean reward, in standard deviations of the first one's rewards.
        patience: bad updates in a row after which the run ends.
        ess_warn: effective share of walks of older weights (behaviour_ess, where rollout.lag >= 1) below which a line
            says so,
        ess_slow: below which the lag is one less from then on,
        ess_stop: and below which the run ends.
    """

    action: Literal["skip", "rollback", "halt", "warn"] = "skip"
    grad_norm: float = 30.0
    log_ratio: float = 1000.0
    reward_fall: float = 4.0
    patience: int = 3
    ess_warn: float = 0.5
    ess_slow: float = 0.25
    ess_stop: float = 0.05

    def __post_init__(self) -> None:
        require_positive(self, "grad_norm", "log_ratio", "reward_fall", "patience")
        if not 0 <= self.ess_stop <= self.ess_slow <= self.ess_warn <= 1:
            raise ConfigError(
                f"ess_stop, ess_slow, ess_warn = {self.ess_stop:g}, {self.ess_slow:g}, {self.ess_warn:g}: expected "
                "shares 0 <= ess_stop <= ess_slow <= ess_warn <= 1"
            )


@dataclass(frozen=True)
class Alarm:
    """Why an update is bad: which guard, and the sentence for people."""

    guard: str
    message: str


class Guarded:
    """A learner behind the guards; its ``update`` metrics have ``skipped``, the bad updates so far, in addition.

    Attributes:
        told: the line about the last update, why it was bad, what was done and what to change; "" if it was good.
        plain: gives the ``reward`` and ``reward_std`` of the last rollout that Eq. (4) looks at, where they are not
            those that are learned from: these change with the multipliers of constraints.
    """

    def __init__(self, learner: AgentLearner, config: Config, folder: Path | None, asks: bool = True) -> None:
        """``asks`` says whether the walks of rollouts are scored, or for what they are asked, at all."""
        self.learner, self.config, self.folder, self.asks = learner, config, folder, asks
        self.norms: list[float] = []
        self.first_std = self.best = math.nan
        self.bad = self.bad_in_a_row = 0
        self.told = ""
        self.plain: Callable[[], Mapping[str, float]] = lambda: NOTHING
        self.good: list[dict[str, Any]] = []
        self._kept: dict[str, Any] | None = None  # memory of the copy that undoes an update

    def update(self, batch: Trajectory) -> dict[str, float]:
        """The learner's update, or its undoing.

        Raises:
            NumericalError: the run ends here; the weights are the last good ones.
            ConfigError: what the learner returns is no metrics.
        """
        before, self.told = self._before(), ""
        iteration, queries = self.learner.iteration, self.learner.queries + self.asks * len(batch)
        try:
            with dropped(self.learner.policy, self.learner.seed, iteration):
                metrics = _metrics(self.learner.update(batch), batch)
            alarm = self._judge({**metrics, **self.plain()}, batch)
        except NumericalError as error:
            metrics, alarm = {"reward": _mean_reward(batch)} if self.asks else {}, Alarm("finite", str(error))
        except BaseException:  # a stop, or the user's own code: as if the update had not begun
            self._put_back(before)
            raise
        queries = max(queries, self.learner.queries)  # what was asked for stays asked for
        if alarm is None:
            self._accept({**metrics, **self.plain()})
            return metrics | {"skipped": float(self.bad)}
        self._refuse(alarm, before, iteration)
        self.learner.iteration = iteration + 1
        self.learner.queries = queries
        return metrics | {"skipped": float(self.bad)}

    def _before(self) -> dict[str, Any] | None:
        """What undoes the update to come, in the memory of the one before; None where nothing will."""
        if self.config.action == "warn":
            return None
        self._kept = copied(self.learner.state_dict(), self._kept)
        return self._kept

    def _put_back(self, state: dict[str, Any] | None) -> None:
        """Let the learner be as it was; it may keep the tensors of ``state``, which are its own from here on."""
        if state is not None:
            self._kept = None
            self.learner.load_state_dict(state)

    def _judge(self, metrics: dict[str, float], batch: Trajectory) -> Alarm | None:
        """Eq. (2) to (4)."""
        c, norm = self.config, metrics["grad_norm"]
        if len(self.norms) >= FEWEST and 0 < c.grad_norm * median(self.norms) < norm:
            return Alarm("grad_norm", f"gradient norm {norm:.3g}, {norm / median(self.norms):.0f} times the median")
        ratio = metrics.get("log_ratio_max", 0.0)
        if ratio > c.log_ratio and ratio > c.log_ratio * batch.x.shape[2:].numel() / FEATURES:
            return Alarm("log_ratio", f"max |log ratio| = {ratio:.3g} nats")
        if (share := metrics.get("behaviour_ess", 1.0)) < c.ess_stop:
            return Alarm("staleness", f"{share:.3g} of the walks of older weights count, below {c.ess_stop:g}")
        fall = self.best - metrics.get("reward", math.nan)
        if fall > c.reward_fall * self.first_std:
            return Alarm("reward", f"reward {metrics['reward']:.4g}, {fall / self.first_std:.1f} sd below its best")
        return None

    def _accept(self, metrics: dict[str, float]) -> None:
        self.bad_in_a_row = 0
        self.norms = [*self.norms, metrics["grad_norm"]][-WINDOW:]
        if "reward" in metrics:
            if math.isnan(self.first_std):
                self.first_std, self.best = metrics["reward_std"] or math.nan, metrics["reward"]
            self.best = max(self.best, metrics["reward"])
        if self.config.action == "rollback":
            oldest = self.good.pop(0) if len(self.good) == DEPTH else None
            self.good.append(copied(self.learner.state_dict(), oldest))

    def _refuse(self, alarm: Alarm, before: dict[str, Any] | None, iteration: int) -> None:
        """Undo the update as ``action`` says, write it down, and end the run where it has to end."""
        self.bad, self.bad_in_a_row = self.bad + 1, self.bad_in_a_row + 1
        action = self.config.action
        ends = action == "halt" or alarm.guard == "staleness" or self.bad_in_a_row >= self.config.patience
        older = action == "rollback" and self.good
        self._put_back(copied(self.good[0]) if older and before is not None else before)
        done = {"skip": "its update was undone", "rollback": f"the weights of up to {DEPTH} good updates ago are back"}
        what = "the run ends here" if ends else done.get(action, "nothing was done about it")
        self._write(alarm, iteration, what)
        if ends:
            where = f". {self.folder / FILE} says what was seen" if self.folder else ""
            raise NumericalError(f"rollout {iteration + 1}: {alarm.message}; {what}{where}")

    def _write(self, alarm: Alarm, iteration: int, what: str) -> None:
        norms = ", ".join(f"{n:.3g}" for n in self.norms[-8:])
        self.told = f"rollout {iteration + 1}: {alarm.message}; {what}; what helps: {ADVICE[alarm.guard]}"
        if self.folder is None:
            _log.warning("%s", self.told)
            return
        lines = [
            f"## Rollout {iteration + 1}: {alarm.guard}",
            "",
            f"- seen: {alarm.message}",
            f"- done: {what} ({self.bad_in_a_row} bad update(s) in a row, {self.bad} in all)",
            f"- gradient norms of the last good updates: {norms or 'none yet'}",
            f"- best reward of a good rollout: {self.best:.4g}",
            f"- what helps: {ADVICE[alarm.guard]}",
            "",
            "",
        ]
        storage.append(self.folder / FILE, "\n".join(lines))

    def state_dict(self) -> dict[str, Any]:
        return {"learner": self.learner.state_dict(), "guard": self._own()}

    def _own(self) -> dict[str, Any]:
        own = {"norms": self.norms, "first_std": self.first_std, "best": self.best}
        return own | {"bad": self.bad, "bad_in_a_row": self.bad_in_a_row, "good": self.good}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        require_entries(state, self.state_dict(), "the guarded learner")
        require_entries(state["guard"], self._own(), "the guard", {"first_std": float})
        if not all(isinstance(norm, float) for norm in state["guard"]["norms"]):
            raise StateError("the guard: 'norms' holds other things than numbers")
        for good in state["guard"]["good"]:
            require_entries(good, self.learner.state_dict(), "one of the guard's 'good' states")
        self.learner.load_state_dict(state["learner"])
        for name, value in state["guard"].items():
            setattr(self, name, value)


def _mean_reward(batch: Trajectory) -> float:
    """The mean of the rewards of a rollout that are finite; NaN where there is none."""
    held = batch.reward[batch.reward.isfinite()] if batch.reward is not None else None
    return held.mean().item() if held is not None and len(held) else math.nan


def _metrics(told: Any, batch: Trajectory) -> dict[str, float]:
    """What a learner's update returned, with the spread of the rollout's rewards where it does not say."""
    if wrong := wrong_metrics(told, NEEDED if batch.reward is not None else UNSCORED):
        raise ConfigError(f"the learner's update: {', '.join(wrong)} (docs/doors.md)")
    metrics = {name: float(value) for name, value in told.items()}
    if "reward" not in metrics:
        return metrics
    spread = math.nan if batch.reward is None else batch.reward.std(correction=0).item()
    return {"reward_std": spread, **metrics}
