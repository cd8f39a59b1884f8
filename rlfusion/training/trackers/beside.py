"""All trackers of a run. A run that resumes goes on in the same runs of its trackers: ``trackers.json`` names them.

What a resumed run repeats, bit for bit, a tracker that knew the run already has, and does not get twice; one that is
new to the run gets first what ``metrics.jsonl`` has of it.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Lock
from typing import Any, Literal

import numpy as np

from rlfusion.common import storage
from rlfusion.common.code_files import label
from rlfusion.common.errors import ConfigError
from rlfusion.common.stops import StopRequested
from rlfusion.training.trackers import make_tracker
from rlfusion.training.trackers.base import At, Ending, Followed, RunTracker
from rlfusion.training.trackers.feed import Feed

FILE = "trackers.json"
QUERIES = "train/queries"
Failures = Literal["warn", "stop"]


@dataclass
class Beside:
    """The trackers of one run, fed from where TensorBoard is.

    Attributes:
        known: those that go on in a run that they had begun before.
        new: those that begin one.
        asks: whether the run asks for rewards, over which runs are compared; else ``At.queries`` is its updates, as
            the one axis of some trackers.
    """

    known: list[tuple[Feed, RunTracker]] = field(default_factory=list)
    new: list[tuple[Feed, RunTracker]] = field(default_factory=list)
    asks: bool = True
    _sent: set[str] = field(default_factory=set)
    _queries: int = 0

    def resumed(self, lines: Iterable[tuple[str, Mapping[str, Any]]], step: int) -> None:
        """Take over the lines of metrics.jsonl, of which those up to ``step`` stay; none for 0. None is sent twice."""
        for line, record in lines:
            known = line in self._sent
            self._sent.add(line)
            if not known and 0 < step >= record["step"]:
                at = self._at(record["step"], record)
                values = {name: value for name, value in record.items() if name != "step"}
                self._all(self.new, "scalars", at, values)

    def scalars(self, step: int, line: str, values: Mapping[str, float]) -> None:
        """Figures by tag, which metrics.jsonl has as ``line``."""
        at, again = self._at(step, values), line.rstrip("\n") in self._sent
        self._sent.add(line.rstrip("\n"))
        self._all(self.new if again else [*self.known, *self.new], "scalars", at, dict(values))

    def beside(self, step: int, values: Mapping[str, float]) -> None:
        """Figures by tag that metrics.jsonl has not."""
        self._all([*self.known, *self.new], "scalars", self._at(step, {}), dict(values))

    def image(self, step: int, name: str, picture: np.ndarray, prompts: Sequence[str]) -> None:
        """A picture (H, W, C) of 8-bit levels, and the prompts of its columns."""
        self._all([*self.known, *self.new], "image", self._at(step, {}), name, picture, tuple(prompts))

    def text(self, name: str, text: str) -> None:
        """A text, as Markdown."""
        self._all([*self.known, *self.new], "text", name, text)

    def summary(self, values: Mapping[str, float]) -> None:
        """The final figures."""
        self._all([*self.known, *self.new], "summary", dict(values))

    def close(self, status: Ending) -> None:
        """The run is over."""
        for feed, tracker in [*self.known, *self.new]:
            feed.close(partial(tracker.finish, status))

    def _at(self, step: int, values: Mapping[str, Any]) -> At:
        if not self.asks:
            return At(step, step)
        self._queries = int(values.get(QUERIES, self._queries))
        return At(step, self._queries if step else 0)

    def _all(self, feeds: Iterable[tuple[Feed, RunTracker]], method: str, *given: Any) -> None:
        for feed, tracker in feeds:
            feed.put(partial(getattr(tracker, method), *given))


@contextmanager
def following(
    texts: Sequence[str], failures: Failures, run: Followed, say: Callable[[str], None], asks: bool = True
) -> Iterator[Beside]:
    """The trackers of these ``texts`` while ``run``, which ``asks`` for rewards or not, is at work, and which then hear
    how it ended. Of several ranks the first has them.

    Raises:
        UnavailableError: with ``failures`` "stop" one failed.
    """
    beside = Beside(asks=asks)
    status: Ending = "failed"
    try:
        _begin(beside, texts if storage.writes() else (), failures == "stop", run, say)
        yield beside
        status = "finished"
    except (StopRequested, KeyboardInterrupt):
        status = "stopped"
        raise
    finally:
        beside.close(status)


def _begin(beside: Beside, texts: Sequence[str], strict: bool, run: Followed, say: Callable[[str], None]) -> None:
    ids, lock = _ids(run) if texts else {}, Lock()
    for text in texts:
        tracker, feed = make_tracker(text), Feed(label(text), say, strict)
        (beside.known if text in ids else beside.new).append((feed, tracker))

        def begin(tracker: RunTracker = tracker, text: str = text) -> None:
            opened = tracker.begin(replace(run, resume=ids.get(text, "")))
            if opened.where:
                say(f"tracked by {label(text)}: {opened.where}")
            with lock:
                ids[text] = opened.id
                storage.write(run.folder / FILE, json.dumps(ids, indent=1))

        feed.put(begin)


def _ids(run: Followed) -> dict[str, str]:
    """By which ids the trackers of earlier know the run.

    Raises:
        ConfigError: the file is damaged.
    """
    file = run.folder / FILE
    if not file.is_file():
        return {}
    try:
        held = json.loads(file.read_text())
        if not isinstance(held, dict) or not all(isinstance(value, str) for value in held.values()):
            raise ValueError("expected {tracker: id}")
        return held
    except ValueError as error:
        raise ConfigError(
            f"{str(file)!r} is damaged ({error}): remove it, and the trackers begin new runs of this one"
        ) from error
