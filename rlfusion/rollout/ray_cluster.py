"""A connection to a Ray cluster: one that runs, or a private one on this machine.

A private cluster listens on the loopback alone, asks for a token (a file of mode 0600 in its private folder), sends no
usage statistics and has no dashboard. On a busy machine its processes take long to come up: they are waited for, and
tried once more.
"""

import inspect
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import _raylet
from ray._private import ray_constants, services
from ray.exceptions import RayError

from rlfusion.rollout.backend import Settings
from rlfusion.rollout.commands import RolloutError
from rlfusion.rollout.ray_address import require_cluster
from rlfusion.rollout.ray_folders import private_folder
from rlfusion.rollout.ray_head import needed, watched

LOOPBACK = "127.0.0.1"
POLL_S = 0.2
TRIES = 2
UNUSED = -1
OPTIONS: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
_core: Any = _raylet  # compiled, without types
_TOKEN = secrets.token_hex(32)  # Ray caches the token for the life of a process, so there is one a process
_log = logging.getLogger(__name__)


@contextmanager
def cluster(settings: Settings, cpus: int = 1, gpus: int = 0) -> Iterator[None]:
    """A connection to the cluster at ``settings.address``, or, where that is "", a private one on this machine.

    Raises:
        RolloutError: no cluster answers there; or the private one did not start, or would listen on the network.
    """
    if settings.address:
        with _connection(settings):
            yield
        return
    for tried in range(1, TRIES + 1):
        with (
            private_folder() as folder,
            ExitStack() as ports,
            _private_environment(folder, settings.start_timeout_s),
        ):
            try:
                failed = _start(folder, cpus, gpus, settings.start_timeout_s, ports)
                if not failed:
                    with watched(needed()):
                        yield
                    return
            finally:
                ray.shutdown()
        _log.warning("Ray did not start on this machine, try %d of %d: %s", tried, TRIES, failed)
    raise RolloutError(
        f"Ray did not start on this machine in {TRIES} tries, each with waits of ray.start_timeout_s = "
        f"{settings.start_timeout_s:g} s ({failed}); a less busy machine, or more seconds, may help"
    )


@contextmanager
def shared_cluster(settings: Settings, cpus: int, gpus: int) -> Iterator[None]:
    """The cluster that this process is connected to already; where there is none, as ``cluster``."""
    if ray.is_initialized():
        yield
        return
    with cluster(settings, cpus, gpus):
        yield


@contextmanager
def _connection(settings: Settings) -> Iterator[None]:
    require_cluster(settings.address, settings.connect_timeout_s)
    try:
        with _undisturbed_signals():
            ray.init(address=settings.address, **OPTIONS)
    except (RayError, RuntimeError, OSError, ValueError) as error:  # of all kinds, for one cause
        raise RolloutError(f"no Ray cluster at ray.address = {settings.address!r}: {first_line(error)}") from error
    try:
        with watched(needed(settings.address)):
            yield
    finally:
        ray.shutdown()


def _start(folder: Path, cpus: int, gpus: int, patience_s: float, ports: ExitStack) -> str:
    """Start a private cluster; why it did not start, or "". Ray raises bare exceptions where it is too slow. ``ports``
    holds those of its agents for as long as it runs.
    """
    options: dict[str, Any] = {
        "num_cpus": cpus,
        "num_gpus": gpus,
        "include_dashboard": False,
        "_temp_dir": str(folder / "ray"),
    }
    started: list[Any] = []
    try:
        with _undisturbed_signals(), _patient(patience_s, started, ports):
            ray.init(address="local", **OPTIONS, **options)
    except Exception as error:
        for process in started:  # Ray forgets those of a node that it gives up
            process.kill()
        return first_line(error)
    if ray.util.get_node_ip_address() != LOOPBACK:
        raise RolloutError(f"Ray would listen on {ray.util.get_node_ip_address()}: expected {LOOPBACK}")
    return ""


@contextmanager
def _patient(patience_s: float, started: list[Any], ports: ExitStack) -> Iterator[None]:
    """Put our patience in the place of two waits that are numbers in Ray's code, and note the ``started`` processes.

    A new node is looked up for 30 s, here as long as we say. And its raylet ends itself where its agents, which import
    much, have not written their ports within 15 s: here they are written before it starts, as Ray writes them for
    agents that are not in use, and the one that workers ask is told its port, which ``ports`` holds for it.
    """
    look_up, start_raylet, start_process = services.get_node, services.start_raylet, services.start_ray_process

    def patiently(*args: Any) -> Any:
        deadline = time.monotonic() + patience_s
        while True:
            try:
                return look_up(*args)
            except RuntimeError:
                if time.monotonic() > deadline or any(process.poll() is not None for process in started):
                    raise
                time.sleep(POLL_S)

    def with_ports(*args: Any, **named: Any) -> Any:
        given = inspect.signature(start_raylet).bind(*args, **named).arguments
        for name, port in _unwritten_ports(ports).items():
            _core.persist_port(given["session_dir"], given["node_id"], name, port)
            if port != UNUSED:
                named |= {"runtime_env_agent_port": port, "dashboard_agent_listen_port": 0}
        return start_raylet(*args, **named)

    def noted(*args: Any, **named: Any) -> Any:
        info = start_process(*args, **named)
        started.append(info.process)
        return info

    services.get_node, services.start_raylet, services.start_ray_process = patiently, with_ports, noted
    try:
        yield
    finally:
        services.get_node, services.start_raylet, services.start_ray_process = look_up, start_raylet, start_process


def _unwritten_ports(ports: ExitStack) -> dict[str, int]:
    """What each agent's port is written as. Only later versions of Ray wait for such files."""
    try:
        unused = (
            _core.METRICS_AGENT_PORT_NAME,
            _core.METRICS_EXPORT_PORT_NAME,
            _core.DASHBOARD_AGENT_LISTEN_PORT_NAME,
        )
        return dict.fromkeys(unused, UNUSED) | {_core.RUNTIME_ENV_AGENT_PORT_NAME: _held_port(ports)}
    except AttributeError:
        return {}


def _held_port(ports: ExitStack) -> int:
    """A port of the loopback for an agent that starts later. It is bound from now on until ``ports`` ends, so that the
    kernel gives it to nobody else; the agent can bind it beside and listen, since both say SO_REUSEADDR.
    """
    held = ports.enter_context(socket.socket())
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind((LOOPBACK, 0))
    return held.getsockname()[1]


@contextmanager
def _private_environment(folder: Path, patience_s: float) -> Iterator[None]:
    """The environment that a private cluster's processes inherit. Ray reads a part of it when it is imported, so that
    part is set again here.
    """
    token = folder / "token"
    with open(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(_TOKEN)
    ours = {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on Linux too it binds everything to the loopback
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_gcs_server_port_wait_time_s": str(max(1, round(patience_s))),
    }
    held = {name: os.environ.pop(name, None) for name in (*ours, "RAY_AUTH_TOKEN")}
    network = ray_constants.ENABLE_RAY_CLUSTER
    os.environ.update(ours)
    ray_constants.ENABLE_RAY_CLUSTER = False
    _core.Config.initialize("")
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = network
        for name, value in held.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        _core.Config.initialize("")  # else this process would ask other clusters with this one's token


@contextmanager
def _undisturbed_signals() -> Iterator[None]:
    """Ray takes over SIGTERM; the caller's handler is put back."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def first_line(error: Exception) -> str:
    """What an error says first."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def smallest_store() -> int:
    """Bytes of the smallest object store of the nodes that are there."""
    stores = [node["Resources"].get("object_store_memory", 0) for node in ray.nodes() if node["Alive"]]
    return int(min(filter(None, stores), default=0))
