"""Autoencoders: the latent spaces of models (Rombach et al. 2022), frozen wherever a model works in them.

    (1)  q(z | x) = N(m(x), diag s(x)^2),   p(x | z) = N(g(z), noise^2 I),   p(z) = N(0, I)     (Kingma & Welling 2014)
    (2)  -ELBO = |x - g(z)|^2 / (2 noise^2) + d_x log(noise sqrt(2 pi)) + KL(q(z | x) || N(0, I)),  z ~ q, summed

The loss is Eq. (2) divided by the number of pixels and nothing else (handbook erratum 1: the VAE's loss is -ELBO). The
mean is the code: latents are (m(x) - shift) / scale, with shift and scale of the training set, so that they have mean 0
and variance 1 over all.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any, Self

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from rlfusion.common.errors import ConfigError, require_positive
from rlfusion.common.tensors import sum_features, to_pixels
from rlfusion.data import Dataset
from rlfusion.diffusion import space
from rlfusion.diffusion.space import Space

CHUNK = 256
FORMAT, UNSEALED = "rlfusion-autoencoder-2", "rlfusion-autoencoder-1"
"""Of a description as it is written, with a digest of itself; and without, as earlier versions wrote it."""


@dataclass(frozen=True)
class Config:
    """Architecture of the embedded autoencoder.

    Attributes:
        channels: of the latents.
        halvings: how often the size is halved.
        width: features of the convolutions.
        noise: standard deviation of p(x | z), Eq. (1): less keeps more detail, and fills the latents less evenly.
    """

    channels: int = 4
    halvings: int = 1
    width: int = 32
    noise: float = 0.1

    def __post_init__(self) -> None:
        require_positive(self, "channels", "width", "noise")
        if self.halvings < 0:
            raise ConfigError(f"halvings = {self.halvings}: expected a number >= 0")


class KLVAE(nn.Module):
    """Eq. (1) with convolutions, of samples (B, C, H, W)."""

    def __init__(self, shape: tuple[int, ...], config: Config) -> None:
        """
        Raises:
            ConfigError: H or W cannot be halved that often.
        """
        super().__init__()
        if any(side % 2**config.halvings for side in shape[1:]):
            raise ConfigError(f"halvings = {config.halvings}: expected fewer for samples of {shape[1]}x{shape[2]}")
        w, self.noise = config.width, config.noise
        down = [layer for _ in range(config.halvings) for layer in (nn.SiLU(), nn.Conv2d(w, w, 4, 2, 1))]
        up = [layer for _ in range(config.halvings) for layer in (nn.SiLU(), nn.ConvTranspose2d(w, w, 4, 2, 1))]
        self.encoder = nn.Sequential(
            *(nn.Conv2d(shape[0], w, 3, padding=1), nn.SiLU(), nn.Conv2d(w, w, 3, padding=1)),
            *(*down, nn.SiLU(), nn.Conv2d(w, 2 * config.channels, 3, padding=1)),
        )
        self.decoder = nn.Sequential(
            *(nn.Conv2d(config.channels, w, 3, padding=1), nn.SiLU(), nn.Conv2d(w, w, 3, padding=1)),
            *(*up, nn.SiLU(), nn.Conv2d(w, w, 3, padding=1), nn.SiLU(), nn.Conv2d(w, shape[0], 3, padding=1)),
        )

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """m(x) and log s(x)^2."""
        mean, log_var = self.encoder(x).chunk(2, 1)
        return mean, log_var

    def mean(self, x: Tensor) -> Tensor:
        """m(x)."""
        return self.posterior(x)[0]

    def forward(self, z: Tensor) -> Tensor:
        """g(z)."""
        return self.decoder(z)


def negative_elbo(x: Tensor, guess: Tensor, mean: Tensor, log_var: Tensor, noise: float) -> Tensor:
    """Eq. (2) in nats a sample, (B,), for guess = g(z) of one z ~ q."""
    size = x[0].numel()
    rate = sum_features(mean.square() + log_var.exp() - 1 - log_var) / 2
    error = sum_features((x - guess).square()) / (2 * noise**2)
    return error + size * math.log(noise * math.sqrt(2 * math.pi)) + rate


class Latents:
    """A frozen autoencoder as a ``Space``. Copies of a model share it; it follows its inputs to their device.

    ``module`` has ``mean`` (samples in [-1, 1] to codes) and a call that undoes it; ``about`` says how to build it.
    """

    chunk = space.CHUNK

    def __init__(self, module: nn.Module, about: dict[str, Any], shift: float = 0.0, scale: float = 1.0) -> None:
        self.module = module.eval().requires_grad_(False)
        self.about = {**about, "shift": shift, "scale": scale}

    def __deepcopy__(self, memo: dict) -> Self:
        return self

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Samples (N, C, H, W) in [-1, 1] -> latents, ``CHUNK`` at a time."""
        self.module.to(x.device)
        codes = torch.cat([self.module.mean(part) for part in x.split(CHUNK)])
        return (codes - self.about["shift"]) / self.about["scale"]

    def decode(self, z: Tensor) -> Tensor:
        """Latents -> samples in [0, 1], with gradients."""
        self.module.to(z.device)
        return to_pixels(self.module(z * self.about["scale"] + self.about["shift"]))

    def latent(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the latent of a sample."""
        return tuple(self.encode(torch.zeros(1, *shape)).shape[1:])

    @torch.no_grad()
    def returns(self, shape: tuple[int, ...]) -> bool:
        """Whether samples of this shape come back in this shape."""
        try:
            return self.decode(self.encode(torch.zeros(1, *shape))).shape[1:] == shape
        except RuntimeError:  # sides that some layer cannot take, or another number of channels
            return False


def fitted(module: nn.Module, about: dict[str, Any], x: Tensor) -> Latents:
    """The latents of a trained autoencoder, with shift and scale of the samples ``x``."""
    codes = Latents(module, about).encode(x)
    return Latents(module, about, codes.mean().item(), codes.std().item())


def build(about: dict[str, Any]) -> Latents:
    """The autoencoder that ``about`` describes, without its weights: ``kind`` "kl" (ours) or "diffusers".

    Raises:
        ConfigError: another kind, or settings that cannot work.
    """
    makers = {"kl": _build_own, "diffusers": _build_diffusers}
    if about.get("kind") not in makers:
        raise ConfigError(f"autoencoder of kind {about.get('kind')!r}: expected one of {', '.join(makers)}")
    with torch.random.fork_rng(devices=[]):  # weights that are about to be replaced touch no other draw
        module = makers[about["kind"]](about)
    return Latents(module, about, about["shift"], about["scale"])


def _build_own(about: dict[str, Any]) -> nn.Module:
    return KLVAE(tuple(about["shape"]), Config(**about["config"]))


def _build_diffusers(about: dict[str, Any]) -> nn.Module:
    from diffusers import AutoencoderKL

    return Pretrained(AutoencoderKL.from_config(about["config"]))


class Pretrained(nn.Module):
    """diffusers' AutoencoderKL: its own scaling and shift factors are the scale and shift of ``Latents``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def mean(self, x: Tensor) -> Tensor:
        """The mean of the posterior."""
        return self.model.encode(x).latent_dist.mode()

    def forward(self, z: Tensor) -> Tensor:
        return self.model.decode(z).sample


def from_diffusers(folder: str) -> Latents:
    """The latents of a saved AutoencoderKL, or of the ``vae`` of a pipeline's folder.

    Raises:
        ConfigError: nothing of the kind there, or one whose latents are scaled by channel.
    """
    from diffusers import AutoencoderKL

    try:
        model = AutoencoderKL.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, SafetensorError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"autoencoder = {folder!r}: no AutoencoderKL there ({said})") from error
    config = {name: copy.copy(value) for name, value in dict(model.config).items() if not name.startswith("_")}
    if config.get("latents_mean") or config.get("latents_std"):
        raise ConfigError(
            f"autoencoder = {folder!r} normalises each channel of its latents (latents_mean, latents_std): "
            "expected one with scaling_factor and shift_factor alone"
        )
    scale, shift = 1 / config["scaling_factor"], config.get("shift_factor") or 0.0
    return Latents(Pretrained(model), {"kind": "diffusers", "config": config}, shift, scale)


def encoded(data: Dataset, space: Space) -> Dataset:
    """A data set in a model's space: what the model is trained on."""
    x = space.encode(data.x)
    return data if x is data.x else Dataset(x, data.label, data.names, captioned=data.captioned)
