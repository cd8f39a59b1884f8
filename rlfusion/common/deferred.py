"""Packages that a library imports as it begins, for features that are rarely used: imported at their first use instead.

diffusers imports bitsandbytes and scipy.stats wherever they are installed, for weights in 8 bits and for schedulers
with "beta" noise levels: 70 MB and some seconds. While it begins, a ``Deferred`` module stands for such a package. The
library keeps it, under the package's name, and its first use imports the package itself.
"""

import importlib
import importlib.util
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

SPEAK = ("bitsandbytes.backends.cpu.ops", "torch.utils._pytree")
"""Loggers that warn as diffusers or peft imports bitsandbytes and torchao, of what is not used here."""


def quieten() -> None:
    """Let them warn no more."""
    for name in SPEAK:
        logging.getLogger(name).setLevel(logging.ERROR)


class Deferred(ModuleType):
    """Stands for a package, whose names it imports when they are read."""

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get(self.__name__) is self:  # something needs it now, within the block
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


@contextmanager
def deferred(*packages: str) -> Iterator[None]:
    """Within, ``import`` of these packages imports nothing yet; those are left alone that are imported already, or not
    installed.
    """
    for name in packages:
        spec = None if name in sys.modules else _spec(name)
        if spec is not None:
            sys.modules[name] = Deferred(name)
            sys.modules[name].__spec__, sys.modules[name].__file__ = spec, spec.origin
    try:
        yield
    finally:
        for name in packages:
            if isinstance(sys.modules.get(name), Deferred):
                del sys.modules[name]


def _spec(name: str) -> Any:
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError:  # what it is part of is not installed
        return None
