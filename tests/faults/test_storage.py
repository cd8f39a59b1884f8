"""Writing: whole or not at all, one line with the path and the cause, and patience while a disk is full."""

import errno
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlfusion.common import storage
from rlfusion.common.errors import ConfigError, StorageError
from rlfusion.common.stops import Signals, StopRequested
from rlfusion.training import checkpoint
from rlfusion.training.folders import discard, locked, new_folder
from rlfusion.training.tracking import Tracker, save_png

WRITERS = {
    "write": lambda folder: storage.write(folder / "file", b"new" * 100),
    "append": lambda folder: storage.append(folder / "file", "new\n"),
    "json": lambda folder: checkpoint.write_json_atomic(folder / "file", {"new": 1}),
    "checkpoint": lambda folder: checkpoint.save(folder / "checkpoints", 2, {"model": torch.ones(3)}),
    "png": lambda folder: save_png(folder / "file", torch.zeros(1, 4, 4)),
    "tracker": lambda folder: Tracker(folder, 1).scalars(2, "train", {"loss": 1.0}),
}
"""One of each kind of file that a run writes."""


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def full(monkeypatch):
    """A disk that is full for the next ``full(number)`` writes, half of whose bytes it takes."""
    left, real = [0, errno.ENOSPC], os.write

    def write(held, data):
        if held > 2 and left[0] > 0:
            left[0] -= 1
            if len(data) > 1:
                real(held, data[: len(data) // 2])
            raise OSError(left[1], os.strerror(left[1]))
        return real(held, data)

    class Opened:
        def __init__(self, path: Path, mode: str) -> None:
            self.held = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            os.close(self.held)

        def write(self, data):
            os.write(self.held, data)

        def flush(self) -> None:
            """Nothing is held back."""

        def fileno(self) -> int:
            return self.held

    opened = Path.open
    monkeypatch.setattr(
        Path, "open", lambda p, mode="r", **k: Opened(p, mode) if mode == "wb" else opened(p, mode, **k)
    )
    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(storage, "RETRY_S", 0.0)
    return lambda number, code=errno.ENOSPC: left.__setitem__(slice(None), [number, code])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_is_waited_for_with_a_message(tmp_path, full, capsys, kind, code):
    (tmp_path / "file").write_bytes(b"old\n")
    checkpoint.save(tmp_path / "checkpoints", 1, {"model": torch.zeros(3)})
    full(3, code)
    WRITERS[kind](tmp_path)
    told = capsys.readouterr().err
    assert os.strerror(code) in told
    assert "waiting up to 300 s for room" in told
    assert str(tmp_path) in told
    assert told.count("\n") == 1
    if kind == "append":
        assert (tmp_path / "file").read_bytes() == b"old\nnew\n"
    if kind == "checkpoint":
        assert checkpoint.latest(tmp_path / "checkpoints").step == 2
    assert not [name for name in content(tmp_path) if "part" in name]


@pytest.mark.parametrize("kind", WRITERS)
def test_where_no_room_is_made_it_gives_up_and_all_is_as_it_was(tmp_path, full, monkeypatch, kind):
    monkeypatch.setenv(storage.VARIABLE, "0.05")
    (tmp_path / "file").write_bytes(b"old\n")
    checkpoint.save(tmp_path / "checkpoints", 1, {"model": torch.zeros(3)})
    before = content(tmp_path)
    full(10**9)
    with pytest.raises(StorageError, match=f"{tmp_path}/.*': No space left on device") as caught:
        WRITERS[kind](tmp_path)
    assert caught.value.exit_code == 74
    assert content(tmp_path) == before
    assert checkpoint.latest(tmp_path / "checkpoints").step == 1


@pytest.mark.parametrize("code", [errno.EIO, errno.EROFS, errno.EACCES, errno.EFBIG, errno.ESTALE])
@pytest.mark.parametrize("kind", WRITERS)
def test_other_failures_are_not_waited_for(tmp_path, full, capsys, kind, code):
    (tmp_path / "file").write_bytes(b"old\n")
    checkpoint.save(tmp_path / "checkpoints", 1, {"model": torch.zeros(3)})
    before = content(tmp_path)
    full(1, code)
    with pytest.raises(StorageError, match=os.strerror(code)):
        WRITERS[kind](tmp_path)
    assert capsys.readouterr().err == ""
    assert content(tmp_path) == before


@pytest.mark.parametrize("kind", WRITERS)
def test_a_folder_that_is_gone(tmp_path, kind):
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "file").write_bytes(b"")
    folder.rmdir()
    if kind in ("checkpoint", "png"):  # they make their own folder
        folder = tmp_path / "file" / "run"
    with pytest.raises(StorageError, match=r"no such folder|part of this path is a file"):
        WRITERS[kind](folder)


def test_a_signal_ends_the_wait(tmp_path, full):
    full(10**9)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    with Signals(), pytest.raises(StopRequested):
        storage.write(tmp_path / "file", b"new")
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    with Signals() as signals:
        signals.hold(True)
        with pytest.raises(StorageError, match="No space left"):
            storage.write(tmp_path / "file", b"new")
    assert content(tmp_path) == {}


@pytest.mark.parametrize("told", ["soon", "-1", "nan"])
def test_a_patience_that_is_none(tmp_path, full, monkeypatch, told):
    monkeypatch.setenv(storage.VARIABLE, told)
    full(1)
    with pytest.raises(ConfigError, match=f"{storage.VARIABLE} = '{told}': expected seconds"):
        storage.write(tmp_path / "file", b"new")


def test_tensorboard_reads_what_was_written_through_a_full_disk(tmp_path, full):
    tracker = Tracker(tmp_path)
    for step in range(4):
        full(step)
        tracker.scalars(step, "train", {"loss": float(step), "reward": -float(step)})
    events = EventAccumulator(str(tmp_path)).Reload()
    for name, sign in (("loss", 1), ("reward", -1)):
        assert [(e.step, e.value) for e in events.Scalars(f"train/{name}")] == [(n, sign * n) for n in range(4)]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("root", "said"),
    [
        ("s3://bucket/runs", "is a URL"),
        ("gs:/bucket", "is a URL"),
        ("file", "it is a file, expected a folder"),
        ("file/runs", "part of this path is a file"),
        ("x" * 300, "File name too long"),
        ("/proc/rlfusion", "no such folder"),
        ("/sys/kernel/rlfusion", "[Pp]ermi|Read-only"),
    ],
)
def test_a_root_that_cannot_be_one(tmp_path, monkeypatch, root, said):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(StorageError, match=said) as caught:
        new_folder(Path(root), "it")
    assert caught.value.exit_code == 74
    assert os.listdir() == ["file"]


def test_a_name_that_cannot_be_one_leaves_no_root(tmp_path):
    with pytest.raises(StorageError, match="too long"):
        new_folder(tmp_path / "runs", "x" * 300)
    assert not (tmp_path / "runs").exists()


def test_a_lock_in_a_folder_that_is_gone(tmp_path):
    with pytest.raises(StorageError, match="no such folder"), locked(tmp_path / "gone"):
        pass


def test_a_folder_that_holds_nothing_is_removed_with_the_root_that_was_made_for_it(tmp_path):
    folder = new_folder(tmp_path / "runs", "it")
    (folder / "config.yaml").write_text("seed: 0")
    (folder / "checkpoints").mkdir()
    Tracker(folder)
    with locked(folder):
        assert discard(folder)
    assert not (tmp_path / "runs").exists()
    folder = new_folder(tmp_path, "it")
    assert discard(folder)
    assert tmp_path.is_dir()  # it was there before


@pytest.mark.parametrize("work", ["metrics.jsonl", "before.json", "samples/before.png", "checkpoints/step-00000001/x"])
def test_a_folder_that_holds_work_stays(tmp_path, work):
    folder = new_folder(tmp_path, "it")
    (folder / work).parent.mkdir(parents=True, exist_ok=True)
    (folder / work).write_text("x")
    assert not discard(folder)
    assert (folder / work).read_text() == "x"
