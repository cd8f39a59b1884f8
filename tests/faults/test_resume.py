"""Real kills: whatever stops a run, resuming it ends with the bits of one that was never stopped."""

import json
import random
import signal
import time

import pytest
from interrupted_runs import Job, assert_same, outcome, place
from processes import kill_until_done, rlfusion
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import TINY

UPDATES = 7
EVERY = 3
ITEMS = 3
BEFORE = 5
"""Calls of the reward before the first rollout: the check of the settings, two evaluations, the monitor's first look,
the preflight. Each rollout makes ``ITEMS``."""

LOOK = 1
"""Calls of a look of the monitor, after 4 updates and after the last."""


SETTINGS = {
    "plain": (),
    "lag": ("--rollout.lag", 2, "--agent.kl_reward", 0.01),
    "group": ("--rollout.lag", 1, "--agent.advantage", "group", "--agent.step_fraction", 0.5, "--agent.form", "is"),
}


def tiny(kind: str) -> tuple:
    run = ("--updates", UPDATES, "--checkpoint_every", EVERY, "--reward", "meddling:brightness")
    return (*TINY, *run, "--agent.advantage", "prompt", "--agent.advantage_window", 16, *SETTINGS[kind])


@pytest.fixture(scope="module")
def finetune(tiny_root, tmp_path_factory):
    """A function that gives a new job, and the outcome of the same never stopped."""
    expected: dict[str, dict] = {}

    def make(kind: str) -> tuple[Job, dict]:
        cache = tiny_root / "cache"
        if kind not in expected:
            whole = place(tmp_path_factory.mktemp(f"whole-{kind}"), cache, "finetune", *tiny(kind))
            result = whole.start().wait()
            assert result.code == 0, result.err
            expected[kind] = outcome(whole.folder)
        return place(tmp_path_factory.mktemp(kind), cache, "finetune", *tiny(kind)), expected[kind]

    return make


def test_the_outcome_holds_what_must_be_equal(finetune):
    _, expected = finetune("plain")
    lines = [json.loads(line) for line in expected["metrics"].splitlines()]
    assert [line["step"] for line in lines if "train/reward" in line] == list(range(1, UPDATES + 1))
    assert [line["step"] for line in lines if "evaluation/reward" in line] == [0, UPDATES]
    assert {"model/weights.safetensors", "summary.json", "before.png", "after.png"} < expected.keys()
    assert expected["metrics"] != finetune("lag")[1]["metrics"] != finetune("group")[1]["metrics"]


@pytest.mark.parametrize("kind", SETTINGS)
def test_killed_in_the_middle_of_steps_it_ends_with_the_same_bits(finetune, kind):
    job, expected = finetune(kind)
    draw = random.Random(kind)
    call = BEFORE + ITEMS * EVERY + draw.randint(1, ITEMS * 2)  # after the first checkpoint
    assert job.signalled_in_call(job.start, call, "SIGKILL").code == -signal.SIGKILL
    assert job.checkpoints() in ([], ["step-00000003"])  # it may have been being written
    call = 1 + draw.randint(1, ITEMS * 3)  # the preflight, then steps again
    assert job.signalled_in_call(job.resume, call, "SIGKILL").code == -signal.SIGKILL
    assert job.resume().wait().code == 0
    assert_same(job, expected)


@pytest.mark.parametrize("kind", SETTINGS)
def test_sigterm_is_code_75_and_saves_between_two_checkpoints(finetune, kind):
    job, expected = finetune(kind)
    result = job.signalled_in_call(job.start, BEFORE + ITEMS * 4 + LOOK + 2, "SIGTERM")  # in step 4, counted from 0
    assert result.code == 75
    assert "SIGTERM" in result.err
    assert "--resume" in result.err
    assert job.checkpoints() == ["step-00000003", "step-00000005"]
    assert job.resume().wait().code == 0
    assert_same(job, expected)


def test_killed_at_random_moments_also_while_the_base_is_pretrained(with_classifiers, tmp_path):
    longer = ("--pretrain.train.steps", 500, "--seed", 3)  # no cached base has these
    jobs = []
    for name in ("whole", "killed"):
        cache = with_classifiers(tmp_path / name)
        jobs.append(place(tmp_path / name / "cwd", cache, "finetune", *tiny("lag"), *longer))
    whole, killed = jobs
    begin = time.monotonic()
    assert whole.start().wait().code == 0
    longest = 0.25 * (time.monotonic() - begin)
    assert kill_until_done(killed.start, killed.resume, 0, least=8, longest=longest, number=signal.SIGKILL) >= 3
    assert_same(killed, outcome(whole.folder))
    steps = [e.step for e in EventAccumulator(str(killed.folder)).Reload().Scalars("train/reward")]
    assert steps == list(range(1, UPDATES + 1))


def test_sigterm_at_random_moments_loses_nothing(finetune):
    job, expected = finetune("plain")
    kill_until_done(job.start, job.resume, 1, least=3, longest=0.6, number=signal.SIGTERM)
    assert_same(job, expected)


def test_killed_after_the_last_checkpoint_it_measures_again_and_repeats_no_line(finetune):
    job, expected = finetune("plain")
    call = BEFORE + ITEMS * UPDATES + 2 * LOOK + 2  # the second evaluation after training
    assert job.signalled_in_call(job.start, call, "SIGKILL").code == -signal.SIGKILL
    assert job.checkpoints()[-1] == f"step-{UPDATES:08d}"
    assert job.resume().wait().code == 0
    assert_same(job, expected)


def test_a_damaged_newest_checkpoint_is_set_aside_named_and_done_without(finetune):
    job, expected = finetune("lag")
    assert job.start().wait().code == 0
    assert_same(job, expected)
    newest = job.folder / "checkpoints" / f"step-{UPDATES:08d}"
    blob = bytearray((newest / "learner.safetensors").read_bytes())
    blob[len(blob) // 2] ^= 1
    (newest / "learner.safetensors").write_bytes(blob)
    (job.folder / "summary.json").unlink()  # of a finished run the result is what is asked for
    result = job.resume().wait()
    assert result.code == 0
    assert f"{newest.name}.corrupt" in " ".join(result.err.split())
    assert newest.with_name(f"{newest.name}.corrupt").is_dir()
    assert_same(job, expected)


def test_resuming_a_finished_run_changes_nothing(finetune):
    job, expected = finetune("plain")
    assert job.start().wait().code == 0
    before = sorted(p.relative_to(job.folder) for p in job.folder.rglob("*"))
    again = job.resume().wait()
    assert again.code == 0
    assert "brightness" in again.out
    assert sorted(p.relative_to(job.folder) for p in job.folder.rglob("*")) == before
    assert_same(job, expected)


def test_a_run_in_use_is_refused(finetune):
    job, _ = finetune("plain")
    process = job.start()
    process.once((job.folder / "metrics.jsonl").exists, signal.SIGSTOP)
    try:
        result = job.resume().wait()
        assert result.code == 2
        assert "in use by another process" in result.err
    finally:
        process.signal(signal.SIGKILL)
        process.signal(signal.SIGCONT)


PRETRAIN = ("--train.steps", 400, "--train.batch", 32, "--checkpoint_every", 150, "--evaluation.samples", 60)
PRETRAIN += ("--model.net", "ResidualMLP(width=32, depth=1)", "--chain.steps", 4)


def test_pretraining_resumes_with_the_same_bits(tiny_root, tmp_path):
    whole, killed = (place(tmp_path / name, tiny_root / "cache", "pretrain", *PRETRAIN) for name in ("whole", "killed"))
    assert whole.start().wait().code == 0
    metrics = killed.folder / "metrics.jsonl"
    stopped = killed.start().once(lambda: metrics.exists() and metrics.stat().st_size > 0, signal.SIGTERM).wait()
    assert stopped.code == 75, stopped.err
    assert killed.checkpoints()
    kill_until_done(killed.resume, killed.resume, 2, least=3, longest=1.0, number=signal.SIGKILL)
    assert_same(killed, outcome(whole.folder))
    assert rlfusion(killed.cwd, "pretrain", "--resume", "runs/it").code == 0
    assert_same(killed, outcome(whole.folder))
