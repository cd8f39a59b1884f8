"""The draw of a training step, and the interface of losses: a function of a denoiser and a draw, one value a sample.

A step may be learned part by part, by several processes too (``shares``). A part of a draw has, of all that is drawn
for the whole batch, its own rows:

    (1)  L = sum over parts P of (1 / B) sum_{i in P} l_i,     whatever the parts
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from rlfusion.common.errors import ConfigError
from rlfusion.common.seeding import Key, stream
from rlfusion.common.tensors import Cond, map_cond
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
        rows: (B,) of a part of a batch: which rows of ``whole`` it has, on the CPU.
        whole: of a part: the draw of the whole batch.
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
    rows: Tensor | None = None
    whole: "Draw | None" = None

    def __len__(self) -> int:
        """B."""
        return len(self.x0)

    @property
    def batch(self) -> "Draw":
        """The draw of the whole batch: itself, unless it is a part."""
        return self if self.whole is None else self.whole

    def part(self, rows: Tensor) -> "Draw":
        """The part of a whole draw that has ``rows`` (b,), b > 0, on the CPU. Its key is its own: what an objective
        draws by the key, for the samples that it is given, no other part draws.
        """
        if torch.equal(rows, torch.arange(len(self))):
            return self
        x0, eps, index = (_taken(value, rows) for value in (self.x0, self.eps, self.index))
        cond, key = map_cond(lambda c: _taken(c, rows), self.cond), (*self.key, "rows", int(rows[0]))
        return replace(self, x0=x0, cond=cond, eps=eps, u=self.u[rows], key=key, index=index, rows=rows, whole=self)

    def of(self, values: Tensor) -> Tensor:
        """The rows of this draw of ``values`` (B, *) of the whole batch."""
        return values if self.rows is None else _taken(values, self.rows)

    def mean(self, values: Tensor) -> Tensor:
        """What ``values`` (B,) of these samples add to the mean over the whole batch: Eq. (1).

        Raises:
            ConfigError: not a value for each sample.
        """
        if values.shape != (len(self),):
            raise ConfigError(
                f"a loss of shape {tuple(values.shape)} for {len(self)} samples: expected ({len(self)},), one for each"
            )
        return values.sum() / len(self.batch)

    def drawn(self, purpose: str, draw: Callable[[np.random.Generator, int], np.ndarray], of: int = 0) -> Tensor:
        """Further random numbers of this step: what ``draw`` gives for the samples of the whole batch, so many in
        dimension ``of``; those of these samples, on the CPU.
        """
        whole = self.batch
        values = torch.from_numpy(draw(stream(*whole.key, purpose), len(whole)))
        return values if self.rows is None else values.index_select(of, self.rows)

    def normal(self, purpose: str, *shape: int, of: int = 0) -> Tensor:
        """Further standard normal noise of this step, float32, where x0 is. Dimension ``of`` of ``shape`` is that of
        the samples.
        """

        def draw(random: np.random.Generator, count: int) -> np.ndarray:
            whole = shape if self.rows is None else (*shape[:of], count, *shape[of + 1 :])
            return random.standard_normal(whole, dtype=np.float32)

        return self.drawn(purpose, draw, of).to(self.x0.device)


def _taken(values: Tensor, rows: Tensor) -> Tensor:
    return values[rows.to(values.device)]


class Loss(ABC):
    """A training objective: a frozen dataclass, written as text on the command line (``Denoising(weight='SNR()')``)."""

    compares_data: ClassVar[bool] = False
    """Whether it uses the whole training set. Then x0 must be a part of the set, and there is no augmentation."""

    answers: ClassVar[Answers] = "mean"
    """The meaning of x0_hat of the models that it trains (``denoiser.Answers``)."""

    second_order: ClassVar[bool] = False
    """Whether it has derivatives of the network in it, whose gradient looks at the parameters again: a network that is
    split over ranks then stays gathered in the meantime.
    """

    @abstractmethod
    def __call__(self, denoiser: Denoiser, teacher: Denoiser, draw: Draw) -> Tensor:
        """The loss of each sample of ``draw``, (B,), which may be a part of a batch. ``teacher`` is a slowly following
        copy of the denoiser, without gradients; it is the denoiser itself where ``teacher_decay`` is None.
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
