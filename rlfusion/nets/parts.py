"""Parts of all networks: times as features, layers that begin at 0, recomputation, attention in its plain form."""

import math
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from rlfusion.common.errors import ConfigError


def fourier(t: Tensor, width: int, largest: float = 1000.0) -> Tensor:
    """(B,) times in [0, 1] -> (B, width): sines and cosines at frequencies 1..``largest``, float32 (or t's float64)."""
    half = width // 2
    rates = torch.exp(torch.linspace(0, math.log(largest), half, device=t.device))
    angle = t.to(torch.promote_types(t.dtype, torch.float32))[:, None] * rates
    return torch.cat([angle.sin(), angle.cos()], 1)


def check_frequency(frequency: float) -> None:
    """Raise ConfigError unless ``fourier`` can have it as its largest frequency."""
    if not 1 <= frequency < math.inf:
        raise ConfigError(f"frequency = {frequency}: expected a number >= 1")


def zeroed(module: nn.Module) -> nn.Module:
    """``module`` with every parameter 0."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def plain_attention() -> AbstractContextManager:
    """Within the context attention takes its plain form: the fused ones have no second and no forward derivative. What
    ``through`` recomputes keeps it in the backward pass.
    """
    return sdpa_kernel(SDPBackend.MATH)


def _attends_plainly() -> bool:
    if torch.compiler.is_compiling():
        return False  # a compiled graph holds the form that it was traced with
    cuda = torch.backends.cuda  # its switches are those of the CPU too
    return not (cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled() or cuda.cudnn_sdp_enabled())


class _Plain(nn.Module):
    """``block`` with plain attention, wherever it is called."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *inputs: Tensor) -> Tensor:
        with plain_attention():
            return self.block(*inputs)


def through(block: nn.Module, recompute: bool, *inputs: Tensor) -> Tensor:
    """block(*inputs); with ``recompute`` the backward pass computes it again instead of keeping its activations.

    Gradient checkpointing (Chen et al. 2016): the same numbers, bit for bit, for a second forward pass. That pass takes
    attention's form of the first, also where the backward pass runs after ``plain_attention`` has ended.
    """
    if recompute and torch.is_grad_enabled():
        return checkpoint(_Plain(block) if _attends_plainly() else block, *inputs, use_reentrant=False)
    return block(*inputs)
