"""Live progress in the terminal: bars, and lines between them."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Bar:
    """One bar: ``advance`` by a step, with the values to show beside it."""

    def __init__(self, rich: RichProgress, task: int) -> None:
        self._rich, self._task = rich, task

    def advance(self, **values: float) -> None:
        """One step on, with these values beside the bar."""
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._rich.update(self._task, advance=1, values=shown)


class Progress:
    """The terminal of a job. ``quiet`` shows no bars and says nothing."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(quiet=quiet, highlight=False, stderr=True)

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
