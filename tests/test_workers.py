"""A result does not depend on who collects: 0, 1 or 2 Ray workers give the same bits, on-policy and with a lag."""

from pathlib import Path

import pytest
from conftest import TINY
from processes import Process

RUNS = [(0, 0), (1, 0), (2, 0), (0, 1), (2, 1)]
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
