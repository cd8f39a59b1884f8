"""The job of ``rlfusion distill``: a teacher, a student, a method between them, and a look at the result.

batches  ->  learner.update  ->  the student's averaged weights, saved as a model with its own chain
"""

from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import chain as joined
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from rlfusion import models
from rlfusion.common import on_disk
from rlfusion.common.errors import ConfigError
from rlfusion.common.progress import Progress
from rlfusion.common.stops import Signals
from rlfusion.config import Distill
from rlfusion.data import Dataset, load
from rlfusion.diffusion.chain import Chain
from rlfusion.diffusion.consistency import LCM
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.distill import Distiller, OnSchedule, Stage, Staged, Teaching
from rlfusion.distill.student import Match, adopt, require_agreement
from rlfusion.jobs import pretrain
from rlfusion.jobs.measure import require_judgeable
from rlfusion.jobs.pretrain import base_model, card_of, followed, require_same_data, require_solvable, seen_data, show
from rlfusion.models.autoencoder import encoded
from rlfusion.rollout.ray_address import require_cluster
from rlfusion.training import fit as fitting
from rlfusion.training import identity
from rlfusion.training.devices import pick_device, place, set_numerics
from rlfusion.training.loop import stop_if_asked
from rlfusion.training.ranks import current
from rlfusion.training.trackers import require_usable
from rlfusion.training.trackers.beside import Beside


class Plan(NamedTuple):
    """The stages of a run: ``match`` updates of matching, if any, and the method's."""

    match: int
    method: int

    @property
    def total(self) -> int:
        return self.match + self.method


def check(config: Distill) -> None:
    """Refuse what cannot work, before any work: device, cluster, teacher, data, student, chain, method.

    Raises:
        ConfigError: says which setting and why.
        RolloutError: no Ray cluster answers at its address.
    """
    pick_device(config.device)
    require_usable(config.track)
    if config.workers or config.learner.ranks:
        require_cluster(config.ray.address, config.ray.connect_timeout_s)
    data = load(config.pretrain.data, config.pretrain.size)
    if data.grouped:
        require_judgeable(data, config.held_out)
    split = config.learner.split
    if config.teacher:
        teacher, card = (models.load_on_disk if split else models.load)(Path(config.teacher))
    else:
        card = card_of(config.pretrain, data)
        teacher = models.build(card, within=on_disk.parameters(split))
    require_same_data(f"teacher = {config.teacher!r}", card, card_of(config.pretrain, data), config.pretrain.data)
    teaching = teach(config, teacher, card, data.split(config.held_out)[0], Path(), torch.device("cpu"))
    require_solvable(teaching.student, config.chain)
    require_no_class(config, teaching.card)
    config.chain.policy(teaching.student, card.names)
    require_denoiser(config, card)
    config.method.check(teaching)


def require_denoiser(config: Distill, teacher: models.Card) -> None:
    """Refuse answers of a consistency function to a method that asks for a denoiser's.

    Raises:
        ConfigError: the teacher's answer is the end of a walk.
    """
    if config.method.ASKS and (teacher.boundary or teacher.answers == "end"):
        by = f"boundary, {teacher.boundary}" if teacher.boundary else "training"
        raise ConfigError(
            f"teacher = {config.teacher!r}: by its {by} it answers with the end of a walk, as a consistency function "
            f"does; {config.method.name} expected a denoiser, which says the mean"
        )


def require_no_class(config: Distill, student: models.Card) -> None:
    """Refuse guidance away from "no class" by a teacher made here, or of a student, that is never shown it.

    Raises:
        ConfigError: no label is dropped.
    """
    if not config.teacher:
        weight = student.weights[-1] if student.weights else config.guidance
        pretrain.require_no_class(config.pretrain, Chain(guidance=weight))
    if config.chain.weight and not student.weights and not config.chain.negative and not config.method.label_dropout:
        raise ConfigError(
            f"chain.guidance = {config.chain.weight} with method.label_dropout = 0.0: the student is never taught its "
            'answer to "no class"; expected guidance = ..., which builds it into the student, a label_dropout above 0, '
            "or chain.negative"
        )


def teach(
    config: Distill,
    teacher: Denoiser,
    card: models.Card,
    data: Dataset,
    folder: Path,
    device: torch.device,
    split: bool = False,
) -> Teaching:
    """The student of ``teacher`` with its first weights, and what it learns from. ``data`` are pixels. ``split``: both
    networks over the ranks.

    Raises:
        ConfigError: a student that cannot take the teacher's weights, schedules too far apart, an unusable guidance.
    """
    own = config.method.card(config.student.card(card, asdict(config.chain)))
    own = replace(own, answers=config.method.ANSWERS)
    student = models.build(own, config.seed, within=on_disk.parameters(config.learner.split))
    student.space = teacher.space
    if config.student.init == "teacher":
        require_agreement(own, card)
        adopt(student, teacher)
    place(student, student.net, device, split)
    place(teacher.requires_grad_(False), teacher.net, device, split)
    guided = Chain(guidance=config.guidance).policy(teacher, card.names).denoiser
    unguided = _on(teacher, student)
    answers = unguided if guided is teacher else _on(guided, student)
    samples = encoded(data, teacher.space)
    about = (own, card, config.chain, samples, config.guidance, config.seed, folder, config.settings)
    return Teaching(answers, unguided, student, *about)


def _on(teacher: nn.Module, student: Denoiser) -> nn.Module:
    """``teacher`` on the student's schedule."""
    return teacher if teacher.schedule == student.schedule else OnSchedule(teacher, student.schedule)


def plan(config: Distill, teaching: Teaching) -> Plan:
    """How many updates each part takes."""
    return Plan(config.student.match if config.student.init == "match" else 0, config.method.total(teaching))


def make_learner(config: Distill, teaching: Teaching) -> Distiller:
    """The method's learner, after the student's matching where it has one."""
    method, match = config.method, plan(config, teaching).match
    if not match:
        return method.learner(teaching)
    return Staged(
        [
            Stage(match, lambda: _matching(config, teaching)),
            Stage(method.total(teaching), lambda: method.learner(teaching)),
        ]
    )


def batches(config: Distill, teaching: Teaching, start: int) -> Iterator[Any]:
    """What the updates from ``start`` on get."""
    match = plan(config, teaching).match
    return joined(range(start, match), config.method.batches(teaching, max(0, start - match)))


def _matching(config: Distill, teaching: Teaching) -> Distiller:
    """Eq. (1) of ``distill.student``, of what a consistency boundary is around."""
    student = teaching.student
    inside = replace(teaching, student=student.denoiser if isinstance(student, LCM) else student)
    settings = replace(config.method, lr=config.student.match_lr)
    return settings.fit(inside, Match(teacher=teaching.teacher), config.student.match, "match")


def fit(
    config: Distill,
    teaching: Teaching,
    folder: Path,
    signals: Signals,
    progress: Progress,
    beside: Beside | None = None,
) -> None:
    """Distil into ``folder``, from its newest checkpoint on if it has one; leaves the student in ``folder/model``.

    Raises:
        NumericalError: a gradient is not finite; the last checkpoint stands.
        StopRequested: a signal came; all work is saved.
    """
    with current().in_turn():
        run = identity.enter(folder, "distill", config, config.checkpoints)
    told = {"teacher": models.digest(Path(config.teacher))} if config.teacher else {}
    run.require_inputs({"pretrain.data": teaching.data.sha256, **told})
    learner, stages = make_learner(config, teaching), plan(config, teaching)
    given = partial(batches, config, teaching)
    every, bar = config.checkpoint_every, fitting.Shown("distilling", "distill", beside=beside)
    fitting.fit(learner, run, stages.total, every, signals, progress, bar, batches=given)
    with learner.optimization.ema.averaged():
        models.save(folder / "model", teaching.student, teaching.card)


def distill(config: Distill, folder: Path, signals: Signals, progress: Progress) -> dict[str, float]:
    """The whole job in ``folder``. Returns the evaluation of the student.

    Raises:
        ConfigError, NumericalError, StopRequested: as the exit codes of the command say.
    """
    device = pick_device(config.device)
    set_numerics(config.threads, device, config.deterministic, config.tf32)
    root, data = Path(config.root), load(config.pretrain.data, config.pretrain.size, progress.say)
    with current().in_turn():
        path = Path(config.teacher) if config.teacher else base_model(config.pretrain, root, device, signals, progress)
        teacher, card = (models.load_on_disk if config.learner.split else models.load)(path)
    train_data = seen_data(config.teacher, config.pretrain, data.split(config.held_out)[0])
    teaching = teach(config, teacher, card, train_data, folder, device, config.learner.split)
    teaching = replace(teaching, say=progress.say, stop=partial(stop_if_asked, signals))
    stages = plan(config, teaching)
    progress.say(f"plan: {config.method.name}, {stages.total} updates; a student of {config.chain.moves} steps")
    with followed(config, folder, progress) as beside:
        fit(config, teaching, folder, signals, progress, beside)
        return show(config, folder, data, stages.total, beside)
