"""The learner of methods that move a generator's samples towards the teacher's law: SDS, VSD, DMD, ADD.

In update n:

    (1)  ``fake_updates`` times, on fresh samples of the generator, constants: a step of the fake denoiser, which learns
         the generator's law by the denoising loss, and a step of the discriminator
    (2)  a step of the generator G on
             matching * 1/2 |G - sg(G - w (x0_fake - x0_real)(x_t))|^2,   x_t = G noised afresh      (objectives.pull)
           + adversarial * g(D(G_t))
           + regression * d(G(z), x_0)    on pairs (z, x_0) of the teacher (``pairs``)

Fake denoiser and discriminator are networks of their own for each step of the chain (``per_step``), or one for all.
x0_real is the teacher's, guided if asked; x0_fake that of the fake denoiser, or without one G itself, which leaves out
the entropy of the generator (SDS, ADD). Noise levels are the teacher's, so student and teacher may differ in all else.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from rlfusion.common import shards, spec
from rlfusion.common.errors import require_positive
from rlfusion.common.tensors import mean_features
from rlfusion.common.weights import require_entries
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.policy import Policy
from rlfusion.diffusion.schedule import level
from rlfusion.distill.base import Settings, Teaching
from rlfusion.distill.discriminator import Discriminator
from rlfusion.distill.generator import Generator, Inputs
from rlfusion.distill.on_schedule import on_its_own
from rlfusion.distill.per_step import PerStep, unasked
from rlfusion.nets.critic import Critic
from rlfusion.objectives import MATCHING, Adversarial, MatchingWeight, pull
from rlfusion.objectives.renoise import noised
from rlfusion.objectives.times import TIMES, Times
from rlfusion.pretrain import Draw, Loss
from rlfusion.pretrain.denoising import Denoising
from rlfusion.pretrain.shares import accumulate, mapped
from rlfusion.training.learning_rate import cosine
from rlfusion.training.optimization import Optimization, average
from rlfusion.training.ranks import Record, current

Drawing = Callable[[int], Draw]


class Fake:
    """The denoiser of the generator's own law: ``loss`` on its samples (handbook 3.2.3; VSD's phi, DMD's mu_fake)."""

    def __init__(self, denoiser: Denoiser, loss: Loss, lr: float, optimizer: str = "adamw") -> None:
        self.denoiser, self.loss = denoiser, loss
        self.optimization = Optimization(denoiser, lr, optimizer=optimizer)

    def update(self, draw: Draw, samples: Tensor) -> dict[str, Tensor]:
        """A step on generated samples (B, *). Returns fake_loss, 0-dim."""
        record = accumulate(self.denoiser, replace(draw, x0=samples.detach()), self._loss)
        current().leave_out(unasked(self.denoiser, draw.cond))
        self.optimization.step()
        return {"fake_loss": record["loss"].mean()}

    def _loss(self, draw: Draw) -> tuple[Tensor, Record]:
        """What the samples of a draw add to the loss, and the loss of each."""
        loss = self.loss(self.denoiser, self.denoiser, draw)
        return draw.mean(loss), {"loss": loss}


@dataclass(frozen=True)
class Regression:
    """d(G(z), x_0) on pairs: ``draw`` gives them, ``metric`` is d."""

    draw: Drawing
    metric: Callable[[Tensor, Tensor], Tensor]
    weight: float

    def pairs(self, step: int, beside: Draw) -> Draw:
        """The pairs of update ``step``; of a part of a batch, ``beside``, the same rows.

        Raises:
            ValueError: there are not as many pairs as samples in the whole batch of which ``beside`` is a part.
        """
        draw = self.draw(step)
        if beside.rows is None:
            return draw
        if len(draw) != len(beside.batch):
            raise ValueError(f"{len(draw)} pairs beside {len(beside.batch)} samples in shares: expected as many")
        return draw.part(beside.rows)

    def __call__(self, generator: Generator, pairs: Draw) -> Tensor:
        """The weighted loss (B,): the generator's first answer to the noise of the pairs."""
        x = pairs.eps * generator.policy.prior_std(generator.times)
        return self.weight * self.metric(generator.policy.denoiser(x, generator.times[0], pairs.cond).x0, pairs.x0)


@dataclass(frozen=True)
class Parts:
    """The parts of Eq. (1) and (2); one that is None, or of weight 0, is not there. With ``per_step`` the fake denoiser
    and the discriminator are ``PerStep``.
    """

    generator: Generator
    teacher: nn.Module
    weight: MatchingWeight
    times: Times
    matching: float = 1.0
    fake: Fake | None = None
    fake_updates: int = 1
    discriminator: Discriminator | None = None
    adversarial: float = 0.0
    regression: Regression | None = None
    per_step: bool = False

    def told(self, draw: Draw) -> Draw:
        """The draw as the fake denoiser and the discriminator get it."""
        if not self.per_step:
            return draw
        return replace(draw, cond={"given": draw.cond, "step": self.generator.drawn(draw)})


class Learner:
    """Eq. (1) and (2). ``draw`` gives the real samples and all randomness: ``1 + fake_updates`` draws an update.

    The generator's learning rate rises over ``warmup`` updates and falls to 0 along a cosine over ``total``; those of
    the others do not change, since they follow the generator to the end.
    """

    def __init__(self, parts: Parts, draw: Drawing, optimization: Optimization, warmup: int, total: int) -> None:
        self.parts, self.draw, self.optimization = parts, draw, optimization
        optimization.follow(cosine(total, warmup))

    def update(self, batch: int) -> dict[str, float]:
        """Update number ``batch``.

        Returns:
            loss, grad_norm, direction (the mean size of w (x0_fake - x0_real)), and what the parts add.

        Raises:
            NumericalError: a gradient is not finite.
        """
        follows = bool(self.parts.fake or self.parts.discriminator)
        others = self.parts.fake_updates if follows else 0
        first = batch * (1 + others)
        records = [self._follow(self.draw(first + i)) for i in range(others)]
        draw = self.draw(first + others)
        if self.parts.regression is not None:
            self.parts.regression.draw(batch)  # the pairs are made by all ranks together, before each is by itself
        found = accumulate(self.optimization.module, draw, lambda part: self._loss(part, batch))
        means = {name: values.mean() for name, values in found.items()}
        record = {name: mean for name, mean in means.items() if name != "pull"} | {"loss": self._sum(means)}
        lr, norm = self.optimization.optimizer.lr, self.optimization.step()
        return (average(records) if records else {}) | average([record]) | {"grad_norm": norm, "lr": lr}

    def _follow(self, draw: Draw) -> dict[str, Tensor]:
        """Eq. (1), once."""
        samples = mapped(self.optimization.module, draw, self.parts.generator)
        told = self.parts.told(draw)
        record = self.parts.fake.update(told, samples) if self.parts.fake else {}
        return record | (self.parts.discriminator.update(told, samples) if self.parts.discriminator else {})

    def _loss(self, draw: Draw, step: int) -> tuple[Tensor, Record]:
        """What the samples of a draw add to Eq. (2), and the terms and the direction of each."""
        p = self.parts
        record: Record = {}
        x = p.generator(draw)
        if p.matching:
            real, fake, weight = self._predictions(draw, x.detach())
            record["direction"] = mean_features((weight * (fake - real)).abs())
            record["pull"] = pull(x, fake, real, weight)
        if p.discriminator is not None and p.adversarial:
            record["adversarial"] = p.discriminator.generator_loss(p.told(draw), x)
        means = {name: draw.mean(values) for name, values in record.items()}
        if p.regression is not None:
            pairs = p.regression.pairs(step, draw)
            record["regression"] = p.regression(p.generator, pairs)
            means["regression"] = pairs.mean(record["regression"])
        return self._sum(means), record

    def _sum(self, means: Mapping[str, Tensor]) -> Tensor:
        """Eq. (2), of the means of its terms."""
        weights = {"pull": self.parts.matching, "adversarial": self.parts.adversarial, "regression": 1.0}
        terms = [weight * means[name] for name, weight in weights.items() if name in means]
        return sum(terms, torch.zeros_like(next(iter(means.values()))))

    @torch.no_grad()
    def _predictions(self, draw: Draw, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x0_real, x0_fake (B, *) of x noised, and their weight."""
        p, schedule = self.parts, self.parts.teacher.schedule
        t = p.times(draw.u, schedule)
        x_t = noised(x, draw.eps, t, schedule)
        real = p.teacher(x_t, t, draw.cond).x0
        fake = x if p.fake is None else p.fake.denoiser(x_t, t, p.told(draw).cond).x0
        return real, fake, p.weight(level(schedule, t, x), x, real)

    def state_dict(self) -> dict:
        state = {"optimization": self.optimization.state_dict()}
        return state | {name: part.optimization.state_dict() for name, part in self._others().items()}

    def load_state_dict(self, state: dict) -> None:
        require_entries(state, self.state_dict(), "the learner")
        self.optimization.load_state_dict(state["optimization"])
        for name, part in self._others().items():
            part.optimization.load_state_dict(state[name])

    def _others(self) -> dict[str, Fake | Discriminator]:
        held = {"fake": self.parts.fake, "discriminator": self.parts.discriminator}
        return {name: part for name, part in held.items() if part is not None}


@dataclass(frozen=True)
class Matching(Settings):
    """The settings of every method of this family, beside those of all.

    Attributes:
        weight: w of the direction: KL(), Eps(), Alpha() or Normalized().
        times: how the noise levels are drawn at which teacher and generator are compared: Uniform(margin=...),
            LogitNormal(mean=..., std=...), LogNormal(mean=..., std=...).
        per_step: each step of the chain has a fake denoiser and a discriminator of its own; else one serves all steps.
    """

    weight: str = "Eps()"
    times: str = "Uniform(margin=0.02)"
    per_step: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self._weight, self._times  # refuses what no table holds

    @cached_property
    def _weight(self) -> MatchingWeight:
        return spec.parse(self.weight, MATCHING, "weight")

    @cached_property
    def _times(self) -> Times:
        return spec.parse(self.times, TIMES, "distribution of times")

    def check(self, teaching: Teaching) -> None:
        """Every student and teacher will do: they meet in x0 alone."""

    def parts(self, teaching: Teaching, inputs: Inputs = "simulated") -> dict[str, Any]:
        """The arguments of ``Parts``, by name."""
        generator = Generator(Policy(teaching.student, teaching.chain.make_kernel()), teaching.times, inputs)
        settings = {"weight": self._weight, "times": self._times, "per_step": self.apart(teaching)}
        return {"generator": generator, "teacher": on_its_own(teaching.teacher), **settings}

    def apart(self, teaching: Teaching) -> bool:
        """Whether each of several steps has networks of its own."""
        return self.per_step and teaching.chain.moves > 1

    def begins(self, teaching: Teaching) -> nn.Module:
        """A trainable copy of the network that a fake denoiser or a discriminator starts from."""
        one = trainable_copy(teaching.begins)
        return PerStep(one, teaching.chain.moves) if self.apart(teaching) else one

    def judging(
        self, teaching: Teaching, losses: Adversarial, times: Times | None, r1: float, lr: float
    ) -> Discriminator:
        """One that begins as the teacher's network, under a head that begins at 0: no sample is judged yet."""
        critic = Critic(self.begins(teaching), teaching.data.shape)
        nn.init.zeros_(critic.head.weight)
        nn.init.zeros_(critic.head.bias)
        if shards.roots(critic):
            shards.split(critic.head, teaching.device, current().exact)
        return Discriminator(critic.to(teaching.device), losses, times, r1, lr, self.optimizer)

    def drawing(self, teaching: Teaching, each: int) -> Drawing:
        """Draws of the data, ``each`` for every update."""
        return self.draws(teaching, self.steps * each, self.name)


@dataclass(frozen=True)
class Following(Matching):
    """Further settings of methods with a fake denoiser.

    Attributes:
        fake_lr: learning rate of the fake denoiser.
        fake_updates: its steps, and those of a discriminator, for one of the generator.
    """

    fake_lr: float = 1e-3
    fake_updates: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "fake_lr", "fake_updates")

    def parts(self, teaching: Teaching, inputs: Inputs = "simulated") -> dict[str, Any]:
        fake = Fake(self.begins(teaching), Denoising(times=self.times), self.fake_lr, self.optimizer)
        return {**super().parts(teaching, inputs), "fake": fake, "fake_updates": self.fake_updates}


def trainable_copy(denoiser: nn.Module) -> nn.Module:
    """A copy of a denoiser, every parameter trained."""
    return copy.deepcopy(denoiser).requires_grad_(True)
