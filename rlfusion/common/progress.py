"""Live progress in the terminal: bars, tables, and lines between them. Elsewhere (a file, a log) lines at times."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Column, Table

from rlfusion.common.manner import manner

WIDTH = 80
"""Columns of a table at most."""


TENTHS, FEWEST_S, LINE_S = 10, 2.0, 30.0
"""Outside a terminal a line is due each tenth of the way, but for so many seconds after the last; and after so many."""


class Bar(Protocol):
    """One bar, or what stands for it."""

    def advance(self, **values: float) -> None:
        """One step on, with these values beside the bar."""


class Drawn:
    """A bar in a terminal."""

    def __init__(self, rich: RichProgress, task: int) -> None:
        self._rich, self._task = rich, task

    def advance(self, **values: float) -> None:
        """As ``Bar.advance``."""
        self._rich.update(self._task, advance=1, values=worded(values))


class Told:
    """A bar outside a terminal: a line each tenth of the way, or each 30 seconds; none of what takes two."""

    def __init__(
        self, say: Callable[[str], None], name: str, total: int, start: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._say, self._name, self._total, self._start, self._clock = say, name, total, start, clock
        self._done = self._told = start
        self._begun = self._last = clock()

    def advance(self, **values: float) -> None:
        """As ``Bar.advance``."""
        self._done += 1
        now = self._clock()
        further = TENTHS * self._done // self._total > TENTHS * self._told // self._total
        if now - self._last < (FEWEST_S if further else LINE_S):
            return
        self._told, self._last, gone = self._done, now, now - self._begun
        left = gone / (self._done - self._start) * (self._total - self._done)
        share = f"{self._name} {self._done}/{self._total} ({100 * self._done // self._total} %)"
        figures = f": {shown}" if (shown := worded(values)) else ""
        self._say(f"{share}, {_seconds(gone)} so far, {_seconds(left)} to go{figures}")


def worded(values: Mapping[str, float]) -> str:
    """Figures by name, as a bar shows them."""
    return "  ".join(f"{name} {value:.3g}" for name, value in values.items())


def _seconds(count: float) -> timedelta:
    return timedelta(seconds=round(count))


class Rows:
    """A table that is drawn again and again, in a terminal; elsewhere not at all. ``head`` are its columns: the first
    has what room the others leave.
    """

    def __init__(self, live: Live | None, head: Sequence[str], width: int) -> None:
        self._live, self._head, self._width = live, head, min(WIDTH, width)

    @property
    def drawn(self) -> bool:
        """Whether anybody sees it."""
        return self._live is not None

    def show(self, title: str, rows: Sequence[Sequence[str]]) -> None:
        """Draw these rows in place of those before."""
        if self._live is not None:
            self._live.update(self.table(title, rows), refresh=True)

    def table(self, title: str, rows: Sequence[Sequence[str]]) -> Table:
        """What is drawn."""
        table = Table(title=title, box=None, width=self._width, pad_edge=False)
        for number, name in enumerate(self._head):
            justify, ratio = ("right", None) if number else ("left", 1)
            table.add_column(name, justify=justify, ratio=ratio, no_wrap=True, overflow="ellipsis")
        for row in rows:
            table.add_row(*row)
        return table


class Progress:
    """The terminal of a job. ``quiet``, or a quiet ``manner``, shows no bars and says nothing."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(quiet=quiet or manner().quiet, highlight=False, stderr=True)

    def say(self, text: str) -> None:
        """A line of text."""
        self.console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def bar(self, name: str, total: int, start: int = 0) -> Iterator[Bar]:
        """A bar over ``total`` steps of which ``start`` are done."""
        if self.console.quiet or not (self.console.is_terminal or self.console.is_jupyter):
            yield Told(self.say, name, total, start)
            return
        whole = len(f"{total}/{total}")
        columns = (
            TextColumn("{task.description}", table_column=Column(min_width=len(name), no_wrap=True)),
            BarColumn(None, table_column=Column(ratio=1)),
            MofNCompleteColumn(table_column=Column(min_width=whole, no_wrap=True)),
            TimeRemainingColumn(table_column=Column(min_width=len("0:00:00"), no_wrap=True)),
            TextColumn("{task.fields[values]}", table_column=Column(no_wrap=True)),
        )
        with RichProgress(*columns, console=self.console, expand=True) as rich:
            yield Drawn(rich, rich.add_task(name, total=total, completed=start, values=""))

    @contextmanager
    def rows(self, *head: str) -> Iterator[Rows]:
        """A table of these columns below the lines that are said."""
        if not self.console.is_terminal or self.console.quiet:
            yield Rows(None, head, self.console.width)
            return
        with Live(console=self.console, auto_refresh=False, transient=True) as live:
            yield Rows(live, head, self.console.width)
