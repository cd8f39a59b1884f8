"""The job of ``rlfusion pretrain``, and the base model that a fine-tuning without one makes and keeps."""

import hashlib
import json
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from rlfusion import models
from rlfusion.common import on_disk, storage
from rlfusion.common.code_files import files_of
from rlfusion.common.errors import ConfigError
from rlfusion.common.progress import Progress
from rlfusion.common.stops import Signals
from rlfusion.config import Base, Evaluation, Pretrain, to_yaml
from rlfusion.config.parts import Learners
from rlfusion.data import Dataset, load
from rlfusion.data.sources import absolute
from rlfusion.diffusion.chain import Chain
from rlfusion.diffusion.denoiser import Denoiser, require_readable
from rlfusion.diffusion.policy import Policy
from rlfusion.evaluation import bits_per_dim, require_bound
from rlfusion.jobs import pretrain_autoencoder
from rlfusion.jobs.measure import GRID_COLUMNS, Judged, grid_samples, measure, require_judgeable, require_unchanged
from rlfusion.pretrain import Learner, losses, noisy_labels
from rlfusion.rollout.ray_address import require_cluster
from rlfusion.training import checkpoint, identity
from rlfusion.training import fit as fitting
from rlfusion.training.devices import pick_device, place, set_numerics
from rlfusion.training.folders import locked
from rlfusion.training.ranks import Ranks, current, joined
from rlfusion.training.trackers import Followed, require_usable
from rlfusion.training.trackers.beside import Beside, following
from rlfusion.training.tracking import Tracker, flatten, grid, save_png

CACHE_FORMAT = 1
"""Rises when pretraining changes, so that base models cached before are not taken for new ones."""


class How(NamedTuple):
    """Whether the network is split over the ranks, and the trackers that follow the training."""

    split: bool = False
    beside: Beside | None = None


ALONE = How()


def fit(
    config: Base,
    card: models.Card,
    data: Dataset,
    folder: Path,
    device: torch.device,
    signals: Signals,
    progress: Progress,
    how: How = ALONE,
) -> None:
    """Pretrain into ``folder``, from its newest checkpoint on if it has one; leaves the model in ``folder/model``.

    Raises:
        NumericalError: a gradient is not finite; the last checkpoint stands.
        StopRequested: a signal came; all work is saved.
    """
    with current().in_turn():
        run = identity.enter(folder, "pretrain", config, config.keep)
    run.require_inputs({"data": data.sha256})
    denoiser = models.build(card, config.seed, within=on_disk.parameters(how.split))
    place(denoiser, denoiser.net, device, how.split)
    if config.autoencoder:
        denoiser.space = pretrain_autoencoder.load(Path(config.autoencoder))
    learner = Learner(denoiser, data, config.train, config.seed)
    every, shown = config.checkpoint_every, fitting.Shown("pretraining", "pretrain", beside=how.beside)
    fitting.fit(learner, run, config.train.steps, every, signals, progress, shown)
    with learner.optimization.ema.averaged():
        models.save(folder / "model", denoiser, card)
    run.finish(*identity.MODEL)


def card_of(config: Base, data: Dataset) -> models.Card:
    """The card of the model that ``config`` makes of ``data``.

    Raises:
        ConfigError: no autoencoder where one is named, or one for samples of another shape.
    """
    about = {}
    if config.autoencoder:
        space = pretrain_autoencoder.load(Path(config.autoencoder))
        made_for = tuple(space.about.get("shape", data.shape))
        if made_for != data.shape or not space.returns(data.shape):
            raise ConfigError(
                f"autoencoder = {config.autoencoder!r} does not bring samples {data.shape} back in their shape: "
                f"expected one for such samples, and this is for {made_for if made_for != data.shape else 'others'}"
            )
        about = space.about
    answers = losses.make(config.train.loss).answers
    card = models.Card(config.model, data.shape, data.names, captioned=data.captioned, autoencoder=about)
    held = {"data": absolute(config.data), "size": config.size, "held_out": config.held_out, "sha256": data.sha256}
    return replace(card, answers=answers, data=held)


def base_model(config: Base, root: Path, device: torch.device, signals: Signals, progress: Progress) -> Path:
    """The folder of the model that ``config`` describes: from ``root/cache``, or pretrained there now."""
    data = load(config.data, config.size)
    folder = root / "cache" / f"base-{_digest(config, data)}"
    storage.make_folder(folder)
    with locked(folder, signals, progress.say):
        if not identity.made(folder, config, identity.MODEL[0]):
            storage.write(folder / "config.yaml", to_yaml(config))
            card = card_of(config, data)
            try:
                fit(config, card, data.split(config.held_out)[0], folder, device, signals, progress)
            except identity.DiffersError as error:
                raise ConfigError(f"{folder} holds another base model: remove it, and this is made again") from error
    return folder / "model"


def _digest(config: Base, data: Dataset) -> str:
    """16 hex digits over all that the weights depend on."""
    same = {name: value for name, value in asdict(config).items() if name != "checkpoint_every"}
    if files := files_of(same):
        same["files"] = files
    digest = hashlib.sha256(json.dumps([CACHE_FORMAT, same], sort_keys=True).encode())
    if config.autoencoder:
        space = pretrain_autoencoder.load(Path(config.autoencoder))
        digest.update(models.space_blob(space)["space"] + json.dumps(space.about, sort_keys=True).encode())
    digest.update(data.x.numpy().tobytes() + data.label.numpy().tobytes())
    if data.held is not None:
        digest.update(data.held.numpy().tobytes())
    return digest.hexdigest()[:16]


def check(config: Pretrain) -> models.Card:
    """Refuse what cannot work, before any work: data, device, cluster, network, schedule, kernel. Returns the model's
    card.

    Raises:
        ConfigError: says which setting and why.
        RolloutError: no Ray cluster answers at its address.
    """
    pick_device(config.device)
    require_usable(config.track)
    if config.learner.ranks:
        require_cluster(config.ray.address, config.ray.connect_timeout_s)
    data = load(config.data, config.size)
    if data.grouped:
        require_judgeable(data, config.held_out)
    elif not len(data.split(config.held_out)[0]):
        raise ConfigError(f"held_out = {config.held_out} leaves none of the {len(data)} samples for training")
    data.require_trained(config.held_out)
    card = card_of(config, data)
    denoiser = models.build(card, within=on_disk.parameters(config.learner.split))
    losses.make(config.train.loss).check(denoiser)
    require_solvable(denoiser, config.chain)
    require_no_class(config, config.chain)
    policy = config.chain.policy(denoiser, card.names)
    if config.evaluation.bits_per_dim:
        require_bound(policy, config.chain.times(denoiser), data.split(config.held_out)[1])
    return card


def require_no_class(config: Base, chain: Chain) -> None:
    """Refuse guidance away from "no class" for a network that ``config`` never shows it.

    Raises:
        ConfigError: no label is dropped.
    """
    if chain.weight and not chain.negative and not config.train.label_dropout:
        raise ConfigError(
            f"guidance = {chain.weight} with train.label_dropout = 0.0: the network never learns its answer to "
            '"no class"; expected a label_dropout above 0, or chain.negative'
        )


def require_solvable(denoiser: Denoiser, chain: Chain) -> None:
    """Refuse a chain on which the network's kind cannot be read at every step (eps at pure noise, say), or whose kernel
    has no such step (an eta beyond eta_max, say).

    Raises:
        ConfigError: names the kind and the level, or the kernel's setting.
    """
    kernel, times = chain.make_kernel(), chain.times(denoiser)
    require_readable(denoiser, times[:-1])
    Policy(denoiser, kernel).stds(times)


def pretrain(config: Pretrain, folder: Path, signals: Signals, progress: Progress) -> dict[str, float]:
    """The whole job in ``folder``: train, evaluate, draw the grid. Returns the evaluation."""
    set_numerics(config.threads, pick_device(config.device), config.deterministic, config.tf32)
    data = load(config.data, config.size, progress.say)
    config.chain.make_kernel()
    device = pick_device(config.device)
    card = replace(card_of(config, data), chain=asdict(config.chain))
    with followed(config, folder, progress) as beside:
        how = How(config.learner.split, beside)
        fit(config, card, data.split(config.held_out)[0], folder, device, signals, progress, how)
        return show(config, folder, data, config.train.steps, beside)


def followed(config: Any, folder: Path, progress: Progress) -> AbstractContextManager[Beside]:
    """The trackers of a training that asks for no rewards, while it is at work."""
    run = Followed(folder.name, folder, flatten(asdict(config)))
    return following(config.track, config.track_failures, run, progress.say, asks=False)


class Shown(Protocol):
    """Settings of a job that ends with a model to look at: of ``pretrain`` and ``distill``."""

    root: str
    seed: int
    device: str
    held_out: float
    chain: Chain
    evaluation: Evaluation
    learner: Learners


def show(config: Shown, folder: Path, data: Dataset, step: int, beside: Beside) -> dict[str, float]:
    """Evaluate the model in ``folder``, made in ``step`` updates, and draw its grid. Returns the evaluation. The first
    of several ranks does so alone; {} is what the others give. Where networks are split all ranks do so, alike.

    Where the data has fewer than two classes, or captions without a second sample, nothing can teach a judge: only the
    grid is drawn (and bits_per_dim, if asked).
    """
    if config.learner.split:
        return _shown(config, folder, data, step, beside)
    if current().rank:
        return {}
    with joined(Ranks()):
        return _shown(config, folder, data, step, beside)


def _shown(config: Shown, folder: Path, data: Dataset, step: int, beside: Beside) -> dict[str, float]:
    device = pick_device(config.device)
    with current().in_turn():
        denoiser, card = models.load(folder)
        judged = Judged.of(data, config.held_out, Path(config.root), device) if data.grouped else None
    place(denoiser, denoiser.net, device, config.learner.split)
    policy = config.chain.policy(denoiser, card.names)
    times = config.chain.times(denoiser)
    columns = min(card.classes, GRID_COLUMNS)
    picture = grid(grid_samples(policy, times, columns, card.shape, config.seed), columns)
    save_png(folder / "samples" / "grid.png", picture)
    tracker = Tracker(folder, step, beside)
    tracker.image(step, "samples", picture, card.names[:columns])
    result: dict[str, float] = {}
    if judged is not None:
        result = measure(policy, times, judged, None, config.evaluation, config.seed)
    elif config.evaluation.bits_per_dim:
        result = bits_per_dim(policy, times, data.split(config.held_out)[1], config.seed)
    if result:
        tracker.scalars(step, "evaluation", result)
        beside.summary({f"final/{name}": value for name, value in result.items()})
        checkpoint.write_json_atomic(folder / "evaluation.json", result)
    return result


def seen_data(path: str, made: Base, train: Dataset) -> Dataset:
    """The training samples as the model in ``path`` saw them: with its noisy labels, where it is made here ("")."""
    if path:
        return train
    return replace(train, label=noisy_labels(train, made.train.label_noise, made.seed))


def require_same_data(what: str, card: models.Card, made: models.Card, data: str) -> None:
    """Refuse a model of samples or classes other than the data's, whose card is ``made``; or data that are no longer
    those that it was pretrained on.

    Raises:
        ConfigError: says of ``what`` it makes, and what ``data`` has.
    """
    if (made.shape, made.names) != (card.shape, card.names):
        raise ConfigError(
            f"{what} makes {card.shape} of {card.classes} classes: "
            f"pretrain.data = {data!r} has {made.shape}, {made.classes}"
        )
    require_unchanged(what, card.data, made.data)
