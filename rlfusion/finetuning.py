"""Fine-tuning as an iterator: ``run = rlf.finetune(...)``, and each ``next(run)`` is a rollout and its update.

    for metrics in run:
        print(run.updates, metrics["reward"])

It is the job of ``rlfusion finetune`` without the folder: the same rollouts, learner and guards in this process, and
the same weights, bit for bit. What belongs to the folder (checkpoints, evaluations, the monitor, Ray workers) is the
command's. Ctrl-C is Python's own KeyboardInterrupt: an update that it cuts short is undone, and the next ``next(run)``
begins it again.
"""

import copy
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rlfusion import models
from rlfusion.api import Model, ModelLike
from rlfusion.cli.arguments import settings_of
from rlfusion.common.errors import ConfigError, shorten
from rlfusion.common.progress import Progress
from rlfusion.common.stops import Signals
from rlfusion.config import Finetune
from rlfusion.data import Dataset
from rlfusion.diffusion.policy import Policy
from rlfusion.jobs.balance import found_of
from rlfusion.jobs.base_model import Origin, begin
from rlfusion.jobs.collector import Collector
from rlfusion.jobs.finetune.job import make_learner, spare_memory
from rlfusion.jobs.groups import require_whole_groups
from rlfusion.jobs.measure import Unjudged
from rlfusion.jobs.parts import opened
from rlfusion.jobs.preflight import try_out
from rlfusion.jobs.pretrain import require_solvable
from rlfusion.jobs.tasks import acting_here
from rlfusion.judging import RewardLike, made_reward
from rlfusion.models import lora
from rlfusion.models.autoencoder import encoded
from rlfusion.rewards import WeightedSum
from rlfusion.rewards.given import named
from rlfusion.rl.agent import Agent, AgentLearner
from rlfusion.rl.guard import Guarded
from rlfusion.rollout import Local
from rlfusion.rollout.graphed import Graphed
from rlfusion.training.devices import pick_device

_log = logging.getLogger(__name__)

OF_FOLDERS = (
    "name",
    "monitor",
    "evaluation",
    "ray",
    "learner",
    "budget_queries",
    "rollout.workers",
    "threads",
    "deterministic",
    "tf32",
    "track",
    "track_failures",
    "resume",
    "config",
)
"""Settings of the command that mean nothing without its folder, its processes, or its place in a shell."""

OF_ARGUMENTS = ("base", "resume", "config", "change", "print_config", "help")
"""Words of the command line that are no settings here."""


class Run(Iterator[dict[str, float]]):
    """A fine-tuning in this process: an iterator over its updates, each of which gives its metrics by name.

    The metrics are those of the command's ``metrics.jsonl``: ``reward``, the mean of the rollout, ``grad_norm``, ...,
    and ``queries``, the rewards asked for so far. Leave the loop when you like; another loop goes on from there.

    Attributes:
        config: all settings.
        policy: the policy with its weights as they are now.
    """

    def __init__(self, config: Finetune, begun: Model, policy: Policy, learner: AgentLearner, acting: Local) -> None:
        self.config, self.policy = config, policy
        self._begun, self._learner, self._parts = begun, learner, opened(config)
        self._guarded = Guarded(learner, config.guard, None, config.agent.traits().rewards != "none")
        self._reward = acting.task.reward
        about = self._parts.collecting, self._parts.rewards, len(begun.names), 0, begun.device
        self._collector = Collector(acting, *about)
        self._batch: tuple[int, Any] | None = None

    def __next__(self) -> dict[str, float]:
        """Collect a rollout and update the policy.

        Raises:
            StopIteration: all updates are done.
            NumericalError: a reward is not finite, or the guards end the run; the weights are the last good ones.
            UserCodeError: the reward raised; the weights are those before the update.
        """
        step = self.updates
        if step >= self.config.updates:
            raise StopIteration
        if step not in self._collector.published:
            self._publish(step)
        if self._batch is None or self._batch[0] != step:
            self._batch = step, self._collector.batch(step)
        try:
            metrics = self._guarded.update(self._batch[1])
        except BaseException:
            if isinstance(self._batch[1], Graphed):  # a graph serves one pass: these walks are walked again
                self._batch = None
                self._collector.published.pop(step)
            raise
        if line := self._collector.heed(self.updates, metrics, self.config.guard):
            _log.warning(line)
        constraints = {f"constraint/{name}": value for name, value in self._collector.constraints.items()}
        return metrics | self._collector.metrics | constraints | {"queries": float(self.queries)}

    def _publish(self, step: int) -> None:
        """Let the weights act; before the first update, what would fail quietly later is refused."""
        weights = self._collector.acting(self.policy, step)
        if step == 0:
            spare_memory(self.config, self._begun.card)
            self._weigh()
            for said in try_out(self._parts.task, self._learner, self._collector, weights):
                _log.log(logging.WARNING if said.startswith("warning") else logging.INFO, said)
        self._collector.publish(weights)

    def _weigh(self) -> None:
        """Find what several rewards are of the model to begin with, where the settings ask for it."""
        balance, begun = self._collector.balance, self._begun
        if not balance.needed:
            return
        about = self.policy, begun.chain.times(begun.denoiser), len(begun.names), begun.shape
        balance.begin(found_of(*about, self._reward, self._parts.rewards, self.config.seed))
        if isinstance(self._reward, WeightedSum) and self.config.reward_normalize == "calibrated":
            self._reward.base = dict(balance.base)
        self._guarded.plain = lambda: self._collector.plain

    @property
    def updates(self) -> int:
        """Updates done so far."""
        return self._learner.iteration

    @property
    def queries(self) -> int:
        """Rewards asked for so far."""
        return self._learner.queries

    @property
    def model(self) -> Model:
        """A copy of the model as it is now, with averaged weights and adapters merged: what the command saves."""
        denoiser = self._begun.denoiser
        with self._learner.optimization.ema.averaged():
            frozen = {id(p): p for p in denoiser.parameters() if not p.requires_grad}
            copied = copy.deepcopy(denoiser, frozen)
        if not self._begun.card.pipeline:
            copied = lora.merged(copied)
        return replace(self._begun, denoiser=copied)


def finetune(
    model: ModelLike | None = None,
    reward: RewardLike = "class_logprob",
    *,
    agent: str | Mapping[str, Any] | Agent = "ddpo",
    updates: int = 24,
    seed: int = 0,
    data: Dataset | None = None,
    reward_options: Mapping[str, Mapping[str, Any]] | None = None,
    **settings: Any,
) -> Run:
    """Begin to improve a model for a reward; iterate over the result to do it.

        run = rlf.finetune("runs/base", reward=my_reward, agent="grpo", rollout={"prompts": 4})
        for metrics in run:
            ...
        rlf.save(run.model, "runs/mine")

    Args:
        model: a model, which stays as it is; or the path of one, as of --base. None pretrains one on digits, once, and
            keeps it in ``root``/cache, as the command does.
        reward: a name, a callable ``(samples (B, C, H, W) in [0, 1], cond) -> (B,)``, or {reward: weight}.
        agent: an algorithm by name, {"name": ..., its settings}, or its settings as an object.
        updates: rollouts, each followed by the learner's updates.
        seed: keys every random draw.
        data: the training samples of a model that is given, for agents with a pretraining term; else they are those of
            ``pretrain``, as for the command.
        reward_options: settings of each named reward.
        settings: all others of ``rlfusion finetune``, as mappings or by dotted name: chain={"steps": 10},
            rollout={"prompts": 4}, lora="LoRA(rank=8)", guard={...}, device="cpu", root="runs", ...

    Raises:
        ConfigError: a setting, or settings together, that cannot work; or one that belongs to a run in a folder.
    """
    names, objects = named(reward)
    config = _config(model, agent, {"updates": updates, "seed": seed, **settings})
    config = replace(config, reward=names, reward_options={n: dict(o) for n, o in (reward_options or {}).items()})
    device = pick_device(config.device)
    if isinstance(model, Model):
        origin = _given(model, data, config, device)
    elif data is not None:
        raise ConfigError("data is given with no model: expected pretrain={'data': ...}, or rlf.load(...) as the model")
    else:
        origin = begin(opened(config).base, device, Signals(), Progress())
    return _run(config, origin, objects, device)


def _run(config: Finetune, origin: Origin, objects: Mapping[str, Any], device: torch.device) -> Run:
    """The run of these settings from this beginning."""
    denoiser, card, judged, data, *_ = origin
    parts = opened(config)
    policy = config.chain.policy(denoiser, card.names)
    require_solvable(denoiser, config.chain)
    reward = made_reward(
        judged, config.reward, objects, config.reward_options, Path(config.root), device, config.call_options
    )
    require_whole_groups(config.rollout, parts.task, config.agent.name, card.classes, reward)
    learner = make_learner(config, parts, card, policy, reward, data)
    acting = acting_here(parts.task, card, policy, reward, config.rollout.overlap)
    begun = Model(denoiser, replace(card, chain=asdict(config.chain)), config.chain)
    return Run(config, begun, policy, learner, acting)


def _given(model: Model, data: Dataset | None, config: Finetune, device: torch.device) -> Origin:
    """The beginning from a copy of a model that is given."""
    denoiser = copy.deepcopy(model.denoiser)
    models.adapt(denoiser, model.card, config.lora, config.seed)
    config.arithmetic.act(denoiser, model.card)
    held = None if data is None else encoded(data, denoiser.space)
    return Origin(denoiser.to(device), model.card, Unjudged(model.shape, model.names, model.card.metadata), held)


def _config(model: ModelLike | None, agent: str | Mapping[str, Any] | Agent, settings: Mapping[str, Any]) -> Finetune:
    """The settings as the command would read them: from the same words, with the same defaults and refusals."""
    told = {name: one for key, value in settings.items() for name, one in _flat(key, value)}
    for name in told:
        _require_meant(name, isinstance(model, Model))
    if isinstance(agent, str | Mapping):
        told |= dict(_flat("agent", {"name": agent} if isinstance(agent, str) else agent))
    if isinstance(model, Model):
        told = {f"chain.{name}": value for name, value in asdict(model.chain).items()} | told
    elif model is not None:
        told["base"] = os.fspath(model)
    config = settings_of("finetune", [f"--{name}={_text(value)}" for name, value in told.items()])
    return config if isinstance(agent, str | Mapping) else replace(config, agent=agent)


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A setting, or those of a mapping or a settings object, by dotted name."""
    held = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    if not isinstance(held, Mapping):
        yield name, held
        return
    for key, one in held.items():
        yield from _flat(f"{name}.{key}", one)


def _text(value: Any) -> str:
    """A value as it would stand on the command line."""
    if isinstance(value, str | os.PathLike):
        return os.fspath(value)
    try:
        return json.dumps(value)
    except TypeError as error:
        raise ConfigError(f"{shorten(repr(value))}: expected plain data ({error})") from error


def _require_meant(name: str, given: bool) -> None:
    """Refuse settings that nothing here would read."""
    top = name.partition(".")[0]
    if top in OF_ARGUMENTS:
        raise ConfigError(
            f"{name} is a word of the command line: expected settings, and the model as the first argument"
        )
    if name == "agent.name":
        raise ConfigError("agent.name names an algorithm beside agent: expected agent='grpo', or agent={'name': ...}")
    if top in OF_FOLDERS or name in OF_FOLDERS:
        raise ConfigError(
            f"{name} belongs to a run in a folder: expected none here, or the command, rlfusion finetune --{name} ..."
        )
    if given and top in ("pretrain", "pipeline", "objective", "root"):
        raise ConfigError(f"{name} is given beside a model that exists: expected one of the two")
