"""The job of ``rlfusion finetune``: rollouts feed a learner, weights go back, and everything is measured and kept.

    step s:  items of step s under the weights version_for(s)  ->  trajectories  ->  learner.update  ->  weights s + 1

Rollouts are pure functions of (settings, step, weights); so a run that resumes from a checkpoint repeats what the
uninterrupted run did, bit for bit, and no queue is saved.
"""

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlfusion import checkpoint, models
from rlfusion.agents import ddpo
from rlfusion.config import Chain, Finetune
from rlfusion.data import load, to_pixels
from rlfusion.denoiser import Denoiser
from rlfusion.errors import ConfigError
from rlfusion.evaluate import require_bound, require_independent
from rlfusion.measure import Judged, grid_samples, make_reward, measure, require_judgeable
from rlfusion.policy import Policy
from rlfusion.preflight import preflight
from rlfusion.pretraining import base_model, require_solvable
from rlfusion.progress import Progress
from rlfusion.rewards import Reward, build, score
from rlfusion.rollout import Backend, Pending, make_backend, plan, version_for
from rlfusion.run import Signals, pick_device, set_numerics, train
from rlfusion.tasks import recipe, worker_options
from rlfusion.tracking import Tracker, flatten, grid, save_png
from rlfusion.trajectory import Trajectory, concatenate
from rlfusion.weights import Weights, pack, sha256, unpack

PREFLIGHT_SAMPLES = 64
TRIED = 4
HEADLINES = ("reward", "agreement", "frechet", "frechet_floor", "precision", "recall", "diversity_relative")


class Collector:
    """Trajectories in order of their step, collected up to ``lag`` steps ahead of the learner.

    ``publish`` gives it the weights after n updates; it sends out every step that acts under that version.
    """

    def __init__(self, backend: Backend, config: Finetune, prompts: int, start: int) -> None:
        self.backend, self.config, self.prompts, self.start = backend, config, prompts, start
        self.device = pick_device(config.device)
        self.pending: dict[int, Pending] = {}
        self.published: dict[int, Weights] = {}

    def publish(self, weights: Weights) -> None:
        """Send out the steps whose version these weights are."""
        self.published[weights.version] = weights
        last = min(weights.version + self.config.rollout.lag, self.config.updates - 1)
        for step in range(max(self.start, weights.version), last + 1):
            if self.version(step) == weights.version:
                self.pending[step] = self.backend.submit(self.items(step, weights.version), weights)
        for old in [v for v in self.published if v < weights.version - self.config.rollout.lag]:
            del self.published[old]

    def version(self, step: int) -> int:
        """The version that acts in a step."""
        return version_for(step, self.config.rollout.lag, self.config.checkpoint_every)

    def items(self, step: int, version: int) -> list:
        """The work items of a step."""
        r = self.config.rollout
        return plan(self.config.seed, step, r.prompts, r.samples_per_prompt, r.item, self.prompts, version)

    def batches(self) -> Iterator[Trajectory]:
        """The trajectory of each step from the start on."""
        for step in range(self.start, self.config.updates):
            yield concatenate(self.pending.pop(step)()).to(self.device)

    def still_needed(self, done: int) -> dict[int, Weights]:
        """The older versions that steps after ``done`` act under: empty at a regular checkpoint."""
        ahead = range(done, min(done + self.config.rollout.lag, self.config.updates))
        wanted = {self.version(step) for step in ahead} - {done}
        return {v: w for v, w in self.published.items() if v in wanted}


@dataclass
class Job:
    """One fine-tuning run: what its parts share."""

    config: Finetune
    folder: Path
    card: models.Card
    denoiser: Denoiser
    policy: Policy
    times: Tensor
    learner: ddpo.Learner
    judged: Judged
    reward: Reward
    tracker: Tracker

    def evaluate(self, step: int) -> dict[str, float]:
        """Measure the averaged weights with the chain's own sampler, and log it."""
        c = self.config
        with self.learner.optimization.ema.averaged():
            result = measure(self.policy, self.times, self.judged, self.reward, c.reward_name, c.evaluation, c.seed)
            ode = self._ode(step)
        self.tracker.scalars(step, "evaluation", result)
        self.tracker.scalars(step, "evaluation_ode", ode)
        return result

    def _ode(self, step: int) -> dict[str, float]:
        """The same with the deterministic sampler, DDIM(eta=0): what many users will sample with."""
        c = self.config
        policy = Policy(self.policy.denoiser, Chain(kernel="DDIM(eta=0.0)").make_kernel())
        settings = replace(c.evaluation, bits_per_dim=False)  # no density
        result = measure(policy, self.times, self.judged, self.reward, c.reward_name, settings, c.seed)
        return {name: result[name] for name in ("reward", "agreement", "frechet")}

    def picture(self, step: int, name: str) -> Tensor:
        """Draw the grid of the averaged weights on its fixed seeds, and keep it as PNG and in TensorBoard."""
        with self.learner.optimization.ema.averaged():
            samples = grid_samples(self.policy, self.times, self.card.classes, self.card.shape, self.config.seed)
        picture = grid(samples, self.card.classes)
        save_png(self.folder / "samples" / f"{name}.png", picture)
        self.tracker.image(step, f"samples/{name}", picture)
        return picture

    def save(self, step: int, collector: Collector) -> None:
        """A checkpoint of all that resuming needs."""
        older = {str(v): unpack(w.blob) for v, w in collector.still_needed(step).items()}
        state = {"learner": self.learner.state_dict(), "older_weights": older}
        self.tracker.flush()
        checkpoint.save(self.folder / "checkpoints", step, state)


def check(config: Finetune) -> None:
    """Refuse what cannot work, before any work: device, base model, data, chain, learner, reward.

    Raises:
        ConfigError: says which setting and why.
    """
    pick_device(config.device)
    data = load(config.pretrain.data, config.pretrain.size)
    require_judgeable(data, config.pretrain.held_out)
    made = models.Card(config.pretrain.model, data.shape, data.names)
    card = models.load_card(Path(config.base)) if config.base else made
    if (made.shape, made.names) != (card.shape, card.names):
        raise ConfigError(
            f"base = {config.base!r} makes {card.shape} of {card.classes} classes: "
            f"pretrain.data = {config.pretrain.data!r} has {made.shape}, {made.classes}"
        )
    denoiser = models.load(Path(config.base))[0] if config.base else models.build(card)
    require_solvable(denoiser, config.chain)
    policy = config.chain.policy(denoiser, torch.tensor([card.classes]))
    times = config.chain.times(denoiser)
    ddpo.Learner(policy, times, config.agent, config.seed)
    if config.evaluation.bits_per_dim:
        require_bound(policy, times, data)
    given = config.reward_options.get("class_logprob", {}).get("weights")
    reward = build(config.reward, config.reward_options if given else worker_options(config, card))
    score(reward, to_pixels(data.x[:TRIED]), data.label[:TRIED], config.reward_name)


def prepare(config: Finetune, folder: Path, tracker: Tracker, signals: Signals, progress: Progress) -> Job:
    """Find or make the base model, the judge and the reward, and build the learner with the base model's weights.

    Raises:
        ConfigError: settings that cannot work together.
    """
    root, device = Path(config.root), pick_device(config.device)
    config.chain.make_kernel()
    base = Path(config.base) if config.base else base_model(config.pretrain, root, device, signals, progress)
    denoiser, card = models.load(base)
    policy = config.chain.policy(denoiser.to(device), torch.tensor([card.classes]))
    times = config.chain.times(denoiser)
    learner = ddpo.Learner(policy, times, config.agent, config.seed)
    data = load(config.pretrain.data, config.pretrain.size)
    judged = Judged.of(data, config.pretrain.held_out, root, device)
    reward = make_reward(config.reward, config.reward_options, judged.train, root)
    require_independent(judged.judge, reward)
    if isinstance(reward, torch.nn.Module):
        reward.to(device)
    return Job(config, folder, card, denoiser, policy, times, learner, judged, reward, tracker)


def finetune(config: Finetune, folder: Path, signals: Signals, progress: Progress) -> dict[str, Any]:
    """The whole job in ``folder``, from its newest checkpoint on if it has one.

    Returns:
        {"before": evaluation, "after": evaluation, "queries": rewards asked for in training}.

    Raises:
        ConfigError, NumericalError, StopRequested: as the exit codes of the command say.
    """
    set_numerics(config.threads, pick_device(config.device))
    found = checkpoint.latest(folder / "checkpoints")
    start = found.step if found else 0
    finished = folder / "summary.json"
    if start == config.updates and finished.is_file():
        progress.say(f"{folder} is finished: this is its result")
        return json.loads(finished.read_text())
    with closing(Tracker(folder, start)) as tracker:
        job = prepare(config, folder, tracker, signals, progress)
        progress.say(f"plan: {config.agent.plan()}")
        with make_backend(recipe(config, job.card, job.reward, pick_device(config.device)), config.settings) as backend:
            collector = Collector(backend, config, job.card.classes, start)
            before = _begin(job, collector, found.path if found else None, progress)
            _improve(job, collector, signals, progress)
        return _finish(job, before)


def _begin(job: Job, collector: Collector, path: Path | None, progress: Progress) -> dict[str, float]:
    """Load the checkpoint, or measure and check the base model; publish the weights. Returns the base's evaluation."""
    file = job.folder / "before.json"
    if path is not None:
        state = checkpoint.load(path)
        job.learner.load_state_dict(state["learner"])
        for version, tensors in sorted(state["older_weights"].items(), key=lambda held: int(held[0])):
            blob = pack(tensors)
            collector.publish(Weights(int(version), sha256(blob), blob))
        before = json.loads(file.read_text())
        progress.say(f"resumed from {path}")
    else:
        before = job.evaluate(0)
        checkpoint.write_json_atomic(file, before)
        job.picture(0, "before")
    weights = Weights.of(job.policy, job.learner.iteration)
    _preflight(job, collector, weights, progress)
    collector.publish(weights)
    return before


def _preflight(job: Job, collector: Collector, weights: Weights, progress: Progress) -> None:
    item = collector.items(-1, weights.version)[0]
    small = replace(item, groups=item.groups[:PREFLIGHT_SAMPLES])
    found = preflight(job.learner, concatenate(collector.backend.collect([small], weights)).to(collector.device))
    if found["reward_std"] == 0:
        progress.say(
            "warning: all rewards of the first walks are equal; while they are, there is nothing to learn from"
        )
    progress.say("preflight: " + ", ".join(f"{name} {value:.3g}" for name, value in found.items()))


def _improve(job: Job, collector: Collector, signals: Signals, progress: Progress) -> None:
    """The training loop, from the updates done to all."""
    config, start, total = job.config, collector.start, job.config.updates

    def save(step: int) -> None:
        job.save(step, collector)

    steps = train(job.learner, collector.batches(), start, total, config.checkpoint_every, save, signals)
    with progress.bar("fine-tuning", total, start) as bar:
        for step, metrics in steps:
            done = step + 1
            collector.publish(Weights.of(job.policy, done))
            job.tracker.scalars(done, "train", metrics)
            if config.evaluation.every and done % config.evaluation.every == 0 and done < total:
                job.evaluate(done)
            bar.advance(reward=metrics["reward"], clipped=metrics["clip_fraction"])


def _finish(job: Job, before: dict[str, float]) -> dict[str, Any]:
    """Measure, draw and save the result."""
    total, folder = job.config.updates, job.folder
    after = job.evaluate(total)
    job.picture(total, "after")
    with job.learner.optimization.ema.averaged():
        models.save(folder / "model", job.denoiser, replace(job.card, chain=asdict(job.config.chain)))
    walks = job.config.rollout.prompts * job.config.rollout.samples_per_prompt
    result = {"before": before, "after": after, "queries": walks * total}
    job.tracker.hparams(flatten(asdict(job.config)), {f"final/{name}": after[name] for name in HEADLINES})
    job.tracker.flush()
    checkpoint.write_json_atomic(folder / "summary.json", result)
    return result
