"""Quality of conditional samples, all of it in the features of one judge: a network that is not the reward's.

Agreement alone is no quality (one Gaussian a class agrees in 99 %): read it with the Frechet distance beside its floor
(training data against held-out data, what a perfect sampler of about as many samples gets), recall and diversity.
"""

from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from rlfusion.common.errors import ConfigError, NumericalError
from rlfusion.data import Dataset, to_pixels
from rlfusion.evaluation.frechet import frechet_distance
from rlfusion.evaluation.images import image_statistics
from rlfusion.evaluation.manifold import class_spread, precision_recall

CHUNK = 1024
SMALLEST = 4


class Judge(Protocol):
    """A classifier of pixels: ``features`` (B, C, H, W) -> (B, F), ``head`` (B, F) -> logits (B, classes)."""

    head: nn.Module

    def features(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Report:
    """The figures of ``report``; a name that ends in ``_real`` is the value of the held-out data.

    Attributes:
        count: number of samples.
        agreement: share of samples that the judge takes for the class that was asked.
        agreement_real: the judge's accuracy.
        frechet: Frechet distance of the samples to the held-out data.
        frechet_floor: the same of the training data.
        precision: share of samples within the manifold of the held-out data (k = 3).
        recall: share of the held-out data within the manifold of the samples.
        diversity: mean distance between two samples of one class, averaged over the classes asked for.
        brightness, edge_density, entropy: means of ``image_statistics``.
    """

    count: int
    agreement: float
    agreement_real: float
    frechet: float
    frechet_floor: float
    precision: float
    recall: float
    diversity: float
    diversity_real: float
    brightness: float
    brightness_real: float
    edge_density: float
    edge_density_real: float
    entropy: float
    entropy_real: float

    @property
    def diversity_relative(self) -> float:
        """diversity / diversity_real."""
        return self.diversity / self.diversity_real

    def as_dict(self) -> dict[str, float]:
        """Every quantity by its name, for a log."""
        return {**asdict(self), "diversity_relative": self.diversity_relative}


def report(samples: Tensor, label: Tensor, judge: Judge, real: Dataset, floor: Dataset) -> Report:
    """Judge ``samples`` (B, C, H, W) in [0, 1], asked to be of ``label`` (B,).

    ``real`` is held-out data, ``floor`` the training data; the judge and its inputs are on one device.

    Raises:
        ConfigError: samples or labels of another shape than the data's, too few of them (4 in all, 2 of a class), or a
            sample outside [0, 1].
        NumericalError: a sample is not finite.
    """
    _require_samples(samples, label, real, SMALLEST)
    held = figures(samples, label, judge, real, floor)
    if "diversity" not in held:
        raise ConfigError("no class has two samples or more: diversity within a class needs two")
    return Report(count=len(samples), **{name: value for name, value in held.items() if name not in DERIVED})


DERIVED = ("count", "diversity_relative")
CARRIED_BY = {
    "frechet": "2 samples",
    "precision": f"{SMALLEST} samples",
    "recall": f"{SMALLEST} samples",
    "diversity": "2 samples of a class",
}
"""What it takes at least to have a figure of ``figures``."""


def figures(samples: Tensor, label: Tensor, judge: Judge, real: Dataset, floor: Dataset) -> dict[str, float]:
    """As ``report``, from one sample on, those that so many samples can carry (``CARRIED_BY``)."""
    _require_samples(samples, label, real, 1)
    pixels = to_pixels(real.x).to(samples.device)
    ours, theirs = features(judge, samples), features(judge, pixels)
    reference = features(judge, to_pixels(floor.x).to(samples.device))
    real_label = real.label.to(samples.device)
    held: dict[str, float] = {"count": len(samples), "agreement": agreement(judge, ours, label)}
    held["agreement_real"] = agreement(judge, theirs, real_label)
    held |= {"frechet": frechet_distance(ours, theirs)} if len(samples) > 1 else {}
    held["frechet_floor"] = frechet_distance(reference, theirs)
    held |= precision_recall(ours, theirs)._asdict() if len(samples) >= SMALLEST else {}
    if spread := _diversity(ours, label, theirs, real_label):
        held |= {"diversity": spread[0], "diversity_real": spread[1], "diversity_relative": spread[0] / spread[1]}
    held |= image_means(samples)
    return held | {f"{name}_real": value for name, value in image_means(pixels).items()}


@torch.no_grad()
def features(judge: Judge, x: Tensor) -> Tensor:
    """Pixels (N, C, H, W) -> (N, F), without gradient, ``CHUNK`` at a time."""
    return torch.cat([judge.features(part) for part in x.split(CHUNK)])


@torch.no_grad()
def agreement(judge: Judge, of_samples: Tensor, label: Tensor) -> float:
    """The share of samples, given by their features (N, F), that the judge takes for ``label`` (N,)."""
    return (judge.head(of_samples).argmax(1) == label).double().mean().item()


def image_means(x: Tensor) -> dict[str, float]:
    """The means of ``image_statistics`` over a batch (B, C, H, W): by name."""
    return {name: value.mean().item() for name, value in image_statistics(x)._asdict().items()}


def require_independent(judge: nn.Module, reward: object) -> None:
    """Refuse a judge that the reward knows.

    Raises:
        ConfigError: ``reward`` is or contains a classifier of the judge's architecture.
    """
    inside = reward.modules() if isinstance(reward, nn.Module) else ()
    for module in inside:
        if type(module) is type(judge) and str(module) == str(judge):
            raise ConfigError(
                "the judge has the architecture of a classifier inside the reward: expected another network"
            )


def _diversity(ours: Tensor, label: Tensor, theirs: Tensor, real_label: Tensor) -> tuple[float, float] | None:
    """Mean spread over the classes that both have; None where there is none of two samples."""
    spread, spread_real = class_spread(ours, label), class_spread(theirs, real_label)
    both = sorted(spread.keys() & spread_real.keys())
    if not both:
        return None
    return sum(spread[c] for c in both) / len(both), sum(spread_real[c] for c in both) / len(both)


def _require_samples(samples: Tensor, label: Tensor, real: Dataset, least: int) -> None:
    if tuple(samples.shape[1:]) != real.shape or label.shape != samples.shape[:1] or len(samples) < least:
        wanted = ("B", *real.shape)
        raise ConfigError(
            f"samples {tuple(samples.shape)}, labels {tuple(label.shape)}: "
            f"expected ({', '.join(map(str, wanted))}), (B,), B >= {least}"
        )
    bad = (~samples.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise NumericalError(f"{len(bad)} of {len(samples)} samples are not finite, the first is item {bad[0]}")
    if not 0 <= float(samples.min()) <= float(samples.max()) <= 1:
        raise ConfigError(f"samples in {samples.min():g}..{samples.max():g}: expected pixels in [0, 1]")
