"""SFT, supervised fine-tuning on stored images: the loss of the model's own training, on what one has.

    (1)  loss = E w w(t) | y_theta(x_t, t, c) - y |^2,    x_t = alpha x_0 + sigma eps,  x_0, c of the stored images
         ``weighted``, Eq. (1): the mean over features, in what the network predicts
    (2)  w = 1, or of images with scores exp(beta A), over its mean over all of them (``advantage``, Eq. 5); A is the
         score, z-scored over all images or over those of its prompt, or as it is
    (3)  plus kl | y_theta - y_base |^2

Eq. (1) is minimised by the denoiser of the stored images, weighted by w, for each prompt; with (3) by that of the
mixture of it, in the proportion v / (v + kl), and what the base denoises to at x_t, in the other; v = E[w | x_t, c]
is 1 without scores, so that with them a prompt of low scores is held to the base the more. No walk is taken and
no reward is asked for: the reward of the run is what evaluations and the monitor measure. Of stored pairs the images
that were preferred are learned.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from rlfusion.common.code_files import absolute
from rlfusion.common.errors import ConfigError, require_not_negative, require_positive
from rlfusion.common.seeding import stream
from rlfusion.data import Dataset
from rlfusion.pretrain.denoising import Denoising
from rlfusion.rl.advantage import exponential_weights, normalized
from rlfusion.rl.agent import Defaults, Plan, Traits
from rlfusion.rl.kept import put_back, state_of
from rlfusion.rl.stored import Samples
from rlfusion.rl.weighted import OnNoised, Places
from rlfusion.rollout import RolloutSpec, Task, prefix
from rlfusion.rollout.outside import Stored
from rlfusion.rollout.trajectory import Trajectory
from rlfusion.training import optimizers
from rlfusion.training.optimization import Optimization
from rlfusion.training.ranks import current


@dataclass(frozen=True)
class Config(Defaults):
    """Settings of supervised fine-tuning.

    Attributes:
        name: the algorithm.
        data: the images with their prompts or classes: a folder, a table, or what else pretrain.data takes; with a
            column of scores, or as pairs (docs/inputs.md).
        batch: images of an update, drawn epoch by epoch.
        lr: learning rate.
        beta: of Eq. (2), for images with scores; 0 lets all count alike.
        w_max: limit of exp(beta A), before it is scaled; null for none.
        normalize: of the scores, before beta: over all images ("batch") or those of a prompt ("group"), or "none".
        noisings: times that each image is noised in a pass.
        times: how t is drawn: Uniform(margin=...), LogitNormal(mean=..., std=...), LogNormal(mean=..., std=...).
        time_weight: w(t) of Eq. (1), as of pretrain.train.loss: Own(), SNR(), MinSNR(gamma=...), ...
        kl: coefficient of the hold to the base model, Eq. (3).
        epochs: passes over the images of an update.
        updates_per_epoch: optimiser steps in a pass, each on an equal share of them.
        micro_batch: noised images in one network call; gradients accumulate over calls.
        max_grad_norm: gradient clipping.
        weight_decay: of the optimizer.
        optimizer: adamw, sgd(momentum=...), adamw8bit, or any torch.optim.Optimizer as package.module:Class or
            path/to/file.py:Class, its arguments in brackets.
        warmup: optimiser steps over which the learning rate rises from 0.
        ema_decay: decay of the averaged weights that are evaluated and saved; 0 for none.
    """

    name: Literal["sft"] = "sft"
    data: str = ""
    batch: int = 256
    lr: float = 3e-4
    beta: float = 0.0
    w_max: float | None = 20.0
    normalize: Literal["none", "batch", "group"] = "batch"
    noisings: int = 1
    times: str = "Uniform()"
    time_weight: str = "Own()"
    kl: float = 0.0
    epochs: int = 1
    updates_per_epoch: int = 4
    micro_batch: int = 2048
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    optimizer: str = "adamw"
    warmup: int = 0
    ema_decay: float = 0.9

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", absolute(self.data))
        require_positive(self, "batch", "lr", "noisings", "epochs", "updates_per_epoch", "micro_batch", "max_grad_norm")
        require_not_negative(self, "beta", "kl", "weight_decay", "warmup")
        optimizers.settle(self)
        if self.w_max is not None and not 0 < self.w_max < float("inf"):
            raise ConfigError(f"w_max = {self.w_max}: expected a finite number > 0, or null")
        _ = self.loss  # refuses what no table holds

    def traits(self) -> Traits:
        """No reward; perhaps a copy of the base model."""
        return replace(super().traits(), rewards="none", copies=int(self.kl > 0), denoises=True)

    @cached_property
    def loss(self) -> Denoising:
        """Eq. (1) of one image."""
        return Denoising(self.time_weight, self.times)

    def check(self, plan: Plan) -> None:
        """Raises ConfigError for fewer images than optimiser steps."""
        if self.updates_per_epoch > (most := self.batch // plan.shares):
            raise ConfigError(
                f"updates_per_epoch = {self.updates_per_epoch}: expected at most {most}, of batch = {self.batch} images"
            )

    def check_stored(self, stored: Callable[[str], Stored]) -> None:
        """Raises ConfigError for stored images that ``stored`` cannot open, or that have no scores for ``beta``."""
        self.require_scores(stored(self.data))

    def require_scores(self, held: Stored) -> None:
        """Raises ConfigError where ``beta`` weighs by scores and there are none: of pairs the preferred have none."""
        if self.beta and (held.score is None or held.pairs):
            raise ConfigError(f"beta = {self.beta:g}: the images of {self.data!r} have no scores, expected 0")

    def rollout_spec(self, steps: int) -> RolloutSpec:
        """Nothing: walks that stop before their first step."""
        return prefix(0, 0)

    def learner(self, task: Task, data: Dataset, seed: int) -> "Learner":
        """Raises ConfigError where the stored images cannot be opened, or have no scores for ``beta``."""
        return Learner(task, self, seed)

    def plan(self) -> str:
        """One line that says what the learner does in each update."""
        updates = self.epochs * self.updates_per_epoch
        return f"no rollouts: {self.batch} stored images give {updates} optimiser step(s); rewards are watched"


class Learner:
    """SFT of the policy of a task. ``update`` takes walks that have not begun, and looks at none of them."""

    def __init__(self, task: Task, config: Config, seed: int = 0) -> None:
        """``seed`` keys the order of the images and their noise.

        Raises:
            ConfigError: the images cannot be opened, or have no scores for ``beta``.
        """
        self.policy, self.config, self.seed = task.policy, config, seed
        self.samples = Samples(task, config.data, config.batch, seed)
        self.weight = self._weights()
        self.form = OnNoised(task.policy, config)
        self.optimization = Optimization.of(task.policy, config)
        self.iteration = self.queries = 0

    def _weights(self) -> Tensor:
        """Eq. (2) of every stored image, (N,)."""
        c, held = self.config, self.samples.held
        c.require_scores(held)
        if held.score is None or not c.beta:
            return torch.ones(len(held.x))
        group = held.prompt if c.normalize == "group" else torch.zeros_like(held.prompt)
        advantage = normalized(held.score, group, c.normalize)
        return exponential_weights(advantage, c.beta, c.w_max, mean_one=True).float()

    def update(self, batch: Trajectory) -> dict[str, float]:
        """Make the updates of the images that are due.

        Returns:
            loss, grad_norm; with ``kl`` also kl.

        Raises:
            NumericalError: a gradient is not finite; the update that it belongs to has not been made.
        """
        drawn = self.samples.draw(self.iteration, self.weight)
        records, norms = [], []
        for epoch in range(self.config.epochs):
            draw = stream(self.seed, "sft", self.iteration, epoch)
            for part, rows in enumerate(current().passes(draw, len(drawn), self.config.updates_per_epoch)):
                records += self.accumulate(drawn, rows, self.iteration, epoch, part)
                norms.append(self.optimization.step())
        self.iteration += 1
        told = {name: torch.cat([record[name] for record in records]).mean().item() for name in records[0]}
        return told | {"grad_norm": sum(norms) / len(norms)}

    def accumulate(self, drawn: Trajectory, rows: Tensor, *key: int) -> list[dict[str, Tensor]]:
        """Accumulate the gradient of the mean over the images ``rows`` of ``drawn`` and their noisings."""
        weight = drawn.scored

        def weigh(places: Places) -> Tensor:
            return weight[places.walk]

        return self.form.accumulate(drawn, rows, weigh, self.seed, "sft noise", *key)

    def preflight(self, batch: Trajectory) -> dict[str, float]:
        """The number of images that there are."""
        return {"images": float(len(self.samples.held.x))}

    def state_dict(self) -> dict:
        return state_of(self, {"base": self.form.base})

    def load_state_dict(self, state: dict) -> None:
        put_back(state, self, {"base": self.form.base})
