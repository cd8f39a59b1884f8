"""CLIP rewards against open_clip's own towers and transforms, transformers' CLIP, finite differences; files, errors."""

import json
import logging
import math

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from rounding import ROUNDING
from torch import nn

from rlfusion.common import hub
from rlfusion.common.errors import ConfigError
from rlfusion.evaluation import require_independent
from rlfusion.evaluation.classifier import JUDGE
from rlfusion.nets.classifier import Classifier
from rlfusion.rewards import build, score, task_info
from rlfusion.rewards.clip import towers
from rlfusion.rewards.clip.checkpoints import read_tensors
from rlfusion.rewards.clip.names import renamed
from rlfusion.rewards.clip.preprocessing import Preprocess
from rlfusion.rewards.clip.small import SmallClip
from rlfusion.rewards.clip.texts import fill, fill_all

PROMPTS = ("cat", "7", "two dogs")
SMALL = SmallClip(width=32, layers=2, embed=16, image=16, patch=4)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def pixels(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small CLIP of random weights, in a folder."""
    config, preprocess = SMALL.described((3, 16, 16))
    path = tmp_path_factory.mktemp("clip")
    towers.save(path, towers.build(config, seed=1), config, preprocess | {"mean": MEAN, "std": STD})
    return path


def reward(name, folder, **options):
    given = {"model": str(folder), **options}
    return build(name, {name: given}, task_info(PROMPTS, (3, 16, 16)))


def theirs(folder):
    """What open_clip itself makes of the folder: model, transform, tokenizer."""
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    return model.eval(), transform, open_clip.get_tokenizer(f"local-dir:{folder}")


def pil(x):
    array = (x * 255).round().to(torch.uint8).numpy()
    return Image.fromarray(array[0], "L") if len(array) == 1 else Image.fromarray(np.moveaxis(array, 0, -1), "RGB")


def eight_bits(x):
    return (x * 255).round() / 255


# --- preprocessing ---

SIZES = [(16, 16), (16, 40), (37, 16), (224, 224), (5, 7), (61, 33), (9, 31), (17, 15), (100, 31)]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [16, (12, 20)])
def test_preprocessing_is_open_clips_transform(size, mode, interpolation):
    """On noise, the hardest image, whose passes overshoot everywhere, and on a smooth one; up, down and odd aspects.

    Where Pillow's versions differ, in the order of the passes, the noise is too faint to be clamped between them.
    """
    described = {"size": size, "mean": MEAN, "std": STD, "interpolation": interpolation, "resize_mode": mode}
    transform = image_transform_v2(PreprocessCfg(**described, fill_color=40), is_train=False)
    ours = Preprocess.of(described | {"fill_color": 40})
    worst = []
    for height, width in SIZES:
        ramp = torch.linspace(0, 1, height)[:, None] * torch.linspace(1, 0.2, width)
        tall, wide = (to / of for to, of in zip(ours.target(height, width), (height, width)))
        faint = 0.5 if tall < 1 and tall < 1.1 * wide else 1.0
        noise = [0.5 + faint * (pixels(c, height, width) - 0.5) for c in (1, 3)]
        for x in (*noise, ramp.expand(3, -1, -1)):
            wanted = transform(pil(x))
            found = ours(eight_bits(x)[None])[0]
            assert found.shape == wanted.shape
            off = (found - wanted).abs() * torch.tensor(STD)[:, None, None] * 255
            worst.append((off.max().item(), off.quantile(0.9).item()))
    assert max(top for top, _ in worst) < 2.0
    assert max(most for _, most in worst) < 1.1


def test_what_needs_no_resizing_passes_unchanged_and_grey_has_three_equal_channels():
    preprocess = Preprocess((8, 8), (0.5,) * 3, (0.25,) * 3)
    x = pixels(2, 1, 8, 8)
    assert torch.equal(preprocess(x), ((x - 0.5) / 0.25).expand(-1, 3, -1, -1))
    with pytest.raises(ConfigError, match="2 channels"):
        preprocess(pixels(1, 2, 8, 8))
    with pytest.raises(ConfigError, match="resize_mode = 'fit'"):
        Preprocess((8, 8), MEAN, STD, resize_mode="fit")


def test_descriptions_of_open_clip_are_understood():
    found = Preprocess.of(
        {"size": [8, 12], "mean": 0.5, "std": [0.1, 0.2, 0.3], "interpolation": "random", "mode": "RGB"}
    )
    assert found == Preprocess((8, 12), (0.5,) * 3, (0.1, 0.2, 0.3))


# --- scores ---


@pytest.fixture(scope="module")
def encoded(folder):
    """open_clip's own unit embeddings of 8-bit images of another size, and of the prompts."""
    model, transform, tokenizer = theirs(folder)
    x = eight_bits(pixels(5, 3, 24, 19, seed=3))
    with torch.no_grad():
        images = model.encode_image(torch.stack([transform(pil(one)) for one in x]), normalize=True)
        texts = model.encode_text(tokenizer([f"a photo of a {p}" for p in PROMPTS]), normalize=True)
    return x, torch.tensor([0, 1, 2, 1, 0]), images, texts, model.logit_scale.exp().item()


def test_scores_are_those_of_open_clips_own_embeddings(folder, encoded):
    """To what 8 bits in the middle of the preprocessing make of a cosine."""
    x, cond, images, texts, scale = encoded
    cosine = (images * texts[cond]).sum(1)
    logits = scale * images @ texts.T
    template, close = {"template": "a photo of a {}"}, {"atol": 2e-3, "rtol": 0}
    torch.testing.assert_close(reward("clip_score", folder, **template)(x, cond), cosine, **close)
    torch.testing.assert_close(reward("clip_score", folder, scale=100, **template)(x, cond) / 100, cosine, **close)
    torch.testing.assert_close(reward("hps_v2", folder, resize_mode="shortest", **template)(x, cond), cosine, **close)
    torch.testing.assert_close(reward("pick_score", folder, **template)(x, cond) / scale, cosine, **close)
    probability = logits.softmax(1)[range(5), cond]
    torch.testing.assert_close(reward("clip_class", folder, **template)(x, cond), probability, atol=2e-2, rtol=0)
    log = reward("clip_class", folder, log=True, **template)(x, cond)
    torch.testing.assert_close(log.exp(), reward("clip_class", folder, **template)(x, cond), **ROUNDING)


def test_on_what_is_preprocessed_the_same_scores_agree_to_rounding(folder, encoded):
    _, cond, _, texts, scale = encoded
    model = theirs(folder)[0]
    x = pixels(5, 3, 16, 16)
    with torch.no_grad():
        images = model.encode_image((x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None], True)
    cosine = (images * texts[cond]).sum(1)
    torch.testing.assert_close(reward("clip_score", folder, template="a photo of a {}")(x, cond), cosine, **ROUNDING)
    torch.testing.assert_close(reward("hps_v2", folder, template="a photo of a {}")(x, cond), cosine, **ROUNDING)
    torch.testing.assert_close(
        reward("pick_score", folder, template="a photo of a {}")(x, cond), scale * cosine, **ROUNDING
    )
    own = scale * images @ texts.T
    torch.testing.assert_close(
        reward("clip_class", folder, template="a photo of a {}")(x, cond), own.softmax(1)[range(5), cond], **ROUNDING
    )


def test_the_published_human_preference_score_looks_at_the_whole_image(folder):
    x, cond = pixels(2, 3, 16, 40), torch.tensor([0, 1])
    kept = x.clone()
    kept[:, :, :, :4] = 0  # beside the middle
    assert torch.equal(reward("clip_score", folder)(x, cond), reward("clip_score", folder)(kept, cond))
    assert not torch.allclose(reward("hps_v2", folder)(x, cond), reward("hps_v2", folder)(kept, cond))


def test_several_templates_are_one_mean_embedding(folder):
    clip = towers.load(str(folder))
    one, two = clip.table("a {}", PROMPTS), clip.table("the {word}", PROMPTS)
    torch.testing.assert_close(
        clip.table(["a {}", "the {word}"], PROMPTS), nn.functional.normalize(one + two, dim=1), **ROUNDING
    )
    assert not torch.allclose(one, two)
    torch.testing.assert_close(one.norm(dim=1), torch.ones(3), **ROUNDING)


def test_a_text_that_fills_all_tokens_is_told(folder):
    with pytest.warns(UserWarning, match="1 of 3 texts fill the 16 tokens"):
        towers.load(str(folder)).table("{}", ("cat", "word " * 20, "dog"))


def test_templates():
    assert fill("a handwritten {word}", "7") == "a handwritten seven"
    assert fill("{} or {word}", "7 cats") == "7 cats or seven cats"
    assert fill("{}", "{curly}") == "{curly}"
    assert fill_all(["{}", "a {}"], ["b", "c"]) == [["b", "c"], ["a b", "a c"]]
    assert fill_all("{0}, {0}, {word}", ["7"]) == [["7, 7, seven"]]
    odd = (
        "{} {}",
        "{} {0}",
        "{:d}",
        "{!x}",
        "{word:>9999999999}",
        "{:{}}",
        "{1}",
        "{0[0]}",
        "{word.upper}",
        "}",
        "{{}}",
    )
    for template in ("a cat", "{name}", "{", "", [], *odd):
        with pytest.raises(ConfigError, match="template = "):
            fill_all(template, ["b"])
    with pytest.raises(ConfigError, match="prompts"):
        fill_all("{}", [])


def test_likeness_to_a_reference(folder, tmp_path):
    x = eight_bits(pixels(3, 3, 16, 16))
    files = [str(tmp_path / f"{i}.png") for i in range(3)]
    for one, file in zip(x, files):
        pil(one).save(file)
    cond = torch.arange(3)
    own = reward("clip_similarity", folder, reference=files)
    torch.testing.assert_close(own(x, cond), torch.ones(3), **ROUNDING)
    first = reward("clip_similarity", folder, reference=files[0], scale=2.0)
    torch.testing.assert_close(first(x, cond), 2 * (own.features(x) * own.features(x[:1])).sum(1), **ROUNDING)
    assert first(x, cond)[1] < 2 - 1e-4
    with pytest.raises(ConfigError, match="2 images: expected one, or one for each of 3"):
        reward("clip_similarity", folder, reference=files[:2])
    with pytest.raises(ConfigError, match=r"absent\.png"):
        reward("clip_similarity", folder, reference="absent.png")


class Head(nn.Module):
    """The published layout of "improved aesthetic predictor", of other widths."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(16, 8), nn.Dropout(0.2), nn.Linear(8, 6), nn.Dropout(0.2), nn.Linear(6, 4), nn.Dropout(0.1),
            nn.Linear(4, 3), nn.Linear(3, 1),
        )  # fmt: skip


def test_aesthetic_heads_of_both_published_layouts(folder, tmp_path):
    torch.manual_seed(0)
    head, linear, x = Head().eval(), nn.Linear(16, 1), pixels(4, 3, 16, 16)
    torch.save(head.state_dict(), tmp_path / "mlp.pth")
    torch.save(linear.state_dict(), tmp_path / "linear.pth")
    mlp = reward("aesthetic", folder, checkpoint="", head=str(tmp_path / "mlp.pth"))
    features = mlp.features(x)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(4), **ROUNDING)
    torch.testing.assert_close(mlp(x, None), head.layers(features)[:, 0], **ROUNDING)
    plain = reward("aesthetic", folder, checkpoint="", head=str(tmp_path / "linear.pth"))
    torch.testing.assert_close(plain(x, None), linear(features)[:, 0], **ROUNDING)
    torch.save(nn.Linear(17, 1).state_dict(), tmp_path / "wide.pth")
    with pytest.raises(ConfigError, match=r"reads 17 numbers: the embeddings of .* have 16"):
        reward("aesthetic", folder, checkpoint="", head=str(tmp_path / "wide.pth"))
    torch.save({"layers.0.weight": torch.zeros(4, 16), "layers.0.bias": torch.zeros(4)}, tmp_path / "part.pth")
    with pytest.raises(ConfigError, match=r"layers\.0\.weight.*expected weight \(1, d\)"):
        reward("aesthetic", folder, checkpoint="", head=str(tmp_path / "part.pth"))


# --- gradients, precision, workers ---

ALL = {
    "clip_score": {},
    "clip_class": {"log": True},
    "hps_v2": {},
    "pick_score": {},
    "clip_similarity": {"reference": "reference.png"},
    "aesthetic": {"checkpoint": "", "head": "head.pth"},
}


@pytest.fixture
def made(folder, tmp_path, monkeypatch):
    """A reward by its name, with the files that it needs."""
    monkeypatch.chdir(tmp_path)
    pil(pixels(3, 16, 16, seed=9)).save("reference.png")
    torch.manual_seed(0)
    torch.save(Head().state_dict(), "head.pth")
    return lambda name, **more: reward(name, folder, **ALL[name], **more)


@pytest.mark.parametrize("name", ALL)
def test_gradients_match_finite_differences(name, made):
    """Through a resize that overshoots nowhere: grey pixels of middling contrast, 12 x 10 to 16 x 16."""
    one = made(name).double()
    x = 0.3 + 0.4 * pixels(2, 1, 12, 10, dtype=torch.float64)
    cond, leaf, h = torch.tensor([1, 2]), x.clone().requires_grad_(), 1e-6
    score(one, leaf, cond, name).sum().backward()
    directions = torch.randn(6, *x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for v in directions:
        slope = (one(x + h * v, cond) - one(x - h * v, cond)).sum() / (2 * h)
        torch.testing.assert_close((leaf.grad * v).sum(), slope, rtol=1e-5, atol=1e-9)
    assert leaf.grad.abs().max() > 1e-5
    assert all(not p.requires_grad for p in one.parameters())
    assert not one.training or not any(m.training for m in one.visual.modules())


@pytest.mark.parametrize("name", ALL)
def test_a_worker_completes_a_blank_from_the_state_dict(name, made, monkeypatch, tmp_path):
    whole, x, cond = made(name), pixels(3, 3, 20, 16), torch.tensor([0, 2, 1])
    blank = json.loads(json.dumps(ALL[name] | whole.blank()))
    monkeypatch.chdir(tmp_path.parent)  # no file is within reach
    other = build(name, {name: blank}, task_info(PROMPTS, (3, 16, 16)))
    assert not torch.allclose(other(x, cond), whole(x, cond))
    other.load_state_dict(whole.state_dict())
    assert torch.equal(other(x, cond), whole(x, cond))
    assert not any("transformer" in key and not key.startswith("visual") for key in whole.state_dict())


def test_the_batch_of_the_tower_changes_nothing_and_bfloat16_little(folder):
    x, cond = pixels(7, 3, 16, 16), torch.arange(7) % 3
    plain = reward("clip_score", folder)(x, cond)
    torch.testing.assert_close(reward("clip_score", folder, batch=2)(x, cond), plain, **ROUNDING)
    half = reward("clip_score", folder, precision="bfloat16")(x, cond)
    assert half.dtype == torch.float32
    assert 0 < (half - plain).abs().max() < 0.03
    with pytest.raises(ConfigError, match="precision = int8 of reward 'clip_score'"):
        reward("clip_score", folder, precision="int8")
    with pytest.raises(ConfigError, match="batch = 0"):
        reward("clip_score", folder, batch=0)


def test_the_judge_is_independent_of_a_clip(made):
    judge = Classifier(JUDGE.kind, (1, 8, 8), 10)
    require_independent(judge, build({"ink": 1.0}))
    require_independent(judge, made("clip_score"))


@pytest.mark.parametrize("cond", [None, torch.zeros(4), torch.zeros(3, dtype=torch.int64), torch.full((4,), 3)])
@pytest.mark.parametrize("name", ["clip_score", "clip_class"])
def test_a_condition_that_is_no_prompt_is_refused(name, cond, folder):
    with pytest.raises(ConfigError, match="label"):
        reward(name, folder)(pixels(4, 3, 16, 16), cond)


# --- weights by name, path and hub ---


def test_a_checkpoint_by_path_in_each_format(folder, tmp_path, monkeypatch):
    """An architecture by name with a file: safetensors, a torch file, one wrapped as training scripts write it."""
    described = json.loads((folder / towers.DESCRIPTION).read_text())["model_cfg"]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-one", described)
    state = read_tensors(folder / towers.WEIGHTS, "it")
    torch.save(state, tmp_path / "a.pt")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, tmp_path / "b.pt")
    x, cond = pixels(2, 3, 16, 16), torch.tensor([0, 1])
    wanted = reward("clip_score", folder)(x, cond)
    for file in (folder / towers.WEIGHTS, tmp_path / "a.pt", tmp_path / "b.pt"):
        torch.testing.assert_close(reward("clip_score", "tiny-one", checkpoint=str(file))(x, cond), wanted, **ROUNDING)
    with pytest.raises(ConfigError, match=r"checkpoint = '': expected the path of a file .* tiny-one"):
        reward("clip_score", "tiny-one")
    torch.save({k: v for k, v in state.items() if k != "visual.proj"}, tmp_path / "c.pt")
    with pytest.raises(ConfigError, match=r"another architecture .*visual\.proj"):
        reward("clip_score", "tiny-one", checkpoint=str(tmp_path / "c.pt"))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, file: str(tmp_path / f"{repo[-1]}.pt"))
    torch.testing.assert_close(
        reward("clip_score", "tiny-one", checkpoint="hf-hub:me/a/file.pt")(x, cond), wanted, **ROUNDING
    )


class Trap:
    def __reduce__(self):
        return print, ("a pickle was run",)


def test_no_pickle_is_run(tmp_path, capsys):
    torch.save({"state_dict": Trap()}, tmp_path / "bad.pt")
    with pytest.raises(ConfigError, match="nothing but tensors"):
        read_tensors(tmp_path / "bad.pt", "checkpoint")
    (tmp_path / "bad.safetensors").write_bytes(b"12345678")
    with pytest.raises(ConfigError, match=r"bad\.safetensors.*cannot be read"):
        read_tensors(tmp_path / "bad.safetensors", "checkpoint")
    assert "run" not in capsys.readouterr().out


def test_weights_of_transformers_clip(tmp_path, monkeypatch):
    """PickScore is published as one. The same embeddings as transformers' own towers, images and texts."""
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=shape | {"vocab_size": 49408, "max_position_embeddings": 16, "hidden_act": "gelu"},
        vision_config=shape | {"image_size": 16, "patch_size": 4, "hidden_act": "gelu"},
        projection_dim=16,
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    for p in model.parameters():  # biases and norms too, so that none may be lost
        nn.init.normal_(p, std=0.2)
    model.save_pretrained(tmp_path)
    described, _ = SMALL.described((3, 16, 16))
    described["vision_cfg"] |= {"pool_type": "tok", "final_ln_after_pool": False}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-one", described)
    clip = towers.load("tiny-one", str(tmp_path / "model.safetensors"))
    x, texts = pixels(3, 3, 16, 16), ["a cat", "seven dogs", "x"]
    tokens = towers.tokenizer(16)(texts)
    with torch.no_grad():
        images = model.visual_projection(model.vision_model(x).pooler_output)
        at_end = model.text_model(tokens).last_hidden_state[range(3), tokens.argmax(1)]
        text = nn.functional.normalize(model.text_projection(at_end), dim=1)
    torch.testing.assert_close(clip.visual(x), images, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(clip.encode(texts), text, rtol=1e-4, atol=1e-4)
    assert clip.logit_scale == pytest.approx(math.exp(model.logit_scale.item()))
    assert "vision_model.odd" in renamed({"vision_model.odd": torch.zeros(1)})


def test_damage_and_what_is_missing_are_named(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"unknown open_clip architecture 'ViT-H-41'.*did you mean"):
        towers.load("ViT-H-41")
    with pytest.raises(ConfigError, match=r"open_clip_config\.json, or a run of train-clip"):
        towers.load(str(tmp_path))
    with pytest.raises(ConfigError, match=r"checkpoint = 'openai': model = .* comes with its weights"):
        towers.load(str(folder), "openai")
    with pytest.raises(ConfigError, match=r"checkpoint = 'laion': .*laion2b_s32b_b79k"):
        towers.load("ViT-H-14", "laion")
    copy = tmp_path / "run" / "clip"
    copy.mkdir(parents=True)
    (copy / towers.DESCRIPTION).write_bytes((folder / towers.DESCRIPTION).read_bytes())
    with pytest.raises(ConfigError, match=r"expected open_clip_model\.safetensors"):
        towers.load(str(tmp_path / "run"))
    blob = bytearray((folder / towers.WEIGHTS).read_bytes())
    blob[-1] ^= 1
    (copy / towers.WEIGHTS).write_bytes(blob)
    with pytest.raises(ConfigError, match="damaged"):
        towers.load(str(tmp_path / "run"))
    (copy / towers.DESCRIPTION).write_text("{")
    with pytest.raises(ConfigError, match=r"open_clip_config\.json"):
        towers.load(str(tmp_path / "run"))


def test_a_folder_of_weights_does_not_ask_the_hub_and_leaves_the_log_as_it_is(folder, monkeypatch):
    """open_clip's first line would give the root logger a handler, which writes ours in a form of its own."""
    monkeypatch.setattr(hub, "unreachable", lambda: pytest.fail("the hub was asked"))
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    towers.load(str(folder), "")
    assert logging.getLogger().handlers == []


def test_without_network_the_error_says_what_to_provide(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network here")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    monkeypatch.setattr("open_clip.pretrained.hf_hub_download", offline)
    told = task_info(PROMPTS, (3, 16, 16))
    for name, said in (
        ("hps_v2", r"HPS_v2\.1_compressed\.pt.*no network here.*the path of HPS_v2\.1_compressed\.pt"),
        ("pick_score", r"PickScore_v1/model\.safetensors.*the path of model\.safetensors"),
        ("aesthetic", r"aesthetic-model\.pth.*the path of aesthetic-model\.pth"),
    ):
        with pytest.raises(ConfigError, match=said):
            build(name, task_info=told)
    for model, checkpoint in (("ViT-B-32", "laion2b_s34b_b79k"), ("hf-hub:me/it", "")):
        with pytest.raises(ConfigError, match=f"model = '{model}'.*expected a network, or a file or folder"):
            towers.load(model, checkpoint)
    with pytest.raises(ConfigError, match="expected hf-hub:OWNER/REPO/FILE"):
        towers.load("ViT-B-32", "hf-hub:me/it")
    with pytest.raises(ConfigError, match=r"unknown version of hps_v2 '3\.0'"):
        build("hps_v2", {"hps_v2": {"version": "3.0"}}, told)


def test_an_architecture_whose_weights_do_not_come_is_refused(monkeypatch, folder):
    """open_clip goes on with random weights where a hub has the description alone."""

    def half(repo_id, filename, **kwargs):
        if filename.endswith(".json"):
            return str(folder / towers.DESCRIPTION)
        raise OSError("no weights here")

    monkeypatch.setattr("open_clip.pretrained.hf_hub_download", half)
    with pytest.raises(ConfigError, match=r"model = 'hf-hub:me/it'.*cannot be loaded"):
        towers.load("hf-hub:me/it")


def test_weights_of_another_activation_are_refused(monkeypatch, tmp_path, folder):
    """open_clip only warns where a tag's weights were trained with QuickGELU and the architecture has GELU."""
    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda *args, **kwargs: str(folder / towers.WEIGHTS))
    with pytest.raises(ConfigError, match="QuickGELU mismatch"):
        towers.load("ViT-B-32", "openai")


def test_building_touches_no_other_draw():
    state = torch.get_rng_state()
    build("clip_score", task_info=task_info(PROMPTS, (1, 8, 8)))
    assert torch.equal(torch.get_rng_state(), state)
