"""The examples that are programs, run as a reader runs them; what they say that they do, they do."""

import os
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
HELD = {"own_agent", "own_family", "own_kernel", "own_network", "own_objective"}
"""Parts of a run, which ``tests/jobs`` tries."""


def program(name: str):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def test_every_example_is_run_somewhere():
    here = Path(__file__).read_text()
    found = {file.stem for file in EXAMPLES.glob("*.py")}
    assert found > HELD
    assert all(f'program("{name}")' in here for name in found - HELD)


def test_a_reward_of_one_s_own():
    before, after = program("own_reward")()
    assert after > before + 0.05


def test_the_loop_of_gymnasium_draws_the_model_s_own_samples():
    mean, std = program("gymnasium_loop")()
    assert abs(mean) < 0.07  # 960 pixels of deviation 0.5, and 4 errors of their mean
    assert std == pytest.approx(0.48, abs=0.05)


def test_ppo_in_the_manner_of_cleanrl():
    first, last = program("cleanrl_ppo")()
    assert last > first + 0.05


def test_a_distilled_model_is_fine_tuned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before, after = program("distil_then_finetune")(tmp_path / "runs")
    assert after > before
    assert sorted(os.listdir(tmp_path / "runs")) == ["cache", "student", "teacher", "tuned"]
