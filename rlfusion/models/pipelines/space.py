"""The latents of a pipeline's autoencoder, as a ``Space``.

    latent = (mode(encode(x)) - shift) scale / std,     sample = decode(std latent / scale + shift)

shift is a number, or with std one of each channel (latents_mean, latents_std) where the pipeline undoes them.

The autoencoder is frozen and works in float32, or decodes in ``dtype``, ``chunk`` samples at a time; where a gradient
passes and there is more than one chunk, each is computed again for it (checkpointed), so that one chunk's activations
are held at once. The encoder, which rewards never need, stays on the CPU until something is encoded. On a GPU the
decoder's weights lie channels last, as its convolutions read them.
"""

from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlfusion.common.errors import ConfigError
from rlfusion.common.tensors import to_pixels


class Decoded:
    """The latents of a diffusers autoencoder that reduces each side by ``factor``."""

    def __init__(
        self,
        vae: nn.Module,
        channels: int,
        factor: int,
        chunk: int,
        normalises: bool,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """``normalises`` is whether the pipeline undoes the mean and std of each channel.

        Raises:
            ConfigError: the autoencoder has them, and the pipeline does not undo them; or it overflows in ``dtype``.
        """
        config = vae.config
        if dtype == torch.float16 and config.get("force_upcast"):
            raise ConfigError("vae_dtype = float16: this autoencoder overflows in it (force_upcast), expected bfloat16")
        each = {name: config[name] for name in ("latents_mean", "latents_std") if config.get(name)}
        if each and not normalises:
            values = ", ".join(f"{name} = {held}" for name, held in each.items())
            raise ConfigError(f"autoencoder: {values}: pipelines of this family do not undo them, expected null")
        self.vae = vae.float().eval().requires_grad_(False)
        self.decoding = [part for part in (vae.decoder, getattr(vae, "post_quant_conv", None)) if part is not None]
        for part in self.decoding:
            part.to(dtype)
        shift, std = each.get("latents_mean", config.get("shift_factor") or 0.0), each.get("latents_std", 1.0)
        self.shift, self.scale = _channels(shift), config["scaling_factor"] / _channels(std)
        self.channels, self.factor, self.chunk = channels, factor, chunk

    def __deepcopy__(self, memo: dict) -> Self:
        return self

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Samples (N, 3, H, W) in [-1, 1] -> latents."""
        self.vae.to(x.device)
        code = torch.cat([_mode(self.vae.encode(part)) for part in x.split(self.chunk)])
        return (code - self.shift.to(code)) * self.scale.to(code)

    def decode(self, z: Tensor) -> Tensor:
        """Latents -> samples in [0, 1], with gradients."""
        if next(self.vae.decoder.parameters()).device != z.device:
            kept = torch.channels_last if z.is_cuda else torch.contiguous_format
            for part in self.decoding:
                part.to(z.device, memory_format=kept)
        parts = (z / self.scale.to(z) + self.shift.to(z)).split(self.chunk)
        again = len(parts) > 1 and z.requires_grad and torch.is_grad_enabled()
        decode = (lambda part: checkpoint(self._decode, part, use_reentrant=False)) if again else self._decode
        return to_pixels(torch.cat([decode(part) for part in parts]))

    def _decode(self, z: Tensor) -> Tensor:
        return self.vae.decode(z.to(next(self.vae.decoder.parameters()).dtype)).sample.to(z)

    def latent(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the latent of a sample."""
        return (self.channels, *(side // self.factor for side in shape[1:]))


def _channels(held: float | list[float]) -> Tensor:
    """A number, or one of each channel, as it multiplies latents (B, C, h, w)."""
    return torch.tensor(held, dtype=torch.float64).reshape(-1, 1, 1)


def _mode(encoded: object) -> Tensor:
    """The code of an AutoencoderKL's posterior, or of an autoencoder without one."""
    return encoded.latent_dist.mode() if "latent_dist" in encoded else encoded.latent
