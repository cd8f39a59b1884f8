"""A family of pipelines of the user's own: a file that names the functions of a pipeline that is not built in."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_pipelines import pixart

import rlfusion as rlf
from rlfusion import models
from rlfusion.cli.main import main
from rlfusion.models import pipelines

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_family.py"
FAMILY = "--pipeline.family=own_family.py:PIXART"
TINY = ("--chain.steps=2", "--evaluation.samples=50", "--monitor.every=0", "--threads=1", "--reward=ink")
FEW = ("--rollout.samples_per_prompt=4", "--rollout.item=4", "--checkpoint_every=1")


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working directory with the pipeline and the file of its family."""
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pixart().save_pretrained(tmp_path / "pixart")
    shutil.copy(EXAMPLE, tmp_path)
    Path("prompts.txt").write_text("a red cat\ntwo dogs\n")
    return tmp_path


def finetune(name: str, *more: str) -> int:
    given = ("--model=pixart", FAMILY, "--pipeline.prompts=prompts.txt", f"--name={name}")
    return main(["finetune", *given, *TINY, *FEW, *more])


def weights(name: str) -> dict[str, torch.Tensor]:
    return load_file(f"runs/{name}/model/transformer/diffusion_pytorch_model.safetensors")


def test_a_family_in_a_file_is_trained_saved_sampled_and_resumed(place, capsys):
    assert finetune("whole", "--updates=2") == 0, capsys.readouterr().err
    about = json.loads(Path("runs/whole/model/model.json").read_text())
    assert about["pipeline"]["family"] == f"{place}/own_family.py:PIXART"
    assert list(about["sources"]) == [f"{place}/own_family.py"]
    assert finetune("part", "--updates=1") == 0, capsys.readouterr().err
    assert main(["finetune", "--resume", "runs/part", "--change", "updates=2"]) == 0, capsys.readouterr().err
    whole, part, base = weights("whole"), weights("part"), pixart().transformer.state_dict()
    assert whole.keys() == part.keys() == base.keys()
    assert all(torch.equal(whole[name], part[name]) for name in whole)
    assert main(["sample", "--checkpoint", "runs/whole", "--count", "2"]) == 0, capsys.readouterr().err
    loaded = rlf.load("runs/whole", prompts="a blue cat")
    assert rlf.sample(loaded, seed=0, count=2).shape == (2, 3, 16, 16)
    refused(capsys, "was saved with family", "sample", "--checkpoint=runs/whole", "--pipeline.family=Sana")
    Path("own_family.py").write_text(EXAMPLE.read_text().replace("learned variance", "variance"))
    refused(capsys, "was edited since", "sample", "--checkpoint", "runs/whole")


def refused(capsys, said: str, *arguments: str) -> None:
    capsys.readouterr()
    assert main(list(arguments)) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_its_sampler_is_that_of_the_pipeline_itself(place, capsys):
    """Random weights predict nothing, so the row "kind" alone fails; of a wrong family that of the sampler too."""
    check = ("check-model", "pixart", FAMILY, "--pipeline.prompts=a red cat")
    refused(capsys, "fails: kind\n", *check)
    Path("own_family.py").write_text(EXAMPLE.read_text().replace("return out[:,", "return 1.01 * out[:,"))
    refused(capsys, "fails: kind, sampler\n", *check)


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("", "unknown pipeline 'MyPixArtPipeline'"),
        ("", "--pipeline.family"),
        ("own_family.py:PIXARD", "did you mean 'PIXART'?"),
        ("own_family.py:Family", "is a class: expected an object"),
        ("own_family.py:encode", "without the base Family"),
        ("nowhere.py:PIXART", "no file"),
    ],
)
def test_what_is_no_family_is_refused_in_one_line(place, capsys, family, said):
    given = (f"--pipeline.family={family}",) if family else ()
    index = place / "pixart" / "model_index.json"
    index.write_text(index.read_text().replace("PixArtSigmaPipeline", "MyPixArtPipeline"))
    refused(capsys, said, "finetune", "--model=pixart", "--pipeline.prompts=a", *given, *TINY)
    assert not Path("runs").exists()


def test_embeddings_are_those_of_the_family(place):
    """Another encoder of prompts is another key of the cache."""
    Path("other.py").write_text(EXAMPLE.read_text().replace('return {"text": text,', 'return {"text": 2 * text,'))
    texts = []
    for name in ("own_family.py", "other.py", "own_family.py"):
        settings = pipelines.Settings(prompts="a red cat", family=f"{name}:PIXART")
        denoiser = models.build(models.describe("pixart", settings, "", Path("cache")))
        texts.append(denoiser.net.conditions(torch.tensor([0]), torch.float32)["text"])
    assert len(list(Path("cache").glob("embeddings-*"))) == 2
    assert torch.equal(texts[1], 2 * texts[0])
    assert torch.equal(texts[2], texts[0])
