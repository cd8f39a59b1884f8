"""The device that a setting names, and the numerics under which a run repeats itself."""

import torch

from rlfusion.common.errors import ConfigError, near, shorten


def set_numerics(threads: int, device: torch.device) -> None:
    """CPU threads of torch; and on a GPU the settings under which it repeats itself bit for bit, and rollout and
    learner agree: no TF32, deterministic kernels (where there is none, torch warns).
    """
    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        torch.use_deterministic_algorithms(True, warn_only=True)


DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")
DEVICES_MEANT = {"gpu": "cuda", "nvidia": "cuda", "tpu": "auto", "": "auto", "none": "auto"}


def pick_device(device: str) -> torch.device:
    """The device that a setting names; "auto" is cuda where there is one.

    Raises:
        ConfigError: no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name, colon, number = device.partition(":")
    if name not in DEVICES or (colon and not number.isdigit()):
        numbered = f"{name}:0" if name in DEVICES else ""
        meant = numbered or DEVICES_MEANT.get(name.lower()) or next(iter(near(name, DEVICES)), "")
        hint = f"; did you mean {meant!r}?" if meant else ""
        raise ConfigError(f"device = {shorten(repr(device))}: expected auto, cpu, cuda or cuda:NUMBER{hint}")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        message = shorten(str(error).partition("\n")[0], 100)
        raise ConfigError(f"device = {device!r}: not available here ({message}); expected auto or cpu") from error
