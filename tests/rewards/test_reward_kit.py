"""The kit around rewards: whole groups, deadlines, memory, files and names, and ``check-reward``."""

import json
import math
import sys
import textwrap
import threading

import pytest
import torch
from processes import rlfusion
from scipy.optimize import minimize
from tiny_runs import TINY

from rlfusion.agents import ddpo, draft
from rlfusion.common.errors import ConfigError
from rlfusion.config import CheckReward, Finetune, Rollout
from rlfusion.data import digits
from rlfusion.jobs import check_reward as reward_check
from rlfusion.jobs.check_reward import Trial, check_reward, examine
from rlfusion.jobs.groups import require_whole_groups
from rlfusion.jobs.parts import opened
from rlfusion.rewards import (
    CallOptions,
    ClassLogProb,
    GroupWise,
    PairWise,
    RewardError,
    RewardFailure,
    bare,
    build,
    caches,
    everywhere,
    find,
    ink,
    labels,
    needs_groups,
    score,
    valid,
)
from rlfusion.rewards.grouped import RIDGE, bradley_terry, pairs, rows_of_groups
from rlfusion.rewards.wrapped import HANGING, Cached, Timed
from rlfusion.rl.monitor import Config as Monitoring


@pytest.fixture
def samples():
    return torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def brighter(a, b, cond):
    return torch.sigmoid(10 * (a.mean((1, 2, 3)) - b.mean((1, 2, 3))))


# --- whole groups ---


@pytest.mark.parametrize(
    ("cond", "groups"),
    [
        (None, [[0, 1, 2, 3, 4]]),
        (torch.tensor([7, 2, 7, 2, 5]), [[0, 2], [1, 3], [4]]),
        (torch.tensor([[0.1, 1], [0.1, 2], [0.1, 1], [0.2, 1], [0.1, 2]]), [[0, 2], [1, 4], [3]]),
        ({"a": torch.tensor([0, 0, 1, 1, 1]), "b": torch.tensor([1, 1, 1, 0, 1])}, [[0, 1], [2, 4], [3]]),
    ],
)
def test_groups_are_samples_of_equal_conditions(cond, groups):
    assert [rows.tolist() for rows in rows_of_groups(cond, 5)] == groups


def test_a_group_wise_reward_sees_one_prompt_at_a_time_and_passes_gradients(samples):
    seen = []

    @GroupWise
    def novelty(x, cond):
        seen.append(cond.tolist())
        return (x - x.mean(0)).square().mean((1, 2, 3))

    cond = torch.tensor([1, 0, 2] * 4)
    x = samples.double().requires_grad_()
    value = novelty(x, cond)
    assert seen == [[1] * 4, [0] * 4, [2] * 4]
    for c in range(3):
        mine = samples[cond == c].double()
        torch.testing.assert_close(value[cond == c], (mine - mine.mean(0)).square().mean((1, 2, 3)))
    (slope,) = torch.autograd.grad(value.sum(), x)
    expected = torch.zeros_like(x)
    for c in range(3):  # d/dx_j sum_i |x_i - m|^2 = 2 (x_j - m)
        expected[cond == c] = 2 * (x - x[cond == c].mean(0))[cond == c] / 64
    torch.testing.assert_close(slope, expected.detach())


def test_win_rates_by_hand():
    p = {(0, 1): 0.9, (0, 2): 0.2, (1, 2): 0.5}
    x = torch.arange(3.0).reshape(3, 1, 1, 1)

    def judge(a, b, cond):
        return torch.tensor([p[int(i), int(j)] for i, j in zip(a.flatten(), b.flatten())])

    assert PairWise(judge)(x, None).tolist() == pytest.approx([(0.9 + 0.2) / 2, (0.1 + 0.5) / 2, (0.8 + 0.5) / 2])


def test_both_ways_round_takes_the_place_out_of_a_verdict(samples):
    def prefers_the_first(a, b, cond):
        return 0.5 * brighter(a, b, cond) + 0.5

    cond = torch.arange(12) // 6
    fair = PairWise(brighter)(samples, cond)
    assert not torch.allclose(PairWise(prefers_the_first)(samples, cond), 0.25 + 0.5 * fair)
    torch.testing.assert_close(PairWise(prefers_the_first, both=True)(samples, cond), 0.25 + 0.5 * fair)


@pytest.mark.parametrize("count", range(2, 9))
def test_pairs_are_none_twice_and_as_many_for_each(count):
    for opponents in range(count):
        first, second = pairs(count, opponents)
        held = {frozenset(pair) for pair in zip(first.tolist(), second.tolist())}
        assert len(held) == len(first)
        assert all(len(pair) == 2 for pair in held)
        each = torch.cat([first, second]).bincount(minlength=count)
        everyone = opponents == 0 or 2 * opponents >= count - 1
        assert each.tolist() == [count - 1 if everyone else 2 * opponents] * count


@pytest.mark.parametrize("opponents", [0, 1, 2])
def test_bradley_terry_is_the_maximum_that_scipy_finds(opponents):
    generator = torch.Generator().manual_seed(opponents)
    first, second = pairs(7, opponents)
    won = torch.rand(len(first), generator=generator, dtype=torch.float64).round(decimals=1)
    found = bradley_terry(first, second, won, 7)

    def loss(r):
        r = torch.tensor(r, requires_grad=True)
        d = r[first] - r[second]
        log = torch.nn.functional.logsigmoid
        value = -(won * log(d) + (1 - won) * log(-d)).sum() + RIDGE / 2 * r.square().sum()
        value.backward()
        return value.item(), r.grad.numpy()

    best = minimize(loss, [0.0] * 7, jac=True, method="BFGS", options={"gtol": 1e-10})
    torch.testing.assert_close(found, torch.from_numpy(best.x), atol=1e-7, rtol=1e-6)


def test_bradley_terry_of_two_and_of_the_undefeated():
    one = (torch.tensor([0]), torch.tensor([1]))
    d = bradley_terry(*one, torch.tensor([0.8]), 2)  # p - s(d) = RIDGE d / 2
    assert (torch.sigmoid(d[0] - d[1]) + RIDGE * d[0]).item() == pytest.approx(0.8)
    assert d.sum().item() == pytest.approx(0)
    first, second = pairs(24)
    ladder = bradley_terry(first, second, torch.ones(len(first)), 24)  # i beats every j > i
    assert bool((ladder[:-1] > ladder[1:]).all())
    assert ladder.isfinite().all()


def test_a_comparison_that_is_no_probability_or_has_no_opponent_is_an_error(samples):
    with pytest.raises(RewardError, match=r"a comparison answered -?[0-9.]+ to [0-9.]+: expected 0 to 1"):
        PairWise(lambda a, b, c: 5 * a.mean((1, 2, 3)))(samples, None)
    with pytest.raises(RewardError, match=r"66 comparisons were answered \(1,\)"):
        PairWise(lambda a, b, c: torch.zeros(1))(samples, None)
    with pytest.raises(RewardError, match="alone with its prompt"):
        PairWise(brighter)(samples, torch.arange(12))
    with pytest.raises(RewardError, match=r"a group of 12 samples was answered \(\)"):
        GroupWise(lambda x, c: x.mean())(samples, None)
    with pytest.raises(ConfigError, match="scores = 'elo'"):
        PairWise(brighter, scores="elo")


def whole_groups(config: Finetune, reward) -> None:
    require_whole_groups(config.rollout, opened(config).task, config.agent.name, 10, reward)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"rollout": Rollout(item=100)},
            r"rollout.item = 100: .*expected a multiple of samples_per_prompt = 24, such as 96",
        ),
        (
            {"rollout": Rollout(samples_per_prompt=1), "agent": ddpo.Config(advantage="prompt")},
            "samples_per_prompt = 1",
        ),
        ({"rollout": Rollout(prompts=11)}, "rollout.prompts = 11: .*expected at most the 10"),
        ({"agent": draft.Config()}, "agent = draft: it scores as it learns"),
    ],
)
def test_rollouts_that_would_tear_groups_are_refused(settings, said):
    reward = build({"ink": 1.0, "symmetry": 1.0}, made={"symmetry": PairWise(brighter)})
    with pytest.raises(ConfigError, match=said):
        whole_groups(Finetune(**settings), reward)
    if "11" not in said:
        whole_groups(Finetune(**settings), ink)
    whole_groups(Finetune(), reward)


# --- deadlines and memory ---


def test_a_reward_that_hangs_is_named_and_not_waited_for(samples):
    goes_on = threading.Event()

    def stuck(x, cond):
        if bool(cond.any()):
            goes_on.wait(60)
        return x.mean((1, 2, 3))

    timed = Timed(stuck, "mine", 0.05)
    try:
        for _ in range(HANGING):
            with pytest.raises(
                RewardFailure, match=r"'mine' failed for 12 of 12 samples: not done within timeout_s = 0.05"
            ):
                score(timed, samples, torch.ones(12), "mine")
        with pytest.raises(RewardFailure, match="earlier calls of it hang"):
            timed(samples, torch.zeros(12))
        assert score(timed, samples, torch.zeros(12), "mine", masked=True).isnan().all()
    finally:
        goes_on.set()
    for call in timed._hanging:
        call.join(30)
    timed.timeout_s = 30.0
    assert torch.equal(timed(samples, torch.zeros(12)), samples.mean((1, 2, 3)))


def test_a_deadline_changes_neither_values_nor_gradients_nor_errors(samples):
    reward = ClassLogProb()
    timed, cond = Timed(reward, "mine", 60.0), torch.arange(12) % 10
    x, y = samples.clone().requires_grad_(), samples.clone().requires_grad_()
    a, b = timed(x, cond), reward(y, cond)
    assert torch.equal(a, b)
    a.sum().backward()
    b.sum().backward()
    assert torch.equal(x.grad, y.grad)
    with torch.no_grad():
        assert not timed(x, cond).requires_grad
    with pytest.raises(ConfigError, match="label"):
        timed(samples, None)


def test_a_cache_answers_the_same_batch_and_no_other(samples):
    calls = []

    def counted(x, cond):
        calls.append(len(x))
        return x.mean((1, 2, 3)) + cond

    cached, cond = Cached(counted, "id", 24), torch.arange(12)
    first = cached(samples, cond)
    assert torch.equal(cached(samples.clone(), cond.clone()), first)
    assert (len(calls), cached.found, cached.asked) == (1, 12, 24)
    tiny = samples.clone()
    tiny[3, 0, 0, 0] = torch.nextafter(tiny[3, 0, 0, 0], torch.tensor(2.0))
    for other, label in (
        (tiny, cond),
        (samples, cond.flip(0)),
        (samples, cond.to(torch.int32)),
        (samples.double(), cond),
        (samples.reshape(12, 1, 4, 16), cond),
        (samples[:6], cond[:6]),
    ):
        before = len(calls)
        torch.testing.assert_close(cached(other, label), counted(other, label), rtol=0, atol=0)
        assert len(calls) == before + 2
    first[:] = -1.0  # what was handed out is not what is kept
    cached(samples, cond)
    assert float(cached(samples, cond).min()) >= 0


def test_a_cache_is_bounded_and_forgets_the_batch_that_was_not_used_longest(samples):
    cached = Cached(lambda x, c: x.mean((1, 2, 3)), "id", 24)
    one, two, three = samples, samples + 1, samples + 2
    for batch in (one, two, one, three):  # three drives out two
        cached(batch, None)
    assert cached.found == 12
    cached(one, None)
    assert cached.found == 24
    cached(two, None)
    assert cached.found == 24
    assert sum(map(len, cached._values.values())) <= 24


def test_a_cache_keeps_neither_failures_nor_gradients(samples):
    answers = [torch.full((12,), math.nan), torch.ones(12)]
    cached = Cached(lambda x, c: answers.pop(0), "id", 100)
    assert score(cached, samples, None, "it", masked=True).isnan().all()
    assert score(cached, samples, None, "it", masked=True).eq(1).all()
    assert not answers
    gradient = Cached(ink, "id", 100)
    gradient(samples, None)
    assert gradient(samples.clone().requires_grad_(), None).requires_grad
    assert gradient.asked == 12


def test_care_is_put_around_each_reward_and_can_be_taken_off(samples):
    total = build({"ink": 1.0, "class_logprob": 1.0}, call_options=CallOptions(timeout_s=30.0, cache=100))
    assert len(list(caches(total))) == 2
    assert bare(total.rewards["ink"]) is ink
    assert isinstance(bare(total.rewards["class_logprob"]), ClassLogProb)
    other = build({"ink": 1.0, "class_logprob": 1.0}, call_options=CallOptions(timeout_s=30.0, cache=100))
    other.load_state_dict(total.state_dict())
    cond = torch.arange(12) % 10
    assert torch.equal(other(samples, cond), total(samples, cond))
    assert needs_groups(build("ink", made={"ink": PairWise(brighter)}, call_options=CallOptions(1.0, 1)))
    with pytest.raises(ConfigError, match="cache = -1"):
        CallOptions(cache=-1)


def test_the_share_of_failures_is_bounded():
    fine, failed = valid(torch.tensor([1.0, math.nan, 2.0, 3.0]), "it", 0.3)
    assert (fine.tolist(), failed) == ([True, False, True, True], 0.25)
    with pytest.raises(RewardError, match=r"'it' failed for 25% of 4 samples: expected at most max_failed = 0.2"):
        valid(torch.tensor([1.0, math.nan, 2.0, 3.0]), "it", 0.2)


# --- names ---


MINE = """
from dataclasses import dataclass

import torch

from rlfusion.jobs.groups import require_whole_groups
from rlfusion.jobs.parts import opened
from rlfusion.rewards import PairWise


@dataclass(frozen=True)
class Bright:
    power: float = 1.0

    def __call__(self, samples, cond):
        return samples.mean((1, 2, 3)) ** self.power


@PairWise
def brighter(a, b, cond):
    return torch.sigmoid(10 * (a.mean((1, 2, 3)) - b.mean((1, 2, 3))))


def random(samples, cond):
    return torch.rand(len(samples))


def normalised(samples, cond):
    value = samples.mean((1, 2, 3))
    return (value - value.mean()) / value.std()


def greedy(samples, cond):
    samples.clamp_(max=0.5)
    return samples.mean((1, 2, 3))


def detached(samples, cond):
    return samples.sum((1, 2, 3)) - samples.detach().square().sum((1, 2, 3))


def step(samples, cond):
    return (samples * 0).sum((1, 2, 3)) + (samples.mean((1, 2, 3)) > 0.3).float()


def asked(samples, cond, *, prompts):
    return torch.tensor([float(len(prompts[int(c)])) for c in cond]) + samples.mean((1, 2, 3))


def broken(samples, cond):
    raise OSError("no such model")
"""


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    file = tmp_path / "elsewhere" / "my-rewards.py"
    file.write_text(MINE)
    return file


def test_a_reward_in_a_file(mine, samples, monkeypatch):
    name = f"{mine}:Bright"
    reward = build(name, {name: {"power": 2.0}})
    torch.testing.assert_close(reward(samples, None), samples.mean((1, 2, 3)) ** 2)
    assert type(build(name)) is type(reward)  # loaded once
    monkeypatch.chdir(mine.parent)
    assert find("my-rewards.py:Bright") is type(reward)
    assert everywhere("my-rewards.py:Bright") == name
    monkeypatch.chdir("/")
    for wrong, said in (
        ("my-rewards.py:Bright", "no file '/my-rewards.py' .from the folder '/'."),
        (f"{mine}:Brigt", "'Brigt': .*did you mean 'Bright'"),
    ):
        with pytest.raises(ConfigError, match=said):
            build(wrong)


def test_a_file_that_changed_is_read_again_and_one_that_fails_is_not_kept(mine):
    (old, held) = find(f"{mine}:random"), set(sys.modules)
    mine.write_text("def random(samples, cond):\n    return 4\n")
    assert find(f"{mine}:random")(None, None) == 4
    assert old is not find(f"{mine}:random")
    mine.write_text("import absent_dependency\n")
    with pytest.raises(ConfigError, match=r"No module named 'absent_dependency' \(.*my-rewards\.py, line 1\)$"):
        find(f"{mine}:random")
    assert len(set(sys.modules) - held) == 1


def test_labels_tell_rewards_apart():
    assert labels(["ink", "a.b:score", "/x/y.py:other"]) == {
        "ink": "ink",
        "a.b:score": "score",
        "/x/y.py:other": "other",
    }
    assert labels(["a:score", "b:score", "ink"]) == {"a:score": "a:score", "b:score": "b:score", "ink": "ink"}
    assert labels(["http://127.0.0.1:8500,http://127.0.0.1:8501"]) == {
        "http://127.0.0.1:8500,http://127.0.0.1:8501": "127.0.0.1-8500+1"
    }
    assert Finetune(reward="http://127.0.0.1:8500").default_name == "ddpo-127.0.0.1-8500-seed0"
    assert "/" not in Finetune(reward={"x/a.py:f": 1.0, "x/b.py:f": 1.0}).reward_name


def test_held_out_rewards_take_options_and_others_do_not():
    monitor = Monitoring(held_out=("jpeg_compressibility",))
    options = {"jpeg_compressibility": {"quality": 80}}
    config = Finetune(reward="ink", monitor=monitor, reward_options=options)
    assert opened(config).rewards.options_of("jpeg_compressibility") == options
    assert opened(config).rewards.options_of("ink") == {}
    with pytest.raises(ConfigError, match="'jpeg_compressibility': expected one of ink"):
        Finetune(reward="ink", reward_options=options)


# --- check-reward ---


@pytest.fixture(autouse=True)
def one_measurement_of_speed(monkeypatch):
    monkeypatch.setattr(reward_check, "SPEED_S", 0.0)


def found(name, **settings) -> dict[str, str]:
    return {f.check: f.verdict for f in check_reward(CheckReward(name, **settings))}


def test_rewards_that_are_fine(mine):
    good = dict.fromkeys(("answers", "range", "input", "repeats", "batch", "speed"), "ok")
    assert found("ink") == good | {"condition": "note", "gradient": "ok"}
    assert found("jpeg_compressibility", options={"quality": 50}) == good | {"condition": "note", "gradient": "note"}
    assert found(f"{mine}:brighter") == good | {"condition": "note", "gradient": "ok"}
    assert found(f"{mine}:asked") == good | {"condition": "note", "gradient": "ok"}


def test_a_reward_that_learns_from_data_learns_from_the_part_that_finetune_trains_on(monkeypatch):
    seen = []
    monkeypatch.setattr(
        reward_check, "make_reward", lambda name, o, train, root, call_options: seen.append(train) or build(name)
    )
    found("ink")
    expected = digits().split(Finetune().pretrain.held_out)[0]
    assert torch.equal(seen[0].x, expected.x)  # so both find the same in the cache, whose names are of the data


@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("random", "repeats"),
        ("normalised", "batch"),
        ("greedy", "answers"),
        ("detached", "gradient"),
        ("step", "gradient"),
        ("broken", "answers"),
    ],
)
def test_what_is_wrong_with_a_reward_is_found(mine, name, check):
    assert found(f"{mine}:{name}")[check] == "FAILS"


def test_a_network_in_training_mode_is_found():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 1), torch.nn.Flatten(0))

    class Normed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, cond):
            return self.net(x)

    x = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    trial = Trial("net", Normed(), x, torch.arange(16) // 4, 4, 0)
    verdicts = {f.check: f.verdict for f in examine(trial)}
    assert verdicts["batch"] == "FAILS"
    trial.reward.eval()
    assert {f.check: f.verdict for f in examine(trial)}["batch"] == "ok"


def test_check_reward_as_a_command(mine, tmp_path):
    good = rlfusion(tmp_path, "check-reward", f"{mine}:Bright", "--options", '{"power": 2.0}')
    assert good.code == 0, good.err
    assert "finite differences" in good.out
    bad = rlfusion(tmp_path, "check-reward", f"{mine}:random")
    assert bad.code == 2
    assert bad.err.strip().endswith("fails: repeats, batch")


# --- through the commands ---


@pytest.fixture
def root(tiny_root, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "cache").symlink_to(tiny_root / "cache")
    return tmp_path


GROUPS = ("--rollout.item", 12, "--monitor.every", 0)


def weights(folder) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in (folder / "model").glob("*.safetensors")}


def trained(folder) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "train/reward" in line]


def test_a_pairwise_reward_in_a_file_trains(root, mine):
    """That workers give the same bits is in test_reward_envs."""
    name = "elsewhere/my-rewards.py:brighter"
    said = rlfusion(root, "finetune", *TINY, "--reward", name, *GROUPS, "--name", "it")
    assert said.code == 0, said.err
    assert [line["train/reward"] for line in trained(root / "runs" / "it")] == pytest.approx([0.5] * 6)
    torn = rlfusion(root, "finetune", *TINY, "--reward", name)
    assert torn.code == 2
    assert "rollout.item = 10" in torn.err


def test_a_cache_and_a_deadline_change_no_bit_and_the_hits_are_logged(root):
    (root / "mine.py").write_text(
        textwrap.dedent("""
        def half(samples, cond):
            return samples[..., :4].mean((1, 2, 3))
    """)
    )
    rlfusion(root, "finetune", *TINY, "--reward", "mine:half", "--name", "plain", "--monitor.every", 0)
    more = ("--reward_timeout_s", 60, "--reward_cache", 5000, "--monitor.every", 0)
    said = rlfusion(root, "finetune", *TINY, "--reward", "mine:half", "--name", "kept", *more)
    assert said.code == 0, said.err
    assert weights(root / "runs" / "plain") == weights(root / "runs" / "kept")
    assert [line["train/cached"] for line in trained(root / "runs" / "kept")] == [0.0] * 6
    assert "train/cached" not in trained(root / "runs" / "plain")[0]


def test_a_reward_that_hangs_ends_the_run_by_name(root):
    (root / "mine.py").write_text(
        textwrap.dedent("""
        import threading

        calls = []

        def stuck(samples, cond):
            calls.append(len(samples))
            if len(calls) == 12:
                threading.Event().wait()
            return samples.mean((1, 2, 3))
    """)
    )
    said = rlfusion(root, "finetune", *TINY, "--reward", "mine:stuck", "--reward_timeout_s", 1.5, "--name", "it")
    assert said.code == 4
    assert "rlfusion: reward failure: reward 'stuck' failed for 10 of 10 samples: not done within" in said.err or (
        "not done within timeout_s = 1.5" in said.err
    )


def test_failures_are_masked_in_the_evaluation_too(root):
    (root / "mine.py").write_text(
        textwrap.dedent("""
        import torch

        def flaky(samples, cond):
            value = samples.mean((1, 2, 3))
            return value.where(torch.arange(len(value)) % 50 != 7, torch.nan)
    """)
    )
    more = ("--reward", "mine:flaky", "--reward_failures", "mask", "--max_failed", 0.3, "--name", "it")
    said = rlfusion(root, "finetune", *TINY, *more, "--monitor.held_out", '["mine:flaky"]')
    assert said.code == 0, said.err
    summary = json.loads((root / "runs" / "it" / "summary.json").read_text())
    assert summary["before"]["reward_failed"] == pytest.approx(2 / 60)
    assert summary["after"]["reward"] == summary["after"]["reward"]
