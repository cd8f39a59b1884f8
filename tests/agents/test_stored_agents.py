"""SFT and Diffusion-DPO on stored samples: closed forms, fixed points on a mixture, resuming, what is refused."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from chains import Capture, affine, mlp
from plane import MODES, STD, fraction_near, plane_task
from weighted import plain_task, same

from rlfusion.agents import dpo, opd, sft
from rlfusion.common.errors import ConfigError
from rlfusion.common.seeding import stream
from rlfusion.config import Compare, Evaluations, Finetune
from rlfusion.diffusion.kernel import DDIM
from rlfusion.diffusion.schedule import Rectified
from rlfusion.jobs.finetune.schedule import schedule
from rlfusion.objectives.renoise import draws
from rlfusion.objectives.times import Uniform
from rlfusion.rl.agent import Plan
from rlfusion.rl.stored import Pairs, Samples
from rlfusion.rollout import plan, run_item
from rlfusion.rollout.outside import Stored
from rlfusion.training.ranks import current

ONE = {"epochs": 1, "updates_per_epoch": 1, "noisings": 1, "micro_batch": 10**6}


class Holding:
    """An ``Outside`` of some stored samples."""

    def __init__(self, stored: Stored) -> None:
        self.held = stored

    def stored(self, data: str) -> Stored:
        return self.held


def task_of(policy, stored: Stored, shape=(1, 3, 2), classes: int | None = 4):
    return replace(plain_task(policy, shape, classes), outside=Holding(stored))


def images(n: int = 40, pairs: bool = False, shape=(1, 3, 2)) -> Stored:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(n, *shape, generator=draw)
    score = torch.tensor([1.0, 0.0]).repeat(n // 2) if pairs else x.flatten(1).mean(1)
    prompt = torch.arange(n) // 2 % 4 if pairs else torch.arange(n) % 4
    return Stored(x, prompt, score.double(), pairs)


def nothing(task, config):
    """What a rollout brings to these agents."""
    spec = config.rollout_spec(4)
    return run_item(replace(task, rollout_spec=spec), plan(0, 0, 1, 4, 4, 1, 0)[0])


CONFIGS = {"sft": sft.Config(data="x", batch=16), "dpo": dpo.Config(data="x", batch=8)}


@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_the_loss_of_sft_is_least_at_the_weighted_regression_of_what_is_stored(beta):
    """An affine denoiser of one image each: weighted least squares of x_0 on x_t."""
    x = 0.3 + torch.randn(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stored = Stored(x, torch.zeros(200, dtype=torch.int64), x[:, 0].clone())
    policy = affine((0.4, 0.1), Rectified(), DDIM(1.0), "x0")
    settings = {"batch": 200, "beta": beta, "normalize": "none", "w_max": None, "times": "Uniform(margin=0.3)"}
    config = sft.Config(data="x", **ONE | settings)
    learner = config.learner(task_of(policy, stored, (2,), None), None, 0)
    drawn = learner.samples.draw(0, learner.weight)
    weight = torch.exp(beta * drawn.x[:, 0, 0])
    torch.testing.assert_close(drawn.scored, weight / torch.exp(beta * x[:, 0]).mean(), rtol=1e-5, atol=1e-6)
    key = (0, "sft noise", 0, 0, 0)
    t, eps = draws(drawn.x[:, 0].shape, policy.schedule, Uniform(0.3), key)
    noised = (1 - t)[:, None] * drawn.x[:, 0] + t[:, None] * eps.double()
    root = drawn.scored.sqrt()[:, None].expand(-1, 2).flatten()
    design = torch.stack([noised.flatten(), torch.ones(400, dtype=torch.float64)], 1)
    best = torch.linalg.lstsq(design * root[:, None], drawn.x[:, 0].flatten() * root).solution

    def gradient(theta) -> torch.Tensor:
        with torch.no_grad():
            policy.denoiser.net.theta.copy_(theta)
        policy.denoiser.net.theta.grad = None
        learner.accumulate(drawn, torch.arange(200), 0, 0, 0)
        return policy.denoiser.net.theta.grad

    assert gradient(best).abs().max() < 1e-7
    away = torch.tensor([0.02, -0.01], dtype=torch.float64)
    by_hand = 2 * (design * root[:, None]).T @ (design * root[:, None]) @ away / 400
    torch.testing.assert_close(gradient(best + away), by_hand, rtol=1e-5, atol=1e-8)


def test_the_gradient_of_dpo_on_stored_pairs_is_its_finite_difference():
    shape = (2,)
    stored = images(12, pairs=True, shape=shape)._replace(prompt=torch.zeros(12, dtype=torch.int64))
    stored = stored._replace(x=stored.x.double())
    policy = affine((0.55, -0.05), Rectified(), DDIM(1.0), "v")
    config = dpo.Config(data="x", batch=6, times="Uniform(margin=0.2)", **ONE)
    learner = config.learner(task_of(policy, stored, shape, None), None, 3)
    with torch.no_grad():
        learner.reference.denoiser.net.theta.copy_(torch.tensor([0.3, 0.2]))
    learner.optimization = Capture(policy)
    learner.update(nothing(learner.stored.task, config))
    drawn = learner.stored.draw(0)
    good, bad = drawn.x[0::2, 0], drawn.x[1::2, 0]
    assert {tuple(row) for row in good.tolist()} == {tuple(row) for row in stored.x[0::2].tolist()}

    def loss(theta) -> float:
        with torch.no_grad():
            policy.denoiser.net.theta.copy_(theta)
        rows = torch.cat([p for p in dpo_rows(config)])
        records = learner.accumulate(drawn, 2 * rows, 2 * rows + 1, (3, "dpo noise", 0, 0, 0))
        return sum(record["loss"].item() for record in records) / len(records)

    at, h = torch.tensor([0.55, -0.05], dtype=torch.float64), 1e-6
    difference = [(loss(at + h * e) - loss(at - h * e)) / (2 * h) for e in torch.eye(2, dtype=torch.float64)]
    torch.testing.assert_close(learner.optimization.gradients[0].tolist(), difference, rtol=1e-5, atol=1e-8)
    assert len(bad) == len(good) == 6


def dpo_rows(config) -> list[torch.Tensor]:
    """The pairs of the only pass, in its order."""
    return current().passes(stream(3, "dpo", 0, 0), config.batch, 1)


def modes(n: int = 400) -> torch.Tensor:
    """Points (n, 1, 1, 2): the left-hand mode and the right-hand one in turn."""
    x = MODES[torch.arange(n) % 2] + STD * torch.randn(n, 2, generator=torch.Generator().manual_seed(3))
    return x[:, None, None]


def trained(config, stored: Stored, updates: int) -> float:
    """The share of samples in the right-hand mode of a model of both, half and half, afterwards."""
    task = replace(plane_task(), outside=Holding(stored))
    learner = config.learner(task, None, 1)
    for _ in range(updates):
        learner.update(nothing(task, config))
    return fraction_near(task)


def test_sft_ends_at_the_mixture_that_is_stored():
    """The weights 4 and 1 of two modes that are stored alike leave a fifth to the left-hand one."""
    x, prompt = modes(), torch.zeros(400, dtype=torch.int64)
    score = torch.tensor([0.0, np.log(4.0)]).repeat(200)
    settings = {"batch": 512, "lr": 3e-3, "ema_decay": 0.0, "noisings": 2, "updates_per_epoch": 2}
    weighted = sft.Config(data="x", beta=1.0, normalize="none", **settings)
    assert trained(weighted, Stored(x, prompt, score.double()), 40) == pytest.approx(0.8, abs=0.08)
    preferred = Stored(x.flip(0), prompt, torch.tensor([1.0, 0.0]).repeat(200).double(), pairs=True)
    assert trained(sft.Config(data="x", **settings), preferred, 25) > 0.95


def test_dpo_moves_to_what_was_preferred():
    stored = Stored(modes().flip(0), torch.zeros(400, dtype=torch.int64), torch.tensor([1.0, 0.0]).repeat(200), True)
    config = dpo.Config(data="x", batch=128, lr=1e-3, beta=2.0, ema_decay=0.0)
    assert trained(config, stored, 12) > 0.8


@pytest.mark.parametrize("kind", ["scores", "pairs"])
def test_pairs_are_those_of_a_row_or_the_best_of_a_prompt_with_its_worst(kind):
    held = images(40, kind == "pairs")
    pairs = Pairs(task_of(mlp(), held), "x", 0.25, 8, 0)
    if kind == "pairs":
        assert pairs.winner.tolist() == list(range(0, 40, 2))
        assert pairs.loser.tolist() == list(range(1, 40, 2))
    else:
        assert len(pairs) == 4 * 2
        assert all(held.prompt[pairs.winner] == held.prompt[pairs.loser])
    assert (held.score[pairs.winner] > held.score[pairs.loser]).all()
    seen = [tuple(x.flatten().tolist()) for i in range(5) for x in pairs.draw(i).x[0::2, 0]]
    assert len(set(seen)) == len(pairs), "an epoch sees every pair"
    if kind == "pairs":
        second = held._replace(score=1 - held.score)
        assert Pairs(task_of(mlp(), second), "x", 0.25, 8, 0).winner.tolist() == list(range(1, 40, 2))


@pytest.mark.parametrize("agent", CONFIGS)
def test_a_saved_learner_continues_bit_for_bit(agent):
    config, held = replace(CONFIGS[agent], epochs=2, micro_batch=7), images(40, agent == "dpo")
    learners = [config.learner(task_of(mlp(seed), held), None, 5) for seed in (0, 9)]
    straight, resumed = learners
    batch = nothing(task_of(mlp(), held), config)
    assert batch.reward is None
    assert batch.x.shape[1] == 1
    for _ in range(2):
        straight.update(batch)
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    for _ in range(2):
        assert straight.update(batch) == resumed.update(batch)
    assert same(straight.policy, resumed.policy)
    assert straight.queries == resumed.queries == 0


@pytest.mark.parametrize("agent", CONFIGS)
def test_micro_batches_do_not_change_the_gradient(agent):
    gradients = []
    for size in (10**6, 3):
        policy = mlp().double()
        held = images(40, agent == "dpo")
        config = replace(CONFIGS[agent], updates_per_epoch=1, micro_batch=size)
        learner = config.learner(task_of(policy, held._replace(x=held.x.double())), None, 0)
        learner.optimization = Capture(policy)
        learner.update(nothing(task_of(policy, held), config))
        gradients += learner.optimization.gradients
    torch.testing.assert_close(*gradients)


def test_the_preferred_of_pairs_are_what_sft_learns():
    held = images(40, pairs=True)
    kept = Samples(task_of(mlp(), held), "x", 8, 0).held
    assert torch.equal(kept.x, held.x[0::2])
    assert torch.equal(kept.prompt, held.prompt[0::2])


BARE = images()._replace(score=None)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: sft.Config(batch=0), "batch = 0"),
        (lambda: sft.Config(w_max=0.0), "w_max = 0.0"),
        (lambda: sft.Config(time_weight="SNRR()"), "SNR"),
        (lambda: sft.Config(batch=7).check(Plan(1, 1, 0, 4, shares=2)), "updates_per_epoch = 4: expected at most 3"),
        (lambda: sft.Config(data="x", beta=1.0).learner(task_of(mlp(), BARE), None, 0), "have no scores, expected 0"),
        (lambda: CONFIGS["dpo"].learner(task_of(mlp(), BARE), None, 0), "no preferences or scores"),
        (
            lambda: CONFIGS["dpo"].learner(task_of(mlp(), BARE._replace(score=torch.zeros(40))), None, 0),
            "it gives no pair",
        ),
        (lambda: dpo.Config(batch=3), "batch = 3: pairs come from rollouts"),
        (lambda: dpo.Config(data="x", batch=0), "batch = 0"),
        (lambda: sft.Config(data="x").learner(plain_task(mlp(), (1, 3, 2), 4), None, 0), "this task opens no data"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


def test_the_plan_says_that_there_are_no_rollouts():
    assert "no rollouts: 16 stored images" in CONFIGS["sft"].plan()
    assert "no rollouts: 64 stored pairs" in dpo.Config(data="x").plan()
    CONFIGS["dpo"].check(Plan(1, 1, 0, 4))


@pytest.mark.parametrize("agent", [sft.Config(data="images"), dpo.Config(data="pairs")])
def test_a_budget_of_rewards_that_nobody_asks_for_is_refused(agent):
    with pytest.raises(ConfigError, match=f"budget_queries = 500: agent '{agent.name}' learns from stored samples"):
        Finetune(agent=agent, budget_queries=500)
    Finetune(agent=agent)
    Finetune(agent=dpo.Config(), budget_queries=500)


def test_no_more_optimiser_steps_than_stored_pairs():
    with pytest.raises(ConfigError, match="updates_per_epoch = 4: expected at most 2, of batch = 2 pairs"):
        Finetune(agent=dpo.Config(data="pairs", batch=2, updates_per_epoch=4))


@pytest.mark.parametrize(
    ("agent", "why"),
    [
        (opd.Config(), "agent 'opd' learns from no reward and only watches it"),
        (sft.Config(data="images"), "agent 'sft' learns from stored samples and asks for no reward"),
    ],
)
def test_what_acts_on_rewards_is_refused_where_nothing_is_learned_from_them(agent, why):
    with pytest.raises(ConfigError, match=f"constraint.*{why}"):
        Finetune(agent=agent, constraint=["ink <= 0.4"])
    with pytest.raises(ConfigError, match=f"reward_normalize.*{why}"):
        Finetune(agent=agent, reward={"ink": 1.0, "symmetry": 1.0}, reward_normalize="batch")


def test_a_comparison_gives_it_the_updates_of_the_others_and_no_budget():
    runs = [run for *_, run in Compare(agents=["sft(data='images')", "ddpo"], seeds=1).runs()]
    assert [run.budget_queries for run in runs] == [0, Compare().budget_queries]
    assert runs[0].updates == runs[1].updates
    assert schedule(replace(runs[0], evaluation=Evaluations()), 10).every == 0
