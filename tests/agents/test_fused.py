"""One forward pass for a rollout and its update: the gradient of the learner that makes a second one, without it."""

from dataclasses import fields, replace

import pytest
import torch
from chains import Capture
from torch import nn

from rlfusion.agents import AGENTS, ddpo, grpo
from rlfusion.cli.defaults import CHOICES
from rlfusion.common.errors import ConfigError
from rlfusion.config import CheckAgent, Finetune
from rlfusion.config.parts import Learners, Rollout
from rlfusion.data import to_pixels
from rlfusion.diffusion.chain import Chain
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.kernel import DDIM
from rlfusion.diffusion.policy import Policy
from rlfusion.diffusion.schedule import Cosine
from rlfusion.jobs.check_agent import check_agent
from rlfusion.jobs.parts import opened
from rlfusion.nets.dit import DiT
from rlfusion.nets.mlp import ResidualMLP
from rlfusion.rl.agent import Plan
from rlfusion.rollout import Local, Task, item, plan, run_item, task
from rlfusion.rollout.graphed import Graphed
from rlfusion.rollout.trajectory import Trajectory, concatenate
from rlfusion.training.publishing import acting

SHAPE, CLASSES, STEPS, WALKS = (1, 4, 4), 2, 5, 12
ONE = {"epochs": 1, "updates_per_epoch": 1}


class Double(nn.Module):
    """A network in float64, which counts its calls: with a graph, and without."""

    def __init__(self, **settings) -> None:
        super().__init__()
        self.net, self.calls = ResidualMLP(SHAPE, CLASSES, width=8, **settings), [0, 0]
        for parameter in self.net.parameters():
            nn.init.normal_(parameter, std=0.3)
        self.double()

    def forward(self, x, t, cond):
        self.calls[not torch.is_grad_enabled()] += 1
        return self.net(x, t.double(), cond)


@pytest.fixture(autouse=True)
def exact_noise(monkeypatch):
    monkeypatch.setattr(task, "noises", lambda *of: (z.double() for z in item.noises(*of)))


def bright(x: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
    return x.mean((1, 2, 3)) * (1 + cond)


def made(name: str, **settings):
    """A learner, the task by which its own policy walks, and its network."""
    torch.manual_seed(0)
    config = AGENTS[name](**{"lr": 1e-3} | settings)
    net = Double()
    policy = Policy(Denoiser(net, Cosine(), "v"), DDIM(1.0))
    spec = config.rollout_spec(STEPS)
    walked = Task(policy, TimeGrid(STEPS), SHAPE, torch.arange(CLASSES), to_pixels, bright, "bright", rollout_spec=spec)
    return config.learner(walked, None, 7), walked, net


def rollout(walked: Task, size: int = 5, iteration: int = 1) -> Trajectory:
    items = plan(3, iteration, CLASSES, WALKS // CLASSES, size, CLASSES, 0)
    return concatenate([run_item(walked, one) for one in items])


def bare(batch: Graphed) -> Trajectory:
    return Trajectory(**{f.name: getattr(batch, f.name) for f in fields(Trajectory)})


KINDS = {
    "sf": ("ddpo", {"form": "sf", "kl_loss": 0.0}),
    "is": ("ddpo", {"form": "is", "kl_loss": 0.0, "step_weight": "noise", "advantage": "batch"}),
    "kl": ("ddpo", {"kl_loss": 0.3, "kl_reward": 0.1, "clip_per_dim": True}),
    "fraction": ("ddpo", {"step_fraction": 0.5, "kl_loss": 0.1}),
    "grpo": ("grpo", ONE | {"kl_loss": 0.1}),
    "window": ("grpo", ONE | {"window": 2, "kl_loss": 0.0, "step_weight": "noise"}),
    "ode": ("grpo", ONE | {"window": 2, "outside": "ode", "kl_loss": 0.2}),
    "flash": (
        "grpo",
        ONE | {"window": 2, "outside": "ode", "outside_stride": 2, "start": "prompt", "kl_loss": 0.2},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_a_second_forward_pass(kind):
    name, settings = KINDS[kind]
    learner, walked, _ = made(name, fused=True, **settings)
    other, _, _ = made(name, **ONE | settings)
    for one in (learner, other):  # away from the reference, so that a KL has a gradient
        with torch.no_grad():
            for p in one.policy.parameters():
                p.mul_(1.1)
        one.iteration, one.optimization = 1, Capture(one.policy)
    batch = rollout(walked)
    batch = replace(batch, version=1)
    if kind == "fraction":  # the steps of each walk are drawn anew in a second pass
        other._parts = lambda _: [(torch.arange(WALKS), *batch.learned())]
        drawn = [tuple(rollout(walked, iteration=n).trained.tolist()) for n in range(9)]
        assert len(batch.trained) == 2
        assert {step for steps in drawn for step in steps} == {0, 1, 2, 3}
        assert drawn[1] == tuple(batch.trained.tolist())
    found, wanted = learner.update(batch), other.update(bare(batch))
    torch.testing.assert_close(learner.optimization.gradients[0], other.optimization.gradients[0], rtol=1e-10, atol=0)
    assert learner.optimization.gradients[0].abs().max() > 1e-3
    assert found.keys() == wanted.keys()
    assert found == pytest.approx(wanted, rel=1e-9, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize(
    ("kind", "walks", "update"),
    [
        ("sf", (4, 1), (0, 0)),
        ("kl", (4, 1), (0, 1)),
        ("window", (2, 3), (0, 0)),
        ("ode", (2, 3), (0, 1)),
        ("fraction", (2, 3), (0, 1)),
    ],
)
def test_an_update_calls_the_network_for_its_reference_alone(kind, walks, update):
    """Calls with a graph, and without, of a rollout of one item of 5 steps, the last of which takes no noise."""
    name, settings = KINDS[kind]
    learner, walked, net = made(name, fused=True, **settings)
    batch = rollout(walked, WALKS)
    assert tuple(net.calls) == walks
    net.calls[:] = [0, 0]
    calls = [net] if learner.transitions.reference is None else [net, learner.transitions.reference.denoiser.net]
    before = [list(one.calls) for one in calls]
    learner.update(batch)
    told = [[now - then for now, then in zip(one.calls, held)] for one, held in zip(calls, before)]
    assert tuple(map(sum, zip(*told))) == update


def test_a_rollout_keeps_the_activations_of_its_window_alone_and_states_without_a_graph():
    kept = []
    for window in (1, 2, 4):
        _, walked, _ = made("grpo", fused=True, window=window, kl_loss=0.0, **ONE)
        held: dict[int, torch.Tensor] = {}

        def pack(x, held=held):
            held[x.untyped_storage().data_ptr()] = x
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            batch = run_item(walked, plan(3, 0, CLASSES, WALKS // CLASSES, WALKS, CLASSES, 0)[0])
        own = {p.untyped_storage().data_ptr() for p in walked.policy.parameters()}
        kept.append(sum(x.untyped_storage().nbytes() for at, x in held.items() if at not in own))
        assert not any(x.requires_grad for x in (batch.x, batch.log_prob, batch.reward))
        assert batch.mean.requires_grad
    assert 1.8 * kept[0] < kept[1] < 2.2 * kept[0]
    assert 3.6 * kept[0] < kept[2] < 4.4 * kept[0]


def test_a_network_that_makes_activations_again_has_the_same_gradient():
    """Its blocks run once in a rollout, and once more in the backward pass."""
    gradients, calls = [], []
    for recompute in (False, True):
        _, walked, _ = made("ddpo", fused=True, kl_loss=0.0)
        torch.manual_seed(1)
        net = DiT(SHAPE, CLASSES, width=8, depth=1, heads=2, recompute=recompute).double()
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.3)
        own = replace(walked, policy=Policy(Denoiser(net, Cosine(), "v"), DDIM(1.0)))
        learner = AGENTS["ddpo"](fused=True, kl_loss=0.0).learner(own, None, 7)
        learner.optimization, seen = Capture(learner.policy), []
        net.blocks[0].register_forward_pre_hook(lambda *_, seen=seen: seen.append(0))
        learner.update(rollout(own, WALKS))
        gradients += learner.optimization.gradients
        calls.append(len(seen))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)
    assert calls == [STEPS, 2 * STEPS - 1]


def test_a_graph_serves_one_update_and_is_gone():
    learner, walked, _ = made("ddpo", fused=True)
    batch = rollout(walked)
    learner.update(batch)
    with pytest.raises(RuntimeError, match="second time"):
        learner.update(batch)


def test_walks_that_are_left_out_take_no_part():
    gradients = []
    kept = torch.tensor([0, 1, 2, 5, 6, 7, 8, 11])
    for leave in (lambda b: b.take(kept), lambda b: bare(b).take(kept)):
        learner, walked, _ = made("ddpo", fused=True, kl_loss=0.0)
        learner.optimization = Capture(learner.policy)
        learner.update(leave(rollout(walked)))
        gradients += learner.optimization.gradients
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_the_learners_own_network_walks_and_is_not_copied():
    learner, walked, _ = made("ddpo", fused=True)
    backend = Local(walked)
    before = {name: p.data_ptr() for name, p in learner.policy.named_parameters()}
    items = plan(3, 0, CLASSES, WALKS // CLASSES, 5, CLASSES, 0)
    batch = concatenate(backend.collect(items, acting(learner.policy, 0, False, 0, None)))
    learner.update(batch)
    assert before == {name: p.data_ptr() for name, p in learner.policy.named_parameters()}
    assert all(p.grad is None for p in learner.policy.parameters())
    again = concatenate(
        backend.collect([replace(i, version=1) for i in items], acting(learner.policy, 1, False, 0, None))
    )
    assert learner.update(again)["log_ratio_max"] < 1e-12


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("ddpo", {"epochs": 2}, r"epochs, updates_per_epoch = \(2, 1\)"),
        ("ddpo", {"updates_per_epoch": 4}, r"epochs, updates_per_epoch = \(1, 4\)"),
        ("ddpo", {"ratio": "trajectory"}, "ratio = trajectory"),
        ("ddpo", {"decoupled": True}, "decoupled = True"),
        ("ddpo", {"last_step": "pathwise"}, "last_step = pathwise"),
        ("ddpo", {"pace": 0.1}, r"pace = 0\.1"),
        ("grpo", {}, r"epochs, updates_per_epoch = \(2, 4\)"),
        ("grpo", ONE | {"decoupled": True}, "decoupled = True"),
        ("grpo", ONE | {"pace": 0.1}, r"pace = 0\.1"),
        ("grpo", ONE | {"ratio_norm": True}, "ratio_norm = True"),
        ("grpo", ONE | {"divergence": 0.1}, r"divergence = 0\.1"),
        ("grpo", ONE | {"step_draws": 1}, "step_draws = 1"),
    ],
)
def test_settings_that_need_other_passes_are_refused_by_name(name, settings, said):
    with pytest.raises(ConfigError, match=f"fused = True with {said}: .*, or fused false"):
        AGENTS[name](fused=True, **settings)
    AGENTS[name](**settings)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ({"workers": 2}, "rollout.workers = 2"),
        ({"lag": 1}, "rollout.lag = 1"),
        ({"ranks": 2, "shares": 2}, "learner.ranks = 2"),
        ({"shares": 2}, "learner.shares = 2"),
    ],
)
@pytest.mark.parametrize("name", ["ddpo", "grpo"])
def test_walks_from_elsewhere_are_refused_by_name(name, where, said):
    rolled = {"prompts": 4, "samples_per_prompt": 4, "lag": 0, "steps": 4} | where
    with pytest.raises(ConfigError, match=rf"{said}: fused = True .*, or agent\.fused false"):
        AGENTS[name](fused=True, **ONE).check(Plan(**rolled))
    AGENTS[name](**ONE).check(Plan(**rolled))


def test_a_run_refuses_workers_and_ranks_before_any_work():
    agent = ddpo.Config(fused=True)
    for settings in ({"rollout": Rollout(workers=2)}, {"learner": Learners(ranks=2, shares=2)}):
        with pytest.raises(ConfigError, match="fused = True"):
            Finetune(agent=agent, **settings)


def test_the_checks_of_any_agent_hold(monkeypatch):
    monkeypatch.undo()
    name = "grpo(fused=True, epochs=1, updates_per_epoch=1, window=2)"
    found = list(check_agent(CheckAgent(agent=name, repeats=4)))
    assert {f.verdict for f in found} <= {"ok", "note"}, found


def test_the_estimate_of_memory_has_the_activations_of_all_that_is_learned_from():
    chain, rolled = Chain(steps=20), Rollout(prompts=4, samples_per_prompt=5, item=10)
    found = {}
    for name, agent in {
        "two passes": ddpo.Config(micro_batch=16),
        "all": ddpo.Config(fused=True),
        "fraction": ddpo.Config(fused=True, step_fraction=0.25),
        "window": grpo.Config(fused=True, window=3, **ONE),
        "ode": grpo.Config(fused=True, window=3, outside="ode", **ONE),
    }.items():
        held = opened(Finetune(agent=agent, chain=chain, rollout=rolled)).holds
        found[name] = held.rows, held.here
    assert found == {
        "two passes": (16, True),
        "all": (400, False),
        "fraction": (100, False),
        "window": (60, False),
        "ode": (60, False),
    }


def test_defaults_of_pipelines_are_those_of_one_update():
    for agent in (ddpo.Config, grpo.Config):
        for told in ({"fused": "true"}, {"fused": True}):
            assert agent(**agent.for_pipelines(told), fused=True).pace is None
        assert "pace" in agent.for_pipelines({"fused": "false"})
    assert "fused" in CHOICES
