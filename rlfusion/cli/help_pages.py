"""What ``rlfusion COMMAND --help`` prints, kept as text: to make it, every class of settings is imported and torch with
them, which takes seconds; to read it takes none.

``help_writer`` writes them; a test holds each page to the parser of its command.
"""

from pathlib import Path

FOLDER = Path(__file__).with_name("help")
BY_HAND = ("doctor", "completion")
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
