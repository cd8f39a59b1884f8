"""Denoisers that are known in closed form."""

from torch import Tensor

from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.parameterization import Prediction, predict, solve
from rlfusion.diffusion.schedule import level


class ByAnswer(Denoiser):
    """A denoiser whose ``answer`` is written anew, without a network: what it predicts follows from that."""

    def forward(self, x: Tensor, t: Tensor, cond=None) -> Prediction:
        return predict(solve(self.kind, level(self.schedule, t, x)), self.answer(x, t, cond).to(x), x)
