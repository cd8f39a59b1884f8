"""Runs of a comparison on the nodes of a Ray cluster: each a process (``rlfusion.cli.member``) that an actor starts,
with the cores and GPUs that it reserves. The folder of the comparison lies on storage that all nodes share: a node that
does not see it is refused.

What there is no room for yet waits in Ray, whose autoscaler is asked for it. A lost node leaves its run to another.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rlfusion.common.errors import ConfigError, UnavailableError
from rlfusion.common.weights import sha256
from rlfusion.config.compare import Compare
from rlfusion.jobs.compare import beside
from rlfusion.jobs.compare.beside import SAYS, Begin, log_of, tell
from rlfusion.jobs.compare.members import Member
from rlfusion.rollout.placement import Role

LOST = UnavailableError.exit_code
"""The exit code of a run whose node is lost."""


@contextmanager
def nodes(config: Compare, say: Callable[[str], None]) -> Iterator[Begin]:
    """Begins runs on the cluster that the settings name.

    Raises:
        RolloutError: no cluster answers there.
        DoesNotFit: not even one of the runs has a place, and none came within ``ray.wait_s``.
    """
    from rlfusion.rollout.ray_cluster import cluster
    from rlfusion.rollout.ray_placement import awaited

    role = config.role
    with cluster(config.ray.settings(config.threads)):
        awaited(config.ray.settings(config.threads), [role], say)
        yield partial(OnNode.start, role)


@dataclass
class OnNode:
    """A run on a node: its actor, what it was asked last, and whether its process is there."""

    member: Member
    host: Any
    asked: Any
    begun: bool = False

    @classmethod
    def start(cls, role: Role, member: Member, place: int, logs: Path) -> "OnNode":
        """Ask for a place, and for the process there once there is one."""
        from rlfusion.rollout.ray_hosts import host

        folder = member.folder.absolute()
        settings = folder / "config.yaml"
        files = {str(settings): sha256(settings.read_bytes())}
        words, log = [*beside.MEMBER, str(folder)], str(log_of(member, logs).absolute())
        actor = host(role)
        return cls(member, actor, actor.begin.remote(words, log, files, os.getcwd(), SAYS, bool(role.gpus)))

    def ended(self, stopped: bool) -> bool:
        """As ``Work.ended``.

        Raises:
            ConfigError: the node does not see the folder of the run.
        """
        from rlfusion.rollout.ray_hosts import NodeLost, answer, answered

        if not answered(self.asked):
            if stopped and not self.begun:
                self.member.problem = "stopped"
                self.kill()
            return stopped and not self.begun
        try:
            told = answer(self.asked)
        except NodeLost:
            self.member.code, self.member.problem = LOST, "died: its node, or its actor there, was lost"
            return True
        if self.begun and told is not None:
            tell(self.member, *told, stopped)
            self.kill()
            return True
        if not self.begun and told:
            raise ConfigError(f"{told}: expected root on storage that all nodes of the Ray cluster share")
        if stopped and not self.begun:  # it began as the stop came
            self.host.stop.remote()
        self.begun = True
        self.asked = self.host.ended.remote()
        return False

    def stop(self) -> None:
        """As ``Work.stop``; of one that has no place yet ``ended`` sees to it."""
        if self.begun:
            self.host.stop.remote()

    def kill(self) -> None:
        """As ``Work.kill``: the actor goes, and the process learns so by its standard input."""
        from rlfusion.rollout.ray_hosts import give_up

        give_up(self.host)
