"""A vision-language model as the judge, over an OpenAI-compatible endpoint: vLLM, SGLang, llama.cpp, a hosted one.

    (1)  each sample is one POST to url/chat/completions: the question with the sample's prompt, and the image as PNG
    (2)  the answer must be one number in scale = [low, high] and nothing else; the reward is (number - low) / (high -
         low)
    (3)  what cannot be reached is asked again with back-off from .25 s to 8 s until ``patience_s`` is over; an answer
         that is no such number is asked for once more with each of ``retries``, and then that sample has failed

``at_once`` questions are under way at a time. Answers are remembered by the SHA-256 of all that was asked, so that the
same image, prompt and question costs once in a process. The tokens that the endpoint counts are added up (``spent``)
and told as they double; at ``most_tokens`` the judge asks no more: of its process, or with an ``account`` of all
processes that name that file, and of a run that is resumed. What is under way then is still answered.

The key is read from an environment variable, whose name is the setting; the key itself is in no setting, file or line.
"""

import base64
import io
import json
import logging
import math
import os
import re
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from rlfusion.common.errors import ConfigError, require_not_negative, require_positive, shorten
from rlfusion.common.tensors import Cond
from rlfusion.rewards.account import Account
from rlfusion.rewards.adapters import converted
from rlfusion.rewards.base import RewardFailure, RewardUnavailable, require_labels
from rlfusion.rewards.remote.transport import Failed, request

QUESTION = (
    "Rate how well this image shows the following, and how good it looks: {prompt}\n"
    "Answer with one number from {low:g} to {high:g} and nothing else."
)
NUMBER = re.compile(
    r"\s*\**\s*(?:(?:score|rating)\s*[:=]\s*)?([+-]?\d+(?:\.\d+)?)(?:\s*/\s*(\d+(?:\.\d+)?))?\s*\**\.?\s*", re.I
)
"""A number, and what models put around it: "Score: 7", "7/10", "**7**", "7."."""
MOST_BYTES = 2**20
"""An answer longer than that is not read."""
FIRST_S, LAST_S = 0.25, 8.0
TOLD_FIRST = 10_000
_log = logging.getLogger(__name__)


class Unreadable(Exception):
    """An answer that is not one number within the scale."""


@dataclass
class Spent:
    """What was asked of an endpoint so far.

    Attributes:
        questions: that were answered.
        read, written: tokens, as the endpoint counts them; of one that does not, 0.
        remembered: samples that were not asked about again.
    """

    questions: int = 0
    read: int = 0
    written: int = 0
    remembered: int = 0
    _told: int = field(default=TOLD_FIRST, repr=False)
    _lock: Lock = field(default_factory=Lock, repr=False)

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.read + self.written

    def add(self, usage: Any) -> int:
        """Count an answer, and tell the sum whenever it has doubled; the tokens of this one."""
        held = usage if isinstance(usage, dict) else {}
        read, written = (held.get(name) for name in ("prompt_tokens", "completion_tokens"))
        with self._lock:
            self.questions += 1
            before = self.tokens
            self.read += read if type(read) is int and read > 0 else 0
            self.written += written if type(written) is int and written > 0 else 0
            if self.tokens >= self._told:
                while self._told <= self.tokens:
                    self._told *= 2
                _log.warning("vlm_judge: %s", self)
            return self.tokens - before

    def __str__(self) -> str:
        return f"{self.questions:,} questions, {self.read:,} tokens read and {self.written:,} written"


class VlmJudge:
    """The answer of a vision-language model, at an OpenAI-compatible endpoint, about each sample. No gradient."""

    def __init__(
        self,
        url: str,
        model: str,
        prompt: str = QUESTION,
        scale: Sequence[float] = (0.0, 10.0),
        key_variable: str = "OPENAI_API_KEY",
        limits: dict[str, Any] | None = None,
        *,
        prompts: Sequence[str] = (),
    ) -> None:
        """
        Args:
            url: of the endpoint, up to and with its version: http://localhost:8000/v1.
            model: its name there.
            prompt: the question; {prompt}, {low} and {high} are filled in.
            scale: the lowest and the highest number of an answer.
            key_variable: the environment variable with the key; one that is not set sends none.
            limits: as ``Limits``: timeout_s, patience_s, retries, at_once, cache, most_tokens, account.
            prompts: the text of each condition.

        Raises:
            ConfigError: a setting that cannot work, or a secret among them.
        """
        self.url, self.model, self.question = _checked(url), model, prompt
        self.low, self.high = _scale(scale)
        self.limits = Limits.of(limits or {})
        self.key_variable, self.prompts = key_variable, tuple(prompts)
        self.spent = Spent()
        self.account = Account(self.limits.account) if self.limits.account else None
        self._values: OrderedDict[bytes, float] = OrderedDict()
        try:
            self._asked("")
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigError(
                f"prompt = {shorten(repr(prompt))}: {error!r}, expected a text with {{prompt}} in it, {{{{ for a brace"
            ) from error
        if "{prompt}" in prompt and not self.prompts:
            raise ConfigError(
                "vlm_judge asks about {prompt}, and the model has no prompts: expected a question without"
            )

    def __call__(self, samples: Tensor, cond: Cond) -> Tensor:
        """samples (B, C, H, W) in [0, 1] -> (B,) in [0, 1], Eq. (2).

        Raises:
            RewardFailure: some answers are no number within the scale.
            RewardUnavailable: the endpoint does not answer.
            ConfigError: it refuses the question (a wrong key, no such model), or ``most_tokens`` are spent.
        """
        count = len(samples)
        words = (
            [self.prompts[i] for i in require_labels(cond, count, len(self.prompts), "vlm_judge").tolist()]
            if (self.prompts)
            else [""] * count
        )
        bodies = [self._body(_png(image), text) for image, text in zip(converted(samples, "pil", "vlm_judge"), words)]
        distinct = list(dict.fromkeys(bodies))
        with ThreadPoolExecutor(self.limits.at_once) as several:
            found = dict(zip(distinct, several.map(self._scored, distinct)))
        values = torch.tensor([held if isinstance(held := found[body], float) else math.nan for body in bodies])
        wrong = {i: found[body] for i, body in enumerate(bodies) if not isinstance(found[body], float)}
        if wrong:
            kind = RewardUnavailable if all(isinstance(one, Failed) for one in wrong.values()) else RewardFailure
            raise kind("vlm_judge", values, {i: str(one) for i, one in wrong.items()})
        return values.to(samples.device)

    def _asked(self, text: str) -> str:
        return self.question.format(prompt=text, low=self.low, high=self.high)

    def _body(self, png: bytes, text: str) -> bytes:
        """A question, Eq. (1)."""
        image = {"url": f"data:image/png;base64,{base64.b64encode(png).decode()}"}
        content = [{"type": "text", "text": self._asked(text)}, {"type": "image_url", "image_url": image}]
        told = {"model": self.model, "temperature": 0, "seed": 0, "max_tokens": 16}
        return json.dumps({**told, "messages": [{"role": "user", "content": content}]}).encode()

    def _scored(self, body: bytes) -> float | Exception:
        """The reward of a question; why there is none, where Eq. (3) gives up."""
        key = sha256(self.url.encode() + b"\n" + body).digest()
        if (known := self._values.get(key)) is not None:
            self.spent.remembered += 1
            return known
        last: Exception = Unreadable("")
        for _ in range(self.limits.retries + 1):
            try:
                value = self._number(self._answer(body))
            except Unreadable as error:
                last = error
            except Failed as error:
                return error
            else:
                self._values[key] = value
                while len(self._values) > self.limits.cache:
                    self._values.popitem(last=False)
                return value
        return last

    def _answer(self, body: bytes) -> bytes:
        """What the endpoint says; raises Failed once patience is over."""
        if self.limits.most_tokens:
            self._require_left(self.limits.most_tokens)
        end, wait = time.monotonic() + self.limits.patience_s, FIRST_S
        where, key = f"{self.url}/chat/completions", os.environ.get(self.key_variable, "")
        while True:
            try:
                return request("POST", where, body, key, MOST_BYTES, self.limits.timeout_s, "application/json")
            except Failed as error:
                if time.monotonic() + wait > end:
                    raise Failed(
                        f"{self.url} did not answer within patience_s = {self.limits.patience_s:g}: {error}"
                    ) from error
            time.sleep(wait)
            wait = min(2 * wait, LAST_S)

    def _require_left(self, most: int) -> None:
        """
        Raises:
            ConfigError: all tokens are spent.
        """
        if (self.account.total() if self.account else self.spent.tokens) < most:
            return
        what = f"{self.account.total():,} tokens in {str(self.account.path)!r}" if self.account else str(self.spent)
        raise ConfigError(f"vlm_judge has spent {what}: expected less than most_tokens = {most}")

    def _number(self, answer: bytes) -> float:
        """The reward that an answer means, Eq. (2)."""
        try:
            held = json.loads(answer)
            text = held["choices"][0]["message"]["content"]
            cost = self.spent.add(held.get("usage"))
            if self.account:
                self.account.add(cost)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise Unreadable(f"it answered {_short(answer)}: expected a chat completion") from error
        match = NUMBER.fullmatch(text) if isinstance(text, str) else None
        if match is None or (match[2] and float(match[2]) != self.high):
            raise Unreadable(f"it answered {shorten(repr(text), 80)}: expected one number")
        if not self.low <= (number := float(match[1])) <= self.high:
            raise Unreadable(f"it answered {number:g}: expected a number from {self.low:g} to {self.high:g}")
        return (number - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Limits:
    """
    Attributes:
        timeout_s: for one question.
        patience_s: how long an endpoint that fails is asked again.
        retries: of a question whose answer is no number.
        at_once: questions under way.
        cache: answers that are remembered.
        most_tokens: that may be spent; 0 for no limit.
        account: the absolute path of a file in which all processes of a run, or several runs, add up what they spend;
            empty for the process alone.
    """

    timeout_s: float = 60.0
    patience_s: float = 60.0
    retries: int = 1
    at_once: int = 8
    cache: int = 100_000
    most_tokens: int = 0
    account: str = ""

    def __post_init__(self) -> None:
        require_positive(self, "timeout_s", "at_once", "cache")
        require_not_negative(self, "patience_s", "retries", "most_tokens")

    @classmethod
    def of(cls, told: dict[str, Any]) -> "Limits":
        from rlfusion.common import spec

        made: Limits = spec.call(cls, told, "limits of vlm_judge")
        return made


def _checked(url: str) -> str:
    """The address without its last stroke.

    Raises:
        ConfigError: it is none, or a secret is in it.
    """
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        fine = False
    if not fine:
        raise ConfigError(f"url = {shorten(repr(url))}: expected http://host:port/v1, or https://")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigError(
            "url of vlm_judge: expected an address without a key in it (settings are written down); put the key into "
            "the environment variable that key_variable names"
        )
    return url.rstrip("/")


def _scale(scale: Sequence[float]) -> tuple[float, float]:
    held = list(scale) if isinstance(scale, list | tuple) else []
    if (
        len(held) != 2
        or not all(type(end) in (int, float) and math.isfinite(end) for end in held)
        or held[0] >= held[1]
    ):
        raise ConfigError(f"scale = {scale!r}: expected [low, high], two finite numbers, low < high")
    return float(held[0]), float(held[1])


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _short(answer: bytes) -> str:
    return shorten(repr(answer[:200].decode(errors="replace")), 80)
