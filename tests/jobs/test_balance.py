"""Rewards on the scale of the base's own, and constraints: against formulas, a known optimum, and in whole runs."""

import json
import math

import numpy as np
import pytest
import torch
from processes import rlfusion
from tiny_runs import TINY

from rlfusion.agents import AGENTS, ddpo
from rlfusion.common.errors import ConfigError, StateError
from rlfusion.common.weights import read_file
from rlfusion.config import Compare, Finetune, Rollout
from rlfusion.jobs.balance import SUM, Balance, prompts_of
from rlfusion.jobs.parts import opened
from rlfusion.jobs.scoring import scored
from rlfusion.rewards import WeightedSum
from rlfusion.rewards.calibration import Moments
from rlfusion.rl.constraints import Constraint
from rlfusion.rl.guard import Config as Guards
from rlfusion.rl.guard import Guarded
from rlfusion.rollout.trajectory import Trajectory

BOTH = {"ink": 1.0, "symmetry": 0.5}


def walks(terms: torch.Tensor) -> Trajectory:
    """Walks of one prompt with these terms, and the sum that the settings ``BOTH`` give them."""
    n = len(terms)
    times, group = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.zeros(n, dtype=torch.int64)
    plain = terms @ torch.tensor([1.0, 0.5])
    return Trajectory(torch.zeros(n, 1, 1), times, None, plain, group, {"label": group}, 0, None, terms)


def spec(**settings):
    return opened(Finetune(**settings)).rewards


def begun(terms: torch.Tensor, **settings) -> Balance:
    """What is found where the base's samples have these terms."""
    held = Balance(spec(**{"reward": BOTH, **settings}))
    named = {**dict(zip(held.spec.reward, terms.unbind(1))), SUM: terms @ torch.tensor([*held.spec.reward.values()])}
    held.begin({name: Moments.of(values) for name, values in named.items()})
    return held


@pytest.mark.parametrize("count", [1, 2, 7, 10])
def test_median_and_mad_are_numpys(count):
    values = torch.randn(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64) * 3 + 1
    found, expected = Moments.of(values), values.numpy()
    median = np.median(expected)
    assert found[:4] == pytest.approx(
        (median, np.median(abs(expected - median)), expected.mean(), expected.std()), rel=1e-12, abs=1e-15
    )
    assert (found.count, found.spread) == (count, pytest.approx(1.4826 * found.mad))


def test_the_spread_of_normal_values_is_their_standard_deviation():
    values = torch.randn(40_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5
    assert Moments.of(values).spread == pytest.approx(5, rel=0.02)


def test_calibrated_rewards_are_on_the_scale_of_the_base_before_their_weights():
    draw = torch.Generator().manual_seed(1)
    base, terms = torch.randn(50, 2, generator=draw) * torch.tensor([1.0, 40.0]), torch.randn(8, 2, generator=draw)
    held = begun(base, reward_normalize="calibrated")
    got, log = scored(walks(terms), held.spec, held)
    median = base.median(0).values  # the lower of the two in the middle: not what is used
    ordered = base.double().sort(0).values
    median = (ordered[24] + ordered[25]) / 2
    away = (base.double() - median).abs().sort(0).values
    scale = 1.4826 * (away[24] + away[25]) / 2
    expected = ((terms - median) / scale) @ torch.tensor([1.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(got.reward.double(), expected, rtol=1e-5, atol=1e-5)
    assert log["reward"] == pytest.approx(expected.mean().item(), abs=1e-5)
    assert log["reward_ink"] == pytest.approx(terms[:, 0].mean().item())
    assert log["share_ink"] + log["share_symmetry"] == pytest.approx(1)
    measured = WeightedSum(dict.fromkeys(BOTH, lambda x, c: x), BOTH)  # what evaluations and the monitor ask
    measured.base = held.base
    torch.testing.assert_close(
        measured.combine(dict(zip(BOTH, terms.unbind(1)))).double(), expected, rtol=1e-5, atol=1e-5
    )


def test_a_reward_whose_mad_is_0_is_refused_unless_it_does_not_count():
    base = torch.stack([torch.arange(30.0), torch.tensor([4.0] * 20 + [1.0] * 10)], 1)
    with pytest.raises(
        ConfigError, match=r"MAD of reward 'symmetry' on 30 samples of the base model is 0 \(median 4\)"
    ):
        begun(base, reward_normalize="calibrated")
    held = begun(base, reward_normalize="calibrated", reward={"ink": 1.0, "symmetry": 0.0})
    got, _ = scored(walks(base), held.spec, held)
    assert got.reward.isfinite().all()
    with pytest.raises(ConfigError, match="MAD of reward 'symmetry'"):
        begun(base, reward_normalize="calibrated", reward="ink", constraint=["symmetry >= 3"])


@pytest.mark.parametrize("normalize", ["none", "calibrated"])
@pytest.mark.parametrize("sense", [">=", "<="])
def test_the_known_multiplier_and_optimum_are_approached(normalize, sense):
    """Samples are N(m, 1): E[-(x - 2 s)^2] under s E[x] <= 1 is largest at m = s, where the multiplier is 2."""
    s = 1.0 if sense == "<=" else -1.0
    draw = torch.Generator().manual_seed(0)

    def terms(x):
        return torch.stack([-((x - 2 * s) ** 2), x], 1)

    base = torch.randn(512, generator=draw)
    held = begun(terms(base), reward="ink", constraint=[f"symmetry {sense} {s:g}"], reward_normalize=normalize)
    held.spec = spec(
        reward="ink", constraint=[f"symmetry {sense} {s:g}"], reward_normalize=normalize, constraint_rate=0.05
    )
    mean, means, multipliers = 0.0, [], []
    unit = held.base["symmetry"].spread / held.base["ink"].spread if normalize == "calibrated" else 1.0
    for step in range(600):
        noise = torch.randn(256, generator=draw)
        got, _ = scored(walks(terms(mean + torch.cat([noise, -noise]))), held.spec, held, step)
        gradient = ((got.reward - got.reward.mean()) * torch.cat([noise, -noise])).mean().item()  # of E[reward] by m
        log = held.ascend(got.terms, step)
        mean += 0.1 * gradient * (held.base["ink"].spread if normalize == "calibrated" else 1.0) / 2
        means.append(mean)
        multipliers.append(log["symmetry/multiplier"])
    assert sum(means[-200:]) / 200 == pytest.approx(s, abs=0.05)
    assert sum(multipliers[-200:]) / 200 == pytest.approx(2 * unit, rel=0.06)
    assert log["symmetry/bound"] == s


def test_a_constraint_that_does_not_bind_has_no_multiplier():
    base = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    held = begun(base, constraint=["symmetry >= -3"])
    for step in range(5):
        got, _ = scored(walks(base), held.spec, held, step)
        held.ascend(got.terms, step)
    torch.testing.assert_close(got.reward, walks(base).reward)
    assert held.multipliers == {4: (0.0,), 5: (0.0,)}


def test_base_is_the_mean_of_the_base_and_a_step_may_be_asked_for_again():
    base = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    held = begun(base, constraint=["symmetry >= base", "ink <= 3"])
    worse = base - 1
    log = held.ascend(worse, 0)
    assert log["symmetry/bound"] == pytest.approx(base[:, 1].mean().item())
    assert log["ink/bound"] == 3
    again = dict(held.multipliers)
    held.ascend(worse, 0)
    assert held.multipliers == again
    unit = held.base[SUM].std / held.base["symmetry"].std
    assert again[1][0] == pytest.approx(0.1 * unit / held.base["symmetry"].std)
    assert again[1][1] == 0
    saved = json.loads(json.dumps(held.state_dict(1)))
    other = Balance(held.spec)
    other.load(saved, 1)
    assert (other.base, other.multipliers) == (held.base, {1: again[1]})
    with pytest.raises(StateError, match="the calibration is of"):
        Balance(spec(reward="ink", constraint=["entropy >= base"])).load(saved, 1)
    saved["multipliers"]["ink <= 3"] = -1.0
    with pytest.raises(StateError, match="numbers >= 0"):
        other.load(saved, 1)


def test_both_ends_of_a_reward_have_names_of_their_own():
    held = begun(torch.randn(100, 2), constraint=["ink >= -1", "ink <= 1", "symmetry >= base"])
    ends = {name.split("/")[0] for name in held.ascend(torch.randn(20, 2), 0)}
    assert ends == {"ink_low", "ink_high", "symmetry"}


def test_a_reward_that_never_differs_gives_no_scale_for_a_multiplier():
    base = torch.stack([torch.zeros(30), torch.arange(30.0)], 1)
    with pytest.raises(ConfigError, match="the sum of the rewards is 0 for all 30 samples"):
        begun(base, reward="ink", constraint=["symmetry >= base"])
    begun(base, reward="ink", constraint=["symmetry >= base"], reward_normalize="group")
    with pytest.raises(ConfigError, match="reward 'ink' is 0 for all 30"):
        begun(base, constraint=["ink >= base"], reward_normalize="group")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ink", 'expected "REWARD >= base"'),
        ("ink > base", 'expected "REWARD >= base"'),
        ("ink == 2", 'expected "REWARD >= base"'),
        ("ink >= bases", "'bases' is no finite number"),
        ("ink >= inf", "'inf' is no finite number"),
        (">= 2", 'expected "REWARD >= base"'),
        ("1 <= ink <= 2", 'expected "REWARD >= base"'),
        ("symetry >= base", "did you mean 'symmetry'"),
        ("brightness >= base", "is in monitor.held_out"),
    ],
)
def test_what_is_no_constraint_is_refused(text, said):
    with pytest.raises(ConfigError, match=said):
        Finetune(reward="ink", constraint=[text], monitor=Finetune().monitor.__class__(held_out=("brightness",)))


def test_constraints_are_of_one_reward_and_sense_once_and_can_be_met():
    with pytest.raises(ConfigError, match="is given as well"):
        Finetune(reward="ink", constraint=["ink >= 1", "ink>=base"])
    with pytest.raises(ConfigError, match="no mean is both"):
        Finetune(reward="ink", constraint=["ink >= 1", "ink <= 0.5"])
    agent = AGENTS["draft"]()
    with pytest.raises(ConfigError, match="scores as it learns"):
        Finetune(reward="ink", constraint=["ink >= 1"], agent=agent)


def test_a_reward_is_named_as_it_is_or_by_its_short_name_and_numbers_are_kept():
    held = Finetune(reward={"mine.py:tidy": 1.0}, constraint=["tidy >= 0.12345678901", "entropy<=2"])
    assert held.constraints == (
        Constraint("mine.py:tidy", ">=", 0.12345678901),
        Constraint("entropy", "<=", 2.0),
    )
    assert held.reward == {"mine.py:tidy": 1.0, "entropy": 0.0}
    assert Finetune(reward=held.reward, constraint=held.constraint) == held


def test_a_reward_in_a_file_is_one_reward_wherever_it_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ink.py").write_text("def f(samples, prompts):\n    return samples.mean((1, 2, 3))\n")
    whole = f"{tmp_path.resolve() / 'ink.py'}:f"
    for reward in (whole, {whole: 1.0}):
        assert Finetune(reward=reward, constraint=["ink.py:f >= base"]).reward == {whole: 1.0}
    assert Finetune(reward="ink", constraint=["ink.py:f >= base"]).reward == {"ink": 1.0, whole: 0.0}


def test_what_constraints_cannot_reach_is_refused():
    with pytest.raises(ConfigError, match=r"constraint = 'ink >= 0.1': expected a list of texts"):
        Finetune(constraint="ink >= 0.1")
    with pytest.raises(ConfigError, match="last_step = pathwise takes the gradient of the rewards without"):
        Finetune(reward="ink", constraint=["ink >= 0.1"], agent=ddpo.Config(last_step="pathwise"))


def test_one_account_of_tokens_is_asked_for_where_several_would_spend():
    judge = {"vlm_judge": {"limits": {"most_tokens": 100}}}
    with pytest.raises(ConfigError, match="each run, and each of its restarts, would spend that"):
        Compare(rewards=["vlm_judge"], reward_options=judge, side_by_side=2)
    with pytest.raises(ConfigError, match="each worker and each rank would spend that"):
        Finetune(reward="vlm_judge", reward_options=judge, rollout=Rollout(workers=2))
    Finetune(reward="vlm_judge", reward_options={"vlm_judge": {"limits": "x"}}, rollout=Rollout(workers=2))


def test_the_guard_looks_at_the_reward_without_the_multipliers():
    """With multipliers what is learned from falls by more than the guard allows, while the reward rises."""

    class Learner:
        iteration = queries = 0
        seed, policy = 0, torch.nn.Identity()

        def update(self, batch):
            self.iteration += 1
            return {"reward": batch.reward.mean().item(), "grad_norm": 1.0, "loss": 0.0}

        def state_dict(self):
            return {}

    guarded, told = Guarded(Learner(), Guards(action="halt"), None), iter(range(9))
    guarded.plain = lambda: {"reward": float(next(told)), "reward_std": 1.0}
    for fall in (0.0, 50.0, 500.0):
        guarded.update(walks(torch.randn(9, 2) - fall))
    assert guarded.bad == 0


def test_base_samples_are_of_all_prompts_and_in_whole_groups():
    assert prompts_of(6, 3, 1).tolist() == [0, 1, 2, 0, 1, 2]
    assert prompts_of(3, 9, 1).tolist() == [0, 3, 6]
    assert prompts_of(7, 10, 3).tolist() == [0, 0, 0, 3, 3, 3, 6, 6, 6]


HOW = ("--reward", '{"ink": 1.0, "symmetry": 0.5}', "--reward_normalize", "calibrated", "--base_samples", 40)
HOW += ("--constraint", "[symmetry >= base, entropy <= 0.5]", "--constraint_rate", 0.5)


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def logged(folder, group: str) -> list[dict]:
    return [line for line in lines(folder) if any(name.startswith(f"{group}/") for name in line)]


@pytest.fixture(scope="module")
def whole(tiny_root):
    """A run of 6 updates in one go."""
    said = rlfusion(tiny_root.parent, "finetune", "--root", tiny_root, *TINY, *HOW, "--name", "balanced")
    assert said.code == 0, said.err
    return tiny_root / "balanced", said.err


def test_a_run_is_calibrated_constrained_and_logged(whole):
    folder, said = whole
    base = json.loads((folder / "calibration.json").read_text())
    assert set(base) == {"ink", "symmetry", "entropy", SUM}
    assert {held["count"] for held in base.values()} == {40}
    assert "of 40 samples of the base model: ink median" in said
    told = logged(folder, "constraint")
    assert len(told) == 6
    assert {line["constraint/symmetry/bound"] for line in told} == {base["symmetry"]["mean"]}
    assert told[0]["constraint/entropy/multiplier"] == 0
    now, after = told[:2]
    missed = (now["constraint/entropy/value"] - 0.5) / base["entropy"]["std"]
    assert missed > 0
    assert after["constraint/entropy/multiplier"] == pytest.approx(0.5 * missed)
    first = next(line for line in lines(folder) if "evaluation/reward" in line)
    expected = sum(
        weight * (first[f"evaluation/reward_{name}"] - base[name]["median"]) / (1.4826 * base[name]["mad"])
        for name, weight in BOTH.items()
    )
    assert first["evaluation/reward"] == pytest.approx(expected, rel=1e-4)
    assert math.isfinite(logged(folder, "train")[-1]["train/share_symmetry"])


def test_a_run_that_resumes_has_the_same_bits(whole, tiny_root):
    folder, _ = whole
    more = ("--root", tiny_root, *TINY, *HOW, "--name", "balanced-again")
    assert rlfusion(tiny_root.parent, "finetune", *more, "--updates", 3).code == 0
    again = tiny_root / "balanced-again"
    said = rlfusion(tiny_root.parent, "finetune", "--resume", again, "--change", "updates=6")
    assert said.code == 0, said.err
    assert lines(again)[-2:] == lines(folder)[-2:]
    for name in ("model/weights.safetensors", "calibration.json"):
        assert read_file(again / name) == read_file(folder / name)
    assert logged(again, "constraint") == logged(folder, "constraint")


@pytest.mark.alone
def test_workers_give_the_same_bits(whole, tiny_root):
    folder, _ = whole
    more = ("--root", tiny_root, *TINY, *HOW, "--name", "balanced-worker", "--rollout.workers", 1)
    said = rlfusion(tiny_root.parent, "finetune", *more)
    assert said.code == 0, said.err
    for name in ("model/weights.safetensors", "calibration.json"):
        assert read_file(tiny_root / "balanced-worker" / name) == read_file(folder / name)


def test_python_has_the_same(whole, tiny_root):
    import rlfusion as rlf

    told = {name.removeprefix("--"): value for name, value in zip(TINY[::2], TINY[1::2])}
    left_out = ("evaluation.samples", "checkpoint_every", "updates")
    settings = {name: value for name, value in told.items() if name not in left_out}
    settings |= {"reward_normalize": "calibrated", "base_samples": 40, "constraint_rate": 0.5, "root": str(tiny_root)}
    run = rlf.finetune(None, BOTH, updates=2, constraint=["symmetry >= base", "entropy <= 0.5"], **settings)
    for line, metrics in zip(logged(whole[0], "constraint"), run):
        told = {name: value for name, value in metrics.items() if name.startswith("constraint/")}
        assert {"step": line["step"], **told} == line
