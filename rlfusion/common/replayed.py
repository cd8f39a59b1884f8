"""Calls of a network without gradients, recorded once as a CUDA graph and replayed.

The kernels of a small network take less time than Python and torch take to begin them, one by one; a replay begins them
all at once. It is these very kernels, on the parameters where they lie: what an optimiser, an average or a copied state
writes into them is what the next replay reads. Parameters that lie elsewhere than when a call was recorded have it
recorded again. Calls with gradients, of updates, are not recorded.
"""

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from rlfusion.common.errors import ConfigError, shorten

DEVICE = "cuda"
"""What has graphs."""
MOST = 64
"""Kinds of calls, by their sizes, that are recorded for one network; more are made as ever."""

Place = tuple[dict[str, Any], str, int]


@dataclass(frozen=True)
class Recorded:
    """A call that was recorded: where its tensors go in, what plays it again, where its answer lies afterwards."""

    inputs: list[Tensor]
    play: Callable[[], None]
    answer: Any

    def __call__(self, tensors: list[Tensor]) -> Any:
        """The answer to other tensors of the same kinds, a copy: the next replay writes where this one did."""
        for held, given in zip(self.inputs, tensors, strict=True):
            held.copy_(given, non_blocking=True)
        self.play()
        return tree_map_only(Tensor, Tensor.clone, self.answer)


class Replayed:
    """Calls ``net``, in the place of its own call; those without gradients by replays."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self._recorded: dict[Hashable, Recorded] = {}
        self._places: list[Place] = []
        self._pool: Any = None  # the memory of all its graphs: none reads what another one has left there
        self._alone = threading.Lock()  # two threads would write into the inputs of one graph

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """
        Raises:
            ConfigError: the network is on a CPU, or on several GPUs, or its calls cannot be recorded.
        """
        leaves, structure = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if tensors:
            require_graphs(tensors[0].device)
        if torch.is_grad_enabled() or not tensors:
            return self.net._call_impl(*args, **kwargs)
        with self._alone, _on(tensors):
            return self._answer(tensors, leaves, structure)

    def _answer(self, tensors: list[Tensor], leaves: list[Any], structure: TreeSpec) -> Any:
        if any(of[name].data_ptr() != at for of, name, at in self._places):
            self._recorded.clear()
            self._pool = None
        key = (repr(structure), *map(_kind, leaves), self.net.training, _casting())
        if key not in self._recorded:
            if len(self._recorded) >= MOST:
                return self._call(leaves, structure)
            if not self._recorded:
                self._places = list(_places(self.net))
            self._recorded[key] = self._record(leaves, structure)
        return self._recorded[key](tensors)

    def _call(self, leaves: list[Any], structure: TreeSpec) -> Any:
        args, kwargs = tree_unflatten(leaves, structure)
        return self.net._call_impl(*args, **kwargs)

    def _record(self, leaves: list[Any], structure: TreeSpec) -> Recorded:
        try:
            with torch.inference_mode(False), torch.no_grad():  # what is written to anew may be no tensor of inference
                own = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
                self._pool = self._pool or pool()
                answer, play = recorded(lambda: self._call(own, structure), self._pool)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ConfigError(
                f"compile = graphs: calls of {type(self.net).__name__} cannot be recorded as a CUDA graph "
                f"({shorten(first, 200)}), expected compile true or false"
            ) from error
        return Recorded([leaf for leaf in own if isinstance(leaf, Tensor)], play, answer)


def require_graphs(device: torch.device) -> None:
    """Raise ConfigError for a device that has no CUDA graphs."""
    if device.type != DEVICE:
        raise ConfigError(
            f"compile = graphs: only a GPU has CUDA graphs, and the device is {device.type!r}, expected compile true "
            "or false, or device cuda"
        )


def pool() -> Any:
    """Memory that several graphs may share, one of which plays at a time."""
    return torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None


def _on(tensors: list[Tensor]) -> AbstractContextManager[Any]:
    """Streams and graphs are those of the GPU where the tensors are, and not of the one that is the current.

    Raises:
        ConfigError: they are on several.
    """
    held = list(dict.fromkeys(tensor.device for tensor in tensors if tensor.device.type == "cuda"))
    if len(held) > 1:
        raise ConfigError(
            f"compile = graphs: a call of the network takes tensors on {', '.join(map(str, held))}, expected one GPU, "
            "or compile true or false"
        )
    return torch.cuda.device(held[0]) if held else nullcontext()


def recorded(call: Callable[[], Any], memory: Any) -> tuple[Any, Callable[[], None]]:
    """The tensors in which ``call`` answers on the current GPU, and what makes it answer again, in the ``memory`` of
    ``pool``; what it reads must stay in place.

    Raises:
        RuntimeError: it does what a CUDA graph cannot hold, such as waiting for the GPU.
    """
    here, beside = torch.cuda.current_stream(), torch.cuda.Stream()
    beside.wait_stream(here)
    with torch.cuda.stream(beside):
        call()  # what libraries set up at a first call is no part of the graph
    here.wait_stream(beside)
    torch.clear_autocast_cache()  # weights that autocast has cast are cast anew in each replay
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
        answer = call()
    torch.clear_autocast_cache()
    return answer, graph.replay


def _kind(leaf: Any) -> Hashable:
    return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else (type(leaf), leaf)


def _casting() -> Hashable:
    """How autocast acts."""
    return torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")


def _places(net: nn.Module) -> Iterator[Place]:
    """Where the parameters and buffers of a network lie."""
    for module in net.modules():
        for of in (module._parameters, module._buffers):
            yield from ((of, name, held.data_ptr()) for name, held in of.items() if held is not None)
