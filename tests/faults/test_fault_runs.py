"""Real runs, and what goes wrong around them: a disk that is full, a driver that is killed under supervise, and a
cluster whose head is. Each ends in all the bits of the undisturbed one. The rows are printed at the end, as those of
``test_fault_table``.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from clusters import standing
from fault_rows import Row, check
from interrupted_runs import Job, outcome, place
from processes import PATIENCE, Process
from tiny_runs import TINY

from rlfusion.cli.main import main
from rlfusion.rollout import ray_cluster

pytestmark = pytest.mark.alone
UPDATES, WALKS = 12, 24
SETTINGS = (*TINY, "--updates", UPDATES, "--checkpoint_every", 1, "--reward", "meddling:brightness")


@pytest.fixture(scope="module")
def whole(tiny_root, tmp_path_factory) -> tuple[dict[str, object], float]:
    """What the undisturbed run leaves, and its seconds."""
    job = place(tmp_path_factory.mktemp("whole"), tiny_root / "cache", "finetune", *SETTINGS)
    began = time.monotonic()
    assert job.start().wait().code == 0
    return outcome(job.folder), time.monotonic() - began


def row(job: Job, name: str, seen_s: float, seconds: float, whole: tuple[dict[str, object], float]) -> Row:
    ours = outcome(job.folder)
    queries = json.loads((job.folder / "summary.json").read_text())["queries"]
    return Row(name, seen_s, max(0.0, seconds - whole[1]), UPDATES * WALKS - queries, ours == whole[0])


def said(process: Process) -> str:
    return process.err.read_text() if process.err.exists() else ""


def when(reached: Callable[[], bool], process: Process) -> float:
    """The time at which that is so."""
    while not reached():
        assert process.process.is_alive(), said(process)
        time.sleep(0.01)
    return time.monotonic()


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A disk of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def filled(disk: Path, left: int) -> Path:
    """A file that leaves so many bytes of room."""
    file = disk / "filler"
    free = shutil.disk_usage(disk).free
    file.write_bytes(b"x" * (free - left))
    return file


def on_disk(disk: Path, cwd: Path, tiny_root: Path) -> Job:
    """A job whose runs are on the disk."""
    job = place(cwd, tiny_root / "cache", "finetune", *SETTINGS)
    shutil.move(cwd / "runs", disk / "runs")
    (cwd / "runs").symlink_to(disk / "runs")
    return job


def test_a_full_disk_that_stays_full_is_code_74_and_resumed(
    disk, whole, table, tiny_root, tmp_path, monkeypatch, capsys
):
    job = on_disk(disk, tmp_path / "cwd", tiny_root)
    filler = filled(disk, 400_000)
    monkeypatch.chdir(job.cwd)
    monkeypatch.setenv("RLFUSION_STORAGE_PATIENCE_S", "0")
    began = time.monotonic()
    assert main([job.command, *map(str, job.settings), "--root", "runs", "--name", "it"]) == 74
    assert "No space left on device" in capsys.readouterr().err
    filler.unlink()
    assert job.resume().wait().code == 0
    check(row(job, "full disk, resumed when there is room", math.nan, time.monotonic() - began, whole), table)


def test_a_driver_under_supervise(whole, table, tiny_root, tmp_path):
    job = place(tmp_path, tiny_root / "cache", "finetune", *SETTINGS)
    run = (job.command, *job.settings, "--root", "runs", "--name", "it")
    process = Process(job.cwd, "supervise", "--backoff_s", 0.1, "--", *run)
    began = time.monotonic()
    when(lambda: bool(job.checkpoints()), process)
    (driver,) = psutil.Process(process.process.pid).children()
    driver.kill()
    at = time.monotonic()
    seen = when(lambda: "killed by SIGKILL" in said(process), process) - at
    result = process.wait()
    assert result.code == 0, result.err
    check(row(job, "SIGKILL of the driver, under supervise", seen, time.monotonic() - began, whole), table)


def under_supervise(job: Job, *settings: object) -> subprocess.Popen:
    """The job under supervise, in a process that knows the token of the clusters of this one."""
    ours = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": ray_cluster._TOKEN, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    run = (job.command, *job.settings, *settings, "--root", "runs", "--name", "it")
    given = ("supervise", "--backoff_s", 1, "--restarts", 20, "--", *run)
    with (job.cwd / "said").open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "rlfusion", *map(str, given)],
            **{"cwd": job.cwd, "env": os.environ | ours, "stdout": file, "stderr": file},
        )


def waited(process: subprocess.Popen, reached: Callable[[], bool]) -> float:
    """The time at which that is so."""
    deadline = time.monotonic() + PATIENCE
    while not reached():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return time.monotonic()


def test_a_cluster_whose_head_is_killed_under_supervise_and_another_takes_its_place(whole, table, tiny_root, tmp_path):
    """Its raylet dies with it, to which the driver is connected; and then its nodes."""
    job = place(tmp_path, tiny_root / "cache", "finetune", *SETTINGS)
    said = tmp_path / "said"
    with ExitStack() as first:
        nodes = first.enter_context(standing({}))
        process = under_supervise(job, "--rollout.workers", 1, "--ray.address", nodes.cluster.address)
        began = time.monotonic()
        try:
            waited(process, lambda: bool(job.checkpoints()))
            for name in ("gcs_server", "raylet"):
                os.kill(nodes.cluster.head_node.all_processes[name][0].process.pid, signal.SIGKILL)
            at = time.monotonic()
            seen = waited(process, lambda: "finetune ended with exit code" in said.read_text()) - at
            port = int(nodes.cluster.address.rpartition(":")[2])
            first.close()
            with standing({}, port=port):
                assert process.wait(PATIENCE) == 0, said.read_text()
        finally:
            process.kill()
    if "ended with exit code 1 " not in said.read_text():  # Ray ends it where a call of its own sees it first
        gone = "rlfusion: unavailable: the Ray node of this process is gone: its raylet has ended; go on with: rlfusion"
        assert said.read_text().count(gone) == 1
        assert "ended with exit code 69" in said.read_text()
    name = "SIGKILL of the head of a cluster, under supervise; another takes its place"
    check(row(job, name, seen, time.monotonic() - began, whole), table)
