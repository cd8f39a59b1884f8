"""A denoiser: a network, the schedule that says what its time means, and the kind of thing that it predicts."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Literal, NamedTuple, Protocol
from typing import cast as cast_to

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlfusion.common.errors import ConfigError
from rlfusion.common.tensors import Cond, cast, cat_cond, map_cond
from rlfusion.diffusion import rows
from rlfusion.diffusion.kinds import Kind
from rlfusion.diffusion.parameterization import (
    Prediction,
    Solution,
    conditioning,
    named,
    predict,
    predicted,
    solve,
    target,
)
from rlfusion.diffusion.schedule import Level, Schedule, level
from rlfusion.diffusion.space import Pixels, Space

Precision = Literal["float32", "bfloat16"]

Answers = Literal["mean", "end"]
"""What x0_hat of a model is: the mean of what x_t was made of, as of a denoiser; or the end of a walk from x_t, as of a
consistency function, and of a generator that was taught by its samples."""


Mix = Callable[[Tensor, Tensor, float | Tensor], Tensor]
"""(y_c, y_0, w) -> y: the guided answer of a network's two answers (B, ...), with gradients."""


class Denoising(Protocol):
    """A denoiser, or a wrapper that calls one in another way."""

    @property
    def schedule(self) -> Schedule:
        """What a time means."""

    @property
    def kind(self) -> str | Kind:
        """What the network within predicts."""

    @property
    def space(self) -> Space:
        """What x is a latent of."""

    @property
    def own(self) -> "Own | None":
        """The sampler that a pretrained model brings along; None for none."""

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Prediction: ...


class Own(Protocol):
    """The sampler that a pretrained model was published with."""

    def times(self, steps: int) -> Tensor:
        """Its time grid, (K+1,) float64."""

    @property
    def guided(self) -> bool:
        """Whether guidance by a second answer, that to a negative prompt, is its way."""

    @property
    def mix(self) -> Mix | None:
        """How the guided answer is made of two; None for ``Guided``'s Eq. (1)."""

    def null(self, cond: Cond) -> Cond:
        """The conditions (B,) that guidance leads away from, for those of B samples."""

    def around(self, denoiser: Denoising) -> Denoising:
        """Wrap the guided denoiser as its sampler does, for example in a consistency model's boundary."""


class Denoiser(nn.Module):
    """``(x_t, t, cond) -> Prediction(x0, eps)``.

    ``net(x, t, cond)`` gets c_in x (B, ...), c_noise (B,) in float32 or better, and the condition; it answers y shaped
    like x. c_in = 1 and c_noise = t in [0, 1] unless the kind says otherwise. ``kind`` is text, or a ``Kind``.
    ``precision`` is that of the network's own arithmetic (autocast); coefficients, latents, transitions and
    log-probabilities keep the precision of x. ``channels_last`` gives the network images (B, C, H, W) with their
    channels last in memory, for the convolutions of a GPU that are faster so. ``space`` is what x is a latent of;
    ``own`` is the sampler that a pretrained model brings along, if any; ``weights`` is the range of guidance weights w
    that the network reads, its condition then {"label": cond, "w": (B,)}, or None (see ``Embedded``).
    """

    def __init__(self, net: nn.Module, schedule: Schedule, kind: str | Kind, precision: Precision = "float32") -> None:
        super().__init__()
        named(kind)
        self.net, self.schedule, self.kind, self.precision = net, schedule, kind, precision
        self.channels_last = False
        self.space: Space = Pixels()
        self.own: Own | None = None
        self.weights: tuple[float, float] | None = None

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Prediction:
        """x (B, ...), t () or (B,) float64 on the CPU, cond of batch B."""
        shared = self._shared(t, x)
        y = self._called(x, *self._reads(t, x, shared), cond)
        return predicted(self._solution(t, x) if shared is None else shared.solution, y.to(x), x)

    def answer(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """The network's own y (B, ...) at x_t: what ``parameterization.target`` is the target of."""
        return self._called(x, *self._reads(t, x, self._shared(t, x)), cond)

    def _reads(self, t: Tensor, x: Tensor, shared: "Shared | None") -> tuple[Tensor, Tensor]:
        """c_noise (B,) or (1,) and c_in, as the network reads them beside x."""
        if shared is not None:
            return shared.at, shared.scale
        key = ("reads", self.kind, self.schedule, x.shape, x.dtype, x.device)
        return rows.kept(t, key, lambda: _read(self.kind, t.clone(), level(self.schedule, t, x), x))

    def _solution(self, t: Tensor, x: Tensor) -> Solution:
        """How the network's answers are solved, cast, where the times have nothing in common."""
        key = ("solution", self.kind, self.schedule, x.shape, x.dtype, x.device)
        return rows.kept(t, key, lambda: Solution(*(cast(c, x) for c in solve(self.kind, level(self.schedule, t, x)))))

    def _shared(self, t: Tensor, x: Tensor) -> "Shared | None":
        """Both where the batch shares a time, or its times are those of a chain."""
        if t.ndim == 0:
            return _shared(self.kind, self.schedule, t.item(), x.dtype, x.device)
        chain = rows.chain(t)
        if chain is None or len(t) != len(x):
            return None
        key = ("shared", self.kind, self.schedule, x.ndim, x.dtype, x.device)
        return rows.kept(t, key, lambda: _gathered(self.kind, self.schedule, chain, x))

    def _called(self, x: Tensor, at: Tensor, scale: Tensor, cond: Cond) -> Tensor:
        """The network's answer to c_noise ``at`` (B,) or (1,) and c_in ``scale``."""
        scaled = scale * x
        if self.channels_last:
            scaled = scaled.contiguous(memory_format=torch.channels_last)
        with _autocast(x.device.type, self.precision == "bfloat16"):
            y = self.net(scaled, at.expand(len(x)), cond)
        return y.contiguous() if self.channels_last else y


_AS_IT_IS = nullcontext()


def _autocast(device: str, wanted: bool) -> AbstractContextManager[object]:
    """Within the context autocast is as wanted; entering one takes as long as a small operation."""
    if not wanted and not torch.is_autocast_enabled(device):
        return _AS_IT_IS
    return torch.autocast(device, torch.bfloat16, enabled=wanted)


def answer(model: Denoising, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
    """The answer y (B, ...) at x_t, in the kind of the network, of a denoiser or of a wrapper with its interface."""
    if isinstance(model, Denoiser):
        return model.answer(x, t, cond).to(x)
    prediction = model(x, t, cond)
    return target(model.kind, prediction.x0, prediction.eps, level(model.schedule, t, x))


def require_readable(model: Denoising, times: Tensor) -> None:
    """Refuse times (K,) at which what the network of a denoiser, or of a wrapper with its ``kind``, reads or answers is
    not defined: eps at pure noise, say, or the logarithm of no noise.

    Raises:
        ConfigError: names the kind and the level.
    """
    for t in times:
        l = model.schedule(t)
        try:
            solve(model.kind, l)
            conditioning(model.kind, t, l)
        except ValueError as error:
            raise ConfigError(f"kind = {model.kind}, schedule = {model.schedule}: {error}") from error


def _read(kind: str | Kind, t: Tensor, l: Level, x: Tensor) -> tuple[Tensor, Tensor]:
    """c_noise (B,) or (1,) and c_in of a network of this kind, as ``x`` (B, ...) is."""
    at = cast(conditioning(kind, t, l).reshape(-1), x if x.itemsize >= 4 else x.float())  # in bfloat16 .999 would be 1
    return at, cast(named(kind).scale(l), x)


class Shared(NamedTuple):
    """What a network reads beside x, and how its answer is solved, at a time that a whole batch shares."""

    at: Tensor
    scale: Tensor
    solution: Solution


@lru_cache(maxsize=4096)
@torch.inference_mode(False)
def _shared(kind: str | Kind, schedule: Schedule, t: float, dtype: torch.dtype, device: torch.device) -> Shared:
    """Those of a time, cast: the same few in every rollout. What the first caller records no gradients of, another may
    (hence no inference mode).
    """
    time, like = torch.tensor(t, dtype=torch.float64), torch.empty(0, dtype=dtype, device=device)
    l = level(schedule, time, time)
    solution = Solution(*(cast(c, like) for c in solve(kind, l)))
    return Shared(*_read(kind, time, l, like), solution)


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _table(
    kind: str | Kind, schedule: Schedule, grid: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """c_noise (K,) of the times before the steps of a chain; c_in and the solution (K, 5)."""
    each = [_shared(kind, schedule, t, dtype, device) for t in grid[:-1]]
    solved = [torch.stack((one.scale, *one.solution)) for one in each]
    return torch.cat([one.at for one in each]), torch.stack(solved)


def _gathered(kind: str | Kind, schedule: Schedule, chain: rows.Chain, x: Tensor) -> Shared:
    """``Shared`` of rows ``x`` (N, *) of a chain."""
    at, solved = map(chain.gather, _table(kind, schedule, chain.grid, x.dtype, x.device))
    scale, *solution = solved.reshape(*solved.shape, *[1] * (x.ndim - 1)).unbind(1)
    return Shared(at, scale, Solution(*solution))


class Wrapper(nn.Module):
    """Base of wrappers that call a denoiser in another way, and have all its other attributes."""

    def __init__(self, denoiser: Denoising) -> None:
        super().__init__()
        self.denoiser: Denoising = denoiser
        self.schedule: Schedule = denoiser.schedule

    @property
    def kind(self) -> str | Kind:
        return self.denoiser.kind

    @property
    def space(self) -> Space:
        return self.denoiser.space

    @property
    def own(self) -> Own | None:
        return self.denoiser.own


class Embedded(Wrapper):
    """A denoiser that reads the guidance weight (``nets.guidance``), at one ``weight`` and with the plain condition."""

    def __init__(self, denoiser: Denoising, weight: float) -> None:
        super().__init__(denoiser)
        self.weight = weight

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Prediction:
        return self.denoiser(x, t, self._read(x, cond))

    def answer(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """As ``Denoiser.answer``, if a ``Denoiser`` is within."""
        return cast_to(Denoiser, self.denoiser).answer(x, t, self._read(x, cond))

    def _read(self, x: Tensor, cond: Cond) -> Cond:
        return {"label": cond, "w": torch.full((len(x),), self.weight, dtype=x.dtype, device=x.device)}


class Guided(Wrapper):
    """Classifier-free guidance as a wrapper with a denoiser's call (Ho & Salimans 2022; handbook 2.3, corrected).

        (1)  y = (1 + w) y_c - w y_0,     w = ``weight``     (diffusers' guidance_scale is 1 + w)
        (2)  y <- f y,  f = rescale std(y_c) / std(y) + 1 - rescale                    (Lin et al. 2023, Eq. 15, 16)

    y is the network's answer; Eq. (1) is affine, so it is the same in x0 and eps. y_0 is the answer to ``null``, the
    condition of one sample, batch 1, that means "no condition", or a negative one; or a function that gives each
    sample's for its condition. Where a model mixes its two answers otherwise, ``mix`` takes the place of Eq. (1): y =
    mix(y_c, y_0, w), in what the network answers. Guidance acts where
    ``low`` <= t <= ``high`` (Kynkaanniemi et al. 2024); elsewhere y = y_c. All is one network call: B rows, and one
    more for every row that is guided. Where gradients pass, ``apart`` makes two calls of it.
    """

    def __init__(
        self,
        denoiser: Denoising,
        weight: float,
        null: Cond | Callable[[Cond], Cond],
        rescale: float = 0.0,
        low: float = 0.0,
        high: float = 1.0,
        mix: Mix | None = None,
    ) -> None:
        """
        Raises:
            ConfigError: ``rescale`` or the interval outside [0, 1].
        """
        super().__init__(denoiser)
        if not 0 <= rescale <= 1:
            raise ConfigError(f"guidance_rescale = {rescale}: expected a number in [0, 1]")
        if not 0 <= low <= high <= 1:
            raise ConfigError(f"guidance_low, guidance_high = {low}, {high}: expected 0 <= low <= high <= 1")
        self.weight, self.null = weight, null
        self.rescale, self.low, self.high, self.mix = rescale, low, high, mix
        self.apart = False

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Prediction:
        inside = (t >= self.low) & (t <= self.high)
        if not bool(inside.any()):
            return self._again(x, t, cond) if self.apart and torch.is_grad_enabled() else self.denoiser(x, t, cond)
        if bool(inside.all()):
            return self._guided(x, t, cond, slice(None))
        return self._guided(x, t, cond, inside.nonzero().flatten().to(x.device))

    def _guided(self, x: Tensor, t: Tensor, cond: Cond, rows: Tensor | slice) -> Prediction:
        """Eq. (1), or ``mix``, and (2) in ``rows`` of the batch."""
        mine = x[rows]
        null = self._null(map_cond(lambda c: c[rows], cond), mine)
        time = t if t.ndim == 0 else t[rows] if isinstance(rows, slice) else t[rows.to(t.device)]
        if self.apart and torch.is_grad_enabled():
            conditional, unconditional = self._again(x, t, cond), self._again(mine, time, null)
        else:
            at = torch.cat([t, time]) if t.ndim else t
            both = self.denoiser(torch.cat([x, mine]), at, cat_cond([cond, null]))
            conditional = Prediction(*(half[: len(x)] for half in both))
            unconditional = Prediction(*(half[len(x) :] for half in both))
        part = Prediction(*(half[rows] for half in conditional))
        if self.mix is None:
            guided = Prediction(*map(self.combine, part, unconditional))
        else:
            guided = self._mixed(self.mix, part, unconditional, level(self.schedule, time, mine), mine)
        if self.rescale:
            guided = self._rescaled(guided, part, mine, time)
        if isinstance(rows, slice):
            return guided
        return Prediction(*(whole.index_copy(0, rows, new) for whole, new in zip(conditional, guided)))

    def _again(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """An answer whose activations are not kept, but made again in the backward pass."""
        return checkpoint(self.denoiser, x, t, cond, use_reentrant=False)

    def _null(self, cond: Cond, x: Tensor) -> Cond:
        """The condition of y_0 for the rows ``x`` of condition ``cond``."""
        if callable(self.null):
            return self.null(cond)
        self.null = map_cond(lambda c: c.to(x.device), self.null)  # moves once; a copy a step would stall a GPU
        return map_cond(lambda c: c.expand(len(x), *c.shape[1:]), self.null)

    def combine(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """Eq. (1): (1 + w) conditional - w unconditional."""
        return (1 + self.weight) * conditional - self.weight * unconditional

    def _mixed(self, mix: Mix, conditional: Prediction, unconditional: Prediction, l: Level, x: Tensor) -> Prediction:
        """``mix`` of the two answers, as pipelines do it."""
        kind = self.denoiser.kind
        y_c, y_0 = (target(kind, p.x0, p.eps, l) for p in (conditional, unconditional))
        return predict(solve(kind, l), mix(y_c, y_0, self.weight), x)

    def _rescaled(self, guided: Prediction, conditional: Prediction, x: Tensor, t: Tensor) -> Prediction:
        """Eq. (2), in what the network answers, as diffusers' pipelines do."""
        l, kind = level(self.schedule, t, x), self.denoiser.kind
        y, y_c = (target(kind, p.x0, p.eps, l) for p in (guided, conditional))
        ratio = y_c.flatten(1).std(1) / y.flatten(1).std(1)
        f = (self.rescale * ratio + 1 - self.rescale).reshape(-1, *[1] * (x.ndim - 1))
        return predict(solve(kind, l), f * y, x)


@contextmanager
def apart(*modules: nn.Module | None) -> Iterator[None]:
    """Within, the guidance in these modules makes its two answers one after the other where gradients pass, and the
    backward pass makes each again: it holds the activations of one of them, with the rows of one.
    """
    guided = [m for one in modules if one is not None for m in one.modules() if isinstance(m, Guided)]
    before = [m.apart for m in guided]
    for m in guided:
        m.apart = True
    try:
        yield
    finally:
        for m, was in zip(guided, before):
            m.apart = was


def guidance_in(module: nn.Module) -> Guided | None:
    """The guidance by two answers within it; None for none."""
    return next((m for m in module.modules() if isinstance(m, Guided)), None)
