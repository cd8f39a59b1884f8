"""Runs that are at work side by side, in one compact table: redrawn in a terminal, elsewhere a line at times."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlfusion.common.jsonl import read_lines
from rlfusion.common.progress import Progress, Rows
from rlfusion.jobs.compare.members import Member
from rlfusion.training import timing

HEAD = ("run", "updates", "queries", "gain")
DRAW_S, LINE_S = 1.0, 30.0
"""Seconds between two looks in a terminal, and between two lines elsewhere."""


@dataclass(frozen=True)
class Sight:
    """How far a run is: updates done, rewards asked for, its last gain, and whether its monitor has raised an alarm."""

    updates: int = 0
    queries: int = 0
    gain: float | None = None
    alarm: bool = False

    @classmethod
    def of(cls, folder: Path) -> "Sight":
        """From its folder, whatever it has written yet."""
        last = timing.last_of(folder)
        lines = [record for _, record in read_lines(folder / "metrics.jsonl")[0]]
        gains = [line["evaluation/gain"] for line in lines if "evaluation/gain" in line]
        alarm = any(line.get("monitor/alarms") for line in lines)
        return cls(int(last.get("step", 0)), int(last.get("queries", 0)), gains[-1] if gains else None, alarm)

    @property
    def come(self) -> str:
        """Its gain, as a cell shows it."""
        return f"{'-' if self.gain is None else f'{self.gain:+.2f}'}{' !' if self.alarm else ''}"


class Watching:
    """Tells of ``count`` runs while they are at work."""

    def __init__(self, count: int, progress: Progress, rows: Rows) -> None:
        self.count, self.done, self.progress, self.rows = count, 0, progress, rows
        self.begun, self.shown = time.monotonic(), -math.inf

    def ended(self, member: Member) -> None:
        """A run has ended: a line about it, in a terminal above the table."""
        self.done += 1
        sight = Sight.of(member.folder)
        told = member.problem or f"gain {sight.come}, {sight.queries:,} queries"
        self.progress.say(f"[{self.done}/{self.count}] {member}: {told}")

    def show(self, at_work: Sequence[Member]) -> None:
        """Look at those that are at work, if it is time to."""
        if time.monotonic() - self.shown < (DRAW_S if self.rows.drawn else LINE_S):
            return
        self.shown = time.monotonic()
        seen = [(member, Sight.of(member.folder)) for member in at_work]
        if self.rows.drawn:
            self.rows.show(self._head(len(seen)), [row(*one) for one in seen])
        elif seen:
            told = "; ".join(f"{m} {s.updates}/{m.settings.updates} updates, gain {s.come}" for m, s in seen)
            self.progress.say(f"{self._head(len(seen))}: {told}")

    def _head(self, at_work: int) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self.begun), 60)
        waiting = self.count - self.done - at_work
        return f"{minutes}:{seconds:02} {self.done} of {self.count} runs done, {at_work} at work, {waiting} wait"


def row(member: Member, sight: Sight) -> list[str]:
    """The cells of a run under ``HEAD``."""
    return [str(member), f"{sight.updates}/{member.settings.updates}", f"{sight.queries:,}", sight.come]
