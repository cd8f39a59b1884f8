"""The settings of ``rlfusion launch`` and ``rlfusion jobs``."""

import math
from dataclasses import dataclass, field
from typing import Literal

from rlfusion.common.errors import ConfigError, require_not_negative, require_positive

Env = Literal["pip", "uv", "container", "none"]


@dataclass(frozen=True)
class Jobs:
    """Ask the jobs of a Ray cluster.

    Attributes:
        address: of the cluster's dashboard, http://host:port or https://host:port; empty takes RAY_API_SERVER_ADDRESS
            of the environment, or http://127.0.0.1:8265.
        ca: a file of certificates by which an https address is trusted; empty takes the system's.
        timeout_s: within which each answer must come.
    """

    address: str = ""
    ca: str = ""
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        require_positive(self, "timeout_s")


@dataclass(frozen=True)
class Launch(Jobs):
    """Run a command that makes a run as a job of a Ray cluster: rlfusion launch finetune ... --root /shared/runs.

    All other settings are the command's. Its root must be an absolute path, of storage that the nodes share, or of the
    head node alone where nothing but the head node reads it.

    Attributes:
        follow: print the job's log until it ends, and end with its exit code.
        env: how the libraries that rlfusion needs come to the nodes: "pip" and "uv" let Ray install what is missing
            there, "container" runs the job in ``image``, "none" uses what is there. rlfusion itself always travels,
            but into a container.
        image: of env container: it has Ray, the libraries, and rlfusion of this version.
        extras: of env pip or uv: extras of rlfusion to install, such as clip or models.
        packages: of env pip or uv: further packages to install, such as those that your own code needs.
        shared: folders that are the same here and on the nodes: what settings name in them is left there. The root is
            one.
        python: the Python with Ray, on the head node.
        stop_s: for which a job that is told to stop may finish and save its step, before it is killed.
        restarts: of supervise.
        preemptions: of supervise.
        backoff_s: of supervise.
    """

    follow: bool = False
    env: Env = "pip"
    image: str = ""
    extras: list[str] = field(default_factory=list)
    packages: list[str] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)
    python: str = "python"
    stop_s: float = 300.0
    restarts: int = 5
    preemptions: int = 100
    backoff_s: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "stop_s")
        require_not_negative(self, "restarts", "preemptions", "backoff_s")
        if self.env == "container" and not self.image:
            raise ConfigError("image = '': env container runs the job in an image, expected --image NAME")
        if self.env != "container" and self.image:
            raise ConfigError(f"image = {self.image!r} with env {self.env}: expected --env container")
        if self.env not in ("pip", "uv") and (self.extras or self.packages):
            raise ConfigError(f"extras, packages with env {self.env}, which installs nothing: expected --env pip or uv")
        if not self.python.strip():
            raise ConfigError("python = '': expected the Python with Ray on the head node, such as python")

    @property
    def patience_s(self) -> int:
        """Whole seconds of ``stop_s``, as Ray takes them."""
        return math.ceil(self.stop_s)
