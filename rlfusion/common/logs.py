"""What a process has said to its log."""

from pathlib import Path


def last_line(log: Path, at: int, starts: str) -> str:
    """The last line of a log that begins so, behind its first ``at`` bytes; "" for none."""
    with log.open("rb") as file:
        file.seek(at)
        lines = file.read().decode(errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.startswith(starts)), "")
