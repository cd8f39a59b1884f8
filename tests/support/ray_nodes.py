"""``python ray_nodes.py start ...``: Ray's own command, with patience on a machine that is busy.

Ray gives a node up that is not registered within 30 s, and a raylet ends itself where its agents have not written their
ports within 15 s; both are numbers in its code. Here the first wait is longer, and the ports, which are given, are
written before the raylet starts. Nodes may join, on the loopback too: where its processes are told to listen on that
alone (``RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0``) Ray takes the machine for one that can have no others.
"""

import inspect
import time

from ray import _raylet
from ray._private import ray_constants, services

PATIENCE_S = 300.0
UNUSED = -1
_look_up, _start_raylet = services.get_node, services.start_raylet


def patiently(*args):
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return _look_up(*args)
        except RuntimeError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def with_ports(*args, **named):
    given = inspect.signature(_start_raylet).bind(*args, **named).arguments
    ports = {
        "RUNTIME_ENV_AGENT_PORT_NAME": given["runtime_env_agent_port"],
        "DASHBOARD_AGENT_LISTEN_PORT_NAME": given["dashboard_agent_listen_port"],
        "METRICS_AGENT_PORT_NAME": UNUSED,
        "METRICS_EXPORT_PORT_NAME": UNUSED,
    }
    for name, port in ports.items():
        if hasattr(_raylet, name):  # later versions of Ray alone wait for such files
            _raylet.persist_port(given["session_dir"], given["node_id"], getattr(_raylet, name), port)
    return _start_raylet(*args, **named)


class Joinable:
    """Ray's constants, as its command sees them alone."""

    ENABLE_RAY_CLUSTER = True

    def __getattr__(self, name):
        return getattr(ray_constants, name)


if __name__ == "__main__":
    services.get_node, services.start_raylet = patiently, with_ports
    from ray.scripts import scripts

    scripts.ray_constants = Joinable()
    scripts.main()
