"""Counts of torch's operations and memory in a piece of work: what a loaded machine cannot change."""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class _Counts(TorchDispatchMode):
    def __init__(self, ops: Counter[str], dtype: torch.dtype | None) -> None:
        super().__init__()
        self.ops, self.dtype = ops, dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.dtype in (None, getattr(next(iter(args), None), "dtype", None)):
            self.ops[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counting(dtype: torch.dtype | None = None) -> Iterator[Counter[str]]:
    """Within the context the operations of torch are counted by name, as "aten.mul"; with ``dtype`` those of tensors of
    it.
    """
    ops: Counter[str] = Counter()
    with _Counts(ops, dtype):
        yield ops


class Memory(TorchDispatchMode):
    """Within the context ``now`` is the bytes of the CPU tensors that torch made in it and that are still there, each
    storage once, and ``peak`` the most that they were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.held: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._seen, result)
        return result

    def _seen(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.held:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            self.now -= size
            del self.held[key]

        self.held[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)
