"""Weights & Biases: https://docs.wandb.ai. Charts are drawn over ``queries``; ``updates`` is beside it."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from rlfusion.common.errors import ConfigError
from rlfusion.common.user_code import described
from rlfusion.training.trackers.base import At, Ending, Followed, Opened, require_package

AXES = ("queries", "updates")
LOGIN_S = 60


@dataclass
class Wandb:
    """Weights & Biases, wandb(project='rlfusion', entity='', group='', tags='', mode='').

    Attributes:
        project: of the run.
        entity: the user or team that it is of; empty is the user who logged in.
        group: of runs that belong together.
        tags: by commas.
        mode: "online", or "offline", which writes into the run's folder (``wandb sync`` sends it); empty is what
            WANDB_MODE says, else "online".
    """

    project: str = "rlfusion"
    entity: str = ""
    group: str = ""
    tags: str = ""
    mode: Literal["", "online", "offline", "disabled"] = ""
    _run: Any = field(default=None, init=False, repr=False)

    def check(self) -> None:
        """Log in, where a server is meant; in a terminal wandb itself asks for the key."""
        require_package("wandb", "wandb")
        if (self.mode or os.environ.get("WANDB_MODE") or "online") != "online":
            return
        import wandb

        try:
            wandb.login(timeout=LOGIN_S)
        except Exception as error:  # wandb's own errors, and those of the network below it
            raise ConfigError(
                f"track = wandb: {described(error)}: expected an account (wandb login, or WANDB_API_KEY), "
                "or wandb(mode='offline')"
            ) from error

    def begin(self, run: Followed) -> Opened:
        import wandb

        self._run = wandb.init(
            entity=self.entity or None,
            project=self.project,
            dir=str(run.folder),
            id=run.resume or None,
            name=run.name,
            tags=[tag.strip() for tag in self.tags.split(",") if tag.strip()] or None,
            config=dict(run.config),
            allow_val_change=True,
            group=self.group or None,
            mode=self.mode or None,
            reinit="create_new",
            resume="allow" if run.resume else None,
            settings=wandb.Settings(console="off", silent=True),
        )
        for axis in AXES:
            self._run.define_metric(axis, hidden=True)
        self._run.define_metric("*", step_metric="queries")
        return Opened(self._run.id, str(run.folder / "wandb") if self._run.offline else self._run.url)

    def scalars(self, at: At, values: Mapping[str, float]) -> None:
        self._run.log({**values, **at._asdict()})

    def image(self, at: At, name: str, picture: np.ndarray, prompts: Sequence[str]) -> None:
        import wandb

        drawn = wandb.Image(picture.squeeze(), caption=" | ".join(prompts) or None)
        self._run.log({name: drawn, **at._asdict()})

    def text(self, name: str, text: str) -> None:
        self._run.config.update({name: text}, allow_val_change=True)

    def summary(self, values: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(values))

    def finish(self, status: Ending) -> None:
        self._run.summary.update({"status": status})
        self._run.finish(exit_code=1 if status == "failed" else 0)
