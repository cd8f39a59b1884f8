"""Distances of consistency training and distillation, d(x, y) of two batches (B, ...), one value a sample, (B,).

(1)  L2:           |x - y|^2 / d, the mean over the d features           (Song et al. 2023; handbook 2.3.1)
(2)  PseudoHuber:  sqrt(|x - y|^2 + c^2 d) - c sqrt(d), with the sum over features in |.|^2; the paper's constant
     is c sqrt(d) = 0.00054 sqrt(d)                                      (Song & Dhariwal 2023, Eq. 8)
(3)  LPIPS:        sum_l mean_hw w_l . (phi_l(x) - phi_l(y))^2, phi_l unit vectors over the channels of layer l
     (Zhang et al. 2018, Eq. 1), by the authors' own package ``lpips``
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from rlfusion.common.errors import ConfigError, require_positive, unknown
from rlfusion.common.tensors import mean_features, sum_features
from rlfusion.diffusion.space import Pixels, Space

BACKBONES: Mapping[str, str] = {
    "vgg": "vgg16-397923af.pth",
    "alex": "alexnet-owt-7be5be79.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}
"""The backbones of LPIPS, and torchvision's files of their ImageNet weights."""


class Metric(Protocol):
    """A frozen dataclass: d(x, y) of two (B, ...) tensors, (B,), differentiable in both."""

    def __call__(self, x: Tensor, y: Tensor) -> Tensor: ...

    def check(self, space: Space) -> None:
        """Raises ConfigError where something that the distance needs is missing, or it has no meaning in ``space``."""


@dataclass(frozen=True)
class L2:
    """Eq. (1)."""

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return mean_features((x - y).square())

    def check(self, space: Space) -> None:
        return


@dataclass(frozen=True)
class PseudoHuber:
    """Eq. (2). Its gradient has norm below 1: samples with a large error do not outweigh the others."""

    c: float = 0.00054

    def __post_init__(self) -> None:
        require_positive(self, "c")

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        offset = self.c * x[0].numel() ** 0.5
        return (sum_features((x - y).square()) + offset**2).sqrt() - offset

    def check(self, space: Space) -> None:
        return


@dataclass(frozen=True)
class LPIPS:
    """Eq. (3), on images (B, 1 or 3, H, W) in [-1, 1]. Needs the package ``lpips`` (extra ``rlfusion[lpips]``).

    Attributes:
        net: backbone, "vgg", "alex" or "squeeze".
        weights: its ImageNet weights, torchvision's file of ``BACKBONES``; empty for the one in torch.hub's folder.
        size: images whose shorter side is smaller are first brought to this size, bilinearly (Song et al.: 224).
    """

    net: str = "vgg"
    weights: str = ""
    size: int = 224

    def __post_init__(self) -> None:
        if self.net not in BACKBONES:
            raise unknown("LPIPS backbone", self.net, BACKBONES)
        if self.size < 64:
            raise ConfigError(f"size = {self.size}: expected at least 64, for the five layers of the backbone")

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return _perceptual(self.net, self._file).to(x.device)(self.fit(x), self.fit(y)).flatten()

    def check(self, space: Space) -> None:
        """Load the backbone.

        Raises:
            ConfigError: latents, no package, no file of weights (it says which one to provide), or a wrong file.
        """
        if not isinstance(space, Pixels):
            raise ConfigError("metric = LPIPS compares pixels: expected L2() or PseudoHuber() for a model in latents")
        _perceptual(self.net, self._file)

    def fit(self, x: Tensor) -> Tensor:
        """``x`` as the RGB image of sufficient size that the backbone sees.

        Raises:
            ConfigError: not images of 1 or 3 channels.
        """
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise ConfigError(f"LPIPS compares images of 1 or 3 channels: got samples of shape {tuple(x.shape[1:])}")
        x = x.expand(-1, 3, -1, -1)
        short = min(x.shape[2:])
        if short >= self.size:
            return x
        grown = [round(side * self.size / short) for side in x.shape[2:]]
        return nn.functional.interpolate(x, size=grown, mode="bilinear", align_corners=False)

    @property
    def _file(self) -> str:
        return self.weights or str(Path(torch.hub.get_dir()) / "checkpoints" / BACKBONES[self.net])


@lru_cache(maxsize=4)
def _perceptual(net: str, file: str) -> nn.Module:
    """The distance of the ``lpips`` package, frozen, with the backbone's weights from ``file``."""
    if not Path(file).is_file():
        raise ConfigError(
            f"LPIPS(net={net!r}) needs {file!r}: expected torchvision's ImageNet weights {BACKBONES[net]} there "
            f"(from https://download.pytorch.org/models/{BACKBONES[net]}), or their path as LPIPS(weights=...)"
        )
    try:
        import lpips
    except ImportError as error:
        raise ConfigError("the metric LPIPS needs the package lpips: pip install 'rlfusion[lpips]'") from error
    with torch.random.fork_rng(devices=[]):  # the random weights that it begins with touch no other draw
        model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)  # the linear heads come with the package
    _load_backbone(model.net, file)
    return model.eval().requires_grad_(False)


def _load_backbone(backbone: nn.Module, file: str) -> None:
    """torchvision's "features.3.weight" into lpips' "slice2.3.weight"."""
    try:
        held = torch.load(file, map_location="cpu", weights_only=True)  # tensors alone: no code is run
        theirs = {name: held["features." + name.partition(".")[2]] for name in backbone.state_dict()}
        backbone.load_state_dict(theirs)
    except Exception as error:  # whatever a wrong file brings about is one refusal
        raise ConfigError(f"{file!r} does not hold the weights of this backbone: {error}") from error


METRICS: Mapping[str, Callable[..., Metric]] = {cls.__name__: cls for cls in (L2, PseudoHuber, LPIPS)}
