"""The run of a job: its folder, what becomes of that when it ends early, and the time that it takes."""

import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlfusion import config
from rlfusion.common import storage
from rlfusion.common.errors import ConfigError
from rlfusion.common.progress import Progress
from rlfusion.common.stops import NOTHING, Signals, StopRequested, blocked, leaving
from rlfusion.models import pipelines
from rlfusion.training.folders import discard, locked, make_root, new_folder, tell_folder


def timed(job: Callable[..., Any], settings: Any, folder: Path) -> tuple[Any, float]:
    """What a job in ``folder`` returns, and the seconds that it took."""
    begin = time.monotonic()
    with Signals() as signals, locked(folder):
        return job(settings, folder, signals, Progress()), time.monotonic() - begin


@contextmanager
def new_run(command: str, settings: Any, name: str) -> Iterator[tuple[Any, Path]]:
    """A new folder for a run, holding its complete settings as ``config.yaml``; the settings with the folder's name.

    Within the context the run is ``at_work`` there.

    Raises:
        ConfigError: a name that is none of a folder.
        StorageError: the folder cannot be made or written to.
    """
    if settings.name and (Path(settings.name).name != settings.name or settings.name == ".."):
        raise ConfigError(f"name = {settings.name!r}: expected the name of a folder, without a path")
    storage.require_local("root", settings.root)
    settings = recorded(settings)
    with ExitStack() as stack:
        make_root(Path(settings.root))
        with blocked():  # until it is known that it is to be removed
            folder = new_folder(Path(settings.root), settings.name or _short(name))
            stack.enter_context(at_work(command, folder, new=True))
        settings = replace(settings, name=folder.name)
        storage.write(folder / "config.yaml", config.to_yaml(settings))
        yield settings, folder


def _short(name: str) -> str:
    """A name made of settings, as a file system takes it."""
    return name.encode()[:200].decode(errors="ignore")


@contextmanager
def at_work(command: str, folder: Path, new: bool) -> Iterator[None]:
    """Within the context a run works in ``folder``. If it ends early, a ``new`` folder that holds nothing is removed,
    and a stop says how to go on.
    """

    def left(saved: bool) -> str:
        if new and not saved and discard(folder):
            return NOTHING
        return f"go on with: rlfusion {command} --resume {shlex.quote(str(folder))}"

    with leaving(left):
        tell_folder(folder)
        try:
            yield
        except StopRequested as stop:
            stop.left = left(stop.saved)
            raise
        except BaseException:
            if new:
                discard(folder)
            raise


def recorded(settings: Any) -> Any:
    """The settings with the prompts and the adapters of a pipeline, if any, as a run writes them down: with digests."""
    if not isinstance(settings, config.Finetune | config.Compare):
        return settings
    return replace(settings, pipeline=settings.pipeline.recorded(), lora=pipelines.recorded_lora(settings.lora))
