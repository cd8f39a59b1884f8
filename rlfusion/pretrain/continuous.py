"""TrigFlow's consistency training in continuous time, sCT (Lu & Song 2024; handbook 2.5.1, 3.1.4).

In the angle a = pi t / 2 (the paper's time), with z = sd eps and V = sd F(x / sd, a):

    (1)  x = cos a x0 + sin a z,   dx/da = cos a z - sin a x0,   f = cos a x - sin a V
    (2)  df/da = -cos a (V - dx/da) - sin a (x + dV/da),   dV/da along (dx/da, 1), by a forward-mode derivative
    (3)  the gradient is that of  -E w sin a V . sg(df/da);   with w = 1 / (sd tan a) it is  -E F . g,
         g = cos a df/da = -cos^2 a (V - dx/da) - r cos a sin a (x + dV/da)
    (4)  g <- g / (|g| + c),   r rises from 0 to 1 over the first steps

Derivatives are in the angle: those in rlfusion's t are pi / 2 times these, a constant that Eq. (4) takes out but for c.
The gradient of squared-l2 training in discrete time, divided by the step of the angle, tends to twice Eq. (3) without
(4) and at the same w (erratum 54). With r = 1 and the exact velocity in the place of dx/da, df/da is 0 at the
consistency function; with (1) it is 0 in expectation, and g has a floor: it is linear in dx/da, so given x

    (5)  E|g|^2 >= E|g - E[g | x]|^2 = E|g - g'|^2 / 2,   g, g' with dx/da of two draws of (x0, z) given x

with equality where E[g | x] = 0, at the consistency function. (4) moves that: E[g / (|g| + c) | x] = 0 holds at another
function, unless c is large beside |g| or g is one of x alone, as in distillation. The paper's adaptive weight is not
built.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from rlfusion.common import spec
from rlfusion.common.errors import ConfigError, require_not_negative, require_positive
from rlfusion.common.tensors import Cond, cast
from rlfusion.diffusion.denoiser import Answers, Denoiser
from rlfusion.diffusion.kinds import TrigFlow
from rlfusion.diffusion.parameterization import named
from rlfusion.diffusion.schedule import Trig, diffused, level
from rlfusion.nets.parts import plain_attention
from rlfusion.objectives import weighted_mse
from rlfusion.objectives.times import TIMES, Times
from rlfusion.pretrain.base import Draw, Loss
from rlfusion.pretrain.denoising import Noised


def angle(t: Tensor, like: Tensor) -> Tensor:
    """a = pi t / 2, float64, of times () or (B,), shaped to act on ``like`` (B, ...)."""
    return (t.double() * math.pi / 2).reshape(-1, *[1] * (like.ndim - 1))


def tangent(denoiser: Denoiser, x: Tensor, dx: Tensor, t: Tensor, cond: Cond = None, share: float = 1.0) -> Tensor:
    """g of Eq. (3), (B, *), without gradients: cos a times df/da for ``share`` = r = 1.

    ``x`` (B, *) is the point at the times t (B,), ``dx`` (B, *) the derivative dx/da there: Eq. (1) in training, the
    teacher's V in distillation. As the paper's JVP rearrangement, cos a sin a is put into the tangents before the
    network: near pure noise its derivative is large there and small after. Needs a network whose parts have a
    forward-mode derivative; attention takes its plain form here. The dropout is that of the next call.
    """
    sd, a = named(denoiser.kind).sigma_data, angle(t, x)
    cos, sin = cast(a.cos(), x), cast(a.sin(), x)
    at = cast(a.reshape(-1), x if x.itemsize >= 4 else x.float()).expand(len(x))
    reach = cast((a.cos() * a.sin()).reshape(-1), at).expand(len(x))
    devices = [x.device] if x.is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices), plain_attention():
        y, dy = torch.func.jvp(lambda x, a: denoiser.net(x, a, cond), (x / sd, at), (cos * sin * dx / sd, reach))
    return -cos.square() * (sd * y - dx) - share * (cos * sin * x + sd * dy)


def normalised(g: Tensor, c: float) -> Tensor:
    """Eq. (4): g / (|g| + c), the norm that of each sample (B, *)."""
    norm = g.flatten(1).norm(dim=1).reshape(-1, *[1] * (g.ndim - 1))
    return g / (norm + c)


@dataclass(frozen=True)
class SCT(Loss):
    """Eq. (3, 4), as |F - sg(F + g)|^2, the mean over features: its gradient is 2 / d times that of Eq. (3). Its value
    is the mean square of g, which does not fall where Eq. (4) makes g a unit vector: Eq. (5) is what to compare with.

    Attributes:
        times: how t is drawn: LogNormal(mean=..., std=...) of tan a, Uniform(margin=...), LogitNormal(...).
        rise: steps over which r rises from 0 to 1.
        c: of Eq. (4): a small one bounds g and is biased, a large one leaves it as it is, divided by c.
    """

    times: str = "LogNormal(mean=-1.0, std=1.4)"
    rise: int = 1000
    c: float = 0.1

    answers: ClassVar[Answers] = "end"

    def __post_init__(self) -> None:
        require_positive(self, "c")
        require_not_negative(self, "rise")
        _ = self._times  # refuses what no table holds

    @cached_property
    def _times(self) -> Times:
        return spec.parse(self.times, TIMES, "distribution of times")

    def check(self, denoiser: Denoiser) -> None:
        schedule = denoiser.schedule
        if not isinstance(schedule, Trig) or named(denoiser.kind) != TrigFlow(schedule.sigma_data):
            raise ConfigError(
                f"kind = {denoiser.kind}, schedule = {schedule}: expected TrigFlow(sigma_data=...) on "
                "Trig(sigma_data=...), of one sigma_data, for SCT"
            )

    def share(self, step: int) -> float:
        """r of Eq. (4) at a step."""
        return min(1.0, step / self.rise) if self.rise else 1.0

    def noised(self, denoiser: Denoiser, draw: Draw) -> Noised:
        """The draw's samples at the draw's times."""
        t = self._times(draw.u, denoiser.schedule)
        l = level(denoiser.schedule, t, draw.x0)
        return Noised(diffused(draw.x0, draw.eps, l), t, l)

    def __call__(self, denoiser: Denoiser, teacher: Denoiser, draw: Draw) -> Tensor:
        return self.along(denoiser, draw, self.noised(denoiser, draw), draw.x0, draw.eps)

    def along(self, denoiser: Denoiser, draw: Draw, at: Noised, x0: Tensor, eps: Tensor) -> Tensor:
        """Eq. (3, 4) at ``at``, with dx/da that of the pair (x0, eps): the draw's, or in distillation the teacher's."""
        x, t, l = at
        dx = (cast(l.d_alpha, x) * x0 + cast(l.d_sigma, x) * eps) * (2 / math.pi)
        g = normalised(tangent(denoiser, x, dx, t, draw.cond, self.share(draw.step)), self.c)
        y = denoiser.answer(x, t, draw.cond)
        return weighted_mse(y, y.detach() + g)
