"""The client of ``rlfusion serve-reward``: a reward named ``http://host:port``, or several such with commas between.

    a batch -> questions of at most ``batch`` samples -> each to a replica -> answers, joined in order

A question goes to the replica that its bytes choose, whoever asks; if that one fails (refuses the connection, is late,
answers HTTP 5xx or bytes that are no answer to it, or says that the question was damaged on the way), to the others,
with back-off (``replicas``), until ``patience_s`` is over. What is wrong with the question or its sender (a wrong
token, too many bytes) is not tried again. Scoring is repeatable, so asking twice does no harm.

The prompts are said to each replica once, in its greeting; questions name them by its digest. A replica that does not
know it, because it was started anew, say, is greeted again, and asked again.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import cached_property
from hashlib import sha256
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from rlfusion.common.errors import ConfigError, require_not_negative, require_positive, shorten
from rlfusion.common.tensors import Cond, map_cond
from rlfusion.rewards.base import RewardUnavailable
from rlfusion.rewards.grouped import MayGroup
from rlfusion.rewards.remote.exchange import Answer, answered, ask, greet, table_of
from rlfusion.rewards.remote.frames import PROTOCOL, FrameError, decode
from rlfusion.rewards.remote.replicas import Replicas
from rlfusion.rewards.remote.secret import read_token
from rlfusion.rewards.remote.transport import Failed, RefusedError, request

SCHEMES = ("http://", "https://")
_log = logging.getLogger(__name__)
MORE_BYTES, BYTES_PER_ITEM = 65536, 4096
"""An answer longer than that is not read."""
PROBE_S = 5.0
NO_FRAME, UNKNOWN = 400, 428
"""HTTP statuses: no frame of this protocol; a question of prompts that were not said there."""
MOST_LABEL = 63
"""Characters between the dots of a host's name (RFC 1035)."""


@dataclass(frozen=True)
class Served:
    """The description of a server that ``/hello`` returns.

    Attributes:
        reward: the name of what it serves.
        identity: a digest of what it serves; equal rewards have equal ones.
        groups: whether all samples of a prompt must be in one question.
        max_bytes: of a question.
        protocol: the version of the frames' contents.
    """

    reward: str
    identity: str
    groups: bool
    max_bytes: int
    protocol: int = PROTOCOL

    @classmethod
    def read(cls, frame: bytes) -> "Served":
        """From its frame.

        Raises:
            Failed: it is none.
        """
        try:
            served = cls(**decode(frame))
        except (FrameError, TypeError) as error:
            raise Failed(f"it is no reward server: {error}") from error
        for field in fields(cls):
            if type(value := getattr(served, field.name)) is not field.type:
                raise Failed(f"it is no reward server: {field.name} = {value!r}, expected {field.type.__name__}")
        return served


class Remote(MayGroup):
    """The reward that the servers at ``urls`` serve."""

    def __init__(
        self,
        urls: str,
        token_file: str = "",
        timeout_s: float = 60.0,
        patience_s: float = 60.0,
        batch: int = 0,
        *,
        prompts: Sequence[str] = (),
        shape: Sequence[int] = (),
        classes: int = 0,
        metadata: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """
        Args:
            urls: ``http://host:port`` or ``https://...``, several with commas between.
            token_file: holds the token, mode 600; else it is in the environment variable of ``token``, if any.
            timeout_s: for one question.
            patience_s: how long failing servers are asked again.
            batch: samples of one question, several of which run at once on several replicas; 0 sends all in one.
            prompts: the text of each condition, passed on (this and the next three are ``registry.task_info``),
            shape: of a sample, and
            classes: the number of conditions, and
            metadata: what else is known of each.

        Raises:
            ConfigError: a setting that cannot work. No server is asked before the first sample.
        """
        super().__init__()
        self.timeout_s, self.patience_s, self.batch = timeout_s, patience_s, batch
        require_positive(self, "timeout_s")
        require_not_negative(self, "patience_s", "batch")
        self.name = urls
        self.task_info = {"prompts": list(prompts), "shape": list(shape), "classes": classes} if shape else {}
        self.task_info |= {"metadata": list(metadata)} if self.task_info and any(metadata) else {}
        self.replicas = Replicas([_checked(url) for url in urls.split(",")])
        self._token = read_token(token_file)
        self._seen: dict[str, Served] = {}

    @cached_property
    def _table(self) -> str:
        return table_of(self.task_info)

    @property
    def groups(self) -> bool:
        """As ``MayGroup.groups``; the servers are asked.

        Raises:
            RewardUnavailable: none can be reached.
        """
        return self.served().groups

    def served(self) -> Served:
        """The description of the served reward, from the first server that answers."""
        if not self._seen:
            self._until_answered(0, lambda url: self._seen[url], 1)
        return next(iter(self._seen.values()))

    def forward(self, samples: Tensor, cond: Cond) -> Tensor:
        """samples (B, C, H, W) in [0, 1] -> (B,), without gradient.

        Raises:
            RewardFailure: the servers cannot score some of the samples.
            RewardRaised: because the user's own code raised there.
            RewardUnavailable: none can be reached for some of them.
            ConfigError: they refuse the question.
        """
        samples = samples.detach()
        size = self.batch or len(samples)
        if size < len(samples) and self.groups:
            raise ConfigError(f"batch = {self.batch}: {self.name} compares whole groups, expected 0")
        rows = torch.arange(len(samples)).split(max(1, size))
        frames = [self._frame(samples[r], map_cond(lambda c, r=r: c[r.to(c.device)], cond)) for r in rows]
        if len(frames) == 1:
            answers = [self._answer(frames[0], len(samples))]
        else:
            with ThreadPoolExecutor(len(self.replicas.urls)) as several:
                answers = list(several.map(self._answer, frames, map(len, rows)))
        values = torch.cat([a.values for a in answers])
        errors = {int(r[i]): why for r, a in zip(rows, answers) for i, why in a.errors.items()}
        raised = frozenset(int(r[i]) for r, a in zip(rows, answers) for i in a.raised)
        failure = None if all(a.identity for a in answers) else RewardUnavailable
        return Answer(values, errors, "", raised).checked(self.name, failure)

    def _frame(self, samples: Tensor, cond: Cond) -> bytes:
        try:
            return ask(samples, cond, self._table)
        except FrameError as error:
            raise ConfigError(f"{self.name} cannot be asked: {error}") from error

    def _answer(self, frame: bytes, count: int) -> Answer:
        """The answer to a question; of no identity where nobody gave one."""
        first = int.from_bytes(sha256(frame).digest()[:8], "big") % len(self.replicas.urls)
        try:
            return self._until_answered(first, lambda url: self._post(url, frame, count), count)
        except RewardUnavailable as failure:
            return Answer(failure.values, failure.reasons, "")

    def _until_answered(self, first: int, attempt: Any, count: int) -> Any:
        """What ``attempt(url)`` gives for the first replica that does not fail; Eq. (1) to (3) of ``replicas``.

        Raises:
            RewardUnavailable: patience is over.
        """
        began, tried, told = time.monotonic(), set(), self.patience_s == 0
        while True:
            url, wait = self.replicas.next(first, time.monotonic())
            if len(tried) == len(self.replicas.urls) and time.monotonic() + wait - began > self.patience_s:
                message = f"no server answered within patience_s = {self.patience_s:g} ({self.replicas.reasons})"
                raise RewardUnavailable.of_all(self.name, count, message)
            time.sleep(wait)
            tried.add(url)
            try:
                if url not in self._seen or self.replicas.failing(url):
                    self._greet(url)
                result = attempt(url)
            except Failed as error:
                self.replicas.failed(url, str(error), time.monotonic())
                if len(tried) == len(self.replicas.urls) and not told:
                    told = True
                    message = "reward %r: no server answers (%s); asked again for up to patience_s = %g s"
                    _log.warning(message, shorten(self.name), self.replicas.reasons, self.patience_s)
            else:
                self.replicas.answered(url)
                return result

    def _greet(self, url: str) -> None:
        """Ask whether ``url`` is alive, if that is in doubt, and what it serves for our task info.

        Raises:
            Failed, ConfigError: as ``_request``; ConfigError also for another reward than before.
        """
        if self.replicas.failing(url):
            self._request("GET", f"{url}/health", None, MORE_BYTES, min(PROBE_S, self.timeout_s))
        try:
            told = self._request("POST", f"{url}/hello", greet(self.task_info), MORE_BYTES, self.timeout_s)
        except RefusedError as error:
            if error.status != NO_FRAME:
                raise
            raise ConfigError(f"{error} (we speak protocol {PROTOCOL}; does another rlfusion serve there?)") from error
        served = Served.read(told)
        if served.protocol != PROTOCOL:
            raise ConfigError(
                f"{url} speaks protocol {served.protocol}: expected {PROTOCOL}, the same rlfusion on both sides"
            )
        self._require_same(url, served.identity)
        self._seen[url] = served

    def _require_same(self, url: str, identity: str) -> None:
        for known, served in list(self._seen.items()):
            if served.identity != identity:
                raise ConfigError(
                    f"{url} serves a reward of identity {identity}: expected {served.identity}, as {known} served"
                )

    def _post(self, url: str, frame: bytes, count: int) -> Answer:
        if len(frame) > self._seen[url].max_bytes:
            raise ConfigError(
                f"{url} takes questions of {self._seen[url].max_bytes} bytes: {count} samples are {len(frame)}, "
                "expected a smaller batch"
            )
        most = MORE_BYTES + BYTES_PER_ITEM * count
        try:
            body = self._request("POST", f"{url}/score", frame, most, self.timeout_s)
        except RefusedError as error:
            if error.status != UNKNOWN:
                raise
            body = self._asked_again(url, frame, most)
        try:
            answer = answered(body, count, frame)
        except FrameError as error:
            raise Failed(f"it answered nonsense: {error}") from error
        self._require_same(url, answer.identity)
        return answer

    def _asked_again(self, url: str, frame: bytes, most: int) -> bytes:
        """The answer of one that has forgotten the prompts, or is another than the one that was greeted.

        Raises:
            Failed: it does not know them when it has just been told, either.
        """
        self._greet(url)
        try:
            return self._request("POST", f"{url}/score", frame, most, self.timeout_s)
        except RefusedError as error:
            if error.status != UNKNOWN:
                raise
            raise Failed(f"it was greeted, and forgot: {error}") from error

    def _request(self, method: str, url: str, body: bytes | None, most: int, timeout_s: float) -> bytes:
        return request(method, url, body, self._token, most, timeout_s)


def _checked(url: str) -> str:
    """A replica's address without its last slash.

    Raises:
        ConfigError: it is none.
    """
    try:
        parts = urlsplit(url.strip())
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and " " not in url.strip()
        good = good and all(len(label) <= MOST_LABEL for label in parts.hostname.split("."))
    except ValueError:  # a port that is none, or half an address of IPv6
        good = False
    if not good or parts.query or parts.fragment or parts.username:
        raise ConfigError(
            f"reward server {shorten(repr(url))}: expected http://host:port, without user, password or question mark"
        )
    return url.strip().rstrip("/")


def is_url(name: str) -> bool:
    """Whether a reward's name is that of a remote one."""
    return name.startswith(SCHEMES)
