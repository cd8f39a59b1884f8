"""Code of a user's own, from the command line: as a lone file and as an installed package's entry point.

An agent, a kernel, a network and an objective are pretrained, saved, sampled, trained, resumed and run by a Ray worker.
"""

import json
import shutil
from pathlib import Path

import pytest

from rlfusion.cli.main import main
from rlfusion.jobs.doors import DOORS

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
NAMES = {"agent": "LeaveOneOut", "kernel": "Fading", "network": "Net", "objective": "Absolute"}
FILES = {kind: f"own_{kind}.py:{name}" for kind, name in NAMES.items()}
POINTS = {kind: f"acme-{kind}" for kind in NAMES}
GROUPS = {"agent": "agents", "kernel": "kernels", "network": "networks", "objective": "objectives"}
QUICK = ("--evaluation.samples", "50", "--threads", "1")


@pytest.fixture(params=["files", "package"])
def own(request, tmp_path, monkeypatch, with_classifiers):
    """The folder where the work is done, and the names of one's own things there."""
    monkeypatch.chdir(tmp_path)
    with_classifiers(tmp_path / "runs")
    if request.param == "files":
        for kind in NAMES:
            shutil.copy(EXAMPLES / f"own_{kind}.py", tmp_path)
        return tmp_path, FILES
    site = tmp_path / "site"
    info = site / "acme-2.0.dist-info"
    info.mkdir(parents=True)
    for kind in NAMES:
        shutil.copy(EXAMPLES / f"own_{kind}.py", site / f"acme_{kind}.py")
    points = [f"[rlfusion.{GROUPS[k]}]\nacme-{k} = acme_{k}:{name}\n" for k, name in NAMES.items()]
    (info / "entry_points.txt").write_text("".join(points))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 2.0\n")
    monkeypatch.syspath_prepend(site)
    return tmp_path, POINTS


def run(*words: object) -> int:
    return main([str(word) for word in words])


def pretrain(names: dict[str, str], *more: object) -> int:
    net = ("--model.net", f"{names['network']}(width=8)", "--objective", f"{names['objective']}(margin=0.02)")
    chain = ("--chain.kernel", f"{names['kernel']}(most=0.9)", "--chain.steps", 4)
    return run("pretrain", "--name", "base", *net, *chain, *QUICK, "--train.steps", 4, *more)


def finetune(names: dict[str, str], name: str, *more: object) -> int:
    small = ("--rollout.prompts", 2, "--rollout.samples_per_prompt", 4, "--rollout.item", 4, "--monitor.every", 0)
    agent = ("--agent", names["agent"], "--agent.lr", 0.01, "--reward", "ink", "--evaluation.deterministic", "false")
    return run("finetune", "--name", name, "--base", "runs/base", *agent, *small, *QUICK, "--updates", 2, *more)


@pytest.mark.alone
def test_own_code_is_trained_saved_sampled_resumed_and_run_by_a_worker(own, capsys):
    folder, names = own
    assert pretrain(names) == 0, capsys.readouterr().err
    card = json.loads((folder / "runs/base/model/model.json").read_text())
    if names is FILES:
        assert card["config"]["net"] == f"{folder}/own_network.py:Net(width=8)"
        assert set(card["sources"]) == {f"{folder}/own_network.py", f"{folder}/own_kernel.py"}
    else:
        assert card["config"]["net"] == "acme-network(width=8)"
        assert "sources" not in card
    assert run("sample", "--checkpoint", "runs/base", "--count", 4, "--out", "grid.png") == 0, capsys.readouterr().err
    assert Path("grid.png").stat().st_size > 100
    assert finetune(names, "here") == 0, capsys.readouterr().err
    assert finetune(names, "there", "--rollout.workers", 1, "--ray.cpus_per_worker", 0.5) == 0, capsys.readouterr().err
    here, there = (Path("runs") / name / "model" / "weights.safetensors" for name in ("here", "there"))
    assert here.read_bytes() == there.read_bytes()
    assert finetune(names, "part", "--updates", 1, "--checkpoint_every", 1) == 0, capsys.readouterr().err
    assert run("finetune", "--resume", "runs/part", "--change", "updates=2") == 0, capsys.readouterr().err
    assert Path("runs/part/model/weights.safetensors").read_bytes() == here.read_bytes()


def test_an_edited_file_is_noticed_and_a_moved_one_found(tmp_path, monkeypatch, capsys, with_classifiers):
    monkeypatch.chdir(tmp_path)
    with_classifiers(tmp_path / "runs")
    for kind in NAMES:
        shutil.copy(EXAMPLES / f"own_{kind}.py", tmp_path)
    assert pretrain(FILES, "--checkpoint_every", 2) == 0
    resume = ("pretrain", "--resume", "runs/base")
    assert run(*resume) == 0
    net = Path("own_network.py")
    before = net.read_text()
    net.write_text(before.replace("torch.tanh", "torch.sin"))
    capsys.readouterr()
    assert run(*resume, "--change", "train.steps=6") == 2
    said = capsys.readouterr().err
    assert "own_network.py has SHA-256" in said
    assert "--change files=edited" in said
    assert run("sample", "--checkpoint", "runs/base", "--count", 4) == 2
    said = capsys.readouterr().err
    assert "own_network.py of SHA-256" in said
    assert "was edited since" in said
    assert run(*resume, "--change", "train.steps=6", "--change", "files=edited") == 0, capsys.readouterr().err
    assert run("sample", "--checkpoint", "runs/base", "--count", 4) == 0
    assert "files." in json.dumps(json.loads(Path("runs/base/run.json").read_text())["changes"])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for kind in ("network", "kernel"):
        shutil.move(f"own_{kind}.py", elsewhere)
    capsys.readouterr()
    assert run("sample", "--checkpoint", "runs/base", "--count", 4) == 2
    assert "is not there" in capsys.readouterr().err
    monkeypatch.chdir(elsewhere)
    assert run("sample", "--checkpoint", tmp_path / "runs/base", "--count", 4) == 0, capsys.readouterr().err


def test_an_error_in_own_code_is_the_user_s(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (EXAMPLES / "own_objective.py").read_text()
    Path("bad.py").write_text(text.replace("t = self.margin", "t = {}['margin'] + self.margin"))
    small = ("--model.net", "ResidualMLP(width=8, depth=1)", *QUICK, "--train.steps", 2)
    assert run("pretrain", "--objective", "bad.py:Absolute", *small) == 3
    said = capsys.readouterr().err
    assert "rlfusion: your code failed: KeyError: 'margin' (bad.py, line 31, in __call__)\n" in said


def test_what_there_is_is_listed(own, capsys, monkeypatch):
    _, names = own
    monkeypatch.setenv("COLUMNS", "200")
    assert run("list") == 0
    kinds = list(DOORS)
    assert len(kinds) == 14
    said = capsys.readouterr().out
    assert all(kind in said for kind in kinds)
    for kind in kinds:
        assert run("list", kind) == 0
        assert "built in" in capsys.readouterr().out
    assert run("list", "agents") == 0
    said = capsys.readouterr().out
    assert ("acme 2.0" in said) == (names is POINTS)
    assert run("list", "agent") == 2
    assert "did you mean 'agents'?" in capsys.readouterr().err


def test_data_and_metrics_of_one_s_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "import torch\n"
        "from rlfusion.data import Dataset\n"
        "def make(n: int = 40):\n"
        "    label = torch.arange(n) % 2\n"
        "    noise = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))\n"
        "    return Dataset(noise * (2 * label[:, None, None, None] - 1), label, ('dark', 'light'))\n"
        "def bright(samples, label, above: float = 0.5):\n"
        "    return (samples > above).float().mean((1, 2, 3))\n"
        "def broken(samples, label):\n"
        "    return samples\n"
    )
    small = ("--model.net", "ResidualMLP(width=8, depth=1)", *QUICK, "--train.steps", 2, "--name", "a")
    metrics = ("--evaluation.metrics", "contrast,mine.py:bright(above=0.4)")
    assert run("pretrain", "--data", "mine.py:make(n=60)", *small, *metrics) == 0, capsys.readouterr().err
    found = json.loads(Path("runs/a/evaluation.json").read_text())
    assert 0 <= found["bright"] <= 1
    assert found["contrast"] > 0
    refused = {
        ("--data", "mine.py:bright(above=0.1)"): "samples",
        ("--data", "mine.py:mak"): "did you mean 'make'?",
        ("--evaluation.metrics", "mine.py:bright(abov=0.4)"): "did you mean 'above'?",
        ("--evaluation.metrics", "contrats"): "did you mean 'contrast'?",
    }
    for words, said in refused.items():
        assert run("pretrain", *small[:-2], "--name", "b", *words) == 2
        assert said in capsys.readouterr().err
