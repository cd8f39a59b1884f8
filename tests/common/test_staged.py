"""What crosses to a GPU by ``staged`` goes through page-locked memory and is not waited for; "meta" stands for one."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlfusion.common import tensors
from rlfusion.common.tensors import staged


class Copies(TorchDispatchMode):
    """Within the context, whether each copy is waited for."""

    def __init__(self):
        super().__init__()
        self.waited = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten._to_copy:
            self.waited.append(not (kwargs or {}).get("non_blocking", False))
        return func(*args, **(kwargs or {}))


def test_it_crosses_from_page_locked_memory_without_a_wait(monkeypatch):
    locked = []
    monkeypatch.setattr(tensors, "PINNED", ("meta",))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: locked.append(x) or x)
    x = torch.ones(3, 2)
    with Copies() as copies:
        assert staged(x, "meta").device.type == "meta"
        assert locked[0] is x
        assert copies.waited == [False]
        there = torch.empty(2, device="meta")
        assert staged(there, torch.device("meta")) is there
        assert staged(x, "cpu") is x
    assert len(locked) == 1
    assert copies.waited == [False]
