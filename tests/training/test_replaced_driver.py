"""A run whose driver was replaced: what still works for the old one may write nothing more."""

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlfusion import config
from rlfusion.cli import ranked
from rlfusion.common.errors import ConfigError, StorageError
from rlfusion.training import checkpoint, folders
from rlfusion.training.checkpoint import disk


def state(value: float) -> dict:
    return {"model": {"w": torch.full((3, 2), value)}}


@pytest.fixture
def run(tmp_path) -> Path:
    with folders.locked(tmp_path):
        checkpoint.save(tmp_path / "checkpoints", 1, state(1.0))
        yield tmp_path


def taken_by_another(folder: Path) -> None:
    (folder / ".lock").write_text("elsewhere 7 0123456789abcdef")


def test_a_lock_says_another_text_each_time(tmp_path):
    seen = []
    for _ in range(2):
        with folders.locked(tmp_path):
            seen.append(folders.mark_of(tmp_path))
            folders.require_held(tmp_path)
    assert len(set(seen)) == 2


def test_who_waits_for_a_lock_leaves_what_it_says(tmp_path):
    with folders.locked(tmp_path):
        mark = folders.mark_of(tmp_path)
        with pytest.raises(ConfigError, match=r"in use by another process$"), folders.locked(tmp_path):
            pass
        assert folders.mark_of(tmp_path) == mark
        folders.require_held(tmp_path)


def test_a_folder_that_nobody_locked_is_nobodys(tmp_path):
    checkpoint.save(tmp_path / "checkpoints", 1, state(1.0))
    assert checkpoint.latest(tmp_path / "checkpoints").step == 1


def test_no_checkpoint_is_begun_once_another_has_the_run(run):
    taken_by_another(run)
    with pytest.raises(ConfigError, match=r"since \(elsewhere 7, after .* \d+\): this one ends"):
        checkpoint.save(run / "checkpoints", 2, state(2.0))
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000001"]


def test_nor_given_its_name_where_that_happens_while_it_is_written(run, monkeypatch):
    write = disk._write_file

    def interrupted(path, blob):
        write(path, blob)
        taken_by_another(run)

    monkeypatch.setattr(disk, "_write_file", interrupted)
    with pytest.raises(ConfigError, match="by another process since"):
        checkpoint.save(run / "checkpoints", 2, state(2.0))
    assert checkpoint.latest(run / "checkpoints").step == 1


def test_a_rank_asks_at_each_step(run):
    actor = SimpleNamespace(stop=0)
    signals = ranked._Told(actor, run)
    assert signals.requested == ""
    signals.check()
    taken_by_another(run)
    for ask in (lambda: signals.requested, signals.check):
        with pytest.raises(ConfigError, match="by another process since"):
            ask()


def test_a_rank_works_for_the_driver_that_began_it(run, monkeypatch):
    told = []
    monkeypatch.setitem(ranked.JOBS, "pretrain", lambda *_: told.append(threading.current_thread()))
    payload = {"command": "pretrain", "config": config.to_yaml(config.Pretrain()), "folder": str(run)}
    payload["mark"] = folders.mark_of(run)
    ranked.work(payload, SimpleNamespace(stop=0, say=print))
    assert len(told) == 1
    taken_by_another(run)
    with pytest.raises(ConfigError, match="by another process since"):
        ranked.work(payload, SimpleNamespace(stop=0, say=print))
    assert len(told) == 1


def test_a_lock_that_is_gone_is_an_error_of_storage(run):
    (run / ".lock").unlink()
    with pytest.raises(StorageError, match="lock"):
        checkpoint.save(run / "checkpoints", 2, state(2.0))
