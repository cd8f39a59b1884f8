"""File size as a reward (Black et al. 2023, section 6.1): incompressibility = kB of the JPEG, compressibility = -kB.

    kB(x) = bytes of JPEG(round(255 upscale(x))) / 1000,  quality 95, as in the authors' ddpo-pytorch

Images are first upscaled (bilinear) by a whole factor ``scale``. By default that is the least which brings the shorter
side to 64 pixels: 8 for 8x8 digits, whose file would else be mostly header, and 1 for the paper's 512x512. One channel
is written as a grey JPEG, three as RGB with the encoder's own chroma subsampling. The size is a whole number of bytes:
no gradient passes, and the result has none.
"""

import io
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rlfusion.common.errors import ConfigError
from rlfusion.common.tensors import Cond

MODES = {1: "L", 3: "RGB"}
SIDE = 64


@torch.no_grad()
def kilobytes(samples: Tensor, quality: int, scale: int | None) -> Tensor:
    """(B, C, H, W) in [0, 1], C in {1, 3} -> (B,) float32: JPEG sizes in units of 1000 bytes.

    Raises:
        ConfigError: another number of channels.
    """
    if samples.shape[1] not in MODES:
        raise ConfigError(f"{samples.shape[1]} channels: a JPEG has 1 (grey) or 3 (RGB)")
    scale = scale or max(1, -(-SIDE // min(samples.shape[2:])))
    x = samples.detach().float().cpu()
    if scale > 1:
        x = F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
    pixels = (x * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return torch.tensor(_sizes(pixels.numpy(), quality), dtype=torch.float32, device=samples.device) / 1000


def _sizes(pixels: np.ndarray, quality: int) -> list[int]:
    """Bytes of each image of (B, H, W, C) uint8; one buffer serves all."""
    from PIL import Image

    buffer, sizes = io.BytesIO(), []
    for image in pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels:
        buffer.seek(0)
        Image.fromarray(np.ascontiguousarray(image)).save(buffer, format="JPEG", quality=quality)
        sizes.append(buffer.tell())
    return sizes


def _require_settings(quality: int, scale: int | None) -> None:
    if not (isinstance(quality, int) and 1 <= quality <= 100):
        raise ConfigError(f"quality = {quality!r}: expected a whole number in 1..100")
    if not (scale is None or (isinstance(scale, int) and scale >= 1)):
        raise ConfigError(f"scale = {scale!r}: expected a whole number >= 1, or nothing for the default")


@dataclass(frozen=True)
class JpegIncompressibility:
    """+kB of the JPEG at ``quality``, of the image upscaled ``scale`` times (None: shorter side to 64 pixels)."""

    quality: int = 95
    scale: int | None = None

    def __post_init__(self) -> None:
        _require_settings(self.quality, self.scale)

    def __call__(self, samples: Tensor, cond: Cond) -> Tensor:
        """(B, C, H, W) in [0, 1] -> (B,) kilobytes, without gradient."""
        return kilobytes(samples, self.quality, self.scale)


@dataclass(frozen=True)
class JpegCompressibility:
    """-kB of the JPEG at ``quality``, of the image upscaled ``scale`` times (None: shorter side to 64 pixels)."""

    quality: int = 95
    scale: int | None = None

    def __post_init__(self) -> None:
        _require_settings(self.quality, self.scale)

    def __call__(self, samples: Tensor, cond: Cond) -> Tensor:
        """(B, C, H, W) in [0, 1] -> (B,) minus kilobytes, without gradient."""
        return -kilobytes(samples, self.quality, self.scale)
