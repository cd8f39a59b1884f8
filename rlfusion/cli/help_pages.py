"""What ``rlfusion COMMAND --help`` prints, kept as text: to make it, every class of settings is imported and torch with
them, which takes seconds; to read it takes none.

    python -m rlfusion.cli.help_pages      # write the pages again, after a change of settings; make help

A test holds each page to the parser of its command.
"""

import os
from pathlib import Path

FOLDER = Path(__file__).with_name("help")
WIDTH = 100
"""Characters of a line."""
BY_HAND = ("doctor",)
"""The commands whose page is not the parser's; so is ``rlfusion.txt``, the guide to all commands."""


def guide() -> str:
    """What ``rlfusion`` prints by itself."""
    return (FOLDER / "rlfusion.txt").read_text(encoding="utf-8")


def page(arguments: list[str]) -> str | None:
    """The page of ``COMMAND --help`` alone; None where the parser has to be asked (another agent, say, has other
    settings), and for a command that has no page.
    """
    if len(arguments) != 2 or arguments[1] not in ("--help", "-h"):
        return None
    file = FOLDER / f"{arguments[0]}.txt"
    return file.read_text(encoding="utf-8") if file.is_file() else None


def made(command: str) -> str:
    """What the parser of a command says; some seconds."""
    import contextlib
    import io

    from rlfusion.cli.main import COMMANDS

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
    from rlfusion.cli.main import COMMANDS

    FOLDER.mkdir(exist_ok=True)
    for command in COMMANDS.keys() - BY_HAND:
        (FOLDER / f"{command}.txt").write_text(made(command), encoding="utf-8")


if __name__ == "__main__":
    _write()
