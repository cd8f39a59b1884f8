"""Launching a run as a job of a Ray cluster, and going on with one."""

import json
import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from rlfusion import __version__, config
from rlfusion.common.errors import ConfigError
from rlfusion.config.launch import Jobs, Launch
from rlfusion.jobs.launch.arrival import SETTINGS
from rlfusion.jobs.launch.cluster import Cluster, Job, require_name
from rlfusion.jobs.launch.environment import runtime_env
from rlfusion.jobs.launch.inputs import Inputs
from rlfusion.models import pipelines

INSTALLED_S = 1800.0
"""Within which the libraries are installed on a node, or its image is there."""
SUPERVISE = ("restarts", "preemptions", "backoff_s")


@dataclass(frozen=True)
class Order:
    """What a job shall do.

    Attributes:
        command: finetune, ...
        folder: of the run, there.
        files: what travels, by its path in the working directory.
        changes: KEY=VALUE of a run that goes on.
        again: it goes on with a run that is there.
    """

    command: str
    folder: Path
    files: Mapping[str, bytes]
    changes: Sequence[str] = ()
    again: bool = False

    def told(self, settings: Launch, attempt: int) -> dict[str, Any]:
        """As ``arrival`` reads it."""
        return {
            "version": __version__,
            "command": self.command,
            "folder": str(self.folder),
            "attempt": max(attempt, 2) if self.again else attempt,
            "changes": list(self.changes),
            "supervise": {name: getattr(settings, name) for name in SUPERVISE},
        }


def new_order(settings: Launch, command: str, run: Any, say: Callable[[str], None]) -> Order:
    """The order of a new run with the settings ``run``, which are as they were read here; it has no name as long as
    nobody gave it one.

    Raises:
        ConfigError: a root that is no place on the cluster, or a file that is not here or too large.
    """
    root = Path(run.root)
    if not root.is_absolute():
        raise ConfigError(
            f"root = {run.root!r} would lie in the job's working directory, which goes with the job: expected an "
            "absolute path of storage that the nodes share, or of the head node's own disk, such as --root /shared/runs"
        )
    if isinstance(run, config.Finetune | config.Compare):
        run = replace(run, pipeline=run.pipeline.recorded(), lora=pipelines.recorded_lora(run.lora))
    inputs = Inputs(root, (root, *(Path(folder).absolute() for folder in settings.shared)))
    held = inputs.translated(asdict(run))
    _require_known(settings, inputs)
    if isinstance(held.get("ray"), dict):
        held["ray"] = _at_home(held["ray"], settings)
    for path in sorted({path.split("/")[2] for path in inputs.files}):
        say(f"takes along: {path}")
    text = yaml.safe_dump(held, sort_keys=False)
    return Order(command, root / (run.name or run.default_name), {**inputs.files, SETTINGS: text.encode()})


def _at_home(ray: Mapping[str, Any], settings: Launch) -> dict[str, Any]:
    """Ray's settings in a job: its workers are those of the cluster, and the first on each node waits until the
    libraries are installed there. The runs of a comparison (``parts.Nodes``) stay with the job unless they have an
    address.
    """
    if "cpus_per_run" in ray and not ray["address"]:
        return dict(ray)
    made = {**ray, "address": ray["address"] or "auto"}
    if settings.env == "none":
        return made
    made |= {"connect_timeout_s": max(ray["connect_timeout_s"], INSTALLED_S)}
    if "limits" not in ray:
        return made
    return made | {"limits": {**ray["limits"], "start_s": max(ray["limits"]["start_s"], INSTALLED_S)}}


def _require_known(settings: Launch, inputs: Inputs) -> None:
    """Refuse the user's own modules that nothing brings to the nodes."""
    if settings.env in ("pip", "uv") and not settings.packages and inputs.modules:
        module, place = next(iter(inputs.modules.items()))
        raise ConfigError(
            f"module {module!r} of {place} does not travel: expected path/to/file.py:name in its place, or --packages "
            "with the package that has it"
        )


def submit(settings: Launch, order: Order, named: bool = True) -> tuple[Cluster, Job]:
    """Submit a job. Where nobody named it, a name that is taken gets a number behind it.

    Raises:
        ConfigError: a job of that name is there already, or the one to go on with has not ended yet.
        UnavailableError: no cluster answers.
    """
    cluster = Cluster(settings)
    jobs, name = cluster.jobs(), order.folder.name
    if not named:
        name = next(one for n in count(1) if (one := name if n == 1 else f"{name}-{n}") not in jobs)
    require_name(name)
    before = jobs.get(name)
    if before is not None and not order.again:
        raise ConfigError(
            f"name = {name!r}: a job of that name is at {cluster.address} already ({before.state.lower()}), expected "
            f"another --name, or rlfusion jobs resume {name}"
        )
    if before is not None and not before.ended:
        raise ConfigError(f"job {name!r} is {before.state.lower()}: expected rlfusion jobs stop {name} first, or later")
    attempt = before.attempt + 1 if before else 1
    order = replace(order, folder=order.folder.parent / name)
    told, files = order.told(settings, attempt), dict(order.files)
    if SETTINGS in files:
        files[SETTINGS] = yaml.safe_dump(yaml.safe_load(files[SETTINGS]) | {"name": name}, sort_keys=False).encode()
    about = {"version": __version__, "command": order.command, "folder": str(order.folder), "launch": _kept(settings)}
    with tempfile.TemporaryDirectory(prefix="rlf-launch-") as place:
        environment = runtime_env(settings, told, files, Path(place))
        words = [settings.python, "-m", "rlfusion.jobs.launch.arrival", order.command, str(order.folder)]
        return cluster, cluster.submit(name, attempt, shlex.join(words), environment, about)


def resume(connection: Jobs, name: str, changes: Sequence[str], follow: bool) -> tuple[Cluster, Job]:
    """Go on with the run of a job that has ended, as it was launched.

    Raises:
        ConfigError: no such job, or one that runs, or is done and shall not change.
    """
    job = Cluster(connection).job(name)
    if job.state == "SUCCEEDED" and not changes:
        raise ConfigError(f"job {name!r} is done: expected --change KEY=VALUE, such as --change updates=48, or nothing")
    held = json.loads(job.metadata["launch"]) | asdict(connection)
    order = Order(job.metadata["command"], Path(job.metadata["folder"]), {}, tuple(changes), again=True)
    return submit(Launch(**held, follow=follow), order)


def _kept(settings: Launch) -> str:
    """What of the settings a resumed job has again, as text."""
    own = {f.name for f in fields(Launch)} - {f.name for f in fields(Jobs)} - {"follow"}
    return json.dumps({name: value for name, value in asdict(settings).items() if name in own})
