"""Samples beside a folder of real images, in the features of a network that the user names; and diversity in one."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from rlfusion import config
from rlfusion.common import spec
from rlfusion.common.code_files import label as short
from rlfusion.common.errors import ConfigError
from rlfusion.common.tensors import grey, to_pixels
from rlfusion.data import load
from rlfusion.diffusion.space import Pixels
from rlfusion.evaluation import class_spread, frechet_distance, precision_recall
from rlfusion.evaluation.extractors import AT_ONCE, Extractor, extracted, make_extractor
from rlfusion.evaluation.kernel_distance import kernel_distance
from rlfusion.evaluation.report import SMALLEST
from rlfusion.pretrain.metrics import LPIPS

PERCEPTUAL = "LPIPS"
FEWEST = {"fid": 2, "kid": 2, "real_precision": SMALLEST, "real_recall": SMALLEST}
"""Samples that a figure takes, and real images."""


@dataclass(frozen=True)
class Beside:
    """What samples are held against.

    Attributes:
        features: the text of the extractor; "" for no real images.
        extractor: the network.
        real: features (M, F) of the real images.
        spread: the text of ``diversity``; "" for none.
        distance: (samples, label) -> {class: mean distance of two of its samples}.
    """

    features: str = ""
    extractor: Extractor | None = None
    real: Tensor | None = None
    spread: str = ""
    distance: Callable[[Tensor, Tensor], dict[int, float]] | None = None

    def figures(self, samples: Tensor, label: Tensor) -> tuple[dict[str, float], dict[str, str]]:
        """Figures by name, and those that so many samples cannot carry, with what would."""
        values: dict[str, float] = {}
        left_out: dict[str, str] = {}
        if self.real is not None and self.extractor is not None:
            ours, theirs = extracted(self.features, self.extractor, samples), self.real.to(samples.device)
            few = min(len(ours), len(theirs))
            values["real_count"] = len(theirs)
            if few >= FEWEST["fid"]:
                values |= {"fid": frechet_distance(ours, theirs), "kid": kernel_distance(ours, theirs)}
            if few >= SMALLEST:
                found = precision_recall(ours, theirs)
                values |= {"real_precision": found.precision, "real_recall": found.recall}
            left_out = {n: f"{k} samples, {k} real images" for n, k in FEWEST.items() if n not in values}
        if self.distance is not None:
            name, found = f"diversity_{short(self.spread).lower()}", self.distance(samples, label)
            values |= {name: sum(found.values()) / len(found)} if found else {}
            left_out |= {} if found else {name: "2 samples of a prompt"}
        return values, left_out


def beside_of(settings: config.Evaluate, shape: tuple[int, ...], say: Callable[[str], None]) -> Beside:
    """What the settings name.

    Raises:
        ConfigError: an extractor or its weights that are not there; real images of other channels.
    """
    held = Beside()
    if settings.real:
        extractor = make_extractor(settings.features)
        x = grey(load(settings.real, shape[-1], say).x, shape[0])
        if x.shape[1:] != shape:
            expected = "grey images" if shape[0] == 1 else f"images of {shape[0]} channels"
            raise ConfigError(
                f"real = {settings.real!r}: its images are {tuple(x.shape[1:])}, the model's samples {shape}: "
                f"expected {expected}"
            )
        real = extracted(settings.features, extractor, to_pixels(x))
        held = Beside(settings.features, extractor, real)
    if not settings.diversity:
        return held
    distance = _perceptual(settings.diversity) or _in_features(settings.diversity)
    return Beside(held.features, held.extractor, held.real, settings.diversity, distance)


def _in_features(text: str) -> Callable[[Tensor, Tensor], dict[int, float]]:
    extractor = make_extractor(text)
    return lambda samples, label: class_spread(extracted(text, extractor, samples), label)


def _perceptual(text: str) -> Callable[[Tensor, Tensor], dict[int, float]] | None:
    """The mean LPIPS of two samples of a prompt; None where the text names something else."""
    name, settings = spec.split(text)
    if name.lower() != PERCEPTUAL.lower():
        return None
    metric = spec.call(LPIPS, settings, f"diversity {name!r}")
    metric.check(Pixels())

    @torch.no_grad()
    def spread(samples: Tensor, label: Tensor) -> dict[int, float]:
        found = {}
        for one in label.unique().tolist():
            members = samples[label == one] * 2 - 1
            pairs = torch.tensor(list(combinations(range(len(members)), 2)))
            if len(pairs):
                parts = [metric(members[p[:, 0]], members[p[:, 1]]) for p in pairs.split(AT_ONCE)]
                found[one] = torch.cat(parts).double().mean().item()
        return found

    return spread
