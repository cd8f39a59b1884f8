"""The floating-point operations of a learner, and their share of what its GPU can do (MFU).

    (1)  F = rows_g (f + b) + rows_n f      of an update: its network answered rows_g samples with a gradient, rows_n
                                            without; f, b of a forward and a backward pass of one sample
    (2)  MFU = F / (seconds of the update x peak of the GPU)

f and b are counted once, by torch's flop counter, on the first row that the network is given. The rows are counted by
their number alone, so nothing waits for a GPU, and what is computed again in the backward pass is not counted.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlfusion.common.compiled import plain
from rlfusion.common.tensors import map_cond

PEAKS: tuple[tuple[str, float, float], ...] = (
    ("GB200", 2.5e15, 8.0e13),
    ("B200", 2.25e15, 7.5e13),
    ("H200", 9.89e14, 6.7e13),
    ("H100 PCIe", 7.56e14, 5.1e13),
    ("H100 NVL", 8.35e14, 6.0e13),
    ("H100", 9.89e14, 6.7e13),
    ("A100", 3.12e14, 1.95e13),
    ("L40S", 3.62e14, 9.16e13),
    ("L40", 1.81e14, 9.05e13),
    ("L4", 1.21e14, 3.03e13),
    ("A10G", 7.0e13, 3.1e13),
    ("A10", 1.25e14, 3.12e13),
    ("RTX 4090", 1.65e14, 8.26e13),
    ("RTX 3090", 7.1e13, 3.56e13),
)
"""FLOP/s of a GPU by its name, the longer names first: of dense bfloat16 products, and of float32 ones without TF32, as
their makers state them."""


def peak(device: torch.device, precision: str) -> float:
    """The peak FLOP/s of a device; NaN of a CPU, and of a GPU that ``PEAKS`` does not have."""
    if device.type != "cuda":
        return float("nan")
    return peak_of(torch.cuda.get_device_name(device), precision)


def peak_of(name: str, precision: str) -> float:
    """The peak FLOP/s of a GPU of this name, in "bfloat16" or "float32"; NaN where it is not known."""
    words = name.replace("-", " ").split()
    for known, half, single in PEAKS:
        if all(word in words for word in known.split()):
            return half if precision == "bfloat16" else single
    return float("nan")


class Flops:
    """Counts the rows that ``net`` answers, called as net(x (B, ...), t (B,), cond), within ``counting``; and nothing
    where the ``peak`` of its device is not known (NaN), as on a CPU: torch's counter alone takes seconds to import; and
    of a network whose own calls are compiled, which does not heed hooks.
    """

    def __init__(self, net: nn.Module, peak: float) -> None:
        self.net, self.peak = net, math.nan if net._compiled_call_impl is not None else peak
        self.learned = self.asked = 0
        self._first: tuple[Any, ...] | None = None
        self._each: tuple[float, float] | None = None

    @contextmanager
    def counting(self) -> Iterator["Flops"]:
        """Within the context rows are counted."""
        if math.isnan(self.peak):
            yield self
            return
        handle = self.net.register_forward_pre_hook(self._note)
        try:
            yield self
        finally:
            handle.remove()

    def _note(self, _: nn.Module, given: tuple[Any, ...]) -> None:
        x = given[0]
        if torch.is_grad_enabled():
            self.learned += len(x)
        else:
            self.asked += len(x)
        if self._first is None:
            rows = (x.detach()[:1].clone(), given[1].detach()[:1].clone())
            self._first = (*rows, *(map_cond(lambda c: c[:1].clone(), cond) for cond in given[2:]))

    def taken(self) -> float:
        """Eq. (1) of the rows since the last call; NaN where none are counted, and of a network in shards."""
        if math.isnan(self.peak):
            return math.nan
        learned, asked, self.learned, self.asked = self.learned, self.asked, 0, 0
        if self._first is None:
            return 0.0
        if any(type(p) not in (nn.Parameter, Tensor) for p in self.net.parameters()):
            return math.nan  # of a network that lies in shards, one rank alone cannot ask
        if self._each is None:
            self._each = passes(self.net, *self._first)
        forward, backward = self._each
        return learned * (forward + backward) + asked * forward


def passes(net: nn.Module, *row: Any) -> tuple[float, float]:
    """The FLOPs of a forward and of a backward pass of ``net`` for one row. No gradient, buffer or generator of the
    process is changed.
    """
    from torch.utils.flop_counter import FlopCounterMode

    wanted = [p for p in net.parameters() if p.requires_grad]
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    devices = [row[0].device] if row[0].device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad(), plain(net), FlopCounterMode(display=False) as counter:
        answer: Tensor = net(*row)
        forward = counter.get_total_flops()
        if wanted and answer.requires_grad:
            torch.autograd.grad(answer.float().sum(), wanted, allow_unused=True)
        both = counter.get_total_flops()
    with torch.no_grad():
        for name, buffer in net.named_buffers():
            buffer.copy_(buffers[name])
    return float(forward), float(both - forward)
