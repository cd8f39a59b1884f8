"""The job of ``rlfusion finetune``: rollouts feed a learner, weights go back, and everything is measured and kept.

    step s:  items of step s under the weights version_for(s)  ->  trajectories  ->  learner.update  ->  weights s + 1

Rollouts are pure functions of (settings, step, weights); so a run that resumes from a checkpoint repeats what the
uninterrupted run did, bit for bit, and no queue is saved.
"""

import json
import math
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any

from rlfusion import models
from rlfusion.common import shards, storage
from rlfusion.common.code_files import label
from rlfusion.common.errors import ConfigError, StateError
from rlfusion.common.progress import Progress
from rlfusion.common.stops import Signals
from rlfusion.common.weights import Weights, learned, require_entries
from rlfusion.config import Finetune
from rlfusion.diffusion.consistency import LCM
from rlfusion.evaluation.gains import gain
from rlfusion.jobs.collector import Collector
from rlfusion.jobs.finetune import about, anew
from rlfusion.jobs.finetune.job import Job, find, prepare
from rlfusion.jobs.finetune.schedule import schedule
from rlfusion.jobs.measure import headlines
from rlfusion.jobs.parts import Parts, opened
from rlfusion.jobs.preflight import try_out
from rlfusion.jobs.tasks import acting_here, actors_of, cluster_of, recipe
from rlfusion.models import lora
from rlfusion.rewards import names_of
from rlfusion.rollout import Backend, Keep, Local, make_backend
from rlfusion.rollout.among_ranks import AmongRanks, InStep
from rlfusion.rollout.object_store import answer_bytes
from rlfusion.training import checkpoint, publishing
from rlfusion.training.checkpoint import Found
from rlfusion.training.devices import pick_device, set_numerics
from rlfusion.training.flops import Flops, peak
from rlfusion.training.identity import Run, enter
from rlfusion.training.loop import train
from rlfusion.training.ranks import Ranks, current
from rlfusion.training.stages import Stages, counting
from rlfusion.training.timing import Stopwatch, last_of
from rlfusion.training.trackers import Followed
from rlfusion.training.trackers.beside import Beside, following
from rlfusion.training.tracking import Tracker, flatten

RESULT = "summary.json"
SPENT = ("seconds", "cpu_seconds")
"""What HPARAMS says of the time, of training alone."""
FAILED = "failed-items"
"""The folder of the items that failed on every worker (``rollout.bundle``)."""


def finetune(config: Finetune, folder: Path, signals: Signals, progress: Progress) -> dict[str, Any]:
    """The whole job in ``folder``, from its newest checkpoint on if it has one.

    Returns:
        {"before": evaluation, "after": evaluation, "queries": rewards asked for in training}.

    Raises:
        ConfigError, CheckpointError, NumericalError, StopRequested: as the exit codes of the command say.
    """
    set_numerics(config.threads, pick_device(config.device), config.deterministic, config.tf32)
    ranks = current()
    with ranks.in_turn():
        run = enter(folder, "finetune", config, config.checkpoints)
        found = None if run.result(RESULT) is not None else run.newest(config.updates)
    for note in run.notes:
        progress.say(note)
    if (result := run.result(RESULT)) is not None:
        progress.say(f"{folder} is finished: this is its result")
        return result
    followed = Followed(folder.name, folder, flatten(asdict(config)))
    with following(config.track, config.track_failures, followed, progress.say) as beside:
        return _followed(config, run, found, beside, signals, progress)


def _followed(
    config: Finetune, run: Run, found: Found | None, beside: Beside, signals: Signals, progress: Progress
) -> dict[str, Any]:
    """The job with its trackers."""
    folder, ranks, start = run.folder, current(), found.step if found else 0
    tracker = Tracker(folder, start, beside)
    if tracker.damaged:
        progress.say(f"{tracker.file}: {tracker.damaged} damaged line(s) are left out")
    parts, device = opened(config), pick_device(config.device)
    with cluster_of(config, progress.say), _actors(parts, ranks) as actors:
        with ranks.in_turn():
            made = find(config, parts, signals, progress, actors)
        job = prepare(config, parts, run, tracker, progress, made)
        _tell(job, start)
        run.require_inputs(job.inputs())
        progress.say(f"plan: {config.agent.plan()}")
        if job.card.pipeline and (line := unusual(config.agent)):
            progress.say(line)
        with _backend(job, actors, ranks) as backend:
            _require_room(job, backend)
            collecting = replace(parts.collecting, least=run.record.changed_after("rollout.lag", "checkpoint_every"))
            collector = Collector(backend, collecting, parts.rewards, job.card.classes, start, device, folder)
            publishing.clear(job.policy, bool(parts.workers.count), folder)
            _begin(job, collector, found, progress)
            _row(job, progress)
            done = _improve(job, collector, signals, progress)
            if ranks.of_first(bool(signals.requested)):
                signals.check()
        publishing.clear(job.policy, bool(parts.workers.count), folder)
        return _finish(job, done, progress)


def _tell(job: Job, start: int) -> None:
    """What TensorBoard says of the run beside its curves."""
    job.tracker.layout(about.charts(job.folder))
    for name, text in about.texts(job.config).items():
        job.tracker.text(start, name, text)
    if job.card.pipeline:
        job.tracker.text(start, "run/prompts", "\n".join(f"- {name}" for name in job.card.names[: about.PROMPTS]))


def unusual(agent: Any) -> str:
    """The line that names the settings of an agent that are not those of its class; "" for none."""
    settings = [(field, getattr(agent, field.name)) for field in fields(agent) if field.default_factory is MISSING]
    told = [f"{field.name} {value}" for field, value in settings if value != field.default]
    return f"agent {label(agent.name)} with other than its usual settings: {', '.join(told)}" if told else ""


@contextmanager
def _actors(parts: Parts, ranks: Ranks) -> Iterator[dict[str, list[str]]]:
    """The running actors of rewards, by name, which are the first rank's."""
    with nullcontext({}) if ranks.rank else actors_of(parts.workers, parts.rewards.given) as own:
        yield json.loads(ranks.exchange(json.dumps(own).encode())[0])


def _backend(job: Job, actors: dict[str, list[str]], ranks: Ranks) -> Backend:
    """The backend of the settings; of several ranks the first has the workers, if there are any."""
    workers = bool(job.config.rollout.workers)
    if shards.roots(job.policy) and not workers:
        return InStep(_acting(job), ranks)
    if ranks.count == 1:
        return _own_backend(job, actors)
    inner = None if workers and ranks.rank else _own_backend(job, actors)
    return AmongRanks(inner, ranks, workers, bool(shards.roots(job.policy)))


def _own_backend(job: Job, actors: dict[str, list[str]]) -> Backend:
    """In this process a pretrained model shares what is not trained with its copy."""
    parts, device = job.parts, pick_device(job.config.device)
    fused = parts.task.rollout.trained is not None
    if fused or (job.card.pipeline and not job.config.rollout.workers):
        return _acting(job)
    described = recipe(parts.task, parts.workers, job.card, job.policy, job.reward, device, actors)
    if shards.roots(job.policy) and job.base is not None:
        described.config["base"] = {"path": str(job.base.resolve()), "sha256": models.digest(job.base)}
    keep = Keep(job.folder / FAILED, job.folder.name, job.card.names)
    return make_backend(described, parts.workers.backend, keep)


def _acting(job: Job) -> Local:
    """Walks in this process."""
    return acting_here(job.parts.task, job.card, job.policy, job.reward, job.config.rollout.overlap)


def _require_room(job: Job, backend: Backend) -> None:
    """Refuse rollouts that do not fit where they run, before any."""
    tensors = {} if publishing.in_files(job.policy, bool(job.parts.workers.count)) else learned(job.policy)
    weights = sum(t.numel() * t.element_size() for t in tensors.values())
    rollout, latent = job.config.rollout, math.prod(job.policy.space.latent(job.card.shape))
    walks = min(rollout.item, rollout.prompts * rollout.samples_per_prompt)
    answer = answer_bytes(walks, len(job.times) - 1, latent, job.parts.task.rollout)
    backend.require_room(weights, rollout.lag + 1, answer)


def _begin(job: Job, collector: Collector, found: Found | None, progress: Progress) -> None:
    """Measure the base model where the checkpoint does not say how it is, under these settings; load the checkpoint;
    publish the weights. What every rank will ask of the reward is tried before any of it.
    """
    state = _fitting(job, found.path) if found else None
    changed = job.run.record.since(found) if found else {}
    known = state is not None and not changed
    told = [] if known else _tried(job, collector)
    job.guarded.plain = lambda: collector.plain
    same = state is not None and anew.MULTIPLIERS not in _stale(job, changed)  # nor have rewards or base
    if line := job.weigh(collector.balance, state["balance"] if same else None, found.step if same else 0):
        progress.say(line)
    job.before = dict(state["before"]) if known else job.evaluate(0)
    checkpoint.write_json_atomic(job.folder / "before.json", job.before)
    if not known or not (job.folder / "samples" / "before.png").is_file():
        job.picture(0, "before")
    if job.config.monitor.every and job.looks:
        job.monitor.begin(state["watch"]["drawn"] if known else "")
    if state is not None:
        with checkpoint.loading(found.path):
            line = _anew(job, state, changed)
            if changed:
                base = collector.balance.state_dict(0)["base"]
                collector.balance.load(state["balance"] | {"base": base}, found.step)
        if line:
            progress.say(line)
        collector.slowed = list(state["slowed"])
        older = _load(job, state, found)
        collector.left = job.config.left(job.learner.queries)
        for weights in older:
            collector.publish(weights)
        progress.say(f"resumed from {found.path}")
        told = _tried(job, collector)
    else:
        collector.left = job.config.left(0)
    for line in told:
        progress.say(line)
    collector.publish(collector.acting(job.learner.policy, job.learner.iteration))


def _tried(job: Job, collector: Collector) -> list[str]:
    """What is to be told of a first few walks of the learner's present weights."""
    weights = collector.acting(job.learner.policy, job.learner.iteration)
    told = try_out(job.parts.task, job.learner, collector, weights)
    return [*([line] if (line := blurring(job)) else []), *told]


def blurring(job: Job) -> str:
    """The line that a learner which trains a denoiser may blur a model that answers with ends of walks; else ""."""
    ends = job.card.answers == "end" or any(isinstance(module, LCM) for module in job.policy.modules())
    if not ends or not job.config.agent.traits().denoises:
        return ""
    return (
        f"warning: the model answers with ends of walks, as consistency models do, and {label(job.config.agent.name)} "
        "trains it as a denoiser, towards means: samples of few steps may blur (docs/distillation.md). draft does not, "
        "nor do ddpo and grpo from two steps on"
    )


def _fitting(job: Job, path: Path) -> dict[str, Any]:
    """The state of a checkpoint, its outer parts as the run's."""
    older = {"slowed": [], "balance": {"base": {}, "multipliers": {}}}  # of runs before there was such a thing
    state = older | checkpoint.load(path)
    with checkpoint.loading(path):
        require_entries(state, job.state_dict(), "the run")
        require_entries(state["watch"], job.monitor.state_dict(), "the monitor")
        require_entries(state["balance"], job.state_dict()["balance"], "the balance")
        require_entries(state["before"], {name: 0.0 for name in state["before"]}, "the evaluation before")
    return state


def _stale(job: Job, changed: Collection[str]) -> tuple[str, ...]:
    """The kinds of state that do not outlive a change of these settings."""
    return anew.stale(changed, job.run.record.settings, names_of(job.config.reward))


def _anew(job: Job, state: dict[str, Any], changed: Collection[str]) -> str:
    """Put back to the beginning what of ``state`` does not outlive a change of these settings; the line about it."""
    kinds = _stale(job, changed)
    begun = anew.begin_anew(state, job.state_dict(), anew.kept(job.config.agent), kinds)
    if anew.BEST in begun and (job.folder / "best").is_dir():
        checkpoint.set_aside(job.folder / "best", "before")
    return anew.told(changed, begun) if begun else ""


def _load(job: Job, state: dict[str, Any], found: Found) -> list[Weights]:
    """Take up the state of a checkpoint; the older weights under which walks to come act, oldest first."""
    with checkpoint.loading(found.path):
        job.guarded.load_state_dict(state["learner"])
        job.monitor.load_state_dict(state["watch"] | {"drawn": job.monitor.drawn})
        if job.learner.iteration != found.step:
            raise StateError(f"the learner's 'iteration' is {job.learner.iteration}, expected {found.step}")
        if 0 < job.config.budget_queries < job.learner.queries:
            raise ConfigError(
                f"budget_queries = {job.config.budget_queries}: after {found.step} updates the run has asked for "
                f"{job.learner.queries} rewards already, expected as many at least, or 0"
            )
        older = {int(version): tensors for version, tensors in state["older_weights"].items()}
        return [job.repacked(version, tensors) for version, tensors in sorted(older.items())]


def _row(job: Job, progress: Progress) -> None:
    """Its row of HPARAMS, whose metrics come at its end."""
    row = about.columns(job.config)
    try:
        known = about.beside(job.folder)
    except ConfigError as error:
        progress.say(f"HPARAMS has the columns of this run alone: {error}")
        known = {}
    job.tracker.row(row, about.shared([known, row]), about.results(headlines(job.before)))


def _improve(job: Job, collector: Collector, signals: Signals, progress: Progress) -> int:
    """The training loop, from the updates done to all, or to where the monitor stops it. Returns the updates done."""
    config, start, total = job.config, collector.start, job.config.updates
    on_the_way = schedule(config, job.card.classes)
    stopwatch, before = Stopwatch(job.folder, start), job.learner.queries
    if start < total and not collector.prompts_of(start):
        progress.say(f"stopped after {start} updates: {_spent(config, before, job.config.queries)}")
        return start
    with ExitStack() as stack:
        begin = stack.enter_context(job.run.writing())
        bar = stack.enter_context(progress.bar("fine-tuning", total, start))
        stages = stack.enter_context(counting(Stages()))
        most = peak(next(job.denoiser.parameters()).device, config.precision)
        flops = stack.enter_context(Flops(job.denoiser.net, most).counting())

        def save(done: int) -> None:
            begin(done, job.resumable(done, collector), metrics)

        metrics: dict[str, float] = {}
        steps = train(job.guarded, collector.batches(), start, total, config.checkpoint_every, save, signals)
        for step, metrics in steps:
            if step == start:
                config.checkpoints.require(metrics)
            done, queries, metrics = step + 1, job.learner.queries, metrics | collector.metrics
            cost, before = queries - before, queries
            moved = collector.backend.moved()
            job.tracker.timing(done, stopwatch.lap(done, queries, stages.taken(), float(cost), flops, moved))
            spent = (
                0 < config.budget_queries < queries + cost if collector.left is None else not collector.prompts_of(done)
            )
            for line in filter(None, (job.guarded.told, collector.heed(done, metrics, config.guard))):
                progress.say(line)
            collector.publish(collector.acting(job.learner.policy, done))
            if config.rollout.lag:
                job.tracker.counts(done, "train/lags", Counter(collector.lags(step)))
            job.tracker.scalars(done, "train", metrics | {"queries": queries})
            if collector.constraints:
                job.tracker.scalars(done, "constraint", collector.constraints)
            if collector.scores is not None:
                job.tracker.histogram(done, "train/rewards", collector.scores)
            if on_the_way.due(done, total) and not spent:
                job.evaluate(done, on_the_way)
            shown = "reward" if "reward" in metrics else "grad_norm"
            stop = _spent(config, queries, cost) if spent else job.probe(done, progress)
            bar.advance(**{shown: metrics[shown]} | job.sight)
            if current().of_first(bool(stop)):
                progress.say(f"stopped after {done} updates: {stop}")
                return done
            stopwatch.go()
    return total


def _spent(config: Finetune, queries: int, cost: int) -> str:
    """Why a run ends that may ask for no more."""
    told = f"{queries} of its budget of {config.budget_queries} queries are spent"
    return told if queries == config.budget_queries else f"{told}, and an update asks {cost}"


def _at_the_goal(folder: Path, progress: Progress) -> dict[str, float | None]:
    """What HPARAMS says of the goal; of several ranks the first has the files to tell it from."""
    if not storage.writes():
        return {}
    try:
        return {f"final/{name}": value for name, value in about.at_the_goal(folder).items()}
    except ConfigError as error:
        progress.say(f"HPARAMS says nothing of the goal: {error}")
        return {}


def _finish(job: Job, total: int, progress: Progress) -> dict[str, Any]:
    """Measure, draw and save the result after ``total`` updates."""
    folder = job.folder
    after = job.evaluate(total)
    job.picture(total, "after")
    with job.learner.optimization.ema.averaged():
        models.save(folder / "model", job.denoiser, job.card)
        if job.config.lora and not job.card.pipeline:
            lora.save(folder / "adapter", job.denoiser.net)
    result = {"before": job.before, "after": after, "queries": job.learner.queries, "updates": total}
    if job.monitor.best.step > 0:
        result["best"] = {"updates": job.monitor.best.step, job.monitor.best.name: job.monitor.best.value}
    won = gain(after["reward"], job.before["reward"], job.before["reward_std"])
    final: dict[str, float | None] = {"final/gain": won, **_at_the_goal(folder, progress)}
    final |= {f"final/{name}": after[name] for name in headlines(after)}
    final |= {f"final/{name}": value for name, value in last_of(folder).items() if name in SPENT}
    job.tracker.results(final | {"final/queries": float(job.learner.queries)})
    job.run.seal(RESULT, result)
    return result
