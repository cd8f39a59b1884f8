"""The least that a loop does beside the passes of its networks, by hand in plain PyTorch: a floor with what no rollout
and no update can be without.

    (1)  rollout   noise by ``torch.randn``; x0, eps, mean and next state of each step; its log-probability and a place
                   for it, where the agent keeps whole walks; pixels and reward, where it asks for them
    (2)  update    a loss (below) and its gradient for each pass; and for each step of an optimiser
                   ``torch.nn.utils.clip_grad_norm_``, ``torch.optim.AdamW(fused=True)`` and ``zero_grad``

The passes are those of a call of ours, run again with their own inputs. The losses are one of each kind; those of opd,
drwr and dawr are a little shorter than that of their kind:

    walks      (ddpo, grpo, ppo, opd, drwr, dawr)  mean, log-probability, clipped ratio and KL of the step of each row
    noisings   (awm, nft, dpo, sft, qsm)           noise and times drawn, x_t, and a weighted squared error a row
    rewards    (draft, refl)                       the end of the step, decoded, and its reward
    critics    (of ppo, dawr and qsm)              a squared error a row

It checks nothing, tells nothing, undoes nothing, averages no weights and could not be resumed: all that a run has
beyond this is what ours may cost more.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from passes import Pass, recording
from torch import Tensor, nn

from rlfusion.common.tensors import to_pixels
from rlfusion.rewards import ink
from rlfusion.training.optimization import Optimization

NOISED = ("awm", "nft", "dpo", "sft", "qsm")
REWARDED = ("draft", "refl")
ALPHA, SIGMA, A, B, STD, CLIP, KL = 0.8, 0.6, 0.9, 0.3, 0.3, 0.2, 0.2
"""Coefficients of a step, and of the losses; what they are makes no difference to the time."""


class Step(NamedTuple):
    """A step of an optimiser of these parameters."""

    parameters: tuple[nn.Parameter, ...]


@contextmanager
def steps(found: list[Pass | Step]) -> Iterator[None]:
    """Within the context steps of optimisers are put down, too."""
    ours = Optimization.step

    def step(self: Optimization, share: float = 1.0) -> float:
        found.append(Step(tuple(self.named.values())))
        return ours(self, share)

    Optimization.step = step  # type: ignore[method-assign]
    try:
        yield
    finally:
        Optimization.step = ours  # type: ignore[method-assign]


def recorded(call: Callable[[], object], kinds: tuple[type[nn.Module], ...]) -> list[Pass | Step]:
    """The passes and the steps within a call, in order."""
    found: list[Pass | Step]
    with recording(kinds) as found, steps(found):  # type: ignore[assignment]
        call()
    return found


def moved(x: Tensor, y: Tensor) -> Tensor:
    """The mean of the step from x (B, *), where the network answers v = y."""
    x0, eps = ALPHA * x - SIGMA * y, SIGMA * x + ALPHA * y
    return A * x0 + B * eps


def log_prob(x: Tensor, mean: Tensor) -> Tensor:
    """(B,), but for its constant."""
    return -((x - mean) / STD).square().flatten(1).sum(1) / 2


class Rollout:
    """(1); ``path`` says whether whole walks are kept, ``end`` whether their ends are scored."""

    def __init__(self, passes: list[Pass], decoder: type[nn.Module] | None, path: bool, end: bool) -> None:
        self.path, self.end = path, end
        self.walk, self.decode = list[Pass](), list[Pass]()
        for one in passes:
            decodes = decoder is not None and isinstance(one.module, decoder)
            (self.decode if decodes else self.walk).append(one)

    @torch.no_grad()
    def __call__(self) -> None:
        first = self.walk[0].inputs[0]
        states = first.new_empty(len(first), len(self.walk) + 1, *first.shape[1:]) if self.path else None
        x, kept = torch.randn_like(first), []
        for k, one in enumerate(self.walk):
            mean = moved(x, one.module(*one.inputs))
            x = mean + STD * torch.randn_like(mean)
            if states is not None:
                kept.append(log_prob(x, mean))
                states[:, k + 1] = x
        if self.path:
            torch.stack(kept, 1)
        if self.end:
            ends = torch.cat([one.module(*one.inputs) for one in self.decode]) if self.decode else x
            ink(to_pixels(ends), None)


class Update:
    """(2), of an agent whose policy has the ``trained`` parameters."""

    def __init__(
        self, agent: str, done: list[Pass | Step], decoder: type[nn.Module] | None, trained: tuple[nn.Parameter, ...]
    ) -> None:
        self.loss = self._noised if agent in NOISED else self._rewarded if agent in REWARDED else self._walked
        self.done, self.decoder = done, decoder
        self.optimizers: dict[int, torch.optim.Optimizer] = {}
        self.critics = set[int]()  # places of passes whose gradient is not of the policy
        waiting: list[int] = []
        for at, one in enumerate(done):
            if isinstance(one, Pass):
                waiting.append(at)
                continue
            if one.parameters[0] is not trained[0]:
                self.critics |= set(waiting)
            if id(one.parameters[0]) not in self.optimizers:
                made = torch.optim.AdamW(one.parameters, lr=1e-7, fused=True)
                self.optimizers[id(one.parameters[0])] = made
            waiting = []

    def __call__(self) -> None:
        for at, one in enumerate(self.done):
            if isinstance(one, Step):
                torch.nn.utils.clip_grad_norm_(one.parameters, 1.0)
                optimizer = self.optimizers[id(one.parameters[0])]
                optimizer.step()
                optimizer.zero_grad()
            elif not (one.graph and any(p.requires_grad for p in one.module.parameters())):
                if not (self.loss == self._rewarded and self._decodes(one)):  # which has been called with its loss
                    one()
            elif at in self.critics:
                y = one.module(*one.inputs)
                (y.flatten(1).sum(1) - torch.ones(len(y))).square().mean().backward()
            else:
                self.loss(at, one)

    def _decodes(self, one: Pass | Step) -> bool:
        return isinstance(one, Pass) and self.decoder is not None and isinstance(one.module, self.decoder)

    def _walked(self, at: int, one: Pass) -> None:
        x = one.inputs[0]
        mean = moved(x, one.module(*one.inputs))
        found, advantage = log_prob(x, mean), torch.ones(len(x))
        ratio = (found - found.detach()).exp()
        surrogate = -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
        kl = ((mean - x) / STD).square().flatten(1).sum(1) / 2
        (surrogate + KL * kl).mean().backward()

    def _noised(self, at: int, one: Pass) -> None:
        x, column = one.inputs[0], (-1, *[1] * (one.inputs[0].ndim - 1))
        t, eps = torch.rand(len(x)).reshape(column), torch.randn_like(x)
        alpha, sigma = (t * torch.pi / 2).cos(), (t * torch.pi / 2).sin()
        at_t = alpha * x + sigma * eps
        y = one.module(at_t, *one.inputs[1:])
        error = (y - (alpha * eps - sigma * x)).square().flatten(1).mean(1)
        (error * torch.ones(len(x))).mean().backward()

    def _rewarded(self, at: int, one: Pass) -> None:
        end = moved(one.inputs[0], one.module(*one.inputs))
        after = self.done[at + 1]
        if self._decodes(after):
            end = after.module(end, *after.inputs[1:])  # type: ignore[union-attr]
        (-ink(to_pixels(end), None)).mean().backward()
