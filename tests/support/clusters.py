"""A Ray cluster of several nodes on this machine, which this process may be connected to."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import pytest

from rlfusion.rollout import ray_cluster
from rlfusion.rollout.ray_folders import private_folder

PATIENCE_S = 150.0


class Nodes(NamedTuple):
    """The cluster, and the processes that were started for it."""

    cluster: Any
    started: list[Any]
    ports: ExitStack

    def join(self, **resources: float) -> Any:
        """Another node, with these resources: by default one CPU."""
        with ray_cluster._patient(PATIENCE_S, self.started, self.ports):
            return self.cluster.add_node(**{"num_cpus": 1, **resources})


@contextmanager
def several(*nodes: dict[str, float]) -> Iterator[Nodes]:
    """``standing``, and this process is connected."""
    import ray

    with standing(*nodes) as held:
        ray.init(address=held.cluster.address, **ray_cluster.OPTIONS)
        try:
            yield held
        finally:
            ray.shutdown()


@contextmanager
def standing(*nodes: dict[str, float], port: int = 0) -> Iterator[Nodes]:
    """A head without CPUs, which listens there, and a node of each of these resources."""
    from ray._private import utils
    from ray.cluster_utils import Cluster

    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "write_ray_address", lambda *given: None)  # that is a file of the whole machine
        patch.setattr(utils, "set_sigterm_handler", lambda handler: None)  # a node may join from another thread
        stack.enter_context(ray_cluster._undisturbed_signals())  # other tests of this process look at them
        folder = stack.enter_context(private_folder())
        stack.enter_context(ray_cluster._private_environment(folder, PATIENCE_S))
        started: list[Any] = []
        with ray_cluster._patient(PATIENCE_S, started, stack):
            head = {"num_cpus": 0, "include_dashboard": False, "temp_dir": str(folder / "ray"), "gcs_server_port": port}
            cluster = Cluster(initialize_head=True, head_node_args=head)
        stack.callback(cluster.shutdown)
        held = Nodes(cluster, started, stack)
        for resources in nodes:
            held.join(**resources)
        yield held
