"""The latents of a pipeline's autoencoder, as a ``Space``.

    latent = (mode(encode(x)) - shift) scale / std,     sample = decode(std latent / scale + shift)

shift is a number, or with std one of each channel (latents_mean, latents_std) where the pipeline undoes them. An image
is the one frame of a video to an autoencoder of videos.

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

FRAMES = "temperal_downsample"
"""A setting, spelt as diffusers spells it, that autoencoders of videos have."""


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
        self.shift, self.scale = levels(vae, normalises)
        self.frames = FRAMES in config
        self.vae = vae.float().eval().requires_grad_(False)
        self.decoding = [part for part in (vae.decoder, getattr(vae, "post_quant_conv", None)) if part is not None]
        for part in self.decoding:
            part.to(dtype)
        self.channels, self.factor, self.chunk = channels, factor, chunk

    def __deepcopy__(self, memo: dict) -> Self:
        return self

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Samples (N, 3, H, W) in [-1, 1] -> latents."""
        self.vae.to(x.device)
        code = torch.cat([self._code(part) for part in x.split(self.chunk)])
        return (code - tiled(self.shift, code)) * tiled(self.scale, code)

    def decode(self, z: Tensor) -> Tensor:
        """Latents -> samples in [0, 1], with gradients."""
        if next(self.vae.decoder.parameters()).device != z.device:
            kept = torch.channels_last if z.is_cuda and not self.frames else torch.contiguous_format
            for part in self.decoding:
                part.to(z.device, memory_format=kept)
        parts = (z / tiled(self.scale, z) + tiled(self.shift, z)).split(self.chunk)
        again = len(parts) > 1 and z.requires_grad and torch.is_grad_enabled()
        decode = (lambda part: checkpoint(self._decode, part, use_reentrant=False)) if again else self._decode
        return to_pixels(torch.cat([decode(part) for part in parts]))

    def _code(self, x: Tensor) -> Tensor:
        return _mode(self.vae.encode(x[:, :, None])).squeeze(2) if self.frames else _mode(self.vae.encode(x))

    def _decode(self, z: Tensor) -> Tensor:
        z_in = z.to(next(self.vae.decoder.parameters()).dtype)
        made = self.vae.decode(z_in[:, :, None]).sample.squeeze(2) if self.frames else self.vae.decode(z_in).sample
        return made.to(z)

    def latent(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the latent of a sample."""
        return (self.channels, *(side // self.factor for side in shape[1:]))


def levels(vae: nn.Module, normalises: bool) -> tuple[Tensor, Tensor]:
    """The shift and the scale of latents, (C, 1, 1) or a number of each; of an autoencoder with batch normalisation,
    (C, a, a) over its patches.

    Raises:
        ConfigError: the autoencoder has a mean and std of each channel that pipelines of the family do not undo.
    """
    config = vae.config
    if "batch_norm_eps" in config:
        mean, var = (
            held.double().reshape(-1, *config["patch_size"]) for held in (vae.bn.running_mean, vae.bn.running_var)
        )
        return mean, (var + config["batch_norm_eps"]).rsqrt()
    each = {name: config[name] for name in ("latents_mean", "latents_std") if config.get(name)}
    if each and not normalises:
        values = ", ".join(f"{name} = {held}" for name, held in each.items())
        raise ConfigError(f"autoencoder: {values}: pipelines of this family do not undo them, expected null")
    shift, std = each.get("latents_mean", config.get("shift_factor") or 0.0), each.get("latents_std", 1.0)
    return _channels(shift), config.get("scaling_factor", 1.0) / _channels(std)


def tiled(held: Tensor, like: Tensor) -> Tensor:
    """Numbers of each channel, or of each place of a patch, as they multiply ``like`` (B, C, h, w)."""
    held = held.to(like)
    high, wide = held.shape[-2:]
    return held if high == wide == 1 else held.repeat(1, like.shape[-2] // high, like.shape[-1] // wide)


def _channels(held: float | list[float]) -> Tensor:
    """A number, or one of each channel, as it multiplies latents (B, C, h, w)."""
    return torch.tensor(held, dtype=torch.float64).reshape(-1, 1, 1)


def _mode(encoded: object) -> Tensor:
    """The code of an AutoencoderKL's posterior, or of an autoencoder without one."""
    return encoded.latent_dist.mode() if "latent_dist" in encoded else encoded.latent
