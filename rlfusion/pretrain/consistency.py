"""Consistency training in discrete time (Song et al. 2023; Song & Dhariwal 2023; handbook 2.3.1, Eq. 25).

A consistency function maps every point of a trajectory of the probability-flow ODE to its end, f(x_t, t) = x_{t_min},
with f(x, t_min) = x. On a grid t_0 < .. < t_{N-1} of N points, even in the time of the schedule (on ``Karras`` it is
that of the papers), neighbours are compared:

    (1)  L = E lambda d( f_theta(x_{n+1}, t_{n+1}), f_-(x_n, t_n) ),   x_n = alpha_n x0 + sigma_n eps,
         both points with the same x0 AND the same eps (erratum 33); f_- takes no gradient
    (2)  CT:   N(k) = ceil( sqrt( k/K ((s1 + 1)^2 - s0^2) + s0^2 ) - 1 ) + 1,   f_- an average with the decay
         mu(k) = exp(s0 log(mu0) / N(k)),   n uniform, lambda = 1         (step k of K; Song et al. 2023, App. C)
    (3)  iCT:  N(k) = min(s0 2^floor(k / K'), s1) + 1,   K' = floor(K / (log2 floor(s1 / s0) + 1)),   f_- = f_theta,
         lambda = 1 / (tau_{n+1} - tau_n),   tau = sigma / alpha,
         p(n) ~ erf((log tau_{n+1} - mean) / (sqrt 2 std)) - erf((log tau_n - mean) / (sqrt 2 std))

The released code of CT has N(k) - 1, the intervals, in the exponent of mu. At the exact consistency function of
N(m, lam) the squared error of Eq. (1) is not 0 but lam^2 dt^2 / (lam + t^2)^2 a dimension, to the leading order in dt:
CT and distillation agree in the gradient that a fixed f_- leaves, not in the loss (erratum 34). What no f falls below:

    (4)  E[d | x_{n+1}] >= min_y E[d(y, f_-(x_n)) | x_{n+1}];   of the squared error, E|f_-(x_n) - f_-(x_n')|^2 / 2
         with x_n, x_n' of two draws of (x0, eps) given x_{n+1}
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from rlfusion.common import spec
from rlfusion.common.errors import ConfigError, require_positive
from rlfusion.common.tensors import Cond, cast
from rlfusion.diffusion.denoiser import Answers, Denoiser, require_readable
from rlfusion.diffusion.parameterization import solve
from rlfusion.diffusion.schedule import Schedule, diffused, level
from rlfusion.pretrain.base import Draw, Loss
from rlfusion.pretrain.metrics import METRICS, Metric


class Pair(NamedTuple):
    """Two points of one trajectory, or what stands for it: x_t (B, *) at t (B,), and the cleaner x_s at s < t."""

    x_t: Tensor
    t: Tensor
    x_s: Tensor
    s: Tensor


def training_pair(schedule: Schedule, x0: Tensor, eps: Tensor, t: Tensor, s: Tensor) -> Pair:
    """The pair of Eq. (1), t and s (B,) float64: one x0 and one eps for both."""
    x_t, x_s = (diffused(x0, eps, level(schedule, time, x0)) for time in (t, s))
    return Pair(x_t, t, x_s, s)


def discrepancy(denoiser: Denoiser, teacher: Denoiser, pair: Pair, cond: Cond, metric: Metric) -> Tensor:
    """d of Eq. (1), (B,): f is the denoiser's x0 at x_t, f_- the teacher's at x_s, without gradient.

    Both calls draw the same dropout.
    """
    devices = [pair.x_t.device] if pair.x_t.is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        goal = teacher(pair.x_s, pair.s, cond).x0
    return metric(denoiser(pair.x_t, pair.t, cond).x0, goal)


def points(step: int, total: int, s0: int, s1: int) -> int:
    """N(k) of Eq. (2): s0 at step 0, rising to s1 + 1."""
    return math.ceil(math.sqrt(step / total * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1) + 1


def decay(points: int, s0: int, mu0: float) -> float:
    """mu of Eq. (2) for a grid of N ``points``."""
    return math.exp(s0 * math.log(mu0) / points)


def doubling_points(step: int, total: int, s0: int, s1: int) -> int:
    """N(k) of Eq. (3): s0 + 1 at step 0, the intervals doubling at even intervals of training up to s1."""
    stage = max(1, math.floor(total / (math.log2(s1 // s0) + 1)))
    return min(s0 * 2 ** (step // stage), s1) + 1


def probabilities(tau: Tensor, mean: float, std: float) -> Tensor:
    """p(n) of Eq. (3), (N-1,), for the rising noise-to-signal ratios ``tau`` (N,) float64.

    Raises:
        ConfigError: no interval has any.
    """
    edge = torch.erf((tau.log() - mean) / (math.sqrt(2) * std))
    p = edge.diff()
    if not p.sum() > 0:
        raise ConfigError(f"mean = {mean}, std = {std}: no noise level in [{tau[0]:g}, {tau[-1]:g}] is ever drawn")
    return p / p.sum()


def draw_index(u: Tensor, p: Tensor) -> Tensor:
    """Indices (B,) int64 with the probabilities ``p`` (N-1,), at the quantiles u (B,) in (0, 1)."""
    return torch.searchsorted(p.cumsum(0), u).clamp(max=len(p) - 1)


def check_boundary(denoiser: Denoiser) -> None:
    """Refuse a kind whose x0 is not x_t at t = 0, whatever the network answers: f(x, t_min) = x.

    Raises:
        ConfigError: says so, or that the kind is undefined at one of the ends of time.
    """
    schedule, kind = denoiser.schedule, denoiser.kind
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    try:
        require_readable(denoiser, ends)
    except ConfigError as error:
        raise ConfigError(f"{error}; no consistency function there") from error
    first = schedule(ends[0])
    start, alpha = solve(kind, first), first.alpha
    if abs(float(start.x0_y)) > 1e-9 or abs(float(start.x0_x * alpha) - 1) > 1e-9:
        raise ConfigError(
            f"kind = {kind}: expected x0 = x_t at t = 0 on {schedule}, as CM(t_min=...) with the schedule's sigma_min, "
            "or TrigFlow() on Trig()"
        )


def _check_continuous(schedule: Schedule) -> None:
    if schedule.resolution is not None:
        raise ConfigError(f"schedule = {schedule}: expected continuous times for consistency training, as of Karras()")


@dataclass(frozen=True)
class CT(Loss):
    """Eq. (2).

    Attributes:
        s0: points of the grid at the first step, at least 2.
        s1: intervals of the grid at the last.
        mu0: decay of the teacher at the first.
        metric: d: L2(), PseudoHuber(c=...) or LPIPS(net=..., weights=..., size=...).
    """

    s0: int = 2
    s1: int = 150
    mu0: float = 0.9
    metric: str = "L2()"

    answers: ClassVar[Answers] = "end"

    def __post_init__(self) -> None:
        _check_sizes(self.s0, 2, self.s1)
        if not 0 < self.mu0 < 1:
            raise ConfigError(f"mu0 = {self.mu0}: expected a decay in (0, 1)")
        _ = self._metric  # refuses what no table holds

    @cached_property
    def _metric(self) -> Metric:
        return spec.parse(self.metric, METRICS, "metric")

    def check(self, denoiser: Denoiser) -> None:
        _check_continuous(denoiser.schedule)
        check_boundary(denoiser)
        self._metric.check(denoiser.space)

    def teacher_decay(self, step: int, total: int) -> float:
        return decay(points(step, total, self.s0, self.s1), self.s0, self.mu0)

    def __call__(self, denoiser: Denoiser, teacher: Denoiser, draw: Draw) -> Tensor:
        intervals = points(draw.step, draw.total, self.s0, self.s1) - 1
        n = (draw.u * intervals).floor().clamp(max=intervals - 1)
        pair = training_pair(denoiser.schedule, draw.x0, draw.eps, (n + 1) / intervals, n / intervals)
        return discrepancy(denoiser, teacher, pair, draw.cond, self._metric)


@dataclass(frozen=True)
class ICT(Loss):
    """Eq. (3), on a schedule whose sigma / alpha is finite, as ``Karras``.

    Attributes:
        s0: intervals of the grid at the first step.
        s1: intervals of the grid at the last.
        mean: of log tau, as the noise levels are drawn.
        std: of log tau.
        metric: as of CT.
    """

    s0: int = 10
    s1: int = 1280
    mean: float = -1.1
    std: float = 2.0
    metric: str = "PseudoHuber()"

    answers: ClassVar[Answers] = "end"

    def __post_init__(self) -> None:
        _check_sizes(self.s0, 1, self.s1)
        require_positive(self, "std")
        _ = self._metric

    @cached_property
    def _metric(self) -> Metric:
        return spec.parse(self.metric, METRICS, "metric")

    def check(self, denoiser: Denoiser) -> None:
        _check_continuous(denoiser.schedule)
        check_boundary(denoiser)
        tau = self._ratios(denoiser.schedule, self.s0 + 1)
        if not 0 < tau[0] <= tau[-1] < math.inf:
            raise ConfigError(
                f"schedule = {denoiser.schedule}: expected 0 < sigma / alpha < inf for ICT, as of Karras()"
            )
        probabilities(tau, self.mean, self.std)
        self._metric.check(denoiser.space)

    @staticmethod
    def _ratios(schedule: Schedule, points: int) -> Tensor:
        """tau at the ``points`` times of the grid."""
        l = schedule(torch.linspace(0, 1, points, dtype=torch.float64))
        return l.sigma / l.alpha

    def __call__(self, denoiser: Denoiser, teacher: Denoiser, draw: Draw) -> Tensor:
        intervals = doubling_points(draw.step, draw.total, self.s0, self.s1) - 1
        tau = self._ratios(denoiser.schedule, intervals + 1)
        n = draw_index(draw.u, probabilities(tau, self.mean, self.std))
        pair = training_pair(denoiser.schedule, draw.x0, draw.eps, (n + 1).double() / intervals, n.double() / intervals)
        weight = cast(1 / tau.diff()[n], draw.x0)
        return weight * discrepancy(denoiser, teacher, pair, draw.cond, self._metric)


def _check_sizes(s0: int, least: int, s1: int) -> None:
    if not least <= s0 <= s1:
        raise ConfigError(f"s0 = {s0}, s1 = {s1}: expected {least} <= s0 <= s1")
