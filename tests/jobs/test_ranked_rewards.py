"""How often a reward is asked where several ranks learn: as often as in one process, in the same run; and once more by
each rank, before any work, of which one may have no such reward."""

import json
from collections import Counter
from pathlib import Path

import pytest
from ranked_jobs import job, jobs_on_ranks
from safetensors.torch import load_file
from tiny_runs import TINY

from rlfusion.common import shards
from rlfusion.training.ranks import Ranks, joined

REWARD = """
from pathlib import Path

import torch

ASKED = Path(__file__).with_name("asked.txt")


def bright(samples, cond):
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else "alone"
    with ASKED.open("a") as file:
        file.write(f"{rank} {len(samples)}\\n")
    if rank == 1 and Path("lacks").exists():
        import no_such_package
    return samples.mean((1, 2, 3))
"""
RUN = (*TINY, "--learner.shares", 2, "--learner.exact", "true", "--updates", 4, "--monitor.every", 2)
RUN = (*RUN, "--monitor.samples", 50, "--evaluation.every", 3, "--reward", "counting.py:bright", "--root", "runs")
TRIED = 6
"""Walks of one prompt, on which a further rank tries the reward."""


def asked(folder: Path) -> Counter:
    """Samples that the reward was asked for, by rank."""
    found: Counter = Counter()
    for line in (folder / "asked.txt").read_text().splitlines():
        rank, samples = line.split()
        found[rank] += int(samples)
    (folder / "asked.txt").unlink()
    return found


def test_two_ranks_ask_a_reward_as_often_as_one_process_and_find_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("counting.py").write_text(REWARD)
    with joined(Ranks(0, 1, 2, exact=True)):
        job(tmp_path, "finetune", *RUN, "--name", "one")
    alone = asked(tmp_path)["alone"]
    jobs_on_ranks(2, tmp_path, (*RUN, "--name", "two"))
    of_ranks = asked(tmp_path)
    assert of_ranks["0"] + of_ranks["1"] == alone + TRIED
    assert of_ranks["1"] == 4 * 14 + TRIED  # items of 10 and 4 walks in each of 4 rollouts: it evaluates nothing
    if shards.can_split():
        jobs_on_ranks(2, tmp_path, (*RUN, "--learner.shard", "fsdp", "--name", "split"))
        assert sum(asked(tmp_path).values()) == alone + TRIED
    one, two = (load_file(f"runs/{name}/model/weights.safetensors") for name in ("one", "two"))
    assert all(bool((one[name] == two[name]).all()) for name in one)
    told = [Path(f"runs/{name}/metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert [json.loads(line) for line in told[0]] == [json.loads(line) for line in told[1]]


@pytest.mark.parametrize("agent", ["ddpo", "refl"])
def test_a_rank_without_the_rewards_package_ends_the_run_before_anything_is_measured(tmp_path, monkeypatch, agent):
    monkeypatch.chdir(tmp_path)
    Path("counting.py").write_text(REWARD)
    Path("lacks").touch()
    with pytest.raises(AssertionError):
        jobs_on_ranks(2, tmp_path, (*RUN, "--agent", agent, "--monitor.every", 0, "--name", "lacks"))
    assert not Path("runs/lacks/before.json").exists()
    found = asked(tmp_path)
    assert 0 < found["1"] <= 24
    assert found["0"] <= 24, "the first rank has measured the base model before"
