"""The same code on a GPU: repeatable to the bit, equal to the CPU within rounding, and no wait of the CPU in the loops.

Skipped where there is none. What one ends in depends on the card; that it ends in it twice does not.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from outsides import Beside
from processes import rlfusion
from ranked import reward
from rollout_tasks import CLASSES, SHAPE, make_policy
from tiny_runs import TINY

from rlfusion.agents import AGENTS
from rlfusion.common import spec
from rlfusion.common.compiled import compile_calls
from rlfusion.data import Dataset
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.policy import frozen_copy
from rlfusion.rollout import Task, plan, run_item
from rlfusion.rollout.trajectory import Trajectory, concatenate
from rlfusion.training.devices import set_numerics

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SETTINGS = [
    "ddpo(kl_loss=0.1)",
    "ddpo(form='sf')",
    "grpo(window=2)",
    "ppo()",
    "awm(kl_loss=0.1)",
    "nft()",
    "dpo()",
    "opd()",
    "sft(kl=0.1)",
    "dpo(data='x')",
    "draft()",
    "draft(steps=1)",
    "refl()",
    "drwr(pretrain_weight=0.5)",
    "drwr(on='noised', kl=0.1)",
    "qsm()",
    "qsm(q='denoised')",
    "dawr()",
]
STEPS, UPDATES, PER_PROMPT = 3, 2, 8


@pytest.fixture(autouse=True, scope="module")
def _numerics():
    set_numerics(1, torch.device("cuda"))


def walks(task: Task, iteration: int) -> Trajectory:
    acting = replace(task, policy=frozen_copy(task.policy))
    return concatenate(
        [run_item(acting, item) for item in plan(3, iteration, CLASSES, PER_PROMPT, 10, CLASSES, iteration)]
    )


def trained(agent: str, device: str) -> tuple[list[torch.Tensor], list[dict[str, float]]]:
    """The weights after a few updates, and the metrics of each."""
    settings = spec.parse(agent, AGENTS, AGENTS.what)
    policy = make_policy(1).to(device)
    task = Task(
        policy, TimeGrid(STEPS), SHAPE, torch.arange(CLASSES), lambda x: x.sigmoid(), reward, "own", device=device
    )
    task = replace(task, rollout_spec=settings.rollout_spec(STEPS), outside=Beside(policy, SHAPE))
    draw = torch.Generator().manual_seed(0)
    data = Dataset(torch.randn(48, *SHAPE, generator=draw), torch.arange(48) % CLASSES, ("a", "b", "c"))
    learner = settings.learner(task, data, 0)
    metrics = [learner.update(walks(replace(task, policy=learner.policy), i)) for i in range(UPDATES)]
    return [p.detach().cpu() for p in policy.parameters()], metrics


@pytest.mark.parametrize("agent", SETTINGS)
def test_an_agent_repeats_itself_and_agrees_with_the_cpu(agent):
    weights, metrics = trained(agent, "cuda")
    again, same = trained(agent, "cuda")
    assert all(torch.equal(a, b) for a, b in zip(weights, again))
    assert same == metrics
    expected, held = trained(agent, "cpu")
    assert metrics[0].keys() == held[0].keys()
    if "reward" in metrics[0]:
        assert metrics[0]["reward"] == pytest.approx(held[0]["reward"], rel=1e-4, abs=1e-5)
    if "log_ratio_first" in metrics[0]:
        assert metrics[0]["log_ratio_first"] < 1e-3
    # Adam's first steps turn the sign of a gradient near 0 into a whole step, so few elements may differ by some
    apart = torch.cat([(a - b).abs().flatten() for a, b in zip(weights, expected)])
    assert apart.quantile(0.9) < 1e-3


def waits(agent: str, micro_batch: int) -> int:
    """How often the CPU waits for the GPU in one update."""
    settings = replace(spec.parse(agent, AGENTS, AGENTS.what), micro_batch=micro_batch)
    policy = make_policy(1).cuda()
    task = Task(
        policy, TimeGrid(STEPS), SHAPE, torch.arange(CLASSES), lambda x: x.sigmoid(), reward, "own", device="cuda"
    )
    task = replace(task, rollout_spec=settings.rollout_spec(STEPS))
    learner = settings.learner(task, None, 0)
    learner.update(walks(replace(task, policy=learner.policy), 0))
    batch = walks(replace(task, policy=learner.policy), 1)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    ) as profiled:
        learner.update(batch)
    return sum(event.count for event in profiled.key_averages() if event.key == "cudaStreamSynchronize")


def test_a_rollout_waits_no_oftener_where_its_walks_are_longer():
    """The noise of a step crosses from page-locked memory: the CPU goes on while the GPU is at the steps before."""
    policy, found = make_policy(1).cuda(), []
    for steps in (3, 12):
        task = Task(
            policy, TimeGrid(steps), SHAPE, torch.arange(CLASSES), lambda x: x.sigmoid(), reward, "own", device="cuda"
        )
        item = plan(3, 0, CLASSES, PER_PROMPT, 10, CLASSES, 0)[0]
        run_item(task, item)
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        ) as profiled:
            run_item(task, item)
        found.append(sum(event.count for event in profiled.key_averages() if event.key == "cudaStreamSynchronize"))
    assert found[0] == found[1]


@pytest.mark.parametrize("agent", ["ddpo()", "grpo()", "nft()", "draft()"])
def test_an_update_waits_no_oftener_where_its_calls_are_smaller(agent):
    assert waits(agent, 6) <= waits(agent, 24) + 2


def test_walks_by_cuda_graphs_have_the_bits_of_those_without_whatever_the_weights_are():
    policy = make_policy(1).cuda()
    task = Task(
        policy, TimeGrid(STEPS), SHAPE, torch.arange(CLASSES), lambda x: x.sigmoid(), reward, "own", device="cuda"
    )
    graphed = replace(task, policy=frozen_copy(policy))
    compile_calls(graphed.policy.denoiser.net, "graphs")
    for iteration in range(3):
        with torch.no_grad():
            for one in (policy, graphed.policy):
                for p in one.parameters():
                    p.mul_(1.1)
        for item in plan(3, iteration, CLASSES, PER_PROMPT, 10, CLASSES, iteration):  # the last is of another size
            expected, found = run_item(task, item), run_item(graphed, item)
            assert torch.equal(found.x, expected.x)
            assert torch.equal(found.log_prob, expected.log_prob)


@pytest.mark.parametrize("agent", ["ddpo", "nft", "draft"])
def test_a_run_by_cuda_graphs_ends_in_the_bits_of_one_without(tmp_path, agent):
    run = (*TINY, "--device", "cuda", "--reward", "ink", "--agent", agent, "--updates", 3)
    for how in ("false", "graphs"):
        ended = rlfusion(tmp_path, "finetune", *run, "--name", f"by-{how}", "--compile", how)
        assert ended.code == 0, ended.err
    files = [tmp_path / "runs" / f"by-{how}" / "model" / "weights.safetensors" for how in ("false", "graphs")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("agent", ["ddpo", "draft"])
def test_a_run_that_was_stopped_ends_in_the_same_bits(tmp_path, agent):
    run = (*TINY, "--device", "cuda", "--reward", "ink", "--agent", agent)
    whole = rlfusion(tmp_path, "finetune", *run, "--name", "whole")
    assert whole.code == 0, whole.err
    short = rlfusion(tmp_path, "finetune", *run, "--name", "parts", "--updates", 3)
    assert short.code == 0, short.err
    longer = rlfusion(tmp_path, "finetune", "--resume", "runs/parts", "--change", "updates=6")
    assert longer.code == 0, longer.err

    def file(name: str) -> bytes:
        return (tmp_path / "runs" / name / "model" / "weights.safetensors").read_bytes()

    assert file("parts") == file("whole")
    told = [json.loads(line) for line in Path(tmp_path / "runs/whole/metrics.jsonl").read_text().splitlines()]
    assert told
