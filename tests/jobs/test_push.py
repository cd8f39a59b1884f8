"""``rlfusion push`` against a stand-in of the hub's client: what the card says, what is uploaded, what is not told."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import huggingface_hub
import pytest
import yaml

from rlfusion import models
from rlfusion.cli.main import main
from rlfusion.config import Finetune
from rlfusion.jobs.push import _shown
from rlfusion.models.seal import sealed
from rlfusion.training import identity


class Hub:
    """The client's calls, with the signatures that are used."""

    calls: ClassVar[list] = []
    cards: ClassVar = {"them/sd": {"license": "openrail"}, "them/none": None}
    broken = False

    def model_info(self, repo_id, **_):
        if repo_id not in self.cards:
            raise OSError("404")
        return SimpleNamespace(card_data=self.cards[repo_id])

    def create_repo(self, repo_id, *, token=None, private=None, repo_type=None, exist_ok=False):
        if self.broken:
            raise OSError("401 Unauthorized")
        self.calls.append(("create", repo_id, private, exist_ok))

    def upload_folder(self, *, repo_id, folder_path, path_in_repo=None, commit_message=None, repo_type=None):
        files = sorted(str(f.relative_to(folder_path)) for f in Path(folder_path).rglob("*") if f.is_file())
        self.calls.append(("upload", repo_id, files))
        return f"https://huggingface.co/{repo_id}"


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    monkeypatch.setattr("rlfusion.common.hub.unreachable", lambda: "")
    return Hub


def parts(folder: Path) -> tuple[dict, str]:
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def test_a_run_of_ours(tiny_root, tmp_path, hub, capsys):
    run = tiny_root / "first"
    words = ["push", str(run), "--to", "me/digits", "--out", str(tmp_path / "out")]
    assert main([*words, "--dry_run", "true"]) == 0
    assert not hub.calls
    head, text = parts(tmp_path / "out")
    assert head == {
        "license": "unknown",
        "library_name": "rlfusion",
        "tags": ["reinforcement-learning", "reward-fine-tuning", "ddpo"],
    }
    assert "# digits" in text
    assert "Its licence is unknown" in text
    after = json.loads((run / "summary.json").read_text())["after"]
    assert f"{after['reward']:.4g} |" in text
    assert "![gain](curve.png)" in text
    assert "![after](after.png)" in text
    assert str(tiny_root) not in text
    _, card = models.load(tmp_path / "out")  # what was pushed is the model, whole
    assert card.names == models.load_card(run / "model").names
    words[-1] = str(tmp_path / "again")
    assert main([*words, "--private", "true", "--license", "mit"]) == 0
    assert hub.calls[0] == ("create", "me/digits", True, True)
    assert {"README.md", "after.png", "before.png", "curve.png", "model.json"} <= set(hub.calls[1][2])
    assert "https://huggingface.co/me/digits" in capsys.readouterr().out
    assert parts(tmp_path / "again")[0]["license"] == "mit"


def of_pipeline(place: Path, base: str, whole: bool = False) -> Path:
    """A folder as a run on a pipeline leaves it, not finished."""
    folder = place / "runs" / "it"
    (folder / "model").mkdir(parents=True)
    settings = Finetune(base=base, reward="jpeg_compressibility", lora="" if whole else "LoRA(rank=2)")
    identity.enter(folder, "finetune", settings)
    (folder / "config.yaml").write_text("a: 1")
    name = "unet.safetensors" if whole else "pytorch_lora_weights.safetensors"
    (folder / "model" / name).write_bytes(b"weights")
    held = {"name": str(place / "sd") if Path(base).exists() else base, "cache": str(place / "runs/cache")}
    about = {"format": "x", "names": ["a red cat", "a\ndog"], "pipeline": held, "files": {}}
    about |= {"data": {"data": str(place / "own.npz"), "size": 32, "held_out": 0.25, "sha256": "0"}}
    (folder / "model" / "model.json").write_bytes(sealed(about))
    return folder


@pytest.mark.parametrize(
    ("base", "license", "base_model"), [("them/sd", "openrail", "them/sd"), ("them/none", "unknown", "them/none")]
)
def test_adapters_of_a_pipeline_of_the_hub(tmp_path, hub, base, license, base_model):
    run = of_pipeline(tmp_path, base)
    assert main(["push", str(run), "--to", "me/it"]) == 0
    head, text = parts(run / "hub")
    assert (head["license"], head["base_model"], head["library_name"]) == (license, base_model, "diffusers")
    assert "lora" in head["tags"]
    assert f'from_pretrained("{base}")' in text
    assert 'load_lora_weights("me/it")' in text
    assert "- a red cat\n- a dog" in text
    assert "The run was not finished" in text
    told = json.loads((run / "hub" / "model.json").read_text())
    assert told["pipeline"] == {"name": base, "cache": ""}
    assert str(tmp_path) not in json.dumps(told)
    assert json.loads((run / "model" / "model.json").read_text())["pipeline"]["cache"]  # the run's own stays


def test_what_a_push_wrote_is_written_anew_and_anything_else_is_refused(tmp_path, hub, capsys):
    run = of_pipeline(tmp_path, "them/sd")
    words, folder = ["push", str(run), "--to", "me/it"], run / "hub"
    assert main([*words, "--dry_run", "true"]) == 0
    (run / "model" / "more.bin").write_bytes(b"of a later checkpoint")
    assert main([*words, "--license", "mit"]) == 0  # after the dry run, with other words
    assert parts(folder)[0]["license"] == "mit"
    assert "more.bin" in hub.calls[1][2]
    (run / "model" / "more.bin").unlink()
    assert main(words) == 0
    assert not (folder / "more.bin").exists(), "nothing of the last time stays"
    capsys.readouterr()
    card = (folder / "README.md").read_text()
    for change in (
        lambda: (folder / "README.md").write_text(f"{card}By hand.\n"),
        lambda: (folder / "notes.txt").write_text("mine"),
        lambda: (folder / "model.json").unlink(),
        lambda: (folder / "mine").mkdir(),
        lambda: (folder / "elsewhere").symlink_to(tmp_path),
    ):
        shutil.rmtree(folder)
        assert main(words) == 0
        capsys.readouterr()
        change()
        held = sorted(file.name for file in folder.iterdir())
        assert main(words) == 2
        assert "and is not as push wrote it: remove it, or say another --out" in capsys.readouterr().err
        assert sorted(file.name for file in folder.iterdir()) == held
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    assert main([*words, "--out", str(other)]) == 2
    assert "was not written by a push of this run" in capsys.readouterr().err
    assert (other / "thesis.txt").read_text() == "mine"
    link = tmp_path / "link"
    assert main([*words, "--out", str(tmp_path / "there")]) == 0
    link.symlink_to(tmp_path / "there")
    assert main([*words, "--out", str(link)]) == 2
    assert (tmp_path / "there" / "README.md").exists()


def test_a_base_in_a_folder_says_its_licence_itself(tmp_path, hub):
    (tmp_path / "sd").mkdir()
    (tmp_path / "sd" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# It\n")
    run = of_pipeline(tmp_path, str(tmp_path / "sd"), whole=True)
    assert main(["push", str(run), "--to", "me/it", "--dry_run", "true"]) == 0
    head, text = parts(run / "hub")
    assert head["license"] == "apache-2.0"
    assert "base_model" not in head
    assert 'DiffusionPipeline.from_pretrained("me/it")' in text
    for file in (run / "hub").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()


def test_a_hub_that_refuses_is_one_line_and_the_folder_stays(tmp_path, hub, monkeypatch, capsys):
    monkeypatch.setattr(Hub, "broken", True)
    run = of_pipeline(tmp_path, "them/sd")
    assert main(["push", str(run), "--to", "me/it"]) == 69
    said = capsys.readouterr().err
    assert "401 Unauthorized" in said
    assert f"hf upload me/it {run / 'hub'}" in said
    assert said.count("\n") == 1
    assert (run / "hub" / "README.md").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["runs/it", "--to", "it"], "expected a repository of the hub, OWNER/NAME"),
        (["runs/it", "--to", "me/../it"], "expected a repository of the hub, OWNER/NAME"),
        (["runs/it", "--to", "me/it", "--which", "best"], "is a run without best/"),
        (["runs/no", "--to", "me/it"], "is no run"),
        (["runs/it", "--to", "me/it", "--license", "My own"], "expected a word such as apache-2.0"),
        (["runs/it"], "needs --to"),
    ],
)
def test_what_is_refused(tmp_path, monkeypatch, hub, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    of_pipeline(tmp_path, "them/sd")
    assert main(["push", *words]) == 2
    assert said in capsys.readouterr().err
    assert not hub.calls


def test_a_damaged_model_is_not_pushed(tmp_path, hub, capsys):
    run = of_pipeline(tmp_path, "them/sd")
    file = run / "model" / "model.json"
    file.write_text(file.read_text().replace("red", "bad"))
    assert main(["push", str(run), "--to", "me/it"]) == 2
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("/home/me/rewards/mine.py:score", "mine.py:score"),
        ("http://127.0.0.1:8500", "http://127.0.0.1:8500"),
        ("them/sd", "them/sd"),
        ("LoRA(rank=8, targets='a,b')", "LoRA(rank=8, targets='a,b')"),
        ({"/home/me/a.py:x": 0.5}, "{'a.py:x': 0.5}"),
        ("a|b", "a\\|b"),
    ],
)
def test_paths_of_this_machine_are_not_told(value, told):
    assert _shown(value) == told
