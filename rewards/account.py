"""An account of tokens that several processes share, and that outlives them: a file with a line for each answer.

A line is written in one call that appends, so that lines of processes of one machine do not mix. Where a run is resumed
the account goes on; to begin at 0, name another file.
"""

import os
from pathlib import Path
from threading import Lock

from rlfusion.common.errors import ConfigError, shorten


class Account:
    """The tokens that were spent by all that name the same file."""

    def __init__(self, path: str) -> None:
        """
        Raises:
            ConfigError: a path that others would find in another folder, or a file that cannot be written.
        """
        self.path = Path(path).expanduser()
        if not self.path.is_absolute():
            raise ConfigError(
                f"account = {shorten(repr(path))}: processes have folders of their own, expected an absolute path"
            )
        self._total = self._read = 0
        self._lock = Lock()
        self.add(0)

    def add(self, tokens: int) -> None:
        """Write down what an answer has cost.

        Raises:
            ConfigError: it cannot be written.
        """
        try:
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(file, f"{tokens}\n".encode())
            finally:
                os.close(file)
        except OSError as error:
            raise ConfigError(f"account {str(self.path)!r} cannot be written: {error.strerror}") from error

    def total(self) -> int:
        """All that was written down so far.

        Raises:
            ConfigError: a line is no number, or lines were taken away.
        """
        with self._lock:
            try:
                with open(self.path, "rb") as file:
                    if file.seek(0, os.SEEK_END) < self._read:
                        raise ValueError("it has become shorter")
                    file.seek(self._read)
                    whole = file.read().rpartition(b"\n")[0]
                if whole:
                    self._total += sum(map(_tokens, whole.split(b"\n")))
                    self._read += len(whole) + 1
            except (OSError, ValueError) as error:
                raise ConfigError(
                    f"account {str(self.path)!r} is damaged ({error}): expected a line of digits for each answer"
                ) from error
            return self._total


def _tokens(line: bytes) -> int:
    if not line.isdigit():
        raise ValueError(f"it holds {shorten(repr(line), 40)}")
    return int(line)
