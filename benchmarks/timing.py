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
    found = alternate({"floor": floor, "ours": ours}, rounds, device, clock, warm)
    return {"floor_ms": 1e3 * statistics.median(found["floor"]), **over(found["ours"], found["floor"])}


def alternate(
    functions: dict[str, Callable[[], object]], rounds: int, device: str, clock: Callable[[], float], warm: int = 2
) -> dict[str, list[float]]:
    """The seconds of each function in each round, by name, in the other order each second round."""
    found: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(warm + rounds):
        for name in list(functions)[:: 1 if i % 2 else -1]:
            taken = seconds(functions[name], device, clock)
            if i >= warm:
                found[name].append(taken)
    return found


def over(ours: list[float], floor: list[float]) -> dict[str, float]:
    """Median and quartiles of ours / floor over rounds."""
    low, middle, high = (float(q) for q in np.quantile([a / b for a, b in zip(ours, floor)], (0.25, 0.5, 0.75)))
    return {"ratio": middle, "q1": low, "q3": high}


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
