"""What a fine-tuning consists of: its base model, learner, judge, reward and monitor, made and measured."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlfusion import models
from rlfusion.common import layers, row_files, shards
from rlfusion.common.compiled import plain
from rlfusion.common.heap import give_back_large_blocks
from rlfusion.common.progress import Progress
from rlfusion.common.stops import Signals
from rlfusion.common.weights import Weights, learned, require_entries, sha256, unpack
from rlfusion.config import Evaluation, Finetune
from rlfusion.data import Dataset
from rlfusion.diffusion.chain import Chain
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.policy import Policy
from rlfusion.evaluation import require_independent
from rlfusion.evaluation.gains import gain
from rlfusion.jobs import base_model, memory, sample_rewards
from rlfusion.jobs.balance import FILE, Balance, found_of
from rlfusion.jobs.collector import Collector
from rlfusion.jobs.finetune.schedule import Schedule
from rlfusion.jobs.measure import Judged, Scored, Unjudged, grid_samples, look_of, measure, seen
from rlfusion.jobs.monitored import Monitored
from rlfusion.jobs.outside import Opened
from rlfusion.jobs.parts import Parts
from rlfusion.jobs.pretrain import require_solvable
from rlfusion.jobs.tasks import from_actors, make_task
from rlfusion.rewards import Reward, WeightedSum, bare, build, names_of, task_info
from rlfusion.rewards.calibration import Moments
from rlfusion.rewards.remote.client import is_url
from rlfusion.rl.agent import AgentLearner, learner_of
from rlfusion.rl.guard import Guarded
from rlfusion.rl.run_monitor import RunMonitor
from rlfusion.training import checkpoint, publishing
from rlfusion.training.devices import pick_device
from rlfusion.training.identity import REWARD, Run
from rlfusion.training.ranks import current
from rlfusion.training.tracking import Tracker, grid, save_png

SIGHT = ("gain", "diversity", "kl")
"""What was won, what it cost, and how far the model has gone: the three that the terminal shows."""
BY_NUMBER = ("frechet", "frechet_floor", "recall")
"""Figures that depend on how many samples there are: those of fewer stand in no curve of the others."""


@dataclass
class Job:
    """One fine-tuning run: what its parts share."""

    config: Finetune
    parts: Parts
    run: Run
    card: models.Card
    denoiser: Denoiser
    policy: Policy
    times: Tensor
    learner: AgentLearner
    judged: Judged | Unjudged
    reward: Reward
    tracker: Tracker
    guarded: Guarded
    monitor: RunMonitor
    before: dict[str, float]
    base: Path | None = None
    """The folder of the base model, unless it is a pipeline."""
    opened: Mapping[str, str] = field(default_factory=dict)
    """The digests of what the learner has opened, by setting."""
    sight: dict[str, float] = field(default_factory=dict)
    """The newest of the figures ``SIGHT``, on the first rank: what the terminal shows beside the reward."""

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return self.run.folder

    def inputs(self) -> dict[str, str]:
        """SHA-256 of the data and of the model that the settings name, and of what servers say of the rewards that they
        serve, by setting.
        """
        data = {"pretrain.data": self.judged.train.sha256} if isinstance(self.judged, Judged) else {}
        own = self.config.base and not self.card.pipeline
        served = self._served()
        remote = {REWARD: sha256(" ".join(served).encode())} if served else {}
        return data | ({"base": models.digest(Path(self.config.base))} if own else {}) | remote | dict(self.opened)

    def _served(self) -> list[str]:
        """The identities of the rewards that are learned from and served elsewhere."""
        known, given = task_info(self.card.names, self.card.shape, self.card.metadata), self.parts.rewards
        names = [name for name in names_of(self.config.reward) if is_url(name)]
        return [bare(build(name, given.options_of(name), known)).served().identity for name in names]

    @property
    def looks(self) -> bool:
        """Whether this rank draws samples to look at: the first alone does, but all where the network is split over the
        ranks, which then call it together.
        """
        return not current().rank or self._split

    @property
    def _split(self) -> bool:
        return bool(shards.roots(self.policy))

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Within the context the policy has its averaged weights, and is not compiled: its calls are of sizes of their
        own.
        """
        with self.learner.optimization.ema.averaged(), plain(self.policy):
            yield

    def _by_first(self, make: Callable[[], Any]) -> Any:
        """What the samples that ``looks`` draws are found to be, on every rank."""
        return make() if self._split else current().by_first(make)

    def probe(self, done: int, progress: Progress) -> str:
        """Let the monitor of the first rank probe the averaged weights; why the training shall stop here, or ""."""
        return self._by_first(lambda: self._probed(done, progress)) if self.monitor.due(done) else ""

    def _probed(self, done: int, progress: Progress) -> str:
        with self._averaged():
            metrics, alarms = self.monitor.probe(done)
        self.tracker.scalars(done, "monitor", metrics)
        self.sight |= {name: metrics[name] for name in SIGHT if name in metrics}
        if alarms:
            self.tracker.text(done, "run/diagnosis", "\n".join(f"- {message}" for message in alarms))
        for message in alarms:
            progress.say(f"monitor, after {done} updates: {message}")
        return self.monitor.stops(alarms)

    def evaluate(self, step: int, on_the_way: Schedule | None = None) -> dict[str, float]:
        """Measure the averaged weights with the chain's own sampler, on the first rank, and log it; ``on_the_way`` as
        the schedule says.
        """
        return self._by_first(lambda: self._evaluated(step, on_the_way))

    def _evaluated(self, step: int, on_the_way: Schedule | None) -> dict[str, float]:
        told = self.config.evaluation
        if on_the_way is not None:
            told = replace(told, samples=on_the_way.samples, deterministic=on_the_way.deterministic)
        with self._averaged():
            result = self._measure(self.policy, told, partial(sample_rewards.keep, self.folder, step))
            if told.samples < self.config.evaluation.samples:
                result = {name: value for name, value in result.items() if name not in BY_NUMBER}
            won = self._gain(result)
            self.tracker.scalars(step, "evaluation", result | {"gain": won})
            if step and not self.config.monitor.every:  # else it is the monitor's, of samples of its own
                self.sight["gain"] = won
            if told.deterministic:
                self.tracker.scalars(step, "evaluation_ode", self._ode())
        return result

    def _gain(self, result: dict[str, float]) -> float:
        """The gain of an evaluation over the base model, on as many samples of the base: the same ones."""
        base = self.before or result
        mean, held = base["reward"], sample_rewards.kept(self.folder, 0)
        if result["count"] < base["count"] and held is not None:
            mean = float(np.nanmean(held[1, : int(result["count"])]))
        return gain(result["reward"], mean, base["reward_std"])

    def _ode(self) -> dict[str, float]:
        """The same with the deterministic sampler, DDIM(eta=0): what many users will sample with."""
        policy = Policy(self.policy.denoiser, Chain(kernel="DDIM(eta=0.0)").make_kernel())
        result = self._measure(policy, replace(self.config.evaluation, bits_per_dim=False))  # no density
        return {name: result[name] for name in ("reward", "agreement", "frechet", "diversity") if name in result}

    def _measure(
        self, policy: Policy, settings: Evaluation, keep: Callable[[Tensor, Tensor], None] | None = None
    ) -> dict[str, float]:
        scored = Scored(self.reward, self.parts.rewards.name, self.parts.rewards.may_fail)
        return measure(policy, self.times, self.judged, scored, settings, self.config.seed, keep)

    def weigh(self, balance: Balance, state: Mapping[str, Any] | None, step: int) -> str:
        """Find what several rewards are of the base model, which the policy is now, or take it from the ``state`` of a
        checkpoint after ``step`` updates; the line about it, or "" where the settings do not ask for it.
        """
        if not balance.needed:
            return ""
        if state is not None:
            balance.load(state, step)
        else:
            balance.begin({name: Moments(**found) for name, found in self._by_first(self._found_of_base).items()})
        if self.parts.rewards.normalize == "calibrated":
            assert isinstance(self.reward, WeightedSum)
            self.reward.base = dict(balance.base)
        checkpoint.write_json_atomic(self.folder / FILE, balance.state_dict(step)["base"])
        told = [f"{n} median {m.median:.4g}, MAD {m.mad:.4g}, mean {m.mean:.4g}" for n, m in balance.base.items()]
        self.tracker.text(step, "run/calibration", "\n".join(f"- {line}" for line in told))
        return f"of {self.config.base_samples} samples of the base model: {'; '.join(told)}"

    def _found_of_base(self) -> dict[str, dict[str, float]]:
        about = (self.policy, self.times, self.card.classes, self.card.shape, self.reward, self.parts.rewards)
        with self._averaged():
            found = found_of(*about, self.config.seed)
        return {name: one._asdict() for name, one in found.items()}

    def picture(self, step: int, name: str) -> None:
        """Draw the grid of the averaged weights on its fixed seeds, and keep it as PNG and in TensorBoard: the first
        rank does.
        """
        if not self.looks:
            return
        with self._averaged():
            columns, rows, scale = look_of(self.card)
            samples = grid_samples(self.policy, self.times, columns, self.card.shape, self.config.seed, rows)
        picture = grid(samples, columns, scale)
        save_png(self.folder / "samples" / f"{name}.png", picture)
        self.tracker.image(step, f"samples/{name}", picture, self.card.names[:columns])

    def resumable(self, done: int, collector: Collector) -> dict[str, Any]:
        """All that resuming after ``done`` updates needs."""
        older = {str(v): self._tensors(w) for v, w in collector.still_needed(done).items()}
        balance = collector.balance.state_dict(done)
        return self.state_dict() | {"older_weights": older, "slowed": list(collector.slowed), "balance": balance}

    def _tensors(self, weights: Weights) -> dict[str, Tensor]:
        """The tensors of some weights, split as the policy is where these are one rank's."""
        ours = learned(self.learner.policy)
        if row_files.is_manifest(weights.blob):
            return row_files.own(row_files.Manifest.unpacked(weights.blob), current().rank, ours)
        held = unpack(weights.blob)
        if self.config.rollout.workers:
            return held
        return {name: shards.of_own(value, ours[name]) for name, value in held.items()}

    def repacked(self, version: int, tensors: Mapping[str, Tensor]) -> Weights:
        """The weights of another version, as the backend takes them, from the tensors that a checkpoint has of it.

        Raises:
            StateError: they are not of this policy.
        """
        ours = learned(self.learner.policy)
        require_entries(tensors, ours, f"the weights of version {version}")
        workers = bool(self.config.rollout.workers)
        if publishing.in_files(self.learner.policy, workers):
            split = {name: shards.like(value, ours[name]) for name, value in tensors.items()}
            return publishing.filed(split, version, self.folder)
        if workers:
            return Weights.packed(version, {name: shards.whole(value) for name, value in tensors.items()})
        own = {name: shards.own(shards.like(value, ours[name])) for name, value in tensors.items()}
        return Weights.packed(version, own)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has of the run, but for the weights of walks to come."""
        learner, watch = self.guarded.state_dict(), self.monitor.state_dict()
        empty = {"older_weights": {}, "slowed": [], "balance": {"base": {}, "multipliers": {}}}
        return {"learner": learner, **empty, "watch": watch, "before": self.before}


class Found(NamedTuple):
    """What a fine-tuning begins with, and finds or makes in the cache."""

    origin: base_model.Origin
    reward: Reward


def find(
    config: Finetune,
    parts: Parts,
    signals: Signals,
    progress: Progress,
    actors: Mapping[str, Sequence[str]] | None = None,
) -> Found:
    """Find or make the base model, the judge and the reward. ``actors`` are those of ``tasks.actors_of``.

    Raises:
        ConfigError: settings that cannot work together.
    """
    device = pick_device(config.device)
    config.chain.make_kernel()
    origin = base_model.begin(parts.base, device, signals, progress, config.learner.split)
    denoiser, card, judged, *_ = origin
    require_solvable(denoiser, config.chain)
    made = from_actors(actors or {}, task_info(card.names, card.shape, card.metadata), config.ray.limits.item_s)
    reward = judged.reward(config.reward, parts.rewards.options, parts.base.root, config.call_options, made)
    if judged.judge is not None:
        require_independent(judged.judge, reward)
    if isinstance(reward, torch.nn.Module):
        reward.to(device)
    return Found(origin, reward)


def prepare(config: Finetune, parts: Parts, run: Run, tracker: Tracker, progress: Progress, found: Found) -> Job:
    """Build the learner of what was ``found``, at the base model's weights; of a learner that is split, each rank's.

    Raises:
        ConfigError: settings that cannot work together.
    """
    (denoiser, card, judged, data, filling, base), reward = found
    folder = run.folder
    if config.learner.split:
        shards.split(denoiser.net, pick_device(config.device), current().exact, filling)
        denoiser.to(pick_device(config.device))  # what is beside the parameters
    elif current().exact:
        layers.bounded(denoiser.net)
    policy, times = config.chain.policy(denoiser, card.names), config.chain.times(denoiser)
    spare_memory(config, card)  # the estimate calls the network, too
    if card.pipeline:
        held = memory.estimate(parts.holds, denoiser, policy, times, policy.space.latent(card.shape))
        progress.say(f"memory: about {memory.described(held)}, and scratch space beside")
    outside = Opened(parts.base, config.chain, card, policy)
    learner = make_learner(config, parts, card, policy, reward, data, outside)
    card = replace(card, chain=asdict(config.chain))

    def save_best() -> None:
        models.save(folder / "best", denoiser, card)

    monitored = Monitored(config.monitor, policy, times, judged, reward, parts.rewards, parts.base.root, config.seed)

    def show(step: int, samples: Tensor) -> None:
        tracker.image(step, "samples/training", seen(samples, card), card.names[: look_of(card)[0]])

    parts_of_monitor = (monitored.draw, monitored.look, monitored.monitor, save_best, show)
    monitor = RunMonitor(config.monitor, config.updates, folder, *parts_of_monitor)
    guarded = Guarded(learner, config.guard, folder, config.agent.traits().rewards != "none")
    about = (run, card, denoiser, policy, times, learner, judged, reward, tracker, guarded, monitor)
    return Job(config, parts, *about, {}, base, outside.inputs)


def spare_memory(config: Finetune, card: models.Card) -> None:
    """As a training begins on a CPU: where the settings make activations again, or one part of them after the other,
    memory counts for more than time, and large blocks are given back as they are freed.
    """
    if config.agent.traits().halves or card.pipeline.get("checkpointing"):
        give_back_large_blocks(pick_device(config.device))


def make_learner(
    config: Finetune,
    parts: Parts,
    card: models.Card,
    policy: Policy,
    reward: Reward,
    data: Dataset | None,
    outside: Opened | None = None,
) -> AgentLearner:
    """The learner of these settings, at the base model's weights; it opens what else it needs by ``outside``.

    Raises:
        ConfigError: as ``learner_of``.
    """
    task = make_task(parts.task, card, policy, reward)
    task = replace(task, outside=outside or Opened(parts.base, config.chain, card, policy))
    return learner_of(config.agent, task, data, config.seed)
