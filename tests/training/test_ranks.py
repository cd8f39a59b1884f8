"""Learners on several ranks: the same walks in each step, the same bits where asked for, and no silent drift."""

import re

import numpy as np
import pytest
import ranked
import torch
from counted import counting
from ranked import alone, on_ranks
from torch import nn

from rlfusion.agents import AGENTS, ddpo
from rlfusion.common import shards
from rlfusion.common.errors import ConfigError
from rlfusion.common.frames import joined_blobs, split_blobs
from rlfusion.config import Finetune
from rlfusion.config.parts import Learners
from rlfusion.rl.agent import Plan
from rlfusion.training.ranks import Ranks

AGENT_SETTINGS = [
    "ddpo()",
    "ddpo(form='sf')",
    "grpo(window=2, ratio_norm=True, divergence=0.01, step_draws=1, reference_every=1)",
    "grpo(window=1, outside='ode', outside_stride=2, start='prompt')",
    "ppo(value_epochs=1)",
    "awm(kl_loss=0.1, epochs=2)",
    "nft()",
    "dpo()",
    "opd()",
    "sft(kl=0.1)",
    "dpo(data='x')",
    "draft()",
    "refl()",
    "drwr(pretrain_weight=0.5)",
    "drwr(on='noised', kl=0.1)",
    "qsm(critic_updates=5)",
    "qsm(q='denoised')",
    "dawr()",
]
UNET = "UNet(width=8, multipliers=(1, 2), depth=1, attention=(1,))"
SPLIT_SETTINGS = [*AGENT_SETTINGS, "ddpo(micro_batch=4, kl_loss=0.1)", "dpo(micro_batch=2)", "draft(steps=2)"]
SPLIT_SETTINGS += [f"qsm(critic_updates=3, critic='{UNET}')"]
EXACT, SUMMED = (4, True), (4, False)
SPLIT, SPLIT_SUMMED = (4, True, True), (4, False, True)
ADAPTED = (4, True, True, "LoRA(rank=3)")
COPIED = "qsm(critic_updates=3)"
FEW = ["ddpo(kl_loss=0.1)", "draft()"]
SPLITS = shards.can_split()
OF_SPLIT = pytest.mark.skipif(not SPLITS, reason="needs an FSDP2 that takes sums of ours")


@pytest.fixture(scope="module")
def two():
    split = [(SPLIT_SETTINGS, SPLIT), (FEW, SPLIT_SUMMED), ([COPIED], ADAPTED)] if SPLITS else []
    return on_ranks(2, [(AGENT_SETTINGS, EXACT), (FEW, SUMMED), *split])


@pytest.fixture(scope="module")
def four():
    return on_ranks(4, [(FEW, EXACT), *([(FEW, SPLIT)] if SPLITS else [])])


def test_every_agent_is_tried():
    assert {text.partition("(")[0] for text in AGENT_SETTINGS} == set(AGENTS.names())


@pytest.mark.parametrize("at", range(len(AGENT_SETTINGS)), ids=AGENT_SETTINGS)
def test_two_ranks_give_the_bits_of_one(two, at):
    digest, _, metrics = alone(AGENT_SETTINGS[at], EXACT)
    for told in two.told:
        assert told[0][at][0] == digest
        assert told[0][at][2] == metrics


@pytest.mark.parametrize("form", [1, pytest.param(3, marks=OF_SPLIT)], ids=["whole", "split"])
@pytest.mark.parametrize("at", range(len(FEW)), ids=FEW)
def test_sums_of_ranks_are_equal_to_rounding_and_alike_on_all_ranks(two, at, form):
    (first, weights, _), (second, _, _) = (told[form][at] for told in two.told)
    assert first == second
    for ours, theirs in zip(weights, alone(FEW[at], SUMMED)[1]):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=2e-5)


@pytest.mark.parametrize("form", [0, pytest.param(1, marks=OF_SPLIT)], ids=["whole", "split"])
def test_four_ranks_give_the_bits_of_one(four, form):
    for told in four.told:
        assert [held[0] for held in told[form]] == [alone(text, EXACT)[0] for text in FEW]


@OF_SPLIT
@pytest.mark.parametrize("at", range(len(SPLIT_SETTINGS)), ids=SPLIT_SETTINGS)
def test_a_network_that_is_split_gives_the_bits_of_one_that_is_whole(two, at):
    digest, _, metrics = alone(SPLIT_SETTINGS[at], EXACT)
    for told in two.told:
        assert told[2][at][0] == digest
        assert told[2][at][2] == metrics


@OF_SPLIT
@pytest.mark.parametrize("what", ["parameters", "gradients", "moments", "average"])
def test_each_of_two_ranks_holds_half_of_what_is_split(two, what):
    for whole, split in two.held:
        assert split[what] <= 0.55 * whole[what]


CRITICS = [at for at, text in enumerate(AGENT_SETTINGS) if text.startswith(ranked.CRITICS)]


@OF_SPLIT
@pytest.mark.parametrize("at", CRITICS, ids=[AGENT_SETTINGS[at] for at in CRITICS])
def test_a_critic_is_split_with_the_policy_and_has_the_bits_of_a_whole_one(two, at):
    for told in two.critics:
        (whole,), (split,) = told[0][at], told[2][at]
        assert split["digest"] == whole["digest"]
        assert split["parameters"] <= 0.55 * whole["parameters"]
        assert split["moments"] <= 0.55 * whole["moments"]


@OF_SPLIT
def test_a_critic_that_begins_as_a_split_network_has_its_adapters_merged(two):
    digest, _, metrics = alone(COPIED, ADAPTED)
    for told in two.told:
        assert told[4][0][0] == digest
        assert told[4][0][2] == metrics


WHOLE = {
    "dpo": "pairs lie in two shares",
    "qsm": "its critic and its divergence look at all",
    "dawr": "its critic",
    "ppo": "its critic",
}
"""The agents that need all walks on every rank."""


@pytest.mark.parametrize("form", [0, pytest.param(2, marks=OF_SPLIT)], ids=["whole", "split"])
def test_a_rank_has_the_walks_of_its_own_shares_alone(two, form):
    for walked in two.walked:
        for text, (own, whole) in zip(AGENT_SETTINGS, walked[form]):
            needed = text.partition("(")[0] in WHOLE and "data=" not in text
            assert own == (whole if needed else whole / 2), text


def test_a_rank_that_drifts_is_named_with_the_tensor(two):
    assert all("ranks 0 and 1 differ in 'denoiser.net.leave.weight' after 1 optimiser steps" in t for t in two.drift)


@pytest.mark.parametrize(("walks", "steps", "shares"), [(24, 4, 1), (24, 4, 4), (26, 3, 4), (8, 2, 4)])
def test_a_pass_takes_every_walk_once_and_every_share_in_each_step(walks, steps, shares):
    ranks = Ranks(shares=shares)
    parts = ranks.passes(np.random.default_rng(0), walks, steps)
    assert torch.cat(parts).sort().values.tolist() == list(range(walks))
    for part in parts:
        assert ranks.share(part, walks).unique().tolist() == list(range(shares))


@pytest.mark.parametrize(("walks", "steps", "shares"), [(8, 4, 4), (20, 4, 4), (3, 3, 4), (26, 3, 4), (23, 5, 2)])
def test_the_steps_of_a_pass_are_even_though_shares_do_not_divide(walks, steps, shares):
    parts = Ranks(shares=shares).passes(np.random.default_rng(0), walks, steps)
    assert torch.cat(parts).sort().values.tolist() == list(range(walks))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_one_share_is_the_plain_permutation():
    order = torch.from_numpy(np.random.default_rng(5).permutation(10))
    assert all(map(torch.equal, Ranks().passes(np.random.default_rng(5), 10, 3), order.tensor_split(3)))
    assert torch.cat(Ranks().passes(np.random.default_rng(5), 10, 3, 7)).tolist() == order[:7].tolist()


@pytest.mark.parametrize("exact", [False, True])
def test_the_gradient_of_shares_is_that_of_all_rows_and_what_was_there_stays(exact):
    net, x = nn.Linear(3, 1).double(), torch.randn(10, 3, dtype=torch.float64)
    ranks = Ranks(shares=4, exact=exact)
    (2 * net(x).mean()).backward()
    before = net.weight.grad.clone()
    wanted = before + x.square().sum(0) + x.exp().sum(0)

    def body(power):
        return lambda rows: ((power(x[rows]) * net.weight).sum(), {"rows": rows})

    share = ranks.share(torch.arange(10), 10)
    records = ranks.accumulate(net, share, 2, body(torch.square))
    assert torch.equal(net.weight.grad, before)
    ranks.accumulate(net, share, 2, body(torch.exp))
    ranks.reduce(net.parameters())
    torch.testing.assert_close(net.weight.grad, wanted)
    assert torch.cat([record["rows"] for record in records]).tolist() == list(range(10))
    ranks.reduce(net.parameters())
    torch.testing.assert_close(net.weight.grad, wanted)


def test_a_step_that_is_broken_off_leaves_nothing_behind():
    net, ranks = nn.Linear(3, 1), Ranks(shares=2)

    def body(rows):
        if 3 in rows:
            raise KeyError("the reward's own")
        return net(torch.ones(len(rows), 3)).sum(), {}

    with pytest.raises(KeyError, match="own"):
        ranks.accumulate(net, ranks.share(torch.arange(4), 4), 8, body)
    ranks.reduce(net.parameters())
    assert net.weight.grad is None


def test_blobs_are_framed():
    blobs = [b"", b"abc", b"\0" * 9]
    assert split_blobs(joined_blobs(blobs)) == blobs
    whole = joined_blobs(blobs)
    ends = {8, 19, len(whole)}  # of a blob each; what ends between two of them is cut short
    for length in {*range(1, len(whole))} - ends:
        with pytest.raises(ValueError, match="cut short"):
            split_blobs(whole[:length])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ranks": 2}, "learner.shares = 1: expected a multiple of learner.ranks = 2, such as 2"),
        ({"ranks": 2, "shares": 6, "exact": True}, "expected shares / ranks to be a power of two, is 3"),
        ({"shares": 0}, "shares = 0"),
        ({"shard": "fsdp"}, "learner.ranks = 0 with learner.shard = fsdp: expected ranks, 1 at least"),
        ({"shard": "fsdp", "ranks": 3, "shares": 6, "exact": True}, "learner.ranks = 3: expected a power of two"),
        ({"ranks": -1}, "ranks = -1"),
    ],
)
def test_shares_that_cannot_be_are_refused(settings, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        Learners(**settings)


def test_a_split_network_takes_optimisers_that_look_at_single_elements():
    split = Learners(ranks=2, shares=2, shard="fsdp")
    for text in ("adamw", "sgd(momentum=0.9)", "torch.optim:NAdam"):
        Finetune(learner=split, agent=ddpo.Config(optimizer=text))
    for text in ("torch.optim:Adafactor", "torch.optim:Rprop"):
        Finetune(learner=Learners(ranks=2, shares=2), agent=ddpo.Config(optimizer=text))
        with pytest.raises(ConfigError, match=f"optimizer {text!r} with learner.shard = fsdp"):
            Finetune(learner=split, agent=ddpo.Config(optimizer=text))


@pytest.mark.parametrize("device", ["mps", "cuda:1"])
def test_a_split_network_is_on_cpus_or_the_gpu_of_each_rank(device):
    split = Learners(ranks=2, shares=2, shard="fsdp", gpus_per_rank=1)
    with pytest.raises(
        ConfigError, match=f"device = {device} with learner.shard = fsdp: expected one of auto, cpu, cuda"
    ):
        Finetune(learner=split, device=device)


def test_walks_are_enough_for_every_step_in_every_share():
    plan = Plan(prompts=2, samples_per_prompt=4, lag=0, steps=3, shares=4)
    plan.require_walks(2)
    with pytest.raises(ConfigError, match=r"at most the 2 walks of a rollout, in each of learner.shares = 4"):
        plan.require_walks(3)


@pytest.mark.parametrize("most", [0.5, 1.0, 2.0, 1e9, "the norm", "a little more"])
def test_gradients_are_clipped_with_torchs_bits_and_left_where_its_factor_is_one(most):
    torch.manual_seed(0)
    ours, theirs = (nn.Linear(7, 5) for _ in range(2))
    for p, q in zip(ours.parameters(), theirs.parameters()):
        p.grad = 0.2 * torch.randn_like(p)
        q.grad = p.grad.clone()
    norm = nn.utils.get_total_norm([p.grad for p in theirs.parameters()]).item()
    most = {"the norm": norm, "a little more": norm + 5e-7}.get(most, most)
    with counting() as ops:
        assert Ranks().clip(ours.parameters(), most) == norm
    nn.utils.clip_grad_norm_(theirs.parameters(), most)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(ours.parameters(), theirs.parameters()))
    assert ("aten._foreach_mul_" in ops) == (most < norm * (1 + 1e-6) + 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients_just_below_the_limit_have_torchs_bits(dtype):
    for seed in range(300):
        torch.manual_seed(seed)
        ours, theirs = nn.Parameter(torch.ones(9, dtype=dtype)), nn.Parameter(torch.ones(9, dtype=dtype))
        ours.grad = torch.randn(9).to(dtype) * 10 ** (seed % 5 - 2)
        theirs.grad = ours.grad.clone()
        most = nn.utils.get_total_norm([ours.grad]).item() * (1 + (seed % 7) * torch.finfo(dtype).eps / 2) + 1e-6
        Ranks().clip([ours], most)
        nn.utils.clip_grad_norm_([theirs], most)
        assert torch.equal(ours.grad, theirs.grad), seed


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_whose_norm_is_not_finite_are_left_to_be_named(bad):
    net = nn.Linear(3, 2)
    net.weight.grad, net.bias.grad = torch.ones(2, 3), torch.tensor([1.0, bad])
    Ranks().clip(net.parameters(), 0.5)
    assert torch.equal(net.weight.grad, torch.ones(2, 3))
