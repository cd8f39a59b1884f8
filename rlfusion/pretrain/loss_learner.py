"""Minimising an objective on keyed draws: the loop's body of pretraining and of most distillation."""

import copy
from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from rlfusion.common import shards
from rlfusion.common.weights import require_entries, restore
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.pretrain.base import Draw, Loss
from rlfusion.pretrain.draws import Draws
from rlfusion.pretrain.shares import accumulate
from rlfusion.training.learning_rate import cosine
from rlfusion.training.optimization import Optimization
from rlfusion.training.ranks import Record


class LossLearner:
    """Minimises ``loss`` over the draws of ``draw``. ``update`` takes the number of the step.

    The learning rate is that of the optimiser as it is given: it is reached over ``warmup`` steps and falls to 0 along
    a cosine over the ``draw.total`` steps. ``kept`` are networks that are not trained and yet part of the state.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        loss: Loss,
        draw: Draws,
        optimization: Optimization,
        warmup: int,
        kept: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.denoiser, self.loss, self.draw, self.optimization = denoiser, loss, draw, optimization
        self.kept = dict(kept or {})
        optimization.follow(cosine(draw.total, warmup))
        follows = loss.teacher_decay(0, draw.total) is not None
        self.teacher = copy.deepcopy(denoiser).requires_grad_(False) if follows else denoiser

    def update(self, batch: int) -> dict[str, float]:
        """One optimiser step: step number ``batch`` of the run.

        Raises:
            NumericalError: the gradient is not finite; the weights are as before.
        """
        module = self.optimization.module
        with shards.kept(module) if self.loss.second_order else nullcontext():
            record = accumulate(module, self.draw(batch), self._loss)
        lr, norm = self.optimization.optimizer.lr, self.optimization.step()
        self.follow(batch)
        return {"loss": record["loss"].mean().item(), "grad_norm": norm, "lr": lr}

    def _loss(self, draw: Draw) -> tuple[Tensor, Record]:
        """What the samples of a draw add to the loss, and the loss of each."""
        loss = self.loss(self.denoiser, self.teacher, draw)
        return draw.mean(loss), {"loss": loss}

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """The teacher takes in the weights, where the objective has one."""
        decay = self.loss.teacher_decay(step, self.draw.total)
        if decay is not None:
            for mine, theirs in zip(self.teacher.parameters(), self.denoiser.parameters()):
                mine.lerp_(theirs, 1 - decay)

    def state_dict(self) -> dict:
        state = {"optimization": self.optimization.state_dict()}
        state |= {name: module.state_dict() for name, module in self.kept.items()}
        return state if self.teacher is self.denoiser else state | {"teacher": self.teacher.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        require_entries(state, self.state_dict(), "the learner")
        self.optimization.load_state_dict(state["optimization"])
        for name, module in self.kept.items():
            restore(module, state[name], name)
        if self.teacher is not self.denoiser:
            restore(self.teacher, state["teacher"], "the teacher")
