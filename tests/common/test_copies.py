"""Copies of a state: equal, apart from it, and in the memory of the copy before."""

from collections import OrderedDict

import pytest
import torch
from counted import counting
from torch import nn

from rlfusion.common.copies import copied


class Own:
    """A thing of a stranger's state."""

    def __init__(self) -> None:
        self.numbers = [1, 2]


def state() -> dict:
    return {
        "weights": OrderedDict(a=torch.arange(4.0), b=torch.ones(2, 3, dtype=torch.float64)),
        "moments": [torch.zeros(2), (torch.tensor(3), "text", None)],
        "empty": torch.zeros(0),
        "last": torch.arange(6.0).reshape(2, 3).T,
        "count": 3,
        "own": Own(),
    }


def tensors(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in inner for tensor in tensors(item)]


def test_a_copy_is_equal_and_shares_nothing():
    held = state()
    twin = copied(held)
    assert [type(item) for item in twin.values()] == [type(item) for item in held.values()]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(tensors(twin), tensors(held), strict=True))
    for tensor in tensors(held):
        tensor += 1
    held["own"].numbers.append(3)
    held["moments"].append(0)
    assert twin["weights"]["a"].tolist() == [0, 1, 2, 3]
    assert twin["last"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert (twin["moments"][1][0].item(), len(twin["moments"]), twin["own"].numbers) == (3, 2, [1, 2])


def test_the_next_copy_is_in_the_memory_of_the_one_before():
    held = state()
    first = copied(held)
    places = [tensor.data_ptr() for tensor in tensors(first)]
    for tensor in tensors(held):
        tensor += 1
    with counting() as ops:
        second = copied(held, first)
    assert [tensor.data_ptr() for tensor in tensors(second)] == places
    assert all(torch.equal(a, b) for a, b in zip(tensors(second), tensors(held), strict=True))
    assert set(ops) == {"aten._foreach_copy_"}
    assert sum(ops.values()) == 3  # float32, float64 and int64


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(3),
        torch.zeros(2, dtype=torch.float64),
        torch.zeros(2, 1),
        torch.zeros(2).expand(2),
        "text",
        [1],
        None,
    ],
)
def test_what_does_not_fit_is_copied_anew(other):
    value = torch.tensor([1.0, 2.0])
    twin = copied({"x": value, "y": (value,)}, {"x": other, "y": other})
    assert twin["x"].tolist() == twin["y"][0].tolist() == [1, 2]
    assert twin["x"].data_ptr() not in (value.data_ptr(), twin["y"][0].data_ptr())


def test_a_copy_of_itself_would_be_none():
    held = {"x": torch.ones(2)}
    assert copied(held, held)["x"].data_ptr() != held["x"].data_ptr()


def test_what_is_more_than_numbers_is_copied_as_python_does():
    weight = nn.Parameter(torch.ones(2))
    twin = copied({"p": weight, "s": torch.eye(3).to_sparse()}, {"p": nn.Parameter(torch.zeros(2))})
    assert isinstance(twin["p"], nn.Parameter)
    assert twin["p"].requires_grad
    assert twin["p"].tolist() == [1, 1]
    assert torch.equal(twin["s"].to_dense(), torch.eye(3))
