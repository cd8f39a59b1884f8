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
"""Devices where AdamW is fused for every parameter, unless its settings say otherwise."""
WIDE = 64
"""On a CPU it is fused where the rows of a parameter, its entries along the first dimension, are whole lines of so many
bytes. What lies behind the last whole line is rounded otherwise there; so an element's step depends neither on where it
lies nor on which ranks hold which rows. The others are taken as lists (foreach), the small ones as one (``packed``)."""
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
        groups = _ways(parameters) if self.chooses and parameters else parameters
        with self.refusing(f"with {shorten(arguments)}"):
            kind = without_compiler(self.kind)  # type: ignore[arg-type]  # mypy reads the __hash__ of its instances
            return kind(groups, **arguments)

    @property
    def chooses(self) -> bool:
        """Whether the way of the step is chosen here: AdamW's, where its settings do not say. It has two groups then:
        what is fused everywhere, and the rest.
        """
        return self.kind is torch.optim.AdamW and not {"fused", "foreach"} & self.settings.keys()

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


def _ways(parameters: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    """The two groups of an AdamW whose way is chosen here."""
    wide = [p for p in parameters if is_wide(p)]
    rest = [p for p in parameters if not is_wide(p)]
    fused = all(p.device.type in FUSED for p in rest)
    listed = not fused and as_lists(rest)
    return [{"params": wide, "fused": True}, {"params": rest, "fused": fused, "foreach": listed or None}]


def is_wide(p: Tensor) -> bool:
    """Whether the rows of a parameter are whole lines (``WIDE``), of numbers that the fused step takes."""
    plain = p.device.type in ("cpu", "cuda") and p.is_floating_point() and p.is_contiguous() and p.ndim > 1
    return plain and p.numel() > 0 and p.numel() // len(p) * p.element_size() % WIDE == 0


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
