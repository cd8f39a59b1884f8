"""A run's identity: what decides it, what may change, what is refused, and what a lost record costs."""

import shutil
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from rlfusion.agents import grpo
from rlfusion.cli.main import main
from rlfusion.common.errors import ConfigError
from rlfusion.config import Distill, Finetune, Pretrain, to_yaml
from rlfusion.jobs import resuming
from rlfusion.training import checkpoint, identity
from rlfusion.training.checkpoint import CheckpointError
from rlfusion.training.deciding import added, decisive, digest, flat, usual
from rlfusion.training.identity import DiffersError, Record, enter


@dataclass(frozen=True)
class Inner:
    lr: float = 0.1
    workers: int = 0


@dataclass(frozen=True)
class Settings:
    seed: int = 0
    root: str = "runs"
    name: str = "it"
    updates: int = 6
    threads: int = 1
    agent: Inner = field(default_factory=Inner)


def state(value: float) -> dict:
    return {"w": torch.full((3,), value)}


def test_a_setting_decides_bits_unless_it_is_known_not_to():
    names = flat(Finetune())
    free = names.keys() - decisive(names).keys()
    ray = {name for name in names if name.startswith("ray.")}
    rest = {"root", "name", "device", "threads", "updates", "budget_queries", "rollout.workers", "checkpoint_every"}
    rest |= {"rollout.overlap"}
    ranks = {f"learner.{name}" for name in ("ranks", "cpus_per_rank", "gpus_per_rank", "resources_per_rank")}
    ranks |= {"learner.shard", "learner.restarts", "learner.timeout_s"}
    kept = {f"checkpoints.{name}" for name in ("last", "every", "best", "lowest", "background")}
    followed = {"track", "track_failures"}
    assert free == ray | rest | ranks | kept | followed | {"pretrain.checkpoint_every"}
    assert flat(Distill()).keys() - decisive(flat(Distill())).keys() >= {"workers", "checkpoint_every", "root"}
    assert "train.steps" in decisive(flat(Pretrain()))  # the learning rate falls along a cosine over all of them
    assert digest(flat(Finetune())) != digest(flat(Finetune(seed=1)))
    assert digest(flat(Finetune())) == digest(flat(Finetune(updates=99, root="elsewhere", threads=2)))


def test_with_rollouts_ahead_the_checkpoints_decide_bits_too():
    ahead = {"rollout.lag": 1, "checkpoint_every": 4}
    assert digest(ahead) != digest(ahead | {"checkpoint_every": 8})
    assert digest(ahead | {"rollout.lag": 0}) == digest({"rollout.lag": 0, "checkpoint_every": 8})


def test_a_base_of_the_cache_is_known_by_its_name_wherever_the_cache_lies():
    at = [flat(Finetune(base=f"{root}/cache/base-{'0a' * 8}/model")) for root in ("runs", "/else/where")]
    assert digest(at[0]) == digest(at[1]) != digest(flat(Finetune(base="runs/mine/model")))


def test_a_run_is_known_again_wherever_its_folder_is_moved(tmp_path):
    run = enter(tmp_path / "it", "finetune", Settings()) if (tmp_path / "it").mkdir() is None else None
    run.save(2, state(2.0))
    shutil.copytree(tmp_path / "it", tmp_path / "moved")
    again = enter(tmp_path / "moved", "finetune", Settings(root=str(tmp_path), name="moved"))
    assert again.owner == run.owner
    assert again.notes == ()
    assert again.newest(6).step == 2


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (Settings(seed=1), "seed = 1, was 0"),
        (Settings(agent=Inner(lr=0.2)), "agent.lr = 0.2, was 0.1"),
    ],
)
def test_a_setting_that_decides_bits_is_refused_by_name_with_both_values(tmp_path, now, said):
    enter(tmp_path, "finetune", Settings())
    with pytest.raises(DiffersError, match=said) as caught:
        enter(tmp_path, "finetune", now)
    assert "--change" in str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_what_decides_no_bits_goes_on_and_is_told(tmp_path):
    enter(tmp_path, "finetune", Settings())
    run = enter(tmp_path, "finetune", Settings(updates=9, threads=2))
    assert run.notes == ("updates was 6, is 9", "threads was 1, is 2")
    assert enter(tmp_path, "finetune", Settings(updates=9, threads=2)).notes == ()


def test_a_longer_run_is_not_finished_any_more(tmp_path):
    run = enter(tmp_path, "finetune", Settings())
    run.seal("summary.json", {"a": 1.5})
    assert enter(tmp_path, "finetune", Settings(threads=2)).result("summary.json") == {"a": 1.5}
    assert enter(tmp_path, "finetune", Settings(updates=9)).result("summary.json") is None


@pytest.mark.parametrize("text", ['{"a": 2.5}', '{"a": ', "", "[]"])
def test_a_result_that_is_not_what_was_written_is_none(tmp_path, text):
    run = enter(tmp_path, "finetune", Settings())
    run.seal("summary.json", {"a": 1.5})
    (tmp_path / "summary.json").write_text(text)
    assert run.result("summary.json") is None


def test_a_run_of_another_command_is_refused(tmp_path):
    enter(tmp_path, "pretrain", Settings())
    with pytest.raises(ConfigError, match="rlfusion pretrain --resume"):
        enter(tmp_path, "finetune", Settings())


def test_fewer_updates_than_are_done_are_refused(tmp_path):
    run = enter(tmp_path, "finetune", Settings())
    run.save(4, state(1.0))
    with pytest.raises(ConfigError, match="has done 4 updates"):
        run.newest(2)


@pytest.mark.parametrize("how", ["emptied", "removed", "damaged"])
def test_a_run_whose_checkpoints_vanished_does_not_start_over(tmp_path, how):
    run = enter(tmp_path, "finetune", Settings())
    run.save(4, state(1.0))
    if how == "damaged":
        (run.checkpoints / "step-00000004" / "state.json").write_text("{")
    else:
        shutil.rmtree(run.checkpoints)
    if how == "emptied":
        run.checkpoints.mkdir()
    with pytest.raises(CheckpointError, match="has lost its checkpoints") as caught:
        enter(tmp_path, "finetune", Settings()).newest(6)
    assert ("step-00000004.corrupt" in str(caught.value)) == (how == "damaged")


def test_a_run_killed_before_its_first_checkpoint_starts(tmp_path):
    enter(tmp_path, "finetune", Settings())
    (tmp_path / "checkpoints").mkdir()
    assert enter(tmp_path, "finetune", Settings()).newest(6) is None


def test_a_checkpoint_of_another_run_is_set_aside_by_name(tmp_path):
    for name in ("mine", "other"):
        (tmp_path / name).mkdir()
        enter(tmp_path / name, "finetune", Settings()).save(2 if name == "mine" else 5, state(1.0))
    shutil.copytree(tmp_path / "other/checkpoints/step-00000005", tmp_path / "mine/checkpoints/step-00000005")
    found = enter(tmp_path / "mine", "finetune", Settings()).newest(6)
    assert found.step == 2
    assert "belongs to another run" in found.warnings[0]
    assert (tmp_path / "mine/checkpoints/step-00000005.foreign").is_dir()


def test_a_checkpoint_under_another_name_is_damaged(tmp_path):
    run = enter(tmp_path, "finetune", Settings(updates=99))
    run.save(2, state(1.0))
    run.save(4, state(2.0))
    (run.checkpoints / "step-00000004").rename(run.checkpoints / "step-00000099")
    found = run.newest(99)
    assert found.step == 2
    assert "is of step 4" in found.warnings[0]


@pytest.mark.parametrize("how", ["missing", "cut", "flipped"])
def test_a_lost_record_is_made_again_from_a_checkpoint_of_the_same_settings(tmp_path, how):
    run = enter(tmp_path, "finetune", Settings())
    run.save(4, state(1.0))
    file = tmp_path / identity.FILE
    text = file.read_text()
    file.write_text({"missing": "", "cut": text[:50], "flipped": text.replace('"seed": 0', '"seed": 1')}[how])
    if how == "missing":
        file.unlink()
    again = enter(tmp_path, "finetune", Settings())
    assert again.owner == run.owner
    assert again.newest(6).step == 4
    file.unlink()
    with pytest.raises(ConfigError, match=r"run.json.*is missing"):
        enter(tmp_path, "finetune", Settings(seed=1))


def read(arguments: list[str]) -> Settings:
    """What ``arguments.settings_of`` does, of ``Settings``."""
    from rlfusion.cli.arguments import parse

    return parse(Settings, "finetune", arguments)


@pytest.fixture
def begun(tmp_path):
    """A folder of a run that has saved a checkpoint of step 4."""
    (tmp_path / "config.yaml").write_text(to_yaml(Settings()))
    enter(tmp_path, "finetune", Settings()).save(4, state(1.0))
    return tmp_path


def edit(folder, **changes) -> None:
    (folder / "config.yaml").write_text(to_yaml(replace(Settings(), **changes)))


def test_an_edited_config_is_refused_unless_the_change_is_meant(begun):
    edit(begun, seed=3)
    with pytest.raises(DiffersError, match=r"seed = 3, was 0.*--change seed=3"):
        resuming.settings_of_run("finetune", begun, {}, read)
    with pytest.raises(DiffersError, match="seed = 3"):
        resuming.settings_of_run("finetune", begun, {"agent.lr": "0.2"}, read)
    assert resuming.settings_of_run("finetune", begun, {"seed": "3"}, read).seed == 3


def test_a_change_is_recorded_and_need_not_be_said_again(begun):
    changed = resuming.settings_of_run("finetune", begun, {"agent.lr": "0.5", "updates": "8"}, read)
    assert (changed.agent.lr, changed.updates) == (0.5, 8)
    assert resuming.settings_of_run("finetune", begun, {}, read) == changed
    record = Record.read(begun)
    assert record.changes == ({"after": 4, "settings": {"updates": [6, 8], "agent.lr": [0.1, 0.5]}},)
    found = enter(begun, "finetune", changed).newest(8)
    assert found.step == 4  # saved under settings that the run had
    assert found.settings == record.digests[0] != record.digests[-1]


def test_a_lost_config_is_written_again(begun):
    (begun / "config.yaml").unlink()
    assert resuming.settings_of_run("finetune", begun, {}, read) == Settings()
    assert read(["--config", str(begun / "config.yaml")]) == Settings()


def test_a_version_with_more_settings_goes_on_with_old_runs(begun):
    record = Record.read(begun)
    older = {name: value for name, value in record.settings.items() if name != "agent.workers"}
    replace(record, settings=older, digests=(digest(older),)).write(begun)
    assert resuming.settings_of_run("finetune", begun, {}, read) == Settings()
    assert enter(begun, "finetune", Settings()).owner.digests == (digest(older), digest(flat(Settings())))


def older(record: Record, *names: str) -> Record:
    """The record as a version without these settings has written it."""
    held = {name: value for name, value in record.settings.items() if name not in names}
    return replace(record, settings=held, digests=(digest(held),))


def saved_by_older(folder, *names: str) -> None:
    """Let the run in ``folder`` be one that such a version has begun and saved."""
    record = older(Record.read(folder), *names)
    record.write(folder)
    shutil.rmtree(folder / "checkpoints")
    identity.Run(folder, record).save(4, state(1.0))


def test_settings_that_a_version_adds_make_no_other_run_where_they_have_their_defaults(begun):
    saved_by_older(begun, "agent.lr", "agent.workers", "threads")
    with pytest.raises(DiffersError, match=r"agent.lr = 0.2, was absent"):
        enter(begun, "finetune", Settings(agent=Inner(lr=0.2)))
    run = enter(begun, "finetune", Settings())
    assert run.notes == ()
    assert run.record.settings == flat(Settings())
    found = run.newest(6)
    assert found.step == 4  # saved before
    assert run.record.since(found) == {}
    assert enter(begun, "finetune", Settings()).record == run.record == Record.read(begun)


def test_what_is_changed_later_is_told_beside_what_a_version_added(begun):
    saved_by_older(begun, "agent.lr")
    assert resuming.settings_of_run("finetune", begun, {"seed": "5"}, read).seed == 5
    assert Record.read(begun).changes[-1]["added"] == ["agent.lr"]
    run = enter(begun, "finetune", Settings(seed=5))
    assert run.record.since(run.newest(6)) == {"seed": (0, 5)}
    run.save(5, state(5.0))
    resuming.settings_of_run("finetune", begun, {"agent.lr": "0.7"}, read)
    run = enter(begun, "finetune", Settings(seed=5, agent=Inner(lr=0.7)))
    assert run.record.since(run.newest(6)) == {"agent.lr": (0.1, 0.7)}
    assert run.record.changed_after("seed") == run.record.changed_after("agent.lr") - 1 == 4


def test_a_finished_run_of_an_older_version_is_finished(tmp_path):
    run = enter(tmp_path, "finetune", Settings())
    run.seal("summary.json", {"reward": 1.0})
    older(run.record, "agent.lr", "agent.workers").write(tmp_path)
    assert identity.made(tmp_path, Settings(), "summary.json")
    assert not identity.made(tmp_path, Settings(agent=Inner(lr=0.2)), "summary.json")
    assert not identity.made(tmp_path, Settings(seed=1), "summary.json")
    assert enter(tmp_path, "finetune", Settings()).result("summary.json") == {"reward": 1.0}
    older(run.record, "agent.lr").write(tmp_path)
    (tmp_path / "config.yaml").write_text(to_yaml(Settings()))
    resuming.settings_of_run("finetune", tmp_path, {}, read)
    assert Record.read(tmp_path).sealed


def test_defaults_are_those_of_the_agent_that_is_there():
    told = Finetune(agent=grpo.Config(window=3), seed=4)
    known = usual(told)
    assert known.keys() == {name for name in flat(told) if not name.startswith("files.")}
    assert known["agent.window"] == grpo.Config().window != 3
    assert known["seed"] == 0
    assert known["pretrain.train.label_noise"] == 0.6  # not its class's, but the command's
    assert added({}, told) == {name: value for name, value in known.items() if flat(told)[name] == value}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--resume it --seed 1", "--seed"),
        ("--resume it --change seed", "--change"),
        ("--resume it --change =3", "--change"),
        ("--resume it --change root=x", "--change root"),
        ("--resume it --change config=x", "--change config"),
        ("--resume it --resume it", "2 folders"),
        ("--change seed=3", "0 folders"),
        ("--resume", "--resume"),
    ],
)
def test_what_resume_takes(words, said):
    with pytest.raises(ConfigError, match=r"^--") as caught:
        resuming.asked(words.split())
    assert said in str(caught.value)


def test_resume_and_changes_in_any_order():
    assert resuming.asked(["--change=a.b=x=y", "--resume=it"])[1] == {"a.b": "x=y"}


def test_a_change_that_cannot_be_is_not_recorded(begun):
    before = (begun / "config.yaml").read_text(), Record.read(begun)
    with pytest.raises(ConfigError, match="done 4 updates already, and its settings say 2"):
        resuming.settings_of_run("finetune", begun, {"updates": "2"}, read)
    with pytest.raises(ConfigError, match="speed"):
        resuming.settings_of_run("finetune", begun, {"speed": "2"}, read)
    assert ((begun / "config.yaml").read_text(), Record.read(begun)) == before


def test_a_run_without_its_record_takes_no_change(begun):
    (begun / identity.FILE).unlink()
    with pytest.raises(ConfigError, match="is lost"):
        resuming.settings_of_run("finetune", begun, {"seed": "1"}, read)


def test_nobodys_checkpoints_are_no_runs(tmp_path):
    run = enter(tmp_path, "finetune", Settings())
    checkpoint.save(run.checkpoints, 3, state(1.0))
    assert run.newest(6) is None
    assert (run.checkpoints / "step-00000003.foreign").is_dir()


def test_what_the_settings_name_must_hold_what_it_held(tmp_path):
    run = enter(tmp_path, "finetune", Settings())
    run.require_inputs({"data": "aa", "base": "bb"})
    again = enter(tmp_path, "finetune", Settings())
    again.require_inputs({"data": "aa", "base": "bb"})
    with pytest.raises(ConfigError, match="other content of base"):
        again.require_inputs({"data": "aa", "base": "cc"})
    identity.change(tmp_path, again.record, Settings(seed=1), ["seed"])
    with pytest.raises(ConfigError, match="other content of data"):
        enter(tmp_path, "finetune", Settings(seed=1)).require_inputs({"data": "dd"})
    identity.change(tmp_path, Record.read(tmp_path), Settings(seed=1), ["data"])
    enter(tmp_path, "finetune", Settings(seed=1)).require_inputs({"data": "dd"})


def test_a_pretraining_does_not_go_on_with_data_that_were_exchanged(tmp_path, capsys):
    def write(shift: int) -> None:
        images = (np.arange(24 * 64).reshape(24, 8, 8) * 7 + shift).astype(np.uint8)
        np.savez(tmp_path / "data.npz", images=images)  # no classes, so that no judge is trained

    write(0)
    tiny = ["--train.steps", "2", "--train.batch", "4", "--model.net", "ResidualMLP(width=8, depth=1)"]
    tiny += ["--chain.steps", "2", "--evaluation.samples", "50", "--held_out", "0.5"]
    data = ["--data", str(tmp_path / "data.npz"), "--root", str(tmp_path / "runs"), "--name", "it"]
    assert main(["pretrain", *tiny, *data]) == 0, capsys.readouterr().err
    write(1)
    assert main(["pretrain", "--resume", str(tmp_path / "runs" / "it")]) == 2
    assert "other content of data" in capsys.readouterr().err
    write(0)
    assert main(["pretrain", "--resume", str(tmp_path / "runs" / "it")]) == 0, capsys.readouterr().err
