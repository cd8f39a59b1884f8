"""Rollout workers of ranks that split their network act under the ranks' weights, which lie in files of rows."""

import shutil

import pytest
from ranked_jobs import jobs_on_ranks
from tiny_runs import TINY

from rlfusion.common import shards
from rlfusion.training import checkpoint

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(not shards.can_split(), reason="needs an FSDP2 that takes sums of ours"),
]
RUN = (*TINY, "--updates", 3, "--checkpoint_every", 2, "--monitor.every", 0, "--learner.shares", 2)
RUN = (*RUN, "--learner.exact", "true", "--reward", "ink", "--device", "cpu", "--evaluation.deterministic", "false")
KINDS = {"files": (*RUN, "--rollout.lag", 1), "adapters": (*RUN, "--lora", "LoRA(rank=2)")}
SPLIT = ("--learner.shard", "fsdp")
WORKERS = (*SPLIT, "--rollout.workers", 1)
NET = (
    "--pretrain.train.steps",
    6,
    "--pretrain.train.batch",
    16,
    "--pretrain.model.net",
    "ResidualMLP(width=32, depth=1)",
)
PAIRS = ("--method.pairs.count", 30, "--method.pairs.steps", 3, "--method.pairs.shard", 20)
REFLOW = ("distill", *NET, *PAIRS, "--method", "reflow", "--method.rounds", 2, "--method.steps", 3, "--method.batch", 8)
REFLOW = (*REFLOW, "--learner.shares", 2, "--learner.exact", "true", "--device", "cpu", "--evaluation.samples", 60)


def test_workers_of_a_split_network_give_the_bits_of_none(tmp_path):
    jobs_on_ranks(1, tmp_path, *((*held, "--name", kind) for kind, held in KINDS.items()))
    runs = tmp_path / "runs"
    shutil.copytree(runs / "files", runs / "files-far", ignore=shutil.ignore_patterns("model", "summary.json"))
    for at, path in checkpoint.candidates(runs / "files-far" / "checkpoints"):
        if at > 2:
            shutil.rmtree(path)
    (runs / "files-far" / "weights").mkdir()
    (runs / "files-far" / "weights" / "version-1.rows-0-of-2.safetensors").write_bytes(b"of a run that was broken off")
    jobs_on_ranks(2, tmp_path, *((*held, *WORKERS, "--name", f"{kind}-far") for kind, held in KINDS.items()))
    for kind in KINDS:
        one, far = (runs / name / "model" / "weights.safetensors" for name in (kind, f"{kind}-far"))
        assert one.read_bytes() == far.read_bytes(), kind
    assert not (runs / "files-far" / "weights").exists()


def test_pairs_that_workers_walk_of_a_split_model_are_those_of_one_process(tmp_path):
    jobs_on_ranks(1, tmp_path, (*REFLOW, "--name", "here"))
    jobs_on_ranks(2, tmp_path, (*REFLOW, *SPLIT, "--workers", 1, "--name", "far"))
    here, far = (tmp_path / "runs" / name for name in ("here", "far"))
    assert (here / "model/weights.safetensors").read_bytes() == (far / "model/weights.safetensors").read_bytes()
    made = sorted(path.relative_to(far) for path in far.rglob("shard-*.safetensors"))
    assert len(made) == 4
    assert [(here / path).read_bytes() for path in made] == [(far / path).read_bytes() for path in made]
    assert not [*far.rglob("weights")]
