"""The jobs of a Ray cluster, by name: a client of Ray Jobs with deadlines.

A job has the name of its run's folder. Ray never takes an id twice, so a job that is resumed is another one to Ray,
``NAME~2``, ``NAME~3``, ...; here NAME is the last of them. Jobs that others submitted are left alone.
"""

import asyncio
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from rlfusion.common.errors import ConfigError, UnavailableError, shorten, unknown
from rlfusion.config.launch import Jobs

LOOPBACK = "http://127.0.0.1:8265"
VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Ray lets these override an address that is given."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
OURS = "rlfusion"
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
POLL_S = 1.0
_log = logging.getLogger(__name__)
YOUNG = "No available agent"
"""What Ray says while no node's agent has come yet: "please try again later"."""
EXTRA = "Ray Jobs need the extra cluster: pip install 'rlfusion[cluster]'"


@dataclass(frozen=True)
class Job:
    """A job as the cluster tells of it. Times are seconds since 1970, None before it began or ended."""

    id: str
    name: str
    attempt: int
    state: str
    message: str
    exit_code: int | None
    start: float | None
    end: float | None
    metadata: Mapping[str, str]

    @property
    def ended(self) -> bool:
        """Whether it will not change any more."""
        return self.state in ENDED


def id_of(name: str, attempt: int) -> str:
    """Ray's id of the n-th job of a name."""
    return name if attempt == 1 else f"{name}~{attempt}"


def require_name(name: str) -> None:
    """Raise ConfigError unless a job, and the folder of its run, can have this name."""
    if not NAME.fullmatch(name) or len(name) > 200:
        raise ConfigError(
            f"name = {shorten(repr(name))}: expected letters, digits and the signs . _ + -, beginning with a letter or "
            "digit, at most 200"
        )


def address_of(settings: Jobs) -> str:
    """The address of the dashboard.

    Raises:
        ConfigError: it is none.
    """
    given = settings.address or os.environ.get(VARIABLES[0], "") or LOOPBACK
    text = given if "://" in given else f"http://{given}"
    try:
        parts = urlsplit(text)
        fine = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:  # a port that is none
        fine = False
    if not fine or parts.query or parts.fragment or parts.path.strip("/") or re.search(r"\s", text):
        raise ConfigError(
            f"address = {shorten(repr(given))}: expected that of the cluster's dashboard, such as http://head:8265 "
            "(ray:// and the port 6379 are others')"
        )
    return text.rstrip("/")


class Cluster:
    """A connection to the dashboard of a cluster.

    Raises:
        ConfigError: an address that is none, or Ray without what its jobs need.
        UnavailableError: nothing answers there within ``timeout_s``, or not as Ray does.
    """

    def __init__(self, settings: Jobs) -> None:
        self.address, self.timeout_s = address_of(settings), settings.timeout_s
        with self._answered():
            self._client = _client(self.address, settings.ca, settings.timeout_s)

    def jobs(self) -> dict[str, Job]:
        """The last job of each name, in the order in which they began."""
        last: dict[str, Job] = {}
        with self._answered():
            found = self._client.list_jobs()
        for job in sorted((_job(one) for one in found if _is_ours(one)), key=lambda job: job.attempt):
            last[job.name] = job
        return dict(sorted(last.items(), key=lambda item: item[1].start or float("inf")))

    def job(self, name: str) -> Job:
        """The last job of a name.

        Raises:
            ConfigError: there is none; the nearest name is told.
        """
        jobs = self.jobs()
        if name not in jobs:
            raise unknown(f"job at {self.address}", name, jobs)
        return jobs[name]

    def submit(self, name: str, attempt: int, entrypoint: str, environment: Mapping[str, Any], about: Mapping) -> Job:
        """Submit a job; what travels is sent first. ``about`` is kept with it. A cluster that has just begun is asked
        again, for ``timeout_s``.
        """
        metadata = {OURS: about["version"], **about, "name": name, "attempt": str(attempt)}
        asked = {
            "entrypoint": entrypoint,
            "submission_id": id_of(name, attempt),
            "runtime_env": dict(environment),
            "metadata": {key: str(value) for key, value in metadata.items()},
        }
        deadline = time.monotonic() + self.timeout_s
        with self._answered():
            while self._is_young(asked, deadline):
                time.sleep(POLL_S)
        return self.again(id_of(name, attempt))

    def _is_young(self, asked: Mapping[str, Any], deadline: float) -> bool:
        """Submit; whether the cluster asks, before the deadline, to try again later."""
        try:
            self._client.submit_job(**asked)
        except RuntimeError as error:
            if YOUNG not in str(error) or time.monotonic() > deadline:
                raise
            return True
        return False

    def again(self, id: str) -> Job:
        """A job as it is now, by Ray's id."""
        with self._answered():
            return _job(self._client.get_job_info(id))

    def stop(self, job: Job, patience_s: float) -> Job:
        """Tell a job to stop, and wait for its end.

        Raises:
            UnavailableError: it has not ended within ``patience_s``.
        """
        with self._answered():
            self._client.stop_job(job.id)
        deadline = time.monotonic() + patience_s
        while not (now := self.again(job.id)).ended:
            if time.monotonic() > deadline:
                raise UnavailableError(f"job {job.name!r} was told to stop and has not ended within {patience_s:g} s")
            time.sleep(POLL_S)
        return now

    def log(self, job: Job) -> str:
        """All that a job has printed."""
        with self._answered():
            return self._client.get_job_logs(job.id)

    def follow(self, job: Job, write: Callable[[str], None]) -> Job:
        """Write what a job prints until it ends. A connection that breaks is made again.

        Raises:
            UnavailableError: the cluster answers no more.
        """
        import aiohttp

        once = _Once(write)
        while True:
            try:
                asyncio.run(self._tail(job, once))
            except (RuntimeError, OSError, aiohttp.ClientError) as error:  # the lines below tell whether it matters
                _log.info("the log of %s is asked for again: %s", job.id, _first(error))
            now = self.again(job.id)
            once.from_its_beginning()
            once.tell(self.log(now))
            if now.ended:
                return now
            time.sleep(POLL_S)

    async def _tail(self, job: Job, once: "_Once") -> None:
        """Tell a log from its beginning, as it grows."""
        once.from_its_beginning()
        async for text in self._client.tail_job_logs(job.id):
            once.tell(text)

    @contextmanager
    def _answered(self) -> Iterator[None]:
        """Within the context what goes wrong between here and the cluster is an UnavailableError, in a line."""
        try:
            import requests
            from ray.exceptions import AuthenticationError
        except ImportError as error:
            raise ConfigError(EXTRA) from error
        try:
            yield
        except requests.exceptions.Timeout as error:
            raise UnavailableError(f"{self.address} did not answer within timeout_s = {self.timeout_s:g} s") from error
        except AuthenticationError as error:
            raise UnavailableError(
                f"{self.address} wants a token: expected RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH "
                f"as the cluster has it ({_first(error)})"
            ) from error
        except (requests.exceptions.RequestException, ConnectionError) as error:
            raise UnavailableError(
                f"no Ray dashboard answers at {self.address} ({_first(error)}): expected the address that "
                "`ray start --head` printed, port 8265, or that of a tunnel to it"
            ) from error
        except RuntimeError as error:  # Ray's, of an answer that is no success
            raise UnavailableError(f"{self.address} refused: {_first(error)}") from error


class _Once:
    """Writes a text that is told again and again, in parts, each part of it once."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write, self._written, self._told = write, 0, 0

    def from_its_beginning(self) -> None:
        """The text begins again."""
        self._told = 0

    def tell(self, part: str) -> None:
        """The next part of it."""
        fresh = part[max(0, self._written - self._told) :]
        self._told += len(part)
        self._written = max(self._written, self._told)
        if fresh:
            self._write(fresh)


def _client(address: str, ca: str, timeout_s: float) -> Any:
    """Ray's own client, of which each request has a deadline."""
    from ray.job_submission import JobSubmissionClient

    for name in ("modules.dashboard_sdk", "modules.job.sdk"):  # they tell of each step on the way
        logging.getLogger(f"ray.dashboard.{name}").setLevel(logging.WARNING)

    class Client(JobSubmissionClient):
        def _do_request(self, method: str, endpoint: str, **named: Any) -> Any:
            return super()._do_request(method, endpoint, timeout=timeout_s, **named)

    held = {name: os.environ.pop(name) for name in VARIABLES if name in os.environ}
    try:
        return Client(address, verify=ca or True)
    except FileNotFoundError as error:
        raise ConfigError(f"ca = {ca!r}: no such file of certificates") from error
    finally:
        os.environ.update(held)


def _is_ours(details: Any) -> bool:
    return bool(details.submission_id) and OURS in (details.metadata or {})


def _job(details: Any) -> Job:
    about = details.metadata or {}
    return Job(
        details.submission_id,
        about.get("name", details.submission_id),
        int(about.get("attempt", 1)),
        str(getattr(details.status, "value", details.status)),
        _first(details.message) if details.message else "",
        details.driver_exit_code,
        details.start_time / 1000 if details.start_time else None,
        details.end_time / 1000 if details.end_time else None,
        about,
    )


def _first(error: object) -> str:
    """The first line of what was said, shortened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return shorten(lines[0], 200) if lines else type(error).__name__
