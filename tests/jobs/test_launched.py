"""A run on a real Ray cluster whose Python has no rlfusion, by the commands of docs/cluster.md: launched and followed,
looked at, stopped, resumed, and at last the bits of a run that nothing disturbed.

The cluster has three nodes, on this machine: a head without CPUs for workers, and two with one each.
"""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
from interrupted_runs import Job, assert_same, outcome
from processes import Process
from tiny_runs import TINY

from rlfusion.cli.main import main

pytestmark = [pytest.mark.alone, pytest.mark.skipif(sys.platform != "linux", reason="Ray clusters run on Linux")]
ROOT = Path(__file__).parents[2]
NODES = ROOT / "tests" / "support" / "ray_nodes.py"
PATIENCE_S = 300.0
WORKERS = 2
REWARD = """
import sys, time
from pathlib import Path

def score(samples, cond):
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        here = sys.modules["ray"].get_runtime_context()
        if here.get_actor_id():
            node, waiting = Path(ROOT, here.get_node_id()), time.monotonic() + PATIENCE_S
            first = not node.exists()
            node.touch()
            while not first and len(list(Path(ROOT).iterdir())) < WORKERS and time.monotonic() < waiting:
                time.sleep(0.05)
        time.sleep(0.05)
    return samples.flatten(1).mean(1)
"""
SETTINGS = (*TINY, "--updates", 40, "--checkpoint_every", 1, "--reward", "my_rewards.py:score")


def documented() -> dict[str, list[str]]:
    """The commands of the guide's first block, by what they do."""
    text = (ROOT / "docs" / "cluster.md").read_text()
    block = text.partition("## In five commands")[2].partition("```bash")[2].partition("```")[0]
    lines = [shlex.split(line)[1:] for line in block.splitlines() if line.startswith("rlfusion ")]
    return {line[0] if line[0] == "launch" else line[1]: line for line in lines}


def stranger(folder: Path) -> Path:
    """The Python of an environment that has the tests' libraries, and no rlfusion."""
    venv.create(folder, with_pip=False, symlinks=True)
    (own,) = folder.glob("lib/python*/site-packages")
    borrowed = folder / "borrowed"
    borrowed.mkdir()
    for entry in (entry for path in sys.path if "site-packages" in path for entry in Path(path).iterdir()):
        if not re.search(r"rlfusion|\.pth$|^_virtualenv", entry.name) and not (borrowed / entry.name).exists():
            (borrowed / entry.name).symlink_to(entry)
    (own / "borrowed.pth").write_text(str(borrowed))
    python = folder / "bin" / "python"
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    assert subprocess.run([python, "-c", "import rlfusion"], cwd=folder, env=bare, capture_output=True).returncode == 1
    return python


def ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    numbers = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return numbers


class Machines:
    """Nodes of one cluster, each started by ``ray start`` of ``python`` in a process group of its own."""

    def __init__(self, python: Path, folder: Path) -> None:
        self.python, self.folder, self.started = python, folder, []
        self.gcs, self.dashboard = ports(2)
        self.short = Path(os.environ.get("TMPDIR", "/tmp")) / f"rlj-{os.getpid()}"  # paths of sockets are short

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.dashboard}"

    def head(self) -> None:
        here = {"port": self.gcs, "dashboard-host": "127.0.0.1", "dashboard-port": self.dashboard}
        self._start("--head", here | {"temp-dir": self.short, "num-cpus": 0})

    def join(self) -> None:
        self._start(f"--address=127.0.0.1:{self.gcs}", {"num-cpus": 1})

    def _start(self, role: str, given: dict[str, object]) -> None:
        agent, runtime = ports(2)
        ours = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
        ours |= {"PATH": f"{self.python.parent}:{os.environ['PATH']}"}
        options = {"node-ip-address": "127.0.0.1", "dashboard-agent-listen-port": agent, **given}
        options |= {"runtime-env-agent-port": runtime, "object-store-memory": 100_000_000}
        command = [
            self.python,
            NODES,
            "start",
            role,
            "--block",
            *(f"--{key}={value}" for key, value in options.items()),
        ]
        log = self.folder / f"log-{len(self.started)}"
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | ours
        with log.open("w") as file:
            self.started.append(
                subprocess.Popen(
                    command, env=environment, cwd=self.folder, stdout=file, stderr=file, start_new_session=True
                )
            )

        self._wait(log)

    def _wait(self, log: Path) -> None:
        """Until it is there."""
        deadline = time.monotonic() + PATIENCE_S
        while not ("runtime started" in log.read_text() and answers(self.address)):
            assert self.started[-1].poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)

    def end(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            for node in reversed(self.started):
                if node.poll() is None:
                    os.killpg(node.pid, number)
            time.sleep(2)
        subprocess.run(["rm", "-rf", self.short], check=True)


def answers(address: str) -> bool:
    try:
        return urllib.request.urlopen(f"{address}/api/version", timeout=2).status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[str]:
    """The address of the dashboard."""
    folder = tmp_path_factory.mktemp("nodes")
    machines = Machines(stranger(folder / "env"), folder)
    try:
        machines.head()
        for _ in range(WORKERS):
            machines.join()
        yield machines.address
    finally:
        machines.end()


def place(cwd: Path, cache: Path) -> Job:
    """A working directory with a root that has the cache of the tests, and the reward of the commands.

    Each worker leaves its node's name, and at its second walks waits until all have: the first of a run are for one.
    """
    (cwd / "runs").mkdir(parents=True)
    (cwd / "runs" / "cache").mkdir()
    for entry in cache.iterdir():
        (cwd / "runs" / "cache" / entry.name).symlink_to(entry)
    (cwd / "nodes").mkdir()
    known = f"ROOT, WORKERS, PATIENCE_S = {str(cwd / 'nodes')!r}, {WORKERS}, {PATIENCE_S}"
    (cwd / "my_rewards.py").write_text(f"{known}{REWARD}")
    return Job(cwd, "finetune", SETTINGS)


def test_the_commands_of_the_guide_on_three_nodes(cluster, tiny_root, tmp_path, monkeypatch, capsys):
    began = time.monotonic()
    job, calm = (place(tmp_path / name, tiny_root / "cache") for name in ("launched", "calm"))
    monkeypatch.chdir(job.cwd)
    known = {"/shared/runs": str(job.cwd / "runs"), "bright": "it", "http://127.0.0.1:8265": cluster}
    commands = {name: [known.get(word, word) for word in line] for name, line in documented().items()}
    more = [str(s) for s in SETTINGS] + ["--env", "none", "--rollout.workers", str(WORKERS)]

    def said(name: str, code: int = 0) -> str:
        assert main(commands[name]) == code
        return capsys.readouterr().out

    followed = Process(job.cwd, *commands["launch"], *more)
    until(job.checkpoints, followed)
    assert "running" in said("status")
    assert "job it: stopped" in said("stop")
    first = followed.wait()
    assert first.code == 75
    assert re.search(rf"rollout workers +{WORKERS} +{WORKERS} +cpu", first.out)
    assert not (job.folder / "summary.json").exists(), "it was done before it was stopped"
    told = said("resume")
    assert "resumed from" in told
    assert "exit code 0" in told or "succeeded" in told
    assert calm.start().wait().code == 0
    assert_same(job, outcome(calm.folder))
    assert len(list((job.cwd / "nodes").iterdir())) == WORKERS, "not every node took part"
    print(f"launched, followed, stopped, resumed, finished in {time.monotonic() - began:.0f} s")


def until(reached, process: Process) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not reached():
        assert process.process.is_alive(), process.err.read_text() + process.out.read_text()
        assert time.monotonic() < deadline, process.err.read_text() + process.out.read_text()
        time.sleep(0.1)
