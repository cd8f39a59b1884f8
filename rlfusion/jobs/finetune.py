"""The job of ``rlfusion finetune``: rollouts feed a learner, weights go back, and everything is measured and kept.

    step s:  items of step s under the weights version_for(s)  ->  trajectories  ->  learner.update  ->  weights s + 1

Rollouts are pure functions of (settings, step, weights); so a run that resumes from a checkpoint repeats what the
uninterrupted run did, bit for bit, and no queue is saved.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlfusion import models
from rlfusion.common.errors import StateError
from rlfusion.common.progress import Progress
from rlfusion.common.stops import Signals
from rlfusion.common.weights import Weights, pack, require_entries, sha256, unpack
from rlfusion.config import Evaluation, Finetune
from rlfusion.data import load, to_pixels
from rlfusion.diffusion.chain import Chain, narrow
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.policy import Policy, frozen_copy
from rlfusion.evaluation import require_bound, require_independent
from rlfusion.jobs import base_model, memory
from rlfusion.jobs.collector import Collector
from rlfusion.jobs.measure import Judged, Unjudged, grid_samples, headlines, look_of, measure, require_judgeable
from rlfusion.jobs.preflight import preflight
from rlfusion.jobs.pretrain import card_of, require_no_class, require_same_data, require_solvable
from rlfusion.jobs.scoring import scored
from rlfusion.jobs.tasks import actors_of, cluster_of, from_actors, make_task, recipe, require_whole_groups
from rlfusion.jobs.watch import Watch
from rlfusion.models import lora
from rlfusion.models.autoencoder import encoded
from rlfusion.rewards import Reward, build, find, names_of, score, task_info
from rlfusion.rl.agent import AgentLearner
from rlfusion.rl.guard import Guarded
from rlfusion.rl.reward_gradient import PREFLIGHT
from rlfusion.rollout import Backend, Local, Recipe, make_backend
from rlfusion.rollout.ray_address import require_cluster
from rlfusion.rollout.trajectory import concatenate
from rlfusion.training import adamw8bit, checkpoint
from rlfusion.training.checkpoint import Found
from rlfusion.training.devices import pick_device, set_numerics
from rlfusion.training.identity import Run, enter
from rlfusion.training.loop import train
from rlfusion.training.timing import Stopwatch
from rlfusion.training.tracking import Tracker, flatten, grid, save_png

PREFLIGHT_SAMPLES = 64
TRIED = 4
RESULT = "summary.json"


@dataclass
class Job:
    """One fine-tuning run: what its parts share."""

    config: Finetune
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
    watch: Watch
    before: dict[str, float]

    @property
    def folder(self) -> Path:
        return self.run.folder

    def probe(self, done: int, progress: Progress) -> str:
        """Let the monitor probe the averaged weights; why the training shall stop here, or ""."""
        if not self.watch.due(done):
            return ""
        with self.learner.optimization.ema.averaged():
            metrics, alarms = self.watch.probe(done)
        self.tracker.scalars(done, "monitor", metrics)
        for said in alarms:
            progress.say(f"monitor, after {done} updates: {said}")
        return self.watch.stops(alarms)

    def evaluate(self, step: int) -> dict[str, float]:
        """Measure the averaged weights with the chain's own sampler, and log it."""
        with self.learner.optimization.ema.averaged():
            result = self._measure(self.policy, self.config.evaluation)
            self.tracker.scalars(step, "evaluation", result)
            if self.config.evaluation.deterministic:
                self.tracker.scalars(step, "evaluation_ode", self._ode())
        return result

    def _ode(self) -> dict[str, float]:
        """The same with the deterministic sampler, DDIM(eta=0): what many users will sample with."""
        policy = Policy(self.policy.denoiser, Chain(kernel="DDIM(eta=0.0)").make_kernel())
        result = self._measure(policy, replace(self.config.evaluation, bits_per_dim=False))  # no density
        return {name: result[name] for name in ("reward", "agreement", "frechet", "diversity") if name in result}

    def _measure(self, policy: Policy, settings: Evaluation) -> dict[str, float]:
        c = self.config
        return measure(policy, self.times, self.judged, self.reward, c.reward_name, settings, c.seed, c.may_fail)

    def picture(self, step: int, name: str) -> Tensor:
        """Draw the grid of the averaged weights on its fixed seeds, and keep it as PNG and in TensorBoard."""
        with self.learner.optimization.ema.averaged():
            columns, rows, scale = look_of(self.card)
            samples = grid_samples(self.policy, self.times, columns, self.card.shape, self.config.seed, rows)
        picture = grid(samples, columns, scale)
        save_png(self.folder / "samples" / f"{name}.png", picture)
        self.tracker.image(step, f"samples/{name}", picture)
        return picture

    def save(self, step: int, collector: Collector) -> None:
        """A checkpoint of all that resuming needs."""
        older = {str(v): unpack(w.blob) for v, w in collector.still_needed(step).items()}
        self.run.save(step, self.state_dict() | {"older_weights": older})

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has of the run, but for the weights of walks to come."""
        learner, watch = self.guarded.state_dict(), self.watch.state_dict()
        return {"learner": learner, "older_weights": {}, "watch": watch, "before": self.before}


def check(config: Finetune) -> None:
    """Refuse what cannot work, before any work: device, Ray cluster, base model, data, chain, learner, reward.

    Raises:
        ConfigError: says which setting and why.
        RolloutError: no Ray cluster answers at its address.
    """
    pick_device(config.device)
    if config.rollout.workers:
        require_cluster(config.ray.address, config.ray.connect_timeout_s)
    if config.optimizer == "adamw8bit":
        adamw8bit.require()
    card = base_model.pretrained(config)
    if card is not None:
        base_model.check_pretrained(config, card)
        return
    data = load(config.pretrain.data, config.pretrain.size)
    require_judgeable(data, config.pretrain.held_out)
    made = card_of(config.pretrain, data)
    card = models.load_card(Path(config.base)) if config.base else made
    require_same_data(f"base = {config.base!r}", card, made, config.pretrain.data)
    denoiser = models.load(Path(config.base))[0] if config.base else models.build(card)
    models.adapt(denoiser, card, config.lora)
    require_solvable(denoiser, config.chain)
    if not config.base:
        require_no_class(config.pretrain, config.chain)
    policy = config.chain.policy(denoiser, card.names)
    if config.evaluation.bits_per_dim:
        require_bound(policy, config.chain.times(denoiser), data)
    options = config.options_of(*names_of(config.reward))
    known = task_info(card.names, card.shape, card.metadata)
    for name in config.monitor.held_out:
        find(name)
    with actors_of(config) as actors:
        made = from_actors(actors, known, config.ray.limits.item_s)
        reward = build(config.reward, options, known, config.call_options, made)
        require_whole_groups(config, card.classes, reward)
        config.agent.learner(make_task(config, card, policy, reward), encoded(data, denoiser.space), config.seed)
        label = data.label[: TRIED // 2].repeat_interleave(2)  # two of a prompt, for rewards that compare
        score(reward, to_pixels(data.x[:TRIED]), label, config.reward_name, config.reward_failures == "mask")


def prepare(
    config: Finetune,
    run: Run,
    tracker: Tracker,
    signals: Signals,
    progress: Progress,
    actors: Mapping[str, str] | None = None,
) -> Job:
    """Find or make the base model, the judge and the reward, and build the learner with the base model's weights.
    ``actors`` are those of ``tasks.actors_of``.

    Raises:
        ConfigError: settings that cannot work together.
    """
    root, device, folder = Path(config.root), pick_device(config.device), run.folder
    config.chain.make_kernel()
    denoiser, card, judged, data = base_model.begin(config, root, device, signals, progress)
    policy, times = config.chain.policy(denoiser, card.names), config.chain.times(denoiser)
    require_solvable(denoiser, config.chain)
    options = config.options_of(*names_of(config.reward))
    made = from_actors(actors or {}, task_info(card.names, card.shape, card.metadata), config.ray.limits.item_s)
    reward = judged.reward(config.reward, options, root, config.call_options, made)
    if judged.judge is not None:
        require_independent(judged.judge, reward)
    if isinstance(reward, torch.nn.Module):
        reward.to(device)
    if card.pipeline:
        found = memory.estimate(config, denoiser, policy, times, policy.space.latent(card.shape))
        progress.say(f"memory: about {memory.said(found)}, and scratch space beside")
    learner = config.agent.learner(make_task(config, card, policy, reward), data, config.seed)
    if config.optimizer == "adamw8bit":
        learner.optimization.use(adamw8bit.AdamW8bit)
    card = replace(card, chain=asdict(config.chain))

    def save_best() -> None:
        models.save(folder / "best", denoiser, card)

    watch = Watch(config, folder, policy, times, judged, reward, save_best)
    guarded = Guarded(learner, config.guard, folder)
    return Job(config, run, card, denoiser, policy, times, learner, judged, reward, tracker, guarded, watch, {})


def finetune(config: Finetune, folder: Path, signals: Signals, progress: Progress) -> dict[str, Any]:
    """The whole job in ``folder``, from its newest checkpoint on if it has one.

    Returns:
        {"before": evaluation, "after": evaluation, "queries": rewards asked for in training}.

    Raises:
        ConfigError, CheckpointError, NumericalError, StopRequested: as the exit codes of the command say.
    """
    set_numerics(config.threads, pick_device(config.device))
    run = enter(folder, "finetune", config)
    for note in run.notes:
        progress.say(note)
    if (result := run.result(RESULT)) is not None:
        progress.say(f"{folder} is finished: this is its result")
        return result
    found = run.newest(config.updates)
    start = found.step if found else 0
    tracker = Tracker(folder, start)
    if tracker.damaged:
        progress.say(f"{tracker.file}: {tracker.damaged} damaged line(s) are left out")
    with cluster_of(config), actors_of(config) as actors:
        job = prepare(config, run, tracker, signals, progress, actors)
        progress.say(f"plan: {config.agent.plan()}")
        described = recipe(config, job.card, job.policy, job.reward, pick_device(config.device), actors)
        with _backend(job, described) as backend:
            collector = Collector(backend, config, job.card.classes, start)
            _begin(job, collector, found, progress)
            done = _improve(job, collector, signals, progress)
            signals.check()
        return _finish(job, done)


def _backend(job: Job, described: Recipe) -> Backend:
    """The backend of the settings. In this process a pretrained model shares what is not trained with its copy."""
    if job.card.pipeline and not job.config.rollout.workers:
        return Local(make_task(job.config, job.card, frozen_copy(job.policy), job.reward))
    return make_backend(described, job.config.settings)


def _begin(job: Job, collector: Collector, found: Found | None, progress: Progress) -> None:
    """Measure the base model where the checkpoint does not say how it is, under these settings; load the checkpoint;
    publish the weights.
    """
    state = _fitting(job, found.path) if found else None
    known = state is not None and found.settings == job.run.owner.digests[-1]
    job.before = dict(state["before"]) if known else job.evaluate(0)
    checkpoint.write_json_atomic(job.folder / "before.json", job.before)
    if not known or not (job.folder / "samples" / "before.png").is_file():
        job.picture(0, "before")
    if job.config.monitor.every:
        job.watch.begin(state["watch"]["drawn"] if known else "")
    if state is not None:
        for weights in _load(job, state, found):
            collector.publish(weights)
        progress.say(f"resumed from {found.path}")
    weights = Weights.of(job.learner.policy, job.learner.iteration)
    _preflight(job, collector, weights, progress)
    collector.publish(weights)


def _fitting(job: Job, path: Path) -> dict[str, Any]:
    """The state of a checkpoint, its outer parts as the run's."""
    state = checkpoint.load(path)
    with checkpoint.loading(path):
        require_entries(state, job.state_dict(), "the run")
        require_entries(state["watch"], job.watch.state_dict(), "the monitor")
        require_entries(state["before"], {name: 0.0 for name in state["before"]}, "the evaluation before")
    return state


def _load(job: Job, state: dict[str, Any], found: Found) -> list[Weights]:
    """Take up the state of a checkpoint; the older weights under which walks to come act, oldest first."""
    with checkpoint.loading(found.path):
        job.guarded.load_state_dict(state["learner"])
        job.watch.load_state_dict(state["watch"] | {"drawn": job.watch.drawn})
        if job.learner.iteration != found.step:
            raise StateError(f"the learner's 'iteration' is {job.learner.iteration}, expected {found.step}")
        blobs = {int(version): pack(tensors) for version, tensors in state["older_weights"].items()}
        return [Weights(version, sha256(blob), blob) for version, blob in sorted(blobs.items())]


def _preflight(job: Job, collector: Collector, weights: Weights, progress: Progress) -> None:
    item = collector.items(PREFLIGHT, weights.version)[0]
    each = job.config.rollout.samples_per_prompt
    small = replace(item, groups=item.groups[: max(1, PREFLIGHT_SAMPLES // each) * each])  # whole prompts
    batch, _ = scored(concatenate(collector.backend.collect([small], weights)).to(collector.device), job.config)
    found = preflight(job.learner, batch)
    if found.get("reward_std") == 0:
        progress.say(
            "warning: all rewards of the first walks are equal; while they are, there is nothing to learn from"
        )
    walked = job.config.agent.rollout_spec(job.config.chain.moves).path
    if walked and (said := narrow(job.config.chain, job.denoiser)):
        progress.say(f"warning: {said}, and the guard may stop the run")
    progress.say("preflight: " + ", ".join(f"{name} {value:.3g}" for name, value in found.items()))


def _improve(job: Job, collector: Collector, signals: Signals, progress: Progress) -> int:
    """The training loop, from the updates done to all, or to where the monitor stops it. Returns the updates done."""
    config, start, total = job.config, collector.start, job.config.updates

    def save(step: int) -> None:
        job.save(step, collector)

    steps = train(job.guarded, collector.batches(), start, total, config.checkpoint_every, save, signals)
    stopwatch, before = Stopwatch(job.folder, start), job.learner.queries
    with progress.bar("fine-tuning", total, start) as bar:
        for step, metrics in steps:
            done, queries, metrics = step + 1, job.learner.queries, metrics | collector.metrics
            stopwatch.lap(done, queries)
            cost, before = queries - before, queries
            spent = 0 < config.budget_queries < queries + cost
            collector.publish(Weights.of(job.learner.policy, done))
            job.tracker.scalars(done, "train", metrics | {"queries": queries})
            if config.evaluation.every and done % config.evaluation.every == 0 and done < total and not spent:
                job.evaluate(done)
            bar.advance(reward=metrics["reward"])
            said = f"{queries} of its budget of {config.budget_queries} queries are spent, and an update asks {cost}"
            stop = said if spent else job.probe(done, progress)
            if stop:
                progress.say(f"stopped after {done} updates: {stop}")
                return done
            stopwatch.go()
    return total


def _finish(job: Job, total: int) -> dict[str, Any]:
    """Measure, draw and save the result after ``total`` updates."""
    folder = job.folder
    after = job.evaluate(total)
    job.picture(total, "after")
    with job.learner.optimization.ema.averaged():
        models.save(folder / "model", job.denoiser, job.card)
        if job.config.lora and not job.card.pipeline:
            lora.save(folder / "adapter", job.denoiser.net)
    result = {"before": job.before, "after": after, "queries": job.learner.queries, "updates": total}
    if job.watch.best.step > 0:
        result["best"] = {"updates": job.watch.best.step, job.watch.best.name: job.watch.best.value}
    job.tracker.hparams(flatten(asdict(job.config)), {f"final/{name}": after[name] for name in headlines(after)})
    job.run.seal(RESULT, result)
    return result
