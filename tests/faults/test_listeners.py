"""Every process of a run on this machine listens on the loopback alone: the sockets of a pretraining on ranks and of a
server of rewards are read while they run. (Fine-tuning with workers, and distillation: ``test_lost_ranks``.)
"""

import signal
import socket
import time
from pathlib import Path

import pytest
from processes import LOOPBACK, PATIENCE, Process, listening

pytestmark = [pytest.mark.alone, pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux's /proc")]
NET = ("model.net", "ResidualMLP(width=8, depth=1)")
RANKS = ("--learner.ranks", 2, "--learner.shares", 2, "--checkpoint_every", 1, "--root", "runs", "--name", "it")


def while_it_learns(cwd: Path, *arguments: object) -> set[str]:
    """The addresses at which a run listens, from its start to its first checkpoint; it is then stopped."""
    process, seen = Process(cwd, *arguments, *RANKS), set[str]()

    def learns() -> bool:
        seen.update(listening())
        return bool(list((cwd / "runs" / "it" / "checkpoints").glob("step-*")))

    result = process.once(learns, signal.SIGTERM).wait()
    assert result.code in (0, 75), result.err
    return seen


def test_a_pretraining_on_ranks(tmp_path):
    run = ("--train.steps", 400, "--train.batch", 8, "--evaluation.samples", 60)
    seen = while_it_learns(tmp_path, "pretrain", f"--{NET[0]}", NET[1], *run)
    assert seen
    assert seen <= LOOPBACK


def test_a_server_of_rewards(tmp_path):
    process = Process(tmp_path, "serve-reward", "ink", "--port", 0)
    deadline = time.monotonic() + PATIENCE
    while not (process.out.exists() and "serving ink at" in process.out.read_text()):
        assert process.process.is_alive(), process.err.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    seen = listening()
    process.signal(signal.SIGTERM)
    process.wait()
    assert len(seen) >= 1
    assert set(seen) <= LOOPBACK


def test_a_listener_on_the_network_would_be_seen():
    with socket.create_server(("0.0.0.0", 0)):
        assert not set(listening()) <= LOOPBACK
