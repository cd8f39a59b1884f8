"""The rows of the table of faults: what went wrong, when it was seen, and what it cost."""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Row(NamedTuple):
    """A line of the table; NaN seconds where there is nothing to see, as for what waits, or none were lost."""

    fault: str
    seen_s: float
    lost_s: float
    samples: int
    same: bool


def shown(rows: Sequence[Row]) -> str:
    """The table."""
    lines = ["", "| fault | seen after (s) | time lost (s) | lost samples | same digest |", "|---|---|---|---|---|"]
    for row in rows:
        seen, lost = ("-" if math.isnan(time) else f"{time:.1f}" for time in (row.seen_s, row.lost_s))
        lines.append(f"| {row.fault} | {seen} | {lost} | {row.samples} | {'yes' if row.same else 'NO'} |")
    return "\n".join(lines)


def check(row: Row, table: list[Row]) -> None:
    """The run ended in the same bits, and no sample was lost."""
    table.append(row)
    assert row.same
    assert row.samples == 0
