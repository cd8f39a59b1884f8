"""Lines that say how an input was taken, once a process: what was recognised, left out, or is longer than is read."""

import logging

_log = logging.getLogger("rlfusion")
_said: set[str] = set()


def say_once(text: str) -> None:
    """Write a line to the log (on the terminal: standard error) unless this process wrote it before."""
    if text not in _said:
        _said.add(text)
        _log.warning("%s", text)
