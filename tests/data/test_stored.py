"""Stored images that are learned from: preferences as Pick-a-Pic has them, scores, and what is refused."""

import csv
import io
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from rlfusion.common.errors import ConfigError
from rlfusion.data.stored import read

HEAD = ["caption", "jpg_0", "jpg_1", "label_0", "label_1"]


def picture(level: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.fromarray(np.full((*size, 3), level, dtype=np.uint8))


def encoded(level: int) -> bytes:
    held = io.BytesIO()
    picture(level).save(held, format="PNG")
    return held.getvalue()


@pytest.fixture
def folder(tmp_path) -> Path:
    for level in (0, 51, 102, 255):
        picture(level).save(tmp_path / f"{level}.png")
    return tmp_path


def table(folder: Path, head: list[str], *rows: list, name: str = "metadata.csv") -> str:
    with (folder / name).open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    return str(folder / name)


def levels(found) -> list[int]:
    return [round((x.mean().item() + 1) * 127.5) for x in found.data.x]


def test_pick_a_pic_as_parquet_with_its_bytes(tmp_path):
    rows = [("a cat", 0, 255, 1.0, 0.0), ("a dog", 51, 102, 0.0, 1.0), ("a dog", 51, 102, 0.5, 0.5)]
    columns = {
        "caption": [r[0] for r in rows],
        **{f"jpg_{i}": [encoded(r[1 + i]) for r in rows] for i in (0, 1)},
        **{f"label_{i}": [r[3 + i] for r in rows] for i in (0, 1)},
        "has_label": [True] * 3,
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "pairs.parquet")
    found = read(str(tmp_path / "pairs.parquet"), 8)
    assert found.pairs
    assert levels(found) == [0, 255, 51, 102]
    assert found.score.tolist() == [1.0, 0.0, 0.0, 1.0]
    assert [found.data.names[i] for i in found.data.label] == ["a cat", "a cat", "a dog", "a dog"]
    assert found.data.summary == "2 pairs; left out: 1 tied"


@pytest.mark.parametrize(
    ("head", "rows", "scores"),
    [
        (HEAD, [["x", "0.png", "51.png", "0", "1"]], [0, 1]),
        (["Prompt", "image_0", "image_1", "score_0", "score_1"], [["x", "0.png", "51.png", "7.5", "-2"]], [1, 0]),
        (["text", "chosen", "rejected"], [["x", "0.png", "51.png"]], [1, 0]),
        (
            ["has_label", *HEAD],
            [["False", "x", "0.png", "0.png", "", ""], ["True", "x", "0.png", "51.png", "1", "0"]],
            [1, 0],
        ),
    ],
)
def test_pairs_by_other_usual_names_in_a_folder_or_its_table(head, rows, scores, folder):
    file = table(folder, head, *rows)
    for place in (file, str(folder)):
        found = read(place, 8)
        assert found.pairs
        assert found.score.tolist() == scores
        assert levels(found) == [0, 51]


@pytest.mark.parametrize("column", ["score", "Reward", "rating"])
def test_scores_go_with_their_images(column, folder):
    file = table(folder, ["file_name", "caption", column], ["255.png", "b", "2"], ["0.png", "a", "-0.5"])
    for place in (file, str(folder)):
        found = read(place, 8)
        assert not found.pairs
        assert levels(found) == [255, 0]
        assert found.score.tolist() == [2.0, -0.5]


def test_scores_beside_held_out_images_are_refused(folder):
    table(folder, ["file_name", "caption", "score"], ["255.png", "b", "2"], ["0.png", "a", "-0.5"])
    (folder / "test").mkdir()
    with pytest.raises(ConfigError, match="has scores, and a folder 'test'"):
        read(str(folder), 8)


def test_images_without_either_are_what_pretraining_reads(folder):
    assert read(str(folder), 8).score is None
    assert torch.equal(read("digits", 32).data.x[:5], read("digits", 32).data.x[:5])
    table(folder, ["file_name", "caption"], *[[f"{level}.png", "x"] for level in (0, 51, 102, 255)])
    found = read(str(folder), 8)
    assert found.data.captioned
    assert found.score is None


@pytest.mark.parametrize(
    ("head", "row", "said"),
    [
        (HEAD[:2] + HEAD[3:], ["x", "0.png", "1", "0"], "for two images, not jpg_0 and jpg_1"),
        (HEAD[:3], ["x", "0.png", "51.png"], "for what people said of jpg_0 and jpg_1, not label_0 and label_1"),
        (HEAD[1:], ["0.png", "51.png", "1", "0"], "expected one of text, caption, prompt"),
        ([*HEAD, "image_0", "image_1"], ["x", "0.png", "51.png", "1", "0", "a", "b"], "more than one of"),
        (HEAD, ["x", "0.png", "51.png", "1", "1"], "row 1 .*label_0, label_1 = 1, 1: expected 1 and 0, 0 and 1, or .5"),
        (HEAD, ["x", "0.png", "51.png", "1", ""], "row 1 .*'label_1': it is '' .*expected a finite number"),
        (HEAD, ["x", "0.png", "51.png", "nan", "1"], "'label_0': it is 'nan' .*expected a finite number"),
        (HEAD, ["x", "0.png", "51.png", ".5", ".5"], "no pair with a preference: 1 tied"),
        (HEAD, ["x", "0.png", "52.png", "1", "0"], "row 1 .*there is no file '52.png'"),
        (HEAD, ["", "0.png", "51.png", "1", "0"], "row 1 .*the caption is"),
        ([*HEAD, "split"], ["x", "0.png", "51.png", "1", "0", "test"], "a column 'split' beside"),
        (["file_name", "caption", "score"], ["0.png", "x", "good"], "'score': it is 'good'"),
        (["file_name", "caption", "score", "rating"], ["0.png", "x", "1", "2"], "several that may be the score"),
    ],
)
def test_what_is_no_preference_and_no_score_is_refused(head, row, said, folder):
    file = table(folder, head, row)
    with pytest.raises(ConfigError, match=said):
        read(file, 8)


def test_an_image_that_cannot_be_read_is_named(folder):
    (folder / "0.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"0.png.*cannot be read as an image"):
        read(table(folder, HEAD, ["x", "0.png", "51.png", "1", "0"]), 8)


def test_a_table_that_is_told_with_settings_keeps_its_scores(folder):
    head = ["picture", "caption", "score"]
    file = table(folder, head, ["255", "b", "2"], ["0", "a", "-0.5"], name="list.csv")
    found = read(f"table(path={file!r}, image='picture', suffix='.png')", 8)
    assert levels(found) == [255, 0]
    assert found.score.tolist() == [2.0, -0.5]
    file = table(folder, HEAD, ["x", "0.png", "51.png", "0", "1"])
    assert read(f"table(path={file!r})", 8).pairs
    assert read(f"folder(path={str(folder)!r})", 8).pairs


@pytest.mark.parametrize("told", ["table(path={file!r}, image='jpg_0')", "folder(path={folder!r}, background='red')"])
def test_settings_that_pairs_do_not_know_are_refused(told, folder):
    file = table(folder, HEAD, ["x", "0.png", "51.png", "0", "1"])
    with pytest.raises(ConfigError, match="has preferences, and settings beside its path: expected path alone"):
        read(told.format(file=file, folder=str(folder)), 8)


def test_scores_that_a_source_does_not_read_are_refused(tmp_path):
    images = np.zeros((2, 8, 8), np.uint8)
    np.savez(tmp_path / "x.npz", images=images, rewards=[1.0, 2.0])
    with pytest.raises(ConfigError, match="holds rewards, of which nothing would be learned"):
        read(str(tmp_path / "x.npz"), 8)
    np.savez(tmp_path / "x.npz", images=images, other=[1.0, 2.0])
    assert read(str(tmp_path / "x.npz"), 8).score is None
    rows = datasets.Dataset.from_dict({"image": [picture(9)], "text": ["a"], "score": [2.0]})
    rows.save_to_disk(tmp_path / "rows")
    with pytest.raises(ConfigError, match="holds score, of which nothing would be learned"):
        read(f"hf(path={str(tmp_path / 'rows')!r}, caption='text')", 8)
