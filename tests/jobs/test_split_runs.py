"""Fine-tunings whose network is split over ranks end in the bits of one process, from checkpoints of any ranks."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from ranked_jobs import jobs_on_ranks
from saved_models import scrambled
from tiny_runs import TINY

from rlfusion import models
from rlfusion.common import shards
from rlfusion.models import Card, Config, autoencoder
from rlfusion.training import checkpoint

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(not shards.can_split(), reason="needs an FSDP2 that takes sums of ours"),
]
FULL = (
    *TINY,
    "--updates",
    4,
    "--checkpoint_every",
    2,
    "--monitor.every",
    0,
    "--learner.shares",
    4,
    "--learner.exact",
    "true",
    "--reward",
    "ink",
    "--device",
    "cpu",
)
LAGGING = (
    "--monitor.every",
    2,
    "--lora",
    "LoRA(rank=3)",
    "--agent.kl_loss",
    0.1,
    "--guard.action",
    "rollback",
    "--rollout.lag",
    1,
)
SPLIT = ("--learner.shard", "fsdp")
CRITIC = ("--agent", "dawr", "--agent.value_epochs", 1)
KINDS = {
    "full": (*FULL, *CRITIC),
    "lora": (*FULL, *LAGGING),
    "latent": (*FULL, "--base", "latent", "--agent", "draft"),
    "taught": (*FULL, "--base", "plain", "--agent", "opd", "--agent.teacher", "teacher"),
}
GIVEN = ("latent", "taught")
"""Those whose models are made by the test."""
LATENT = {"kind": "kl", "shape": [1, 8, 8], "config": asdict(autoencoder.Config(width=8)), "shift": 0.0, "scale": 1.0}


def weights(cwd: Path, name: str) -> bytes:
    return (cwd / "runs" / name / "model" / "weights.safetensors").read_bytes()


def cut(cwd: Path, name: str, new: str, step: int = 2) -> None:
    """Another run, as ``name`` was after ``step`` updates."""
    folder = cwd / "runs" / new
    shutil.copytree(cwd / "runs" / name, folder, ignore=shutil.ignore_patterns("model", "adapter", "summary.json"))
    for at, path in checkpoint.candidates(folder / "checkpoints"):
        if at > step:
            shutil.rmtree(path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("split")
    about = Config("ResidualMLP(width=32, depth=1)", "Cosine()", "x0")
    plain = Card(about, (1, 8, 8), tuple("0123456789"))
    for seed, (name, card) in enumerate(
        {"latent": replace(plain, autoencoder=LATENT), "plain": plain, "teacher": plain}.items()
    ):
        models.save(cwd / name, scrambled(card, seed), card)
    jobs_on_ranks(1, cwd, *((*held, "--name", kind) for kind, held in KINDS.items()))
    jobs_on_ranks(2, cwd, *((*held, *SPLIT, "--name", f"{kind}-2") for kind, held in KINDS.items()))
    return cwd


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_that_split_end_in_the_bits_of_one(runs, kind):
    assert weights(runs, f"{kind}-2") == weights(runs, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_each_rank_writes_its_rows_and_one_manifest_has_all(runs, kind):
    (step, newest), *_ = checkpoint.candidates(runs / "runs" / f"{kind}-2" / "checkpoints")
    assert step == 4
    files = checkpoint.verify(newest)["files"]
    parts = [files[f"learner.rows-{rank}-of-2.safetensors"]["size"] for rank in range(2)]
    assert max(parts) < 1.3 * min(parts)
    assert files["learner.safetensors"]["size"] < min(parts)


def test_checkpoints_go_on_with_other_ranks_and_without_any(runs):
    whole = {kind: held for kind, held in KINDS.items() if kind not in GIVEN}
    for kind in whole:
        cut(runs, f"{kind}-2", f"{kind}-1")
        cut(runs, f"{kind}-2", f"{kind}-4")
    cut(runs, "full", "full-split")
    jobs_on_ranks(1, runs, *((*held, "--name", f"{kind}-1") for kind, held in whole.items()))
    jobs_on_ranks(4, runs, *((*held, *SPLIT, "--name", f"{kind}-4") for kind, held in whole.items()))
    jobs_on_ranks(2, runs, (*KINDS["full"], *SPLIT, "--name", "full-split"))
    for name in ("full-1", "lora-1", "full-4", "lora-4", "full-split"):
        assert weights(runs, name) == weights(runs, name.partition("-")[0]), name


def test_a_rank_whose_file_is_damaged_or_lost_is_noticed(runs):
    for damage in ("flipped", "lost"):
        cut(runs, "full-2", damage, step=4)
        (_, newest), *_ = checkpoint.candidates(runs / "runs" / damage / "checkpoints")
        file = newest / "learner.rows-1-of-2.safetensors"
        blob = bytearray(file.read_bytes())
        blob[-1] ^= 1
        file.write_bytes(blob)
        if damage == "lost":
            file.unlink()
        with pytest.raises(checkpoint.CheckpointError, match="rows-1-of-2"):
            checkpoint.verify(newest)
    jobs_on_ranks(2, runs, (*KINDS["full"], *SPLIT, "--name", "flipped"))
    assert weights(runs, "flipped") == weights(runs, "full")
    assert (runs / "runs" / "flipped" / "checkpoints" / "step-00000004.corrupt").is_dir()
