"""bfloat16 in the network alone: everything around it stays in float32, and rollout and learner agree."""

import json

import torch
from processes import rlfusion
from tiny_runs import TINY

from rlfusion.agents.ddpo import Config, Learner
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.kernel import DDIM
from rlfusion.diffusion.policy import Policy
from rlfusion.diffusion.schedule import Cosine
from rlfusion.nets.mlp import ResidualMLP
from rlfusion.rollout import Task, plan, run_item


def policy(precision: str) -> Policy:
    torch.manual_seed(0)
    net = ResidualMLP((1, 4, 4), 2, width=32, depth=2)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return Policy(Denoiser(net, Cosine(), "v", precision), DDIM(1.0))


def walks(acting: Policy):
    task = Task(
        acting, TimeGrid(5), (1, 4, 4), torch.arange(2), lambda x: x.clamp(0, 1), lambda x, c: x.mean((1, 2, 3)), "m"
    )
    return task, run_item(task, plan(0, 0, 2, 8, 16, 2, 0)[0])


def test_the_network_alone_is_in_bfloat16():
    acting = policy("bfloat16")
    seen = []
    acting.denoiser.net.enter.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    _, batch = walks(acting)
    assert set(seen) == {torch.bfloat16}
    assert {batch.x.dtype, batch.log_prob.dtype, batch.reward.dtype} == {torch.float32}
    prediction = acting.denoiser(batch.x[:, 1], torch.tensor(0.4, dtype=torch.float64), torch.arange(16) % 2)
    assert {p.dtype for p in prediction} == {torch.float32}


def test_it_is_close_to_float32_and_not_the_same():
    x, t, label = torch.randn(8, 1, 4, 4), torch.tensor(0.4, dtype=torch.float64), torch.arange(8) % 2
    half, whole = (policy(p).denoiser(x, t, label).x0 for p in ("bfloat16", "float32"))
    assert not torch.equal(half, whole)
    torch.testing.assert_close(half, whole, rtol=0.05, atol=0.05)


def test_rollout_and_learner_agree_and_the_gradient_is_float32():
    acting = policy("bfloat16")
    task, batch = walks(acting)
    learner = Learner(acting, task.times, Config(clip=0.5))
    assert learner.preflight(batch)["log_ratio_max"] < 0.05
    learner.update(batch)
    assert {p.dtype for p in acting.parameters()} == {torch.float32}


def test_a_run_in_bfloat16(tiny_root, tmp_path):
    """With a worker: tests/jobs/test_scoring.py."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "cache").symlink_to(tiny_root / "cache")
    more = ("--precision", "bfloat16", "--reward", "ink", "--name", "it")
    said = rlfusion(tmp_path, "finetune", *TINY, *more, "--agent.clip", 0.9)
    assert said.code == 0, said.err
    assert json.loads((tmp_path / "runs" / "it" / "summary.json").read_text())["queries"] == 6 * 24
