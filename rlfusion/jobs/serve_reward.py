"""``rlfusion serve-reward``: a reward for other processes, environments and machines, over HTTP.

It listens on this machine's loopback unless told otherwise, and elsewhere only with a token. The protocol is that of
``rlfusion.rewards.service``; its client is any reward's name of the form ``http://host:port``.
"""

import os
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from torch import nn

from rlfusion.common.errors import ConfigError
from rlfusion.common.stops import Signals, StopRequested
from rlfusion.config import Serve
from rlfusion.rewards import CallOptions, Reward, asks, build
from rlfusion.rewards.remote.offer import Limits, Offer, require_servable
from rlfusion.rewards.remote.secret import read_token
from rlfusion.rewards.remote.server import ASKING, Service, application
from rlfusion.training.devices import pick_device, set_numerics

MIB = 2**20
CONNECTIONS = 2 * ASKING
"""Open at once; a further one takes the place of the one that has been sending its request for longest."""
GRACE_S = 1
"""For what is being answered when the server ends; what is being received or scored then is refused, and asked again
elsewhere.
"""
HEAD_S = 10.0
"""Within which a connection must have sent the headers of its next request."""


def serve(settings: Serve, say: Callable[[str], None] = print) -> None:
    """Serve until a signal, or until nobody asks any more.

    Raises:
        ConfigError: no such reward, or an address that cannot be listened on.
    """
    set_numerics(settings.threads, pick_device(settings.device))
    service = make_service(settings)
    serving = server(service, settings.idle_s)
    with listening(settings.host, settings.port) as listener:
        try:
            with Signals():
                say(
                    f"serving {settings.reward} at {address(listener)}"
                    + ("" if service.guarded else ", without a token")
                )
                serving.run(sockets=[listener])
        except StopRequested as stop:
            if not serving.started:
                raise
            stop.arrived()  # uvicorn has ended as it should, and raises the signal again
    if service.scoring:
        sys.stdout.flush()
        os._exit(1 if service.hanging else 0)  # its thread cannot be ended in any other way


def make_service(settings: Serve) -> Service:
    """The service of these settings. A reward that asks nothing of the model is made at once.

    Raises:
        ConfigError: no such reward.
    """
    name, device = settings.reward, pick_device(settings.device)
    require_servable(name, settings.options)

    def make(task_info: dict[str, Any]) -> Reward:
        options = {name: settings.options} if settings.options else {}
        reward = build(name, options, task_info, CallOptions(cache=settings.cache))
        return reward.to(device) if isinstance(reward, nn.Module) else reward

    offer = Offer(name, settings.options, asks(name), make)
    if not offer.wants:
        offer.reward({})
    limits = Limits(settings.max_mb * MIB, settings.deadline_s, settings.max_held_mb * MIB)
    return Service(offer, read_token(settings.token_file), limits, str(device))


def listening(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        ConfigError: the address is not to be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(f"host, port = {host}, {port}: cannot be listened on ({error})") from error


def address(listener: socket.socket) -> str:
    """The ``http://host:port`` of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def server(service: Service, idle_s: float = 0.0) -> Any:
    """The HTTP server of a service; its ``run(sockets=[listener])`` serves until ``should_exit`` is set.

    Raises:
        ConfigError: the libraries of the extra ``serve`` are not installed.
    """
    try:
        import uvicorn

        app, connection = application(service), _protocol(min(HEAD_S, service.limits.deadline_s))
    except ImportError as error:
        raise ConfigError(f"serve-reward needs the extra `serve`: pip install 'rlfusion[serve]' ({error})") from error

    async def look() -> None:
        if idle_s and time.monotonic() - service.last > idle_s:
            made.should_exit = True

    class Ending(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            for task in self.server_state.tasks:
                task.cancel()
            await super().shutdown(sockets)

    made = Ending(
        uvicorn.Config(
            app,
            http=connection,
            ws="none",
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=GRACE_S,
            callback_notify=look,
            timeout_notify=1,
            server_header=False,
        )
    )
    return made


def _protocol(head_s: float) -> Any:
    """uvicorn's connection, closed where the headers of a request are not whole within ``head_s``, or where there are
    ``CONNECTIONS`` others and none has been sending for longer: uvicorn itself waits for ever, and a few who drip would
    take all that there are.
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Bounded(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._await_head()
            if len(self.connections) > CONNECTIONS:
                min((c for c in self.connections if c.sending), key=lambda c: c.since).transport.abort()

        @property
        def sending(self) -> bool:
            """Whether its next request is not whole yet."""
            return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

        def on_response_complete(self) -> None:
            self._head.cancel()
            self._await_head()
            super().on_response_complete()

        def connection_lost(self, error: Exception | None) -> None:
            self._head.cancel()
            super().connection_lost(error)

        def _await_head(self) -> None:
            self.since = self.loop.time()
            self._head = self.loop.call_later(head_s, self._late)

        def _late(self) -> None:
            if self.cycle is None or self.cycle.response_complete:
                self.transport.abort()

    return Bounded
