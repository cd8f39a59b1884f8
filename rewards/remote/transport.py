"""One HTTP request under one deadline: from the look-up of the host's name to the last byte of the answer.

A socket's own time-out begins again with each piece that arrives, so that a server which drips its TLS handshake, its
headers or its body would keep us for ever. Here the request runs in a thread of its own, and at the deadline its socket
is shut, which ends the thread. Nothing longer than asked for is read, no redirection is followed and no proxy asked.
"""

import socket
import time
from contextlib import closing, suppress
from http.client import HTTPException
from threading import Lock, Thread
from typing import Any
from urllib.parse import urlsplit

from rlfusion.common.errors import ConfigError

CHUNK = 65536
_IMPORTING = Lock()
AGAIN = (408, 412, 429)
"""Statuses below 500 after which the same request may do better later; 412 says that it was damaged on the way."""


class Failed(Exception):
    """A server failed; another, or the same one later, may do better."""


class RefusedError(ConfigError):
    """A server refuses a request, with this HTTP ``status``."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


BYTES = "application/octet-stream"


def request(
    method: str, url: str, body: bytes | None, token: str, most: int, timeout_s: float, kind: str = BYTES
) -> bytes:
    """The body of the answer to a question of this content type.

    Raises:
        Failed: no answer in time, one of status 5xx or ``AGAIN``, or more than ``most`` bytes.
        RefusedError: the server refuses the request.
    """
    _require_library()
    exchange = _Exchange(method, url, body, token, most, timeout_s, kind)
    exchange.join(timeout_s)
    if exchange.is_alive():
        exchange.cut()
        raise Failed(_late(timeout_s))
    if exchange.error is not None:
        raise exchange.error
    if exchange.status != 200:
        message = f"HTTP {exchange.status} {exchange.text[:200].decode(errors='replace')}".strip()
        if exchange.status >= 500 or exchange.status in AGAIN:
            raise Failed(message)
        raise RefusedError(f"{url} refuses: {message}", exchange.status)
    return exchange.text


def _require_library() -> None:
    """Import the HTTP library in one thread at a time: several that are the first would each find it half imported."""
    with _IMPORTING:
        import urllib3.connection
        import urllib3.exceptions  # noqa: F401


class _Exchange(Thread):
    """A request under way; a daemon, so that one which cannot be cut does not keep the process from ending."""

    def __init__(
        self, method: str, url: str, body: bytes | None, token: str, most: int, timeout_s: float, kind: str
    ) -> None:
        super().__init__(name="request", daemon=True)
        self._asked = method, url, body
        self._headers = {"Content-Type": kind} if body is not None else {}
        self._headers["Connection"] = "close"  # a kept one may be closed by the server just when it is used again
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._most, self._timeout_s, self._deadline = most, timeout_s, time.monotonic() + timeout_s
        self._socket: socket.socket | None = None
        self.status, self.text = 0, b""
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        from urllib3.exceptions import HTTPError

        try:
            self._exchange()
        except (HTTPError, HTTPException, OSError) as error:
            self.error = Failed(_cause(error, self._timeout_s))
        except BaseException as error:  # raised again where the answer is asked for
            self.error = error

    def cut(self) -> None:
        """Shut the socket, so that whatever waits for it ends."""
        if self._socket is not None:
            with suppress(OSError):
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # not an SSLSocket's own, which another uses

    def _exchange(self) -> None:
        method, url, body = self._asked
        with closing(_connection(url, self._timeout_s)) as connection:
            connection.connect()
            self._socket = connection.sock
            with suppress(BrokenPipeError):  # refused before all was sent: the answer says why
                connection.request(method, urlsplit(url).path, body, self._headers, preload_content=False)
            with closing(connection.getresponse()) as answer:
                self.status, self.text = answer.status, self._read(answer)

    def _read(self, answer: Any) -> bytes:
        """The body, piece by piece, so that neither a long nor a slow one keeps us."""
        parts, total = [], 0
        while part := answer.read1(CHUNK, decode_content=False):
            total += len(part)
            if total > self._most:
                raise Failed(f"it answered more than {self._most} bytes")
            if time.monotonic() > self._deadline:
                raise Failed(_late(self._timeout_s))
            parts.append(part)
        return b"".join(parts)


def _connection(url: str, timeout_s: float) -> Any:
    from urllib3.connection import HTTPConnection, HTTPSConnection

    parts = urlsplit(url)
    return (HTTPSConnection if parts.scheme == "https" else HTTPConnection)(
        parts.hostname, parts.port, timeout=timeout_s
    )


def _late(timeout_s: float) -> str:
    return f"timed out: no whole answer within {timeout_s:g} s"


def _cause(error: Exception, timeout_s: float) -> str:
    """What went wrong, without the addresses of objects that urllib3's messages have."""
    inner = error
    while inner.__cause__ or inner.__context__:
        inner = inner.__cause__ or inner.__context__
    if isinstance(inner, TimeoutError):
        return _late(timeout_s)
    return f"{type(inner).__name__}: {inner}" if str(inner) else type(inner).__name__
