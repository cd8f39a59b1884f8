"""Runs of the learners through a reward's gradient: the command line, resuming, workers, and what is refused."""

import json

import pytest
from interrupted_runs import Job, assert_same, outcome, place
from processes import Process, rlfusion
from tiny_runs import TINY

AGENTS = {
    "draft": ("--agent.form", "full", "--agent.micro_batch", 8, "--rollout.lag", 1, "--agent.kl_loss", 0.01),
    "refl": ("--agent.pretrain_weight", 0.1, "--agent.ema_decay", 0.5, "--agent.updates_per_epoch", 2),
}

CALL = 13
"""A call of the reward after the first updates, of which each makes two or more, and before the last."""


def tiny(agent: str) -> tuple:
    return (*TINY, "--reward", "meddling:brightness", "--agent", agent, *AGENTS[agent])


@pytest.mark.parametrize("agent", AGENTS)
def test_stopped_and_resumed_it_ends_with_the_same_bits_and_the_reward_has_risen(tiny_root, tmp_path, agent):
    whole, stopped = (
        place(tmp_path / name, tiny_root / "cache", "finetune", *tiny(agent)) for name in ("whole", "stopped")
    )
    assert whole.start().wait().code == 0
    summary = json.loads((whole.folder / "summary.json").read_text())
    assert summary["queries"] == 6 * 24
    assert summary["after"]["reward"] > summary["before"]["reward"]
    lines = [json.loads(line) for line in (whole.folder / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "train/reward" in line]
    assert all(
        {"train/reward_std", "train/loss", "train/grad_norm", "train/queries"} <= line.keys() for line in trained
    )
    halted = stopped.signalled_in_call(stopped.start, CALL, "SIGTERM")
    assert halted.code == 75, halted.err
    assert 0 < int(stopped.checkpoints()[-1].removeprefix("step-")) < 6
    assert stopped.resume().wait().code == 0
    assert_same(stopped, outcome(whole.folder))


@pytest.mark.alone
@pytest.mark.parametrize("agent", AGENTS)
def test_a_worker_gives_the_bits_of_none(tiny_root, tmp_path, agent):
    found = []
    for workers in (0, 1):
        job: Job = place(tmp_path / str(workers), tiny_root / "cache", "finetune", *tiny(agent))
        more = ("--rollout.workers", workers, "--ray.cpus_per_worker", 0.5, "--root", "runs", "--name", "it")
        result = Process(job.cwd, job.command, *job.settings, *more).wait()
        assert result.code == 0, result.err
        found.append(outcome(job.folder))
    assert found[0]["metrics"] == found[1]["metrics"]
    assert found[0]["model/weights.safetensors"] == found[1]["model/weights.safetensors"]


@pytest.mark.parametrize("agent", AGENTS)
def test_a_reward_without_gradient_is_refused_before_any_work(tmp_path, agent):
    result = rlfusion(tmp_path, "finetune", *TINY, "--agent", agent, "--reward", "jpeg_compressibility")
    assert result.code == 2
    assert "'jpeg_compressibility' has no gradient" in result.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("agent", AGENTS)
@pytest.mark.parametrize("setting", [("--reward_failures", "mask"), ("--reward_normalize", "batch")])
def test_what_needs_the_rewards_of_a_whole_rollout_is_refused(tmp_path, agent, setting):
    reward = ("--reward", '{"ink": 1.0, "symmetry": 1.0}')
    result = rlfusion(tmp_path, "finetune", *TINY, "--agent", agent, *reward, *setting)
    assert result.code == 2
    assert "scores as it learns" in " ".join(result.err.split())
