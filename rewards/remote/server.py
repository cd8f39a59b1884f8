"""The server of a reward, as an ASGI application: what ``remote`` asks of.

    GET  /health   -> 200, is it alive?                                      (JSON)
    POST /hello    task info of a model -> what is served for it            (frame -> frame, ``remote.Served``)
    POST /score    question -> answer                                        (frame -> frame, ``exchange``)

    A question names its prompts by the digest of the greeting (/hello) that said them.

    401 wrong or no token · 400 no frame, a frame of another protocol, or task info for which there is no reward ·
    411 no length said · 412 a frame that was damaged on the way · 413 too many bytes · 415 another content type ·
    422 a whole frame that is no question, or one that cannot be scored · 408 the question was not complete in time ·
    428 a question of prompts that were not said here ·
    503 an earlier question hangs, there was no room, or the server ends · 504 this one was not scored in time

A request is refused before its body is read where its token is wrong, compared in constant time; a body is read up to
``max_bytes`` and no further, and only once there is room for it among the questions that are held (``budget``). Bodies
are checked and parsed in threads of their own, never in the event loop, so that ``/health`` answers meanwhile. One
thread scores, question by question: a reward need not be safe for several.
"""

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

from rlfusion.common.errors import ConfigError
from rlfusion.rewards.remote.budget import Budget
from rlfusion.rewards.remote.client import UNKNOWN
from rlfusion.rewards.remote.exchange import QuestionError, answer, asked, greeted
from rlfusion.rewards.remote.frames import DamagedFrame, FrameError, digest_of, encode
from rlfusion.rewards.remote.offer import Limits, Offer
from rlfusion.rewards.remote.tables import Tables, UnknownTable

_log = logging.getLogger(__name__)
ASKING = 64
"""Questions at once, waiting or being received and scored."""
STALL_S = 10.0
"""Between two pieces of a question at most, so that who falls silent gives its room back before ``deadline_s``."""
READERS = 2
"""Threads that check and parse questions."""
MEDIA = "application/octet-stream"
STATUS = {DamagedFrame: 412, UnknownTable: UNKNOWN, QuestionError: 422, FrameError: 400}
"""Of what is wrong with a frame; the first that fits."""


class Refused(Exception):
    """A request that gets an HTTP status and a line of text."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(status, text)
        self.status, self.text = status, text


class Service:
    """The state of a server: its one scoring thread, and when it was last asked.

    Attributes:
        last: time of the last request, on the monotonic clock.
    """

    def __init__(self, offer: Offer, token: str, limits: Limits, device: str = "cpu") -> None:
        self.offer, self.limits, self.device = offer, limits, device
        self._expected = f"Bearer {token}".encode() if token else b""
        self._thread, self._readers = ThreadPoolExecutor(1, "reward"), ThreadPoolExecutor(READERS, "read")
        self._budget, self._tables = Budget(limits.max_held), Tables(limits.max_held)
        self._since: float | None = None
        self._asked = 0
        self.last = time.monotonic()

    @property
    def guarded(self) -> bool:
        """Whether a token is asked for."""
        return bool(self._expected)

    async def health(self, request: Any) -> bytes:
        """Alive, and not hanging."""
        self._require_token(request)
        self._require_free()
        return json.dumps({"alive": True, "reward": self.offer.name}).encode()

    async def hello(self, request: Any) -> bytes:
        """Describe the reward that is served for the task info in the body."""
        with self._asking(), ExitStack() as held:
            body = await self._body(request, held)
            task_info = await self._read(greeted, body)
            return await self._do(lambda: self._described(task_info, digest_of(body), len(body)), held)

    def _described(self, task_info: dict[str, Any], table: str, size: int) -> bytes:
        """What is served for a greeting, which is remembered from here on."""
        described = encode(asdict(self.offer.served(task_info, self.limits, table)))
        self._tables.take(table, task_info, size)
        return described

    async def score(self, request: Any) -> bytes:
        """The answer to the question of the body."""
        with self._asking(), ExitStack() as held:
            question = await self._read(partial(asked, tables=self._tables), await self._body(request, held))
            known = question.task_info, question.table
            return await self._do(lambda: answer(*self.offer.reward(*known), question, self.device), held)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """One of ``ASKING``; there is always a connection left for ``/health``."""
        if self._asked >= ASKING:
            raise Refused(503, f"{ASKING} questions at once are being answered")
        self._asked += 1
        try:
            yield
        finally:
            self._asked -= 1

    async def _read(self, reader: Callable[[bytes], Any], body: bytes) -> Any:
        """What ``reader`` makes of a body, in a thread of the readers."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._readers, reader, body)
        except FrameError as error:
            status = next(code for kind, code in STATUS.items() if isinstance(error, kind))
            raise Refused(status, f"{type(error).__name__}: {error}") from error

    def _require_token(self, request: Any) -> None:
        self.last = time.monotonic()
        given = request.headers.get("authorization", "").encode()
        if not hmac.compare_digest(given if self._expected else b"", self._expected):
            raise Refused(401, "the token is wrong or missing")

    @property
    def scoring(self) -> bool:
        """Whether a question is being scored."""
        return self._since is not None

    @property
    def hanging(self) -> bool:
        """Whether the question that is being scored is past its deadline."""
        since = self._since
        return since is not None and time.monotonic() - since > self.limits.deadline_s

    def _require_free(self) -> None:
        if self.hanging:
            raise Refused(503, f"reward {self.offer.name!r} hangs")

    async def _body(self, request: Any, held: ExitStack) -> bytes:
        """The body of a request whose token is right, of at most ``max_bytes``, received in time; ``held`` keeps its
        room.
        """
        self._require_token(request)
        self._require_free()
        if (media := request.headers.get("content-type", MEDIA)) != MEDIA:
            raise Refused(415, f"content type {media!r:.100}: expected {MEDIA}")
        stated, most = _length(request.headers.get("content-length", "")), self.limits.max_bytes
        if stated > most:
            raise Refused(413, f"{stated} bytes: expected at most {most}")
        await self._take_room(stated, held)
        parts, total, loop = [], 0, asyncio.get_running_loop()
        latest = loop.time() + self.limits.deadline_s
        try:
            async with asyncio.timeout_at(min(latest, loop.time() + STALL_S)) as limit:
                async for part in request.stream():
                    limit.reschedule(min(latest, loop.time() + STALL_S))
                    parts.append(part)
                    total += len(part)
                    if total > stated:
                        raise Refused(413, f"more than {stated} bytes")
        except TimeoutError:
            late = f"within {self.limits.deadline_s:g} s, or fell silent for {STALL_S:g} s"
            raise Refused(408, f"the question was not complete {late}") from None
        return b"".join(parts)

    async def _take_room(self, count: int, held: ExitStack) -> None:
        try:
            await asyncio.wait_for(self._budget.take(count), self.limits.deadline_s)
        except TimeoutError:
            raise Refused(503, f"no room for {count} bytes among {self.limits.max_held} of other questions") from None
        held.callback(self._budget.give, count)

    async def _do(self, work: Callable[[], Any], held: ExitStack) -> Any:
        """What ``work`` gives, in the scoring thread, after the questions before it. What is late keeps its room until
        it is done, or is taken out of the queue.
        """

        def timed() -> Any:
            self._since = time.monotonic()
            try:
                return work()
            finally:
                self._since, self.last = None, time.monotonic()

        job = self._thread.submit(timed)
        future = asyncio.wrap_future(job)
        try:
            return await asyncio.wait_for(asyncio.shield(future), self.limits.deadline_s)
        except TimeoutError:
            room = held.pop_all()
            future.add_done_callback(lambda _: room.close())
            job.cancel()
            raise Refused(504, f"no score from {self.offer.name!r} in {self.limits.deadline_s:g} s") from None


def _length(text: str) -> int:
    if not text:
        raise Refused(411, "a request without content-length: expected one")
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise Refused(400, f"content-length {text!r:.100}: expected a number of bytes")
    return int(text)


def application(service: Service) -> Any:
    """The ASGI application of a service."""
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect
    from starlette.responses import PlainTextResponse, Response
    from starlette.routing import Route

    def answering(handler: Callable[[Any], Awaitable[bytes]], media: str) -> Callable[[Any], Awaitable[Any]]:
        async def endpoint(request: Any) -> Any:
            try:
                return Response(await handler(request), media_type=media)
            except Refused as refused:
                return PlainTextResponse(refused.text[:1000], refused.status, {"Connection": "close"})
            except ConfigError as error:
                return PlainTextResponse(f"{type(error).__name__}: {error}"[:1000], 400)
            except asyncio.CancelledError:
                return PlainTextResponse("the server ends", 503, {"Connection": "close"})
            except ClientDisconnect:
                return PlainTextResponse("the asker went away", 400)
            except Exception as error:  # a reward that cannot be made, say: told to the asker, who asks again later
                _log.exception("%s", request.url.path)
                return PlainTextResponse(f"{type(error).__name__}: {error}"[:1000], 500)

        return endpoint

    return Starlette(
        routes=[
            Route("/health", answering(service.health, "application/json"), methods=["GET"]),
            Route("/hello", answering(service.hello, MEDIA), methods=["POST"]),
            Route("/score", answering(service.score, MEDIA), methods=["POST"]),
        ]
    )
