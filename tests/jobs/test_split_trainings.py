"""Pretraining and distillation whose networks are split over ranks: whole jobs, with the bits of one process."""

import json
import shutil
from pathlib import Path

import pytest
from ranked_jobs import jobs_on_ranks

from rlfusion.common import shards
from rlfusion.training import checkpoint

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(not shards.can_split(), reason="needs an FSDP2 that takes sums of ours"),
]
SHARED = ("--learner.shares", 2, "--learner.exact", "true", "--device", "cpu", "--checkpoint_every", 2)
NET = "ResidualMLP(width=32, depth=1)"
LOOKS = ("--evaluation.samples", 60)
HELD = ("--checkpoints.last", 3)
TRAIN = ("--train.steps", 6, "--train.batch", 16, "--model.net", NET, "--chain.steps", 4)
TEACHER = ("--pretrain.train.steps", 6, "--pretrain.train.batch", 16, "--pretrain.model.net", NET)
SMALL = ("--method.steps", 3, "--method.batch", 8)
PAIRS = ("--method.pairs.count", 30, "--method.pairs.steps", 3, "--method.pairs.shard", 20)
DMD = ("--method", "dmd", "--chain.steps", 2, "--method.fake_updates", 1, "--method.regression", 0.5)
KINDS = {
    "pretrain": ("pretrain", *SHARED, *LOOKS, *TRAIN),
    "autoencoder": ("pretrain-autoencoder", *SHARED, "--steps", 4, "--batch", 8, "--model.width", 8),
    "dmd": ("distill", *SHARED, *HELD, *LOOKS, *TEACHER, *SMALL, *PAIRS, *DMD),
    "reflow": ("distill", *SHARED, *LOOKS, *TEACHER, *SMALL, *PAIRS, "--method", "reflow", "--method.rounds", 2),
}
SPLIT = ("--learner.shard", "fsdp")


def left(cwd: Path, name: str) -> dict[str, bytes]:
    """What the run ends in: its model, and what it is found to be."""
    folder = cwd / "runs" / name
    files = [*(folder / "model").glob("*"), *(folder / "autoencoder").glob("*"), folder / "evaluation.json"]
    return {file.name: file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("split")
    for count, more, end in ((1, (), ""), (2, SPLIT, "-2")):
        jobs_on_ranks(count, cwd, *((*held, *more, "--name", f"{kind}{end}") for kind, held in KINDS.items()))
    return cwd


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_that_split_end_in_the_model_of_one(runs, kind):
    expected = left(runs, kind)
    assert {"evaluation.json"} < expected.keys()
    assert left(runs, f"{kind}-2") == expected


@pytest.mark.parametrize("kind", KINDS)
def test_the_pairs_of_a_split_teacher_are_those_of_a_whole_one(runs, kind):
    files = [sorted((runs / "runs" / name).glob("pairs*/*")) for name in (kind, f"{kind}-2")]
    assert [f.name for f in files[0]] == [f.name for f in files[1]]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]
    assert bool(files[0]) == (kind in ("dmd", "reflow"))


@pytest.mark.parametrize("kind", KINDS)
def test_each_rank_writes_its_rows(runs, kind):
    (_, newest), *_ = checkpoint.candidates(runs / "runs" / f"{kind}-2" / "checkpoints")
    files = checkpoint.verify(newest)["files"]
    parts = [sum(held["size"] for name, held in files.items() if f".rows-{rank}-of-2." in name) for rank in range(2)]
    assert 0 < max(parts) < 1.5 * min(parts)


def test_what_two_ranks_split_goes_on_whole(runs):
    shutil.copytree(runs / "runs/dmd-2", runs / "runs/dmd-1", ignore=shutil.ignore_patterns("model", "evaluation.json"))
    (step, newest), *_ = checkpoint.candidates(runs / "runs/dmd-1/checkpoints")
    assert step == 3
    shutil.rmtree(newest)
    jobs_on_ranks(1, runs, (*KINDS["dmd"], "--name", "dmd-1"))
    assert left(runs, "dmd-1") == left(runs, "dmd")
    last = [json.loads(line) for line in (runs / "runs/dmd-1/metrics.jsonl").read_text().splitlines()][-1]
    assert last["step"] == 3
