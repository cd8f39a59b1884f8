"""The errors that rlfusion raises on purpose, each with the exit code of the command that it ends; and the near match.

The command line prints the message as one line. 75 (a signal, after saving) and 130 (Ctrl-C) are no errors.
"""

import difflib
import errno
import socket
from argparse import ArgumentError
from collections import Counter
from collections.abc import Iterable


class RlfusionError(Exception):
    """What the command line says in one line, ending with ``exit_code``. ``kind`` is what it calls it, ``frames`` what
    stands below it: of the user's own code, its part of the traceback.
    """

    exit_code = 1
    kind = ""
    frames = ""


class ConfigError(RlfusionError, ValueError):
    """A setting, an input or a file that cannot work, refused before any work starts."""

    exit_code = 2


class StateError(RlfusionError, RuntimeError):
    """A saved state that is damaged, or that does not fit what it is loaded into; the first entry is named."""

    exit_code = 2


class UserCodeError(RlfusionError, RuntimeError):
    """The user's own code (a reward, an agent) raised. The original error is the cause."""

    exit_code = 3
    kind = "your code failed"


class NumericalError(RlfusionError, ArithmeticError):
    """A non-finite number where a finite one is needed."""

    exit_code = 4
    kind = "numerical failure"


class OutOfMemory(RlfusionError, MemoryError):
    """The memory of the GPU or of the machine is not enough for these settings."""

    exit_code = 2
    kind = "out of memory"


class UnavailableError(RlfusionError, RuntimeError):
    """Another process or machine that the work needs (a Ray cluster, workers, a reward server) cannot be had."""

    exit_code = 69
    kind = "unavailable"


class StorageError(RlfusionError, OSError):
    """A file or folder that cannot be written or read, ``filename``: the disk is full, read-only or gone."""

    exit_code = 74
    kind = "storage"

    def __str__(self) -> str:
        return f"{self.filename!r}: {self.strerror}" if self.filename else super().__str__()


MISTAKEN = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}
"""Of reading: the file that was named is not one that can be read. All others are the storage's."""


def foreseen(error: Exception) -> RlfusionError | None:
    """What the command line says of an error: itself where it is ours; one of the operating system is an input that
    cannot be read, a network that cannot be reached, or storage (what is written: ``storage``); None for all others.
    """
    if isinstance(error, RlfusionError):
        return error
    if isinstance(error, ArgumentError):
        return ConfigError(str(error))
    if _out_of_memory(error):
        first = next(iter(str(error).strip().splitlines()), "") or "no room for what was asked"
        return OutOfMemory(f"{shorten(first, 200)}; {LESS_MEMORY}")
    if isinstance(error, RuntimeError) and (at := str(error).find(" does not have a deterministic implementation")) > 0:
        return ConfigError(
            f"deterministic = strict: {shorten(str(error)[:at])} has no kernel on this GPU that gives the same bits "
            "each time, expected deterministic = true, or a network or reward without it"
        )
    if any(base.__module__.startswith(COMPILERS) for base in type(error).__mro__):
        first = str(error).strip().partition("\n\n")[0]  # what follows is advice to who mends torch
        return ConfigError(
            f"compile = True: the network's calls cannot be compiled here ({shorten(first, 200)}): expected compile "
            "false, or a network that torch.compile takes, and on a CPU a C++ compiler (CXX)"
        )
    if not isinstance(error, OSError) or error.errno is None:
        return None
    if isinstance(error, ConnectionError | TimeoutError | socket.gaierror) and not isinstance(error, BrokenPipeError):
        return UnavailableError(str(error))
    if error.errno in MISTAKEN and error.filename:
        return ConfigError(f"{str(error.filename)!r} cannot be read: {error.strerror}")
    where = "standard output" if isinstance(error, BrokenPipeError) else str(error.filename or "")
    return StorageError(error.errno, error.strerror, where)


COMPILERS = ("torch._dynamo", "torch._inductor")
"""Where the errors of torch.compile come from."""

LESS_MEMORY = (
    "expected a smaller agent.micro_batch, rollout.item, train.batch or pipeline.decode, agent.fused false, or "
    "pipeline.checkpointing (rlfusion doctor with the same settings says what they need)"
)


def _out_of_memory(error: Exception) -> bool:
    """Whether it is Python's, torch's of a GPU, or torch's of the machine, which is a RuntimeError like any other."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


LONGEST = 80
"""Characters of a value that an error shows."""
LONGEST_PATH = 400
"""Characters of a path that an error shows: one reads, and copies, the whole of it."""
LISTED = 160
"""Characters of the names that an error lists; of more it says how many there are, and the nearest."""


def shorten(value: object, longest: int = LONGEST) -> str:
    """A value in one line of at most ``longest`` characters, its middle left out where it is longer."""
    text = " ".join(str(value).split())
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    if len(text) <= longest:
        return text
    half = (longest - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


ALIASES = {
    "diffusion_dpo": "dpo",
    "diffusion_nft": "nft",
    "advantage_weighted_matching": "awm",
    "fpo": "awm",
    "on_policy_distillation": "opd",
    "gkd": "opd",
    "supervised_fine_tuning": "sft",
    "offline_dpo": "dpo",
    "flow_grpo": "grpo",
    "dance_grpo": "grpo",
    "rwr": "drwr",
    "awr": "dawr",
    "alignprop": "draft",
    "ddimscheduler": "DDIM",
    "ddpmscheduler": "DDPM",
    "lcmscheduler": "Renoise",
    "linear": "DDPM",
    "squaredcos_cap_v2": "Cosine",
    "unet2dmodel": "UNet",
    "unet2dconditionmodel": "UNet",
    "mlp": "ResidualMLP",
    "ddpm": "eps",
    "epsilon": "eps",
    "v_prediction": "v",
    "sample": "x0",
    "flow_matching": "flow",
    "flow_prediction": "flow",
    "rectified_flow": "flow",
    "mse": "Denoising",
    "consistency": "cd",
    "consistency_distillation": "cd",
    "progressive": "pd",
    "progressive_distillation": "pd",
    "aesthetic_score": "aesthetic",
    "laion_aesthetic": "aesthetic",
    "clipscore": "clip_score",
    "clip": "clip_score",
    "pickscore": "pick_score",
    "pickapic": "pick_score",
    "hps": "hps_v2",
    "hpsv2": "hps_v2",
    "hpsv2.1": "hps_v2",
    "fp16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "fp32": "float32",
    "full": "float32",
    "r": "rank",
    "lora_r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "num_train_timesteps": "resolution",
    "a": "noise",
}
"""Words of the papers and of other libraries, as ``_plain`` has them, and what such a thing is called here."""

VARIANTS = {
    "rloo": ("grpo", "baseline = leave_one_out and std = none"),
    "drgrpo": ("grpo", "std = none"),
    "mixgrpo": ("grpo", "outside = ode and a window, such as window = 2"),
    "mixgrpoflash": ("grpo", "outside = ode, a window, such as window = 2, and outside_stride, such as 2"),
    "dancegrpo": ("grpo", "start = prompt"),
    "flashgrpo": ("grpo", "step_draws = 1"),
    "tempflowgrpo": ("grpo", "step_weight = noise"),
    "grpoguard": ("grpo", "ratio_norm = true"),
    "flowdppo": ("grpo", "a limit as divergence"),
    "gardo": ("grpo", "a limit as reference_kl"),
}
"""Papers' names, as ``_plain`` has them without ``_``, of what is a setting here: of which thing, and the setting."""


def near(name: str, known: Iterable[str], count: int = 1, cutoff: float = 0.55) -> list[str]:
    """The ``count`` names nearest to ``name``, nearest first, none where none is near.

    Case, ``-`` and ``_``, and what stands around the word are taken for alike; a name is never near to itself. What
    ``ALIASES`` says comes first, and last the names that begin so, or with which ``name`` begins.
    """
    plain: dict[str, str] = {}
    for one in known:
        plain.setdefault(_plain(one), one)
    sought = _plain(name[:LISTED])
    meant = [_plain(ALIASES[sought])] if _plain(ALIASES.get(sought, "")) in plain else []
    found = difflib.get_close_matches(sought, plain, n=count + 1, cutoff=cutoff)
    begun = [one for one in plain if len(sought) > 2 and one.startswith(sought)]
    begun += [one for one in plain if len(one) > 2 and sought.startswith(f"{one}_")]
    names = dict.fromkeys([*meant, *found, *sorted(begun, key=len)])
    return [plain[one] for one in names if plain[one] != name][:count]


def _plain(name: str) -> str:
    return name.strip(" '\"`,;-").lower().replace("-", "_").replace(" ", "_")


def listed(known: Iterable[str], name: str = "") -> str:
    """The names in a line: all where they are few, else how many there are and those nearest to ``name``."""
    known = sorted(known)
    text = ", ".join(known)
    if len(text) <= LISTED:
        return text
    some = near(name, known, 3) or known[:3]
    return f"{len(known)} names, such as {', '.join(shorten(one, 40) for one in some)}"


def unknown(what: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error for an unknown ``name``: says what was expected and which known name is nearest."""
    known = list(known)
    found = near(name, known)
    hint = f"; did you mean {found[0]!r}?" if found else ""
    thing, setting = VARIANTS.get(_plain(name).replace("_", ""), ("", ""))
    if thing in known:
        hint = f"; did you mean {thing!r} with {setting}?"
    expected = f"expected one of {listed(known, name)}" if known else "there is none"
    return ConfigError(f"unknown {what} {shorten(repr(name))}: {expected}{hint}")


MOST = 10**12
"""The largest count that a setting can be, and in ``MOST_SECONDS`` the largest time (names ending in _s)."""
MOST_SECONDS = 1e9
MOST_THREADS = 1024


def require_positive(settings: object, *names: str) -> None:
    """Raise ConfigError unless each named setting is a number > 0 (NaN is not), and none too large for any machine."""
    for name in names:
        _require(name, getattr(settings, name), getattr(settings, name) > 0, "> 0")


def require_not_negative(settings: object, *names: str) -> None:
    """Raise ConfigError unless each named setting is a number >= 0 (NaN is not), and none too large for any machine."""
    for name in names:
        _require(name, getattr(settings, name), getattr(settings, name) >= 0, ">= 0")


def require_at_most(settings: object, **limits: float) -> None:
    """Raise ConfigError where a setting is above its limit."""
    for name, limit in limits.items():
        if not (value := getattr(settings, name)) <= limit:
            raise ConfigError(f"{name} = {value}: expected a number of at most {limit:g}")


def require_distinct(name: str, held: Iterable[object]) -> None:
    """Raise ConfigError where the list in a setting has something twice."""
    for one, count in Counter(held).items():
        if count > 1:
            twice = shorten(repr(one))
            raise ConfigError(f"{name} = {shorten(list(held))}: expected each once, {twice} is there twice")


def require_share(settings: object, name: str) -> None:
    """Raise ConfigError unless the named setting is in (0, 1)."""
    if not 0 < (value := getattr(settings, name)) < 1:
        raise ConfigError(f"{name} = {value}: expected a share in (0, 1)")


def require_decay(ema_decay: float) -> None:
    """Raise ConfigError unless it can be the decay of an average."""
    if not 0 <= ema_decay < 1:
        raise ConfigError(f"ema_decay = {ema_decay}: expected 0 <= ema_decay < 1")


def _require(name: str, value: float, within: bool, message: str) -> None:
    if not within:
        raise ConfigError(f"{name} = {value}: expected a number {message}")
    most = MOST_SECONDS if name.endswith("_s") else MOST if isinstance(value, int) else value
    most = MOST_THREADS if name == "threads" else most
    if value > most:
        raise ConfigError(f"{name} = {value}: expected a number {message} and at most {most:g}")
