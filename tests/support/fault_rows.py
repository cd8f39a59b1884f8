"""The rows of the tables of faults: what went wrong, when it was seen, and what it cost."""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Row(NamedTuple):
    """A line of a table; NaN seconds where there is nothing to see, as for what waits."""

    fault: str
    seen_s: float
    lost_s: float
    samples: int
    same: bool


def shown(rows: Sequence[Row]) -> str:
    """The table."""
    lines = ["", "| fault | seen after (s) | time lost (s) | lost samples | same digest |", "|---|---|---|---|---|"]
    for row in rows:
        seen = "-" if math.isnan(row.seen_s) else f"{row.seen_s:.1f}"
        lines.append(f"| {row.fault} | {seen} | {row.lost_s:.1f} | {row.samples} | {'yes' if row.same else 'NO'} |")
    return "\n".join(lines)


def check(row: Row, table: list[Row]) -> None:
    """The run ended in the same bits, and no sample was lost."""
    table.append(row)
    assert row.same
    assert row.samples == 0
