"""A discriminator that tells real samples from a generator's, at noise levels or clean (DMD2, section 4.3; ADD).

(1)  real and fake are noised alike, x_t = alpha x + sigma eps with noise of their own and one t, and D answers a
     logit (B,) of (x_t, t, c);  clean: t = 0
(2)  loss = d(D(real), D(fake)) + r1 / 2 |grad_x D(real_t)|^2
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from rlfusion.common import shards
from rlfusion.common.tensors import sum_features
from rlfusion.distill.per_step import unasked
from rlfusion.nets.critic import Critic
from rlfusion.nets.parts import plain_attention
from rlfusion.objectives import Adversarial, gradient_penalty
from rlfusion.objectives.renoise import noised
from rlfusion.objectives.times import Times
from rlfusion.pretrain import Draw
from rlfusion.pretrain.shares import accumulate
from rlfusion.training.optimization import Optimization
from rlfusion.training.ranks import Record, current


class Discriminator:
    """Eq. (1) and (2). ``times`` is the law of t, or None for clean samples; the schedule is the critic's own."""

    def __init__(
        self,
        critic: Critic,
        losses: Adversarial,
        times: Times | None,
        r1: float,
        lr: float,
        optimizer: str = "adamw",
    ) -> None:
        self.critic, self.losses, self.times, self.r1 = critic, losses, times, r1
        self.optimization = Optimization(critic, lr, optimizer=optimizer)

    def update(self, draw: Draw, fake: Tensor) -> dict[str, Tensor]:
        """A step of D on the draw's real samples and as many generated ones, (B, *), constants here.

        Returns:
            discriminator_loss and discriminator_accuracy, 0-dim.
        """
        held = fake.detach()
        with self._penalised() if self.r1 else nullcontext():
            found = accumulate(self.critic, draw, lambda part: self._loss(part, part.of(held)))
        current().leave_out(unasked(self.critic, draw.cond))
        self.optimization.step()
        right = (found["right_on_real"].mean() + found["right_on_fake"].mean()) / 2
        return {"discriminator_loss": found["loss"].mean(), "discriminator_accuracy": right}

    @contextmanager
    def _penalised(self) -> Iterator[None]:
        """For the gradient of the penalty, which is one of a gradient."""
        with plain_attention(), shards.kept(self.critic):
            yield

    def _loss(self, draw: Draw, fake: Tensor) -> tuple[Tensor, Record]:
        """What the samples of a draw add to Eq. (2), and of each of them the loss and how it is judged."""
        real, t = self._noised(draw, draw.x0, "real")
        real = real.detach().requires_grad_(self.r1 > 0)
        on_real, on_fake = self.critic(real, t, draw.cond), self._logits(draw, fake)
        loss = self.losses.discriminator(on_real, on_fake)
        if self.r1:
            loss = loss + self.r1 / 2 * gradient_penalty(on_real, real)
        right = {"right_on_real": (on_real > 0).float(), "right_on_fake": (on_fake < 0).float()}
        return draw.mean(loss), {"loss": loss, **right}

    def generator_loss(self, draw: Draw, fake: Tensor) -> Tensor:
        """The generator's loss (B,) of samples (B, *) with gradients; D's weights get none of it. All of D is done when
        it returns: a D that recomputes its activations would do so after its weights want gradients again.
        """
        held = fake.detach().requires_grad_()
        self.critic.requires_grad_(False)
        try:
            loss = self.losses.generator(self._logits(draw, held))
            (slope,) = torch.autograd.grad(loss.sum(), held)
        finally:
            self.critic.requires_grad_(True)
        return loss.detach() + sum_features((fake - held.detach()) * slope)

    def _logits(self, draw: Draw, fake: Tensor) -> Tensor:
        x, t = self._noised(draw, fake, "fake")
        return self.critic(x, t, draw.cond)

    def _noised(self, draw: Draw, x: Tensor, whose: str) -> tuple[Tensor, Tensor]:
        """Eq. (1)."""
        schedule = self.critic.denoiser.schedule
        if self.times is None:
            return x, torch.zeros(len(x), dtype=torch.float64)
        t = self.times(draw.u, schedule)
        return noised(x, draw.normal(f"discriminator noise, {whose}", *x.shape), t, schedule), t
