"""Reward servers for the tests, on any free port of the loopback; each ends with its context.

``serving`` is the real service in a thread. ``Faulty`` is a server of sockets alone, which answers the questions of a
script as badly as that says, and those after it well.
"""

import itertools
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import blake2b

from rlfusion.jobs.serve_reward import address, listening, server
from rlfusion.rewards.remote.client import Remote, Served
from rlfusion.rewards.remote.exchange import answer, asked
from rlfusion.rewards.remote.frames import DIGESTED, HEAD, MAGIC, decode, encode
from rlfusion.rewards.remote.offer import Limits, Offer
from rlfusion.rewards.remote.server import Service

IDENTITY = "0" * 16
DRIP_S = 0.02
LIMITS = Limits()


@contextmanager
def serving(
    reward,
    token: str = "",
    limits: Limits = LIMITS,
    name: str = "it",
    wants=(),
    make=None,
    made=lambda service: None,
    port: int = 0,
) -> Iterator[str]:
    """The address of a real service of ``reward``, or of ``make(task_info)``; ``made`` is told the service."""
    service = Service(Offer(name, {}, wants, make or (lambda task_info: reward)), token, limits)
    made(service)
    with listening("127.0.0.1", port) as listener:
        running = server(service)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield address(listener)
        finally:
            running.should_exit = True
            thread.join(20)


def client(*urls: str, **settings) -> Remote:
    """A client that hardly rests between tries."""
    remote = Remote(",".join(urls), **{"timeout_s": 20.0, "patience_s": 0.0} | settings)
    remote.replicas.first_s = 0.01
    return remote


def http(body: bytes, status: str = "200 OK", length: int | None = None) -> bytes:
    """An HTTP answer."""
    length = len(body) if length is None else length
    head = f"HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    return head.encode() + body


def framed(text: bytes, blob: bytes) -> bytes:
    """A whole frame, digest and all, of any JSON text and any blob."""
    digest = blake2b(DIGESTED.pack(MAGIC, len(text), len(blob)) + text + blob, digest_size=32).digest()
    return HEAD.pack(MAGIC, len(text), len(blob), digest) + text + blob


RESET = b"a reset in the place of an answer"


class Faulty:
    """``faults``: for each question in turn a function (the good frame) -> bytes to send before closing; None hangs,
    a list drips."""

    def __init__(self, reward, *faults: Callable[[bytes], bytes | list[bytes] | None], always: bool = False) -> None:
        self.reward, self.faults, self.always = reward, list(faults), always
        self.questions = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = address(self.listener)
        self._ends = threading.Event()

    def __enter__(self) -> "Faulty":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._ends.set()
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def _accept(self) -> None:
        while not self._ends.is_set():
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._one, args=(connection,), daemon=True).start()

    def _one(self, connection: socket.socket) -> None:
        with connection:
            path, body = _request(connection)
            said = self._answer(path, body)
            if said is None:
                self._ends.wait()
                return
            try:
                if said is RESET:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    return
                if isinstance(said, list):
                    self._drip(connection, said)
                    return
                connection.sendall(said)
            except OSError:  # the client has had enough
                return

    def _drip(self, connection: socket.socket, pieces: list[bytes]) -> None:
        """Send the pieces over and over, one each ``DRIP_S``."""
        for piece in itertools.cycle(pieces):
            if self._ends.wait(DRIP_S):
                return
            connection.sendall(piece)

    def _answer(self, path: str, body: bytes) -> bytes | list[bytes] | None:
        if path == "/health":
            return http(b"{}")
        if path == "/hello":
            return http(encode(asdict(Served("it", IDENTITY, False, 10**6))))
        self.questions += 1
        good = answer(self.reward, IDENTITY, asked(body))
        if not self.faults:
            return http(good)
        return (self.faults[0] if self.always else self.faults.pop(0))(good)


def _request(connection: socket.socket) -> tuple[str, bytes]:
    file = connection.makefile("rb")
    path = file.readline().split()[1].decode()
    length = 0
    while (line := file.readline()).strip():
        name, _, value = line.partition(b":")
        length = int(value) if name.lower() == b"content-length" else length
    return path, file.read(length)


FAULTS: dict[str, Callable[[bytes], bytes | list[bytes] | None]] = {
    "hang": lambda good: None,
    "dripping headers": lambda good: [b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n", *[b"c"] * 10**5],
    "dripping body": lambda good: [b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n", *[b"c"] * 10**5],
    "connection closed": lambda good: b"",
    "connection reset": lambda good: RESET,
    "HTTP 408": lambda good: http(b"late", "408 Request Timeout"),
    "HTTP 429": lambda good: http(b"too many", "429 Too Many Requests"),
    "HTTP 500": lambda good: http(b"out of memory", "500 Internal Server Error"),
    "HTTP 503": lambda good: http(b"busy", "503 Service Unavailable"),
    "not HTTP": lambda good: b"\x00\xff garbage \r\n\r\n",
    "garbage": lambda good: http(bytes(range(256)) * 4),
    "empty": lambda good: http(b""),
    "truncated frame": lambda good: http(good[:-3]),
    "truncated body": lambda good: http(good[:-3], length=len(good)),
    "too long a frame": lambda good: http(good + b"\0" * 10),
    "oversized": lambda good: http(b"\0" * 10**6, length=10**12),
    "a head that lies": lambda good: http(HEAD.pack(MAGIC, 2**31, 2**62, b"") + good[HEAD.size :]),
    "no JSON": lambda good: http(framed(b"{{{{", b"")),
    "another message": lambda good: http(encode({"hello": 1})),
    "values missing": lambda good: http(encode(decode(good) | {"values": None})),
    "another question": lambda good: http(encode(decode(good) | {"question": "0" * 64})),
    "a flipped bit": lambda good: http(good[:-1] + bytes([good[-1] ^ 1])),
    "the question was damaged": lambda good: http(b"DamagedFrame: the frame is damaged", "412 Precondition Failed"),
}
"""Ways in which an answer can be wrong. Each is tried again, and none of them reaches a result."""
