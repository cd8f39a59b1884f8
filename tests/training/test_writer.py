"""Checkpoints that are written while training goes on, and those that stay."""

import math
import threading
from signal import SIGTERM

import pytest
import torch

from rlfusion.common import shards, storage
from rlfusion.common.errors import ConfigError, StorageError
from rlfusion.common.stops import Entry, StopRequested
from rlfusion.training import checkpoint
from rlfusion.training.checkpoint import NOBODY, Keep, Writer, disk
from rlfusion.training.checkpoint.keep import Held


def state(value: float) -> dict:
    return {"model": {"w": torch.full((3, 2), value), "b": torch.arange(4)}, "step": 1}


def steps(folder) -> set[int]:
    return {step for step, _ in checkpoint.candidates(folder)}


@pytest.mark.parametrize(
    ("keep", "stay"),
    [
        (Keep(last=1), {40}),
        (Keep(last=3), {20, 30, 40}),
        (Keep(last=99), {0, 10, 20, 30, 40}),
        (Keep(last=1, every=20), {0, 20, 40}),
        (Keep(last=1, every=7), {0, 40}),
        (Keep(last=1, best="reward"), {10, 40}),
        (Keep(last=1, best="reward", lowest=True), {20, 40}),
        (Keep(last=2, every=20, best="reward"), {0, 10, 20, 30, 40}),
    ],
)
def test_what_stays(keep, stay):
    values = {0: None, 10: 3.0, 20: -1.0, 30: 3.0, 40: 0.0}
    held = [Held(step, values[step]) for step in (30, 0, 40, 20, 10)]
    assert keep.stay(held) == stay


def test_what_stays_among_checkpoints_of_which_nothing_is_known():
    assert Keep(last=1, best="reward").stay([Held(1, None), Held(2, None)]) == {2}
    assert Keep().stay([]) == set()


@pytest.mark.parametrize("lowest", [False, True])
def test_the_best_stays_from_one_process_to_the_next(tmp_path, lowest):
    rewards = [0.5, 2.0, math.nan, -3.0, 2.0, 1.0]
    for step, reward in enumerate(rewards, 1):  # nothing is held between them but the folder
        keep = Keep(last=1, best="reward", lowest=lowest)
        checkpoint.save(tmp_path, step, state(step), keep, metrics={"reward": reward, "loss": -step})
    assert steps(tmp_path) == ({4, 6} if lowest else {2, 6})
    checkpoint.save(tmp_path, 7, state(7), Keep(last=1, best="loss"), metrics={"loss": 0.0})
    assert steps(tmp_path) == {7}, "another metric: of the others nothing is known"


def test_an_update_without_the_metric_is_not_the_best_one(tmp_path):
    keep = Keep(last=1, best="reward")
    for step, metrics in enumerate([{"reward": -5.0}, {}, {"reward": math.inf}, {"reward": -6.0}], 1):
        checkpoint.save(tmp_path, step, state(step), keep, metrics=metrics)
    assert steps(tmp_path) == {1, 4}
    assert checkpoint.latest(tmp_path).warnings == ()


def test_a_damaged_one_is_not_the_best(tmp_path):
    keep = Keep(last=1, best="reward")
    checkpoint.save(tmp_path, 1, state(1), keep, metrics={"reward": 9.0})
    (tmp_path / "step-00000001" / "manifest.json").write_text("[1]")
    checkpoint.save(tmp_path, 2, state(2), keep, metrics={"reward": 1.0})
    assert steps(tmp_path) == {2}


def test_the_manifest_is_as_before_where_no_best_one_is_asked_for(tmp_path):
    checkpoint.save(tmp_path, 1, state(1), metrics={"reward": 9.0})
    assert b"metric" not in (tmp_path / "step-00000001" / "manifest.json").read_bytes()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"last": 0}, "last = 0"),
        ({"last": -1}, "last = -1"),
        ({"every": -2}, "every = -2"),
        ({"lowest": True}, r"checkpoints\.lowest = true without checkpoints\.best"),
    ],
)
def test_what_cannot_be_kept_is_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        Keep(**settings)


def test_a_metric_that_is_none_is_refused_with_a_near_one():
    Keep(best="reward").require({"reward": math.nan})
    Keep().require({})
    with pytest.raises(ConfigError, match=r"checkpoints\.best.*'rewards'.*reward"):
        Keep(best="rewards").require({"reward": 1.0, "loss": 2.0})


class Slow:
    """A disk that takes nothing before it is told to; the ``fail``-th write fails."""

    def __init__(self, monkeypatch, fail=0):
        self.go, self.writes, self.fail = threading.Event(), 0, fail
        self.real = disk._write_file
        monkeypatch.setattr(disk, "_write_file", self)

    def __call__(self, path, blob):
        self.writes += 1
        assert self.go.wait(20)
        if self.writes == self.fail:
            raise OSError(5, "Input/output error")
        self.real(path, blob)


def begin(writer, step, held, done=lambda: None):
    writer.begin(step, held, NOBODY, {}, done)


def test_training_goes_on_while_a_checkpoint_is_written_and_changes_nothing_of_it(tmp_path, monkeypatch):
    slow, held, done = Slow(monkeypatch), state(1.0), []
    with Writer(tmp_path, Keep()).open() as writer:
        begin(writer, 1, held, lambda: done.append(steps(tmp_path)))
        held["model"]["w"].fill_(7.0)  # the next update, in place
        held["model"]["b"] += 100
        assert (steps(tmp_path), done) == (set(), [])
        slow.go.set()
    assert done == [{1}], "told once it is whole"
    found = checkpoint.load(tmp_path / "step-00000001")["model"]
    assert torch.equal(found["w"], torch.ones(3, 2))
    assert torch.equal(found["b"], torch.arange(4))


def test_the_next_one_waits_and_its_copy_is_taken_in_the_same_memory(tmp_path, monkeypatch):
    slow = Slow(monkeypatch)
    with Writer(tmp_path, Keep()).open() as writer:
        begin(writer, 1, state(1.0))
        first = writer._kept.shards["model"]["model/'w'"].data_ptr()
        threading.Timer(0.1, slow.go.set).start()
        begin(writer, 2, state(2.0))
        assert steps(tmp_path) >= {1}
        assert writer._kept.shards["model"]["model/'w'"].data_ptr() == first
        begin(writer, 3, {"model": {"w": torch.zeros(9)}})  # of another shape
    for step in (1, 2):
        found = checkpoint.load(tmp_path / f"step-{step:08}")["model"]["w"]
        assert torch.equal(found, torch.full((3, 2), float(step)))
    assert checkpoint.load(tmp_path / "step-00000003")["model"]["w"].shape == (9,)


def test_the_bytes_are_those_of_one_that_was_waited_for(tmp_path):
    held = {"model": {"w": torch.randn(4, 6).t()[::2]}, "tied": {"w": torch.zeros(3).expand(2, 3)}, "n": 3}
    for name, background in (("here", False), ("beside", True)):
        with Writer(tmp_path / name, Keep(background=background)).open() as writer:
            begin(writer, 5, held)
            assert (steps(tmp_path / name) == {5}) or background
    checkpoint.save(tmp_path / "plain", 5, held)
    files = {
        name: {p.name: p.read_bytes() for p in (tmp_path / name / "step-00000005").iterdir()}
        for name in ("here", "beside", "plain")
    }
    assert files["here"] == files["beside"] == files["plain"]


def test_what_failed_in_the_thread_is_raised_at_the_next_one(tmp_path, monkeypatch):
    slow, marked = Slow(monkeypatch, fail=1), []
    slow.go.set()
    writer = Writer(tmp_path, Keep())
    begin(writer, 1, state(1.0), lambda: marked.append(1))
    with pytest.raises(StorageError, match=r"step-00000001': Input/output error"):
        begin(writer, 2, state(2.0))
    assert (steps(tmp_path), marked) == (set(), [])
    begin(writer, 3, state(3.0))  # it was told once
    writer.settle()
    assert steps(tmp_path) == {3}


def test_without_background_it_is_raised_at_once(tmp_path, monkeypatch):
    Slow(monkeypatch, fail=1).go.set()
    with pytest.raises(StorageError, match="Input/output error"):
        begin(Writer(tmp_path, Keep(background=False)), 1, state(1.0))


def test_at_the_end_of_training_a_failure_is_raised(tmp_path, monkeypatch):
    Slow(monkeypatch, fail=1).go.set()
    with pytest.raises(StorageError), Writer(tmp_path, Keep()).open() as writer:
        begin(writer, 1, state(1.0))


def ended(folder, error, slow=None):
    """A training that ``error`` ends while its checkpoint is being written."""
    with Writer(folder, Keep()).open() as writer:
        begin(writer, 1, state(1.0))
        if slow:
            threading.Timer(0.2, slow.go.set).start()
        raise error


def test_a_stop_waits_for_what_is_being_written(tmp_path, monkeypatch):
    slow = Slow(monkeypatch)
    with pytest.raises(StopRequested):
        ended(tmp_path, StopRequested(SIGTERM, True), slow)
    assert steps(tmp_path) == {1}


def test_a_stop_does_not_say_saved_of_what_could_not_be_written(tmp_path, monkeypatch):
    Slow(monkeypatch, fail=1).go.set()
    with pytest.raises(StorageError):
        ended(tmp_path, StopRequested(SIGTERM, True))


def test_a_process_that_ends_at_once_waits_too(tmp_path, monkeypatch):
    slow, entry = Slow(monkeypatch), Entry()
    monkeypatch.setattr(Entry, "current", entry)
    with Writer(tmp_path, Keep()).open() as writer:
        begin(writer, 1, state(1.0))
        threading.Timer(0.2, slow.go.set).start()
        assert [say(True) for say in entry.leaving] == [""]
        assert steps(tmp_path) == {1}
    assert entry.leaving == []


def test_an_error_of_training_comes_first_and_says_what_was_not_written(tmp_path, monkeypatch):
    Slow(monkeypatch, fail=1).go.set()
    with pytest.raises(ZeroDivisionError) as error:
        ended(tmp_path, ZeroDivisionError("in training"))
    assert "Input/output error" in error.value.__notes__[0]


def test_a_silent_process_writes_nothing_of_a_state_that_is_not_split_whatever_else_it_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "active", lambda: True)  # of an earlier job, a network that is split
    with storage.silent():
        checkpoint.save(tmp_path, 1, state(1.0))
        with Writer(tmp_path, Keep()).open() as writer:
            begin(writer, 2, state(2.0))
    assert not steps(tmp_path)
