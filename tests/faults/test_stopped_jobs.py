"""Distillations and comparisons, whole, as processes: stopped by both signals and gone on with, they end with the bits
of one that was never stopped.
"""

import json
import signal
from pathlib import Path

import pytest
from interrupted_runs import Job, assert_same, outcome, place
from tiny_runs import TINY

SMALL = (*TINY[: TINY.index("--updates")], *TINY[TINY.index("--rollout.prompts") : TINY.index("--agent.micro_batch")])
BASE = TINY[: TINY.index("--chain.steps")]
STUDENT = (
    "--method",
    "cd",
    "--method.steps",
    600,
    "--method.batch",
    16,
    "--chain.steps",
    2,
    "--evaluation.samples",
    60,
)
AGENTS = "ddpo(micro_batch=64),grpo(window=2, micro_batch=64)"
RUNS = ("--budget_queries", 60, "--evaluations", 2, "--evaluation.samples", 60, "--guidance", "[1]")
TIMES = ("cpu_seconds", "seconds")
"""What a point of a curve says of the machine."""


def stopped(process, reached, number: int) -> None:
    """Signal a process once it is that far: it ends with the code of the signal and says how to go on."""
    result = process.once(reached, number).wait()
    assert result.code == (75 if number == signal.SIGTERM else 130), result.err
    assert "--resume" in result.err


def test_a_distillation_stopped_by_both_signals_ends_with_the_same_bits(tiny_root, tmp_path):
    settings = ("distill", *BASE, *STUDENT, "--checkpoint_every", 100)
    whole, job = (place(tmp_path / name, tiny_root / "cache", *settings) for name in ("whole", "stopped"))
    assert whole.start().wait().code == 0
    stopped(job.start(), job.checkpoints, signal.SIGTERM)
    before = job.checkpoints()
    stopped(job.resume(), lambda: job.checkpoints() > before, signal.SIGINT)
    assert job.checkpoints() < whole.checkpoints()
    result = job.resume().wait()
    assert result.code == 0, result.err
    assert_same(job, outcome(whole.folder))


def members(job: Job) -> list[Path]:
    return sorted(file.parent for file in job.folder.glob("*/summary.json"))


def told(job: Job) -> dict[str, object]:
    """What a comparison leaves behind, without what it says of the machine."""
    curves = json.loads((job.folder / "comparison.json").read_text())
    for run in curves:
        run["points"] = [{k: v for k, v in point.items() if k not in TIMES} for point in run["points"]]
    held = {folder.name: outcome(folder) for folder in members(job)}
    return held | {"curves": curves, "baselines": (job.folder / "baselines.json").read_text()}


@pytest.fixture(scope="module")
def compared(tiny_root, tmp_path_factory):
    """A function that gives a new comparison, and the outcome of the same never stopped."""
    settings = ("compare", "--agents", AGENTS, "--rewards", "meddling:brightness", *SMALL, *RUNS)
    whole = place(tmp_path_factory.mktemp("whole"), tiny_root / "cache", *settings)
    result = whole.start().wait()
    assert result.code == 0, result.err
    assert len(members(whole)) == 2
    return lambda: (place(tmp_path_factory.mktemp("it"), tiny_root / "cache", *settings), whole)


def test_a_comparison_stopped_by_both_signals_ends_with_the_same_bits(compared):
    job, whole = compared()
    for process, call, name, code in ((job.start, 9, "SIGTERM", 75), (job.resume, 12, "SIGINT", 130)):
        result = job.signalled_in_call(process, call, name)
        assert result.code == code, result.err
        assert "--resume" in result.err
    result = job.resume().wait()
    assert result.code == 0, result.err
    assert told(job) == told(whole)
