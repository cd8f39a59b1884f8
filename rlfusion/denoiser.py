"""A denoiser: a network, the schedule that says what its time means, and the kind of thing that it predicts."""

from functools import lru_cache

import torch
from torch import Tensor, nn

from rlfusion.kinds import Kind
from rlfusion.parameterization import Prediction, Solution, conditioning, named, predict, solve
from rlfusion.schedule import Schedule, level
from rlfusion.tensors import Cond, cast, cat_cond, map_cond


class Denoiser(nn.Module):
    """``(x_t, t, cond) -> Prediction(x0, eps)``.

    ``net(x, t, cond)`` gets c_in x (B, ...), c_noise (B,) in float32 or better, and the condition; it answers y shaped
    like x. c_in = 1 and c_noise = t in [0, 1] unless the kind says otherwise. ``kind`` is text, or a ``Kind``.
    """

    def __init__(self, net: nn.Module, schedule: Schedule, kind: str | Kind) -> None:
        super().__init__()
        named(kind)
        self.net, self.schedule, self.kind = net, schedule, kind

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Prediction:
        """x (B, ...), t () or (B,) float64 on the CPU, cond of batch B."""
        y = self.answer(x, t, cond).to(x)
        if t.ndim == 0:
            return predict(_solution(self.kind, self.schedule, t.item()), y, x)
        return predict(solve(self.kind, level(self.schedule, t, x)), y, x)

    def answer(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """The network's own y (B, ...) at x_t: what ``parameterization.target`` is the target of."""
        l = level(self.schedule, t, x)
        at = conditioning(self.kind, t, l).reshape(-1)
        at = cast(at, x if x.itemsize >= 4 else x.float())  # in bfloat16 t = 0.999 would be 1
        return self.net(cast(named(self.kind).scale(l), x) * x, at.expand(len(x)), cond)


@lru_cache(maxsize=4096)
def _solution(kind: str | Kind, schedule: Schedule, t: float) -> Solution:
    """The solution at a time that a whole batch shares: the same few in every rollout."""
    at = torch.tensor(t, dtype=torch.float64)
    return solve(kind, level(schedule, at, at))


class Guided(nn.Module):
    """Classifier-free guidance as a wrapper with a denoiser's call (Ho & Salimans 2022; handbook 2.3, corrected).

        e = (1 + w) e_c - w e_0,     w = ``weight``     (diffusers' guidance_scale is 1 + w)

    The same affine combination holds for x0 and eps. Both halves are one network call of 2 B rows. ``null`` is the
    condition of one sample, batch 1, that means "no condition".
    """

    def __init__(self, denoiser: nn.Module, weight: float, null: Cond) -> None:
        super().__init__()
        self.denoiser, self.weight, self.null = denoiser, weight, null
        self.schedule: Schedule = denoiser.schedule

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Prediction:
        self.null = map_cond(lambda c: c.to(x.device), self.null)  # moves once; a copy a step would stall a GPU
        null = map_cond(lambda c: c.expand(len(x), *c.shape[1:]), self.null)
        both = self.denoiser(x.repeat(2, *[1] * (x.ndim - 1)), t.repeat(2) if t.ndim else t, cat_cond([cond, null]))
        x0, eps = (self.combine(*half.chunk(2)) for half in both)
        return Prediction(x0, eps)

    def combine(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """(1 + w) conditional - w unconditional."""
        return (1 + self.weight) * conditional - self.weight * unconditional
