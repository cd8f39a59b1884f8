"""The interface of distillation methods: the settings, the student, and the learner.

A method is one file with a frozen dataclass, as an algorithm of fine-tuning is. It gets a ``Teaching``: the teacher as
a function on the student's own schedule, so that only one schedule and one table of kinds is ever in play:

    (1)  teacher(x_t, t, c) = (x0_hat, eps_hat),     x_t = alpha(t) x0 + sigma(t) eps  on the student's schedule
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from rlfusion.common import spec
from rlfusion.common.errors import ConfigError, require_not_negative, require_positive
from rlfusion.data import Dataset
from rlfusion.diffusion.chain import Chain
from rlfusion.diffusion.denoiser import Answers, Denoiser, Embedded
from rlfusion.distill.on_schedule import on_its_own
from rlfusion.distill.pairs import Making, Pairs, Source, make_pairs
from rlfusion.distill.student import Config as Student
from rlfusion.models import Card
from rlfusion.pretrain import Draws, Loss, LossLearner
from rlfusion.rollout import Settings as Workers
from rlfusion.training import optimizers
from rlfusion.training.optimization import EMA_RULES, Learner, Optimization


@dataclass(frozen=True)
class Teaching:
    """Everything that a method learns from. Only the student in it is trained.

    Attributes:
        teacher: Eq. (1), frozen, with the guidance that the run sets.
        unguided: the same without guidance, for methods that draw the guidance weight.
        student: with its initial weights, on the device.
        card: of the student.
        teacher_card: of the teacher.
        chain: the sampler of the student.
        data: training samples in the student's space (latents, where the teacher has an autoencoder).
        guidance: the weight w with which the teacher answers.
        seed: keys every draw.
        folder: of the run; a method may keep files of its own there.
        workers: who makes pairs of the teacher.
        say: tells the user.
        stop: raises where a signal asked to stop; called where little work is lost by it.
    """

    teacher: nn.Module
    unguided: nn.Module
    student: Denoiser
    card: Card
    teacher_card: Card
    chain: Chain
    data: Dataset
    guidance: float
    seed: int
    folder: Path
    workers: Workers = field(default_factory=Workers)
    say: Callable[[str], None] = print
    stop: Callable[[], None] = lambda: None

    def pairs(
        self, making: Making, name: str = "pairs", source: Denoiser | None = None, round: int = 0
    ) -> Callable[[], Pairs]:
        """What makes, or finds in ``folder/name``, pairs of the teacher; or of ``source``, a student as it was. Each
        ``round`` has noise of its own.
        """
        own = Source(self.own, self.teacher_card, self.guidance)
        model = own if source is None else Source(source, self.card, 0.0)
        about = (making, self.folder / name, self.seed, self.workers, self.say, self.stop, round)
        return partial(make_pairs, model, *about)

    @property
    def device(self) -> torch.device:
        return next(self.student.parameters()).device

    @property
    def times(self) -> Tensor:
        """The falling times of the student's chain."""
        return self.chain.times(self.student)

    @property
    def null(self) -> Tensor:
        """The condition, of batch 1, that means none."""
        return torch.tensor([self.data.classes], device=self.device)

    @property
    def own(self) -> Denoiser:
        """The teacher on its own schedule, without guidance."""
        return on_its_own(self.unguided)

    @property
    def begins(self) -> Denoiser | Embedded:
        """``own`` as what fake denoisers and discriminators begin as; one that reads the guidance weight is at that of
        the run.
        """
        return self.own if self.own.weights is None else Embedded(self.own, self.guidance)


class Distiller(Learner[Any], Protocol):
    """A learner of the student; ``optimization`` holds its weights and their average, which is what is saved.

    ``state_dict`` holds every network and optimiser that the method trains or that changes with it.
    """

    optimization: Optimization


class Method(Protocol):
    """A method: a frozen dataclass, ``Config`` of its file, on top of ``Settings``, which has all but the last two."""

    CHAIN: ClassVar[Chain]
    """The chain of its students, unless another is given."""

    STUDENT: ClassVar[Student]
    """The default student."""

    ASKS: ClassVar[bool]
    """Whether the method calls the teacher as a denoiser."""

    ANSWERS: ClassVar[Answers]
    """The meaning of x0_hat of its students (``denoiser.Answers``)."""

    @property
    def name(self) -> str:
        """The method, as of the command line."""

    def card(self, student: Card) -> Card:
        """The student that is made where ``student`` is what the run's settings and its teacher describe."""

    def total(self, teaching: Teaching) -> int:
        """Updates of a whole run."""

    def batches(self, teaching: Teaching, start: int) -> Iterator[Any]:
        """The batches of the updates ``start``, ``start`` + 1, ..."""

    def check(self, teaching: Teaching) -> None:
        """Refuse, before any work, a teacher, student or chain that the method is not defined for; the weights are
        arbitrary.

        Raises:
            ConfigError: says which setting and why.
        """

    def learner(self, teaching: Teaching) -> Distiller:
        """The learner of ``teaching.student``, from the student's present weights on."""


@dataclass(frozen=True)
class Settings:
    """The settings that every method has, and what it makes of them; each method is a dataclass on top of it.

    Attributes:
        steps: optimiser steps of the student.
        batch: samples in a step.
        lr: peak learning rate; it falls to 0 along a cosine, after ``warmup`` steps.
        warmup: steps over which the learning rate rises from 0.
        label_dropout: probability that a sample's label is replaced by "no class".
        weight_decay: of the optimizer.
        optimizer: adamw, sgd(momentum=...), adamw8bit, or any torch.optim.Optimizer as package.module:Class or
            path/to/file.py:Class, its arguments in brackets; of every network
            that the method trains.
        max_grad_norm: gradient clipping.
        ema: the average of the weights that is saved, Constant(decay=...) or Power(sigma_rel=...).
    """

    steps: int = 3000
    batch: int = 128
    lr: float = 1e-3
    warmup: int = 100
    label_dropout: float = 0.0
    weight_decay: float = 0.0
    optimizer: str = "adamw"
    max_grad_norm: float = 1.0
    ema: str = "Constant(decay=0.999)"

    STUDENT: ClassVar[Student] = Student()
    ASKS: ClassVar[bool] = True
    ANSWERS: ClassVar[Answers] = "mean"

    def __post_init__(self) -> None:
        require_positive(self, "steps", "batch", "lr", "max_grad_norm")
        require_not_negative(self, "warmup", "weight_decay")
        if not 0 <= self.label_dropout <= 1:
            raise ConfigError(f"label_dropout = {self.label_dropout}: expected a probability in [0, 1]")
        spec.parse(self.ema, EMA_RULES, "ema")
        optimizers.settle(self)

    def card(self, student: Card) -> Card:
        return student

    def total(self, teaching: Teaching) -> int:
        return self.steps

    def batches(self, teaching: Teaching, start: int) -> Iterator[Any]:
        """The batches of the updates from ``start`` on: the number of each, as ``LossLearner`` takes it. A method whose
        cost is the teacher's samples yields those instead, made wherever it likes.
        """
        return iter(range(start, self.total(teaching)))

    def draws(self, teaching: Teaching, total: int, *key: str | int) -> Draws:
        """Draws of the data for ``total`` updates, keyed by the seed and ``key``."""
        key = (teaching.seed, "distill", *key)
        return Draws(teaching.data, self.batch, self.label_dropout, total, teaching.device, *key)

    def optimization(self, module: nn.Module) -> Optimization:
        """An optimiser of ``module`` with these settings."""
        rule = spec.parse(self.ema, EMA_RULES, "ema")
        return Optimization(module, self.lr, self.weight_decay, self.max_grad_norm, rule, self.optimizer)

    def fit(
        self,
        teaching: Teaching,
        loss: Loss,
        total: int,
        *key: str | int,
        kept: Mapping[str, nn.Module] | None = None,
    ) -> LossLearner:
        """The learner that minimises one ``loss`` of the student in ``total`` updates."""
        student = teaching.student
        return LossLearner(
            student, loss, self.draws(teaching, total, *key), self.optimization(student), self.warmup, kept
        )
