"""A table of a report, and how it is written."""

import csv
from dataclasses import dataclass
from io import StringIO


@dataclass(frozen=True)
class Table:
    """Rows of cells below a head of as many; a row of fewer cells says at its end that there is no more to say."""

    title: str
    head: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """As Markdown, with its title."""
        width = len(self.head)
        lines = [f"| {' | '.join(self.head)} |", "|---" * width + "|"]
        for row in self.rows:
            cells = [_cell(text) for text in row] + [""] * (width - len(row))
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join([f"## {self.title}", "", *lines])

    def csv(self) -> str:
        """As CSV, the title in a column of its own."""
        text = StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["table", *self.head])
        writer.writerows([self.title, *row, *[""] * (len(self.head) - len(row))] for row in self.rows)
        return text.getvalue()


def _cell(text: str) -> str:
    """A sentence as it may stand in a table: guards speak of |log ratio|, errors of others have several lines."""
    return " ".join(text.split()).replace("|", r"\|")
