"""How a model's network computes, whatever its weights are: in which precision, memory format and code."""

from dataclasses import dataclass

from torch import nn

from rlfusion.common.compiled import Compile, compile_calls
from rlfusion.common.errors import ConfigError
from rlfusion.diffusion.denoiser import Denoiser, Precision
from rlfusion.models.card import Card


@dataclass(frozen=True)
class Arithmetic:
    """What the settings say of a network's calls.

    Attributes:
        precision: of its arithmetic (autocast).
        compile: by torch.compile; "graphs": calls without gradients by CUDA graphs.
        channels_last: whether images come to it with their channels last in memory.
    """

    precision: Precision = "float32"
    compile: Compile = False
    channels_last: bool = False

    def act(self, denoiser: Denoiser, card: Card) -> None:
        """Let the network of a model with this card compute so.

        Raises:
            ConfigError: channels last of a network without convolutions that slide.
        """
        if self.channels_last and not slides(denoiser.net):
            raise ConfigError(
                f"channels_last = True: the network {_name(denoiser, card)} has no convolutions that slide over an "
                "image, as a U-Net has, expected false"
            )
        denoiser.precision, denoiser.channels_last = self.precision, self.channels_last
        if self.compile:
            compile_calls(_inner(denoiser, card), self.compile)


def slides(net: nn.Module) -> bool:
    """Whether a network has convolutions over images whose windows overlap; those that cut patches do not."""
    found = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    return any(size > step for m in found for size, step in zip(m.kernel_size, m.stride))


def _inner(denoiser: Denoiser, card: Card) -> nn.Module:
    """The network without the look-up of embeddings by the numbers of prompts, which is not for a compiler."""
    net: nn.Module = denoiser.net.model if card.pipeline else denoiser.net  # type: ignore[assignment]
    return net


def _name(denoiser: Denoiser, card: Card) -> str:
    return type(_inner(denoiser, card)).__name__
