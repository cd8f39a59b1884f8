"""A result does not depend on who collects: 0, 1 or 2 Ray workers give the same bits, on-policy and with a lag.

(On-policy on a pretrained pipeline; one item at a time in faults/test_rollout_ray.)
"""

import json
from pathlib import Path

import pytest
import torch
from processes import Process
from safetensors.torch import load_file
from tiny_runs import TINY

pytestmark = pytest.mark.alone

RUNS = [(0, 0), (0, 1), (2, 1)]
"""(workers, lag)."""


@pytest.fixture(scope="module")
def results(tiny_root) -> dict[tuple[int, int], tuple[bytes, str]]:
    """The final weights and the metrics of each run."""
    found = {}
    for workers, lag in RUNS:
        name = f"workers-{workers}-lag-{lag}"
        more = ("--rollout.workers", workers, "--rollout.lag", lag, "--ray.cpus_per_worker", 0.5)
        result = Process(tiny_root, "finetune", "--root", tiny_root, "--name", name, *TINY, *more).wait()
        assert result.code == 0, result.err
        found[workers, lag] = outcome(tiny_root / name)
    return found


def outcome(folder: Path) -> tuple[bytes, str]:
    return (folder / "model" / "weights.safetensors").read_bytes(), (folder / "metrics.jsonl").read_text()


@pytest.mark.parametrize(("workers", "lag"), [run for run in RUNS if run[0]])
def test_workers_give_the_bits_of_none(results, workers, lag):
    assert results[workers, lag][1] == results[0, lag][1]
    assert results[workers, lag][0] == results[0, lag][0]


def test_a_lag_is_another_run(results):
    assert results[0, 1] != results[0, 0]


def test_workers_give_the_bits_of_none_on_a_pretrained_pipeline(tiny_pipelines, tmp_path):
    """Named by relative paths; the workers read its files, and meet the same masks."""
    (tmp_path / "sd").symlink_to(tiny_pipelines["sd"])
    (tmp_path / "prompts.txt").write_text("a red cat\ntwo dogs\n")
    model = ("--model", "sd", "--pipeline.prompts", "prompts.txt", "--pipeline.size", 16, "--reward", "ink")
    small = ("--rollout.prompts", 2, "--rollout.samples_per_prompt", 4, "--rollout.item", 2, "--agent.micro_batch", 8)
    quick = ("--updates", 2, "--evaluation.samples", 50, "--evaluation.deterministic", "false", "--monitor.every", 0)
    chain = ("--chain.steps", 3, "--chain.spacing", "trailing")
    lora = ("--lora", "LoRA(rank=2, dropout=0.5)")
    for workers in (0, 1):
        run = ("--rollout.workers", workers, "--ray.cpus_per_worker", 0.5, "--name", f"workers-{workers}")
        said = Process(tmp_path, "finetune", *model, *small, *quick, *chain, *lora, *run).wait(patience=500)
        assert said.code == 0, said.err
    mine, theirs = (tmp_path / "runs" / f"workers-{workers}" for workers in (0, 1))
    files = [f.relative_to(mine) for f in (mine / "model").rglob("*.safetensors")]
    assert files
    for file in files:
        one, other = (load_file(run / file) for run in (mine, theirs))  # the header's order is the library's own
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items()), file
    summaries = [json.loads((run / "summary.json").read_text()) for run in (mine, theirs)]
    assert summaries[0] == summaries[1]
