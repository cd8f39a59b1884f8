"""A process on a node of a Ray cluster: an actor reserves its cores and GPUs, starts it, and tells how it has ended.

The standard input of the process is a pipe of the actor: where the actor is lost, a process that reads it learns so.
"""

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError

from rlfusion.common.logs import last_line
from rlfusion.rollout.placement import Role

SEEN_S = 15.0
"""Within which a file that was just written is there on another node: a network's file system may take its time."""
POLL_S = 0.2
OWN = "RAY_"
"""Of the environment of an actor what is Ray's own is not for a process that may start a cluster of its own."""

Ended = tuple[int, str]
"""The exit code of a process, -N for signal N; and the last line that it has said of those that begin as asked."""


class NodeLost(Exception):
    """The actor is gone: its node, or its process there."""


class Host:
    """The actor."""

    def begin(self, words: Sequence[str], log: str, files: Mapping[str, str], cwd: str, starts: str, gpus: bool) -> str:
        """Start ``python WORDS`` with its output behind what ``log`` holds; "" where it was, else the first of the
        ``files``, {path: SHA-256}, that is not so on this node, and the node's name.

        Args:
            cwd: the working directory, if this node has it.
            starts: how the line of ``ended`` begins.
            gpus: whether it may use GPUs: those of this actor.
        """
        if missing := _missing(files):
            return f"node {os.uname().nodename} does not see {missing} as it was written"
        environment = {name: value for name, value in os.environ.items() if not name.startswith(OWN)}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        if not gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        self.log, self.starts = Path(log), starts
        try:
            self._start(words, cwd if Path(cwd).is_dir() else None, environment)
        except OSError as error:
            return f"node {os.uname().nodename} cannot start it: {error}"
        return ""

    def _start(self, words: Sequence[str], cwd: str | None, environment: dict[str, str]) -> None:
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, *words],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                cwd=cwd,
                env=environment,
                process_group=0,
            )
            self.at = out.tell()

    def ended(self) -> Ended | None:
        """How it has ended, None while it works."""
        code = self.process.poll()
        return None if code is None else (code, last_line(self.log, self.at, self.starts))

    def stop(self) -> None:
        """Ask it to save its work and to end."""
        self.process.terminate()

    def pid(self) -> int:
        """The process's number on its node."""
        return self.process.pid


def host(role: Role) -> Any:
    """The actor of one of a role: it waits for a place, where there is none yet."""
    own = {name: n for name, n in role.each.items() if name in role.resources}
    options = {"num_cpus": role.cpus, "num_gpus": role.gpus, "resources": own, "max_restarts": 0}
    return ray.remote(Host).options(**options).remote()


def answered(asked: Any) -> bool:
    """Whether an actor has answered, or is gone."""
    return bool(ray.wait([asked], timeout=0)[0])


def answer(asked: Any) -> Any:
    """What it has answered. Raises NodeLost."""
    try:
        return ray.get(asked)
    except RayActorError as error:
        raise NodeLost(str(error)) from error


def give_up(host: Any) -> None:
    """End an actor: its process learns so by its standard input."""
    ray.kill(host)


def _missing(files: Mapping[str, str]) -> str:
    """The first of these files that has not this SHA-256 here, "" for none."""
    deadline = time.monotonic() + SEEN_S
    while lost := next((path for path, digest in files.items() if _sha256(path) != digest), ""):
        if time.monotonic() > deadline:
            return lost
        time.sleep(POLL_S)
    return ""


def _sha256(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return ""
