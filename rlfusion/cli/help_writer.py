"""Writes the pages of ``help_pages`` again, after a change of settings: ``make help``, which is

python -m rlfusion.cli.help_writer
"""

import contextlib
import io
import os

from rlfusion.cli.help_pages import BY_HAND, FOLDER
from rlfusion.cli.main import COMMANDS

WIDTH = 100
"""Characters of a line."""


def made(command: str) -> str:
    """What the parser of a command says; some seconds."""
    said, columns = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(WIDTH + 2)  # argparse leaves two free
    try:
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            COMMANDS[command](["--help"])
    finally:
        del os.environ["COLUMNS"]
        if columns is not None:
            os.environ["COLUMNS"] = columns
    return said.getvalue()


def _write() -> None:
    FOLDER.mkdir(exist_ok=True)
    for command in COMMANDS.keys() - BY_HAND:
        (FOLDER / f"{command}.txt").write_text(made(command), encoding="utf-8")


if __name__ == "__main__":
    _write()
