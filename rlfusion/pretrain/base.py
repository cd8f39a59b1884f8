"""The draw of a training step, and the interface of losses: a function of a denoiser and a draw, one value a sample."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from rlfusion.common.seeding import Key, stream
from rlfusion.common.tensors import Cond
from rlfusion.diffusion.denoiser import Answers, Denoiser


@dataclass(frozen=True)
class Draw:
    """The random part of one training step, a pure function of its key (seed, purpose, step).

    Attributes:
        x0: (B, *) samples of the training data.
        cond: their conditions, some dropped.
        eps: (B, *) standard normal noise.
        u: (B,) float64 on the CPU, uniform in (0, 1), stratified over the batch: quantiles of the noise level.
        step: number of the step, 0..total-1.
        total: steps of the whole training.
        key: keys further draws of the step.
        data: (N, *) all training samples.
        label: (N,) their labels.
        no_class: the label that means "no class".
        index: (B,) which of them x0 is.
    """

    x0: Tensor
    cond: Cond
    eps: Tensor
    u: Tensor
    step: int
    total: int
    key: tuple[Key, ...]
    data: Tensor
    label: Tensor
    no_class: int
    index: Tensor

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """Further standard normal noise of this step, float32, where x0 is."""
        noise = stream(*self.key, purpose).standard_normal(shape, dtype=np.float32)
        return torch.from_numpy(noise).to(self.x0.device)


class Loss(ABC):
    """A training objective: a frozen dataclass, written as text on the command line (``Denoising(weight='SNR()')``)."""

    compares_data: ClassVar[bool] = False
    """Whether it uses the whole training set. Then x0 must be a part of the set, and there is no augmentation."""

    answers: ClassVar[Answers] = "mean"
    """The meaning of x0_hat of the models that it trains (``denoiser.Answers``)."""

    @abstractmethod
    def __call__(self, denoiser: Denoiser, teacher: Denoiser, draw: Draw) -> Tensor:
        """The loss of each sample, (B,). ``teacher`` is a slowly following copy of the denoiser, without gradients;
        it is the denoiser itself where ``teacher_decay`` is None.
        """

    def check(self, denoiser: Denoiser) -> None:
        """Refuse a network, kind or schedule that the objective is not defined for.

        Raises:
            ConfigError: says which setting and why.
        """
        return

    def teacher_decay(self, step: int, total: int) -> float | None:
        """The decay with which the teacher takes in the weights after ``step``, or None for no teacher."""
        return None
