"""MLflow: a folder, a database or a server. The step of a metric is ``queries``; ``updates`` is a metric beside it."""

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from rlfusion.training.trackers.base import At, Ending, Followed, Opened, require_package

MOST_METRICS, MOST_PARAMS, LONGEST_PARAM = 1000, 100, 500
"""What MLflow takes at a time, and characters of a parameter that every version and store of it takes."""
STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


@dataclass
class Mlflow:
    """MLflow, mlflow(experiment='rlfusion', uri='').

    Attributes:
        experiment: that the run is of; it is made where it is not there.
        uri: http://host:port, sqlite:///file.db, or a folder; empty is what MLFLOW_TRACKING_URI says, else MLflow's own
            default.
    """

    experiment: str = "rlfusion"
    uri: str = ""
    _client: Any = field(default=None, init=False, repr=False)
    _id: str = field(default="", init=False, repr=False)
    _last: At = field(default=At(0, 0), init=False, repr=False)

    def check(self) -> None:
        require_package("mlflow", "mlflow")

    def begin(self, run: Followed) -> Opened:
        import mlflow
        from mlflow.entities import Param

        self._client = mlflow.MlflowClient(tracking_uri=self.uri or None)
        self._id = run.resume
        if run.resume:
            self._client.update_run(run.resume, status="RUNNING")
        else:
            known = self._client.get_experiment_by_name(self.experiment)
            held = known.experiment_id if known is not None else self._client.create_experiment(self.experiment)
            self._id = self._client.create_run(held, run_name=run.name).info.run_id
            params = [Param(_allowed(k), str(v)[:LONGEST_PARAM]) for k, v in run.config.items()]
            for some in _at_most(MOST_PARAMS, params):
                self._client.log_batch(self._id, params=some)
        self._client.log_dict(self._id, dict(run.config), "config.json")
        return Opened(self._id, f"run {self._id} of the experiment {self.experiment!r} at {self._client.tracking_uri}")

    def scalars(self, at: At, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        self._last, now = at, int(time.time() * 1000)
        named = {_allowed(name): value for name, value in values.items()} | {"updates": at.updates}
        metrics = [Metric(name, float(value), now, at.queries) for name, value in named.items()]
        for some in _at_most(MOST_METRICS, metrics):
            self._client.log_batch(self._id, metrics=some)

    def image(self, at: At, name: str, picture: np.ndarray, prompts: Sequence[str]) -> None:
        self._client.log_image(self._id, picture, key=_allowed(name), step=at.queries)
        if prompts:
            self._client.log_text(self._id, "\n".join(prompts), f"prompts/{_allowed(name)}.txt")

    def text(self, name: str, text: str) -> None:
        self._client.log_text(self._id, text, f"{_allowed(name)}.md")

    def summary(self, values: Mapping[str, Any]) -> None:
        self.scalars(self._last, values)

    def finish(self, status: Ending) -> None:
        self._client.set_terminated(self._id, status=STATUS[status])


def _allowed(name: str) -> str:
    """A name in the characters that MLflow takes."""
    return re.sub(r"[^\w\-. /]", "_", name, flags=re.ASCII)


def _at_most(most: int, parts: Iterable[Any]) -> Iterator[list[Any]]:
    rest = iter(parts)
    while some := list(islice(rest, most)):
        yield some
