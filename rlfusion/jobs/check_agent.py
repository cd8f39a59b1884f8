"""``rlfusion check-agent``: is this algorithm one that can be trained with? A row for each question, and the exit code.

The chain is that of ``rl.check``: two weights theta, and the expected reward J(theta) in closed form.

    gradient    the mean gradient of the first optimiser step, over rollouts of noise of their own, against dJ/dtheta:
                does it point up, and what is the cosine? The learner's loss may be J times a number (an advantage).
    gain        J after ``UPDATES`` rollouts, less J before, over the same
    repeats     the same rollouts again give the same bits
    resume      a learner that takes up the state after one rollout goes on with the same bits
    dropped     walks whose reward failed are left out: what it learns from the rest is finite
    metrics     finite numbers by name, ``grad_norm`` and, of scored walks, ``reward`` among them; the learner counts
                its rollouts and queries

A mean is beyond its noise where it is more than ``SURE`` standard errors from 0.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlfusion.agents import AGENTS
from rlfusion.common import spec
from rlfusion.common.errors import ConfigError, NumericalError, RlfusionError
from rlfusion.common.nested import flatten, restore
from rlfusion.common.user_code import running
from rlfusion.config import CheckAgent
from rlfusion.jobs.check_reward import Finding
from rlfusion.jobs.preflight import preflight
from rlfusion.rl.agent import NEEDED, UNSCORED, Agent, AgentLearner, Plan, learner_of, wrong_metrics
from rlfusion.rl.check import PROMPTS, STEPS, Chain, samples
from rlfusion.rollout.trajectory import Trajectory
from rlfusion.training.devices import set_numerics

UPDATES = 4
SURE = 2.0
SHARE = 4
"""Every so many-th walk fails, where some do."""


@dataclass
class Trial:
    """A chain of its own, with a learner of its policy; ``gradients`` are those of its optimiser's steps."""

    name: str
    chain: Chain
    learner: AgentLearner
    gradients: list[Tensor]

    @classmethod
    def of(cls, agent: Agent) -> "Trial":
        """One with the weights that every trial begins with."""
        chain = Chain.make()
        chain = replace(chain, task=replace(chain.task, rollout_spec=agent.rollout_spec(STEPS)))
        trial = cls(agent.name, chain, learner_of(agent, chain.task, samples(), 0), [])
        trial._listen()
        return trial

    def _listen(self) -> None:
        theta, optimization = self.chain.task.policy.denoiser.net.theta, self.learner.optimization
        step: Callable[..., float] = optimization.step

        def heard(*of: float) -> float:
            if theta.grad is not None:
                self.gradients.append(-theta.grad.double())  # the loss falls
            return step(*of)

        optimization.step = heard  # type: ignore[method-assign]

    def walks(self, settings: CheckAgent, repeat: int, iteration: int) -> Trajectory:
        return self.chain.walks(self.learner.policy, settings.walks, settings.seed + repeat, iteration)

    def learn(self, settings: CheckAgent, repeat: int, updates: range) -> dict[str, float]:
        """Make these updates, each of a rollout under the weights of then; the metrics of the last."""
        metrics: dict[str, float] = {}
        for iteration in updates:
            metrics = self.update(self.walks(settings, repeat, iteration))
        return metrics

    def update(self, batch: Trajectory) -> dict[str, float]:
        """The metrics of one update.

        Raises:
            ConfigError: it returned none.
        """
        told: Any = self.learner.update(batch)
        if not isinstance(told, Mapping):
            raise ConfigError(f"update of agent {self.name!r}: {', '.join(wrong_metrics(told))} (docs/doors.md)")
        return dict(told)


class Mean(NamedTuple):
    """A mean over rollouts and its standard error."""

    value: float
    error: float

    @classmethod
    def of(cls, values: Tensor) -> "Mean":
        return cls(values.mean().item(), values.std().item() / math.sqrt(len(values)))

    def finding(self, check: str, said: str) -> Finding:
        """Whether it is above 0: beyond its noise, within it, or below."""
        sure = abs(self.value) > SURE * self.error
        verdict = "FAILS" if not math.isfinite(self.value) or (sure and self.value < 0) else "ok" if sure else "note"
        within = "" if sure else ", which is within its noise: more --repeats or --walks tell more"
        return Finding(check, verdict, f"{said}{within}")  # type: ignore[arg-type]


def check_agent(settings: CheckAgent) -> Iterator[Finding]:
    """Each check of an agent.

    Raises:
        ConfigError: there is no such agent, or it refuses such rollouts.
        UserCodeError: it raises.
    """
    set_numerics(settings.threads, torch.device("cpu"))
    agent: Any = spec.parse(settings.agent, AGENTS, AGENTS.what)
    agent.check(Plan(PROMPTS, settings.walks // PROMPTS, 0, STEPS))
    checks = {"gradient": _up, "repeats": _repeats, "resume": _resume, "dropped": _dropped, "metrics": _metrics}
    for name, check in checks.items():
        try:
            with running(f"agent {settings.agent!r}"):
                found = list(check(agent, settings))
        except NumericalError as error:
            found = [Finding(name, "FAILS", str(error))]
        yield from found


def _up(agent: Agent, settings: CheckAgent) -> Iterator[Finding]:
    """Gradient and gain."""
    first, gains = [], []
    for repeat in range(settings.repeats):
        trial = Trial.of(agent)
        before = trial.chain.theta
        trial.learn(settings, repeat, range(UPDATES))
        first += trial.gradients[:1]
        gains.append(trial.chain.value(trial.chain.theta) - trial.chain.value(before))
    true = trial.chain.gradient(before)
    yield (
        _gradient(torch.stack(first), true)
        if first
        else Finding("gradient", "note", "the learner steps without its optimization: nothing was seen of it")
    )
    gain = Mean.of(torch.stack(gains))
    if torch.equal(trial.chain.theta, before):
        yield Finding("gain", "FAILS", f"the weights are what they were before {UPDATES} rollouts: does it step?")
        return
    yield gain.finding("gain", f"J rises by {gain.value:.3g} +- {gain.error:.2g} in {UPDATES} rollouts")


def _gradient(seen: Tensor, true: Tensor) -> Finding:
    """The gradients (N, 2) of the first steps against ``true`` (2,)."""
    along = Mean.of(seen @ true / true.norm())
    mean = seen.mean(0)
    cosine = (mean @ true / (mean.norm() * true.norm())).item()
    return along.finding(
        "gradient", f"cosine {cosine:.3f} with dJ/dtheta; along it {along.value:.3g} +- {along.error:.2g}"
    )


def _bits(trial: Trial) -> list[Tensor]:
    return [p.detach().clone() for p in trial.learner.policy.parameters()]


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _repeats(agent: Agent, settings: CheckAgent) -> Iterator[Finding]:
    trials = [Trial.of(agent), Trial.of(agent)]
    for trial in trials:
        trial.learn(settings, 0, range(UPDATES))
    same = _same(*map(_bits, trials))
    yield Finding("repeats", "ok" if same else "FAILS", "the same bits" if same else "the same rollouts, other weights")


def _resume(agent: Agent, settings: CheckAgent) -> Iterator[Finding]:
    whole, second = Trial.of(agent), Trial.of(agent)
    whole.learn(settings, 0, range(1))
    tensors: dict[str, Tensor] = {}
    try:
        record = flatten(whole.learner.state_dict(), "learner", tensors)
        saved = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        second.learner.load_state_dict(restore(record, saved))
    except (TypeError, KeyError, ValueError, RlfusionError) as error:
        yield Finding("resume", "FAILS", f"its state cannot be saved and loaded: {error}")
        return
    for trial in (whole, second):
        trial.learn(settings, 0, range(1, UPDATES))
    same = _same(_bits(whole), _bits(second)) and whole.learner.iteration == second.learner.iteration
    yield Finding("resume", "ok" if same else "FAILS", "the same bits" if same else "goes on with other weights")


def _dropped(agent: Agent, settings: CheckAgent) -> Iterator[Finding]:
    if not agent.rollout_spec(STEPS).end:
        yield Finding("dropped", "ok", "no reward comes with its walks: one that fails as it learns is an error")
        return
    trial = Trial.of(agent)
    batch = trial.walks(settings, 0, 0)
    kept = torch.arange(len(batch.reward)) % SHARE != 0
    metrics = trial.update(replace(batch.take(kept), failed=int((~kept).sum())))
    finite = all(bool(p.isfinite().all()) for p in _bits(trial)) and not _not_finite(metrics)
    said = f"{int(kept.sum())} of {len(kept)} walks are left, of groups of different sizes"
    yield Finding("dropped", "ok" if finite else "FAILS", said if finite else f"{said}: weights or metrics not finite")


def _not_finite(metrics: Mapping[str, float]) -> list[str]:
    return [name for name, value in metrics.items() if isinstance(value, float | int) and not math.isfinite(value)]


def _metrics(agent: Agent, settings: CheckAgent) -> Iterator[Finding]:
    trial = Trial.of(agent)
    preflight(trial.learner, trial.walks(settings, 0, 0), agent.rollout_spec(STEPS).start)
    metrics = trial.learn(settings, 0, range(2))
    learner = trial.learner
    needed = NEEDED if agent.rollout_spec(STEPS).end else UNSCORED
    wrong = wrong_metrics(metrics, needed) + [f"{name} is not finite" for name in _not_finite(metrics)]
    wrong += [f"iteration is {learner.iteration} after 2 rollouts"] if learner.iteration != 2 else []
    asked = 2 * settings.walks if "reward" in metrics else 0
    wrong += [f"queries is {learner.queries}"] if learner.queries < asked else []
    yield Finding("metrics", "FAILS" if wrong else "ok", ", ".join(wrong or metrics))
