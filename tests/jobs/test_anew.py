"""A change of settings and what of a checkpoint it leaves: the table, and real runs that go on under another reward."""

import re
from functools import cache

import pytest
from tiny_runs import TINY

from rlfusion.agents import AGENTS
from rlfusion.cli.arguments import settings_of
from rlfusion.cli.main import main
from rlfusion.common.errors import ConfigError
from rlfusion.config import Finetune
from rlfusion.jobs.finetune import anew
from rlfusion.training import checkpoint
from rlfusion.training.deciding import flat
from rlfusion.training.identity import Record

LEARNED = list(anew.LEARNED)
GUARD = ["rewards", "norms"]


def settings(**more) -> dict:
    return flat(Finetune(**{"reward": "ink"} | more))


@cache
def names_of_settings() -> frozenset[str]:
    """Of every agent, and one of a reward's options."""
    names = {name for agent in AGENTS for name in flat(settings_of("finetune", ["--agent", agent]))}
    return frozenset(names | {"reward_options.ink.threshold"})


@pytest.mark.parametrize("pattern", [pattern for pattern, _ in anew.ROWS])
def test_every_row_is_of_settings_that_there_are(pattern):
    assert any(re.fullmatch(pattern, name) for name in names_of_settings())


def test_settings_of_the_same_loss_are_those_of_agents():
    names = {name for agent in AGENTS for name in vars(AGENTS[agent]())}
    for name in re.sub(r"\(.*?\)|\.\*", "", anew.SAME_LOSS).split("|"):
        assert any(one.startswith(name) for one in names), name


@pytest.mark.parametrize(
    ("changed", "kinds"),
    [
        ("reward", anew.ALL),
        ("reward.ink", anew.ALL),
        ("reward_options.ink.threshold", anew.ALL),
        ("reward_options.symmetry.axis", ["best"]),
        ("reward_normalize", anew.ALL),
        ("chain.steps", anew.ALL),
        ("chain.kernel", anew.ALL),
        ("pipeline.prompts_sha256", anew.ALL),
        ("pretrain.data", anew.ALL),
        ("rollout.samples_per_prompt", ["advantages"]),
        ("rollout.prompts", ["advantages"]),
        ("agent.kl_reward", ["advantages", "norms"]),
        ("agent.advantage", ["advantages", "critic", "norms"]),
        ("agent.value_net", ["critic", "norms"]),
        ("agent.clip", ["norms"]),
        ("agent.lr", []),
        ("agent.pace", ["pace"]),
        ("agent.critic_lr", []),
        ("agent.memory", []),
        ("monitor.best", ["best"]),
        ("seed", ["best"]),
        ("evaluation.samples", []),
        ("rollout.lag", []),
        ("checkpoint_every", []),
    ],
)
def test_what_a_change_leaves_behind(changed, kinds):
    assert list(anew.stale([changed], settings(), ["ink"])) == list(kinds)


def test_a_file_of_ones_own_stands_for_what_names_it():
    held = settings(reward="mine.py:bright") | {"files.mine.py": "0" * 64}
    assert anew.stale(["files.mine.py"], held, ["mine.py:bright"]) == anew.ALL
    watched = settings() | {"monitor.held_out": ["mine.py:bright"], "files.mine.py": "0" * 64}
    assert anew.stale(["files.mine.py"], watched, ["ink"]) == ("best",)


def test_what_agents_keep_is_of_known_kinds_and_in_their_state():
    assert {name: list(anew.kept(AGENTS[name]())) for name in AGENTS if anew.kept(AGENTS[name]())} == {
        "ddpo": ["running", "pace"],
        "grpo": ["pace"],
        "ppo": ["critic", "pace"],
        "drwr": ["memory"],
        "dawr": ["critic"],
        "qsm": ["critic", "first"],
    }

    class Wrong(AGENTS["grpo"]):
        KEPT = {"buffer": "walk"}  # noqa: RUF012

    with pytest.raises(ConfigError, match=r"'buffer'.*unknown|unknown kind.*'walk'.*did you mean 'walks'"):
        anew.kept(Wrong())


def state(**learner) -> dict:
    guard = {"norms": [1.0], "first_std": 2.0, "best": 3.0, "bad": 4, "bad_in_a_row": 1, "good": [{}]}
    return {"learner": {"learner": {"w": 1, **learner}, "guard": guard}, "watch": {"best": {"step": 4}}}


def fresh(**learner) -> dict:
    guard = {"norms": [], "first_std": 0.0, "best": 0.0, "bad": 0, "bad_in_a_row": 0, "good": []}
    return {"learner": {"learner": {"w": 0, **learner}, "guard": guard}, "watch": {"best": {"step": -1}}}


def test_what_begins_anew_and_what_goes_on():
    held = state(memory="old", other="old")
    begun = anew.begin_anew(held, fresh(memory="new", other="new"), {"memory": "walks"}, anew.ALL)
    assert begun == ["walks", "rewards", "norms", "best"]
    expected = fresh(memory="new", other="old")
    expected["learner"]["learner"]["w"] = 1
    expected["learner"]["guard"]["bad"] = 4
    assert held == expected


@pytest.mark.parametrize(("before", "after"), [({"pace": {"share": 0.5}}, {}), ({}, {"pace": {"share": 0.0625}})])
def test_a_state_that_settings_bring_or_take_away(before, after):
    held = state(**before)
    anew.begin_anew(held, fresh(**after), {"pace": "pace"}, ["pace"])
    assert held["learner"]["learner"] == {"w": 1, **after}


def test_what_is_not_stale_stays():
    held = state(memory="old")
    assert anew.begin_anew(held, fresh(memory="new"), {"memory": "walks"}, ["norms"]) == ["norms"]
    assert held["learner"]["learner"]["memory"] == "old"
    assert held["learner"]["guard"] == state()["learner"]["guard"] | {"norms": []}


@pytest.mark.parametrize(("ours", "theirs"), [({"critic": 1}, {}), ({}, {"critic": 2})])
def test_an_entry_may_come_or_go(ours, theirs):
    held = state(**ours)
    assert anew.begin_anew(held, fresh(**theirs), {"critic": "critic"}, ["critic"]) == ["critic"]
    assert held["learner"]["learner"] == {"w": 1, **theirs}


RUN = (*TINY, "--updates", 2, "--checkpoint_every", 3, "--reward", "ink", "--evaluation.deterministic", "false")
RUN += ("--monitor.every", 1, "--monitor.samples", 50, "--rollout.lag", 1)
WALKS = 24


@pytest.fixture(scope="module")
def done(tiny_root, tmp_path_factory):
    """A function that gives the folder of a run with 2 updates of an agent."""

    def make(*more: object):
        root = tmp_path_factory.mktemp("anew")
        (root / "cache").symlink_to(tiny_root / "cache")
        assert main(["finetune", *map(str, (*RUN, *more)), "--root", str(root), "--name", "it"]) == 0
        return root / "it"

    return make


def resumed(folder, *changes: str) -> dict:
    """The state after ``changes``, each at its own."""
    words = [word for change in changes for word in ("--change", change)]
    assert main(["finetune", "--resume", str(folder), *words]) == 0
    return checkpoint.load(checkpoint.latest(folder / "checkpoints", _owner(folder)).path)


def _owner(folder) -> checkpoint.Owner:
    record = Record.read(folder)
    return checkpoint.Owner(record.run, record.digests)


def test_another_reward_begins_anew_what_was_made_of_the_old_one(done, capsys):
    folder = done("--agent.advantage", "prompt")
    before = checkpoint.load(folder / "checkpoints" / "step-00000002")
    assert sum(map(len, before["learner"]["learner"]["running"]["history"].values())) == 2 * WALKS
    after = resumed(folder, "reward=symmetry", "updates=3")
    said = " ".join(capsys.readouterr().err.split())
    assert "reward changed: the recent rewards of each prompt, the guard's best reward" in said
    history = after["learner"]["learner"]["running"]["history"]
    assert sum(map(len, history.values())) == WALKS
    assert len(after["learner"]["guard"]["norms"]) == 1
    assert after["learner"]["guard"]["best"] == pytest.approx(sum(h.sum().item() for h in history.values()) / WALKS)
    assert after["watch"]["best"]["step"] == 3
    assert (folder / "best").is_dir()
    assert (folder / "best.before").is_dir()
    assert "changed:" not in (resumed(folder, "updates=4") and capsys.readouterr().err)


def test_walks_of_other_steps_are_not_mixed_with_the_new_ones(done):
    folder = done("--agent", "drwr", "--agent.on", "chain", "--agent.memory", 100)
    after = resumed(folder, "chain.steps=3", "updates=3")
    assert tuple(after["learner"]["learner"]["memory"]["x"].shape[:2]) == (WALKS, 4)


def test_rollouts_further_ahead_need_no_weights_that_were_not_kept(done, capsys):
    folder = done("--agent.advantage", "group")
    again = resumed(folder, "rollout.lag=2", "updates=4")
    assert again["learner"]["learner"]["iteration"] == 4
    capsys.readouterr()
    assert main(["finetune", "--resume", str(folder), "--change", "budget_queries=50"]) == 2
    assert "budget_queries = 50: after 4 updates the run has asked for 96 rewards already" in capsys.readouterr().err
