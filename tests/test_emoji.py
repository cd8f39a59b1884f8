"""The emoji of ``examples/emoji`` and the whole recipe with them, of a stand-in of their package: drawn pictures."""

import io
import json
import runpy
import shlex
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import rlfusion as rlf
from rlfusion.cli.main import main
from rlfusion.data import load, to_pixels
from rlfusion.rewards import build, task_info

ROOT = Path(__file__).parents[1]
EMOJI = ROOT / "examples" / "emoji"
PICTURES = runpy.run_path(str(EMOJI / "pictures.py"))
GRID = runpy.run_path(str(EMOJI / "grid.py"))
COLOURFUL = runpy.run_path(str(EMOJI / "colourful.py"))["colourful"]
CAPTIONS = PICTURES["CAPTIONS"]
RUNS = {"emoji", "emoji-words", "emoji-clip", "emoji-colourful"}
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


def drawn(ink: tuple[int, int, int], side: int) -> bytes:
    """A PNG: a disc, cut off on the right, over nothing."""
    picture, png = Image.new("RGBA", (64, 64)), io.BytesIO()
    draw = ImageDraw.Draw(picture)
    draw.ellipse((8, 8, 8 + side, 8 + side), fill=(*ink, 255))
    draw.rectangle((44, 0, 64, 64), fill=(0, 0, 0, 0))
    picture.save(png, "PNG")
    return png.getvalue()


def packed(path: Path, without: str = "") -> Path:
    """A package as npm packs it, with what we read of it; the later pictures of a caption are the larger."""
    files = {}
    entries = [{"image": "of another kind.png", "short_name": "flag-ac"}]
    for caption, names in CAPTIONS.items():
        for number, name in enumerate(names):
            files[f"package/img/twitter/64/{name}.png"] = drawn(INKS[caption.split()[0]], 30 + 6 * number)
            entries.append({"image": f"{name}.png", "short_name": name})
    files.pop(f"package/img/twitter/64/{without}.png", None)
    files["package/emoji.json"] = json.dumps(entries).encode()
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            held = tarfile.TarInfo(name)
            held.size = len(content)
            archive.addfile(held, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    return packed(tmp_path_factory.mktemp("npm") / "emoji.tgz")


def test_no_picture_has_two_captions():
    names = [name for own in CAPTIONS.values() for name in own]
    assert len(set(names)) == len(names) == 48
    assert {caption.split()[0] for caption in CAPTIONS} == set(INKS)


def test_pictures_have_their_captions_and_a_white_ground(package):
    held = PICTURES["read"](package, 16)
    assert list(held) == list(CAPTIONS)
    smaller, *_, larger = held["red heart"]
    assert (larger != 255).sum() > (smaller != 255).sum()
    assert all((picture[-1, -1] == 255).all() for own in held.values() for picture in own)
    assert np.abs(held["blue fish"][3][8, 5].astype(int) - INKS["blue"]).max() < 10


def test_a_caption_has_its_pictures_in_turns(package):
    held = PICTURES["read"](package, 16)
    images, captions = PICTURES["arrays"](held, 6)
    assert images.shape == (72, 16, 16, 3)
    assert captions[:7].tolist() == ["yellow face"] * 6 + ["yellow cat"]
    for number, got in enumerate(images[:6]):
        assert (got == held["yellow face"][number % 4]).all()


def test_a_package_of_something_else_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="no picture cactus: is it"):
        PICTURES["read"](packed(tmp_path / "few.tgz", "cactus"), 16)


def test_grey_has_no_chroma_and_red_all():
    grey, red = torch.full((3, 2, 2), 0.5), torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1).expand(3, 2, 2)
    half = torch.cat([grey[:, :1], red[:, :1]], 1)
    assert COLOURFUL(torch.stack([grey, red, half]), torch.zeros(3)).tolist() == [0.0, 1.0, 0.5]


def test_a_panel_has_a_row_a_caption():
    samples = torch.zeros(2, 3, 3, 4, 4)
    samples[1, 2, 0] = 1
    pixels = np.asarray(GRID["panel"](samples, 2))
    assert pixels.shape == (16, 24, 3)
    assert (pixels[8:, 16:] == (255, 0, 0)).all()
    assert not pixels[:8].any()
    assert not pixels[:, :16].any()


def commands(text: str) -> list[list[str]]:
    """The words of each line that calls npm, python or rlfusion."""
    lines = [shlex.split(line.removeprefix("time ")) for line in text.replace("\\\n", " ").splitlines()]
    return [words for words in lines if words and words[0] in ("npm", "python", "rlfusion")]


RECIPE = commands((EMOJI / "run.sh").read_text())
NET = "UNet(width=8,multipliers=(1,2),depth=1,attention=())"
BRIEFLY = (
    "--evaluation.samples 60 --evaluation.every 0 --updates 1 --rollout.samples_per_prompt 4 "
    "--monitor.every 1 --monitor.image 100 --monitor.agreement 1 --monitor.diversity 0"  # there is a best model
)
FEW = {
    "pictures.py": "--size 8 --copies 8",
    "pretrain": f"--model.net {NET} --train.steps 20 --evaluation.samples 60",
    "train-clip": "--steps 80",
    "finetune": BRIEFLY,
    "evaluate": "--evaluation.samples 60",
    "grid.py": "--each 2",
}
"""What makes seconds of the recipe's hour; of an option that comes twice the last one counts."""


def do(words: list[str]) -> None:
    """One command of the recipe, briefly."""
    if words[0] == "python":
        script = ROOT / words[1]
        sys.argv = [script.name, *words[2:], *FEW[script.name].split()]
        runpy.run_path(str(script), run_name="__main__")
    elif words[0] == "rlfusion":
        assert main([*words[1:], *FEW[words[1]].split()]) == 0


@pytest.fixture(scope="module")
def place(package, tmp_path_factory) -> Path:
    """A folder after the whole recipe."""
    place = tmp_path_factory.mktemp("emoji")
    shutil.copy(package, place / "emoji-datasource-twitter-16.0.0.tgz")
    (place / "examples").symlink_to(ROOT / "examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(sys, "argv", [])
        for words in RECIPE:
            do(words)
    return place


def test_the_recipe_is_that_of_the_page():
    page = (ROOT / "docs" / "emoji.md").read_text()
    told = [words for block in page.split("```bash\n")[1:] for words in commands(block.split("```")[0])]
    assert told == RECIPE


def test_the_recipe_leaves_its_runs_and_its_sheet(place):
    data = load(str(place / "emoji.npz"), 8)
    assert (data.captioned, data.shape, len(data)) == (True, (3, 8, 8), 96)
    assert sorted(data.names) == sorted(CAPTIONS)
    assert {run.name for run in (place / "runs").iterdir()} - {"cache"} == RUNS
    with Image.open(place / "emoji.png") as sheet:
        assert sheet.height == GRID["HEAD"] + 12 * 8 * 2


def test_the_clip_reward_of_a_picture_is_that_of_its_own_caption(place):
    """The number of a caption is the same in the data, in the model and in the table of the reward."""
    data, model = load(str(place / "emoji.npz"), 8), rlf.load(place / "runs" / "emoji")
    assert model.names == tuple(data.names)
    options = {"clip_score": {"model": str(place / "runs" / "emoji-words")}}
    reward = build("clip_score", options, task_info(model.names, model.shape))
    x, colours = to_pixels(data.x), [name.split()[0] for name in data.names]
    for step in range(1, len(colours)):
        other = (data.label + step) % len(colours)
        differ = torch.tensor([colours[a] != colours[b] for a, b in zip(data.label, other)])
        assert reward(x, data.label)[differ].mean() > reward(x, other)[differ].mean() + 0.3
