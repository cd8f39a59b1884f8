"""The settings of ``rlfusion push``."""

import re
from dataclasses import dataclass
from typing import Literal

from rlfusion.common.errors import ConfigError

REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


@dataclass(frozen=True)
class Push:
    """Write a run's model with its card, and upload it to the hub: rlfusion push runs/NAME --to USER/REPO.

    Attributes:
        run: folder of a run of finetune.
        to: the repository, OWNER/NAME; it is made where it is not there.
        which: "model", the last one, or "best", the monitor's best so far.
        dry_run: write the folder, and upload nothing.
        out: the folder to write, empty is RUN/hub. What an earlier push of the run wrote there is written anew; what
            else is there is refused.
        private: make a new repository a private one.
        license: of the model, in the hub's words (apache-2.0, openrail, ...); empty is that of the base where that says
            it, else unknown.
    """

    run: str
    to: str
    which: Literal["model", "best"] = "model"
    dry_run: bool = False
    out: str = ""
    private: bool = False
    license: str = ""

    def __post_init__(self) -> None:
        if not REPO.fullmatch(self.to) or ".." in self.to or "--" in self.to:
            raise ConfigError(f"to = {self.to!r}: expected a repository of the hub, OWNER/NAME")
        if self.license and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", self.license):
            raise ConfigError(f"license = {self.license!r}: expected a word such as apache-2.0 or openrail")
