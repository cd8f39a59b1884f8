"""How a GPU computes is set in one place, for every process that works on one, and said where it cannot be had."""

import os

import pytest
import torch

from rlfusion.common.errors import ConfigError, foreseen
from rlfusion.config import Compare, Finetune
from rlfusion.jobs.parts import opened
from rlfusion.training import devices


def held() -> tuple[bool, ...]:
    cudnn = torch.backends.cudnn
    return (
        torch.are_deterministic_algorithms_enabled(),
        cudnn.deterministic,
        cudnn.benchmark,
        cudnn.allow_tf32,
        torch.backends.cuda.matmul.allow_tf32,
        torch.utils.deterministic.fill_uninitialized_memory,
    )


@pytest.fixture(autouse=True)
def _restored():
    """The switches are this process's own."""
    before, threads, space = held(), torch.get_num_threads(), os.environ.get(devices.WORKSPACE)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(before[0], warn_only=False)
    cudnn = torch.backends.cudnn
    _, cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul, fill = before
    torch.backends.cuda.matmul.allow_tf32, torch.utils.deterministic.fill_uninitialized_memory = matmul, fill
    os.environ.pop(devices.WORKSPACE, None)
    if space is not None:
        os.environ[devices.WORKSPACE] = space


def test_a_gpu_repeats_itself_unless_told_otherwise():
    devices.set_numerics(1, torch.device("cuda"))
    assert held() == (True, True, False, False, False, False)
    assert os.environ[devices.WORKSPACE] in devices.WORKSPACES
    devices.set_numerics(1, "cuda:1", deterministic=False, tf32=True)
    assert held() == (False, False, True, True, True, False)


def test_what_does_not_repeat_itself_is_told_or_refused():
    devices.set_numerics(1, "cuda", deterministic="strict")
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled() is False
    devices.set_numerics(1, "cuda")
    assert torch.is_deterministic_algorithms_warn_only_enabled() is True


def test_a_cpu_has_one_way():
    before = held()
    devices.set_numerics(1, "cpu", deterministic=False, tf32=True)
    assert held() == before
    assert devices.told() == (False, True)  # as a worker with a GPU is to be told


def test_the_users_own_workspace_is_kept_where_it_repeats_itself():
    os.environ[devices.WORKSPACE] = ":16:8"
    devices.set_numerics(1, "cuda")
    assert os.environ[devices.WORKSPACE] == ":16:8"


def test_an_operation_that_cannot_repeat_itself_is_named():
    torch.use_deterministic_algorithms(True)
    with pytest.raises(RuntimeError) as raised:
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))
    said = foreseen(raised.value)
    assert isinstance(said, ConfigError)
    assert "put_" in str(said)
    assert "expected deterministic = true" in str(said)


def test_every_run_of_a_comparison_and_every_worker_computes_as_told():
    compared = Compare(deterministic=False, tf32=True)
    assert all((run.deterministic, run.tf32) == (False, True) for _, _, _, run in compared.runs())
    task = opened(Finetune(deterministic=False, tf32=True)).task
    assert (task.deterministic, task.tf32) == (False, True)
