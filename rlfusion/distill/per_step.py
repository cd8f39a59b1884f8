"""A network for each step of a few-step generator, as one denoiser: what follows and judges its samples.

The samples of step k of the chain have a law p_k of their own. Where one fake denoiser follows those of all steps,

    (1)  the direction is that of KL(mean_k p_k || p_teacher), and 0 where the mean is right

the laws of the steps may then err in opposite ways, as one critic of all of them allows too; the chain ends with the
last alone. With a network for each,

    (2)  the direction is that of mean_k KL(p_k || p_teacher)

Conditions are {"given": c, "step": k}, k (B,) the step that each sample is of. A call costs what one network's does.
"""

import copy

import torch
from torch import Tensor, nn

from rlfusion.common import shards
from rlfusion.common.tensors import Cond, map_cond
from rlfusion.diffusion.kinds import Kind
from rlfusion.diffusion.parameterization import Prediction, predict, solve
from rlfusion.diffusion.schedule import Schedule, level

NOBODY = torch.zeros(1, dtype=torch.int64)
"""The sample of a call that is made for none."""


class PerStep(nn.Module):
    """``steps`` copies of a denoiser, of which each sample asks that of its step."""

    def __init__(self, denoiser: nn.Module, steps: int) -> None:
        super().__init__()
        self.denoisers = nn.ModuleList([copy.deepcopy(denoiser) for _ in range(steps)])

    @property
    def schedule(self) -> Schedule:
        return self.denoisers[0].schedule

    @property
    def kind(self) -> str | Kind:
        return self.denoisers[0].kind

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Prediction:
        """As ``Denoiser``, t of shape (B,)."""
        return predict(solve(self.kind, level(self.schedule, t, x)), self.answer(x, t, cond).to(x), x)

    def answer(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """As ``Denoiser.answer``, t of shape (B,)."""
        split = [(cond["step"] == k).nonzero().flatten() for k in range(len(self.denoisers))]
        parts = [_rows(denoiser, rows, x, t, cond["given"]) for denoiser, rows in zip(self.denoisers, split)]
        return torch.cat(parts)[torch.cat(split).argsort().to(x.device)]


def _rows(denoiser: nn.Module, rows: Tensor, x: Tensor, t: Tensor, given: Cond) -> Tensor:
    """The answer to some of the samples; to none of them where there are none, without a call unless the denoiser is
    split over ranks, which call it equally often.
    """
    if not len(rows):
        return _rows(denoiser, NOBODY, x, t, given)[:0] if shards.roots(denoiser) else x[:0]
    here = rows.to(x.device)
    return denoiser.answer(x[here], t[rows], map_cond(lambda c: c[here], given))


def unasked(module: nn.Module, cond: Cond) -> list[nn.Parameter]:
    """The parameters of the networks of the ``PerStep`` in ``module`` that none of the samples asks."""
    held = [part for part in module.modules() if isinstance(part, PerStep)]
    idle = [d for part in held for k, d in enumerate(part.denoisers) if not bool((cond["step"] == k).any())]
    return [p for denoiser in idle for p in denoiser.parameters()]
