"""An optimiser as a setting names it, and the making of it."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from rlfusion.common import shards
from rlfusion.common.errors import ConfigError, RlfusionError, shorten
from rlfusion.common.user_code import running

FUSED = ("cuda",)
"""Devices where AdamW is fused unless told otherwise. On a CPU it takes the parameters as lists (foreach), which gives
the bits of the plain step in half of its time where tensors are small, and small ones as one (``packed``).
``adamw(fused=True)`` takes a third to a sixth and is no less exact, but rounds otherwise: runs made before would not
repeat to the bit."""
LISTED = 2**24
"""Elements up to which that is so: the lists' scratch is as large as the parameters, and large tensors gain nothing."""

_UNUSABLE = (TypeError, ValueError, RuntimeError, ArithmeticError, AttributeError, LookupError)


@dataclass(frozen=True)
class Recipe:
    """An optimiser as a setting names it.

    Attributes:
        name: as it was given, without its arguments.
        kind: the class.
        settings: its arguments.
        foreign: it is neither torch's nor one of the table: its code is the user's.
    """

    name: str
    kind: type[torch.optim.Optimizer]
    settings: Mapping[str, Any]
    foreign: bool = False

    def build(self, parameters: Sequence[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """The optimiser of ``parameters``.

        Raises:
            ConfigError: the class refuses an argument or a parameter, or has no weight decay where one is asked for.
        """
        arguments = {**self.settings, "lr": lr}
        if "weight_decay" in inspect.signature(self.kind).parameters:
            arguments["weight_decay"] = weight_decay
        elif weight_decay:
            raise ConfigError(f"weight_decay = {weight_decay:g}: optimizer {self.name!r} has none, expected 0")
        if self._chooses:
            arguments["fused"] = all(p.device.type in FUSED for p in parameters)
            arguments["foreach"] = self.listed(parameters) or None
        with self.refusing(f"with {shorten(arguments)}"):
            kind = without_compiler(self.kind)  # type: ignore[arg-type]  # mypy reads the __hash__ of its instances
            return kind(parameters, **arguments)

    @property
    def _chooses(self) -> bool:
        """Whether the way of the step is chosen here: AdamW's, where its settings do not say."""
        return self.kind is torch.optim.AdamW and not {"fused", "foreach"} & self.settings.keys()

    def listed(self, parameters: Sequence[Tensor]) -> bool:
        """Whether it takes these parameters as lists."""
        return self._chooses and as_lists(parameters)

    def running(self) -> AbstractContextManager[None]:
        """Within the context the optimiser's own code runs; what a user's raises is said to be theirs."""
        return running(f"optimizer {self.name!r}") if self.foreign else nullcontext()

    def stepped(self, p: Tensor, lr: float = 1e-3, weight_decay: float = 0.0) -> torch.optim.Optimizer:
        """An optimiser of one parameter like ``p``, after a step on a gradient of 0: its state is of the form of
        ``p``'s.
        """
        twin = nn.Parameter(p.detach().clone())
        twin.grad = torch.zeros_like(twin)
        optimizer = self.build([twin], lr, weight_decay)
        with self.running():
            optimizer.step()
        return optimizer

    @contextmanager
    def refusing(self, how: str) -> Iterator[None]:
        """Within the context what it cannot do is one line; ``how`` says what was asked.

        Raises:
            ConfigError, UserCodeError: it raised.
        """
        try:
            with self.running():
                yield
        except RlfusionError:
            raise
        except _UNUSABLE as error:
            said = shorten(" ".join(str(error).split()) or type(error).__name__, 160)
            raise ConfigError(f"optimizer {self.name!r} cannot be used {how}: {said}") from error


def as_lists(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors are taken as lists on a CPU (``LISTED``); elsewhere torch itself knows when to."""
    plain = all(t.device.type == "cpu" and not shards.is_split(t) for t in tensors)
    return plain and sum(t.numel() for t in tensors) <= LISTED


def of_torch(kind: type) -> bool:
    """Whether a class is torch's own."""
    return f"{kind.__module__}.".startswith("torch.optim.")


@lru_cache
def without_compiler(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """A class of torch with its methods bare of the wrappers by which torch.compile sees them: those import the
    compiler, torch._dynamo, on the first call, which takes seconds of every command and changes nothing in a step.
    """
    if not of_torch(kind):
        return kind
    bare = {name: inspect.unwrap(getattr(kind, name)) for name in ("step", "zero_grad", "add_param_group")}
    bare["step"] = torch.no_grad()(bare["step"])
    return type(kind.__name__, (kind,), bare)
