"""Live progress in the terminal: bars, tables, and lines between them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from rlfusion.common.manner import manner

WIDTH = 80
"""Columns of a table at most."""


class Bar:
    """One bar: ``advance`` by a step, with the values to show beside it."""

    def __init__(self, rich: RichProgress, task: int) -> None:
        self._rich, self._task = rich, task

    def advance(self, **values: float) -> None:
        """One step on, with these values beside the bar."""
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._rich.update(self._task, advance=1, values=shown)


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
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
        )
        with RichProgress(*columns, console=self.console) as rich:
            yield Bar(rich, rich.add_task(name, total=total, completed=start, values=""))

    @contextmanager
    def rows(self, *head: str) -> Iterator[Rows]:
        """A table of these columns below the lines that are said."""
        if not self.console.is_terminal or self.console.quiet:
            yield Rows(None, head, self.console.width)
            return
        with Live(console=self.console, auto_refresh=False, transient=True) as live:
            yield Rows(live, head, self.console.width)
