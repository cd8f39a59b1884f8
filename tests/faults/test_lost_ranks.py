"""Real runs on two ranks, whose processes are killed and hang, and which are stopped: they end in the bits of one."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from fault_rows import Row, check
from processes import LOOPBACK, Process, listening, rlfusion, titled
from tiny_runs import TINY

from rlfusion.common import shards

pytestmark = [pytest.mark.alone, pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux's /proc")]
SHARED = ("--learner.shares", 2, "--learner.exact", "true", "--checkpoint_every", 1, "--reward", "ink", "--updates", 5)
RUN = ("finetune", *TINY, *SHARED)
RANKS = ("--learner.ranks", 2, "--learner.timeout_s", 30, "--rollout.workers", 1)
TINY_NET = "ResidualMLP(width=32, depth=1)"


def weights(cwd: Path, name: str) -> bytes:
    return (cwd / "runs" / name / "model" / "weights.safetensors").read_bytes()


def updates(cwd: Path, name: str) -> int:
    """Those that are checkpointed."""
    found = sorted((cwd / "runs" / name / "checkpoints").glob("step-*"))
    return int(found[-1].name[5:]) if found else 0


def missing(cwd: Path, name: str) -> int:
    """The walks that were not learned from."""
    summary = [json.loads((cwd / "runs" / run / "summary.json").read_text()) for run in ("alone", name)]
    return summary[0]["queries"] - summary[1]["queries"]


def back(process: Process, cwd: Path, name: str, times: int) -> tuple[float, float]:
    """The seconds until the group is told to be lost for so many ``times``, and until the run is further than now."""
    began, done = time.monotonic(), updates(cwd, name)
    process.once(lambda: process.err.read_text().count("is lost") >= times, 0)
    seen = time.monotonic() - began
    process.once(lambda: updates(cwd, name) > done, 0)
    return seen, time.monotonic() - began


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("ranks")
    result = rlfusion(cwd, *RUN, "--name", "alone")
    assert result.code == 0, result.err
    return cwd


def test_a_killed_rank_and_one_that_hangs_leave_the_bits_as_they_are(alone, table):
    process = Process(alone, *RUN, *RANKS, "--name", "lost")
    seen: set[str] = set()

    def killed() -> bool:
        if updates(alone, "lost") < 1:
            return False
        seen.update(listening())
        os.kill(titled("ray::Rank")[-1], signal.SIGKILL)
        return True

    def stopped() -> bool:
        if updates(alone, "lost") < 3 or "restarts left: 3" not in process.err.read_text():
            return False
        os.kill(titled("ray::Rank")[-1], signal.SIGSTOP)
        return True

    times = [back(process.once(fault, 0), alone, "lost", number + 1) for number, fault in enumerate((killed, stopped))]
    result = process.wait()
    assert result.code == 0, result.err
    assert result.err.count("ranks is lost") >= 2, result.err
    same = weights(alone, "lost") == weights(alone, "alone")
    for fault, (told, over) in zip(("SIGKILL", "SIGSTOP"), times, strict=True):
        check(Row(f"{fault} of one of 2 ranks of finetune", told, over, missing(alone, "lost"), same), table)
    assert seen
    assert seen <= LOOPBACK
    last = json.loads((alone / "runs" / "lost" / "timing.jsonl").read_text().splitlines()[-1])
    walk = 5 * 64 * 4  # of the items of 10, 10 and 4 walks the first rank learns from 12
    assert last["bytes/walks_to_rank"] == 20 * walk
    assert 0 < last["bytes/answers_from_workers"] < 12 * walk, "the walks do not come with the rewards"
    assert last["bytes/weights_to_workers"] > 0


@pytest.mark.skipif(not shards.can_split(), reason="needs an FSDP2 that takes sums of ours")
def test_ranks_whose_network_is_split_are_lost_and_end_in_the_same_bits(alone, table):
    process = Process(alone, *RUN, *RANKS, "--learner.shard", "fsdp", "--name", "split")

    def killed() -> bool:
        if updates(alone, "split") < 2:
            return False
        os.kill(titled("ray::Rank")[-1], signal.SIGKILL)
        return True

    told, over = back(process.once(killed, 0), alone, "split", 1)
    result = process.wait()
    assert result.code == 0, result.err
    assert result.err.count("ranks is lost") >= 1, result.err
    same = weights(alone, "split") == weights(alone, "alone")
    check(Row("SIGKILL of one of 2 ranks of finetune, fsdp", told, over, missing(alone, "split"), same), table)
    assert list((alone / "runs" / "split" / "checkpoints").glob("step-*/learner.rows-1-of-2.safetensors"))


def test_a_stop_is_saved_by_the_ranks_and_goes_on_in_one_process(alone):
    process = Process(alone, *RUN, *RANKS, "--name", "stopped", "--updates", 40)
    result = process.once(lambda: updates(alone, "stopped") >= 2, signal.SIGTERM).wait()
    assert result.code == 75, result.err
    assert "go on with: rlfusion finetune --resume" in result.err.splitlines()[-1]
    done = updates(alone, "stopped")
    last = max(json.loads(line)["step"] for line in (alone / "runs/stopped/metrics.jsonl").read_text().splitlines())
    assert done == last
    total = max(done + 1, 5)
    changes = ("--change", "learner.ranks=0", "--change", "rollout.workers=0", "--change", f"updates={total}")
    one = rlfusion(alone, "finetune", "--resume", "runs/stopped", *changes)
    assert one.code == 0, one.err
    if total == 5:
        assert weights(alone, "stopped") == weights(alone, "alone")


def test_a_rank_without_the_rewards_package_is_said_once_before_any_work_and_not_begun_anew(alone):
    (alone / "own.py").write_text(
        "import torch.distributed as group\ndef bad(samples, cond):\n"
        "    if group.is_initialized() and group.get_rank() == 1:\n        import no_such_package\n"
        "    return samples.mean((1, 2, 3))\n"
    )
    result = rlfusion(alone, *RUN, "--learner.ranks", 2, "--name", "raises", "--reward", "own.py:bad")
    assert result.code == 3, result.err
    assert "No module named 'no_such_package' (own.py, line 4, in bad)" in result.err
    assert "on rank 1" in result.err
    assert not (alone / "runs" / "raises" / "before.json").exists()
    assert "is lost" not in result.err


def test_a_distillation_is_stopped_on_two_ranks_and_goes_on_in_one_process(tmp_path):
    """The first rank pretrains the teacher, makes the pairs and saves; fakes and discriminators are of all ranks."""
    shared = ("--learner.shares", 2, "--learner.exact", "true", "--checkpoint_every", 2, "--evaluation.samples", 60)
    teacher = ("--pretrain.train.steps", 20, "--pretrain.train.batch", 32, "--pretrain.model.net", TINY_NET)
    pairs = ("--method.regression", 0.5, "--method.pairs.count", 20, "--method.pairs.steps", 3)
    dmd = ("--method", "dmd", "--chain.steps", 1, "--method.fake_updates", 1, "--method.steps", 20, "--method.batch", 8)
    run = ("distill", *shared, *teacher, *dmd, *pairs)
    one = rlfusion(tmp_path, *run, "--root", "alone", "--name", "it")
    assert one.code == 0, one.err
    process = Process(tmp_path, *run, "--learner.ranks", 2, "--name", "it")
    seen: set[str] = set()

    def learns() -> bool:
        if updates(tmp_path, "it") < 4:
            return False
        seen.update(listening())
        return True

    stopped = process.once(learns, signal.SIGTERM).wait()
    assert stopped.code == 75, stopped.err
    assert 4 <= updates(tmp_path, "it") < 20
    assert seen
    assert seen <= LOOPBACK
    again = rlfusion(tmp_path, "distill", "--resume", "runs/it", "--change", "learner.ranks=0")
    assert again.code == 0, again.err
    model = "it/model/weights.safetensors"
    assert (tmp_path / "runs" / model).read_bytes() == (tmp_path / "alone" / model).read_bytes()
