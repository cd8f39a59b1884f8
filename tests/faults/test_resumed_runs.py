"""Real runs with a file lost, damaged or edited between stop and resume: the same bits, or one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import rlfusion
from tiny_runs import TINY

from rlfusion.cli.main import main

SETTINGS = (*TINY, "--updates", 4, "--checkpoint_every", 2, "--reward", "ink", "--monitor.every", 2)
SETTINGS += ("--monitor.samples", 50, "--evaluation.deterministic", "false")


@pytest.fixture(scope="module")
def cwd(tiny_root, tmp_path_factory) -> Path:
    """A directory with ``runs/whole``, a finished run, and ``runs/short``, the same with ``updates`` 2."""
    place = tmp_path_factory.mktemp("resumed")
    (place / "runs").mkdir()
    (place / "runs" / "cache").symlink_to(tiny_root / "cache")
    for name, updates in (("whole", 4), ("short", 2)):
        result = rlfusion(place, "finetune", *SETTINGS, "--updates", updates, "--root", "runs", "--name", name)
        assert result.code == 0, result.err
    return place


def stopped(cwd: Path, name: str) -> Path:
    """The folder of a run like ``whole`` that was stopped after 2 updates."""
    folder = cwd / "runs" / name
    shutil.copytree(cwd / "runs" / "whole", folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    for lost in ("model", "samples/after.png", "summary.json"):
        shutil.rmtree(folder / lost) if (folder / lost).is_dir() else (folder / lost).unlink()
    return folder


def outcome(folder: Path) -> dict[str, bytes]:
    names = ("model/weights.safetensors", "model/model.json", "summary.json", "before.json", "samples/before.png")
    return {name: (folder / name).read_bytes() for name in (*names, "samples/after.png")}


def cut(folder: Path, *names: str) -> None:
    """Leave two thirds of each file."""
    for name in names:
        blob = (folder / name).read_bytes()
        (folder / name).write_bytes(blob[: 2 * len(blob) // 3])


def write(folder: Path, text: str, *names: str) -> None:
    for name in names:
        (folder / name).write_text(text)


def lose(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink()


TEXTS = ("before.json", "metrics.jsonl", "timing.jsonl")
MONITOR = "monitor/base.safetensors"
DERIVED: dict[str, Callable[[Path], None]] = {
    "lost": lambda f: lose(f, "before.json", MONITOR, "metrics.jsonl", "timing.jsonl", "config.yaml"),
    "cut short": lambda f: cut(f, "before.json", MONITOR, "metrics.jsonl", "timing.jsonl", "run.json"),
    "other content": lambda f: write(f, '{"reward": "x"}\n[1]\n', *TEXTS, MONITOR),
    "no text": lambda f: [(f / name).write_bytes(b"\xff\xfe\n\x00") for name in TEXTS],
    "no pictures": lambda f: [shutil.rmtree(f / "samples"), lose(f, "run.json")],
}


@pytest.mark.parametrize("damage", DERIVED.values(), ids=DERIVED)
def test_what_is_derived_is_made_again_with_the_same_bits(cwd, damage, request):
    name = request.node.callspec.id.replace(" ", "-")
    folder = stopped(cwd, name)
    damage(folder)
    result = rlfusion(cwd, "finetune", "--resume", f"runs/{name}")
    assert result.code == 0, result.err
    assert "step-00000002" in result.out + result.err
    assert outcome(folder) == outcome(cwd / "runs" / "whole")


@pytest.mark.parametrize("text", ["", '{"before": {}}', "[", None])
def test_a_result_that_was_not_written_by_the_run_is_measured_again(cwd, text):
    name = f"result-{'none' if text is None else len(text)}"
    folder = shutil.copytree(cwd / "runs" / "whole", cwd / "runs" / name)
    if text is None:
        (folder / "summary.json").unlink()
    else:
        (folder / "summary.json").write_text(text)
    result = rlfusion(cwd, "finetune", "--resume", f"runs/{name}")
    assert result.code == 0, result.err
    assert outcome(folder) == outcome(cwd / "runs" / "whole")


def other_model(folder: Path) -> None:
    shutil.rmtree(folder / "model")
    shutil.copytree(folder.parent / "short" / "model", folder / "model")


LOST: dict[str, Callable[[Path], None]] = {
    "no model": lambda f: shutil.rmtree(f / "model"),
    "another model": other_model,
    "damaged weights": lambda f: cut(f, "model/weights.safetensors"),
}


@pytest.mark.parametrize("damage", LOST.values(), ids=LOST)
def test_a_finished_run_gives_its_own_model(cwd, damage, request, capsys):
    folder = shutil.copytree(
        cwd / "runs" / "whole", cwd / "runs" / request.node.callspec.id.replace(" ", "-"), dirs_exist_ok=True
    )
    damage(folder)
    assert main(["finetune", "--resume", str(folder)]) == 0, capsys.readouterr().err
    assert outcome(folder) == outcome(cwd / "runs" / "whole")


def test_a_base_model_that_is_not_what_its_run_made_is_made_again(cwd, tiny_root, tmp_path, capsys):
    shutil.copytree(tiny_root / "cache", tmp_path / "cache")
    (base,) = (tmp_path / "cache").glob("base-*")
    shutil.rmtree(base / "model")
    shutil.copytree(cwd / "runs" / "whole" / "model", base / "model")
    code = main(["finetune", *map(str, SETTINGS), "--root", str(tmp_path), "--name", "poisoned"])
    assert code == 0, capsys.readouterr().err
    assert outcome(tmp_path / "poisoned") == outcome(cwd / "runs" / "whole")


def test_a_longer_run_is_the_run_that_was_never_shorter(cwd):
    folder = shutil.copytree(cwd / "runs" / "short", cwd / "runs" / "longer")
    result = rlfusion(cwd, "finetune", "--resume", "runs/longer", "--change", "updates=4")
    assert result.code == 0, result.err
    assert outcome(folder) == outcome(cwd / "runs" / "whole")
    assert "updates: 4" in (folder / "config.yaml").read_text()


def refused(cwd: Path, *arguments: object) -> str:
    """The one line with which a command refuses."""
    result = rlfusion(cwd, *arguments)
    assert result.code == 2, result.err
    lines = [line for line in result.err.splitlines() if line.startswith("rlfusion: ")]
    assert len(lines) == 1, result.err
    assert "Traceback" not in result.err
    return lines[0]


def test_a_run_that_is_not_its_own_any_more_is_refused_in_one_line(cwd):
    folder = stopped(cwd, "edited")
    config = folder / "config.yaml"
    original = config.read_text()
    config.write_text(original.replace("seed: 0", "seed: 5", 1))
    assert "seed = 5, was 0" in refused(cwd, "finetune", "--resume", "runs/edited")
    config.write_text(original.replace("updates: 4", "updates: 1"))
    assert "has done 2 updates already" in refused(cwd, "finetune", "--resume", "runs/edited")
    config.write_text(original)
    assert "rlfusion finetune --resume" in refused(cwd, "pretrain", "--resume", "runs/edited")
    assert "'sed'" in refused(cwd, "finetune", "--resume", "runs/edited", "--change", "sed=3")
    shutil.rmtree(folder / "checkpoints" / "step-00000002")
    assert "has lost its checkpoints" in refused(cwd, "finetune", "--resume", "runs/edited")


def test_a_change_of_the_net_does_not_fit_the_checkpoint_and_says_so(cwd):
    stopped(cwd, "adapted")
    said = refused(cwd, "finetune", "--resume", "runs/adapted", "--change", "lora=LoRA(rank=2)")
    assert "does not fit this run" in said
    assert "lora_" in said


CHANGES = ("agent.lr=0.01", "agent.max_grad_norm=0.001", "agent.ema_decay=0.5", "agent.weight_decay=30", "seed=3")
CHANGES += ("agent.kl_loss=50", "agent.clip=0.0001", "chain.kernel=DDIM(eta=0.5)", "rollout.samples_per_prompt=4")


@pytest.mark.parametrize("change", CHANGES)
def test_a_meant_change_changes_what_is_learned(cwd, change, capsys):
    folder = stopped(cwd, f"meant-{CHANGES.index(change)}")
    assert main(["finetune", "--resume", str(folder), "--change", change]) == 0, capsys.readouterr().err
    weights = "model/weights.safetensors"
    assert (folder / weights).read_bytes() != (cwd / "runs" / "whole" / weights).read_bytes()


BAD = (
    "rollout.prompts=100",
    "agent=grpo",
    "agent.name=grpo",
    "reward=nosuch",
    "chain.kernel=DDIM(eta=-1)",
    "updates=1",
)


@pytest.mark.parametrize("change", BAD)
def test_a_change_that_cannot_work_is_refused_before_it_is_recorded(cwd, change, capsys):
    folder = stopped(cwd, f"bad-{BAD.index(change)}")
    held = [(folder / name).read_bytes() for name in ("config.yaml", "run.json")]
    assert main(["finetune", "--resume", str(folder), "--change", change]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert held == [(folder / name).read_bytes() for name in ("config.yaml", "run.json")]


def test_a_meant_change_goes_on_and_is_remembered(cwd):
    folder = stopped(cwd, "changed")
    result = rlfusion(cwd, "finetune", "--resume", "runs/changed", "--change", "evaluation.samples=80")
    assert result.code == 0, result.err
    weights = "model/weights.safetensors"
    assert (folder / weights).read_bytes() == (cwd / "runs" / "whole" / weights).read_bytes()
    before = json.loads((folder / "before.json").read_text())
    assert before != json.loads((cwd / "runs" / "whole" / "before.json").read_text())  # of other samples
    assert json.loads((folder / "run.json").read_text())["changes"] == [
        {"after": 2, "settings": {"evaluation.samples": [60, 80]}}
    ]
    assert "is finished" in rlfusion(cwd, "finetune", "--resume", "runs/changed").err.replace("\n", " ")
