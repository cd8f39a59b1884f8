"""Runs that a signal stops and that are resumed, and all that a run leaves behind, to be compared."""

import shutil
from pathlib import Path
from typing import NamedTuple

from processes import Process, Result

REWARD = """
import os, signal
from pathlib import Path

ORDER = Path("order")  # "SIGKILL 3": send it in the third call from now, once

def brightness(samples, cond):
    if ORDER.exists():
        name, count = ORDER.read_text().split()
        ORDER.write_text(f"{name} {int(count) - 1}")
        if count == "1":
            ORDER.unlink()
            os.kill(os.getpid(), getattr(signal, name))
    return samples.flatten(1).mean(1)
"""


class Job(NamedTuple):
    """A run in a working directory of its own."""

    cwd: Path
    command: str
    settings: tuple

    @property
    def folder(self) -> Path:
        return self.cwd / "runs" / "it"

    def start(self) -> Process:
        return Process(self.cwd, self.command, *self.settings, "--root", "runs", "--name", "it")

    def resume(self) -> Process:
        """Resumed, or started again if it was killed before it was there."""
        if (self.folder / "config.yaml").exists():
            return Process(self.cwd, self.command, "--resume", "runs/it")
        shutil.rmtree(self.folder, ignore_errors=True)
        return self.start()

    def signalled_in_call(self, process, call: int, name: str) -> Result:
        """Send ``name`` from within the reward's ``call``-th call of what ``process`` starts."""
        (self.cwd / "order").write_text(f"{name} {call}")
        result = process().wait()
        assert not (self.cwd / "order").exists(), f"the reward was called less than {call} times"
        return result

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").glob("step-*"))


def outcome(folder: Path) -> dict[str, object]:
    """All that a run leaves behind and that says nothing of where or when."""
    result = {f.name: f.read_bytes() for f in (folder / "samples").iterdir()}
    for name in ("model/weights.safetensors", "model/model.json", "summary.json", "evaluation.json"):
        if (folder / name).exists():
            result[name] = (folder / name).read_bytes()
    return result | {"metrics": (folder / "metrics.jsonl").read_text()}


def assert_same(job: Job, expected: dict[str, object]) -> None:
    ours = outcome(job.folder)
    assert ours["metrics"] == expected["metrics"]
    assert [name for name in expected if ours[name] != expected[name]] == []
    assert ours.keys() == expected.keys()


def place(cwd: Path, cache: Path, command: str, *settings: object) -> Job:
    """A job whose reward lies in its working directory, and whose root has the shared cache."""
    (cwd / "runs").mkdir(parents=True)
    (cwd / "runs" / "cache").symlink_to(cache)
    (cwd / "meddling.py").write_text(REWARD)
    return Job(cwd, command, settings)
