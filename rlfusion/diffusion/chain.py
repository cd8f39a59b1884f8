"""The sampling chain as settings: steps, spacing, kernel, guidance. The chain is the MDP."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from rlfusion.common import spec
from rlfusion.common.code_files import absolute
from rlfusion.common.errors import ConfigError, require_at_most, require_not_negative, unknown
from rlfusion.common.registry import Registry
from rlfusion.diffusion.denoiser import Denoiser, Denoising, Embedded, Guided
from rlfusion.diffusion.grid import Grid, Listed, Spacing, TimeGrid, repeated
from rlfusion.diffusion.kernel import Kernel, LastStepNoise
from rlfusion.diffusion.policy import Policy

NAMES = ("DDIM", "DDPM", "FlowSDE", "CPS", "Renoise", "ReverseSDE", "Langevin")

KERNELS = Registry("kernel", "rlfusion.kernels", {name: f"rlfusion.diffusion.kernel:{name}" for name in NAMES}, Kernel)

MOST_STEPS = 100_000
"""The largest ``steps`` and ``repeats`` of a chain: the noise of all moves of a walk is drawn at once."""

NARROW = 0.05
"""Noise of a step, in units of the latent, below which a small change of the network is a large log-ratio."""


@dataclass(frozen=True)
class Chain:
    """The sampling chain, which is the MDP.

    Attributes:
        steps: denoising steps (network calls) of an episode.
        spacing: of the time grid; "leading" and "linspace" need a discrete schedule (DDPM), "model" a pretrained model
            that has a grid of its own (and is its default).
        kernel: the transition: DDIM(eta=...), DDPM(variance="small" or "large"), FlowSDE(noise=...), CPS(eta=...),
            Renoise(floor=...), ReverseSDE(noise=...), Langevin(step=...).
        last_noise: standard deviation of the noise that the last step, to clean data, adds (``LastStepNoise``); 0 is
            none. Without noise that step has no density, so a one-step model needs it as a policy. It stays in the
            samples.
        guidance: classifier-free guidance weight w in (1 + w) e_c - w e_0, the handbook's; 0 is none. To a network that
            reads w (a student of guided_pd or lcm) it is that input, and the samples cost one call a step.
        guidance_scale: diffusers' scale in place of ``guidance``, with all that it means there. Two answers are
            combined with w = scale - 1 where it is above 1; up to 1, at 0 as well, there is no guidance. A network that
            reads it is given it, whatever it is. One that neither reads it nor has a second answer (FLUX schnell) does
            without.
        guidance_rescale: share of the guided answer that gets the conditional answer's standard deviation back.
        guidance_low: the least time, in [0, 1], at which guidance acts.
        guidance_high: the greatest.
        negative: name of the class that guidance leads away from; empty leads away from "no class". Of a model that
            reads texts, the negative prompt.
        repeats: moves at each of the ``steps`` + 1 levels, for annealed Langevin dynamics; 0 is a plain chain.
    """

    steps: int = 20
    spacing: Spacing = "trailing"
    kernel: str = "DDIM(eta=1.0)"
    last_noise: float = 0.0
    guidance: float = 0.0
    guidance_scale: float | None = None
    guidance_rescale: float = 0.0
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    negative: str = ""
    repeats: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernel", absolute(self.kernel))
        if self.steps < 1:
            raise ConfigError(f"steps = {self.steps}: expected at least 1")
        require_not_negative(self, "last_noise", "repeats")
        require_at_most(self, steps=MOST_STEPS, repeats=MOST_STEPS)
        for name in ("guidance", "guidance_scale"):
            if (given := getattr(self, name)) is not None and not math.isfinite(given):
                raise ConfigError(f"{name} = {given}: expected a finite number")
        if self.guidance and self.guidance_scale is not None:
            raise ConfigError(
                f"guidance_scale = {self.guidance_scale}: it is 1 + guidance, and guidance = {self.guidance} is given; "
                "expected one of the two"
            )
        alone = ("guidance_rescale", "guidance_low", "guidance_high", "negative")
        defaults = {f.name: f.default for f in fields(self)}
        for name in alone:
            if not self.weight and getattr(self, name) != defaults[name]:
                expected = "guidance other than 0" if self.guidance_scale is None else "guidance_scale above 1"
                raise ConfigError(f"{name} = {getattr(self, name)}: there is no guidance, expected {expected}")

    @property
    def weight(self) -> float:
        """w of two answers, 0 for no guidance: a ``guidance_scale`` acts above 1 alone, as in diffusers."""
        return self.guidance if self.guidance_scale is None else max(self.guidance_scale - 1, 0.0)

    @property
    def told(self) -> float:
        """w as a network that reads it is given it: all of ``guidance_scale`` - 1, as in diffusers."""
        return self.guidance if self.guidance_scale is None else self.guidance_scale - 1

    def make_kernel(self) -> Kernel:
        """The kernel that ``kernel`` writes, with the noise of the last step."""
        kernel = spec.parse(self.kernel, KERNELS, "kernel")
        return LastStepNoise(kernel, self.last_noise) if self.last_noise else kernel

    @property
    def moves(self) -> int:
        """K, the steps of a walk."""
        return self.repeats * (self.steps + 1) if self.repeats else self.steps

    def grid(self, denoiser: Denoiser) -> Grid:
        """The time grid for the denoiser."""
        if self.spacing == "model" and denoiser.own is not None:
            times = denoiser.own.times(self.steps)
            return Listed(tuple((repeated(times, self.repeats) if self.repeats else times).tolist()))
        return TimeGrid(self.steps, self.spacing, self.repeats)

    def times(self, denoiser: Denoiser) -> Tensor:
        """The K + 1 falling times on the denoiser's schedule."""
        return self.grid(denoiser).times(denoiser.schedule)

    def policy(self, denoiser: Denoiser, names: Sequence[str]) -> Policy:
        """The policy over this chain, of a denoiser whose classes have these names.

        Raises:
            ConfigError: ``negative`` names none of them, a network does not read the guidance asked for, or
                ``last_noise`` is given to a chain whose last step has noise of its own.
        """
        policy = self._policy(denoiser, names)
        if self.last_noise and policy.stds(self.times(denoiser))[-1] != self.last_noise:
            raise ConfigError(
                f"last_noise = {self.last_noise}: the last step of {self.kernel} on {denoiser.schedule} has noise "
                "or does not end at x0_hat, expected 0"
            )
        return policy

    def _policy(self, denoiser: Denoiser, names: Sequence[str]) -> Policy:
        if denoiser.own is not None:
            return Policy(denoiser.own.around(self._guided(denoiser)), self.make_kernel())
        if denoiser.weights is not None:
            return Policy(self._embedded(denoiser), self.make_kernel())
        if not self.weight:
            return Policy(denoiser, self.make_kernel())
        if self.negative and self.negative not in names:
            raise unknown("class for negative", self.negative, names)
        null = torch.tensor([names.index(self.negative) if self.negative else len(names)])
        return Policy(Guided(denoiser, self.weight, null, *self._interval), self.make_kernel())

    def _guided(self, denoiser: Denoiser) -> Denoising:
        """A pretrained model under this guidance: by an input that it reads, by two answers, or by neither.

        Raises:
            ConfigError: settings of two answers, for a model that has no second one.
        """
        if denoiser.weights is not None:
            return self._embedded(denoiser)
        own = denoiser.own
        assert own is not None  # a pretrained model brings its sampler along
        if not own.guided:
            self._require_one_answer("reads no guidance weight and has no second answer")
            if self.guidance:
                raise ConfigError(
                    f"guidance = {self.guidance}: this model reads no guidance weight and has no second answer, "
                    "expected 0"
                )
            return denoiser
        return Guided(denoiser, self.weight, own.null, *self._interval, own.mix) if self.weight else denoiser

    @property
    def _interval(self) -> tuple[float, float, float]:
        """How much of a guided answer's scale is given back, and when guidance acts."""
        return self.guidance_rescale, self.guidance_low, self.guidance_high

    def _embedded(self, denoiser: Denoiser) -> Embedded:
        """A network that reads w in a range, under this guidance.

        Raises:
            ConfigError: guidance that it cannot follow.
        """
        assert denoiser.weights is not None  # it is asked only of a network that reads w
        low, high = denoiser.weights
        if not low <= self.told <= high:
            name, one = ("guidance", 0) if self.guidance_scale is None else ("guidance_scale", 1)
            raise ConfigError(
                f"{name} = {self.told + one}: this model reads the guidance weight and knows {low + one} to "
                f"{high + one} alone"
            )
        self._require_one_answer("reads the guidance weight and has no second answer")
        return Embedded(denoiser, self.told)

    def _require_one_answer(self, what: str) -> None:
        """Raise ConfigError for settings that act on two answers."""
        if (*self._interval, self.negative) != (0.0, 0.0, 1.0, ""):
            raise ConfigError(
                f"guidance_rescale, guidance_low, guidance_high, negative: this model {what}, expected none of them"
            )


def narrow(chain: Chain, denoiser: Denoiser) -> str:
    """The steps whose noise is below ``NARROW`` and not 0, and the setting that leaves them out; "" for no such step.

    The log-ratio of a step of noise S grows as |change of the mean|^2 / (2 S^2), summed over all features.
    """
    found = _narrow(chain, denoiser)
    if not found:
        return ""
    steps = ", ".join(f"{k + 1} of {chain.moves}: {std:.3g}" for k, std in found)
    message = f"noise of standard deviation below {NARROW} at step {steps}: a small change of the network is a large "
    message += "log-ratio there"
    trailing = replace(chain, spacing="trailing")
    if chain.spacing != "trailing" and not _narrow(trailing, denoiser):
        return f"{message}; chain.spacing = trailing has no such step"
    return f"{message}; fewer steps, or a kernel with more noise at the end, have none"


def _narrow(chain: Chain, denoiser: Denoiser) -> list[tuple[int, float]]:
    """The number from 0 and the noise of each such step."""
    stds = Policy(denoiser, chain.make_kernel()).stds(chain.times(denoiser)).tolist()
    return [(k, std) for k, std in enumerate(stds) if 0 < std < NARROW]
