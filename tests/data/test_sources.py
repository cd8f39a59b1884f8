"""Data sources: Hugging Face data sets, captions, augmentation; what is wrong is named."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from processes import rlfusion
from tiny_runs import TINY

from rlfusion import models
from rlfusion.common.errors import ConfigError
from rlfusion.common.seeding import stream
from rlfusion.data import Dataset, captioned, digits, load
from rlfusion.data.augment import Augment
from rlfusion.nets.captions import Captions, words
from rlfusion.pretrain import Config, Learner

SMALL = ("--size", 8, "--train.steps", 20, "--train.batch", 8, "--evaluation.samples", 60, "--chain.steps", 2)
SMALL = (*SMALL, "--model.net", "ResidualMLP(width=16, depth=1)")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def pictures(n: int = 12) -> list[Image.Image]:
    """Squares of their own brightness."""
    return [Image.fromarray(np.full((10, 10, 3), 20 * i, np.uint8)) for i in range(n)]


@pytest.fixture(scope="module")
def table():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]), text=datasets.Value("string")
    )
    rows = {"image": pictures(), "label": [i % 2 for i in range(12)], "text": [f"grey {i % 3}" for i in range(12)]}
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.fixture
def places(table, tmp_path) -> dict[str, str]:
    import datasets

    table.save_to_disk(str(tmp_path / "disk"))
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "dict"))
    table.to_parquet(str(tmp_path / "rows.parquet"))
    (tmp_path / "parquets").mkdir()
    table.to_parquet(str(tmp_path / "parquets" / "part-0.parquet"))
    return {name: str(tmp_path / name) for name in ("disk", "dict", "rows.parquet", "parquets")}


@pytest.mark.parametrize("place", ["disk", "dict", "rows.parquet", "parquets"])
def test_a_hugging_face_data_set_from_every_place(place, places):
    data = load(f"hf(path={places[place]!r}, label='label')", 8)
    assert (len(data), data.shape, data.names, data.levels) == (12, (3, 8, 8), ("cat", "dog"), 256)
    assert data.label.tolist() == [i % 2 for i in range(12)]
    torch.testing.assert_close(data.x[:, 0, 0, 0], torch.arange(12.0) * 20 / 127.5 - 1)


def test_an_image_folder_of_the_library(tmp_path):
    for i, picture in enumerate(pictures(4)):
        (tmp_path / "abc"[i % 2]).mkdir(exist_ok=True)
        picture.save(tmp_path / "abc"[i % 2] / f"{i}.png")
    data = load(f"hf(path={str(tmp_path)!r}, label='label')", 8)
    assert data.names == ("a", "b")
    assert sorted(data.label.tolist()) == [0, 0, 1, 1]


def test_classes_that_are_named_by_numbers_keep_their_pictures(tmp_path):
    """Folders 0, 1, 10, 11, 2: the library's classes are in that order, so that class 2 is folder 10."""
    pytest.importorskip("datasets")
    for name, picture in zip(("0", "1", "2", "10", "11"), pictures(5)):
        (tmp_path / name).mkdir()
        picture.save(tmp_path / name / "a.png")
    data = load(f"hf(path={str(tmp_path)!r}, label='label')", 8)
    assert data.names == ("0", "1", "10", "11", "2")
    shown = {data.names[c]: round((x[0, 0, 0].item() + 1) * 127.5 / 20) for c, x in zip(data.label.tolist(), data.x)}
    assert shown == {"0": 0, "1": 1, "2": 2, "10": 3, "11": 4}


def test_captions_of_a_column_are_prompts(places):
    data = load(f"hf(path={places['disk']!r}, caption='text')", 8)
    assert data.captioned
    assert data.names == ("grey 0", "grey 1", "grey 2")
    assert [data.names[i] for i in data.label.tolist()] == [f"grey {i % 3}" for i in range(12)]
    assert load(f"hf(path={places['disk']!r})", 8).names == ("all",)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("label='labl'", "'labl'.*did you mean 'label'"),
        ("image='text'", "row 0.*holds str"),
        ("label='label', caption='text'", "one of the two"),
        ("labels='label'", "'labels'.*did you mean 'label'"),
    ],
)
def test_wrong_columns_are_named(settings, said, places):
    with pytest.raises(ConfigError, match=said):
        load(f"hf(path={places['disk']!r}, {settings})", 8)


def test_wrong_splits_and_unreachable_names_are_refused(places, monkeypatch):
    with pytest.raises(ConfigError, match="'tset'"):
        load(f"hf(path={places['dict']!r}, split='tset')", 8)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"nobody/nothing.*expected a folder"):
        load("hf(path='nobody/nothing')", 8)


def test_captions_of_a_folder_and_of_an_npz(tmp_path):
    for i, picture in enumerate(pictures(4)):
        picture.save(tmp_path / f"{i}.png")
    lines = [{"file_name": f"{i}.png", "text": "dark" if i < 2 else "a light one"} for i in (3, 1, 0, 2)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = load(str(tmp_path), 8)
    assert (data.names, data.label.tolist(), data.captioned) == (("a light one", "dark"), [1, 1, 0, 0], True)
    (tmp_path / "metadata.jsonl").write_text(json.dumps(lines[0]))
    with pytest.raises(ConfigError, match=r"0\.png"):
        load(str(tmp_path), 8)

    file = tmp_path / "d.npz"
    np.savez(file, images=np.zeros((3, 4, 4), np.uint8), captions=np.array(["b", "a", "b"]))
    assert load(str(file)).label.tolist() == [1, 0, 1]
    np.savez(file, images=np.zeros((3, 4, 4), np.uint8), captions=np.array([1, 2, 3]))
    with pytest.raises(ConfigError, match="expected texts"):
        load(str(file))


def test_the_order_of_files_is_that_of_their_names(tmp_path):
    for i in (2, 0, 3, 1):
        pictures(4)[i].save(tmp_path / f"{i}.png")
    assert load(str(tmp_path), 8).x[:, 0, 0, 0].diff().min() > 0


def test_augmentation_is_keyed_and_does_what_it_says():
    x = torch.arange(2.0 * 3 * 4 * 4).reshape(2, 3, 4, 4).repeat(200, 1, 1, 1)
    both = Augment(flip=0.5, shift=1)
    assert torch.equal(both(x, stream(1)), both(x, stream(1)))
    assert not torch.equal(both(x, stream(1)), both(x, stream(2)))
    assert torch.equal(Augment()(x, stream(1)), x)
    assert torch.equal(Augment(flip=1.0)(x, stream(1)), x.flip(3))
    mirrored = (Augment(flip=0.3)(x, stream(1)) == x.flip(3)).flatten(1).all(1).double().mean().item()
    assert mirrored == pytest.approx(0.3, abs=0.06)
    moved = Augment(shift=1)(x, stream(1))
    inside = {tuple(int(v) for v in row) for row in (moved[::2, 0, 1, 1] - x[::2, 0, 1, 1])[:, None]}
    assert inside == {(d,) for d in (-5, -4, -3, -1, 0, 1, 3, 4, 5)}


def test_augmentation_is_part_of_the_step_and_of_nothing_else():
    card = models.Card(models.Config("ResidualMLP(width=16, depth=1)"), (1, 8, 8), digits().names)
    plain, moved = (
        Learner(models.build(card), digits(), Config(batch=16, augment=text)).draw(3)
        for text in ("", "Augment(shift=1)")
    )
    assert not torch.equal(plain.x0, moved.x0)
    for name in ("eps", "cond", "u", "index"):
        assert torch.equal(getattr(plain, name), getattr(moved, name))
    assert torch.equal(moved.x0, Augment(shift=1)(plain.x0, stream(0, "pretrain", 3, "augment")))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"augment": "Augment(flip=2.0)"}, "flip = 2.0"),
        ({"augment": "Augmnt()"}, "did you mean 'Augment'"),
        ({"augment": "Augment(shift=1)", "loss": "ESM()"}, "compares with the training data"),
    ],
)
def test_augmentations_that_cannot_be_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        Config(**settings)


def test_words_are_hashed_without_case_and_stops():
    assert words("A handwritten Seven.") == words("a handwritten seven")
    assert words("a b") == [*words("a"), *words("b")] != words("b a")
    with pytest.raises(ConfigError, match="0 words"):
        words("...")


def test_an_embedding_depends_on_its_caption_alone():
    torch.manual_seed(0)
    short = Captions(["a seven", "a very light and large eight"], 16).double()
    index = torch.tensor([1, 0, 2, 0])
    whole = short(index)
    assert whole.shape == (4, 16)
    torch.testing.assert_close(whole[1], whole[3])
    torch.testing.assert_close(whole[2], short.none)
    short.set(["a seven"])
    torch.testing.assert_close(short(torch.tensor([0]))[0], whole[1])
    assert not torch.allclose(whole[0], whole[1])


def captioned_digits() -> Dataset:
    """Digits and their negatives, each with its caption; "inverted seven" is left out."""
    data = digits()
    x = torch.cat([data.x, -data.x])
    said = [f"{tone} {NUMBERS[i]}" for tone in ("plain", "inverted") for i in data.label.tolist()]
    kept = [i for i, text in enumerate(said) if text != "inverted seven"]
    return captioned(x[kept], [said[i] for i in kept], 17)


def test_a_model_follows_captions_also_new_ones(tmp_path):
    """The mean x0 at pure noise is bright for an inverted digit, dark for a plain one; for unseen words, too."""
    data = captioned_digits()
    card = models.Card(
        models.Config("ResidualMLP(width=64, depth=1)"), data.shape, data.names, captioned=data.captioned
    )
    denoiser = models.build(card)
    learner = Learner(denoiser, data, Config(steps=400, batch=128, lr=3e-3, ema="Constant(decay=0)"))
    for step in range(400):
        learner.update(step)
    models.save(tmp_path, denoiser, card)
    back, found = models.load(tmp_path)
    assert found == card
    noise = torch.randn(100, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    at = torch.tensor(0.999, dtype=torch.float64)

    def brightness(model, caption: str) -> float:
        names = (*data.names, caption)
        model.net.label.set(names)
        with torch.no_grad():
            return model(noise, at, torch.full((100,), names.index(caption))).x0.mean().item()

    assert brightness(back, "plain three") == brightness(denoiser, "plain three")
    assert brightness(back, "plain three") < -0.2 < 0.2 < brightness(back, "inverted three")
    assert brightness(back, "inverted seven") > 0.2
    assert brightness(back, "plain seven") < -0.2


def test_captions_through_the_commands(tmp_path):
    data = digits()
    some = torch.cat([(data.label == i).nonzero().flatten()[:40] for i in range(3)])
    images = ((data.x[some, 0] + 1) * 127.5).round().numpy().astype(np.uint8)
    said = np.array([f"a handwritten {NUMBERS[i]}" for i in data.label[some].tolist()])
    np.savez(tmp_path / "said.npz", images=images, captions=said)
    trained = rlfusion(tmp_path, "pretrain", "--data", "said.npz", "--name", "it", *SMALL)
    assert trained.code == 0, trained.err
    assert json.loads((tmp_path / "runs" / "it" / "model" / "model.json").read_text())["captioned"]
    assert (tmp_path / "runs" / "it" / "evaluation.json").is_file()
    for label in ("a handwritten two", "a large two"):
        words_ = ("sample", "--checkpoint", "runs/it", "--label", label, "--count", 4, "--out", f"{label[-3:]}.png")
        assert rlfusion(tmp_path, *words_).code == 0
    few = (*TINY, "--reward", "ink", "--rollout.prompts", 3)
    tuned = rlfusion(tmp_path, "finetune", "--base", "runs/it", "--pretrain.data", "said.npz", *few)
    assert tuned.code == 0, tuned.err


def test_captions_that_come_once_have_no_judge(tmp_path):
    np.savez(
        tmp_path / "said.npz",
        images=np.random.default_rng(0).integers(0, 255, (40, 8, 8), np.uint8),
        captions=np.array([f"picture number {i}" for i in range(40)]),
    )
    trained = rlfusion(tmp_path, "pretrain", "--data", "said.npz", "--name", "it", *SMALL)
    assert trained.code == 0, trained.err
    assert "captions with two samples each" in " ".join(trained.out.split())
    assert (tmp_path / "runs" / "it" / "samples" / "grid.png").is_file()
    refused = rlfusion(tmp_path, "finetune", "--base", "runs/it", "--pretrain.data", "said.npz", *TINY)
    assert refused.code == 2


def test_parquet_files_named_after_splits_are_those_splits(table, tmp_path):
    for name, rows in (("train-00000-of-00001", range(8)), ("validation-00000-of-00001", range(8, 12))):
        table.select(rows).to_parquet(str(tmp_path / f"{name}.parquet"))
    path = str(tmp_path)
    assert len(load(f"hf(path={path!r})", 8)) == 8
    both = load(f"hf(path={path!r}, held='validation', label='label')", 8)
    assert [len(part) for part in both.split(0.5)] == [8, 4]
    assert both.split(0.5)[1].x[0, 0, 0, 0].item() == pytest.approx(160 / 127.5 - 1)
    with pytest.raises(ConfigError, match="'tset'"):
        load(f"hf(path={path!r}, split='tset')", 8)


def test_a_split_of_rows_that_have_none_is_refused(places):
    for place in ("disk", "rows.parquet", "parquets"):
        with pytest.raises(ConfigError, match=r"'test'.*expected one of train"):
            load(f"hf(path={places[place]!r}, split='test')", 8)


@pytest.mark.parametrize(
    ("value", "said"), [(None, "missing"), (3, r"3 \(int\)"), (["a", "b"], r"\(list\)"), ("", "''"), (0.5, "float")]
)
def test_captions_that_are_no_text_are_named_by_their_row(value, said, tmp_path):
    datasets = pytest.importorskip("datasets")
    kind = type(value) if value else str
    rows = {"image": pictures(2), "text": [kind(1) if kind in (int, float) else kind("x"), value]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(ConfigError, match=rf"row \d.*'text'.*{said}|row 0"):
        load(f"hf(path={str(tmp_path / 'd')!r}, caption='text')", 8)


def test_broken_places_of_the_library_are_refused_in_one_line(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "state.json").write_text("{")
    (tmp_path / "dict").mkdir()
    (tmp_path / "dict" / "dataset_dict.json").write_text("{}")
    for name in ("a.parquet", "disk", "dict"):
        with pytest.raises(ConfigError) as caught:
            load(f"hf(path={str(tmp_path / name)!r})", 8)
        assert "\n" not in str(caught.value)
        assert name in str(caught.value)
