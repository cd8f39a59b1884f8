"""The trial of ``rlfusion doctor``: its rows on a fine-tuning that works, and on each way in which one does not."""

import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import TINY

from rlfusion.agents import NAMES
from rlfusion.cli.arguments import settings_of
from rlfusion.cli.main import main
from rlfusion.jobs import doctor_trial
from rlfusion.jobs.doctor_trial import ROWS, trial
from rlfusion.rollout import Local

ALL = ["memory", "disk", *ROWS]
WITH = {"sft": ("--agent.data", "digits"), "opd": ("--agent.teacher_guidance", "1.0")}
SMALL = {"network": 1000, "activations": 1000}


def settings(root: Path, *more: object):
    return settings_of("finetune", [*map(str, TINY), "--root", str(root), "--reward", "ink", *map(str, more)])


def rows(root: Path, *more: object) -> dict:
    return {row.check: row for row in trial(settings(root, *more), SMALL)}


@pytest.mark.parametrize("agent", NAMES)
def test_a_fine_tuning_that_works_fails_nowhere(agent, tiny_root):
    before = {path.name for path in tiny_root.iterdir()}
    found = rows(tiny_root, "--agent", agent, *WITH.get(agent, ()))
    assert list(found) == ALL
    assert {name: row for name, row in found.items() if row.verdict == "FAILS"} == {}
    assert "same bits" in found["checkpoint"].message
    assert "for 6 updates" in found["time"].message
    assert {path.name for path in tiny_root.iterdir()} == before


def test_the_command_prints_the_rows(tiny_root, capsys):
    assert main(["doctor", *map(str, TINY), "--root", str(tiny_root), "--reward", "ink"]) == 0
    out = capsys.readouterr().out
    assert all(f"│ {name} " in out for name in ALL)
    assert main(["doctor", *map(str, TINY), "--root", str(tiny_root), "--reward", "ink", "--agent.lr", "1e-30"]) == 2
    assert "gradient" in capsys.readouterr().err


def test_equal_rewards_are_a_note_and_then_teach_nothing(tiny_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("flat.py").write_text("import torch\ndef flat(samples, cond):\n    return torch.ones(len(samples))\n")
    found = rows(tiny_root, "--reward", "flat.py:flat", "--agent.kl_loss", 0)
    assert found["reward"].verdict == "note"
    assert found["gradient"].verdict == "FAILS"
    assert "rewards that differ" in found["gradient"].message
    assert "checkpoint" not in found


def test_a_step_that_is_too_large_is_told_what_to_do(tiny_root):
    found = rows(tiny_root, "--agent.lr", 1e30)
    assert found["gradient"].verdict == "FAILS"
    assert "not finite" in found["gradient"].message
    assert found["gradient"].message.endswith("expected a smaller agent.lr")
    assert list(found)[-1] == "gradient"


def test_a_reward_that_is_not_finite_ends_the_trial(tiny_root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("nan.py").write_text("def nan(samples, cond):\n    return samples.mean((1, 2, 3)) * float('nan')\n")
    found = rows(tiny_root, "--reward", "nan.py:nan")
    assert found["reward"].verdict == "FAILS"
    assert "not finite for" in found["reward"].message
    assert list(found)[-1] == "reward"
    capsys.readouterr()
    assert main(["doctor", *map(str, TINY), "--root", str(tiny_root), "--reward", "nan.py:nan"]) == 2
    said = capsys.readouterr()
    assert "what is here" in said.out
    assert re.search(r"FAILS .*check-reward", " ".join(said.out.replace("│", " ").split()))


def test_a_reward_that_raises_is_the_users(tiny_root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("bad.py").write_text("def bad(samples, cond):\n    raise KeyError('mine')\n")
    arguments = [*map(str, TINY), "--root", str(tiny_root), "--reward", "bad.py:bad"]
    assert main(["doctor", *arguments]) == 3
    assert "mine" in capsys.readouterr().err


@pytest.mark.parametrize(("free", "verdict"), [(10_000, "ok"), (2_400, "note"), (1_999, "FAILS")])
def test_memory_is_held_against_what_is_free(free, verdict, monkeypatch):
    monkeypatch.setattr(doctor_trial, "_available", lambda: free)
    row = doctor_trial._memory(2000, torch.device("cpu"))
    assert row.verdict == verdict
    assert ("micro_batch" in row.message) == (verdict == "FAILS")


def test_what_does_not_fit_is_not_tried(tiny_root, monkeypatch):
    monkeypatch.setattr(doctor_trial, "_available", lambda: 10)
    assert list(rows(tiny_root)) == ["memory"]


def test_what_is_available_is_between_nothing_and_all():
    assert 0 < doctor_trial._available() < 1e14


def test_a_root_that_cannot_be_written_fails(tiny_root, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor_trial, "TemporaryDirectory", refused)
    found = rows(tiny_root)
    assert list(found) == ["memory", "disk"]
    assert found["disk"].verdict == "FAILS"
    assert "Permission denied" in found["disk"].message


def test_a_network_that_draws_numbers_of_its_own_is_seen(tiny_root, monkeypatch):
    collect = Local.collect

    def drawn(self, items, weights):
        return [replace(walks, x=walks.x + torch.rand(())) for walks in collect(self, items, weights)]

    monkeypatch.setattr(Local, "collect", drawn)
    monkeypatch.setattr(doctor_trial, "try_out", lambda *_: ["preflight: reward 1"])
    found = rows(tiny_root)
    assert found["seeds"].verdict == "FAILS"
    assert list(found)[-1] == "seeds"


def test_a_state_that_is_not_taken_up_is_seen(tiny_root, monkeypatch):
    from rlfusion.agents.ddpo import Learner

    monkeypatch.setattr(Learner, "load_state_dict", lambda self, state: None)
    found = rows(tiny_root)
    assert found["checkpoint"].verdict == "FAILS"
    assert list(found)[-1] == "checkpoint"


def test_room_for_the_checkpoints_is_asked_for(tiny_root, monkeypatch):
    monkeypatch.setattr(doctor_trial, "disk_usage", lambda _: type("Usage", (), {"free": 100}))
    found = rows(tiny_root)
    assert found["checkpoint"].verdict == "FAILS"
    assert "checkpoints.last" in found["checkpoint"].message


@pytest.mark.parametrize(("off", "verdict"), [(0.0, "ok"), (0.5, "note")])
def test_walks_of_a_worker_are_held_to_those_of_here(off, verdict, tiny_root, monkeypatch):
    """The worker is a stand-in: ``tests/rollout`` starts real ones."""

    class Worker(Local):
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    def made(described, *_):
        worker = Worker(described)
        collect = worker.collect
        worker.collect = lambda items, weights: [replace(walks, x=walks.x + off) for walks in collect(items, weights)]
        return worker

    tasks = []
    make_task = doctor_trial.make_task
    monkeypatch.setattr(doctor_trial, "make_task", lambda *a: tasks.append(make_task(*a)) or tasks[-1])
    monkeypatch.setattr(doctor_trial, "recipe", lambda *_: tasks[-1])
    monkeypatch.setattr(doctor_trial, "make_backend", made)
    monkeypatch.setattr(doctor_trial, "cluster_of", lambda *_: nullcontext())
    found = rows(tiny_root, "--rollout.workers", 1)
    assert found["ray"].verdict == verdict
    assert "by one process" in found["time"].message


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.5, "0.5 seconds"), (119, "119.0 seconds"), (600, "10.0 minutes"), (7200, "2.0 hours"), (1e6, "11.6 days")],
)
def test_a_time_is_told_in_its_unit(seconds, told):
    assert doctor_trial._spoken(seconds) == told
