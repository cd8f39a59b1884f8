"""A job in the hands of a group of ranks: the driver's side, which shows and stops it, and a rank's, which does it.

Every rank does the same job on the same settings. The first writes the run's folder and speaks; the others write
nothing. What is to be learned from is shared among them (``training.ranks``).
"""

import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rlfusion import config
from rlfusion.cli.arguments import settings_of
from rlfusion.common import storage
from rlfusion.common.code_files import pinned
from rlfusion.common.errors import StorageError
from rlfusion.common.progress import Bar, Progress
from rlfusion.common.stops import Signals, StopRequested
from rlfusion.jobs import pretrain_autoencoder
from rlfusion.jobs.distill import distill
from rlfusion.jobs.finetune import finetune
from rlfusion.jobs.pretrain import pretrain
from rlfusion.jobs.roles import roles
from rlfusion.rollout.placement import private
from rlfusion.training.folders import own_mark, require_held, works_for
from rlfusion.training.ranks import Ranks, current, joined

JOBS: dict[str, Callable[..., Any]] = {
    "finetune": finetune,
    "pretrain": pretrain,
    "pretrain-autoencoder": pretrain_autoencoder.run,
    "distill": distill,
}
"""The jobs that a group can do."""

Ranked = config.Finetune | config.Pretrain | config.Autoencode | config.Distill


def ranked(command: str) -> Callable[..., Any]:
    """The job of ``command``, in this process or, by ``learner.ranks``, in a group of others."""
    here = JOBS[command]

    def job(settings: Ranked, folder: Path, signals: Signals, progress: Progress) -> Any:
        if not settings.learner.ranks:
            with joined(Ranks(shares=settings.learner.shares, exact=settings.learner.exact)):
                return here(settings, folder, signals, progress)
        return _in_group(command, settings, folder, signals, progress)

    return job


def _in_group(command: str, settings: Ranked, folder: Path, signals: Signals, progress: Progress) -> Any:
    from rlfusion.rollout.ray_cluster import shared_cluster
    from rlfusion.rollout.ray_placement import together
    from rlfusion.rollout.ray_ranks import GroupSettings, run_in_group

    payload = {"command": command, "config": config.to_yaml(settings), "folder": str(folder.resolve())}
    payload["mark"] = own_mark(folder)
    replay, held, backend = _Replay(progress), settings.learner, settings.settings
    wanted, driver = roles(settings)
    group = GroupSettings(
        *(held.ranks, held.shares, held.exact, held.cpus_per_rank, held.gpus_per_rank, settings.threads, held.restarts),
        *(held.timeout_s, not backend.address, held.resources_per_rank),
        start_s=backend.limits.start_s,
        placing=backend.placing,
    )
    try:
        with (
            shared_cluster(backend, *private(wanted)),
            replay,
            together(backend, wanted, driver, progress.say),
        ):
            signals.hold(True)  # a stop is for the ranks to answer, once their step is done and saved
            result = run_in_group(
                group,
                f"{__name__}:work",
                payload,
                replay,
                lambda: int(getattr(signal, signals.requested, 0)) if signals.requested else 0,
            )
    finally:
        signals.hold(False)
    if isinstance(result, dict) and "stopped" in result:
        signals.saved = result["saved"]
        raise StopRequested(result["stopped"], result["saved"])
    return result


class _Replay(AbstractContextManager["_Replay"]):
    """Shows on a terminal what a rank says."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.shown = progress, ExitStack()
        self.bar: Bar | None = None

    def __call__(self, event: tuple[str, Any]) -> None:
        kind, held = event
        if kind == "say":
            self.progress.say(held)
        elif kind == "begin":
            self.bar = self.shown.enter_context(self.progress.bar(*held))
        elif kind == "advance" and self.bar is not None:
            self.bar.advance(**held)
        elif kind == "end":
            self.shown.close()

    def __exit__(self, *_: object) -> None:
        self.shown.close()


def work(payload: dict[str, Any], actor: Any) -> Any:
    """A rank's part: the job, from plain data. What it says goes to ``actor``.

    Raises:
        StorageError: the run's folder is not there on this machine.
        ConfigError: another driver has taken the run.
    """
    folder = Path(payload["folder"])
    if not folder.is_dir():
        raise StorageError(2, "a rank finds no such folder: the root must be storage that all nodes share", str(folder))
    works_for(folder, payload["mark"])
    require_held(folder)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(payload["config"])
        file.flush()
        settings = settings_of(payload["command"], ["--config", file.name])
    first = current().rank == 0
    signals = _Told(actor, folder)
    with pinned(payload), nullcontext() if first else storage.silent():
        try:
            return JOBS[payload["command"]](settings, folder, signals, _Telling(actor) if first else Progress(True))
        except StopRequested as stop:
            return {"stopped": int(stop.number), "saved": stop.saved}


class _Told(Signals):
    """The signals of a rank: those of the driver, which its actor is told of. Whoever asks for them learns too whether
    another driver has taken the run: a rank may outlive its own one.
    """

    def __init__(self, actor: Any, folder: Path) -> None:
        super().__init__()
        self.actor, self.folder = actor, folder

    @property
    def requested(self) -> str:
        require_held(self.folder)
        return signal.Signals(self.actor.stop).name if self.actor.stop else ""

    @requested.setter
    def requested(self, name: str) -> None:
        """It is the actor's to say."""

    def check(self) -> None:
        require_held(self.folder)
        if self.actor.stop:
            raise StopRequested(self.actor.stop, self.saved)

    @contextmanager
    def prompt(self) -> Iterator[None]:
        """A rank never stops by itself in the middle of a step."""
        yield


class _Telling(Progress):
    """The terminal of the first rank is the driver's."""

    def __init__(self, actor: Any) -> None:
        super().__init__(quiet=True)
        self.actor = actor

    def say(self, text: str) -> None:
        self.actor.say("say", text)

    @contextmanager
    def bar(self, name: str, total: int, start: int = 0) -> Iterator[Any]:
        self.actor.say("begin", (name, total, start))
        try:
            yield self
        finally:
            self.actor.say("end", None)

    def advance(self, **values: float) -> None:
        """Of the bar."""
        self.actor.say("advance", values)
