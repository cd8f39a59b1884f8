"""Timing two things side by side in one process, for the ratios of the benchmarks."""

import platform
import statistics
from collections.abc import Callable

import numpy as np
import torch


def compare(
    ours: Callable[[], object],
    floor: Callable[[], object],
    rounds: int,
    device: str,
    clock: Callable[[], float],
    warm: int = 2,
) -> dict[str, float]:
    """Median floor in ms; median and quartiles of ours / floor, after ``warm`` rounds that are not counted. The order
    within a pair alternates.
    """
    for function in (floor, ours) * warm:
        function()
    floors, ratios = [], []
    for i in range(rounds):
        pair = {f: seconds(f, device, clock) for f in ((floor, ours) if i % 2 else (ours, floor))}
        floors.append(pair[floor])
        ratios.append(pair[ours] / pair[floor])
    low, middle, high = (float(q) for q in np.quantile(ratios, (0.25, 0.5, 0.75)))
    return {"floor_ms": 1e3 * statistics.median(floors), "ratio": middle, "q1": low, "q3": high}


def seconds(function: Callable[[], object], device: str, clock: Callable[[], float]) -> float:
    """How long one call takes, with what it put on the device."""
    wait(device)
    start = clock()
    function()
    wait(device)
    return clock() - start


def wait(device: str) -> None:
    """Until the device has done all that it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def machine(device: str) -> dict[str, str | int]:
    """What the figures were measured on."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
