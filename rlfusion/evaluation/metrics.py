"""Figures of samples by name, beside those of every report: ``evaluation.metrics``.

A metric is a function (samples (N, C, H, W) in [0, 1], label (N,)) -> one number a sample (N,), of which the mean is
told, or one number of all; further parameters of it are its settings. Or a class, made with its settings, whose objects
are called so.

    (1)  contrast   = std of a sample's pixels
    (2)  saturation = share of its values at 0 or 1
    (3)  sharpness  = mean of |4 x_ij - x_i+1,j - x_i-1,j - x_i,j+1 - x_i,j-1| over its inner pixels
"""

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from rlfusion.common import spec
from rlfusion.common.code_files import label
from rlfusion.common.errors import ConfigError, NumericalError, unknown
from rlfusion.common.registry import Registry
from rlfusion.common.user_code import running

Metric = Callable[[Tensor, Tensor], Any]

METRICS = Registry(
    "metric",
    "rlfusion.metrics",
    {name: f"rlfusion.evaluation.metrics:{name}" for name in ("contrast", "saturation", "sharpness")},
)


def contrast(samples: Tensor, label: Tensor) -> Tensor:
    """Standard deviation of a sample's pixels."""
    return samples.flatten(1).std(1, correction=0)


def saturation(samples: Tensor, label: Tensor, margin: float = 0.0) -> Tensor:
    """Share of a sample's values within ``margin`` of 0 or 1."""
    return ((samples <= margin) | (samples >= 1 - margin)).flatten(1).float().mean(1)


def sharpness(samples: Tensor, label: Tensor) -> Tensor:
    """Mean size of the Laplacian over a sample's inner pixels."""
    x = samples
    around = x[..., 2:, 1:-1] + x[..., :-2, 1:-1] + x[..., 1:-1, 2:] + x[..., 1:-1, :-2]
    return (4 * x[..., 1:-1, 1:-1] - around).abs().flatten(1).mean(1)


def make_metric(text: str) -> Metric:
    """The metric that a text writes.

    Raises:
        ConfigError: no such metric or setting.
    """
    name, settings = spec.split(text)
    found = METRICS.find(name)
    if not inspect.isfunction(found.object):
        return spec.make(METRICS, found, settings)
    parameters = dict(list(spec.signature_of(found.object).parameters.items())[2:])
    for key in settings:
        if key not in parameters:
            raise unknown(f"setting of metric {name!r}", key, parameters)
    spec.require_fit(parameters, settings, f"metric {name!r}")
    return partial(found.object, **settings)


def require_metrics(texts: Sequence[str]) -> None:
    """
    Raises:
        ConfigError: a text is no metric, or two have one name.
    """
    for text in texts:
        if not callable(make_metric(text)):
            raise ConfigError(f"metric {text!r} is not callable: expected (samples, label) -> (N,)")
    names = [label(text) for text in texts]
    if len(set(names)) < len(names):
        raise ConfigError(f"metrics = {list(texts)}: expected each name once")


def measured(texts: Sequence[str], samples: Tensor, label_: Tensor) -> dict[str, float]:
    """What these metrics say of samples, by their names.

    Raises:
        NumericalError: a value is not finite.
        UserCodeError: a stranger's metric raises.
    """
    return {label(text): _value(text, make_metric(text), samples, label_) for text in texts}


def _value(text: str, metric: Metric, samples: Tensor, label: Tensor) -> float:
    with running(f"metric {text!r}"):
        found = metric(samples, label)
        if isinstance(found, Tensor) and found.shape not in ((), samples.shape[:1]):
            raise ConfigError(f"metric {text!r} gives {tuple(found.shape)}: expected {tuple(samples.shape[:1])} or ()")
        value = float(found.double().mean() if isinstance(found, Tensor) else found)
    if not math.isfinite(value):
        raise NumericalError(f"metric {text!r} is {value}: expected a finite number")
    return value
