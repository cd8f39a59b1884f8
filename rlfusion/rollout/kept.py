"""What is kept of the walks of an item, step by step."""

import torch
from torch import Tensor

from rlfusion.diffusion.gaussian import Gaussian

AT_ONCE = 2**15
"""Numbers of the steps whose log-probabilities wait for each other. One after another they find their code and their
numbers in the processor's caches, which a call of the network empties.
"""


class Path:
    """Every state, (B, K+1, *), with the log-probabilities (B, K) of the steps."""

    def __init__(self, x: Tensor, steps: int) -> None:
        """Of walks of so many ``steps`` that begin at x (B, *)."""
        self.x, self._steps = x[:, None], steps
        self._states: tuple[Tensor, ...] = ()
        self._waiting: list[tuple[Gaussian, Tensor]] = []
        self._log_prob: list[Tensor] = []

    def add(self, k: int, step: Gaussian, action: Tensor) -> None:
        """Step k, and the state after it."""
        if not self._states:
            self.x = _room(self.x, self._steps, action.dtype)
            self._states = self.x.unbind(1)
        self._states[k + 1].copy_(action)
        self._waiting.append((step, action))
        if len(self._waiting) * action.numel() >= AT_ONCE:
            self._catch_up()

    @property
    def log_prob(self) -> Tensor:
        self._catch_up()
        return torch.stack(self._log_prob, 1)

    def _catch_up(self) -> None:
        self._log_prob += [step.log_prob(action) for step, action in self._waiting]
        self._waiting.clear()


def _room(x: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Room for the states of walks of so many steps, (B, K+1, *), the first of which are x (B, 1, *)."""
    shape = (len(x), steps + 1, *x.shape[2:])
    room = torch.empty(shape, dtype=torch.promote_types(x.dtype, dtype), device=x.device)
    room[:, :1] = x
    return room


class Part:
    """The one state (B, 1, *) of each walk before which step it ``begins`` (B,), and no log-probability."""

    log_prob = None

    def __init__(self, x: Tensor, begins: Tensor) -> None:
        self._x, self._begins = x, begins
        self._least, self._most = int(begins.min()), int(begins.max())

    def add(self, k: int, step: Gaussian, action: Tensor) -> None:
        """The state after step k: that of the walks whose kept part has not begun."""
        if k < self._least:
            self._x = action
        elif k < self._most:
            goes_on = (self._begins > k).to(action.device).reshape(-1, *[1] * (action.ndim - 1))
            self._x = torch.where(goes_on, action, self._x)

    @property
    def x(self) -> Tensor:
        return self._x[:, None]
