"""Packages that a library imports as it begins, for features that are rarely used: imported at their first use instead.

diffusers imports bitsandbytes and scipy.stats wherever they are installed, for weights in 8 bits and for schedulers
with "beta" noise levels: 70 MB and some seconds. While it begins, a ``Deferred`` module stands for such a package. The
library keeps it, under the package's name, and its first use imports the package itself. transformers takes a function
of scipy.optimize, for losses of object detection: one that imports it as it is called stands for that.
"""

import gc
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

SPEAK = ("bitsandbytes.backends.cpu.ops", "torch.utils._pytree")
"""Loggers that warn as diffusers or peft imports bitsandbytes and torchao, of what is not used here."""

RARE = ("bitsandbytes", "onnxruntime", "scipy.stats", "scipy.integrate", "scipy.optimize:linear_sum_assignment")
"""What diffusers, transformers and peft import wherever it is installed, and seldom use."""


def quieten() -> None:
    """Let them warn no more."""
    for name in SPEAK:
        logging.getLogger(name).setLevel(logging.ERROR)


_paused: list[bool] = []
"""One entry for each ``uncollected`` that turned it off."""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: gc.enable() if _paused else None)


class Deferred(ModuleType):
    """Stands for a package, whose names it imports when they are read; its ``function``, when that is called."""

    def __init__(self, name: str, function: str = "") -> None:
        super().__init__(name)
        self.function = function

    def __getattr__(self, name: str) -> Any:
        if name == self.function:
            return partial(_called, self.__name__, name)
        if name == "__path__" and self.function and self.__spec__:  # ``from`` reads it
            return self.__spec__.submodule_search_locations or []
        if sys.modules.get(self.__name__) is self:  # something needs it now, within the block
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


@contextmanager
def uncollected() -> Iterator[None]:
    """Within, no garbage is looked for: while a large library is imported there is none to speak of, and each look goes
    over all that there is by then. Afterwards what was made counts as old. A process that is forked meanwhile looks.
    """
    on = gc.isenabled()
    gc.disable()
    _paused.extend([True] * on)
    try:
        yield
    finally:
        del _paused[: int(on)]
        if on and not gc.get_freeze_count():
            gc.freeze()
            gc.unfreeze()  # both together put all into the oldest generation, unseen
        if on:
            gc.enable()


@contextmanager
def deferred(*packages: str) -> Iterator[None]:
    """Within, ``import`` of these packages imports nothing yet, nor ``from package import function`` of those that are
    named "package:function"; those are left alone that are imported already, or not installed.
    """
    functions = dict(name.partition(":")[::2] for name in packages)
    for name, function in functions.items():
        spec = None if name in sys.modules else _spec(name)
        if spec is not None:
            sys.modules[name] = Deferred(name, function)
            sys.modules[name].__spec__, sys.modules[name].__file__ = spec, spec.origin
    try:
        yield
    finally:
        for name in functions:
            if isinstance(sys.modules.get(name), Deferred):
                del sys.modules[name]


@contextmanager
def imported_lean() -> Iterator[None]:
    """Within, diffusers, transformers and peft are imported without what they seldom use, and without delay."""
    with deferred(*RARE), uncollected():
        yield


def _called(package: str, name: str, *args: Any, **more: Any) -> Any:
    return getattr(importlib.import_module(package), name)(*args, **more)


def _spec(name: str) -> Any:
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError:  # what it is part of is not installed
        return None
