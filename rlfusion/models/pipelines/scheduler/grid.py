"""The time grid of a diffusers scheduler, and the proof that its own steps on that grid are ours.

A step of a one-step sampler is linear in x_t, the network's answer and the noise, so that one random triple a step,
given to the scheduler and to our policy, tells whether they are the same function. A grid on which they are not is
refused: what a reader did not foresee (another version of diffusers, settings that do not go together) is never taken
for something else.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from rlfusion.common import spec
from rlfusion.common.errors import ConfigError
from rlfusion.diffusion.chain import KERNELS
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.kinds import Kind
from rlfusion.diffusion.parameterization import solve
from rlfusion.diffusion.policy import Observation, Policy
from rlfusion.diffusion.schedule import Schedule
from rlfusion.models.pipelines.drawn import drawn
from rlfusion.models.pipelines.scheduler.settings import told

GridArguments = Callable[[Any, int], dict[str, Any]]
"""(scheduler, steps) -> the keywords with which a pipeline calls its scheduler's ``set_timesteps``."""

ALIKE = 1e-3
"""How far a step of the scheduler's may be from ours, as a share of the largest number."""

CLOCK = 2e-5
"""How far the times that its network gets may be from ours, as a share of the largest."""

FOREIGN = (ValueError, TypeError, AssertionError, NotImplementedError, LookupError, ArithmeticError, RuntimeError)
"""What a scheduler raises over settings and steps that do not go together."""


class Unfollowed(Exception):
    """Why a grid cannot be followed, and what is expected."""

    def __init__(self, why: str, expected: str = "another number of steps") -> None:
        super().__init__(why)
        self.expected = expected


def same(denoiser: nn.Module) -> nn.Module:
    """The denoiser itself: what most schedulers put around it."""
    return denoiser


@dataclass(frozen=True)
class Form:
    """What one step of a scheduler is, and how its own numbers are read.

    Attributes:
        schedule, kind, kernel, explore, around, first_order: as of ``scheduler.Sampling``.
        clock: (the scheduler with a grid, steps) -> the K + 1 times; raises Unfollowed.
        ask: steps -> further keywords of ``set_timesteps``; raises Unfollowed.
        call: further keywords of ``step``.
        over_alpha: its x is x_t / alpha.
        unit: its x, and what the network answers, in units of ours.
    """

    schedule: Schedule
    kind: Kind
    kernel: str
    explore: str
    clock: Callable[[Any, int], Tensor]
    around: Callable[[nn.Module], nn.Module] = same
    first_order: Callable[[], Any] | None = None
    ask: Callable[[int], dict[str, Any]] = lambda steps: {}
    call: Mapping[str, Any] = field(default_factory=dict)
    over_alpha: bool = False
    unit: float = 1.0

    def scale(self, t: Tensor) -> float:
        """The scheduler's x in units of our x_t."""
        return self.unit / float(self.schedule(t).alpha) if self.over_alpha else self.unit

    def policy(self, net: nn.Module) -> Policy:
        return Policy(self.around(Denoiser(net, self.schedule, self.kind)), spec.parse(self.kernel, KERNELS, "kernel"))


def checked(scheduler: Any, form: Form, arguments: GridArguments) -> Callable[[int], Tensor]:
    """steps -> the K + 1 times of ``scheduler``, whose steps, of first order, are those of ``form``: tried once a K.

    The function raises ConfigError, which names the scheduler, the steps and the settings that are not its defaults:
    no grid can be made of them, or one whose steps are not those of ``form``.
    """
    walked = form.first_order() if form.first_order else copy.deepcopy(scheduler)

    @lru_cache(maxsize=16)
    def grid(steps: int) -> Tensor:
        try:
            return _times(walked, form, arguments, steps)
        except Unfollowed as error:
            raise ConfigError(
                f"scheduler {type(scheduler).__name__}, steps = {steps}{told(scheduler)}: {error}; expected "
                f"{error.expected}, or chain.spacing = trailing, a grid of our own"
            ) from error

    def times(steps: int) -> Tensor:
        if steps < 1:
            raise ConfigError(f"steps = {steps}: expected at least 1")
        return grid(steps).clone()

    return times


def _times(scheduler: Any, form: Form, arguments: GridArguments, steps: int) -> Tensor:
    """The times, checked; raises Unfollowed."""
    keywords = arguments(scheduler, steps) | form.ask(steps)
    try:
        scheduler.set_timesteps(**keywords)
    except FOREIGN as error:
        raise Unfollowed(f"it makes no times: {_first(error)}") from error
    times = form.clock(scheduler, steps)
    _require_falling(scheduler, times, steps)
    _require_alike(scheduler, form, times)
    return times


def _first(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _require_falling(scheduler: Any, times: Tensor, steps: int) -> None:
    """Raise Unfollowed unless K + 1 times fall within [0, 1]; the last step may stay where it is."""
    if len(times) != steps + 1:
        raise Unfollowed(f"it makes {len(times) - 1} times of them")
    if not bool(times.isfinite().all()):
        raise Unfollowed("its times are not finite")
    if not 0 <= float(times.min()) <= float(times.max()) <= 1:
        raise Unfollowed(f"its times lie in [{times.min():.6g}, {times.max():.6g}], not in [0, 1]")
    gaps = times.diff()
    if not (bool((gaps[:-1] < 0).all()) and gaps[-1] <= 0):
        raise Unfollowed("its times do not fall, or two of them are the same")
    code = scheduler.timesteps
    if steps > 1 and code[0] == code[1]:
        raise Unfollowed(f"its network gets the time {code[0].item():g} twice, and it begins with the second")


class _Told(nn.Module):
    """A network that answers ``y``, and keeps what it was asked."""

    x: Tensor
    time: Tensor
    y: Tensor

    def forward(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        self.x, self.time = x, t
        return self.y


@torch.no_grad()
def _require_alike(scheduler: Any, form: Form, times: Tensor) -> None:
    """Raise Unfollowed unless every step of ``scheduler``, whose grid is set, is that of ``form``."""
    steps, net = len(times) - 1, _Told()
    policy = form.policy(net)
    begun, ours = float(getattr(scheduler, "init_noise_sigma", 1.0)), policy.prior_std(times) * form.scale(times[0])
    if abs(begun * form.unit - ours) > ALIKE * ours:
        raise Unfollowed(f"it begins with noise of {begun:.6g}, not {ours / form.unit:.6g}")
    try:
        solve(form.kind, form.schedule(times[0]))
    except ValueError as error:
        predicted = scheduler.config.get("prediction_type")
        raise Unfollowed(
            f"with prediction_type = {predicted} its network says nothing of x0 at the first time, where no signal is "
            "left",
            "v_prediction, or rescale_betas_zero_snr = False",
        ) from error
    if form.over_alpha and (last := float(form.schedule(times[-1]).alpha)) < 1 - 1e-5:
        why = f"it ends with noise left, and with x / alpha, alpha = {last:.6g}"
        raise Unfollowed(why, "final_sigmas_type = zero")
    draw = torch.Generator().manual_seed(0)
    for k in range(steps):
        try:
            apart = _apart(scheduler, form, policy, net, k, times, draw)
        except FOREIGN as error:
            raise Unfollowed(f"its step {k} cannot be made: {_first(error)}") from error
        if not all(map(math.isfinite, apart)):
            raise Unfollowed(f"its step {k} is not finite")
        for what, gap, most in zip(("result", "network's input", "network's time"), apart, (ALIKE, ALIKE, CLOCK)):
            if not gap <= most:
                raise Unfollowed(f"the {what} of its step {k} is {gap:.2g} off {form.kernel}'s")


def _apart(
    scheduler: Any, form: Form, policy: Policy, net: _Told, k: int, times: Tensor, draw: torch.Generator
) -> tuple[float, float, float]:
    """How far step k of both is apart on one random x_t, answer and noise: in the result, and in the network's input
    and time.
    """
    t, s = times[k], times[k + 1]
    x, net.y, z = torch.randn(3, 1, 1, 2, 8, generator=draw, dtype=torch.float64)
    distribution = policy(Observation(x, t, s))
    ours = distribution.mean + distribution.std * z
    code, given = scheduler.timesteps[k], x * form.scale(t)
    with drawn(scheduler, [z]):
        read = scheduler.scale_model_input(given, code) if form.over_alpha else given / form.unit
        theirs = scheduler.step(net.y * form.unit, code, given, **form.call).prev_sample / form.scale(s)
    return _gap(ours, theirs), _gap(net.x, read), abs(float(net.time[0]) - float(code)) / _range(scheduler)


def _gap(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference as a share of the largest number, or of 1."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1.0))


def _range(scheduler: Any) -> float:
    return max(1.0, float(scheduler.timesteps.abs().max()))
