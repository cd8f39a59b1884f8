"""Pretraining and distillation on two ranks, one of which is killed, or stopped for good, in its forward pass, in a
reduction, and in the middle of a checkpoint: each time the group is begun anew, and the run ends in the bits of one
process.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from fault_rows import Row, check
from processes import PATIENCE, Process, rlfusion

from rlfusion.common import shards

pytestmark = [pytest.mark.alone, pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux's /proc")]
OWN = """
import os, signal, time
from pathlib import Path
import torch
from rlfusion.nets.mlp import ResidualMLP
from rlfusion.training.checkpoint import disk

HERE = Path({here!r})
ORDERS = HERE / "orders"  # "SIGKILL forward 1 0": in the forward pass of rank 1, once there are so many checkpoints
distributed = torch.distributed

def orders():
    return ORDERS.read_text().splitlines()

def due(where):
    if not (distributed.is_initialized() and orders()):
        return False
    _, place, rank, after = orders()[0].split()
    done = len(list((HERE / "runs/it/checkpoints").glob("step-????????")))
    return place == where and distributed.get_rank() == int(rank) and done >= int(after)

def strike(where):
    if due(where):
        first, *rest = orders()
        (HERE / "rest").write_text("\\n".join(rest))
        (HERE / "rest").rename(ORDERS)  # the other rank reads it at any moment
        with (HERE / "struck").open("a") as file:
            file.write(f"{{time.time()}} {{first}}\\n")
        os.kill(os.getpid(), getattr(signal, first.split()[0]))

def before(where, call):
    def reduced(*arguments, **settings):
        strike(where)
        return call(*arguments, **settings)
    return reduced

def halfway(path, blob):
    if due("checkpoint"):
        write(path, blob[: len(blob) // 2])
        strike("checkpoint")
    write(path, blob)

distributed.all_reduce = before("reduce", distributed.all_reduce)
distributed.all_to_all_single = before("reduce", distributed.all_to_all_single)
write, disk._write_file = disk._write_file, halfway

class Net(ResidualMLP):
    def forward(self, x, t, label):
        strike("forward")
        return super().forward(x, t, label)
"""
SHARED = ("--learner.shares", 2, "--learner.exact", "true", "--checkpoint_every", 1, "--evaluation.samples", 60)
RANKS = ("--learner.ranks", 2, "--learner.timeout_s", 20, "--learner.restarts", 6)
NET = "own.py:Net(width=32, depth=1)"
STEPS, BATCH = 6, 8
DMD = ("--method", "dmd", "--chain.steps", 1, "--method.fake_updates", 1)
TEACHER = ("--pretrain.train.steps", 6, "--pretrain.train.batch", 16, "--pretrain.model.net", NET)
RUNS = {
    "pretrain": ("pretrain", "--model.net", NET, "--train.steps", STEPS, "--train.batch", BATCH, "--chain.steps", 4),
    "distill": ("distill", *DMD, *TEACHER, "--method.steps", STEPS, "--method.batch", BATCH),
}
SPLIT = {"pretrain": (), "distill": ("--learner.shard", "fsdp")}
ORDERS = {
    "pretrain": ("SIGKILL forward 1 1", "SIGSTOP reduce 1 2", "SIGKILL checkpoint 0 3"),
    "distill": ("SIGSTOP checkpoint 1 2",),
}
"""Signal, place, rank, and the checkpoints that there are before: of whole networks the first rank writes alone, of
those that are split each.
"""


def followed(process: Process, cwd: Path, orders: Sequence[str]) -> list[tuple[float, float]]:
    """Of each fault the seconds until it was seen, and until the run was further than before."""
    seen, over, saved, deadline = list[float](), list[float](), 0, time.monotonic() + PATIENCE

    def checkpoints() -> int:
        return len(list((cwd / "runs/it/checkpoints").glob("step-????????")))

    while process.process.is_alive() and time.monotonic() < deadline:
        if len(over) < len(seen) and checkpoints() > saved:
            over.append(time.time())
        if process.err.exists() and process.err.read_text().count("is lost") > len(seen):
            seen.append(time.time())
            saved = checkpoints()  # those of the group that is gone
        time.sleep(0.02)
    result = process.wait()
    assert result.code == 0, result.err
    struck = [line.partition(" ") for line in (cwd / "struck").read_text().splitlines()]
    assert [order for _, _, order in struck] == list(orders), result.err
    assert min(len(seen), len(over)) >= len(orders)  # on a busy machine a group may be lost once more
    return [(s - float(at), o - float(at)) for (at, _, _), s, o in zip(struck, seen, over, strict=False)]


@pytest.mark.parametrize(
    "command",
    [
        "pretrain",
        pytest.param(
            "distill", marks=pytest.mark.skipif(not shards.can_split(), reason="needs an FSDP2 that takes sums of ours")
        ),
    ],
)
def test_a_rank_is_lost_wherever_it_is_and_the_bits_are_the_same(command, table, tmp_path):
    (tmp_path / "own.py").write_text(OWN.format(here=str(tmp_path)))
    (tmp_path / "orders").write_text("")
    run = (*RUNS[command], *SHARED, "--checkpoints.last", 10, "--name", "it")
    one = rlfusion(tmp_path, *run, "--root", "alone")
    assert one.code == 0, one.err
    (tmp_path / "orders").write_text("\n".join(ORDERS[command]))
    times = followed(Process(tmp_path, *run, *RANKS, *SPLIT[command]), tmp_path, ORDERS[command])
    model = "it/model/weights.safetensors"
    same = (tmp_path / "runs" / model).read_bytes() == (tmp_path / "alone" / model).read_bytes()
    last = json.loads((tmp_path / "runs/it/metrics.jsonl").read_text().splitlines()[-1])["step"]
    for order, (seen, over) in zip(ORDERS[command], times, strict=True):
        name, place, _, _ = order.split()
        words = f"{name} of one of 2 ranks of {command}{', fsdp' * bool(SPLIT[command])}, in its {place}"
        check(Row(words, seen, over, BATCH * (STEPS - last), same), table)
