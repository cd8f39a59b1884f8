"""Ctrl-C in every command that works for long: exit code 130, and a last line that says what is left."""

import signal
import time

import pytest
from processes import Process

from rlfusion.common.stops import NOTHING

TRAININGS = {
    "pretrain": ("--train.steps", 10**6, "--train.batch", 8, "--model.net", "ResidualMLP(width=8, depth=1)"),
    "pretrain-autoencoder": ("--steps", 10**6, "--batch", 8, "--model.width", 8),
    "train-clip": ("--steps", 10**6, "--batch", 8),
}
OWN = """
import time
from pathlib import Path

from rlfusion.pretrain.denoising import Denoising


def lasting(samples, cond):
    Path("at-work").touch()
    time.sleep(300)


class Slow(Denoising):
    \"\"\"Its third step does not end.\"\"\"

    def __call__(self, *given):
        steps = Path("steps")
        done = int(steps.read_text()) if steps.exists() else 0
        steps.write_text(str(done + 1))
        if done == 2:
            Path("at-work").touch()
            time.sleep(300)
        return super().__call__(*given)
"""


def last(said: str) -> str:
    return said.splitlines()[-1]


@pytest.mark.parametrize("command", TRAININGS)
def test_a_training_says_the_command_that_goes_on_with_it(command, tmp_path):
    process = Process(tmp_path, command, *TRAININGS[command], "--checkpoint_every", 2, "--name", "it")
    checkpoints = tmp_path / "runs" / "it" / "checkpoints"
    result = process.once(lambda: any(checkpoints.glob("step-*")), signal.SIGINT).wait()
    assert result.code == 130, result.err
    way = f"rlfusion {command} --resume runs/it"
    assert last(result.err) == f"rlfusion: stopped by Ctrl-C (SIGINT); go on with: {way}"
    before = max(checkpoints.glob("step-*"))
    again = Process(tmp_path, *way.split()[1:])
    result = again.once(lambda: max(checkpoints.glob("step-*")) > before, signal.SIGINT).wait()
    assert (result.code, last(result.err).endswith(way)) == (130, True), result.err


def test_a_second_ctrl_c_does_not_wait_for_a_step_that_does_not_end(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    settings = ("--train.loss", "own.py:Slow()", *TRAININGS["pretrain"], "--checkpoint_every", 2, "--name", "it")
    process = Process(tmp_path, "pretrain", *settings).once((tmp_path / "at-work").exists, signal.SIGINT)
    told = "Ctrl-C (SIGINT): stops once this step is done and saved; Ctrl-C again ends it at once"
    process.once(lambda: told in process.err.read_text(), signal.SIGINT)
    begin = time.monotonic()
    result = process.wait(60)
    assert time.monotonic() - begin < 30
    assert result.code == 130, result.err
    assert last(result.err).endswith("go on with: rlfusion pretrain --resume runs/it")
    (tmp_path / "steps").write_text("9")  # no step is slow any more
    resumed = Process(tmp_path, "pretrain", "--resume", "runs/it")
    later = tmp_path / "runs" / "it" / "checkpoints"
    result = resumed.once(lambda: max(later.glob("step-*")).name > "step-00000002", signal.SIGINT).wait()
    assert result.code == 130, result.err


@pytest.mark.parametrize("command", ["evaluate", "sample"])
def test_what_cannot_be_resumed_ends_at_once_and_leaves_nothing(command, tiny_root, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "runs").symlink_to(tiny_root)
    lasts = {
        "evaluate": ("--reward", "own.py:lasting", "--evaluation.samples", 60, "--out", "out.json"),
        "sample": ("--count", 10**7, "--out", "out.png"),
    }[command]
    process, begin = Process(tmp_path, command, "--checkpoint", "runs/first", *lasts), time.monotonic()
    reached = {"evaluate": (tmp_path / "at-work").exists, "sample": lambda: time.monotonic() > begin + 3}[command]
    result = process.once(reached, signal.SIGINT).wait(60)
    assert result.code == 130, result.err
    assert last(result.err) == f"rlfusion: stopped by Ctrl-C (SIGINT); {NOTHING}"
    assert not list(tmp_path.glob("out.*"))
