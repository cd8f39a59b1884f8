"""What the scorers of kits share: packages that may be missing, calls by names of parameters, pictures as PIL's."""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rlfusion.common.errors import ConfigError
from rlfusion.rewards.adapters import converted, signature_of


def package(name: str, kit: str) -> Any:
    """A module of a kit's package.

    Raises:
        ConfigError: it is not installed here.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"the kit {kit!r} needs {name} ({error}): expected rlfusion rewards install {kit}, and rlfusion rewards "
            f"serve {kit}"
        ) from error


def by_name(kit: str, function: Callable[..., Any], given: Mapping[tuple[str, ...], Any]) -> Any:
    """What a function answers, each value given to the one parameter that has one of its names, wherever it stands.

    Raises:
        ConfigError: a value has no parameter, or two, or a parameter without a default has no value.
    """
    parameters = signature_of(kit, function).parameters
    told: dict[str, Any] = {}
    for names, value in given.items():
        found = [name for name in names if name in parameters]
        if len(found) != 1:
            said = f"{' and '.join(found)} beside each other" if found else f"none of {', '.join(names)}"
            raise ConfigError(
                f"the kit {kit!r}: {_name(function)}({', '.join(parameters)}) has {said}: expected the version of "
                f"{kit}/requirements.txt"
            )
        told[found[0]] = value
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    open_ = [n for n, p in parameters.items() if n not in told and p.default is p.empty and p.kind not in kinds]
    if open_:
        raise ConfigError(
            f"the kit {kit!r}: {_name(function)}({', '.join(parameters)}) wants {', '.join(open_)} as well: expected "
            f"the version of {kit}/requirements.txt"
        )
    return function(**told)


def _name(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__name__))


def pictures(samples: Tensor, kit: str) -> list[Any]:
    """Samples (B, C, H, W) in [0, 1] as RGB images of PIL."""
    return converted(samples, "pil", kit)


def texts(prompts: Sequence[str], cond: Tensor) -> list[str]:
    """The prompt of each sample."""
    return [prompts[i] for i in cond.tolist()]


def written(images: Sequence[Any], folder: Path) -> list[str]:
    """The paths of PNG files that hold images of PIL."""
    paths = [str(folder / f"{number}.png") for number in range(len(images))]
    for image, path in zip(images, paths):
        image.save(path)
    return paths
