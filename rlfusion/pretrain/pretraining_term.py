"""The loss of a model's own training, on its own data, as a term of another loss: it holds a learner to the data."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from rlfusion.common.errors import ConfigError
from rlfusion.common.seeding import Key
from rlfusion.data import Dataset
from rlfusion.diffusion.denoiser import Denoiser, Denoising, Guided
from rlfusion.pretrain.draws import Draws
from rlfusion.pretrain.losses import make


@dataclass(frozen=True)
class PretrainingTerm:
    """``weight`` times ``loss`` on ``batch`` samples of the data, whose labels are dropped with probability
    ``dropout``.
    """

    weight: float
    loss: str
    batch: int
    dropout: float

    def of(self, model: Denoising, data: Dataset | None, *key: Key) -> Callable[[int], Tensor] | None:
        """The term as a function of the optimiser step, of the denoiser within its guidance; None for weight 0.

        Raises:
            ConfigError: the loss is not defined for the model, or needs a teacher; or there are no data, or a student
                whose own training had no such loss.
        """
        if not self.weight:
            return None
        if data is None:
            raise ConfigError(f"pretrain_weight = {self.weight}: the base model's data are not known, expected 0")
        denoiser = model.denoiser if isinstance(model, Guided) else model
        if not isinstance(denoiser, Denoiser):
            raise ConfigError(
                f"pretrain_weight = {self.weight}: the base model is a student with a boundary or a guidance weight "
                "around it, which was not trained by a loss on data, expected 0"
            )
        loss = make(self.loss)
        loss.check(denoiser)
        if loss.teacher_decay(0, 1) is not None:
            raise ConfigError(f"pretrain_loss = {self.loss}: it needs a teacher, expected one without")
        draw = Draws(data, self.batch, self.dropout, 1, next(denoiser.parameters()).device, *key)

        def term(step: int) -> Tensor:
            return self.weight * loss(denoiser, denoiser, draw(step)).mean()

        return term
