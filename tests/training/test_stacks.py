"""Where processes stood when they were given up."""

import errno
from types import SimpleNamespace

import pytest
from ray.exceptions import GetTimeoutError, RayActorError

from rlfusion.common import storage
from rlfusion.common.errors import StorageError
from rlfusion.rollout import ray_stacks
from rlfusion.rollout.ray_ranks import Group, Rank, _Lost, _stood
from rlfusion.training.stacks import write_stacks


def test_each_loss_has_a_file_of_its_own(tmp_path):
    for n in (1, 2, 3):
        file = write_stacks(tmp_path, "ranks", {1: "here\n", 0: f"there {n}\n"})
        assert file == tmp_path / "stacks" / f"ranks-{n}.txt"
        assert file.read_text().split("\n\n", 1)[1] == f"ranks 0\nthere {n}\n\nranks 1\nhere\n"


def test_a_rank_says_where_its_threads_stand():
    assert "test_a_rank_says_where_its_threads_stand" in Rank.stacks(None)


class Actor:
    """Whose call is its number."""

    def __init__(self, rank: int) -> None:
        self.stacks = self
        self.rank = rank

    def options(self, concurrency_group: str) -> "Actor":
        assert concurrency_group == ray_stacks.BESIDE
        return self

    def remote(self) -> int:
        return self.rank


def test_a_rank_that_does_not_answer_and_one_that_died_are_said_to(monkeypatch):
    answers = {0: "Thread 1\n", 1: GetTimeoutError("late"), 2: RayActorError()}

    def get(call, timeout):
        assert timeout == 0
        if isinstance(answers[call], Exception):
            raise answers[call]
        return answers[call]

    fake = SimpleNamespace(wait=lambda calls, num_returns, timeout: (calls, []), get=get)
    monkeypatch.setattr(ray_stacks, "ray", fake)
    found = Group.stacks(SimpleNamespace(actors=[Actor(rank) for rank in range(3)]))
    assert found[0] == "Thread 1\n"
    assert found[1] == "no answer within 2 s: late\n"
    assert found[2].startswith("no answer within 2 s: ")


def lose():
    raise _Lost("rank 1 does not answer for 30 s")


def test_the_line_about_a_loss_names_the_file(tmp_path):
    group = SimpleNamespace(stacks=lambda: {0: "Thread 1\n"})
    assert _stood(group, {"folder": str(tmp_path)}, lambda: 7) == 7
    assert not (tmp_path / "stacks").exists()
    with pytest.raises(_Lost, match=r"^rank 1 does not answer for 30 s; where each rank stood: .*/stacks/ranks-1.txt$"):
        _stood(group, {"folder": str(tmp_path)}, lose)
    with pytest.raises(_Lost, match=r"for 30 s$"):
        _stood(group, {}, lose)


def test_a_full_disk_does_not_end_what_can_be_begun_anew(tmp_path, monkeypatch):
    def full(*_):
        raise StorageError(errno.ENOSPC, "No space left on device", "x")

    monkeypatch.setattr(storage, "write", full)
    with pytest.raises(_Lost, match=r"for 30 s$"):
        _stood(SimpleNamespace(stacks=dict), {"folder": str(tmp_path)}, lose)
