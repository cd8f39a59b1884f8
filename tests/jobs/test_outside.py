"""What learners open by name: teachers, whose steps they take and what cannot teach; and stored images."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import rlfusion
from saved_models import CARD, scrambled
from tiny_runs import TINY

from rlfusion import models
from rlfusion.cli.arguments import settings_of
from rlfusion.common.errors import ConfigError
from rlfusion.config import Base
from rlfusion.data import load
from rlfusion.diffusion.chain import Chain
from rlfusion.diffusion.policy import Observation
from rlfusion.jobs import finetune
from rlfusion.jobs.outside import Opened
from rlfusion.jobs.parts import BaseSpec
from rlfusion.models import Config, pipelines

CHAIN = Chain(steps=4, guidance=1.0, guidance_rescale=0.5)


def opened(denoiser, card, chain: Chain = CHAIN, pipeline=None) -> Opened:
    base = BaseSpec("", Base(), pipeline or pipelines.Settings(), chain.negative, Path("runs"))
    return Opened(base, chain, card, chain.policy(denoiser, card.names))


def step(policy, card) -> torch.Tensor:
    """The mean of the second step from fixed states."""
    shape = policy.space.latent(card.shape)
    times = CHAIN.times(policy.denoiser)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return policy(Observation(x, times[1], times[2], torch.tensor([0, 1]))).mean


@pytest.mark.parametrize("guidance", [None, 0.0, 3.0])
def test_the_model_itself_teaches_as_it_was_under_its_own_guidance(guidance):
    denoiser = scrambled(CARD)
    teacher = opened(denoiser, CARD).teacher("", guidance)
    chain = CHAIN if guidance is None else Chain(steps=4, guidance=guidance, guidance_rescale=0.5 if guidance else 0.0)
    expected = step(chain.policy(scrambled(CARD), CARD.names), CARD)
    with torch.no_grad():
        for p in denoiser.parameters():
            p.add_(1.0)  # the student learns
    assert torch.equal(step(teacher, CARD), expected)
    assert not any(p.requires_grad for p in teacher.parameters())


def test_a_saved_model_teaches_and_its_digest_is_kept(tmp_path):
    models.save(tmp_path / "model", scrambled(CARD, 5), CARD)
    made = opened(scrambled(CARD), CARD)
    teacher = made.teacher(str(tmp_path), 0.0)
    assert torch.equal(step(teacher, CARD), step(Chain(steps=4).policy(scrambled(CARD, 5), CARD.names), CARD))
    assert made.inputs == {"agent.teacher": models.digest(tmp_path)}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"names": ("a", "b", "d")}, r"it is of 3 \(a, b, d\), expected those of the student, 3 \(a, b, c\)"),
        ({"shape": (1, 4, 4)}, r"its latents are \(1, 4, 4\), expected those of the student, \(1, 8, 8\)"),
        ({"config": replace(CARD.config, schedule="Rectified()")}, "its schedule is Rectified"),
    ],
)
def test_what_answers_of_something_else_cannot_teach(changes, said, tmp_path):
    card = replace(CARD, **changes)
    models.save(tmp_path / "model", models.build(card), card)
    with pytest.raises(ConfigError, match=rf"teacher = '.*': {said}"):
        opened(scrambled(CARD), CARD).teacher(str(tmp_path), None)


def test_another_kind_of_prediction_is_a_teacher_and_nothing_there_is_none(tmp_path):
    card = replace(CARD, config=Config("ResidualMLP(width=8, depth=1)", "Cosine()", "v"))
    models.save(tmp_path / "model", scrambled(card), card)
    taught = opened(scrambled(CARD), CARD).teacher(str(tmp_path), None)
    assert torch.equal(step(taught, CARD), step(CHAIN.policy(scrambled(card), card.names), CARD))
    with pytest.raises(ConfigError, match=r"teacher: .*nowhere"):
        opened(scrambled(CARD), CARD).teacher(str(tmp_path / "nowhere"), None)


def test_a_pipeline_teaches_by_its_guidance_and_another_autoencoder_is_seen(tiny_pipelines):
    given = pipelines.Settings(prompts="a red cat", size=16)
    name = str(tiny_pipelines["sd"])
    card = models.describe(name, given)
    chain = Chain(steps=4, spacing="model", guidance_scale=1.0)
    student = models.build(card)
    made = opened(student, card, chain, given)
    own, other = made.teacher("", 2.0), made.teacher(name, 2.0)
    guided = replace(chain, guidance_scale=None, guidance=2.0).policy(models.build(card), card.names)
    x = torch.randn(1, *made.policy.space.latent(card.shape), generator=torch.Generator().manual_seed(0))
    obs = Observation(x, *chain.times(student)[1:3], torch.tensor([0]))
    with torch.no_grad():
        means = [policy(obs).mean for policy in (own, other, guided, made.policy)]
    assert torch.equal(means[0], means[2])
    assert torch.equal(means[1], means[2])
    assert not torch.allclose(means[0], means[3])
    assert not made.inputs
    with torch.no_grad():
        for p in student.space.vae.parameters():
            p.mul_(1.5)
    with pytest.raises(ConfigError, match="its autoencoder is another one"):
        made.teacher(name, 2.0)


def test_a_run_is_taught_by_another_and_ends_in_the_same_bits_where_it_was_stopped(tiny_root, tmp_path):
    teach = ("finetune", "--agent", "opd", "--root", tiny_root, *TINY, "--agent.teacher", tiny_root / "first")
    whole = rlfusion(tmp_path, *teach, "--name", "opd-whole")
    assert whole.code == 0, whole.err
    short = rlfusion(tmp_path, *teach, "--name", "opd-parts", "--updates", 3)
    assert short.code == 0, short.err
    longer = rlfusion(tmp_path, "finetune", "--resume", tiny_root / "opd-parts", "--change", "updates=6")
    assert longer.code == 0, longer.err
    weights = [(tiny_root / name / "model" / "weights.safetensors").read_bytes() for name in ("opd-whole", "opd-parts")]
    assert weights[0] == weights[1]
    record = json.loads((tiny_root / "opd-parts" / "run.json").read_text())
    assert record["inputs"]["agent.teacher"] == models.digest(tiny_root / "first")


def stored_pairs(folder: Path, red: int = 0) -> str:
    """A table of two pairs of 8x16 images, black (or ``red``) and white, of the prompts b and a."""
    for level, color in (0, (red, 0, 0)), (255, (255, 255, 255)):
        Image.fromarray(np.full((8, 16, 3), color, dtype=np.uint8)).save(folder / f"{level}.png")
    rows = ("caption,jpg_0,jpg_1,label_0,label_1", "b,0.png,255.png,1,0", "a,0.png,255.png,0,1")
    (folder / "pairs.csv").write_text("\n".join(rows))
    return str(folder / "pairs.csv")


RGB = replace(CARD, shape=(3, 8, 8))


def test_stored_pairs_are_brought_to_the_model_and_to_its_prompts(tmp_path):
    made = opened(models.build(RGB), RGB)
    found = made.stored(stored_pairs(tmp_path))
    assert found.x.shape == (4, 3, 8, 8)
    assert found.x[:, 0, 0, 0].tolist() == [-1, 1, -1, 1]
    assert found.prompt.tolist() == [1, 1, 0, 0]
    assert found.score.tolist() == [1, 0, 0, 1]
    digest = dict(made.inputs)
    assert digest.keys() == {"agent.data"}
    text = (tmp_path / "pairs.csv").read_text()
    (tmp_path / "pairs.csv").write_text(text.replace("a,0.png,255.png,0,1", "a,0.png,255.png,1,0"))
    made.stored(str(tmp_path / "pairs.csv"))
    assert made.inputs != digest, "another preference is other data"


def test_grey_pictures_are_of_one_channel_for_a_model_of_one(tmp_path):
    found = opened(models.build(CARD), CARD).stored(stored_pairs(tmp_path))
    assert found.x.shape == (4, 1, 8, 8)
    assert found.x[:, 0, 0, 0].tolist() == [-1, 1, -1, 1]


@pytest.mark.parametrize(
    ("card", "said"),
    [
        (replace(RGB, names=("a", "c")), "1 of 2 are none of the model's classes: .*'b'"),
        (CARD, r"holds samples of 3x8x8, the model draws 1x8x8"),
        (replace(RGB, shape=(3, 8, 16)), r"holds samples of 3x16x16, the model draws 3x8x16"),
    ],
)
def test_stored_images_of_something_else_are_refused(card, said, tmp_path):
    data = stored_pairs(tmp_path, red=9)
    with pytest.raises(ConfigError, match=said):
        opened(models.build(card), card).stored(data)


def test_a_setting_without_data_is_refused():
    with pytest.raises(ConfigError, match=r"agent\.data = ''"):
        opened(scrambled(CARD), CARD).stored("")


def test_stored_images_are_encoded_for_a_pipeline(tiny_pipelines, tmp_path):
    given = pipelines.Settings(prompts="b\na", size=16)
    name = str(tiny_pipelines["sd"])
    (tmp_path / "prompts.txt").write_text("b\na")
    card = models.describe(name, replace(given, prompts=str(tmp_path / "prompts.txt")))
    student = models.build(card)
    found = opened(student, card, Chain(steps=2, spacing="model"), given).stored(stored_pairs(tmp_path))
    assert found.prompt.tolist() == [0, 0, 1, 1]
    white = torch.ones(1, *card.shape)
    torch.testing.assert_close(found.x[1:2], student.space.encode(white))


def test_a_run_on_stored_images_ends_in_the_same_bits_where_it_was_stopped(tiny_root, tmp_path):
    run = ("finetune", "--agent", "sft", "--root", tiny_root, *TINY, "--agent.data", "digits")
    whole = rlfusion(tmp_path, *run, "--name", "sft-whole")
    assert whole.code == 0, whole.err
    short = rlfusion(tmp_path, *run, "--name", "sft-parts", "--updates", 3)
    assert short.code == 0, short.err
    longer = rlfusion(tmp_path, "finetune", "--resume", tiny_root / "sft-parts", "--change", "updates=6")
    assert longer.code == 0, longer.err
    weights = [(tiny_root / name / "model" / "weights.safetensors").read_bytes() for name in ("sft-whole", "sft-parts")]
    assert weights[0] == weights[1]
    assert json.loads((tiny_root / "sft-whole" / "summary.json").read_text())["queries"] == 0
    assert set(json.loads((tiny_root / "sft-parts" / "run.json").read_text())["inputs"]) >= {"agent.data"}


@pytest.mark.parametrize("data", ["folder", "digits"])
def test_held_out_images_are_not_learned(data, tmp_path):
    card = models.Card(CARD.config, (1, 8, 8), tuple("0123456789"))
    card = card if data == "digits" else models.Card(CARD.config, (3, 8, 8), CARD.names)
    made = opened(scrambled(card), card)
    if data == "digits":
        found = made.stored("digits")
        learned, held = load("digits", 8).split(Base().held_out)
        assert len(found.x) == len(learned) < len(learned) + len(held)
        assert torch.equal(found.x, learned.x)
        return
    for part, value in (("train", 0), ("test", 255)):
        for name in card.names:
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("L", (8, 8), value).save(tmp_path / part / name / "0.png")
    found = made.stored(str(tmp_path))
    assert found.x.max() == -1
    assert len(found.x) == len(card.names)


@pytest.mark.parametrize(
    ("agent", "prompts", "settings", "said"),
    [
        ("sft", "c", {}, "2 of 2 are none of the model's prompts"),
        ("dpo", "c", {}, "2 of 2 are none of the model's prompts"),
        ("sft", "b\na", {"beta": 1.0}, "beta = 1: the images of .* have no scores"),
        ("sft", "b\na", {"data": "nowhere.csv"}, "nowhere.csv"),
        ("sft", "b\na", {"data": ""}, r"agent\.data = ''"),
        ("dpo", "x", {"data": "plain.csv"}, "it holds no preferences or scores"),
        ("dpo", "x", {"data": "scored.csv"}, "it gives no pair"),
    ],
)
def test_stored_images_that_do_not_fit_a_pipeline_are_refused_before_its_weights_are_read(
    agent, prompts, settings, said, tiny_pipelines, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    settings = {"data": stored_pairs(tmp_path), **settings}
    (tmp_path / "plain.csv").write_text("file_name,caption\n0.png,x\n255.png,x")
    (tmp_path / "scored.csv").write_text("file_name,caption,score\n0.png,x,1\n255.png,x,1")
    (tmp_path / "prompts.txt").write_text(prompts)
    words = ["--model", str(tiny_pipelines["sd"]), "--pipeline.prompts", "prompts.txt", "--pipeline.size", "16"]
    words += ["--agent", agent, "--lora", "LoRA(rank=2)", "--reward", "jpeg_compressibility"]
    told = settings_of("finetune", [*words, *(f"--agent.{name}={value}" for name, value in settings.items())])
    for module in (models, pipelines):
        monkeypatch.setattr(module, "build", lambda *about, **named: pytest.fail("weights are read"), raising=False)
    with pytest.raises(ConfigError, match=said):
        finetune.check(told)
