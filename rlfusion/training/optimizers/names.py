"""From a name and its arguments to an optimiser that can be used."""

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SparseAdam

from rlfusion.common import nested, spec
from rlfusion.common.code_files import absolute
from rlfusion.common.errors import ConfigError, unknown
from rlfusion.common.registry import Registry
from rlfusion.training.optimizers.named import NamedOptimizer
from rlfusion.training.optimizers.recipe import Recipe, of_torch

OPTIMIZERS = Registry(
    "optimizer",
    "rlfusion.optimizers",
    {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD, "adamw8bit": f"{__package__}.eight_bits:AdamW8bit"},
)
ELEMENTWISE: tuple[type[torch.optim.Optimizer], ...] = (
    torch.optim.AdamW,
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
)
"""Those whose step of an element depends on that element's gradients alone."""
_BESIDE = "it is a setting of its own, beside the optimizer"
_REFUSED = {
    "params": "the parameters are those that are trained",
    "lr": _BESIDE,
    "weight_decay": _BESIDE,
    "maximize": "a loss is minimised",
    "differentiable": "no gradient passes through a step",
    "capturable": "no step is captured in a CUDA graph",
}


def parse(text: str) -> Recipe:
    """The optimiser that ``text`` names, tried on a parameter of its own.

    Raises:
        ConfigError: nothing has that name; it is no ``torch.optim.Optimizer``, or one that needs a closure or sparse
            gradients; an argument that it does not have, or refuses; its state cannot be saved.
        UserCodeError: it is the user's own, and raised.
    """
    name, settings = spec.split(text)
    found = OPTIMIZERS.find(name)
    kind, what = found.object, f"optimizer {name!r}"
    if not (inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)):
        said = kind.__name__ if inspect.isclass(kind) else type(kind).__name__
        raise ConfigError(f"{what} is {said}: expected a class of torch.optim.Optimizer, such as torch.optim:NAdam")
    _require_plain_step(kind, what)
    parameters = spec.signature_of(kind).parameters
    _require_settings(parameters, settings, what)
    recipe = Recipe(name, kind, settings, not (found.ours or of_torch(kind)))
    _try(recipe)
    return recipe


def require_elementwise(text: str) -> None:
    """Refuse an optimiser that does not step each element of a parameter by itself: of what is split over ranks, each
    has some rows alone.

    Raises:
        ConfigError: says which do.
    """
    recipe = parse(text)
    if recipe.kind not in ELEMENTWISE:
        known = ", ".join(["adamw", "sgd", *(f"torch.optim:{kind.__name__}" for kind in ELEMENTWISE[2:])])
        raise ConfigError(
            f"optimizer {recipe.name!r} with learner.shard = fsdp: it may look at whole parameters, of which a rank "
            f"has some rows alone; expected one of {known}"
        )


def settle(settings: Any) -> None:
    """Check the field ``optimizer`` of a frozen dataclass, and write a file in it with its path from the root.

    Raises:
        ConfigError, UserCodeError: as ``parse``.
    """
    parse(settings.optimizer)
    object.__setattr__(settings, "optimizer", absolute(settings.optimizer))


def _require_plain_step(kind: type[torch.optim.Optimizer], what: str) -> None:
    """A step is made on dense gradients that are there, without a closure that makes them again."""
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ConfigError(f"{what}: its step needs a closure that makes gradients again, expected one without")
    if issubclass(kind, SparseAdam):
        raise ConfigError(f"{what} takes sparse gradients alone, expected one of dense gradients: adamw, sgd")


def _require_settings(parameters: Mapping[str, inspect.Parameter], settings: Mapping[str, Any], what: str) -> None:
    if "lr" not in parameters:
        raise ConfigError(f"{what} has no argument 'lr', expected one that has")
    for key in settings:
        if key in _REFUSED and key in parameters:
            raise ConfigError(f"{what}: {key} = {settings[key]!r} cannot be set here ({_REFUSED[key]})")
        if key not in parameters:
            known = [name for name in parameters if name not in _REFUSED]
            raise unknown(f"setting of {what}", key, known) if known else ConfigError(f"{what} has no {key!r}")
    spec.require_fit(parameters, settings, what)


def _try(recipe: Recipe) -> None:
    """Made, of torch and of the table; a stranger's makes a step, is saved and loaded, and makes the same next step."""
    if not recipe.foreign:
        _Trial(recipe, "cpu")
        return
    with torch.random.fork_rng(), recipe.refusing("here"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        first = _Trial(recipe, device)
        first.step(1)
        record = copy.deepcopy(first.optimizer.state_dict())
        tensors: dict[str, Tensor] = {}
        try:
            nested.flatten(record, "its state", tensors)
        except TypeError as error:
            raise ConfigError(f"optimizer {recipe.name!r}: its state cannot be saved: {error}") from error
        second = _Trial(recipe, device)
        second.parameter.data.copy_(first.parameter)
        second.optimizer.load_state_dict(record)
        first.step(2)
        second.step(2)
    if not torch.equal(first.parameter, second.parameter):
        raise ConfigError(
            f"optimizer {recipe.name!r} does not go on as before from its 'state' and 'param_groups': "
            "expected one that holds there all that it needs, and draws no random numbers"
        )


class _Trial:
    """A parameter and its optimiser."""

    def __init__(self, recipe: Recipe, device: str) -> None:
        self.parameter = nn.Parameter(torch.tensor([[1.0, -2.0], [0.5, 3.0]], device=device))
        self.optimizer = NamedOptimizer(recipe, {"p": self.parameter}, 1e-2)

    def step(self, slope: float) -> None:
        self.parameter.grad = slope * self.parameter.detach().cos()
        self.optimizer.step()
