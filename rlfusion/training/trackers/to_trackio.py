"""Trackio, whose runs lie on this machine or in a Space of Hugging Face. The step is ``queries``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlfusion.training.trackers.base import At, Ending, Followed, Opened, require_package


@dataclass
class Trackio:
    """Trackio, trackio(project='rlfusion', group='', space='').

    Attributes:
        project: of the run.
        group: of runs that belong together.
        space: a Space of Hugging Face, USER/NAME, to log to; empty logs on this machine.
    """

    project: str = "rlfusion"
    group: str = ""
    space: str = ""
    _run: Any = field(default=None, init=False, repr=False)
    _last: At = field(default=At(0, 0), init=False, repr=False)

    def check(self) -> None:
        require_package("trackio", "trackio")

    def begin(self, run: Followed) -> Opened:
        import trackio

        self._run = trackio.init(
            project=self.project,
            name=run.resume or run.name,
            group=self.group or None,
            space_id=self.space or None,
            config=dict(run.config),
            resume="allow" if run.resume else "never",
            embed=False,
        )
        where = (
            f"https://huggingface.co/spaces/{self.space}" if self.space else f"trackio show --project {self.project}"
        )
        return Opened(self._run.name, where)

    def scalars(self, at: At, values: Mapping[str, float]) -> None:
        self._last = at
        self._run.log({**values, "updates": at.updates}, step=at.queries)

    def image(self, at: At, name: str, picture: np.ndarray, prompts: Sequence[str]) -> None:
        import trackio

        colours = np.broadcast_to(picture, (*picture.shape[:2], 3)).copy()
        self._run.log({name: trackio.Image(colours, caption=" | ".join(prompts) or None)}, step=at.queries)

    def text(self, name: str, text: str) -> None:
        import trackio

        self._run.log({name: trackio.Markdown(text)}, step=self._last.queries)

    def summary(self, values: Mapping[str, Any]) -> None:
        self._run.log(dict(values), step=self._last.queries)

    def finish(self, status: Ending) -> None:
        self._run.log({"status": status}, step=self._last.queries)
        self._run.finish()
