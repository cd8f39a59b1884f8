"""What the tests of faults share."""

from collections.abc import Iterator

import pytest
from fault_rows import Row, shown


@pytest.fixture(scope="module")
def table() -> Iterator[list[Row]]:
    """The rows of a file's faults, printed at its end."""
    rows: list[Row] = []
    yield rows
    print(shown(rows))
