"""The hub of Hugging Face: whether it can be reached is tried once, for seconds.

Left to themselves the libraries that fetch from it try every file five times, half a minute in all, before they look
into their cache. Where the hub cannot be reached they are told to read the cache alone.
"""

import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from rlfusion.common.notices import say_once

PATIENCE_S = 5.0
"""For an answer of the hub; the environment variable HF_HUB_ETAG_TIMEOUT says another time."""
SET = "HF_HUB_OFFLINE is set"
AGAIN_S = 60.0
"""After which a hub that could not be reached is tried again."""

_tried: dict[str, tuple[str, float]] = {}
"""Of each address: why it could not be reached ("" where it could), and when that was tried."""
_within: list[str] = []
"""The contexts that keep the libraries from the hub, at the moment: each by the reason."""
_lock = threading.Lock()


@contextmanager
def fetching() -> Iterator[None]:
    """Within the context, what is fetched from the hub comes from its libraries' cache where it cannot be reached."""
    reason = unreachable()
    if not reason or reason == SET:
        yield
        return
    say_once(f"{_host()} cannot be reached ({reason}): of what is kept there only copies in the cache are read")
    with _lock:
        _within.append(reason)
        _keep_off(True)
    try:
        yield
    finally:
        with _lock:
            _within.pop()
            _keep_off(bool(_within))


def _keep_off(off: bool) -> None:
    from huggingface_hub import constants

    for module in (constants, sys.modules.get("datasets.config")):  # the latter has a copy
        if module is not None:
            vars(module)["HF_HUB_OFFLINE"] = off


def unreachable() -> str:
    """Why the hub cannot be reached; "" where it can."""
    from huggingface_hub import constants

    if _within:
        return _within[-1]
    if constants.HF_HUB_OFFLINE:
        return SET
    reason, when = _tried.get(constants.ENDPOINT, ("never tried", -AGAIN_S))
    if reason and time.monotonic() - when >= AGAIN_S:
        reason = _try(constants.ENDPOINT)
        _tried[constants.ENDPOINT] = reason, time.monotonic()
    return reason


def failed(error: BaseException) -> str:
    """Why something could not be fetched, in one line: the hub's fault where that cannot be reached, else the error."""
    if _of_the_hub(error) and (reason := unreachable()):
        return f"{_host()} cannot be reached ({reason}), and no whole copy is in the cache of this machine"
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _of_the_hub(error: BaseException | None) -> bool:
    """Whether an error comes of what the hub, or its cache, did not have."""
    while error is not None:
        if type(error).__module__.startswith("huggingface_hub") or re.search(
            r"\b(offline|cached|the Hub)\b", str(error)
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def _host() -> str:
    from huggingface_hub import constants

    return urlsplit(constants.ENDPOINT).netloc or str(constants.ENDPOINT)


def _try(address: str) -> str:
    """Ask for the first page, in a thread: names are resolved without a deadline."""
    from huggingface_hub.utils import get_session

    patience_s = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or PATIENCE_S)
    told: list[str] = []

    def ask() -> None:
        session: Any = get_session()
        try:
            session.head(address, timeout=patience_s)
        except Exception as error:  # of the HTTP client that the library has: three in its history
            told.append(" ".join(str(error).split())[:100] or type(error).__name__)
        else:
            told.append("")

    asking = threading.Thread(target=ask, name="hub", daemon=True)
    asking.start()
    asking.join(patience_s)
    return told[0] if told else f"no answer within {patience_s:g} s"
