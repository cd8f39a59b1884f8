"""Supervised training of a denoiser by any objective of ``losses``.

The condition is dropped with probability ``label_dropout``, so that one network learns both scores of classifier-free
guidance. Draws are keyed by (seed, step): a step is a pure function of its number and of the weights.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlfusion.common import spec
from rlfusion.common.code_files import absolute
from rlfusion.common.errors import ConfigError, require_not_negative, require_positive
from rlfusion.common.seeding import stream
from rlfusion.data import Dataset, augment
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.models.autoencoder import encoded
from rlfusion.pretrain import losses
from rlfusion.pretrain.draws import Draws
from rlfusion.pretrain.loss_learner import LossLearner
from rlfusion.training import optimizers
from rlfusion.training.optimization import EMA_RULES, Optimization


@dataclass(frozen=True)
class Config:
    """Settings of supervised pretraining.

    Attributes:
        loss: the objective, with its settings: Denoising(weight=..., times=...).
        steps: optimiser steps.
        batch: samples in a step.
        lr: peak learning rate; it falls to 0 along a cosine, after ``warmup`` steps.
        warmup: steps over which the learning rate rises from 0.
        augment: of the training images, Augment(flip=..., shift=...); empty for none.
        label_dropout: probability that a sample's label is replaced by "no class".
        label_noise: share of the training samples whose label is replaced by a random class, once and for all: a base
            model that follows its prompt only in part of its samples.
        weight_decay: of the optimizer.
        optimizer: adamw, sgd(momentum=...), adamw8bit, or any torch.optim.Optimizer as package.module:Class or
            path/to/file.py:Class, its arguments in brackets.
        max_grad_norm: gradient clipping.
        ema: the average of the weights that is saved: Constant(decay=...), decay 0 for none, or Power(sigma_rel=...) of
            Karras et al. 2024, whose window grows with the training.
    """

    loss: str = "Denoising()"
    steps: int = 3000
    batch: int = 128
    lr: float = 3e-3
    warmup: int = 100
    augment: str = ""
    label_dropout: float = 0.1
    label_noise: float = 0.0
    weight_decay: float = 0.0
    optimizer: str = "adamw"
    max_grad_norm: float = 1.0
    ema: str = "Constant(decay=0.999)"

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss", absolute(self.loss))
        if augment.make(self.augment) and losses.make(self.loss).compares_data:
            raise ConfigError(f"augment = {self.augment}: {self.loss} compares with the training data, expected none")
        require_positive(self, "steps", "batch", "lr", "max_grad_norm")
        for name in ("label_dropout", "label_noise"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} = {getattr(self, name)}: expected a probability in [0, 1]")
        require_not_negative(self, "warmup", "weight_decay")
        spec.parse(self.ema, EMA_RULES, "ema")
        optimizers.settle(self)


def noisy_labels(data: Dataset, share: float, seed: int) -> Tensor:
    """The labels (N,) with a keyed random ``share`` of them redrawn uniformly from all classes."""
    draw = stream(seed, "label noise")
    label = data.label.clone()
    chosen = torch.from_numpy(draw.permutation(len(data))[: round(share * len(data))])
    label[chosen] = torch.from_numpy(draw.integers(0, data.classes, len(chosen)))
    return label


class Learner(LossLearner):
    """The learner of pretraining: ``config.loss`` on ``data``, of pixels, which is held."""

    def __init__(self, denoiser: Denoiser, data: Dataset, config: Config, seed: int = 0) -> None:
        """Raises:
        ConfigError: the objective is not defined for the denoiser.
        """
        self.config, self.seed = config, seed
        loss = losses.make(config.loss)
        loss.check(denoiser)
        data = replace(data, label=noisy_labels(data, config.label_noise, seed))
        device = next(denoiser.parameters()).device
        changed = augment.make(config.augment)
        data = encoded(data, denoiser.space) if changed is None else data  # else each step encodes what it augmented
        draw = Draws(data, config.batch, config.label_dropout, config.steps, device, seed, "pretrain")
        draw.augment, draw.space = changed, denoiser.space
        optimization = Optimization(
            denoiser,
            config.lr,
            config.weight_decay,
            config.max_grad_norm,
            spec.parse(config.ema, EMA_RULES, "ema"),
            config.optimizer,
        )
        super().__init__(denoiser, loss, draw, optimization, config.warmup)
