"""What the tests of faults share."""

from collections.abc import Iterator

import pytest
from fault_rows import Row, shown


@pytest.fixture(scope="session")
def table() -> Iterator[list[Row]]:
    """The rows of all faults, printed at the end."""
    rows: list[Row] = []
    yield rows
    print(shown(rows))
