"""Training a small CLIP: its loss against open_clip's and by hand, learning, resuming, and its use as a reward."""

import json
import math
import shutil
import signal
from functools import partial

import open_clip
import pytest
import torch
import yaml
from processes import Process, rlfusion
from rounding import ROUNDING
from tiny_runs import TINY

from rlfusion import models
from rlfusion.common.errors import ConfigError
from rlfusion.common.progress import Progress
from rlfusion.common.stops import Signals
from rlfusion.config import Finetune, TrainClip
from rlfusion.data import Dataset, digits
from rlfusion.jobs import train_clip
from rlfusion.jobs.measure import Unjudged, make_reward
from rlfusion.jobs.parts import opened
from rlfusion.jobs.tasks import recipe
from rlfusion.jobs.train_clip import ANY, HANDWRITTEN, loss, rate, templates_of
from rlfusion.rewards.clip import towers
from rlfusion.rewards.clip.small import SmallClip
from rlfusion.rollout import Recipe

QUICK = ("--steps", 40, "--batch", 16, "--model.width", 16, "--model.layers", 1, "--checkpoint_every", 10)


def unit(*shape, seed):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=-1)


def test_with_one_image_a_text_the_loss_is_that_of_open_clip():
    images, texts, scale = unit(5, 3, seed=0), unit(5, 3, seed=1), torch.tensor(7.0, dtype=torch.float64)
    theirs = open_clip.ClipLoss()(images, texts, scale)
    torch.testing.assert_close(loss(images, texts, torch.arange(5), scale), theirs)


def test_images_of_one_text_are_no_negatives_of_each_other():
    """Two images of text 0, one of text 1, in the plane: worked by hand."""
    images = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    texts, place = torch.eye(2), torch.tensor([0, 0, 1])
    s = [[2.0, 0.0], [1.2, 1.6], [0.0, 2.0]]
    exp = [[math.exp(v) for v in row] for row in s]
    of_images = [math.log(sum(exp[i])) - s[i][p] for i, p in enumerate(place)]
    columns = [sum(row[j] for row in exp) for j in range(2)]
    of_texts = [math.log(columns[0]) - (2.0 + 1.2) / 2, math.log(columns[1]) - 2.0]
    wanted = sum(of_images) / 6 + sum(of_texts) / 4
    assert loss(images, texts, place, torch.tensor(2.0)).item() == pytest.approx(wanted, rel=1e-6)


def test_the_rate_rises_and_falls():
    assert rate(0) == 0
    assert rate(0.05) == pytest.approx(0.5)
    assert rate(0.5) == pytest.approx(0.5)
    assert rate(0.999) < 1e-4


def test_templates_suit_the_names():
    data = digits()
    other = Dataset(data.x[:4], torch.tensor([0, 0, 1, 1]), ("cat", "dog"))
    assert templates_of([], data) == HANDWRITTEN
    assert templates_of([], other) == ANY
    assert templates_of(["my {}"], other) == ("my {}",)
    assert templates_of([], Dataset(other.x, other.label, ("a cat", "a dog"), captioned=True)) == ("{}",)


def test_sizes_that_cannot_be_are_refused():
    assert SmallClip().described((1, 8, 8))[0]["vision_cfg"]["patch_size"] == 4
    assert SmallClip().described((3, 65, 70))[0]["vision_cfg"]["image_size"] == 32
    assert SmallClip().described((3, 30, 31))[0]["vision_cfg"]["image_size"] == 28
    with pytest.raises(ConfigError, match="patch = 3"):
        SmallClip(patch=3).described((1, 8, 8))
    with pytest.raises(ConfigError, match="heads = 3"):
        SmallClip(heads=3)
    with pytest.raises(ConfigError, match="template = 'a digit'"):
        train_clip.check(TrainClip(templates=["a digit"]))
    with pytest.raises(ConfigError, match="held_out"):
        TrainClip(held_out=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A root with a small CLIP, ``runs/it``."""
    cwd = tmp_path_factory.mktemp("clip")
    made = rlfusion(cwd, "train-clip", "--name", "it", *QUICK)
    assert made.code == 0, made.err
    assert "zero_shot" in made.out
    return cwd


def test_the_folder_is_open_clips_own(folder):
    run = folder / "runs" / "it"
    assert 0 <= json.loads((run / "evaluation.json").read_text())["zero_shot"] <= 1
    model = open_clip.create_model(f"local-dir:{run / 'clip'}").eval()
    texts = ["a handwritten seven", "two"]
    tokens = open_clip.get_tokenizer(f"local-dir:{run / 'clip'}")(texts)
    ours = towers.load(str(run))
    torch.testing.assert_close(ours.encode(texts), model.encode_text(tokens, normalize=True), **ROUNDING)
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(ours.visual(x), model.encode_image(x), **ROUNDING)


def test_a_stopped_training_is_code_75_and_goes_on_to_the_same_bits(folder, tmp_path):
    process = Process(tmp_path, "train-clip", "--name", "it", *QUICK)
    stopped = process.once((tmp_path / "runs" / "it" / "checkpoints").exists, signal.SIGTERM).wait()
    assert stopped.code == 75, stopped.err
    assert not (tmp_path / "runs" / "it" / "clip").exists()
    resumed = rlfusion(tmp_path, "train-clip", "--resume", "runs/it")
    assert resumed.code == 0, resumed.err
    name = "runs/it/clip/open_clip_model.safetensors"
    assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_it_learns_to_read(tmp_path):
    """Three digits, in a few seconds; chance is 1/3."""
    data = digits()
    keep = data.label < 3
    few = Dataset(data.x[keep], data.label[keep], data.names[:3])
    train, held_out = few.split(0.25)
    config = TrainClip(steps=120, batch=32, model=SmallClip(width=32, layers=1), lr=2e-3, device="cpu")
    train_clip.fit(config, train, tmp_path, Signals(), Progress(quiet=True))
    for template in ("a handwritten {word}", "{}"):
        assert train_clip.zero_shot(tmp_path, template, held_out) > 0.8


@pytest.fixture(scope="module")
def options(folder):
    return yaml.safe_dump({"clip_score": {"model": str(folder / "runs" / "it"), "template": "a handwritten {word}"}})


def test_a_worker_scores_the_same_without_the_folder(folder, tmp_path, options, tiny_root):
    """The recipe of a task, through JSON and bytes as to another machine."""
    shutil.copytree(folder / "runs" / "it", tmp_path / "it")
    told = yaml.safe_load(options)
    told["clip_score"]["model"] = str(tmp_path / "it")
    config = Finetune(base=str(tiny_root / "first"), reward={"clip_score": 1.0, "ink": 0.5}, reward_options=told)
    denoiser, card = models.load(tiny_root / "first")
    policy = config.chain.policy(denoiser, card.names)
    reward = make_reward(config.reward, config.reward_options, digits(), tmp_path)
    parts = opened(config)
    made = recipe(parts.task, parts.workers, card, policy, reward, torch.device("cpu"))
    shutil.rmtree(tmp_path / "it")
    task = Recipe.from_text(made.builder, made.text, made.blobs).build()
    x, cond = torch.rand(4, 1, 8, 8), torch.tensor([7, 0, 3, 7])
    assert torch.equal(task.reward(x, cond), reward(x, cond))


@pytest.mark.parametrize("agent", ["draft", "refl"])
def test_gradients_go_through_it(agent, options, tiny_root):
    how = ("--root", tiny_root, "--reward", "clip_score", "--reward_options", options, "--agent", agent)
    micro = [word for word in TINY if word not in ("--agent.micro_batch", 64)]
    said = rlfusion(tiny_root, "finetune", *micro, *how, "--name", f"clip-{agent}", "--updates", 2)
    assert said.code == 0, said.err
    assert models.load(tiny_root / f"clip-{agent}")


def test_without_a_model_one_is_trained_on_the_data_and_kept(tmp_path, monkeypatch):
    quick = partial(TrainClip, steps=3, batch=8, model=SmallClip(width=16, layers=1))
    monkeypatch.setattr(train_clip, "TrainClip", quick)
    data = digits()
    made = make_reward("clip_score", {}, data, tmp_path)
    (cached,) = (tmp_path / "cache").glob("clip-*")
    clip = towers.load(str(cached))
    assert torch.equal(made.table, clip.table("a handwritten {word}", data.names))
    monkeypatch.setattr(train_clip, "fit", None)  # not again
    other = make_reward({"clip_class": 1.0, "ink": 1.0}, {"clip_class": {"template": "{}"}}, data, tmp_path)
    assert torch.equal(other.rewards["clip_class"].table, clip.table("{}", data.names))
    given = make_reward("clip_score", {"clip_score": {"model": str(cached)}}, data, tmp_path)
    assert torch.equal(given.table, clip.table("{}", data.names))


@pytest.mark.parametrize("name", ["clip_score", "clip_class", "clip_similarity", "class_logprob"])
def test_without_data_a_reward_without_weights_is_refused(name, tmp_path):
    with pytest.raises(ConfigError, match=f"reward '{name}' has no data to learn from"):
        Unjudged((3, 8, 8), ("a cat", "a dog")).reward({name: 1.0, "ink": 1.0}, {}, tmp_path)
