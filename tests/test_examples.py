"""The examples that are programs, run as a reader runs them; what they say that they do, they do."""

import json
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


def test_ppo_of_stable_baselines():
    pytest.importorskip("stable_baselines3", reason="pip install stable-baselines3")
    before, after = program("stable_baselines")()
    assert after > before + 0.05


def test_ppo_of_torchrl():
    pytest.importorskip("torchrl", reason="pip install torchrl")
    first, last = program("torchrl_ppo")()
    assert last > first + 0.05


def test_adapters_of_a_pipeline_learn_from_a_clip(tmp_path):
    before, after = program("sd_lora_clip")(tmp_path / "runs")
    assert after > before + 0.05
    assert (tmp_path / "runs" / "tuned" / "model" / "pytorch_lora_weights.safetensors").exists()


NOTEBOOK = EXAMPLES / "notebook.ipynb"


def test_the_notebook_is_kept_without_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert {cell["cell_type"] for cell in cells} == {"code", "markdown"}
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path, monkeypatch):
    """In a kernel of its own where nbclient is installed, else cell by cell here."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    try:
        import ipykernel  # noqa: F401, what nbclient starts
        import nbclient
        import nbformat
    except ImportError:
        names = cell_by_cell()
        before, after = names["before"], names["after"]
    else:
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
        last = next(cell for cell in reversed(notebook.cells) if cell.cell_type == "code")
        before, after = json.loads(last.outputs[-1]["data"]["text/plain"].replace("(", "[").replace(")", "]"))
    assert after > before + 0.03


def cell_by_cell() -> dict:
    """The names that the notebook's cells leave."""
    import matplotlib

    matplotlib.use("agg")
    names: dict = {}
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    return names


def test_a_distilled_model_is_fine_tuned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before, after = program("distil_then_finetune")(tmp_path / "runs")
    assert after > before
    assert sorted(os.listdir(tmp_path / "runs")) == ["cache", "student", "teacher", "tuned"]
