"""Guards: each is tripped, by a scripted learner and by a real run, and what it undoes is undone bit for bit."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from chains import class_walks, mlp
from counted import counting
from processes import rlfusion
from safetensors.torch import load_file
from tiny_runs import TINY

from rlfusion.agents.ddpo import Config as DDPO
from rlfusion.agents.ddpo import Learner
from rlfusion.common.errors import ConfigError, NumericalError
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.schedule import Cosine
from rlfusion.rl.guard import DEPTH, Config, Guarded

GOOD = {"reward": 1.0, "reward_std": 0.5, "grad_norm": 1.0, "log_ratio_max": 1.0}


class Scripted:
    """A learner whose only weight counts its updates, and whose metrics are given."""

    def __init__(self, *script: dict | Exception) -> None:
        self.script, self.weight, self.iteration, self.queries = list(script), 0, 0, 0
        self.policy, self.seed = torch.nn.Identity(), 0

    def update(self, batch):
        told = self.script.pop(0)
        if isinstance(told, Exception):
            raise told
        self.weight += 1
        self.iteration += 1
        self.queries += 4
        return GOOD | told

    def state_dict(self):
        return {"weight": self.weight, "iteration": self.iteration, "queries": self.queries}

    def load_state_dict(self, state):
        vars(self).update(state)


class Walks:
    """A batch as far as the guards look at it."""

    reward = torch.tensor([1.0, math.nan, 3.0])
    x = torch.zeros(4, 2, 1, 8, 8)

    def __len__(self) -> int:
        return 4


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (None, "it returns None, expected numbers by name"),
        ({"reward": 1.0}, "grad_norm is missing"),
        ({"grad_norm": 1.0}, "reward is missing"),
        ({"reward": torch.tensor(1.0), "grad_norm": 1.0}, "reward is a Tensor, expected a float"),
    ],
)
def test_what_a_strangers_update_returns_is_named_where_it_is_no_metrics(told, said, tmp_path):
    learner = Scripted()
    learner.update = lambda batch: told
    with pytest.raises(ConfigError, match=said):
        Guarded(learner, Config(), tmp_path).update(Walks())


@pytest.mark.parametrize(("side", "skipped"), [(8, 1.0), (40, 0.0)])
def test_a_large_latent_may_have_a_nat_a_dimension(side, skipped, tmp_path):
    batch = Walks()
    batch.x = torch.zeros(4, 2, 1, side, side)
    guarded = Guarded(Scripted({"log_ratio_max": 1500.0}), Config(), tmp_path)
    assert guarded.update(batch)["skipped"] == skipped


def test_an_undone_update_says_what_to_change(tmp_path, caplog):
    for folder in (tmp_path, None):
        guarded = Guarded(Scripted({"log_ratio_max": 5000.0}, {}), Config(), folder)
        guarded.update(Walks())
        assert guarded.told == (
            "rollout 1: max |log ratio| = 5e+03 nats; its update was undone; what helps: a smaller agent.pace or "
            "learning rate; fewer updates a rollout (epochs, updates_per_epoch)"
        )
        assert (guarded.told in caplog.text) == (folder is None)
        guarded.update(Walks())
        assert guarded.told == ""


def test_the_fall_of_the_reward_is_seen_though_the_learner_tells_no_spread(tmp_path):
    told = [{"reward": reward, "grad_norm": 1} for reward in (5.0, -90.0)]
    learner, batch = Scripted(), Walks()
    batch.reward = torch.tensor([4.0, 6.0])
    learner.update = lambda _: told.pop(0)
    guarded = Guarded(learner, Config(), tmp_path)
    assert [guarded.update(batch)["skipped"] for _ in range(2)] == [0.0, 1.0]
    assert guarded.first_std == 1.0
    guarded.load_state_dict(guarded.state_dict())  # a norm that was given as an integer is saved as a number


def run(tmp_path, script, **settings) -> tuple[Scripted, Guarded]:
    learner = Scripted(*script)
    guarded = Guarded(learner, Config(**settings), tmp_path)
    while learner.script:
        guarded.update(Walks())
    return learner, guarded


BAD = {
    "finite": NumericalError("the gradient is not finite"),
    "grad_norm": {"grad_norm": 31.0},
    "log_ratio": {"log_ratio_max": 1001.0},
    "reward": {"reward": -1.5},
}


@pytest.mark.parametrize("guard", BAD)
def test_a_bad_update_is_undone_and_the_run_goes_on(guard, tmp_path):
    learner, guarded = run(tmp_path, [*[{}] * 4, BAD[guard], {}])
    assert learner.weight == 5
    assert (learner.iteration, learner.queries) == (6, 24)
    assert (guarded.bad, guarded.bad_in_a_row) == (1, 0)
    written = (tmp_path / "diagnosis.md").read_text()
    assert f"Rollout 5: {guard}" in written
    assert "undone" in written


@pytest.mark.parametrize("nearly", [{"grad_norm": 29.0}, {"log_ratio_max": 999.0}, {"reward": -0.9}])
def test_what_is_within_the_limits_passes(nearly, tmp_path):
    learner, guarded = run(tmp_path, [*[{}] * 4, nearly])
    assert (learner.weight, guarded.bad) == (5, 0)
    assert not (tmp_path / "diagnosis.md").exists()


def test_the_gradient_norm_needs_a_history(tmp_path):
    assert run(tmp_path, [{}, {}, {}, {"grad_norm": 1e6}])[1].bad == 0


def test_the_gradient_norm_is_held_against_the_median(tmp_path):
    """One large norm among the good ones does not make room for another."""
    assert run(tmp_path, [*[{}] * 4, {"grad_norm": 20.0}, {"grad_norm": 31.0}])[1].bad == 1


def test_the_fall_is_from_the_best_rollout_in_deviations_of_the_first(tmp_path):
    assert run(tmp_path, [{}, {"reward": 9.0, "reward_std": 99.0}, {"reward": 6.9}])[1].bad == 1
    assert run(tmp_path, [{}, {"reward": 9.0}, {"reward": 7.1}])[1].bad == 0


def test_a_rollback_returns_to_the_oldest_weights_that_are_kept(tmp_path):
    learner, _ = run(tmp_path, [*[{}] * 6, BAD["log_ratio"]], action="rollback")
    assert learner.weight == 6 - (DEPTH - 1)
    assert learner.iteration == 7


def test_warn_leaves_the_update_as_it_is(tmp_path):
    learner, guarded = run(tmp_path, [{}, BAD["log_ratio"], {}], action="warn")
    assert (learner.weight, guarded.bad) == (3, 1)
    assert "nothing was done" in (tmp_path / "diagnosis.md").read_text()


def test_halt_ends_the_run_with_the_last_good_weights(tmp_path):
    learner = Scripted({}, BAD["log_ratio"], {})
    guarded = Guarded(learner, Config(action="halt"), tmp_path)
    guarded.update(Walks())
    with pytest.raises(NumericalError, match=r"rollout 2: max \|log ratio\| = 1e\+03 nats; the run ends.*diagnosis.md"):
        guarded.update(Walks())
    assert learner.weight == 1


def test_bad_updates_in_a_row_end_the_run(tmp_path):
    with pytest.raises(NumericalError, match="rollout 4"):
        run(tmp_path, [{}, BAD["log_ratio"], {}, BAD["log_ratio"], BAD["finite"]][2:] + [BAD["finite"]] * 2, patience=3)
    run(tmp_path, [{}, BAD["log_ratio"], BAD["log_ratio"], {}, BAD["log_ratio"], BAD["log_ratio"]], patience=3)


def test_a_real_update_is_undone_bit_for_bit(tmp_path):
    policy = mlp()
    learner = Learner(policy, TimeGrid(4).times(Cosine()), DDPO(lr=1e-2))
    guarded = Guarded(learner, Config(log_ratio=1e-6), tmp_path)
    before = {name: p.clone() for name, p in policy.named_parameters()}
    state = copy.deepcopy(learner.optimization.optimizer.state_dict())
    metrics = guarded.update(class_walks(policy))
    assert metrics["skipped"] == 1
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in learner.optimization.ema.shadow.items())
    assert learner.optimization.optimizer.state_dict() == state
    assert state["state"] == {}
    assert learner.iteration == 1


def tensors(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [tensor for item in inner for tensor in tensors(item)]


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_bad_updates_between_good_ones_are_undone_bit_for_bit(action, tmp_path):
    """The copies are in memory that is kept: what an undone update gives back is not written over by the next copy."""
    policy = mlp()
    learner = Learner(policy, TimeGrid(4).times(Cosine()), DDPO(lr=1e-2))
    guarded, walks, good = Guarded(learner, Config(action=action), tmp_path), class_walks(policy), []
    for number in range(10):
        before = copy.deepcopy(learner.state_dict())
        bad = number in (2, 5, 6, 9)
        guarded.config = Config(action=action, log_ratio=1e-9 if bad else 1e9)
        guarded.update(replace(walks, version=learner.iteration))
        good = good if bad else [*good, copy.deepcopy(learner.state_dict())][-DEPTH:]
        expected = (good[0] if action == "rollback" else before) if bad else learner.state_dict()
        assert guarded.bad == sum(n <= number for n in (2, 5, 6, 9))
        for found, wanted in zip(tensors(learner.state_dict()), tensors(expected), strict=True):
            assert torch.equal(found, wanted)


def test_the_copy_that_undoes_an_update_takes_no_new_memory():
    policy = mlp()
    learner = Learner(policy, TimeGrid(4).times(Cosine()), DDPO(lr=1e-3))
    guarded, walks = Guarded(learner, Config(log_ratio=1e9), None), class_walks(policy)
    for _ in range(2):
        guarded.update(replace(walks, version=learner.iteration))
    places = {t.data_ptr() for t in tensors(guarded._before())}
    with counting() as ops:
        held = guarded._before()
    assert {t.data_ptr() for t in tensors(held)} == places
    assert set(ops) - {"aten.detach"} == {"aten._foreach_copy_"}


def test_the_state_goes_through_a_checkpoint(tmp_path):
    script = [{}, {"grad_norm": 2.0}, BAD["log_ratio"], {}]
    learner, guarded = run(tmp_path, script, action="rollback")
    other = Guarded(Scripted(), Config(action="rollback"), tmp_path)
    other.load_state_dict(guarded.state_dict())
    assert other.state_dict() == guarded.state_dict()
    assert other.learner.weight == learner.weight


@pytest.mark.parametrize(("name", "value"), [("grad_norm", 0), ("patience", 0), ("log_ratio", math.nan)])
def test_settings_that_cannot_work_are_refused(name, value):
    with pytest.raises(ConfigError, match=name):
        Config(**{name: value})


REWARDS = """
import torch

def collapses(samples, cond, calls=[]):
    calls.append(0)
    return samples.flatten(1).mean(1) - (100.0 if 12 < len(calls) < 16 else 0.0)
"""


def test_a_run_whose_reward_crashes_skips_and_says_so(tiny_root, tmp_path):
    """Calls 1-6 are evaluations, looks and the preflight; each rollout makes 3."""
    (tmp_path / "mine.py").write_text(REWARDS)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "cache").symlink_to(tiny_root / "cache")
    said = rlfusion(tmp_path, "finetune", *TINY, "--reward", "mine:collapses", "--name", "it", "--monitor.every", 0)
    assert said.code == 0, said.err
    folder = tmp_path / "runs" / "it"
    assert "below its best" in (folder / "diagnosis.md").read_text()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    skipped = [line["train/skipped"] for line in lines if "train/skipped" in line]
    assert skipped[-1] >= 1
    assert load_file(folder / "model" / "weights.safetensors")


def test_a_run_that_is_told_to_halt_ends_with_code_4(tiny_root, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "cache").symlink_to(tiny_root / "cache")
    said = rlfusion(tmp_path, "finetune", *TINY, "--guard.action", "halt", "--guard.log_ratio", 1e-9, "--name", "it")
    assert said.code == 4
    assert "diagnosis.md" in said.err
    assert "log_ratio" in (tmp_path / "runs" / "it" / "diagnosis.md").read_text()
