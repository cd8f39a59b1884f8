"""Killed before each open, fsync, rename and removal of a checkpoint, with the power: the old or the new one is whole.

A fork of this process writes; at the chosen point it loses what it wrote and did not sync, and is gone without any
clean-up, as by SIGKILL and a power cut at once.
"""

import math
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from fault_rows import Row, check

from rlfusion.training import checkpoint
from rlfusion.training.checkpoint import disk, saving

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
CUT, UNSYNCED = 9, 3


def state(value: float) -> dict:
    return {"model": {"w": torch.full((40, 5), value), "b": torch.full((3,), value)}, "other": {"n": int(value)}}


class Cut:
    """Counts the points of a writer in ``folder``, and cuts the power at one of them."""

    def __init__(self, folder: Path, at: int) -> None:
        self.folder, self.at, self.seen, self.quiet = folder, at, 0, False
        self.synced = {path.stat().st_ino for path in folder.rglob("*")}
        self.entered = False
        """A name was made or moved in the folder since it was last synced."""
        self.fsync = os.fsync

    def begin(self) -> None:
        sys.addaudithook(self._hook)
        os.fsync = self._fsync

    def _hook(self, event: str, given: tuple) -> None:
        writes = event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR)
        if self.quiet or not (writes or event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir")):
            return
        if event == "os.rename":
            self.entered = True
        self.point()

    def _fsync(self, held: int) -> None:
        self.point()
        self.fsync(held)
        about = os.fstat(held)
        self.synced.add(about.st_ino)
        if about.st_ino == self.folder.stat().st_ino:
            self.entered = False
        self.point()

    def point(self) -> None:
        self.seen += 1
        if self.seen == self.at:
            self.quiet = True
            for path in self.folder.rglob("*"):
                if path.is_file() and path.stat().st_ino not in self.synced:
                    os.truncate(path, 0)
            os._exit(CUT)


def written(folder: Path, step: int, value: float, at: int) -> int:
    """How the writer of a checkpoint ended whose power was cut at a point: CUT, UNSYNCED, or 0 where it was done."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        cut = Cut(folder, at)
        held = state(value)
        cut.begin()
        checkpoint.save(folder, step, held)
        code = UNSYNCED if cut.entered else 0
    finally:
        os._exit(code)


def tried(tmp_path: Path, step: int) -> list[tuple[int, list[float], int]]:
    """Cut at each point of saving ``step`` over a whole checkpoint of step 1: what is then found, step by value."""
    whole = tmp_path / "whole"
    checkpoint.save(whole, 1, state(1))
    found = []
    for at in range(1, 500):
        folder = tmp_path / f"{at}"
        shutil.copytree(whole, folder)
        code = written(folder, step, 7.0, at)
        newest = checkpoint.latest(folder)
        assert newest is not None, f"nothing is left after a cut at point {at}"
        assert newest.warnings == (), f"point {at}"
        held = checkpoint.load(newest.path)
        values = {float(v) for t in held["model"].values() for v in t.unique()} | {float(held["other"]["n"])}
        assert not list(folder.glob(".*")), f"leftovers after point {at}"
        found.append((newest.step, sorted(values), code))
        shutil.rmtree(folder)
        if code != CUT:
            return found
    raise AssertionError("it never ended")


@pytest.mark.parametrize("step", [2, 1])
def test_a_power_cut_at_any_point_leaves_the_old_or_the_new_checkpoint_whole(tmp_path, table, step):
    found = tried(tmp_path, step)
    assert len(found) > 15
    assert all((at, values) in ((1, [1.0]), (step, [7.0])) for at, values, _ in found)
    assert [found[0][:2], found[-1]] == [(1, [1.0]), (step, [7.0], 0)]
    news = [values == [7.0] for _, values, _ in found]
    assert news == sorted(news)  # once it is there it stays
    which = "the next one" if step == 2 else "one that is written over"
    check(
        Row(f"power cut at each of {len(found) - 1} points of a checkpoint, {which}", *[math.nan] * 2, 0, True), table
    )


def test_a_writer_that_does_not_sync_its_files_is_found_out(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_write_file", Path.write_bytes)
    with pytest.raises(AssertionError):
        tried(tmp_path, 2)


def test_a_writer_that_does_not_sync_the_folder_is_found_out(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_sync_folder", lambda path: None)
    assert tried(tmp_path, 2)[-1][2] == UNSYNCED


def test_a_writer_that_writes_in_place_is_found_out(tmp_path, monkeypatch):
    def in_place(path: Path, files: dict[str, bytes]) -> None:
        path.mkdir(parents=True, exist_ok=True)
        for name, blob in files.items():
            disk._write_file(path / name, blob)

    monkeypatch.setattr(saving, "attempt", in_place)
    with pytest.raises(AssertionError):
        tried(tmp_path, 2)
