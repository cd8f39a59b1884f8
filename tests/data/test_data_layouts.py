"""Folders and tables as people have them: splits, captions, classes, hidden files; what is open is refused."""

import csv
import json
import os
import time

import numpy as np
import pytest
from PIL import Image

from rlfusion import data
from rlfusion.common.errors import ConfigError
from rlfusion.data.dataset import numbered

pyarrow = pytest.importorskip("pyarrow")


def picture(file, level: int = 0) -> None:
    """A square whose brightness says which it is."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 6), (level, level, level)).save(file)


def levels(found: data.Dataset) -> list[int]:
    return ((found.x[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def texts(found: data.Dataset) -> list[str]:
    return [found.names[i] for i in found.label.tolist()]


def pairs(found: data.Dataset) -> dict[int, str]:
    return dict(zip(levels(found), texts(found)))


def make(root, names: list[str]) -> None:
    for i, name in enumerate(names):
        picture(root / name, 10 * i)


def refused(source: str, *said: str) -> str:
    begin = time.process_time()
    with pytest.raises(ConfigError) as caught:
        data.load(source, 4)
    assert time.process_time() - begin < 2
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 900
    for word in said:
        assert word in text, text
    return text


def of(kind: str, where, **settings) -> str:
    return f"{kind}({', '.join(f'{k}={v!r}' for k, v in {'path': str(where), **settings}.items())})"


# ---------------------------------------------------------------- what lies beside the images


def test_what_systems_leave_is_no_class_and_is_counted(tmp_path):
    make(
        tmp_path,
        ["cat/a.png", "dog/b.PNG", ".ipynb_checkpoints/a.png", "__MACOSX/cat/a.png", "cat/.ipynb_checkpoints/a.png"],
    )
    for name in (
        ".DS_Store",
        "cat/._a.png",
        "cat/Thumbs.db",
        "notes.md",
        "dog/clip.mp4",
        "dog/raw.heic2",
        "cat/words.txt",
    ):
        (tmp_path / name).write_bytes(b"?")
    found = data.load(str(tmp_path), 4)
    assert pairs(found) == {0: "cat", 10: "dog"}
    line = found.summary
    assert line.startswith("2 images, 10 left out: 3 hidden folders, 3 hidden, 1 .")
    assert all(name in line for name in ("1 .md", "1 .mp4", "1 .heic2", "1 .txt", "2 classes (cat, dog)"))
    said = []
    data.load(str(tmp_path), 4, said.append)
    assert len(said) == 1
    assert line in said[0]


def test_a_sound_folder_says_only_what_it_is(tmp_path):
    make(tmp_path, ["a.png", "b.tif", "c.gif", "d.webp", "e.bmp", "f.JPG"])
    found = data.load(str(tmp_path), 4)
    assert found.summary == "6 images; 1 class (all)"
    assert levels(found) == [0, 10, 20, 30, 40, 50]


def test_links_are_followed_and_loops_are_cut(tmp_path):
    make(tmp_path, ["here/cat/a.png", "there/b.png"])
    (tmp_path / "here" / "dog").symlink_to(tmp_path / "there")
    (tmp_path / "here" / "cat" / "up").symlink_to(tmp_path / "here")
    (tmp_path / "there" / "self").symlink_to(tmp_path / "there")
    found = data.load(str(tmp_path / "here"), 4)
    assert pairs(found) == {0: "cat", 10: "dog"}
    assert "2 links back to a folder above" in found.summary
    (tmp_path / "here" / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    refused(str(tmp_path / "here"), "gone.png", "No such file")


def test_a_link_to_itself_is_no_folder(tmp_path):
    make(tmp_path, ["a.png"])
    (tmp_path / "round").symlink_to("round")
    assert "1 left out: 1 without a suffix" in data.load(str(tmp_path), 4).summary
    (tmp_path / "b.png").symlink_to("b.png")
    refused(str(tmp_path), "b.png", "symbolic links")


@pytest.mark.parametrize("name", ["a.txt", "a.caption"])
def test_a_pipe_is_no_caption(name, tmp_path):
    make(tmp_path, ["a.png"])
    os.mkfifo(tmp_path / name)
    refused(str(tmp_path), name, "no regular file")  # it would be waited for


def test_what_is_no_image_is_refused_by_name(tmp_path):
    make(tmp_path, ["a.png"])
    os.mkfifo(tmp_path / "pipe.png")
    refused(str(tmp_path), "pipe.png", "no regular file")
    (tmp_path / "pipe.png").unlink()
    for content in (b"", b"words", b"\x89PNG\r\n\x1a\n"):
        (tmp_path / "b.jpg").write_bytes(content)
        refused(str(tmp_path), "b.jpg")


def test_names_of_classes_are_ordered_composed_and_may_differ_by_case(tmp_path):
    make(tmp_path, ["a/1.png", "A/1.png", "é/1.png", "日本/1.png", "10/1.png", "9/1.png"])
    picture(tmp_path / "e\u0301" / "2.png", 200)  # the same name as macOS writes it
    found = data.load(str(tmp_path), 4)
    assert found.names == ("10", "9", "A", "a", "é", "日本")
    assert pairs(found)[200] == "é" == pairs(found)[20]
    (tmp_path / os.fsdecode(b"\xff")).mkdir()
    picture(tmp_path / os.fsdecode(b"\xff") / "a.png")
    refused(str(tmp_path), "not UTF-8")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([], "holds no image: it is empty"),
        (["notes.txt"], "1 .txt"),
        (["a.parquet", "b.parquet"], "hf(path="),
        (["a.npz"], ".npz itself"),
        ([".a.png"], "1 hidden"),
    ],
)
def test_a_folder_without_images_says_what_it_has(files, said, tmp_path):
    for name in files:
        (tmp_path / name).write_bytes(b"?")
    refused(str(tmp_path), "holds no image", said)


# ---------------------------------------------------------------- splits


@pytest.mark.parametrize(
    ("train", "held", "others"),
    [
        ("train", "val", []),
        ("train", "valid", []),
        ("Train", "Validation", []),
        ("training", "test", []),
        ("train", "val", ["test"]),
        ("train", "dev", ["testing"]),
        ("TRAIN", "TEST", []),
    ],
)
def test_splits_are_known_by_their_names(train, held, others, tmp_path):
    make(
        tmp_path,
        [f"{part}/{name}/{i}.png" for part in (train, held, *others) for name in ("cat", "dog") for i in (0, 1)],
    )
    found = data.load(str(tmp_path), 4)
    assert found.names == ("cat", "dog")
    first, second = found.split(0.9)  # the share is of no use where the data have their own
    assert (sorted(levels(first)), sorted(levels(second))) == ([0, 10, 20, 30], [40, 50, 60, 70])
    assert f"4 of {train!r} to train on, 4 of {held!r} held out" in found.summary
    assert all(f"4 in the split {name!r}" in found.summary for name in others)
    alone = data.load(of("folder", tmp_path, split=held), 4)
    assert (levels(alone), alone.held) == ([40, 50, 60, 70], None)
    turned = data.load(of("folder", tmp_path, split=held, held=train), 4)
    assert sorted(levels(turned.split(0)[1])) == [0, 10, 20, 30]
    assert data.load(of("folder", tmp_path, split="none"), 4).classes == 2 + len(others)


def test_flat_splits_and_a_training_part_alone(tmp_path):
    make(tmp_path, ["train/a.png", "train/b.png", "test/c.png"])
    found = data.load(str(tmp_path), 4)
    assert (found.names, [len(part) for part in found.split(0.5)]) == (("all",), [2, 1])
    for name in ("test/c.png",):
        (tmp_path / name).unlink()
    alone = data.load(str(tmp_path), 4)
    assert (alone.names, alone.held, len(alone)) == (("all",), None, 2)


@pytest.mark.parametrize("names", [["train", "bus", "car"], ["test", "control"], ["valid", "invalid"]])
def test_classes_that_are_called_like_splits(names, tmp_path):
    make(tmp_path, [f"{name}/a.png" for name in names])
    assert data.load(str(tmp_path), 4).names == tuple(sorted(names))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["train/a.png", "val/a.png", "extra/a.png"], "split='none'"),
        (["train/a.png", "val/a.png", "a.png"], "images outside of them"),
        (["train/a.png", "Train/b.png", "val/a.png"], "one training part"),
        (["train/a.png", "val/a.png", "valid/a.png"], "one held-out part"),
        (["val/a.png", "test/a.png"], "one training part"),
        (["test/a.png"], "split='NAME'"),
        (["pets/train/cat/a.png", "pets/val/cat/a.png"], "splits inside of a class"),
        (["images/train/a.png", "images/test/a.png"], "'images'"),
        (["cat/train/a.png", "cat/test/a.png", "dog/train/a.png"], "splits inside of a class"),
        (["train/cat/a.png", "val/cat/a.png", "val/zebra/a.png"], "'zebra'"),
        (["train/cat/a.png", "val/a.png"], "outside of the folders"),
        (["cat/a.png", "b.png"], "outside of the folders"),
    ],
)
def test_splits_and_classes_that_are_open_are_refused(files, said, tmp_path):
    make(tmp_path, files)
    refused(str(tmp_path), said)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"split": "trian"}, "did you mean 'train'"),
        ({"held": "vall"}, "did you mean 'val'"),
        ({"split": "train", "held": "train"}, "two parts"),
        ({"split": "none", "held": "val"}, "beside a split"),
        ({"splits": "train"}, "did you mean 'split'"),
        ({"split": 3}, "expected text"),
        ({"conditions": "words"}, "captions"),
        ({"frames": "all"}, "first"),
        ({"lines": "all"}, "join"),
        ({"caption": "text"}, "metadata.csv"),
        ({"path": ""}, "expected a folder"),
    ],
)
def test_settings_of_a_folder_that_do_not_fit(settings, said, tmp_path):
    make(tmp_path, ["train/a.png", "val/a.png"])
    refused(of("folder", tmp_path, **settings), said)


def test_too_few_images_of_a_class_for_the_share(tmp_path):
    make(tmp_path, ["cat/a.png", "cat/b.png", "dog/a.png"])
    found = data.load(str(tmp_path), 4)
    found.require_trained(0.25)
    with pytest.raises(ConfigError, match="no training sample of class 'dog', which has 1"):
        found.require_trained(0.6)


# ---------------------------------------------------------------- captions beside the images


def test_captions_beside_the_images(tmp_path):
    """The layout of kohya's scripts: folders of repeats, a text of the image's name."""
    make(tmp_path, ["10_cat/a.png", "10_cat/b.jpg", "5_dog/a.webp"])
    for name, text in (("10_cat/a", "a cat"), ("10_cat/b", "\ufeffa cat asleep\r\n"), ("5_dog/a", "ein Hündchen\n\n")):
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "readme.txt").write_text("all mine")
    found = data.load(str(tmp_path), 4)
    assert (found.captioned, texts(found)) == (True, ["a cat", "a cat asleep", "ein Hündchen"])
    assert "3 distinct captions; captions from files beside the images" in found.summary
    assert "1 left out: 1 .txt" in found.summary
    assert data.load(of("folder", tmp_path, conditions="classes"), 4).names == ("10_cat", "5_dog")
    assert data.load(of("folder", tmp_path, conditions="none"), 4).names == ("all",)
    (tmp_path / "5_dog" / "a.txt").rename(tmp_path / "5_dog" / "a.caption")
    (tmp_path / "10_cat" / "b.txt").write_bytes("a cat asleep".encode("utf-16"))
    assert texts(data.load(str(tmp_path), 4)) == texts(found)
    (tmp_path / "10_cat" / "b.txt").unlink()
    refused(str(tmp_path), "2 of 3", "b.jpg", "conditions='classes'")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "missing|''"),
        (b" \n ", "''"),
        (b"\xff\xfeq", "not UTF-8"),
        (b"caf\xe9", "not UTF-8"),
        (b"a\0b", "zero bytes"),
        (b"one\ntwo", "lines='first'"),
        (b"0 0.5 0.5 0.25 0.25\n1 0.1 0.2 0.3 0.4\n", "as of boxes"),
    ],
)
def test_caption_files_that_hold_none(content, said, tmp_path):
    make(tmp_path, ["a.png"])
    (tmp_path / "a.txt").write_bytes(content)
    text = refused(str(tmp_path), "a.txt")
    assert any(word in text for word in said.split("|"))


def test_several_lines_and_two_files(tmp_path):
    make(tmp_path, ["a.png"])
    (tmp_path / "a.txt").write_text("one\n\n two \n")
    assert texts(data.load(of("folder", tmp_path, lines="first"), 4)) == ["one"]
    assert texts(data.load(of("folder", tmp_path, lines="join"), 4)) == ["one two"]
    (tmp_path / "a.caption").write_text("three")
    refused(str(tmp_path), "two captions", "a.caption", "a.txt")


# ---------------------------------------------------------------- tables


ROWS = [{"file_name": f"{i}.png", "text": ["dark", "light"][i % 2], "n": i} for i in (2, 0, 3, 1)]


def write(file, rows: list[dict]) -> None:
    suffix = file.suffix
    if suffix == ".parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif suffix in (".jsonl", ".ndjson"):
        file.write_text("\n".join(map(json.dumps, rows)))
    else:
        with file.open("w", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, list(rows[0]), delimiter="\t" if suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)


BLANKS = ("cat", " cat", "cat ", "\u00a0cat", "  cat  ")


@pytest.mark.parametrize("column", ["label", "text"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".ndjson", ".parquet"])
def test_blanks_around_a_label_or_a_caption_are_no_part_of_it(suffix, column, tmp_path):
    texts = [*BLANKS, "dog"]
    for i in range(len(texts)):
        picture(tmp_path / f"{i}.png")
    write(tmp_path / f"list{suffix}", [{"file_name": f"{i}.png", column: text} for i, text in enumerate(texts)])
    found = data.load(str(tmp_path / f"list{suffix}"), 4)
    assert (found.names, found.label.tolist()) == (("cat", "dog"), [0, 0, 0, 0, 0, 1])


def test_blanks_after_a_comma_and_before_a_quote_are_no_part_of_a_cell(tmp_path):
    for i in range(3):
        picture(tmp_path / f"{i}.png")
    rows = 'file_name, label , split\n0.png, "cat", train\n   \n1.png,cat,train \n 2.png ,"a, b", train\n'
    (tmp_path / "list.csv").write_text(rows)
    found = data.load(of("table", tmp_path / "list.csv", split="train"), 4)
    assert (found.names, found.label.tolist()) == (("a, b", "cat"), [1, 1, 0])


def test_blanks_around_names_in_arrays_are_no_part_of_them(tmp_path):
    x = np.arange(2 * 6 * 4 * 4, dtype=np.uint8).reshape(12, 4, 4)[:6]
    np.savez(tmp_path / "a.npz", images=x, labels=np.array([*BLANKS, "dog"]))
    assert data.load(str(tmp_path / "a.npz"), 4).names == ("cat", "dog")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".ndjson", ".parquet"])
def test_tables_of_metadata_and_tables_given_themselves(suffix, tmp_path):
    make(tmp_path, [f"{i}.png" for i in range(4)])
    expected = {0: "dark", 10: "light", 20: "dark", 30: "light"}
    write(tmp_path / f"metadata{suffix}", ROWS)
    found = data.load(str(tmp_path), 4)
    assert (pairs(found), found.captioned, levels(found)) == (expected, True, [0, 10, 20, 30])
    assert f"captions from metadata{suffix}" in found.summary
    (tmp_path / f"metadata{suffix}").rename(tmp_path / f"Mine{suffix.upper()}")
    found = data.load(str(tmp_path / f"Mine{suffix.upper()}"), 4)
    assert (pairs(found), found.captioned, levels(found)) == (expected, True, [20, 0, 30, 10])
    classes = data.load(of("table", tmp_path / f"Mine{suffix.upper()}", label="n"), 4)
    assert (classes.names, classes.captioned) == (("0", "1", "2", "3"), False)
    assert data.load(of("table", tmp_path / f"Mine{suffix.upper()}", conditions="none"), 4).names == ("all",)


def test_the_metadata_of_a_hugging_face_folder(tmp_path):
    """Each split has its own table beside its images; a table may hold classes."""
    make(tmp_path, ["train/a.png", "train/sub/b.png", "validation/a.png"])
    write(
        tmp_path / "train" / "metadata.csv",
        [{"file_name": "a.png", "label": "x"}, {"file_name": "sub/b.png", "label": "y"}],
    )
    write(tmp_path / "validation" / "metadata.csv", [{"file_name": "a.png", "label": "y"}])
    found = data.load(str(tmp_path), 4)
    assert (texts(found), found.captioned) == (["x", "y", "y"], False)
    assert levels(found.split(0.5)[1]) == [20]
    write(tmp_path / "validation" / "metadata.csv", [{"file_name": "a.png", "text": "y"}])
    refused(str(tmp_path), "captions and classes")


@pytest.mark.parametrize("column", ["split", "Split", "SPLIT"])
def test_a_column_of_splits_is_followed_or_refused_never_left_out(column, tmp_path):
    make(tmp_path, ["a.png", "b.png", "c.png"])
    rows = [{"file_name": f"{n}.png", "text": n, column: part} for n, part in zip("abc", ("train", "train", "test"))]
    write(tmp_path / "metadata.csv", rows)
    refused(str(tmp_path), "metadata.csv", repr(column), "split='none'")
    assert texts(data.load(of("folder", tmp_path, split="none"), 4)) == ["a", "b", "c"]
    found = data.load(str(tmp_path / "metadata.csv"), 4)
    assert "2 of 'train' to train on, 1 of 'test' held out" in found.summary
    write(tmp_path / "metadata.csv", [row | {column.swapcase(): "train"} for row in rows])
    refused(str(tmp_path / "metadata.csv"), "several that may be the split_column", "split_column='NAME'")


@pytest.mark.parametrize("conditions", ["none", "classes", "captions"])
def test_a_column_of_splits_is_seen_where_texts_come_from_elsewhere(conditions, tmp_path):
    make(tmp_path, ["a.png", "b.png"])
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    write(
        tmp_path / "metadata.csv",
        [{"file_name": f"{n}.png", "split": part} for n, part in (("a", "train"), ("b", "test"))],
    )
    refused(of("folder", tmp_path, conditions=conditions), "metadata.csv", "'split'", "split='none'")
    assert len(data.load(of("folder", tmp_path, conditions=conditions, split="none"), 4)) == 2


def test_a_column_of_splits_beside_folders_of_them_says_the_same(tmp_path):
    make(tmp_path, ["train/a.png", "test/b.png"])
    rows = [{"file_name": f"{part}/{n}.png", "text": n, "split": part} for n, part in (("a", "train"), ("b", "test"))]
    write(tmp_path / "metadata.csv", rows)
    assert levels(data.load(str(tmp_path), 4).split(0.5)[1]) == [10]
    write(tmp_path / "metadata.csv", [row | {"split": "train"} for row in rows])
    refused(str(tmp_path), "row 2", "split = 'train'", "expected the same split")


def test_rows_of_images_that_are_not_read_are_counted(tmp_path):
    make(tmp_path, ["in/a.png", "in/.old/b.png", "out.png"])
    rows = [{"file_name": name, "text": "x"} for name in ("a.png", ".old/b.png", "../out.png")]
    write(tmp_path / "in" / "metadata.csv", rows)
    found = data.load(str(tmp_path / "in"), 4)
    assert texts(found) == ["x"]
    assert "2 rows of images that are hidden, elsewhere, or of another suffix left out" in found.summary


def test_a_table_like_that_of_celeba(tmp_path):
    make(tmp_path, [f"img/{i}.jpg" for i in range(6)])
    rows = [
        {"image_id": f"{i}.jpg", "Smiling": (-1) ** i, "Young": 1, "split": ["train", "val", "test"][i // 2]}
        for i in range(6)
    ]
    write(tmp_path / "attributes.csv", rows)
    found = data.load(of("table", tmp_path / "attributes.csv", label="Smiling", root=str(tmp_path / "img")), 4)
    assert (found.names, texts(found)) == (("-1", "1"), ["1", "-1", "1", "-1"])
    assert [levels(part) for part in found.split(0.3)] == [[0, 10], [20, 30]]
    assert "2 in the split 'test'" in found.summary
    refused(str(tmp_path / "attributes.csv"), "columns", "'Smiling'", "label='NAME'")
    refused(of("table", tmp_path / "attributes.csv", label="Smiling"), "0.jpg", "root=")
    refused(of("table", tmp_path / "attributes.csv", label="smiling"), "did you mean 'Smiling'")
    write(tmp_path / "names.csv", [{"image": str(i), "label": "x"} for i in range(6)])
    there = {"root": str(tmp_path / "img")}
    assert len(data.load(of("table", tmp_path / "names.csv", suffix=".jpg", **there), 4)) == 6
    refused(of("table", tmp_path / "names.csv", **there), "row 1", "did you mean '0.jpg'")


def test_an_image_may_have_several_rows(tmp_path):
    make(tmp_path, ["a.png", "b.png"])
    rows = [{"image": name, "caption": f"{name} {i}"} for name in ("a.png", "b.png") for i in range(5)]
    write(tmp_path / "flickr.csv", rows)
    found = data.load(str(tmp_path / "flickr.csv"), 4)
    assert (levels(found), found.classes) == ([0] * 5 + [10] * 5, 10)
    (tmp_path / "flickr.csv").rename(tmp_path / "metadata.csv")
    refused(str(tmp_path), "second of", "--data")


def test_images_inside_of_parquet(tmp_path):
    make(tmp_path, ["a.png", "b.png"])
    held = [{"image": {"bytes": (tmp_path / f"{n}.png").read_bytes(), "path": None}, "text": n} for n in "ab"]
    write(tmp_path / "rows.parquet", held)
    assert pairs(data.load(str(tmp_path / "rows.parquet"), 4)) == {0: "a", 10: "b"}
    write(tmp_path / "rows.parquet", [{"image": b"no picture", "text": "a"}])
    refused(str(tmp_path / "rows.parquet"), "row 1 of", "rows.parquet")


BAD_CELLS = [
    ({"file_name": "0.png", "text": None}, "missing"),
    ({"file_name": "0.png", "text": 3}, "3 (int)"),
    ({"file_name": "0.png", "text": 0.5}, "0.5 (float)"),
    ({"file_name": "0.png", "text": ["a", "b"]}, "(list)"),
    ({"file_name": "0.png", "text": {"a": 1}}, "(dict)"),
    ({"file_name": "0.png", "text": ""}, "''"),
    ({"file_name": "0.png", "text": "  "}, "expected a text"),
    ({"file_name": "0.png", "text": "\ud800"}, "not UTF-8"),
    ({"file_name": "0.png"}, "missing"),
    ({"text": "a"}, "image is missing"),
    ({"file_name": None, "text": "a"}, "image is missing"),
    ({"file_name": 3, "text": "a"}, "3 (int)"),
    ({"file_name": "", "text": "a"}, "''"),
    ({"file_name": "nowhere.png", "text": "a"}, "nowhere.png"),
    ({"file_name": "0.PNG", "text": "a"}, "did you mean '0.png'"),
    ({"file_name": "x" * 5000, "text": "a"}, "no file"),
    ({"file_name": "https://x.org/0.png", "text": "a"}, "address"),
    ({"file_name": ".", "text": "a"}, "no file"),
]


@pytest.mark.parametrize(("row", "said"), BAD_CELLS)
@pytest.mark.parametrize("given", ["metadata.jsonl", "mine.jsonl"])
def test_rows_that_hold_no_image_or_no_text_are_named(row, said, given, tmp_path):
    make(tmp_path, ["0.png", "1.png"])
    write(tmp_path / given, [{"file_name": "1.png", "text": "fine"}, row])
    refused(str(tmp_path if given == "metadata.jsonl" else tmp_path / given), "row 2", said)


@pytest.mark.parametrize("value", [None, 0.0, 1.5, [1], "", float("nan")])
def test_labels_that_are_none(value, tmp_path):
    make(tmp_path, ["0.png"])
    write(tmp_path / "a.jsonl", [{"file_name": "0.png", "label": value}])
    refused(str(tmp_path / "a.jsonl"), "row 1", "label is")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"", "is empty"),
        ("a.csv", b"file_name,text\n", "no rows"),
        ("a.csv", b"file_name,text\n0.png\n", "has 1 fields: expected 2"),
        ("a.csv", b"file_name,text\n0.png,a,b\n", "has 3 fields"),
        ("a.csv", b"file_name,file_name\n0.png,a\n", "distinct names"),
        ("a.csv", b"file_name;text\n0.png;a\n", "delimiter="),
        ("a.csv", b'file_name,text\n0.png,"a\n', "cannot be read"),
        ("a.csv", b"file_name,text\n0.png,\xff\n", "not UTF-8"),
        ("a.csv", b"file_name,text\n0.png,a\0\n", "zero bytes"),
        ("a.csv", b"text,caption,image\na,b,0.png\n", "several that may be the caption"),
        ("a.csv", b"image,file_name,text\n0.png,0.png,a\n", "several that may be the image"),
        ("a.csv", b"x,y\n0.png,a\n", "image='NAME'"),
        ("a.csv", b"image,label,split\n0.png,a,other\n", "no training part"),
        ("a.csv", b"image,label,split\n0.png,a,test\n", "training part"),
        ("a.csv", b"image,label,split\n0.png,a,\n", "column 'split'"),
        ("a.csv", b"image,text\n0.png," + b"a" * 200_000, "field limit"),
        ("a.jsonl", b"", "no rows"),
        ("a.jsonl", b"{", "line 1"),
        ("a.jsonl", b'{"file_name": "0.png", "text": "a"}\n\n[1]', "line 3"),
        ("a.jsonl", b'{"file_name": "0.png", "file_name": "1.png", "text": "a"}', "twice"),
        ("a.jsonl", b"[" * 100_000, "line 1"),
        ("a.jsonl", b"9" * 5000, "line 1"),
        ("a.parquet", b"", "Parquet"),
        ("a.parquet", b"PAR1 and no more PAR1", "Parquet"),
        ("a.xlsx", b"PK", "expected 'digits', a folder"),
        ("a.pt", b"PK", "expected 'digits', a folder"),
        ("a.json", b"[]", "expected 'digits', a folder"),
    ],
)
def test_tables_that_are_none(name, content, said, tmp_path):
    make(tmp_path, ["0.png", "1.png"])
    (tmp_path / name).write_bytes(content)
    refused(str(tmp_path / name), name, said)


def test_a_parquet_with_flipped_bytes_is_read_or_refused(tmp_path):
    make(tmp_path, [f"{i}.png" for i in range(4)])
    write(tmp_path / "a.parquet", ROWS)
    whole, draw = (tmp_path / "a.parquet").read_bytes(), np.random.default_rng(0)
    for _ in range(30):
        raw = bytearray(whole)
        raw[int(draw.integers(len(raw)))] ^= 255
        (tmp_path / "a.parquet").write_bytes(bytes(raw[: int(draw.integers(len(raw)))] if draw.random() < 0.3 else raw))
        try:
            said = data.load(str(tmp_path / "a.parquet"), 4).summary
        except ConfigError as error:
            said = str(error)
        assert said
        assert "\n" not in said


def test_other_delimiters_and_paths_of_windows(tmp_path):
    make(tmp_path, ["cats/0.png"])
    (tmp_path / "a.csv").write_text("\ufefffile_name;text\ncats\\0.png;a, b\n", encoding="utf-8")
    assert texts(data.load(of("table", tmp_path / "a.csv", delimiter=";"), 4)) == ["a, b"]
    refused(of("table", tmp_path / "a.csv", delimiter=";;"), "one character")


# ---------------------------------------------------------------- what a text names


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("digts", "did you mean 'digits'"),
        ("nowhere", "'nowhere' does not exist"),
        ("", "expected 'digits'"),
        ("fodler(path='x')", "did you mean 'folder'"),
        ("folder(path=x)", "expected Name"),
        ("folder('x')", "expected Name"),
        ("folder()", "path"),
        ("table(path='none.csv')", "none.csv"),
        ("table(path='none.csv', label='a', caption='b')", "none.csv"),
        ("none.csv", "none.csv"),
        ("https://x.org/data", "does not exist"),
        ("a\0b", "does not exist"),
        ("x" * 5000, "too long"),
    ],
)
def test_texts_that_name_no_data(text, said):
    assert said.lower() in refused(text).lower()


def test_a_folder_may_have_brackets_and_a_run_is_named_after_its_data(tmp_path):
    make(tmp_path / "photos (1)", ["a.png"])
    assert len(data.load(str(tmp_path / "photos (1)"), 4)) == 1
    assert data.name_of("digits") == "digits"
    assert data.name_of("folder(path='some/pets', split='train')") == "pets"
    assert data.name_of("a/b.npz") == "b"


def test_the_own_split_of_the_data_is_that_of_every_job(tmp_path):
    from rlfusion.config import Pretrain
    from rlfusion.jobs.pretrain import _digest

    make(tmp_path, ["train/a.png", "test/b.png"])
    split, plain = data.load(str(tmp_path), 4), data.load(of("folder", tmp_path, split="none", conditions="none"), 4)
    settings = Pretrain(data=str(tmp_path), size=4)
    assert levels(split) == levels(plain)[::1] or sorted(levels(split)) == sorted(levels(plain))
    assert _digest(settings, split) != _digest(settings, plain)


def test_classes_of_whole_numbers_stand_in_their_order():
    assert numbered(["10", "2", "-1", "2"])[0] == ("-1", "2", "10")
    assert numbered(["10", "02"])[0] == ("02", "10")
    assert numbered(["10", "2", "x"])[0] == ("10", "2", "x")
