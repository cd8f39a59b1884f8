"""From pixels in [0, 1] to what a CLIP image tower reads, in torch, so that gradients reach the pixels.

    (1)  resize   bicubic (a = -1/2) or bilinear, antialiased; first along the width, then along the height, each
                  followed by a clamp to [0, 1], as PIL does
    (2)  to size  shortest: the shorter side fits, the middle is cut out;  longest: the longer side fits, borders are
                  filled;  squash: both sides fit, whatever becomes of the aspect
    (3)  (x - mean) / std,  grey images having three equal channels

PIL keeps 8 bits between the passes and after them: so on 8-bit images Eq. (1) and (2) agree with open_clip's own
transform to 2 / 255 (nine pixels in ten to 1.1 / 255). Pillow 13 begins with the height where that shrinks more; it
then differs from its predecessors, and from us, in pixels that the first clamp changed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

from torch import Tensor
from torch.nn import functional as F

from rlfusion.common.errors import ConfigError

INTERPOLATIONS, RESIZES = ("bicubic", "bilinear"), ("shortest", "longest", "squash")


@dataclass(frozen=True)
class Preprocess:
    """The preprocessing of one image tower, as open_clip describes it (``preprocess_cfg``).

    Attributes:
        size: (height, width) of what the tower reads.
        mean, std: of each of the three channels.
        interpolation: "bicubic" or "bilinear".
        resize_mode: "shortest", "longest" or "squash".
        fill_color: grey level in 0..255 of the borders of "longest".
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0

    def __post_init__(self) -> None:
        for name, known in (("interpolation", INTERPOLATIONS), ("resize_mode", RESIZES)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} = {getattr(self, name)!r}: expected one of {', '.join(known)}")

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> Self:
        """From open_clip's description; other keys are ignored."""
        held = {f.name: described[f.name] for f in fields(cls) if described.get(f.name) is not None}
        held["size"] = _pair(held["size"])
        held |= {name: _three(held[name]) for name in ("mean", "std")}
        if held.get("interpolation") == "random":  # of training; open_clip then evaluates with
            held["interpolation"] = "bicubic"
        return cls(**held)

    def __call__(self, x: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1], C in {1, 3} -> (B, 3, *size), differentiable.

        Raises:
            ConfigError: another number of channels.
        """
        if x.shape[1] not in (1, 3):
            raise ConfigError(f"{x.shape[1]} channels: a CLIP image tower reads 1 (grey) or 3 (RGB)")
        x = self._fit(resized(x, self.target(*x.shape[2:]), self._mode(x)))
        mean, std = (x.new_tensor(v).reshape(1, 3, 1, 1) for v in (self.mean, self.std))
        return (x.expand(-1, 3, -1, -1) - mean) / std

    def target(self, height: int, width: int) -> tuple[int, int]:
        """The size to which Eq. (2) first brings an image."""
        if self.resize_mode == "squash":
            return self.size
        if self.resize_mode == "shortest" and self.size[0] == self.size[1]:
            short, long = self.size[0], int(self.size[0] * max(height, width) / min(height, width))
            return (long, short) if width <= height else (short, long)
        ratios = height / self.size[0], width / self.size[1]
        ratio = max(ratios) if self.resize_mode == "longest" else min(ratios)
        return round(height / ratio), round(width / ratio)

    def _mode(self, x: Tensor) -> str:
        square = self.size[0] == self.size[1]
        return self.interpolation if square or self.resize_mode != "shortest" else "bicubic"  # as open_clip does

    def _fit(self, x: Tensor) -> Tensor:
        """Fill borders up to ``size``, then cut the middle out."""
        missing = [max(0, want - have) for want, have in zip(self.size, x.shape[2:])]
        if any(missing):
            h, w = missing
            x = F.pad(x, (w // 2, w - w // 2, h // 2, h - h // 2), value=self.fill_color / 255)
        top, left = (round((have - want) / 2) for have, want in zip(x.shape[2:], self.size))
        return x[:, :, top : top + self.size[0], left : left + self.size[1]]


def resized(x: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Eq. (1): (B, C, H, W) -> (B, C, *size)."""
    for part in ((x.shape[2], size[1]), size):
        if tuple(x.shape[2:]) != part:
            x = F.interpolate(x, part, mode=mode, antialias=True, align_corners=False).clamp(0, 1)
    return x


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[-1]))


def _three(value: float | Sequence[float]) -> tuple[float, ...]:
    return (value,) * 3 if isinstance(value, int | float) else tuple(value)
