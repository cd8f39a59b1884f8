"""The emoji of ``examples/emoji``, of a stand-in of their package: a few drawn pictures."""

import io
import json
import runpy
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from rlfusion.data import load

ROOT = Path(__file__).parents[1]
PICTURES = runpy.run_path(str(ROOT / "examples" / "emoji" / "pictures.py"))
COLOURFUL = runpy.run_path(str(ROOT / "examples" / "emoji" / "colourful.py"))["colourful"]
INKS = {
    "yellow": (255, 204, 77),
    "red": (221, 46, 68),
    "brown": (193, 105, 79),
    "white": (225, 232, 237),
    "blue": (85, 172, 238),
    "green": (119, 178, 85),
    "pink": (244, 171, 186),
}
"""Twemoji's own."""
FOLDERS = {kind: name for name, kind in PICTURES["KINDS"].items()} | {"face": "face-smiling"}


def drawn(ink: tuple[int, int, int], side: int) -> Image.Image:
    """A disc, cut off on the right, over nothing, with an eye that no colour is asked of."""
    picture = Image.new("RGBA", (64, 64))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((8, 8, 8 + side, 8 + side), fill=(*ink, 255))
    draw.ellipse((20, 20, 24, 24), fill=(20, 20, 20, 255))
    draw.rectangle((44, 0, 64, 64), fill=(0, 0, 0, 0))
    return picture


def packed(path: Path, captions: list[str], each: int = 2) -> Path:
    """A package as npm packs it, with what we read of it."""
    files, entries = {}, []
    for number, caption in enumerate(captions * each):
        ink, kind = caption.split()
        name, png = f"{number}.png", io.BytesIO()
        drawn(INKS[ink], 40 + number).save(png, "PNG")
        files[f"package/img/twitter/64/{name}"] = png.getvalue()
        entries.append({"image": name, "subcategory": FOLDERS[kind], "sort_order": -number})
    entries.append({"image": "of another kind.png", "subcategory": "flag", "sort_order": 1})
    files["package/emoji.json"] = json.dumps(entries).encode()
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            held = tarfile.TarInfo(name)
            held.size = len(content)
            archive.addfile(held, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    return packed(tmp_path_factory.mktemp("npm") / "emoji.tgz", list(PICTURES["CAPTIONS"]))


@pytest.mark.parametrize("word", INKS)
def test_a_colour_has_its_word(word):
    assert PICTURES["colour"](np.asarray(drawn(INKS[word], 48))) == word


def test_a_picture_of_nothing_has_no_colour():
    with pytest.raises(ValueError, match="opaque"):
        PICTURES["colour"](np.zeros((4, 4, 4), np.uint8))


def test_pictures_have_their_captions_and_a_white_ground(package):
    held = PICTURES["read"](package, 16)
    assert list(held) == list(PICTURES["CAPTIONS"])
    assert {len(own) for own in held.values()} == {2}
    larger, smaller = held["red heart"]  # in the package's order, which is not that of its files
    assert (larger != 255).sum() > (smaller != 255).sum()
    assert all((picture[-1, -1] == 255).all() for own in held.values() for picture in own)
    assert np.abs(held["blue fish"][0][8, 3].astype(int) - INKS["blue"]).max() < 10


def test_a_caption_has_its_pictures_in_turns(package):
    held = PICTURES["read"](package, 16)
    images, captions = PICTURES["arrays"](held, 6)
    assert images.shape == (72, 16, 16, 3)
    assert captions[:7].tolist() == ["yellow face"] * 6 + ["red heart"]
    first, second = held["yellow face"]
    for got, expected in zip(images, (first, second, first)):
        assert (got == expected).all()


def test_a_package_of_something_else_is_refused(tmp_path):
    few = packed(tmp_path / "few.tgz", list(PICTURES["CAPTIONS"][:-1]))
    with pytest.raises(SystemExit, match="fewer than two pictures of yellow cat"):
        PICTURES["read"](few, 16)


def test_the_script_writes_what_our_commands_read(package, tmp_path, monkeypatch, capsys):
    out = tmp_path / "emoji.npz"
    monkeypatch.setattr("sys.argv", ["pictures.py", str(package), "--out", str(out), "--size", "8", "--copies", "3"])
    PICTURES["main"]()
    assert "36 images" in capsys.readouterr().out
    data = load(str(out), 8)
    assert (data.captioned, data.shape, len(data)) == (True, (3, 8, 8), 36)
    assert sorted(data.names) == sorted(PICTURES["CAPTIONS"])


def test_grey_has_no_chroma_and_red_all():
    grey, red = torch.full((3, 2, 2), 0.5), torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1).expand(3, 2, 2)
    half = torch.cat([grey[:, :1], red[:, :1]], 1)
    assert COLOURFUL(torch.stack([grey, red, half]), torch.zeros(3)).tolist() == [0.0, 1.0, 0.5]
