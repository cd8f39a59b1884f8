"""The device that a setting names, and the numerics under which a run repeats itself."""

import os
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from rlfusion.common import layers, shards
from rlfusion.common.errors import ConfigError, near, shorten
from rlfusion.training.ranks import current

WORKSPACE, WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
"""Where cuBLAS reads how much memory it may use, and the values of it with which it repeats itself."""

Deterministic = bool | Literal["strict"]
"""Whether a GPU repeats itself; "strict" where it would be an error that an operation does not."""

_told: tuple[Deterministic, bool] = (True, False)


def memory_of(device: str) -> int:
    """Bytes of memory that a device of this machine has, of GPUs the smallest's; 0 where that is not known."""
    if device.startswith("cuda"):
        found = [torch.cuda.get_device_properties(n).total_memory for n in range(torch.cuda.device_count())]
        return min(found, default=0)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if device == "cpu" else 0


def set_numerics(
    threads: int, device: torch.device | str, deterministic: Deterministic = True, tf32: bool = False
) -> None:
    """CPU threads of torch; and how a GPU computes: with kernels that repeat themselves bit for bit (where an operation
    has none, torch warns, or refuses it if "strict"), or with the fastest, chosen by trying; float32 products in
    float32, or in TF32 (10 bits of mantissa). A process calls it before its first work on the GPU. On a
    CPU the two are only noted, for ``told``.
    """
    global _told
    _told = deterministic, tf32
    torch.set_num_threads(threads)
    if torch.device(device).type == "cuda":
        if deterministic:
            os.environ.setdefault(WORKSPACE, WORKSPACES[0])  # torch warns of another value, which is the user's own
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = bool(deterministic), not deterministic
        torch.use_deterministic_algorithms(bool(deterministic), warn_only=deterministic != "strict")
        filling: Any = torch.utils.deterministic
        filling.fill_uninitialized_memory = False  # of use to those who read what nobody wrote


def told() -> tuple[Deterministic, bool]:
    """``deterministic`` and ``tf32`` as this process was told them last: for workers that have a GPU where it has
    none.
    """
    return _told


DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")
DEVICES_MEANT = {"gpu": "cuda", "nvidia": "cuda", "tpu": "auto", "": "auto", "none": "auto"}


def require_device(device: str) -> None:
    """Refuse what names no device of any machine.

    Raises:
        ConfigError: it does not.
    """
    name, colon, number = device.partition(":")
    if name not in DEVICES or (colon and not (number.isdigit() and name != "auto")):
        numbered = f"{name}:0" if name in DEVICES and name != "auto" else ""
        meant = numbered or DEVICES_MEANT.get(name.lower()) or next(iter(near(name, DEVICES)), "")
        hint = f"; did you mean {meant!r}?" if meant else ""
        raise ConfigError(f"device = {shorten(repr(device))}: expected auto, cpu, cuda or cuda:NUMBER{hint}")


def place(module: nn.Module, net: nn.Module, device: torch.device, split: bool) -> None:
    """Bring a module to a device, in place; of its part ``net``, where that is split, the rows of this rank alone."""
    if split:
        shards.split(net, device, current().exact)
    module.to(device)


def place_beside(module: nn.Module, parts: Sequence[nn.Module], like: nn.Module, device: torch.device) -> None:
    """Bring a critic to a device, in place; its ``parts`` are split as the network of ``like``, beside which it learns.
    Within ``exact`` the gradients of parts that are whole are added up as those of parts that are split.
    """
    for part in parts:
        if shards.roots(like):
            shards.split(part, device, current().exact)
        elif current().exact:
            layers.bounded(part)
    module.to(device)


def pick_device(device: str) -> torch.device:
    """The device that a setting names; "auto" is cuda where there is one.

    Raises:
        ConfigError: no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    require_device(device)
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        message = shorten(str(error).partition("\n")[0], 100)
        raise ConfigError(f"device = {device!r}: not available here ({message}); expected auto or cpu") from error
