"""The address of a Ray cluster: what is one, and whether one answers there, asked before anything costly.

    ""                a private cluster on this machine
    auto              the cluster of this machine
    host:port         the head node
    ray://host:port   Ray's client server on it

Ray itself tries an address where nothing is for minutes, in silence, and cannot be told for how long. So an address is
first tried by a process of its own, which connects and asks a worker of the cluster for its rlfusion; it is ended at
the deadline, and what it says comes back in a line.
"""

import json
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future

from rlfusion.common.errors import ConfigError, shorten
from rlfusion.rollout.commands import RolloutError

AUTO, CLIENT = "auto", "ray://"
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\]")
MOST_PORT = 65535
TRY = """
import json, sys
import ray


def look():
    try:
        import rlfusion
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


try:
    ray.init(address=sys.argv[1], log_to_driver=False, configure_logging=False)
    said = ["worker", ray.get(ray.remote(num_cpus=0, max_retries=0)(look).remote())]
except Exception as error:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = ["ray", f"{type(error).__name__}: {lines[0] if lines else chr(63)}"]
print(json.dumps(said))
"""
"""What the process runs: whether Ray or a worker failed, and how."""
_answered: set[str] = set()


def require_address(address: str) -> None:
    """Raise ConfigError unless ``address`` is one of the forms above."""
    if address not in ("", AUTO) and host_and_port(address) is None:
        raise ConfigError(
            f"ray.address = {address!r}: expected host:port such as 10.0.0.1:6379, ray://host:port, auto, or nothing "
            "for a private cluster on this machine"
        )


def require_cluster(address: str, timeout_s: float) -> None:
    """Try the address of a running cluster, once a process.

    Raises:
        RolloutError: no cluster answers there within ``timeout_s``, or its workers have no rlfusion.
    """
    if not address or address in _answered:
        return
    deadline = time.monotonic() + timeout_s
    if parts := host_and_port(address):
        _require_listening(address, *parts, timeout_s)
    _require_answer(address, deadline - time.monotonic(), timeout_s)
    _answered.add(address)


def host_and_port(address: str) -> tuple[str, int] | None:
    """Host and port of an address, None where it has none."""
    host, colon, port = address.removeprefix(CLIENT).rpartition(":")
    if not colon or not _HOST.fullmatch(host) or not (port.isascii() and port.isdigit() and len(port) <= 5):
        return None
    return (host.strip("[]"), int(port)) if 1 <= int(port) <= MOST_PORT else None


def _require_listening(address: str, host: str, port: int, timeout_s: float) -> None:
    tried: Future[None] = Future()

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=timeout_s).close()
            tried.set_result(None)
        except Exception as error:
            tried.set_exception(error)

    try:
        threading.Thread(target=connect, daemon=True).start()  # a name is looked up for as long as its servers please
        tried.result(timeout_s)
    except TimeoutError:
        raise _silent(address, timeout_s) from None
    except UnicodeError as error:  # of a part of the name that is empty, or has more than 63 letters
        raise ConfigError(f"ray.address = {shorten(repr(address))}: {shorten(host)} is no name of a host") from error
    except OSError as error:
        raise RolloutError(
            f"no Ray cluster at ray.address = {address!r}: {error.strerror or error}; expected the address that "
            "`ray start --head` printed"
        ) from error


def _require_answer(address: str, left_s: float, timeout_s: float) -> None:
    try:
        ran = subprocess.run(
            [sys.executable, "-c", TRY, address], capture_output=True, text=True, timeout=max(left_s, 0.1)
        )
    except subprocess.TimeoutExpired:
        raise _silent(address, timeout_s) from None
    try:
        who, message = json.loads(ran.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        who, message = "ray", (ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"])[-1]
    if who == "worker" and message:
        raise RolloutError(
            f"the workers of the Ray cluster at ray.address = {address!r} have no rlfusion ({message}): expected it "
            "installed on every node, in the Python that Ray runs there"
        )
    if message:
        raise RolloutError(f"no Ray cluster at ray.address = {address!r}: {message}")


def _silent(address: str, timeout_s: float) -> RolloutError:
    return RolloutError(
        f"no Ray cluster answered at ray.address = {address!r} within ray.connect_timeout_s = {timeout_s:g} s"
    )
