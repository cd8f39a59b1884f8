"""AdamW (Loshchilov & Hutter 2019) by torch's own functional step.

``torch.optim.AdamW`` imports torch._dynamo when it is made, which takes seconds of every command. The function below it
does not, and gives the same bits; this file holds its moments.
"""

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from rlfusion.common.errors import StateError
from rlfusion.common.weights import require_entries

BETAS, EPS = (0.9, 0.999), 1e-8


class AdamW:
    """Over named parameters; one without a gradient is left as it is, and has no moments until it has one.

    Attributes:
        lr: learning rate; it may be set between steps.
    """

    def __init__(self, named: dict[str, nn.Parameter], lr: float, weight_decay: float = 0.0) -> None:
        self.named, self.lr, self.weight_decay = named, lr, weight_decay
        self.state: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self) -> None:
        """One step on the gradients that are there."""
        moved = {name: p for name, p in self.named.items() if p.grad is not None}
        for name, p in moved.items():
            if name not in self.state:
                zeros = {moment: torch.zeros_like(p) for moment in ("exp_avg", "exp_avg_sq")}
                self.state[name] = {"step": torch.tensor(0.0), **zeros}
        held = [self.state[name] for name in moved]
        adamw(
            list(moved.values()),
            [p.grad for p in moved.values() if p.grad is not None],
            [s["exp_avg"] for s in held],
            [s["exp_avg_sq"] for s in held],
            [],
            [s["step"] for s in held],
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=self.lr,
            weight_decay=self.weight_decay,
            eps=EPS,
            maximize=False,
        )

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for p in self.named.values():
            p.grad = None

    def state_dict(self) -> dict:
        """The moments. The learning rate is a setting (or set before each step), and is not kept: one that is changed
        between stop and resume holds.
        """
        return {"state": self.state}

    def load_state_dict(self, state: dict) -> None:
        """Raises StateError where it is of other parameters."""
        state = {name: held for name, held in state.items() if name != "lr"}  # as it was saved once
        require_entries(state, self.state_dict(), "the optimiser")
        for name, held in state["state"].items():
            if (p := self.named.get(name)) is None:
                raise StateError(f"the optimiser has moments of {name!r}, which is not trained here")
            require_entries(held, {"step": torch.tensor(0.0), "exp_avg": p, "exp_avg_sq": p}, f"moments of {name!r}")
        self.state = {
            name: {key: value.to(self.named[name].device) if key != "step" else value for key, value in held.items()}
            for name, held in state["state"].items()
        }
