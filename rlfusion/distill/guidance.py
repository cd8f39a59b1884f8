"""Teachers and students at a guidance weight w that each sample draws for itself (Meng et al. 2023; Luo et al. 2023).

    (1)  teacher:  (1 + w) y_c - w y_0,     w ~ U[low, high],     the student reads w (``nets.guidance``)

Conditions are then {"label": c, "w": w}; the guidance is in the teacher alone.
"""

from dataclasses import dataclass, replace

from torch import Tensor, nn

from rlfusion.common.errors import ConfigError
from rlfusion.common.tensors import Cond
from rlfusion.diffusion.denoiser import Denoiser, Guided
from rlfusion.diffusion.parameterization import Prediction
from rlfusion.diffusion.schedule import Schedule
from rlfusion.distill.base import Teaching
from rlfusion.pretrain import Draw, Loss


class AnyGuidance(nn.Module):
    """Eq. (1): a denoiser's call whose condition holds the weight of each sample."""

    def __init__(self, denoiser: nn.Module, null: Tensor) -> None:
        super().__init__()
        self.denoiser, self.null = denoiser, null
        self.schedule: Schedule = denoiser.schedule

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Prediction:
        w = cond["w"].reshape(-1, *[1] * (x.ndim - 1))
        return Guided(self.denoiser, w, self.null)(x, t, cond["label"])


@dataclass(frozen=True)
class Weighted(Loss):
    """``loss`` with a drawn weight in every sample's condition."""

    loss: Loss
    low: float
    high: float

    @property
    def second_order(self) -> bool:
        """As of ``loss``."""
        return self.loss.second_order

    def teacher_decay(self, step: int, total: int) -> float | None:
        return self.loss.teacher_decay(step, total)

    def __call__(self, denoiser: Denoiser, target: Denoiser, draw: Draw) -> Tensor:
        w = draw.drawn("guidance", lambda random, count: random.uniform(self.low, self.high, count))
        cond = {"label": draw.cond, "w": w.to(draw.x0)}
        return self.loss(denoiser, target, replace(draw, cond=cond))


def check_range(low: float, high: float) -> None:
    """Raise ConfigError unless [low, high] is a range of guidance weights."""
    if not 0 <= low < high < float("inf"):
        raise ConfigError(f"w_low = {low}, w_high = {high}: expected 0 <= w_low < w_high")


def check_unguided(teaching: Teaching, method: str) -> None:
    """Refuse guidance beside that of the method.

    Raises:
        ConfigError: the run sets a guidance, or the teacher reads one.
    """
    if teaching.teacher_card.weights:
        raise ConfigError(f"teacher: it reads the guidance weight already, expected another for {method}")
    if teaching.guidance:
        raise ConfigError(f"guidance = {teaching.guidance}: {method} draws the guidance weight itself, expected 0")
