"""AdamW with moments in 8 bits, by blocks (Dettmers et al. 2022), by the library bitsandbytes.

It has the interface of ``adamw.AdamW``. Tensors of fewer than 4096 numbers keep their moments in float32, as the
library has it.
"""

from typing import Any

import torch
from torch import Tensor, nn

from rlfusion.common.errors import ConfigError, StateError
from rlfusion.common.weights import require_entries


def require() -> Any:
    """The library's optimisers.

    Raises:
        ConfigError: it is not installed, or cannot be used here.
    """
    try:
        from bitsandbytes import optim
    except (ImportError, RuntimeError, OSError) as error:
        raise ConfigError(
            f"optimizer = adamw8bit needs the package bitsandbytes, which cannot be used here ({error}): "
            "pip install 'rlfusion[adam8bit]', or expected adamw"
        ) from error
    return optim


class AdamW8bit:
    """Over named parameters; one without a gradient is left as it is, and has no moments until it has one.

    Attributes:
        lr: learning rate; it may be set between steps.
    """

    def __init__(self, named: dict[str, nn.Parameter], lr: float, weight_decay: float = 0.0) -> None:
        """Raises ConfigError without the library."""
        self.named, self.lr, self.weight_decay = named, lr, weight_decay
        self._inner = require().AdamW8bit(list(named.values()), lr=lr, weight_decay=weight_decay)

    def step(self) -> None:
        """One step on the gradients that are there."""
        self._inner.param_groups[0]["lr"] = self.lr
        self._inner.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for p in self.named.values():
            p.grad = None

    def state_dict(self) -> dict:
        held = {name: self._inner.state[p] for name, p in self.named.items() if self._inner.state.get(p)}
        return {"state": {name: _tensors(state) for name, state in held.items()}}

    def load_state_dict(self, state: dict) -> None:
        """Raises StateError where it is of other parameters, or of another optimiser."""
        state = {name: held for name, held in state.items() if name != "lr"}  # as it was saved once
        require_entries(state, self.state_dict(), "the optimiser")
        for name, held in state["state"].items():
            if name not in self.named:
                raise StateError(f"the optimiser has moments of {name!r}, which is not trained here")
            if not isinstance(held, dict) or "state1" not in held:
                raise StateError(f"moments of {name!r} have no 'state1': expected those of 8-bit AdamW")
        self._inner.state.clear()
        for name, held in state["state"].items():
            p = self.named[name]
            moved = {key: value.clone().to(p.device) for key, value in held.items() if key != "step"}
            self._inner.state[p] = {**moved, "step": int(held["step"])}


def _tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    """A parameter's moments, and its number of steps as a tensor."""
    return {key: value if isinstance(value, Tensor) else torch.tensor(float(value)) for key, value in state.items()}
