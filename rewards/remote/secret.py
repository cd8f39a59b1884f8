"""The token of a reward server: a secret that client and server share, from a file or the environment.

It is never an argument, as every user of a machine can read the arguments of all processes.
"""

import os
import stat
from pathlib import Path

from rlfusion.common.errors import LONGEST_PATH, ConfigError, shorten

VARIABLE = "RLFUSION_REWARD_TOKEN"
SHORTEST = 16


def read_token(file: str) -> str:
    """The token in ``file``, or, where that is "", in the environment variable; "" if there is none.

    Raises:
        ConfigError: the file cannot be read, or others can read it; or the token is short, or not printable ASCII.
    """
    if not file:
        return _checked(os.environ.get(VARIABLE, ""), VARIABLE)
    path = Path(file).expanduser()
    try:
        mode, token = path.stat().st_mode, path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"token_file = {shorten(repr(file), LONGEST_PATH)}: cannot be read ({getattr(error, 'strerror', error)})"
        ) from error
    if stat.S_IMODE(mode) & 0o077:
        raise ConfigError(
            f"token_file = {shorten(repr(file), LONGEST_PATH)}: its mode is {stat.S_IMODE(mode):o}, expected 600"
        )
    if not token:
        raise ConfigError(f"token_file = {shorten(repr(file), LONGEST_PATH)}: is empty")
    return _checked(token, file)


def _checked(token: str, where: str) -> str:
    if token and (len(token) < SHORTEST or not token.isascii() or not token.isprintable() or " " in token):
        raise ConfigError(f"the token in {where}: expected {SHORTEST} printable ASCII characters or more, no space")
    return token
