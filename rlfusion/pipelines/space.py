"""The latents of a pipeline's autoencoder, as a ``Space``.

    latent = (mode(encode(x)) - shift) scale,     sample = decode(latent / scale + shift)

The autoencoder is frozen and works in float32, ``chunk`` samples at a time; where a gradient passes and there is more
than one chunk, each is computed again for it (checkpointed), so that one chunk's activations are held at once.
"""

from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlfusion.errors import ConfigError
from rlfusion.tensors import to_pixels


class Decoded:
    """The latents of a diffusers autoencoder that reduces each side by ``factor``."""

    def __init__(self, vae: nn.Module, channels: int, factor: int, chunk: int) -> None:
        """Raises ConfigError for an autoencoder that normalises each channel of its latents."""
        config = vae.config
        if config.get("latents_mean") or config.get("latents_std"):
            raise ConfigError(
                "the autoencoder normalises each channel (latents_mean, latents_std): expected scaling_factor alone"
            )
        self.vae = vae.float().eval().requires_grad_(False)
        self.scale, self.shift = config["scaling_factor"], config.get("shift_factor") or 0.0
        self.channels, self.factor, self.chunk = channels, factor, chunk

    def __deepcopy__(self, memo: dict) -> Self:
        return self

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Samples (N, 3, H, W) in [-1, 1] -> latents."""
        self.vae.to(x.device)
        return (torch.cat([_mode(self.vae.encode(part)) for part in x.split(self.chunk)]) - self.shift) * self.scale

    def decode(self, z: Tensor) -> Tensor:
        """Latents -> samples in [0, 1], with gradients."""
        self.vae.to(z.device)
        parts = (z / self.scale + self.shift).split(self.chunk)
        again = len(parts) > 1 and z.requires_grad and torch.is_grad_enabled()
        decode = (lambda part: checkpoint(self._decode, part, use_reentrant=False)) if again else self._decode
        return to_pixels(torch.cat([decode(part) for part in parts]))

    def _decode(self, z: Tensor) -> Tensor:
        return self.vae.decode(z).sample

    def latent(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the latent of a sample."""
        return (self.channels, *(side // self.factor for side in shape[1:]))


def _mode(encoded: object) -> Tensor:
    """The code of an AutoencoderKL's posterior, or of an autoencoder without one."""
    return encoded.latent_dist.mode() if "latent_dist" in encoded else encoded.latent
