"""The numerics fingerprint: what, besides the program, decides the bits of a result.

Two runs of equal fingerprint and configuration agree bit for bit; others agree up to floating-point rounding.
"""

import platform

import numpy as np
import torch


def fingerprint() -> dict[str, str]:
    """Versions, the CPU's instruction set, the GPU's name ("none" without one) and torch's thread count, as text."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": str(torch.get_num_threads()),
    }


def differences(theirs: dict[str, str], ours: dict[str, str]) -> tuple[str, ...]:
    """Each entry that differs, as "name: theirs there, ours here"; empty if results must agree bit for bit."""
    names = sorted(theirs.keys() | ours.keys())
    pairs = [(name, theirs.get(name, "unknown"), ours.get(name, "unknown")) for name in names]
    return tuple(f"{name}: {there} there, {here} here" for name, there, here in pairs if there != here)
