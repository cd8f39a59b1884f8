"""The command line as a user meets it: real processes, exit codes, files, and the same bits from the same settings."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import Process, rlfusion
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import TINY

SCRIPT = str(Path(sys.executable).with_name("rlfusion"))
COMMANDS = ["finetune", "pretrain", "sample", "evaluate"]

REWARDS = """
import torch

def bright(samples, cond):
    return samples.flatten(1).mean(1)

def nan(samples, cond):
    return bright(samples, cond).index_fill(0, torch.tensor([2]), torch.nan)

def none(samples, cond):
    bright(samples, cond)

def short(samples, cond):
    return bright(samples, cond)[1:]

def late(samples, cond, calls=[]):
    calls.append(0)
    return bright(samples, cond) * (torch.nan if len(calls) > 5 else 1)

def slow(samples, cond):
    import time
    time.sleep(0.3)
    return bright(samples, cond)
"""


def script(cwd: Path, *arguments: object) -> subprocess.CompletedProcess:
    """The installed command, with nothing imported before."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [SCRIPT, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=180
    )


def finetune(root: Path, *more: object, cwd: Path | None = None):
    return rlfusion(cwd or root, "finetune", "--root", root, *TINY, *more)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_installed_command_gives_the_bits_of_a_run_before(tiny_root):
    result = script(tiny_root, "finetune", "--root", tiny_root, "--name", "second", *TINY)
    assert result.returncode == 0, result.stderr
    first, second = tiny_root / "first", tiny_root / "second"
    a, b = (load_file(folder / "model" / "weights.safetensors") for folder in (first, second))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (first / "metrics.jsonl").read_text() == (second / "metrics.jsonl").read_text()
    assert (first / "summary.json").read_text() == (second / "summary.json").read_text()
    assert "before" in result.stdout
    assert result.stdout.splitlines()[-1] == f"see it: rlfusion board {second}"


def test_another_seed_gives_another_model(tiny_root):
    assert finetune(tiny_root, "--name", "other", "--seed", 1).code == 0
    assert (tiny_root / "first" / "metrics.jsonl").read_text() != (tiny_root / "other" / "metrics.jsonl").read_text()


def test_a_run_leaves_all_that_it_promises(tiny_root):
    run = tiny_root / "first"
    assert {"config.yaml", "metrics.jsonl", "summary.json", "checkpoints", "samples", "model"} <= set(os.listdir(run))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["queries"] == 6 * 4 * 6
    for when in ("before", "after"):
        assert {"reward", "agreement", "frechet", "frechet_floor", "precision"} <= summary[when].keys()
        with Image.open(run / "samples" / f"{when}.png") as picture:
            assert picture.size == ((10 * 9 - 1) * 4, (8 * 9 - 1) * 4)  # 10 columns, 8 rows, 4 pixels for one
    assert [line["step"] for line in metrics(run) if "train/reward" in line] == [1, 2, 3, 4, 5, 6]
    events = EventAccumulator(str(run), {"histograms": 0}).Reload()
    assert [e.step for e in events.Scalars("train/reward")] == [1, 2, 3, 4, 5, 6]
    assert {"samples/before", "samples/after"} <= set(events.Tags()["images"])
    assert [e.step for e in events.Images("samples/training")] == [0, 4, 6]
    assert {"final/reward", "final/gain", "final/queries", "final/goal"} <= set(events.Tags()["scalars"])
    before, after = summary["before"], summary["after"]
    gain = (after["reward"] - before["reward"]) / before["reward_std"]
    (line,) = (line for line in metrics(run) if line["step"] == 6 and "evaluation/gain" in line)
    assert line["evaluation/gain"] == pytest.approx(gain)
    assert [e.value for e in events.Scalars("evaluation/gain")] == [0.0, pytest.approx(gain)]
    assert [e.step for e in events.Scalars("monitor/gain")] == [4, 6]
    assert [e.step for e in events.Histograms("train/rewards")] == [1, 2, 3, 4, 5, 6]
    assert {f"run/{name}/text_summary" for name in ("plan", "settings", "versions")} <= set(events.Tags()["tensors"])


def test_a_config_file_repeats_its_run_in_a_new_folder(tiny_root):
    before = set(tiny_root.glob("first-*"))
    assert rlfusion(tiny_root, "finetune", "--config", "first/config.yaml").code == 0
    (made,) = set(tiny_root.glob("first-*")) - before
    assert (made / "metrics.jsonl").read_text() == (tiny_root / "first" / "metrics.jsonl").read_text()


@pytest.mark.parametrize(("label", "count", "size"), [("", 23, (10, 3)), ("7", 5, (5, 1))])
def test_sample_writes_a_picture_of_the_right_size(tiny_root, tmp_path, label, count, size):
    result = rlfusion(
        tmp_path,
        *("sample", "--checkpoint", tiny_root / "first", "--out", "new/grid.png", "--count", count),
        *("--label", label, "--chain.steps", 3, "--scale", 2),
    )
    assert result.code == 0, result.err
    with Image.open(tmp_path / "new" / "grid.png") as picture:
        assert picture.size == tuple((n * 9 - 1) * 2 for n in size)
        assert np.asarray(picture).std() > 0


def test_sample_refuses_a_class_that_the_model_does_not_know(tiny_root, tmp_path):
    result = rlfusion(tmp_path, "sample", "--checkpoint", tiny_root / "first", "--label", "ten")
    assert result.code == 2
    assert "label = 'ten'" in result.err
    assert "0, 1, 2" in result.err


def test_evaluate_prints_and_writes_what_the_run_measured(tiny_root, tmp_path):
    result = rlfusion(
        tmp_path,
        *("evaluate", "--checkpoint", tiny_root / "first", "--root", tiny_root, "--out", "it.json"),
        *("--reward", "class_logprob", "--evaluation.samples", 60, "--chain.steps", 4),
    )
    assert result.code == 0, result.err
    written = json.loads((tmp_path / "it.json").read_text())
    assert written == json.loads((tiny_root / "first" / "summary.json").read_text())["after"]
    for name, value in written.items():
        assert name in result.out
        assert f"{value:.4g}" in result.out


def test_evaluate_refuses_data_of_another_shape(tiny_root, tmp_path):
    np.savez(tmp_path / "x.npz", images=np.zeros((20, 9, 9), np.uint8), labels=np.arange(20) % 10)
    result = rlfusion(tmp_path, "evaluate", "--checkpoint", tiny_root / "first", "--data", "x.npz", "--root", tiny_root)
    assert result.code == 2
    assert "(1, 9, 9)" in result.err
    assert "(1, 8, 8)" in result.err


SMALL = (
    *("--train.steps", 20, "--train.batch", 16, "--evaluation.samples", 50, "--chain.steps", 2),
    *("--model.net", "ResidualMLP(width=16, depth=1)"),
)


def test_pretrain_on_a_folder_of_images(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(24):
        name = ("cats", "dogs")[index % 2]
        (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
        image = rng.integers(0, 256, (11, 14, 3), np.uint8)
        Image.fromarray(image).save(tmp_path / "data" / name / f"{index}.png")
    result = rlfusion(tmp_path, "pretrain", "--data", "data", "--size", 8, "--name", "pets", *SMALL)
    assert result.code == 0, result.err
    run = tmp_path / "runs" / "pets"
    card = json.loads((run / "model" / "model.json").read_text())
    assert (card["shape"], card["names"]) == ([3, 8, 8], ["cats", "dogs"])
    assert "agreement" in json.loads((run / "evaluation.json").read_text())
    with Image.open(run / "samples" / "grid.png") as picture:
        assert picture.mode == "RGB"
    drawn = rlfusion(tmp_path, "sample", "--checkpoint", "runs/pets", "--label", "dogs", "--count", 3)
    assert drawn.code == 0, drawn.err


def test_pretrain_on_an_npz_without_labels_has_no_judge(tmp_path):
    np.savez(tmp_path / "digits.npz", images=(load_digits().images[:60] * 15).astype(np.uint8))
    result = rlfusion(tmp_path, "pretrain", "--data", "digits.npz", "--name", "it", *SMALL)
    assert result.code == 0, result.err
    assert "no evaluation" in result.out
    assert (tmp_path / "runs" / "it" / "samples" / "grid.png").is_file()
    refused = rlfusion(tmp_path, "finetune", "--pretrain.data", "digits.npz", "--root", "none")
    assert refused.code == 2
    assert "classes = 1" in refused.err
    assert not (tmp_path / "none").exists()


@pytest.fixture
def own_rewards(tmp_path) -> Path:
    (tmp_path / "own.py").write_text(REWARDS)
    return tmp_path


def test_a_reward_of_the_users_own_from_the_working_directory(tiny_root, own_rewards):
    result = finetune(tiny_root, "--reward", "own:bright", "--name", "own", cwd=own_rewards)
    assert result.code == 0, result.err
    assert "reward bright" in result.out
    summary = json.loads((tiny_root / "own" / "summary.json").read_text())
    assert summary["before"]["reward"] == pytest.approx(summary["before"]["brightness"], abs=1e-5)


@pytest.mark.parametrize(
    ("name", "said"),
    [("nan", "item"), ("none", "NoneType"), ("short", "expected"), ("late", "item")],
)
def test_a_faulty_reward_is_code_4_and_named(tiny_root, own_rewards, name, said):
    result = finetune(tiny_root, "--reward", f"own:{name}", cwd=own_rewards)
    assert result.code == 4, result.err
    said_in_one = " ".join(result.err.split())
    assert f"'{name}'" in said_in_one
    assert said in said_in_one
    assert "Traceback" not in result.err


def test_a_stopped_run_is_code_75_and_says_how_to_go_on(tiny_root, own_rewards):
    process = Process(own_rewards, "finetune", "--root", tiny_root, *TINY, "--reward", "own:slow", "--name", "stopped")
    lines = tiny_root / "stopped" / "metrics.jsonl"
    result = process.once(lambda: lines.exists() and "train/" in lines.read_text(), signal.SIGTERM).wait()
    assert result.code == 75, result.err
    assert f"go on with: rlfusion finetune --resume {tiny_root / 'stopped'}" in result.err
    assert "Traceback" not in result.err
    assert list((tiny_root / "stopped" / "checkpoints").glob("step-*"))


def test_no_command_and_help_teach(tmp_path):
    for arguments in ((), ("--help",), ("-h",)):
        result = rlfusion(tmp_path, *arguments)
        assert result.code == 0
        assert all(f"rlfusion {name}" in result.out for name in COMMANDS)
        assert "rlfusion board runs" in result.out
        assert "--resume" in result.out
    assert rlfusion(tmp_path, "--version").out.strip() == __import__("rlfusion").__version__


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_explains_its_settings(tmp_path, command):
    result = rlfusion(tmp_path, command, "--help")
    assert result.code == 0
    assert "--chain.steps" in result.out
    assert "network calls" in result.out  # what it means
    assert "default: 20" in result.out
    assert ("--resume" in result.out) == (command in ("finetune", "pretrain"))
