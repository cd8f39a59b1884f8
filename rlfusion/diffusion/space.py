"""The space that a model works in: pixels, or the latents of an autoencoder.

(1)  encode: samples (B, C, H, W) in [-1, 1] -> latents (B, c, h, w) of about unit variance
(2)  decode: latents -> samples (B, C, H, W) in [0, 1], with gradients
(3)  latent: the shape of a sample -> the shape of its latent
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from rlfusion.common.tensors import to_pixels

CHUNK = 500


class Space(Protocol):
    """Eq. (1) to (3); ``chunk`` samples are walked and decoded at a time where nothing else says how many."""

    @property
    def chunk(self) -> int:
        """Samples that are walked and decoded at a time."""

    def encode(self, x: Tensor) -> Tensor:
        """Eq. (1)."""

    def decode(self, z: Tensor) -> Tensor:
        """Eq. (2)."""

    def latent(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Eq. (3)."""


@dataclass(frozen=True)
class Pixels:
    """Samples are their own latents."""

    chunk: ClassVar[int] = CHUNK

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, z: Tensor) -> Tensor:
        return to_pixels(z)

    def latent(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape
