"""Tables as commands print them. They fit their terminal, and nothing of them is cut off."""

from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

BETWEEN = 3
"""Columns of the terminal that a column of a table takes beside its text."""
NARROW = 12
"""The least room for what names a row."""

Rows = Sequence[Sequence[str]]


def texts(console: Console | None, title: str, head: Sequence[str], rows: Rows) -> None:
    """A table of words, under its title: long ones go on in the next line. It has no head where all of that is "".
    Without a console it goes to standard output.
    """
    console = console or Console()
    _title(console, title)
    table = Table(show_header=any(head))
    for name in head:
        table.add_column(escape(name), overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def figures(console: Console, title: str, head: Sequence[str], rows: Rows) -> None:
    """A table of numbers, under its title; the first column names the rows. Columns that find no room beside the others
    stand in another table below.
    """
    _title(console, title)
    whole = [max(cell_len(name), *(cell_len(row[i]) for row in rows), 1) for i, name in enumerate(head)]
    fits = 1 + sum(whole) + BETWEEN * len(head) <= console.width
    parts = [dict(enumerate(whole))] if fits else _parts(console.width, head, rows)
    for part in parts:
        table = Table()
        for place, width in part.items():
            justify = "right" if place else "left"
            table.add_column(escape(head[place]), justify=justify, overflow="fold", width=width)
        for row in rows:
            table.add_row(*(escape(row[place]) for place in part))
        console.print(table)


def _title(console: Console, title: str) -> None:
    if title:
        console.print(title, markup=False, highlight=False, soft_wrap=True)


def _parts(width: int, head: Sequence[str], rows: Rows) -> Iterator[dict[int, int]]:
    """The columns of each table, by their places, with their widths: all tables have the first. A head may fold at its
    blanks, a number not.
    """
    widths = [max([*map(cell_len, head[i].split()), *(cell_len(row[i]) for row in rows), 1]) for i in range(len(head))]
    longest = max([NARROW, *(cell_len(row[0]) for row in rows)])
    first = max(NARROW, min(widths[0], width // 3))
    room = max(1, width - 1 - 2 * BETWEEN - first)  # that of one other column
    part, left = {0: first}, room + BETWEEN
    for place in range(1, len(head)):
        taken = min(widths[place], room)
        if len(part) > 1 and taken + BETWEEN > left:
            yield part | {0: min(longest, first + left)}
            part, left = {0: first}, room + BETWEEN
        part[place] = taken
        left -= taken + BETWEEN
    yield part | {0: min(longest, first + left)}
